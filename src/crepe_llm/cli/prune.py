"""`crepe prune`: a model pruned by a recipe, with its model card."""

import argparse
from pathlib import Path
from typing import Any

from crepe_llm.cli.common import (
    MODEL_HELP,
    add_calibration,
    calibration_texts,
    copy_processor,
    open_model,
    output_folder,
    require,
    window_length,
)
from crepe_llm.recipe_files import recipe_path


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
            "`crepe recipes` lists the recipes that have names.\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--recipe", metavar="NAME|FILE", required=True, help="a shipped recipe or a YAML file")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="a folder that does not exist yet")
    add_calibration(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    require("prune", "llmcompressor", "transformers", "accelerate")
    from llmcompressor import oneshot

    from crepe_llm import samples
    from crepe_llm.checkpoints.space import check_destination
    from crepe_llm.evaluation import model_card
    from crepe_llm.modifiers.recipes import read_recipe

    recipe = recipe_path(options.recipe)
    with output_folder(options.output) as folder:
        modifiers = read_recipe(recipe)
        source = open_model(options, dense=True)
        length = window_length(options.length, source.config)
        corpus, texts = calibration_texts(options, length)
        dataset = samples.calibration_windows(
            source.tokenizer, texts, windows=options.samples, length=length, seed=options.seed
        )
        model = source.load(on_device=False)
        check_destination(folder, model.get_memory_footprint(return_buffers=False))
        dense = model_card.linear_zeros(model)
        oneshot(
            model=model,
            tokenizer=source.tokenizer,
            recipe=modifiers,
            dataset=dataset,
            num_calibration_samples=options.samples,
            max_seq_length=length,
            shuffle_calibration_samples=False,
            trust_remote_code_model=options.trust_remote_code,
        )
        pruned = model_card.linear_zeros(model)
        model.save_pretrained(folder)
        source.tokenizer.save_pretrained(folder)
        copy_processor(source.name, folder)
        made = model_card.Pruning(
            base_model=options.model,
            recipe=recipe,
            dense=dense,
            pruned=pruned,
            calibration=f"{options.samples} windows of {length} tokens of {corpus}, seed {options.seed}",
            dtype=str(model.dtype).removeprefix("torch."),
            command=options.command_line,
        )
        (folder / "README.md").write_text(model_card.model_card(made))
    removed = model_card.removed_weights(dense, pruned)
    print(
        f"{options.output}: "
        + f"{removed:.2%} of the linear layers' weights are removed; " * bool(removed)
        + f"{model_card.total_zeros(pruned):.2%} of the weights of {len(pruned)} linear layers are zero "
        f"({model_card.total_zeros(dense):.2%} before)"
    )
