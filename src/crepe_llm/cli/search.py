"""`crepe search`: the CRePE coefficients that suit a model."""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import yaml

from crepe_llm.cli.common import (
    MODEL_HELP,
    add_calibration,
    at_least,
    calibration_texts,
    check_new_file,
    open_model,
    require,
    window_length,
)
from crepe_llm.cli.results import add_json, check_json, write_json
from crepe_llm.recipe_files import shipped_recipes


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "search",
        help="search for a model's CRePE coefficients",
        description=(
            "Search for the coefficients with which CRePE prunes this model best, without pruning it: by a proxy "
            "first, then by how far the pruned model's predictions are from the dense model's. Every second window is "
            "kept aside to decide by. The shipped recipe's coefficients stay unless others are clearly better. The "
            "study is saved as it grows; the same command resumes it."
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
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--study", metavar="FILE", type=Path, required=True, help="where the study is saved (JSON)")
    masks = parser.add_mutually_exclusive_group()
    masks.add_argument("--mask-structure", metavar="N:M", default="2:4", help="N pruned of every M (%(default)s)")
    masks.add_argument("--sparsity", type=float, help="search for unstructured masks of this sparsity instead")
    parser.add_argument(
        "--comparison-group",
        choices=("row", "matrix"),
        default="matrix",
        help="which weights compete in an unstructured mask (%(default)s)",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--tokens", type=at_least(1), help="the most tokens that pruned models are run on (112,000)")
    budget.add_argument("--minutes", type=float, help="the most that the search may take, calibration aside")
    parser.add_argument("--candidates", type=at_least(1), help="how many are judged by the proxy (200)")
    parser.add_argument("--proxy", help="the first filter (balanced_reconstruction)")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the search there (needs matplotlib)")
    add_calibration(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    require("search", "llmcompressor", "transformers", "accelerate")
    from llmcompressor import oneshot

    from crepe_llm import samples
    from crepe_llm.modifiers import PHOSearchModifier

    check_json(options)
    check_new_file(options.study, "--study")
    check_new_file(options.plot, "--plot")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install matplotlib")
    search = PHOSearchModifier(**_fields(options))
    source = open_model(options, dense=True)
    length = window_length(options.length, source.config)
    _, texts = calibration_texts(options, length)
    windows = samples.calibration_windows(
        source.tokenizer, texts, windows=options.samples, length=length, seed=options.seed
    )
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
    study = search.result
    assert study is not None and search.chosen  # oneshot has run it
    print(study)
    if study.recommended == study.stages[-1].trials[0].coefficients:
        print("Nothing is clearly better than the incumbent's coefficients, so these are the incumbent's:")
    print("CRePEModifier:")
    for name, value in search.chosen.items():
        print(f"  {name}: {value:.4g}")
    if options.plot is not None:
        study.plot(options.plot)
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
        },
    )


def _shipped(structure: str | None) -> dict[str, float] | None:
    """The shipped recipe's coefficients for "N:M" or, with None, unstructured masks; None where no recipe is shipped.

    An unstructured recipe is shipped for one sparsity, and its coefficients are what there is for the others.
    """
    name = "crepe_unstructured_50" if structure is None else f"crepe_{structure.replace(':', 'of')}"
    if name not in shipped_recipes():
        return None
    (stage,) = yaml.safe_load(shipped_recipes()[name].read_text()).values()
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
