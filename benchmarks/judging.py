"""On which text should a pruned model be judged that is pruned by little text?

    python benchmarks/judging.py --models smollm2 --structures 2:4
    python benchmarks/judging.py --report

Every set of coefficients prunes the model twice, block by block as a recipe does: by all of the calibration text, and
by each half of it. The first is judged on the calibration text itself, which leaks, as the text has pruned the model;
on other articles that were drawn alike; and on validation, test and news text. Of the second each half is judged on the
other, which does not leak, but other text makes other masks. What is judged is the divergence from the dense model, in
nats a token, and perplexity on test text. The report ranks the sets by each and says how far it agrees with test text.

With --refit pcg, weights are refitted after the mask, by the text that has made it.

Rows are appended to --results as they are measured, and not measured again.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from crepe_llm import samples
from crepe_llm.evaluation.perplexity import perplexity
from crepe_llm.functional.compensation import conjugate_gradients
from crepe_llm.pruning.block_pass import Calibration, Wanted
from crepe_llm.pruning.layer import Layer
from crepe_llm.search.divergence import Divergence
from crepe_llm.search.known import known_points
from crepe_llm.search.rehearsal import Pruning, calls_of, mask_step, rehearsed
from crepe_llm.search.space import RIA, WANDA, Coefficients
from pho_common import MODELS, WINDOW, parse_mask
from records import RESULTS, Row, append, is_done, read

PROTOCOL = 1
WAYS = ("itself", "halves", "alike", "valid", "test", "news")
# What a search that judged each half by the other took for SmolLM2 at 2:4, and what it had liked nearly as much.
FOUND = (
    Coefficients(1.0, 18.0, 0.295, 19, 0.927),
    Coefficients(1.0, 16.6, 0.349, 9, 0.802),
    Coefficients(1.0, 19.9, 0.128, 19, 0.735),
)


class Bench:
    """A dense model, its calibration text and the texts that it is judged on."""

    def __init__(self, key: Row) -> None:
        folder = MODELS[key["model"]]()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self._mask, self._refit = parse_mask(key["structure"]), key["refit"]
        head = self._model.get_output_embeddings()
        layers = {name: module for name, module in self._model.named_modules() if module is not head}
        self._wanted = {
            module: Wanted(name, gram=bool(self._refit))
            for name, module in layers.items()
            if isinstance(module, torch.nn.Linear)
        }
        corpus, tokens = samples.wikipedia(), key["windows"] * WINDOW
        self._text = self._drawn(key["windows"], key["seed"])
        texts = {
            "itself": self._text,
            "alike": self._drawn(key["windows"], key["seed"] + 7),
            "valid": self._windows(corpus.valid, tokens),
            "test": self._windows(corpus.test, tokens),
            "news": self._windows(samples.news(), tokens),
        }
        self._test = torch.stack(texts["test"])
        self._places, windows = {}, []
        for way, found in texts.items():
            self._places[way] = range(len(windows), len(windows) + len(found))
            windows += found
        self._divergence = Divergence(self._model, windows)

    def judged(self, coefficients: Coefficients) -> Row:
        """By way of judging, the divergence in nats a token; and test perplexity."""
        pruning = Pruning(self._wanted, Calibration(), self._step(coefficients))
        own = self._places["itself"]
        halves: list[float] = []
        for half in (0, 1):
            with rehearsed(calls_of(self._model, self._text[1 - half :: 2]), pruning):
                halves += [self._divergence(window) for window in own[half::2]]
        with rehearsed(calls_of(self._model, self._text), pruning):
            losses = {way: [self._divergence(window) for window in place] for way, place in self._places.items()}
            found = perplexity(self._model, self._test, corpus="test", progress=False).perplexity
        losses["halves"] = halves
        return {
            "divergence": {way: sum(losses[way]) / len(losses[way]) / (WINDOW - 1) for way in WAYS},
            "perplexity": found,
        }

    def _step(self, coefficients: Coefficients) -> Callable[[Layer], None]:
        mask = mask_step(coefficients, self._mask)

        def run(layer: Layer) -> None:
            mask(layer)
            if self._refit:
                assert layer.keep is not None
                fitted = conjugate_gradients(layer.dense.float(), layer.keep, layer.gram)
                layer.weight = fitted.to(layer.weight.dtype)

        return run

    def _drawn(self, windows: int, seed: int) -> list[torch.Tensor]:
        data = samples.calibration_windows(
            self._tokenizer, samples.wikipedia().train, windows=windows, length=WINDOW, seed=seed
        )
        return [torch.tensor(ids) for ids in data["input_ids"]]

    def _windows(self, texts: list[str], tokens: int) -> list[torch.Tensor]:
        return list(samples.token_windows(self._tokenizer, texts, WINDOW, tokens=tokens))


def candidates(key: Row) -> list[Coefficients]:
    """RIA's coefficients, Wanda's, those that are known to be good on some model, and what a search found."""
    return list(dict.fromkeys([RIA, WANDA, *known_points(parse_mask(key["structure"])), *FOUND]))


def measure(key: Row, path: Path, rows: list[Row]) -> None:
    """All of one model, structure and seed that is not on record."""
    bench = None
    for coefficients in candidates(key):
        full = key | {"coefficients": coefficients.fields}
        if is_done(full, rows, PROTOCOL):
            continue
        bench = bench or Bench(key)
        started = time.perf_counter()
        found = bench.judged(coefficients)
        rows.append(append(path, PROTOCOL, full | found | {"seconds": round(time.perf_counter() - started, 1)}))
        print(f"{coefficients}: {found}", flush=True)


def report(rows: list[Row]) -> None:
    """For each model, structure and seed what each way of judging says of each set of coefficients."""
    names = ("model", "structure", "seed", "windows", "refit")
    for cell in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        mine = [row for row in rows if tuple(row[name] for name in names) == cell]
        model, structure, seed, windows, refit = cell
        print(f"\n{model}, {structure}{f', {refit}' if refit else ''}, seed {seed}, {windows} windows of {WINDOW}:\n")
        print(f"| row, column, neighbourhood, kernel, exponent | {' | '.join(WAYS)} | test perplexity |")
        print("|---|" + "---|" * (len(WAYS) + 1))
        for row in sorted(mine, key=lambda row: row["perplexity"]):
            losses = [f"{row['divergence'][way]:.3f}" for way in WAYS]
            told = ", ".join(f"{value:.3g}" for value in row["coefficients"].values())
            print(f"| {told} | {' | '.join(losses)} | {row['perplexity']:.2f} |")
        if len(mine) > 2:
            perplexities = [row["perplexity"] for row in mine]
            ranks = [spearmanr([row["divergence"][way] for row in mine], perplexities).statistic for way in WAYS]
            print(f"| rank correlation with test perplexity | {' | '.join(f'{rank:+.2f}' for rank in ranks)} | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--structures", nargs="+", default=["2:4"], help="2:4, or a sparsity and a group: 0.6:matrix")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration windows")
    parser.add_argument("--windows", type=int, default=16, help="of each text (%(default)s)")
    parser.add_argument("--refit", default="", choices=["", "pcg"], help="what follows the mask")
    parser.add_argument("--results", type=Path, default=RESULTS / "judging.jsonl")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    rows = read(options.results)
    for model in () if options.report else options.models:
        for structure in options.structures:
            for seed in options.seeds:
                key = {"model": model, "structure": structure, "seed": seed}
                measure(key | {"windows": options.windows, "refit": options.refit}, options.results, rows)
    report([row for row in rows if row["protocol"] == PROTOCOL])


if __name__ == "__main__":
    main()
