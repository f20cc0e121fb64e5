"""What a search costs, beside what it replaces.

    python benchmarks/pho.py                    # candidate, search, perplexity of what was found, projection
    python benchmarks/pho.py --hill-climb 20    # and 20 candidates of the hill climb on perplexity; resumes at will

One process measures, on one model: a perplexity evaluation of the pruned model; a candidate on the sample that
PHOSearchModifier takes by default; the default search; the held-out perplexity of what it found, RIA and Wanda. The
hill climb starts at RIA and lowers validation perplexity; its study is saved after every candidate.
"""

import argparse
import math
import statistics
import time

import torch

from crepe_llm.search.fitness import DEFAULT_PROXY, PROXIES, evaluate
from crepe_llm.search.optimisers import OPTIMISERS
from crepe_llm.search.search import search
from crepe_llm.search.space import RIA, Coefficients
from crepe_llm.search.study import Study
from hill_climb import hill_climb
from pho_common import LAYERS_PER_KIND, MODELS, ROWS, WANDA, Bench, parse_mask
from studies import studies_folder

RESULTS = studies_folder() / "hill_climb"
# LLaMA-2-7B's linear layers, from its config: (d_out, d_in) and how many of each kind.
LLAMA_2_7B = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--mask", default="2:4", help='such as "2:4" or "0.6:matrix"')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=16384, help="of a perplexity evaluation")
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--hill-climb", type=int, metavar="N", help="candidates of the hill climb")
    options = parser.parse_args()
    mask, proxy = parse_mask(options.mask), PROXIES[DEFAULT_PROXY]
    print(f"{options.model}, {mask}, seed {options.seed}, {torch.get_num_threads()} threads, bf16 forward passes")

    started = time.perf_counter()
    bench = Bench(options.model, options.seed)
    print(
        f"loading, calibrating on {bench.calibration.numel()} tokens, sampling: {time.perf_counter() - started:.1f} s"
    )

    def perplexity(coefficients: Coefficients, texts: list[str]) -> float:
        with bench.pruned(coefficients, mask):
            return bench.perplexity(texts, options.tokens)

    started = time.perf_counter()
    with bench.pruned(RIA, mask):
        pruning = time.perf_counter() - started
        started = time.perf_counter()
        bench.perplexity(bench.corpus.valid, options.tokens)
        evaluation = time.perf_counter() - started
    print(f"pruning the model {pruning:.2f} s, its perplexity on {options.tokens} tokens {evaluation:.1f} s")

    seconds = []
    for _ in range(21):
        started = time.perf_counter()
        evaluate(bench.samples, RIA, mask, proxy)
        seconds.append(time.perf_counter() - started)
    candidate = statistics.median(seconds[1:])
    print(
        f"a candidate on {len(bench.samples)} layers x {ROWS} rows: {candidate * 1e3:.0f} ms (median of 20), "
        f"1/{evaluation / candidate:.0f} of the evaluation alone"
    )

    study = search(
        lambda coefficients: evaluate(bench.samples, coefficients, mask, proxy),
        Study(options.model, mask, proxy.name, proxy.higher_is_better, seed=options.seed),
        candidates=options.candidates,
    )
    print(f"\nsearch: {study}")
    print(f"\nperplexity on {options.tokens} test tokens of {bench.corpus.name}, windows of 512:")
    tested = {}
    for name, coefficients in (("found", study.recommended), ("RIA", RIA), ("Wanda", WANDA)):
        tested[name] = perplexity(coefficients, bench.corpus.test)
        print(f"  {name:<6} {tested[name]:.2f}", flush=True)

    multiply = sum(sample.rows.numel() * sample.weight.shape[1] ** 2 for sample in bench.samples)
    kinds = [shape for shape, count in LLAMA_2_7B.items() for _ in range(count)]
    larger = sum(LAYERS_PER_KIND * ROWS * d_in**2 for _, d_in in kinds)
    projected = candidate * larger / multiply
    print(
        f"\nprojection: a candidate's Gram products are {multiply / 1e9:.2f} G multiply-adds here and "
        f"{larger / 1e9:.1f} G for LLaMA-2-7B ({LAYERS_PER_KIND} of each of its {len(kinds)} kinds of layers, {ROWS} "
        f"rows), {larger / multiply:.0f} times as many:\n{projected:.1f} s a candidate, "
        f"{projected * options.candidates / 60:.0f} minutes for {options.candidates} candidates on this machine, "
        "calibration not counted"
    )

    if options.hill_climb is not None:
        OPTIMISERS["hill_climb"] = hill_climb
        path = RESULTS / f"hill_climb-{options.model}-{options.mask.replace(':', '-')}-seed{options.seed}.json"
        climb = search(
            lambda coefficients: perplexity(coefficients, bench.corpus.valid),
            Study(
                options.model,
                mask,
                f"perplexity of {options.tokens} validation tokens",
                higher_is_better=False,
                optimiser="hill_climb",
                seed=options.seed,
            ),
            candidates=options.hill_climb,
            path=path,
            progress=lambda now: print(f"hill climb: {now.candidates[-1]}", flush=True),
        )
        print(f"\nhill climb: {climb}\nits successive bests, with their test perplexity:")
        best, spent = math.inf, 0.0
        for candidate in climb.candidates:
            spent += candidate.seconds
            if climb.loss(candidate) >= best:
                continue
            best = climb.loss(candidate)
            reached = perplexity(candidate.coefficients, bench.corpus.test)
            print(f"  {spent:5.0f} s, {spent / study.seconds:3.0f} times the search: {reached:.2f}", flush=True)
            if reached <= tested["found"]:
                print("  which is as good as what the search found")
                break


if __name__ == "__main__":
    main()
