"""A short run of llm-compressor's sequential pipeline, which tells before the calibration whether a model fits it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from compressed_tensors.utils import get_execution_device, patch_attr
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential.helpers import trace_subgraphs
from llmcompressor.pipelines.sequential.transformers_helpers import HFTracer
from llmcompressor.utils import calibration_forward_context
from llmcompressor.utils.pytorch.module import infer_sequential_targets

from crepe_llm.calibration.data import first_tokens
from crepe_llm.models.blocks import find_blocks

__all__ = ["must_run_whole", "tracing_is_undone", "whole_pipeline"]


@contextmanager
def tracing_is_undone() -> Iterator[None]:
    """Have what llm-compressor patches in torch and transformers while it traces a model undone when that fails, too.

    llm-compressor 0.14 leaves the patches in place then, with which no model runs any more in this process.
    """
    patching = HFTracer.patch_for_tracing

    @contextmanager
    def patch_and_undo(self: HFTracer, root: Any) -> Iterator[None]:
        patched = patching(self, root)
        patched.__enter__()
        try:
            yield
        finally:
            patched.__exit__(None, None, None)

    with patch_attr(HFTracer, "patch_for_tracing", patch_and_undo):
        yield


def must_run_whole(model: Any, data: Any, arguments: Any) -> bool:
    """Whether the pipeline that runs a model block by block fails on it, or leaves out its decoder.

    Tried on a few tokens, and only with models for which it may: those with an encoder, a vision or audio tower, or
    code of their own.

    Args:
        model: in oneshot's hands.
        data: the calibration data.
        arguments: oneshot's arguments of the data.
    """
    config = model.config
    towers = config.get_text_config() is not config or getattr(config, "is_encoder_decoder", False)
    plain = not towers and type(model).__module__.startswith("transformers.")
    if plain or data is None or arguments.pipeline not in (None, "independent", "sequential"):
        return False
    if getattr(config, "is_encoder_decoder", False) and any(
        name.endswith("experts") for name, _ in model.named_modules()
    ):
        return True  # tracing Switch Transformers does not end
    targets = cast(list[str], infer_sequential_targets(model, arguments.sequential_targets))
    batch = first_tokens(data)
    try:
        with HooksMixin.disable_hooks():
            parts = trace_subgraphs(model, batch, targets, arguments.tracing_ignore)
            _run(model, batch, parts)
    except Exception:  # whatever it is, the pipeline would meet it after hours of work
        return True
    traced = {module for part in parts for module in part.submodules(model)}
    return not traced.intersection(find_blocks(model).values())


def whole_pipeline(modifiers: list[Modifier]) -> str:
    """The pipeline for modifiers of a model that must run whole."""
    return "basic" if any(modifier.requires_calibration_data for modifier in modifiers) else "datafree"


@torch.no_grad()
def _run(model: Any, batch: dict[str, Any], parts: list[Any]) -> None:
    """Run the parts of a model one after the other, as the pipeline does, with what it keeps between them."""
    with calibration_forward_context(model):
        kept = IntermediatesCache.from_dataloader([batch], get_execution_device(model))  # type: ignore[arg-type]
        for part in parts:
            outputs = part.forward(model, **kept.fetch(0, part.input_names))
            if part is not parts[-1]:
                kept.update(0, outputs)
                kept.delete(0, part.consumed_names)
