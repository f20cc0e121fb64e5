"""What a search costs, and what the evaluations cost that it replaces.

    python benchmarks/pho.py                    # candidate, search, perplexity of what was found, projection
    python benchmarks/pho.py --hill-climb 20    # and 20 candidates of the hill climb on perplexity; resumes at will
    python benchmarks/pho.py --project          # the default search on LLaMA-2-7B and one GPU, by arithmetic alone

One process measures, on one model: a perplexity evaluation of the pruned model; a candidate on the sample that
PHOSearchModifier takes by default; the search, from RIA's coefficients, as PHOSearchModifier does it (by proxy, then in
stages on the calibration windows); the held-out perplexity of what it found, RIA and Wanda. The hill climb starts at
RIA and lowers validation perplexity; its study is saved after every candidate.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from crepe_llm.pruning.block_pass import Calibration, Wanted
from crepe_llm.search.fitness import DEFAULT_PROXY, PROXIES, evaluate
from crepe_llm.search.known import known_points
from crepe_llm.search.optimisers import OPTIMISERS
from crepe_llm.search.rehearsal import Pruning, mask_step
from crepe_llm.search.search import search
from crepe_llm.search.space import RIA, WANDA, Coefficients, Mask, SearchSpace
from crepe_llm.search.stages import DEFAULT_ROUNDS, WINDOW, Cost, Measure, choose_rounds, judge
from crepe_llm.search.study import Study
from crepe_llm.search.trials import Plan, Stage
from crepe_llm.search.whole_model import WholeModel
from hill_climb import hill_climb as by_hill_climbing
from pho_common import LAYERS_PER_KIND, MODELS, ROWS, Bench, parse_mask
from records import RESULTS, Row, append
from studies import studies_folder

# Raised by every change of a default or of how something is measured.
# 1: by the proxy alone. 2: in three stages, the first two by masks from the dense model's statistics. 3: both stages
# block by block, each judged on half of the text. 4: masks judged on the half that did not prune. 5: all text prunes
# and judges. 6: which weights of unstructured masks compete is searched for, too.
PROTOCOL = 6
# LLaMA-2-7B's linear layers, from its config: (d_out, d_in) and how many of each kind.
LLAMA_2_7B = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}
LLAMA_BLOCKS, LLAMA_VOCABULARY = 32, 32000
# What is taken for one GPU, an A100: multiply-adds of bf16 a second, twice, and the share of them that forward passes
# reach; bytes a second of its memory; bytes a second from the CPU's memory, where the toolkit keeps weights.
GPU_FLOPS, GPU_SHARE, GPU_BYTES, LINK_BYTES = 312e12, 0.4, 1.5e12, 25e9
# Scoring and masking read and write a weight in fp32 about so many times.
PRUNING_TOUCHES = 40
# Calibration texts, in tokens, and those that calibrate (crepe_llm.search.whole_model).
SEQUENCE, CALIBRATING = 2048, 32768
PROXY = PROXIES[DEFAULT_PROXY]

Perplexity = Callable[[Coefficients, list[str]], float]


def costs(bench: Bench, mask: Mask, tokens: int) -> dict[str, float]:
    """Seconds of pruning the model, of a perplexity evaluation, and of a candidate (median of 20)."""
    started = time.perf_counter()
    with bench.pruned(RIA, mask):
        pruning = time.perf_counter() - started
        started = time.perf_counter()
        bench.perplexity(bench.corpus.valid, tokens)
        evaluation = time.perf_counter() - started
    print(f"pruning the model {pruning:.2f} s, its perplexity on {tokens} tokens {evaluation:.1f} s")
    seconds = []
    for _ in range(21):
        started = time.perf_counter()
        evaluate(bench.samples, RIA, mask, PROXY)
        seconds.append(time.perf_counter() - started)
    candidate = statistics.median(seconds[1:])
    print(
        f"a candidate on {len(bench.samples)} layers x {ROWS} rows: {candidate * 1e3:.0f} ms (median of 20), "
        f"1/{evaluation / candidate:.0f} of the evaluation alone"
    )
    return {"pruning": pruning, "evaluation": evaluation, "candidate": candidate}


def searched(bench: Bench, mask: Mask, options: argparse.Namespace, path: Path) -> Study:
    """The search by proxy and in stages, from RIA's coefficients; the same one again is read from its study."""
    space = SearchSpace(comparison_groups=("row", "matrix") if mask.mask_structure == "0:0" else ())
    study = search(
        lambda coefficients: evaluate(bench.samples, coefficients, mask, PROXY),
        Study(options.model, mask, PROXY.name, PROXY.higher_is_better, space=space, seed=options.seed),
        candidates=options.candidates,
        path=path,
    )
    wanted = {module: Wanted(layer) for layer, module in bench.layers.items()}
    known = [RIA] if options.without_starts else [RIA, *known_points(mask)]
    own, *starts = (space.competing(each, mask.comparison_group) for each in known)
    pruned = WholeModel(
        bench.model,
        bench.calibration.unbind(),
        (*starts, own)[0],
        lambda coefficients, masks_alone: Pruning(wanted, Calibration(), mask_step(coefficients, mask)),
    )
    quick, last = pruned.measures()

    def plan(seconds: float) -> Plan:
        pruned.prepare()
        cost = Cost(timed(quick, range(2)), pruned.seconds, seconds)
        rounds = choose_rounds(pruned.tokens, cost, tokens=options.search_tokens)
        return Plan(f"tokens={options.search_tokens}", rounds, cost.of(rounds) if rounds else 0.0)

    def progress(stage: Stage) -> None:
        print(f"{stage.name}: {stage.trials[-1].loss:.4f} nats a token: {stage.trials[-1].coefficients}", flush=True)

    judge(study, [own, *starts], (quick, last), plan, path, progress)
    return study


def timed(measure: Measure, windows: range) -> float:
    """Seconds of pruning by RIA's coefficients and judging on some windows."""
    started = time.perf_counter()
    measure.losses(RIA, windows)
    return time.perf_counter() - started


def projection(bench: Bench, candidate: float, candidates: int) -> dict[str, float]:
    """What a candidate on LLaMA-2-7B would take, by the multiply-adds of its Gram products."""
    multiply = sum(sample.rows.numel() * sample.weight.shape[1] ** 2 for sample in bench.samples)
    kinds = [shape for shape, count in LLAMA_2_7B.items() for _ in range(count)]
    larger = sum(LAYERS_PER_KIND * ROWS * d_in**2 for _, d_in in kinds)
    projected = candidate * larger / multiply
    print(
        f"\nprojection: a candidate's Gram products are {multiply / 1e9:.2f} G multiply-adds here and "
        f"{larger / 1e9:.1f} G for LLaMA-2-7B ({LAYERS_PER_KIND} of each of its {len(kinds)} kinds of layers, {ROWS} "
        f"rows), {larger / multiply:.0f} times as many:\n{projected:.1f} s a candidate, "
        f"{projected * candidates / 60:.0f} minutes for {candidates} candidates on this machine, "
        "calibration not counted"
    )
    return {"multiply_adds": multiply, "llama_2_7b_multiply_adds": larger, "llama_2_7b_candidate": projected}


def gpu_projection() -> None:
    """Say what the default search on LLaMA-2-7B would take on one GPU, by counting; nothing is measured."""
    weights = LLAMA_BLOCKS * sum(d_out * d_in * count for (d_out, d_in), count in LLAMA_2_7B.items())
    (many, little), (few, much) = DEFAULT_ROUNDS
    # Pruned block by block are the guess and the finalists, in three passes.
    calibrated = (1 + few) * 3 * CALIBRATING
    judged = many * little + few * much + much
    passes = calibrated / SEQUENCE + judged / WINDOW
    prunings = many + few + 2
    flops = 2 * (weights + LLAMA_VOCABULARY * 4096) * (calibrated + judged)
    proxy = 2 * 200 * sum(LAYERS_PER_KIND * ROWS * d_in**2 * count for (_, d_in), count in LLAMA_2_7B.items())
    seconds = {
        "forward passes": flops / (GPU_FLOPS * GPU_SHARE),
        "scores and masks": prunings * weights * PRUNING_TOUCHES * 4 / GPU_BYTES,
        "the proxy's products": proxy / (GPU_FLOPS * GPU_SHARE / 16),  # in fp32
        "weights to the GPU, if they wait on the CPU": passes * 2 * weights / LINK_BYTES,
    }
    print(
        f"LLaMA-2-7B, {weights / 1e9:.2f} G weights in blocks: {judged:,} tokens judged and {calibrated:,} that "
        f"calibrate are {flops:.2e} operations in {passes:.0f} passes; {prunings} prunings"
    )
    for what, taken in seconds.items():
        print(f"  {what:<44}{taken / 60:6.1f} minutes")
    print(f"  {'together':<44}{sum(seconds.values()) / 60:6.1f} minutes")


def hill_climb(bench: Bench, study: Study, goal: float, perplexity: Perplexity, options: argparse.Namespace) -> Row:
    """Climb on validation perplexity; its successive bests with their test perplexity, until one reaches the goal."""
    mask = options.mask.replace(":", "-")
    OPTIMISERS["hill_climb"] = by_hill_climbing
    path = studies_folder() / "hill_climb" / f"hill_climb-{options.model}-{mask}-seed{options.seed}.json"
    resumed = path.exists()
    climb = search(
        lambda coefficients: perplexity(coefficients, bench.corpus.valid),
        Study(
            options.model,
            study.mask,
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
    best, spent, bests = math.inf, 0.0, []
    for candidate in climb.candidates:
        spent += candidate.seconds
        if climb.loss(candidate) >= best:
            continue
        best = climb.loss(candidate)
        reached = perplexity(candidate.coefficients, bench.corpus.test)
        bests.append({"seconds": spent, "perplexity": reached})
        print(f"  {spent:5.0f} s, {spent / study.total_seconds:3.0f} times the search: {reached:.2f}", flush=True)
        if reached <= goal:
            print("  which is as good as what the search found")
            break
    return {"resumed": resumed, "bests": bests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--mask", default="2:4", help='such as "2:4" or "0.6:matrix"')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=16384, help="of a perplexity evaluation")
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--search-tokens", type=int, help="the most that the search's stages take")
    parser.add_argument("--without-starts", action="store_true", help="know nothing that was good on other models")
    parser.add_argument("--hill-climb", type=int, metavar="N", help="candidates of the hill climb")
    parser.add_argument("--results", type=Path, default=RESULTS / "pho.jsonl", help="a row a call")
    parser.add_argument("--project", action="store_true", help="only say what LLaMA-2-7B would take on a GPU")
    options = parser.parse_args()
    if options.project:
        gpu_projection()
        return
    mask = parse_mask(options.mask)
    print(f"{options.model}, {mask}, seed {options.seed}, {torch.get_num_threads()} threads, bf16 forward passes")

    started = time.perf_counter()
    bench = Bench(options.model, options.seed)
    loading, tokens = time.perf_counter() - started, bench.calibration.numel()
    print(f"loading, calibrating on {tokens} tokens, sampling: {loading:.1f} s")
    row: Row = {
        name: getattr(options, name)
        for name in ("model", "mask", "seed", "tokens", "candidates", "search_tokens", "without_starts")
    }
    row |= {"loading": loading, **costs(bench, mask, options.tokens)}

    def perplexity(coefficients: Coefficients, texts: list[str]) -> float:
        with bench.pruned(coefficients, mask):
            return bench.perplexity(texts, options.tokens)

    settings = f"{options.search_tokens}{'-bare' * options.without_starts}"
    name = f"{options.model}-{options.mask.replace(':', '-')}-seed{options.seed}-{settings}.json"
    study = searched(bench, mask, options, studies_folder() / "whole" / name)
    print(f"\nsearch: {study}\n\nperplexity on {options.tokens} test tokens of {bench.corpus.name}, windows of 512:")
    tested = {}
    for name, coefficients in (("found", study.recommended), ("RIA", RIA), ("Wanda", WANDA)):
        tested[name] = perplexity(coefficients, bench.corpus.test)
        print(f"  {name:<6} {tested[name]:.2f}", flush=True)
    row |= {
        "search": study.total_seconds,
        "by_proxy": study.seconds,
        "found": study.recommended.fields,
        "perplexity": tested,
    }
    row |= projection(bench, row["candidate"], options.candidates)
    if options.hill_climb is not None:
        row["hill_climb"] = hill_climb(bench, study, tested["found"], perplexity, options)
    append(options.results, PROTOCOL, row)


if __name__ == "__main__":
    main()
