"""`crepe prune`: a model pruned by a recipe, with its model card."""

import argparse
import contextlib
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crepe_llm.cli.common import (
    HelpFormatter,
    add_calibration,
    add_new_folder,
    add_verbose,
    calibration_texts,
    has_text,
    heard_once,
    output_folder,
    require,
)
from crepe_llm.cli.models import MODEL_HELP, Model, copy_processor, open_model, weight_bytes, window_length
from crepe_llm.cli.plan import (
    device_in_words,
    expected_seconds,
    followed,
    multiply_rate,
    recipe_in_words,
    size_in_words,
    time_in_words,
)
from crepe_llm.cli.quiet import Progress, quiet
from crepe_llm.cli.report import PAGE, add_report, check_report, make_report, own_test
from crepe_llm.cli.results import add_json, check_json, write_json
from crepe_llm.model_files import CARD
from crepe_llm.recipe_files import recipe_path

if TYPE_CHECKING:
    from crepe_llm.evaluation.model_card import Pruning
    from crepe_llm.journal import Journal


# Memory that is kept free of weights: for libraries and calibration data, and of a layer's inputs four fp32 matrices.
_BESIDE = 5 * 10**9
_MATRICES = 4 * 4
# Of a file, where weights wait on the disk: transformers holds one file's weights at a time.
_SHARD_BYTES = 10**9


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "prune",
        help="prune a model by a recipe",
        description=(
            "Prune a model with llm-compressor's oneshot and write it with its tokenizer, the recipe and a model card. "
            "The output folder is complete or absent."
        ),
        epilog=(
            "examples:\n"
            "  crepe prune MODEL --recipe crepe_2of4 --dataset allenai/c4:en --output DIR    (needs the hub)\n"
            "  crepe prune MODEL --recipe my_recipe.yaml --text FILE --output DIR\n"
            "  crepe prune smollm2 --recipe crepe_2of4 --sample --samples 16 --length 512 --output DIR\n"
            "  crepe prune MODEL --recipe magnitude_2of4 --output DIR    (the one recipe that needs no text)\n"
            "  torchrun --nproc-per-node 2 -m crepe_llm prune MODEL --recipe crepe_2of4 --text FILE --output DIR\n"
            "A run with --resume keeps each finished block in DIR.resume until the model is written. When it was\n"
            "killed, the same command goes on after the last of them.\n"
            "`crepe recipes` lists the recipes that have names. What llm-compressor logs goes to a file in the user's\n"
            "cache folder (~/.cache/crepe-llm/logs, or under XDG_CACHE_HOME), named at the end; the last 20 are kept.\n"
        ),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--recipe", metavar="NAME|FILE", required=True, help="a shipped recipe or a YAML file")
    add_new_folder(parser, "DIR")
    add_verbose(parser)
    parser.add_argument(
        "--resume", action="store_true", help="keep finished blocks, and go on from those of a run that was killed"
    )
    parser.add_argument(
        "--memory",
        metavar="GB",
        type=_gigabytes,
        help="hold at most so many GB of weights in memory and leave the others on the disk (what fits)",
    )
    add_calibration(parser, required=False)
    add_report(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def _gigabytes(text: str) -> int:
    """Bytes, of a positive number of GB."""
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a positive number of GB, such as 8")
    return round(size * 1e9)


@dataclass(frozen=True)
class _Calibration:
    """The calibration data of a run; empty where its recipe needs none and the command names none.

    Attributes:
        words: what it is.
        corpus: the text's name.
        texts: the text.
        length: tokens per window.
        windows: the data set; None for no data.
    """

    words: str = "none, as the recipe needs none"
    corpus: str = ""
    texts: list[str] = field(default_factory=list)
    length: int = 0
    windows: Any = None


@dataclass(frozen=True)
class _Run:
    """What a run works with, and what it says.

    Attributes:
        options: of the command.
        source: the model.
        recipe: as llm-compressor reads it.
        calibration: the calibration data.
        progress: the plan and the progress line.
        journal: where finished blocks are kept, if they are.
        memory: how many bytes of weights are held in memory, the others being on the disk; None for all.
    """

    options: argparse.Namespace
    source: Model
    recipe: Any
    calibration: _Calibration
    progress: Progress
    journal: "Journal | None"
    memory: int | None


def run(options: argparse.Namespace) -> None:
    require("prune", "llmcompressor", "transformers", "accelerate")
    check_json(options)
    if options.report:
        check_report("prune --report")
    started = time.perf_counter()
    path = recipe_path(options.recipe)
    with heard_once(), quiet("prune", options.verbose) as progress:
        from crepe_llm import processes

        made, used = _made(options, path, progress)
        if processes.is_first():
            progress.close()
            _say(options, made, time.perf_counter() - started, progress)
            if options.report:  # after all else: should it fail, what the run has made is known
                progress.start(1, "measuring")
                test = own_test(options, (used.corpus, used.texts), "calibration", used.length)
                make_report(options, options.output, options.model, test, options.output / PAGE)
                progress.advance()
                progress.close()
                progress.tell("report", str(options.output / PAGE))


def _made(options: argparse.Namespace, path: Path, progress: Progress) -> tuple["Pruning", _Calibration]:
    """Prune the model into the output folder; what was done, and on what."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_shared_folder(options.output))
        from crepe_llm import processes
        from crepe_llm.checkpoints.leftovers import claimed
        from crepe_llm.evaluation.model_card import model_card
        from crepe_llm.oneshot.recipes import read_recipe

        recipe, recipe_text = read_recipe(path), path.read_text(encoding="utf-8")
        source = open_model(options, dense=True)
        used = _calibration(options, source, recipe)
        kept = _journal(options, source, path, used.windows) if options.resume else None
        if kept is not None and processes.is_first():
            stack.enter_context(claimed(kept.folder))
        made = _prune(
            _Run(options, source, recipe, used, progress, kept, _memory(options, source, recipe)),
            path,
            recipe_text,
            folder,
        )
        if processes.is_first():
            (folder / CARD).write_text(model_card(made), encoding="utf-8")
    if kept is not None and processes.is_first():
        kept.remove()
    return made, used


def _calibration(options: argparse.Namespace, source: Model, recipe: Any) -> _Calibration:
    """The calibration data that the options name.

    Raises:
        ValueError: they name none, and the recipe or the report needs it.
    """
    from crepe_llm import samples

    needing = [type(modifier).__name__ for modifier in recipe.modifiers if modifier.requires_calibration_data]
    needing += ["--report"] * options.report
    if not has_text(options):
        if needing:
            raise ValueError(f"{needing[0]} needs text: give --text FILE, --dataset NAME or --sample")
        return _Calibration()
    length = window_length(options.length, source)
    corpus, texts = calibration_texts(options, length)
    words = f"{options.samples} windows of {length} tokens of {corpus}, seed {options.seed}"
    windows = samples.calibration_windows(
        source.tokenizer, texts, windows=options.samples, length=length, seed=options.seed
    )
    return _Calibration(words, corpus, texts, length, windows)


@contextlib.contextmanager
def _shared_folder(destination: Path) -> Iterator[Path]:
    """The first process's :func:`output_folder`, which is done when all processes are."""
    from crepe_llm import processes

    processes.start()
    with output_folder(destination) if processes.is_first() else contextlib.nullcontext(destination) as folder:
        yield processes.from_first(folder)
        processes.wait()


def _journal(options: argparse.Namespace, source: Model, recipe: Path, windows: Any) -> "Journal":
    """The finished blocks of this command's run, in the folder beside its output."""
    from importlib.metadata import version

    from crepe_llm import processes
    from crepe_llm.journal import Journal
    from crepe_llm.training.work_folder import fingerprint

    folder = Path(source.name)
    decides = {
        "model": str(source.name),
        "weights": fingerprint(folder) if folder.is_dir() else getattr(source.config, "_commit_hash", None),
        "config": source.config.to_json_string(use_diff=False),
        "dtype": options.dtype,
        "recipe": recipe.read_text(encoding="utf-8"),
        "calibration windows": [] if windows is None else [list(row) for row in windows["input_ids"]],
        "processes": processes.count(),
    }
    packages = ("torch", "transformers", "llmcompressor", "compressed-tensors", "crepe-llm")
    return Journal(_kept_beside(options.output), decides | {name: version(name) for name in packages})


def _memory(options: argparse.Namespace, source: Model, recipe: Any) -> int | None:
    """How many bytes of a model's weights are held in memory; None for all.

    Raises:
        ValueError: there are several processes, and a modifier does not wait for the others before it writes weights.
    """
    import psutil
    from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin

    from crepe_llm import processes

    if options.memory is not None:
        for modifier in recipe.modifiers if processes.count() > 1 else ():
            # It takes tied weights apart, and removes their file, while other processes may read it.
            if isinstance(modifier, QuantizationMixin) or not type(modifier).__module__.startswith("crepe_llm."):
                raise ValueError(
                    f"--memory: {type(modifier).__name__} does not wait for the other processes before it writes "
                    "weights that they share on the disk; leave --memory out, or start one process"
                )
        return options.memory if options.memory < source.sizes()[0] else None
    if processes.count() > 1:
        return None
    try:
        size, widest = source.sizes()
    except Exception:  # a class that is not made without weights: loading it shows what there is to say
        return None
    free = psutil.virtual_memory().available - _BESIDE - _MATRICES * widest**2
    return None if size <= free else max(free, 0)


def _kept_beside(output: Path) -> Path:
    from crepe_llm.checkpoints.folders import resolved

    output = resolved(output)  # "." has no name of its own
    return output.with_name(f"{output.name}.resume")


def _prune(run: _Run, path: Path, recipe_text: str, folder: Path) -> "Pruning":
    """Say the plan, prune the model and save it with its tokenizer."""
    from llmcompressor import oneshot

    from crepe_llm import processes
    from crepe_llm.checkpoints.loading import says_packed
    from crepe_llm.evaluation.model_card import Pruning, linear_zeros
    from crepe_llm.journal import keeping
    from crepe_llm.modifiers.layers import save_sparse

    options, source, progress = run.options, run.source, run.progress
    progress.tell("model", f"{options.model}, {type(source.config).__name__.removesuffix('Config')}")
    progress.tell("recipe", f"{options.recipe}: {recipe_in_words(run.recipe.modifiers)}")
    progress.tell("calibration", run.calibration.words)
    together = f", {processes.count()} processes" * (processes.count() > 1)
    progress.tell("device", device_in_words() + together)
    with _loaded(run, folder) as model:
        dense = linear_zeros(model)
        blocks = source.config.get_text_config().num_hidden_layers
        _plan_output(run, model, dense, blocks, folder)
        with followed(progress, run.recipe.modifiers, blocks), keeping(run.journal):
            oneshot(
                model=model,
                tokenizer=source.tokenizer,
                recipe=run.recipe,
                dataset=run.calibration.windows,
                num_calibration_samples=options.samples,
                max_seq_length=run.calibration.length or None,
                shuffle_calibration_samples=False,
                trust_remote_code_model=options.trust_remote_code,
            )
        if says_packed(source.config.to_dict()):  # what was loaded packed is saved so, also where nothing is pruned
            save_sparse(model)
        progress.phase("saving")
        pruned, dtype = linear_zeros(model), str(model.dtype).removeprefix("torch.")
        model.save_pretrained(folder, **({} if run.memory is None else {"max_shard_size": _SHARD_BYTES}))
    if processes.is_first():
        source.tokenizer.save_pretrained(folder)
        copy_processor(source.name, folder)
    return Pruning(
        base_model=options.model,
        recipe=path,
        recipe_text=recipe_text,
        dense=dense,
        pruned=pruned,
        calibration=run.calibration.words,
        dtype=dtype,
        command=options.command_line,
    )


@contextlib.contextmanager
def _loaded(run: _Run, folder: Path) -> Iterator[Any]:
    """The model; weights that are not held in memory are in the folder while the block lasts."""
    if run.memory is None:
        yield run.source.load(on_device=False)
        return
    from crepe_llm import processes

    waiting = folder / ".weights"
    if processes.is_first():
        waiting.mkdir()
    processes.wait()
    try:
        yield run.source.load_within(run.memory, waiting)
        processes.wait()
    finally:
        if processes.is_first():
            shutil.rmtree(waiting)


def _plan_output(run: _Run, model: Any, dense: list[Any], blocks: int, folder: Path) -> None:
    """Say how large the model is and where it goes; raise OSError if it does not fit there."""
    import torch
    from compressed_tensors.offload import disable_onloading

    from crepe_llm import processes
    from crepe_llm.checkpoints.space import check_destination

    # By name, as tied weights that wait on the disk are no longer one parameter.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    with disable_onloading():  # which would hold them all, where their dtype is not the files'
        weights = [weight for name, weight in model.named_parameters() if name not in tied]
    size, kept = sum(weight.nbytes for weight in weights), run.journal
    # A block that is kept takes what it takes dense, and a bit a weight for its mask: at most a sixteenth in 16 bits.
    beside = 0 if kept is None else max(0, size + size // 16 - kept.bytes)
    waiting = 0 if run.memory is None else max(0, size - run.memory)  # if all of them change
    check_destination(folder, size, beside + waiting, **({} if run.memory is None else {"shard_bytes": _SHARD_BYTES}))
    dtype = str(model.dtype).removeprefix("torch.")
    run.progress.tell(
        "layers",
        f"{len(dense)} linear layers in {blocks} blocks; {sum(map(torch.numel, weights)) / 1e6:,.1f} M parameters, "
        f"{size_in_words(size)} in {dtype}",
    )
    if waiting:
        run.progress.tell(
            "memory",
            f"{size_in_words(size - waiting)} of weights, the others stay on the disk; those that change take up to "
            f"{size_in_words(waiting)} there",
        )
    free = shutil.disk_usage(folder).free
    run.progress.tell(
        "output",
        f"{run.options.output}, at most {size_in_words(size)} and 60 % more while it is packed; "
        f"{size_in_words(free)} are free",
    )
    tokens = run.options.samples * run.calibration.length // processes.count()
    shapes = [layer.shape for layer in dense]
    expected = time_in_words(expected_seconds(run.recipe.modifiers, shapes, tokens, multiply_rate()))
    run.progress.tell(
        "expected", f"{expected} on this machine, perhaps half or twice that; then the time left is shown"
    )
    if kept is not None:
        run.progress.tell(
            "resuming",
            f"{len(kept)} finished parts are in {kept.folder}, which takes up to {size_in_words(beside)} more",
        )


def _say(options: argparse.Namespace, made: "Pruning", seconds: float, progress: Progress) -> None:
    """Print what the run has made, and write it as JSON."""
    from crepe_llm.evaluation.model_card import removed_weights, total_zeros

    dense, pruned = made.dense, made.pruned
    removed, zeros, before = removed_weights(dense, pruned), total_zeros(pruned), total_zeros(dense)
    changed = sum(old != new for old, new in zip(dense, pruned, strict=True))
    size = weight_bytes(options.output)
    progress.tell(
        str(options.output),
        f"{removed:.2%} of the linear layers' weights are removed; " * bool(removed)
        + f"{zeros:.2%} of the weights of {len(pruned)} linear layers are zero ({before:.2%} before)",
    )
    progress.tell("pruned", f"{changed} of {len(pruned)} linear layers")
    progress.tell("size", f"{size_in_words(size)} of safetensors")
    progress.tell("time", f"{seconds:.0f} s")
    if progress.log is not None:
        progress.tell("log", str(progress.log))
    figures = {"model": options.model, "recipe": options.recipe, "output": options.output, "log": progress.log}
    figures |= {"sparsity": zeros, "sparsity_before": before, "removed": removed}
    figures |= {"layers": len(pruned), "layers_pruned": changed, "seconds": seconds, "bytes": size}
    write_json(options, figures)
