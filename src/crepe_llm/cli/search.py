"""`crepe search`: the CRePE coefficients that suit a model."""

import argparse
import contextlib
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crepe_llm.cli.common import (
    HelpFormatter,
    add_calibration,
    add_verbose,
    at_least,
    calibration_texts,
    check_new_file,
    heard_once,
    require,
)
from crepe_llm.cli.models import MODEL_HELP, open_model, window_length
from crepe_llm.cli.plan import device_in_words
from crepe_llm.cli.quiet import Progress, quiet
from crepe_llm.cli.results import add_json, check_json, write_json
from crepe_llm.recipe_files import shipped_recipes

if TYPE_CHECKING:
    from crepe_llm.modifiers import PHOSearchModifier
    from crepe_llm.search.study import Study

_WIDTH = 110  # of the progress line


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "search",
        help="search for a model's CRePE coefficients",
        description=(
            "Search for the coefficients with which CRePE prunes this model best, without pruning it: by a proxy "
            "first, then by how far the pruned model's predictions are from the dense model's. The same text prunes "
            "and judges. The shipped recipe's coefficients stay unless others are clearly better, and also where each "
            "half of the text judges what the other half would choose, or by a stricter test on all of it. The study "
            "is saved as it grows; the same command resumes it."
        ),
        epilog=(
            "examples:\n"
            "  crepe search MODEL --mask-structure 2:4 --text FILE --study study.json\n"
            "  torchrun --nproc-per-node 2 -m crepe_llm search MODEL --text FILE --study study.json\n"
            "  crepe search smollm2 --sparsity 0.6 --comparison-group matrix --sample --samples 16 --length 512 \\\n"
            "      --study smollm2-60.json --plot smollm2-60.png\n"
            "A recipe uses it with `study: FILE` under PHOSearchModifier, or with the printed lines.\n"
        ),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--study", metavar="FILE", type=Path, required=True, help="where the study is saved (JSON)")
    masks = parser.add_mutually_exclusive_group()
    masks.add_argument(
        "--mask-structure",
        metavar="N:M",
        default="2:4",
        help="search for masks that prune N of every M weights (%(default)s)",
    )
    masks.add_argument("--sparsity", type=float, help="search for unstructured masks of this sparsity instead")
    parser.add_argument(
        "--comparison-group",
        choices=("row", "matrix"),
        default="matrix",
        help="which weights compete in an unstructured mask by the coefficients to be beaten (%(default)s); others are "
        "tried in both ways",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--tokens", type=at_least(1), help="the most tokens that pruned models are judged on (328,000)")
    budget.add_argument("--minutes", type=float, help="the most time that the search may take, calibration aside")
    parser.add_argument("--candidates", type=at_least(1), help="how many coefficients the proxy judges (200)")
    parser.add_argument(
        "--proxy", help="what judges coefficients first, on a few layers alone (balanced_reconstruction)"
    )
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="also draw the search into this file (needs matplotlib)"
    )
    add_verbose(parser)
    add_calibration(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    require("search", "llmcompressor", "transformers", "accelerate")
    check_json(options)
    check_new_file(options.study, "--study")
    _check_plot(options.plot)
    with heard_once(), quiet("search", options.verbose) as progress:
        from crepe_llm import processes

        processes.start()
        search = _search(options, progress)
    if processes.is_first():
        _report(options, search, progress)


def _check_plot(path: Path | None) -> None:
    """Raise OSError, ImportError or ValueError if the search cannot be drawn into a file."""
    check_new_file(path, "--plot")
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise ValueError(f"--plot {path}: {path.suffix} is no format of a plot; take one of {', '.join(sorted(known))}")


def _report(options: argparse.Namespace, search: "PHOSearchModifier", progress: Progress) -> None:
    """Print what was found, and write it as JSON."""
    from crepe_llm import processes

    study = search.result
    assert study is not None and search.chosen  # oneshot has run it
    print(study.stages[-1].table(4))
    counts = [f"{len(study.candidates)} candidates by proxy"]
    counts += [f"{len(stage.trials)} {stage.name.partition(': ')[2]}" for stage in study.stages]
    together = f" of {processes.count()} processes together" * (processes.count() > 1)
    progress.tell(
        "searched", f"{', '.join(counts)}; {study.total_seconds:.0f} s{together}; all of it is in {options.study}"
    )
    if study.recommended == study.stages[-1].trials[0].coefficients:
        progress.tell("chosen", "the incumbent's coefficients, as none are clearly better")
    else:
        progress.tell("chosen", "coefficients that are clearly better than the incumbent's")
    print("CRePEModifier:")
    for name, value in search.chosen.items():
        print(f"  {name}: {value if isinstance(value, str) else f'{value:.4g}'}")
    if options.plot is not None:
        study.plot(options.plot)
    if progress.log is not None:
        progress.tell("log", str(progress.log))
    write_json(
        options,
        {
            "model": options.model,
            "mask": str(study.mask),
            "coefficients": search.chosen,
            "proxy": study.proxy,
            "candidates": len(study.candidates),
            "seconds": study.total_seconds,
            "study": options.study,
            "log": progress.log,
        },
    )


def _search(options: argparse.Namespace, progress: Progress) -> "PHOSearchModifier":
    """Say the plan, and search; the modifier, which holds the study."""
    from llmcompressor import oneshot

    from crepe_llm import processes, samples
    from crepe_llm.modifiers import PHOSearchModifier
    from crepe_llm.oneshot.recipes import read_recipe

    fields = {PHOSearchModifier.__name__: _fields(options)}
    (search,) = read_recipe({"search_stage": {"search_modifiers": fields}}).modifiers
    assert isinstance(search, PHOSearchModifier)
    source = open_model(options, dense=True)
    length = window_length(options.length, source)
    corpus, texts = calibration_texts(options, length)
    windows = samples.calibration_windows(
        source.tokenizer, texts, windows=options.samples, length=length, seed=options.seed
    )
    progress.tell("model", f"{options.model}, {type(source.config).__name__.removesuffix('Config')}")
    masks = (
        options.mask_structure
        if options.sparsity is None
        else f"{options.sparsity:.0%} of each {search.comparison_group}, or of what is better"
    )
    progress.tell("masks", masks)
    progress.tell("budget", _budget(options))
    progress.tell("calibration", f"{options.samples} windows of {length} tokens of {corpus}, seed {options.seed}")
    together = f", {processes.count()} processes" * (processes.count() > 1)
    progress.tell("device", device_in_words() + together)
    progress.tell("study", str(options.study))
    with _followed(progress, options, source.config.get_text_config().num_hidden_layers):
        oneshot(
            model=source.load(on_device=False),
            tokenizer=source.tokenizer,
            recipe=search,
            dataset=windows,
            num_calibration_samples=options.samples,
            max_seq_length=length,
            shuffle_calibration_samples=False,
            trust_remote_code_model=options.trust_remote_code,
        )
    return search


def _budget(options: argparse.Namespace) -> str:
    """What the search may take, in words."""
    if options.minutes is not None:
        return f"{options.minutes:g} minutes, calibration aside"
    from crepe_llm.search.stages import DEFAULT_ROUNDS

    (many, little), (few, much) = DEFAULT_ROUNDS
    most = f"{many} candidates on {little} tokens each, the best {few} on {much}, as far as there is text"
    if options.tokens is not None:
        most = f"pruned models judged on {options.tokens:,} tokens"
    return f"{options.candidates or 200} candidates by proxy, then {most}"


@contextlib.contextmanager
def _followed(progress: Progress, options: argparse.Namespace, blocks: int) -> Iterator[None]:
    """Show how far a search is inside the block: the blocks that are calibrated, then its study, whenever it is saved.

    That nothing is clearly better is a result, which is printed as one, and no warning.
    """
    from compressed_tensors.utils import patch_attr
    from llmcompressor.core import LifecycleCallbacks

    from crepe_llm import processes
    from crepe_llm.search.study import Study

    ended, saved, started, block = LifecycleCallbacks.sequential_epoch_end, Study.save, time.monotonic(), 0

    def show(text: str) -> None:
        progress.line(f"searching: {text}".ljust(_WIDTH))

    def block_end(modules: Any, **kwargs: Any) -> Any:
        nonlocal block
        block += 1
        show(f"block {min(block, blocks)} of {blocks} is calibrated, {_clock(time.monotonic() - started)} so far")
        return ended(modules, **kwargs)

    def save(study: "Study", path: str | Path) -> None:
        saved(study, path)
        show(state_in_words(study, options.candidates, time.monotonic() - started, processes.count()))

    progress.unsaid = ("warning: PHO: nothing is clearly better",)
    with (
        patch_attr(LifecycleCallbacks, "sequential_epoch_end", block_end),
        patch_attr(Study, "save", save),
    ):
        yield


def state_in_words(study: "Study", candidates: int | None, seconds: float, processes: int = 1) -> str:
    """How far a study is, and the time that is left; that is known once it has a plan.

    Args:
        study: as it is saved.
        candidates: how many the proxy is to judge; None for the default.
        seconds: since the search began.
        processes: how many share the work out; trials have the times of all.
    """
    so_far = f"{_clock(seconds)} so far"
    trials: dict[str, list[Any]] = {"first": [], "last": []}
    for stage in study.stages:
        trials["last" if stage.name.startswith("last") else "first"] += stage.trials
    if study.plan is None or not study.plan.rounds:
        if study.stages:
            return f"the model is pruned with the recipe's own coefficients, {so_far}"
        return f"{len(study.candidates) - 1} of {candidates or 200} candidates by proxy, {so_far}"
    first, last = study.plan.rounds
    slow = max((trial.seconds for trial in trials["last"]), default=0.0) / processes
    quick = max(0.0, study.plan.seconds - (last.candidates - 1) * slow) / first.candidates
    if trials["first"]:
        quick = sum(trial.seconds for trial in trials["first"]) / len(trials["first"]) / processes
    done = max(1, len(trials["last"]))  # the recipe's own coefficients were measured before there was a plan
    left = (first.candidates - len(trials["first"])) * quick + (last.candidates - done) * slow
    if len(trials["first"]) < first.candidates:
        what = f"{len(trials['first'])} of {first.candidates} candidates by masks alone"
    else:
        what = f"{done} of {last.candidates} candidates pruned as the recipe prunes"
    return f"{what}, {so_far}, {_clock(max(0.0, left))} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def _shipped(structure: str | None) -> dict[str, float] | None:
    """The shipped recipe's coefficients for "N:M" or, with None, unstructured masks; None where no recipe is shipped.

    An unstructured recipe is shipped for one sparsity, and its coefficients are what there is for the others.
    """
    import yaml

    name = "crepe_unstructured_50" if structure is None else f"crepe_{structure.replace(':', 'of')}"
    if name not in shipped_recipes():
        return None
    (stage,) = yaml.safe_load(shipped_recipes()[name].read_text(encoding="utf-8")).values()
    fields = stage["pruning_modifiers"]["CRePEModifier"]
    names = ("row", "column", "neighbourhood", "kernel_size", "activation_exponent")
    return {name: fields[name] for name in names}


def _fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the modifier that the options stand for."""
    fields: dict[str, Any] = {
        "record": str(options.study),
        "mask_structure": options.mask_structure,
        "incumbent": _shipped(None if options.sparsity is not None else options.mask_structure),
    }
    if options.sparsity is not None:
        fields |= {"mask_structure": "0:0", "sparsity": options.sparsity, "comparison_group": options.comparison_group}
    given = {name: getattr(options, name) for name in ("candidates", "tokens", "minutes", "proxy")}
    return fields | {name: value for name, value in given.items() if value is not None}
