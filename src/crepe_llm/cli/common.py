"""What several subcommands share: the options of calibration, loading a model, the output folder."""

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")
SAMPLE_MODELS = ("smollm2", "gemma3")
MODEL_HELP = "a Hugging Face id or folder, or smollm2 or gemma3, real models that pip can fetch"


def add_calibration(parser: Any) -> None:
    """The options of `calibration_texts`, and of how many windows are taken from the texts."""
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", metavar="FILE", type=Path, help="calibrate on a UTF-8 text file")
    text.add_argument(
        "--dataset",
        metavar="NAME[:CONFIG]",
        help="calibrate on the column `text` of a data set or a folder's files",
    )
    text.add_argument("--sample", action="store_true", help="calibrate on the sample Wikipedia articles")
    parser.add_argument("--split", default="train", help="of --dataset (%(default)s)")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows (%(default)s)")
    parser.add_argument("--length", type=int, help="tokens per window (2048, or the model's context if smaller)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of windows (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (as they are stored)")


def calibration_texts(options: argparse.Namespace, length: int) -> tuple[str, list[str]]:
    from crepe_llm import samples

    if options.text is not None:
        return options.text.name, [options.text.read_text(encoding="utf-8")]
    if options.sample:
        sample = samples.wikipedia()
        return f"{sample.name}, train", sample.train
    name, _, config = options.dataset.partition(":")
    # Twice the text that the windows take at 5 characters a token, an upper bound for prose in most vocabularies.
    texts = samples.dataset_texts(
        name,
        config=config or None,
        split=options.split,
        characters=10 * options.samples * length,
        seed=options.seed,
    )
    return f"{options.dataset}, {options.split}", texts


def output_folder(destination: Path) -> AbstractContextManager[Path]:
    """A temporary folder that takes the name `destination`, links followed, if the block succeeds, and vanishes if not.

    Raises:
        FileExistsError: `destination` is a file or a folder with something in it.
        FileNotFoundError: the folder that is to hold it does not exist.
    """
    from crepe_llm.checkpoints.folders import is_empty, new_folder

    if destination.is_file() or (destination.is_dir() and not is_empty(destination)):
        raise FileExistsError(f"{destination} exists already; give another --output, or remove it first")
    parent = destination.resolve().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent} does not exist; create it, or give another --output")
    return new_folder(destination)


def model_folder(name: str) -> str:
    """The folder of a sample model, which is fetched if need be; any other name as it is."""
    if name in SAMPLE_MODELS and not Path(name).exists():
        from crepe_llm import samples

        return str(getattr(samples, name)())
    return name


def load(name: str, dtype: str, *, on_device: bool) -> tuple[Any, Any]:
    """Load a model and its tokenizer; `on_device` puts the model on the accelerators there are."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(f'{error.name} is needed: pip install "crepe-llm[compress]"') from error
    name = model_folder(name)
    placement = {"device_map": "auto"} if on_device and torch.cuda.is_available() else {}
    tokenizer = AutoTokenizer.from_pretrained(name)
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **placement), tokenizer


def window_length(asked: int | None, model: Any) -> int:
    """The window length: what was asked for if the model's context holds it, else 2048 or the whole context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    if asked is None:
        return min(2048, context)
    if asked > context:
        raise ValueError(f"a window of {asked} tokens exceeds the model's context of {context}")
    return asked
