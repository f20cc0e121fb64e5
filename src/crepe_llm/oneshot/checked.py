"""llm-compressor's `oneshot`, with what can be known to fail checked before the work, for this package's recipes."""

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStrategy
from compressed_tensors.utils import patch_attr
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.recipe import Recipe
from loguru import logger
from torch._dynamo import OptimizedModule

from crepe_llm import processes
from crepe_llm.calibration.arguments import check_arguments
from crepe_llm.calibration.attention_masks import masks_are_made
from crepe_llm.calibration.heads import head_is_calculated
from crepe_llm.calibration.kept_values import equal_values_are_held_once
from crepe_llm.calibration.rehearsal import must_run_whole, tracing_is_undone, whole_pipeline
from crepe_llm.calibration.shares import own_share
from crepe_llm.calibration.windows import full_windows
from crepe_llm.checkpoints.space import check_destination
from crepe_llm.models.classes import load_whole
from crepe_llm.modifiers import order
from crepe_llm.modifiers.experts import take_llama4_apart
from crepe_llm.modifiers.replaced_masks import forget_replaced_masks
from crepe_llm.oneshot.recipes import read_recipe
from crepe_llm.versions import check_versions

__all__ = ["register"]


def register() -> None:
    """Make `oneshot` take recipes by their shipped names, and check model, destination and data of recipes with a
    modifier of this package. Idempotent."""
    # By name, as the package has a function of the same name as the module.
    module = importlib.import_module("llmcompressor.entrypoints.oneshot")
    if module.Oneshot.__module__ == __name__:
        return
    original = module.Oneshot

    class Oneshot(original):  # type: ignore[misc, valid-type]
        __doc__ = original.__doc__
        recipe: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if kwargs.get("recipe"):  # before a model is loaded by its name
                kwargs["recipe"] = read_recipe(kwargs["recipe"], kwargs.get("stage"))
            with ExitStack() as stack:
                if _is_ours(kwargs.get("recipe")):
                    stack.enter_context(_whole_models())
                super().__init__(*args, **kwargs)

        def __call__(self) -> None:
            if _is_ours(self.recipe):
                check_versions("transformers", "compressed-tensors", "llmcompressor")
                processes.require_group()
                order.check_processes(self.recipe.modifiers)
                _check_not_compiled(self.model)
                check_arguments(self.dataset_args, self.processor)
                if self.output_dir is not None:
                    check_destination(self.output_dir, self.model.get_memory_footprint(return_buffers=False))
            with ExitStack() as stack:
                if _is_ours(self.recipe):
                    stack.enter_context(_whole_data())
                    stack.enter_context(_narrow_layers_are_named())
                    stack.enter_context(masks_are_made())
                    stack.enter_context(equal_values_are_held_once())
                    stack.enter_context(head_is_calculated(self.model))
                    stack.enter_context(tracing_is_undone())
                    stack.enter_context(_norms_stay_as_they_are(self.recipe.modifiers))
                super().__call__()
            processes.wait()  # until the first has saved

        def apply_recipe_modifiers(self, calibration_dataloader: Any, recipe_stage: str | None = None) -> None:
            whole = False
            if _is_ours(self.recipe):
                tokenizer = getattr(self.processor, "tokenizer", self.processor)
                processes.draw_alike()
                calibration_dataloader = own_share(full_windows(calibration_dataloader, tokenizer))
                take_llama4_apart(self.model)
                whole = must_run_whole(self.model, calibration_dataloader, self.dataset_args)
            if not whole:
                super().apply_recipe_modifiers(calibration_dataloader, recipe_stage)
                return
            logger.warning(
                f"{type(self.model).__name__} cannot be run block by block, and is run as a whole, as with "
                'pipeline="basic": no block is calibrated on what the pruned ones before it give'
            )
            if self.dataset_args.pipeline == "sequential":
                self.dataset_args.pipeline = None
            with patch_attr(CalibrationPipeline, "_infer_pipeline", staticmethod(whole_pipeline)):
                super().apply_recipe_modifiers(calibration_dataloader, recipe_stage)

    module.Oneshot = Oneshot  # type: ignore[attr-defined]
    _compare_saved_tensors()
    forget_replaced_masks()


def _compare_saved_tensors() -> None:
    """Have llm-compressor tie an embedding and a head again that are equal in all that is saved of them.

    Before it saves a model it compares all their tensors, also the scale that Gemma's embedding has beside its weight,
    and would save the quantized table twice.
    """
    saving = importlib.import_module("llmcompressor.transformers.compression.compressed_tensors_utils")
    named = saving._named_tensors

    def saved_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        unsaved = module._non_persistent_buffers_set
        return {name: tensor for name, tensor in named(module).items() if name not in unsaved}

    saving._named_tensors = saved_tensors  # type: ignore[attr-defined]


def _check_not_compiled(model: Any) -> None:
    """Raise ValueError if torch.compile runs a model or a part of it: its blocks cannot be traced, nor hooks be set."""
    for name, module in model.named_modules():
        if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
            raise ValueError(
                f"{f'the part {name} of the model' if name else 'the model'} is compiled by torch.compile: give the "
                "model that is not, and compile what comes out"
            )


class _WholeModels:
    """What stands for AutoModelForCausalLM."""

    @staticmethod
    def from_pretrained(name: str, *, config: Any, **options: Any) -> Any:
        return load_whole(name, config, **options)


@contextmanager
def _whole_models() -> Iterator[None]:
    """Have llm-compressor load a model by its name with all its parts, and refuse one that lacks weights."""
    with patch_attr(importlib.import_module("llmcompressor.entrypoints.utils"), "AutoModelForCausalLM", _WholeModels):
        yield


@contextmanager
def _whole_data() -> Iterator[None]:
    """Have llm-compressor make loaders of all data: what it gives to each process is the first process's share."""
    module = importlib.import_module("llmcompressor.datasets.utils")
    with patch_attr(module, "_is_dist_and_same_ds", lambda dataset: False):
        yield


@contextmanager
def _norms_stay_as_they_are(modifiers: list[Any]) -> Iterator[None]:
    """Have llm-compressor leave norms that add 1 to their weight (Gemma's) alone, but for modifiers that change norms.

    It adds the 1 to the weight meanwhile and takes it away again, in the model's dtype: all norms are rounded.
    """
    module = importlib.import_module("llmcompressor.entrypoints.oneshot")
    kept = all(order.role_of(modifier) is not None for modifier in modifiers)
    with patch_attr(module, "norm_calibration_context", nullcontext) if kept else nullcontext():
        yield


@contextmanager
def _narrow_layers_are_named() -> Iterator[None]:
    """Have llm-compressor refuse layers with fewer columns than a group has before the work, as it does layers whose
    columns are no multiple of the group's: after the work, their scales end with an error of torch's."""
    module = importlib.import_module("llmcompressor.modifiers.quantization.group_size_validation")
    indivisible = module._layer_indivisible

    def named(layer: torch.nn.Module, args: Any) -> tuple[int, int] | None:
        grouped = args.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)
        weight = getattr(layer, "weight", None)
        if grouped and weight is not None and weight.shape[-1] < args.group_size:
            return weight.shape[-1], args.group_size
        return indivisible(layer, args)

    with patch_attr(module, "_layer_indivisible", named):
        yield


def _is_ours(recipe: Any) -> bool:
    modifiers = recipe.modifiers if isinstance(recipe, Recipe) else []
    return any(type(modifier).__module__.startswith("crepe_llm.") for modifier in modifiers)
