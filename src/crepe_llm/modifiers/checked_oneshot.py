"""llm-compressor's `oneshot`, with what can be known to fail checked before the work, for this package's recipes."""

import importlib
from typing import Any, cast

from llmcompressor.pipelines.sequential.helpers import trace_subgraphs
from llmcompressor.recipe import Recipe
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from loguru import logger

from crepe_llm.checkpoints.space import check_destination
from crepe_llm.models.blocks import find_blocks
from crepe_llm.modifiers.calibration_data import refuse_several_processes
from crepe_llm.modifiers.recipes import read_recipe
from crepe_llm.modifiers.windows import full_windows

__all__ = ["register"]


def register() -> None:
    """Make `oneshot` take recipes by their shipped names, and check destination and data of recipes with a modifier of
    this package. Idempotent."""
    # By name, as the package has a function of the same name as the module.
    module = importlib.import_module("llmcompressor.entrypoints.oneshot")
    if module.Oneshot.__module__ == __name__:
        return
    original = module.Oneshot

    class Oneshot(original):  # type: ignore[misc, valid-type]
        __doc__ = original.__doc__
        recipe: Any

        def __call__(self) -> None:
            if self.recipe:
                self.recipe = read_recipe(self.recipe, self.recipe_args.stage)
            if _is_ours(self.recipe):
                refuse_several_processes()
                if self.output_dir is not None:
                    check_destination(self.output_dir, self.model.get_memory_footprint(return_buffers=False))
            super().__call__()

        def apply_recipe_modifiers(self, calibration_dataloader: Any, recipe_stage: str | None = None) -> None:
            if _is_ours(self.recipe):
                tokenizer = getattr(self.processor, "tokenizer", self.processor)
                calibration_dataloader = full_windows(calibration_dataloader, tokenizer)
                if _must_run_whole(self.model, calibration_dataloader, self.dataset_args):
                    logger.warning(
                        f"{type(self.model).__name__} cannot be run block by block, and is run as a whole "
                        "(pipeline=basic): no layer is calibrated on what pruned ones give it"
                    )
                    self.dataset_args.pipeline = "basic"
            super().apply_recipe_modifiers(calibration_dataloader, recipe_stage)

    module.Oneshot = Oneshot  # type: ignore[attr-defined]


def _must_run_whole(model: Any, data: Any, arguments: Any) -> bool:
    """Whether a pipeline that runs a model in parts would leave out its decoder, as it does T5's."""
    if arguments.pipeline not in (None, "independent", "sequential") or not data:
        return False
    if not getattr(model.config, "is_encoder_decoder", False):
        return False
    targets = cast(list[str], infer_sequential_targets(model, arguments.sequential_targets))
    try:
        parts = trace_subgraphs(model, next(iter(data)), targets, arguments.tracing_ignore)
    except Exception:  # whatever stops the tracing would stop the pipeline
        return True
    traced = {module for part in parts for module in part.submodules(model)}
    return not traced.intersection(find_blocks(model).values())


def _is_ours(recipe: Any) -> bool:
    modifiers = recipe.modifiers if isinstance(recipe, Recipe) else []
    return any(type(modifier).__module__.startswith("crepe_llm.") for modifier in modifiers)
