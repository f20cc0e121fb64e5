"""The `crepe` command.

A subcommand is a function that adds its parser and sets `run`, listed in `_SUBCOMMANDS`. What it needs beyond the
standard library is imported inside `run`, so that `crepe --help` is instant and asks for no extra.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from crepe_llm import __version__
from crepe_llm.recipe_files import recipe_path, shipped_recipes

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SAMPLE_MODELS = ("smollm2", "gemma3")
_MODEL_HELP = "a Hugging Face id or folder, or smollm2 or gemma3, real models that pip can fetch"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="crepe",
        description="Prune language models with CRePE recipes, measure what is left of them, and serve it.",
        epilog=(
            "examples, in the order of use (none of them needs a model hub):\n"
            "  crepe recipes\n"
            "  crepe evaluate smollm2 --sample --tokens 16384\n"
            "  crepe search smollm2 --sample --samples 16 --length 512 --study smollm2-2of4.json\n"
            "  crepe prune smollm2 --recipe crepe_2of4 --sample --samples 16 --length 512 --output smollm2-2of4\n"
            "  crepe evaluate smollm2-2of4 --sample --tokens 16384\n"
            "  crepe serve smollm2-2of4\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"crepe-llm {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _SUBCOMMANDS:
        add(subparsers)
    options = parser.parse_args(arguments)
    options.command_line = shlex.join(["crepe", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        options.run(options)
    except (ValueError, OSError, ImportError, _sample_error()) as error:
        print(f"crepe: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("crepe: interrupted", file=sys.stderr)
        return 130
    return 0


def _sample_error() -> type[Exception]:
    """SampleError, if anything that can raise it was imported; else an error that never occurs."""
    samples = sys.modules.get("crepe_llm.samples.samples")
    return samples.SampleError if samples is not None else StopAsyncIteration


# crepe evaluate


def _add_evaluate(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a model's perplexity",
        description=(
            "Measure perplexity: texts joined by blank lines, tokenised once, cut into non-overlapping windows; in "
            "each window every token but the first is predicted."
        ),
        epilog=(
            "examples:\n"
            "  crepe evaluate MODEL --wikitext2 --json ppl.json    the usual benchmark (needs the hub)\n"
            "  crepe evaluate MODEL --text FILE --window 1024\n"
            "  crepe evaluate smollm2 --sample --tokens 16384      Wikipedia articles, no hub needed\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", metavar="FILE", type=Path, help="a UTF-8 text file")
    text.add_argument("--wikitext2", action="store_true", help="the raw WikiText-2 test split")
    text.add_argument("--sample", action="store_true", help="the test part of the sample Wikipedia articles")
    parser.add_argument("--window", type=int, help="tokens per window (2048, or the model's context if smaller)")
    parser.add_argument("--tokens", type=int, help="about this many tokens only, spread over the text (all)")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the weights (as they are stored)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result there as well")
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from crepe_llm.evaluation.perplexity import perplexity, token_windows
    from crepe_llm.samples import samples

    if options.wikitext2:
        corpus, texts = "WikiText-2 raw test", samples.wikitext2()
    elif options.sample:
        sample = samples.wikipedia()
        corpus, texts = f"{sample.name}, test", sample.test
    else:
        corpus, texts = options.text.name, [options.text.read_text(encoding="utf-8")]
    model, tokenizer = _load(options.model, options.dtype, on_device=True)
    windows = token_windows(tokenizer, texts, _length(options.window, model), tokens=options.tokens)
    result = perplexity(model, windows, corpus=corpus)
    print(result)
    if options.json is not None:
        options.json.write_text(result.to_json() + "\n")


# crepe prune


def _add_prune(subparsers: Any) -> None:
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
            "`crepe recipes` lists the recipes that have names.\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--recipe", metavar="NAME|FILE", required=True, help="a shipped recipe or a YAML file")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="a folder that does not exist yet")
    _add_calibration(parser)
    parser.set_defaults(run=_prune)


def _prune(options: argparse.Namespace) -> None:
    recipe = recipe_path(options.recipe)
    with _output_folder(options.output) as folder:
        try:
            from llmcompressor import oneshot
            from llmcompressor.recipe import Recipe
        except ImportError as error:
            raise ImportError('crepe prune needs llm-compressor: pip install "crepe-llm[compress]"') from error
        from crepe_llm.evaluation import model_card
        from crepe_llm.samples import samples

        if not Recipe.create_instance(str(recipe)).modifiers:
            # llm-compressor would do nothing, and say nothing.
            raise ValueError(
                f"{recipe} names no modifiers; they go under `NAME_stage:` and `NAME_modifiers:`, as in the recipe "
                "that `crepe recipes crepe_2of4` prints"
            )
        model, tokenizer = _load(options.model, options.dtype, on_device=False)
        length = _length(options.length, model)
        corpus, texts = _calibration_texts(options, length)
        dataset = samples.calibration_windows(
            tokenizer, texts, windows=options.samples, length=length, seed=options.seed
        )
        dense = model_card.linear_zeros(model)
        oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=str(recipe),
            dataset=dataset,
            num_calibration_samples=options.samples,
            max_seq_length=length,
            shuffle_calibration_samples=False,
        )
        pruned = model_card.linear_zeros(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        card = model_card.model_card(
            base_model=options.model,
            recipe=recipe,
            dense=dense,
            pruned=pruned,
            calibration=f"{options.samples} windows of {length} tokens of {corpus}, seed {options.seed}",
            dtype=str(model.dtype).removeprefix("torch."),
            command=options.command_line,
        )
        (folder / "README.md").write_text(card)
    removed = model_card.removed_weights(dense, pruned)
    print(
        f"{options.output}: "
        + f"{removed:.2%} of the linear layers' weights are removed; " * bool(removed)
        + f"{model_card.total_zeros(pruned):.2%} of the weights of {len(pruned)} linear layers are zero "
        f"({model_card.total_zeros(dense):.2%} before)"
    )


def _add_calibration(parser: Any) -> None:
    """The options of `_calibration_texts`, and of how many windows are taken from the texts."""
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
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the weights (as they are stored)")


def _calibration_texts(options: argparse.Namespace, length: int) -> tuple[str, list[str]]:
    from crepe_llm.samples import samples

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


# crepe compress, crepe decompress


def _add_compress(subparsers: Any) -> None:
    _add_conversion(
        subparsers,
        "compress",
        "pack the 2:4 layers of a checkpoint",
        "Convert a folder of safetensors whose linear layers hold 2:4 zeros into the sparse-24-bitmask format, one "
        "file at a time. Layers that are not 2:4 stay as they are. The output folder is complete or absent.",
        "crepe compress PRUNED PACKED",
    )


def _add_decompress(subparsers: Any) -> None:
    _add_conversion(
        subparsers,
        "decompress",
        "unpack a 2:4 checkpoint into plain weights",
        "Convert a sparse-24-bitmask checkpoint into plain weights with zeros, which every reader loads, one file "
        "at a time. The output folder is complete or absent.",
        "crepe decompress PACKED PLAIN",
    )


def _add_conversion(subparsers: Any, name: str, summary: str, description: str, example: str) -> None:
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example:\n  {example}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="DIR", type=Path, help="a folder with config.json and safetensors")
    parser.add_argument("destination", metavar="OUT", type=Path, help="a folder that does not hold a model yet")
    parser.set_defaults(run=_convert, conversion=name)


def _convert(options: argparse.Namespace) -> None:
    from crepe_llm.checkpoints import compress_folder, decompress_folder

    convert = {"compress": compress_folder, "decompress": decompress_folder}[options.conversion]
    layers = convert(options.source, options.destination, progress=True)
    _report_conversion(options, f"{len(layers)} layers {'un' * (convert is decompress_folder)}packed")


def _report_conversion(options: argparse.Namespace, what: str) -> None:
    before, after = (
        sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
        for folder in (options.source, options.destination)
    )
    print(f"{options.destination}: {what}, {before:.1f} MB of safetensors became {after:.1f} MB")


# crepe search


def _add_search(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "search",
        help="search for a model's CRePE coefficients",
        description=(
            "Search for the coefficients with which CRePE prunes this model best, by a proxy for perplexity, without "
            "pruning it. The study is saved after each generation; the same command resumes it."
        ),
        epilog=(
            "examples:\n"
            "  crepe search MODEL --mask-structure 2:4 --text FILE --study study.json\n"
            "  crepe search smollm2 --sparsity 0.6 --comparison-group matrix --sample --samples 16 --length 512 \\\n"
            "      --study smollm2-60.json --plot smollm2-60.png\n"
            "A recipe uses it with `study: FILE` under PHOSearchModifier, or with the printed lines.\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--study", metavar="FILE", type=Path, required=True, help="where the study is saved (JSON)")
    masks = parser.add_mutually_exclusive_group()
    masks.add_argument("--mask-structure", metavar="N:M", default="2:4", help="N pruned of every M (%(default)s)")
    masks.add_argument("--sparsity", type=float, help="search for unstructured masks of this sparsity instead")
    parser.add_argument(
        "--comparison-group",
        choices=("row", "matrix", "column_block"),
        default="matrix",
        help="which weights compete in an unstructured mask (%(default)s)",
    )
    parser.add_argument("--candidates", type=int, help="stop after so many candidates (200)")
    parser.add_argument("--minutes", type=float, help="stop when evaluations have taken so long")
    parser.add_argument("--proxy", help="what stands for perplexity (balanced_reconstruction)")
    parser.add_argument("--verify", action="store_true", help="then measure the perplexity of the best few and choose")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the search there (needs matplotlib)")
    _add_calibration(parser)
    parser.set_defaults(run=_search)


def _search(options: argparse.Namespace) -> None:
    try:
        from llmcompressor import oneshot
    except ImportError as error:
        raise ImportError('crepe search needs llm-compressor: pip install "crepe-llm[compress]"') from error
    from crepe_llm.modifiers import PHOSearchModifier
    from crepe_llm.samples import samples

    fields: dict[str, Any] = {
        "record": str(options.study),
        "mask_structure": options.mask_structure,
        "verify": options.verify,
    }
    if options.sparsity is not None:
        fields |= {"mask_structure": "0:0", "sparsity": options.sparsity, "comparison_group": options.comparison_group}
    for name in ("candidates", "minutes", "proxy"):
        if getattr(options, name) is not None:
            fields[name] = getattr(options, name)
    search = PHOSearchModifier(**fields)
    model, tokenizer = _load(options.model, options.dtype, on_device=False)
    length = _length(options.length, model)
    _, texts = _calibration_texts(options, length)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=search,
        dataset=samples.calibration_windows(
            tokenizer, texts, windows=options.samples, length=length, seed=options.seed
        ),
        num_calibration_samples=options.samples,
        max_seq_length=length,
        shuffle_calibration_samples=False,
    )
    study = search.result
    assert study is not None and search.chosen  # oneshot has run it
    print(study)
    if study.recommended == study.reference.coefficients:
        print("Nothing is better than RIA's coefficients, so these are RIA's:")
    print("CRePEModifier:")
    for name, value in search.chosen.items():
        print(f"  {name}: {value:.4g}")
    if options.plot is not None:
        study.plot(options.plot)


# crepe recover


def _add_recover(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "recover",
        help="fine-tune a model that CFSP has cut",
        description=(
            "Train low-rank updates (LoRA) of a structurally pruned model on a text and merge them into its weights. "
            "Blocks get ranks by the importances that CFSP found. Interrupted, the same command goes on."
        ),
        epilog=(
            "examples:\n"
            "  crepe prune smollm2 --recipe cfsp_20 --sample --samples 16 --length 512 --output smollm2-cfsp\n"
            "  crepe recover smollm2-cfsp --sample --windows 256 --output smollm2-recovered\n"
            "  crepe recover DIR --text FILE --epochs 2 --output OUT\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="DIR", type=Path, help="a checkpoint folder that CFSPModifier has made")
    parser.add_argument("--output", metavar="OUT", type=Path, required=True, help="a folder that does not exist yet")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", metavar="FILE", type=Path, help="train on a UTF-8 text file")
    text.add_argument("--sample", action="store_true", help="train on the sample Wikipedia articles")
    parser.add_argument("--windows", type=int, help="train on so many windows, spread over the text (all)")
    parser.add_argument("--length", type=int, default=512, help="tokens per window (%(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="how often each window is seen (%(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="mean LoRA rank of the blocks (%(default)s)")
    parser.add_argument(
        "--ranks",
        choices=("important", "unimportant", "uniform"),
        default="important",
        help="which blocks get more of it (%(default)s)",
    )
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="at the start (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="windows per step (%(default)s)")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the weights (as they are stored)")
    parser.add_argument("--seed", type=int, default=0, help="of start and order (%(default)s)")
    parser.set_defaults(run=_recover)


def _recover(options: argparse.Namespace) -> None:
    from crepe_llm.samples import samples
    from crepe_llm.training.recovery import recover

    texts = samples.wikipedia().train if options.sample else [options.text.read_text(encoding="utf-8")]
    work = options.output.absolute().parent / f".{options.output.name}-recovery"
    with _output_folder(options.output) as folder:
        result = recover(
            options.model,
            folder,
            work,
            texts,
            length=options.length,
            windows=options.windows,
            rank=options.rank,
            allocation=options.ranks,
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            batch=options.batch,
            dtype=options.dtype,
            seed=options.seed,
        )
    print(
        f"{options.output}: loss {result.first_loss:.4f} became {result.last_loss:.4f} in {result.steps} steps, "
        f"{result.seconds:.0f} s"
    )


# crepe recipes


def _add_recipes(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "recipes",
        help="list the shipped recipes",
        description="List the recipes that `crepe prune --recipe` takes by name; with a name, print that recipe.",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this recipe")
    parser.set_defaults(run=_recipes)


def _recipes(options: argparse.Namespace) -> None:
    if options.name is not None:
        print(recipe_path(options.name).read_text(), end="")
        return
    shipped = shipped_recipes()
    width = max(map(len, shipped))
    for name, path in shipped.items():
        first = path.read_text().partition("\n")[0]
        print(f"{name:<{width}}  {first.removeprefix('#').strip()}")


# crepe serve


def _add_serve(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a model with vLLM, 2:4 weights compressed",
        description=(
            "Start vLLM's OpenAI-compatible server on a checkpoint folder or Hugging Face id. 2:4 checkpoints are "
            "served from compressed weights with sparse kernels, all others as vLLM does alone. On a CPU, a quarter of "
            "the available memory is given to the key-value cache unless you say otherwise."
        ),
        epilog=(
            "examples:\n"
            "  crepe serve smollm2-2of4\n"
            "  crepe serve DIR --port 8001 --dtype bfloat16 --max-model-len 2048     any option of `vllm serve`\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a Hugging Face id")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="options for vLLM")
    parser.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> None:
    from crepe_llm.vllm_plugin.serve import serve

    serve(options.model, options.arguments)


# What subcommands share


def _output_folder(destination: Path) -> AbstractContextManager[Path]:
    """A temporary folder beside `destination` that takes its name if the block succeeds, and vanishes if not.

    Raises:
        FileExistsError: `destination` is a file or a folder with something in it.
        FileNotFoundError: the folder that is to hold it does not exist.
    """
    if destination.is_file() or (destination.is_dir() and any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists already; give another --output, or remove it first")
    parent = destination.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent} does not exist; create it, or give another --output")
    from crepe_llm.checkpoints.folders import new_folder

    return new_folder(destination)


def _load(name: str, dtype: str, *, on_device: bool) -> tuple[Any, Any]:
    """Load a model and its tokenizer; `on_device` puts the model on the accelerators there are."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(f'{error.name} is needed: pip install "crepe-llm[compress]"') from error
    if name in _SAMPLE_MODELS and not Path(name).exists():
        from crepe_llm.samples import samples

        name = str(getattr(samples, name)())
    placement = {"device_map": "auto"} if on_device and torch.cuda.is_available() else {}
    tokenizer = AutoTokenizer.from_pretrained(name)
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **placement), tokenizer


def _length(asked: int | None, model: Any) -> int:
    """The window length: what was asked for if the model's context holds it, else 2048 or the whole context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    if asked is None:
        return min(2048, context)
    if asked > context:
        raise ValueError(f"a window of {asked} tokens exceeds the model's context of {context}")
    return asked


_SUBCOMMANDS: tuple[Callable[[Any], None], ...] = (
    _add_prune,
    _add_search,
    _add_recover,
    _add_evaluate,
    _add_serve,
    _add_compress,
    _add_decompress,
    _add_recipes,
)


if __name__ == "__main__":
    sys.exit(main())
