"""What llm-compressor keeps of each calibration batch while it runs a model block by block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.pipelines.cache import IntermediatesCache

__all__ = ["equal_values_are_held_once"]


@contextmanager
def equal_values_are_held_once() -> Iterator[None]:
    """Have tensors of a batch that equal the first batch's be the same ones: causal masks and rotary embeddings.

    A mask of 2,048 positions takes 4,096 bytes a token in 16 bits, as much as the hidden states of a model of 1B.
    """
    keep = IntermediatesCache.update

    def update(self: IntermediatesCache, batch_index: int, values: dict[str, Any]) -> None:
        keep(self, batch_index, values)
        kept, first = self.batch_intermediates[batch_index], self.batch_intermediates[0]
        for name in values.keys() & first.keys() if batch_index else ():
            _hold_once(kept[name], first[name])

    with patch_attr(IntermediatesCache, "update", update):
        yield


def _hold_once(kept: Any, first: Any) -> None:
    """Let a kept value have the tensors of another that are equal to its own."""
    mine, others = kept.value, first.value
    if isinstance(mine, torch.Tensor) and isinstance(others, torch.Tensor):
        alike = mine.shape == others.shape and mine.dtype == others.dtype and mine.device == others.device
        if alike and torch.equal(mine, others):
            kept.value = others
    elif isinstance(mine, list | tuple) and isinstance(others, list | tuple):
        for part, other in zip(mine, others, strict=False):
            _hold_once(part, other)
