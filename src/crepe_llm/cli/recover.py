"""`crepe recover`: training of a pruned model, its masks kept."""

import argparse
import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crepe_llm.cli.common import (
    HelpFormatter,
    add_new_folder,
    add_texts,
    add_verbose,
    at_least,
    chosen_texts,
    output_folder,
    require,
    seed,
)
from crepe_llm.cli.models import DTYPES, MODEL_HELP, check_code, check_model, model_folder, weight_bytes
from crepe_llm.cli.plan import device_in_words, size_in_words
from crepe_llm.cli.quiet import Progress, quiet
from crepe_llm.cli.report import PAGE, add_report, check_report, make_report, own_test
from crepe_llm.cli.results import add_json, check_json, write_json

# Options of one of the two ways to train; each is there only if it was given.
_WITH_TEACHER = (
    *("method", "tokens", "minutes", "relative_rate", "warmup", "micro_batch", "cross_entropy", "top_k"),
    *("embeddings", "precision", "optimizer_state", "gradient_checkpointing", "held_out", "evaluations", "patience"),
    "self_generated",
)
_WITHOUT_TEACHER = ("epochs", "ranks", "dtype")
_WITH_EITHER = ("rank", "learning_rate", "batch", "length", "seed")
# Read of a data set where nothing says how much is trained on.
_TOKENS = 2_000_000


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "recover",
        help="train a pruned model, its masks kept",
        description=(
            "With --teacher, the weights that a pruned model keeps learn the dense model's predictions; its masks stay "
            "as they are. Without, LoRA fine-tunes a model that CFSP has cut; blocks get ranks by the importances that "
            "CFSP found. Interrupted, the same command goes on."
        ),
        epilog=(
            "examples:\n"
            "  crepe prune smollm2 --recipe crepe_2of4_best --sample --samples 16 --length 512 --output smollm2-2of4\n"
            "  crepe recover smollm2-2of4 --teacher smollm2 --sample --minutes 40 --output smollm2-recovered\n"
            "  torchrun -m crepe_llm recover DIR --teacher MODEL --dataset NAME --tokens 5000000 --output OUT\n"
            "  crepe recover smollm2-cfsp --sample --windows 256 --output smollm2-recovered\n"
        ),
        formatter_class=HelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("model", metavar="DIR", type=Path, help="the pruned model's folder")
    add_new_folder(parser, "OUT")
    parser.add_argument(
        "--teacher", metavar="MODEL", default=None, help=f"the dense model that was pruned: {MODEL_HELP}"
    )
    add_texts(parser, "train", required=False)
    parser.add_argument(
        "--windows", type=at_least(1), default=None, help="train on so many windows of the text, spread over it (all)"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        default=False,
        help="run the code that the models bring along, if they need that",
    )
    parser.add_argument("--length", type=at_least(2), default=512, help="tokens in each window (%(default)s)")
    add_report(parser)
    add_json(parser)
    add_verbose(parser)
    parser.add_argument(
        "--learning-rate",
        type=float,
        help="the highest learning rate (2e-4 without --teacher, 1e-3 with --method lora, else see --relative-rate)",
    )
    parser.add_argument("--batch", type=at_least(1), help="windows per step (4; without --teacher 8)")
    parser.add_argument(
        "--rank", type=at_least(1), help="rank of LoRA's updates (16; without --teacher 8, the mean over the blocks)"
    )
    parser.add_argument(
        "--seed", type=seed, help="seed of LoRA's start, the order of windows and self-generated text (0)"
    )
    _add_distillation(parser.add_argument_group("with --teacher"))
    group = parser.add_argument_group("without --teacher")
    group.add_argument("--epochs", type=at_least(1), help="how often each window is seen (1)")
    group.add_argument(
        "--ranks", choices=("important", "unimportant", "uniform"), help="which blocks get more rank (important)"
    )
    group.add_argument("--dtype", choices=DTYPES, help="dtype to load the weights in (as they are stored)")
    parser.set_defaults(run=run)


def _add_distillation(group: Any) -> None:
    group.add_argument(
        "--tokens", type=at_least(1), help="train on so many tokens, repeating the text if need be (the text once)"
    )
    group.add_argument("--minutes", type=float, help="train for so long instead of --tokens")
    group.add_argument(
        "--method", choices=("full", "lora"), help="train all kept weights, or LoRA under the mask (full)"
    )
    group.add_argument(
        "--relative-rate",
        metavar="SHARE",
        type=float,
        help="learning rate as a share of the size of each parameter's kept weights (1.5e-3)",
    )
    group.add_argument("--warmup", type=at_least(0), help="in how many steps the learning rate rises (10)")
    group.add_argument("--micro-batch", type=at_least(1), help="windows in memory at once (all of a step)")
    group.add_argument(
        "--cross-entropy", metavar="SHARE", type=float, help="share of the text's own loss in what is minimised (0)"
    )
    group.add_argument(
        "--top-k",
        type=at_least(0),
        help="keep so many of the teacher's likeliest tokens in a file; 0 asks the teacher in every epoch (0)",
    )
    group.add_argument("--embeddings", action="store_true", help="train the embeddings and the head, too")
    group.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        help="of matrix products (auto: bf16 where the hardware is fast at it)",
    )
    group.add_argument(
        "--optimizer-state",
        choices=("fp32", "8bit", "4bit"),
        help="dtype of AdamW's state; 8bit and 4bit need torchao (fp32)",
    )
    group.add_argument("--gradient-checkpointing", action="store_true", help="take less memory and more time")
    group.add_argument(
        "--held-out",
        metavar="WINDOWS",
        type=at_least(0),
        help="keep so many windows aside, to choose the best state by (a tenth, at most 16)",
    )
    group.add_argument("--evaluations", type=at_least(1), help="how often the held-out windows are evaluated (10)")
    group.add_argument("--patience", type=at_least(1), help="stop after so many clearly worse evaluations in a row (3)")
    group.add_argument(
        "--self-generated",
        metavar="N",
        type=at_least(0),
        help="train on so many tokens that the teacher writes, alone or beside the text",
    )


def run(options: argparse.Namespace) -> None:
    lora = options.teacher is None
    require("recover", "transformers", "accelerate", "compressed_tensors", *["peft"] * lora, extra="recover")
    check_json(options)
    given = {name: value for name, value in vars(options).items() if name in _WITH_TEACHER + _WITHOUT_TEACHER}
    wrong = _WITHOUT_TEACHER if options.teacher is not None else _WITH_TEACHER
    for name in given:
        if name in wrong:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} goes {'without' if options.teacher is not None else 'with'} --teacher")
    if not (options.text or options.dataset or options.sample or given.get("self_generated")):
        raise ValueError("there is nothing to train on: give --text, --dataset, --sample or --self-generated")
    if options.report:
        check_report("recover --report")
        if not (options.text or options.dataset or options.sample):
            raise ValueError("--report has no text to measure on: give --text, --dataset or --sample as well")
    given |= {name: getattr(options, name) for name in _WITH_EITHER if hasattr(options, name)}
    with quiet("recover", options.verbose, own=("training", "recovering")) as progress:
        if options.teacher is not None:
            check_model(model_folder(options.teacher), dense=True)
            check_code(model_folder(options.teacher), options.trust_remote_code)
        if (options.model / "config.json").is_file():
            check_code(str(options.model), options.trust_remote_code)
        progress.tell("model", str(options.model))
        if options.teacher is not None:
            progress.tell("teacher", options.teacher)
        progress.tell("device", device_in_words())
        progress.tell("output", str(options.output))
        made = (_recover if lora else _distill)(options, given, progress)
        if made is not None:
            progress.close()
            _say(options, made, progress)
            if options.report:  # after all else: should it fail, what the run has made is known
                progress.start(1, "measuring")
                loading = argparse.Namespace(**{"dtype": "auto", **vars(options)})
                test = own_test(options, made.text, "training", options.length)
                make_report(loading, options.output, options.teacher, test, options.output / PAGE)
                progress.advance()
                progress.close()
                progress.tell("report", str(options.output / PAGE))


@dataclasses.dataclass(frozen=True)
class _Made:
    """What a training has made: what to say of it, its figures, and the text that it was trained on, with its name."""

    said: str
    figures: dict[str, Any]
    text: tuple[str, list[str]]


def _say(options: argparse.Namespace, made: _Made, progress: Progress) -> None:
    """Print what the run has made, and write it as JSON."""
    progress.tell(str(options.output), made.said)
    progress.tell("size", f"{size_in_words(weight_bytes(options.output))} of safetensors")
    if progress.log is not None:
        progress.tell("log", str(progress.log))
    write_json(options, made.figures | {"log": progress.log})


def _distill(options: argparse.Namespace, given: dict[str, Any], progress: Progress) -> _Made | None:
    """Train with a teacher; None in all processes but the first."""
    from accelerate import PartialState

    from crepe_llm.evaluation.model_card import Recovery, write_recovery_card
    from crepe_llm.training.distillation import DistillationSettings, distill
    from crepe_llm.training.loop import DivergedError

    settings = DistillationSettings(**given)
    diverged: DivergedError | None = None
    with _recovered_folder(options) as (folder, work):
        text, texts = _texts(options, given.get("tokens"))
        if text:
            progress.tell("text", text)
        windows = None if texts is None else lambda tokenizer: _windows(options, progress, tokenizer, texts)
        try:
            made = distill(
                options.model,
                folder,
                work,
                model_folder(options.teacher),
                windows,
                settings,
                trust_remote_code=options.trust_remote_code,
                keep_work=True,
            )
        except DivergedError as error:
            diverged = error
        else:
            if PartialState().is_main_process:
                write_recovery_card(
                    folder,
                    Recovery(
                        source=options.model,
                        teacher=options.teacher,
                        text=text,
                        settings=settings,
                        losses=made.trained.losses,
                        held_out=made.trained.held_out,
                        best_step=made.trained.best_step,
                        tokens=made.tokens,
                        seconds=made.trained.seconds,
                        command=options.command_line,
                    ),
                )
    if diverged is not None:
        raise diverged
    if not PartialState().is_main_process:
        return None
    return _Made(*_result(options, made), (text, texts or []))


def _result(options: argparse.Namespace, made: Any) -> tuple[str, dict[str, Any]]:
    """What to say of a training with a teacher, and its figures."""
    trained = made.trained
    kind, losses = "training", list(enumerate(trained.losses, start=1))
    if trained.held_out:
        kind, losses = "held-out", trained.held_out
    last = dict(losses)[trained.best_step]
    done = f"{trained.best_step} of {trained.steps} steps"
    if trained.best_step > trained.steps:  # a budget of minutes
        done = f"{trained.best_step} steps before an interruption, and {trained.steps} with the time that was left"
    said = (
        f"{kind} loss {losses[0][1]:.4f} became {last:.4f} in {done}, {made.tokens:,} tokens, "
        f"{trained.seconds / 60:.1f} minutes" + f"; stopped early: {trained.ended}" * bool(trained.ended)
    )
    figures = {"model": options.model, "teacher": options.teacher, "output": options.output, "tokens": made.tokens}
    return said, figures | dataclasses.asdict(trained)


def _recover(options: argparse.Namespace, given: dict[str, Any], progress: Progress) -> _Made:
    """Train without a teacher."""
    from crepe_llm.training.recovery import RecoverySettings, recover

    given.pop("length")
    if "ranks" in given:
        given["allocation"] = given.pop("ranks")
    settings = RecoverySettings(**given)
    with _recovered_folder(options) as (folder, work):
        text, texts = _texts(options, None)
        progress.tell("text", text)
        result = recover(
            options.model,
            folder,
            work,
            lambda tokenizer: _windows(options, progress, tokenizer, texts or []),
            settings,
            trust_remote_code=options.trust_remote_code,
            keep_work=True,
        )
    said = f"loss {result.first_loss:.4f} became {result.last_loss:.4f} in {result.steps} steps, {result.seconds:.0f} s"
    figures = {"model": options.model, "output": options.output, **dataclasses.asdict(result)}
    return _Made(said, figures, (text, texts or []))


def _texts(options: argparse.Namespace, tokens: int | None) -> tuple[str, list[str] | None]:
    """The text to train on and its name; none where the teacher writes all of it."""
    if options.text is None and options.dataset is None and not options.sample:
        return "", None
    wanted = tokens or (options.windows * options.length if options.windows else _TOKENS)
    return chosen_texts(options, wanted, getattr(options, "seed", 0))


def _windows(options: argparse.Namespace, progress: Progress, tokenizer: Any, texts: list[str]) -> Any:
    from crepe_llm import samples

    tokens = None if options.windows is None else options.windows * options.length
    windows = samples.token_windows(tokenizer, texts, options.length, tokens=tokens)
    if options.windows is not None and len(windows) < options.windows:
        progress.tell("windows", f"{len(windows)}, all that the text holds; --windows asks for {options.windows}")
    return windows


@contextmanager
def _recovered_folder(options: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """A folder to write the model to, and one for its training, which stays until the first has its name: whatever
    fails before loses nothing that was trained."""
    from accelerate import PartialState

    work, written = _work(options), False
    try:
        with output_folder(options.output) as folder:
            try:
                yield folder, work
            finally:
                written = (folder / "config.json").is_file()
    except Exception as error:
        if written and work.is_dir():
            error.add_note(f"{work} keeps what was trained: the same command goes on from there")
        raise
    if PartialState().is_main_process and work.is_dir():  # a training that made nothing better has none any more
        shutil.rmtree(work)


def _work(options: argparse.Namespace) -> Path:
    """Where checkpoints are kept until the folder is complete: beside it, or inside where nothing can be beside."""
    from crepe_llm.checkpoints.folders import building_place, resolved

    output = resolved(options.output)
    return building_place(output) / f".{output.name}-recovery"
