"""Models whose head must be calculated while they are calibrated."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from compressed_tensors.utils import patch_attr

__all__ = ["head_is_calculated"]


@contextmanager
def head_is_calculated(model: Any) -> Iterator[None]:
    """Have llm-compressor calculate the head of a model that adds a bias of its own to the head's outputs.

    llm-compressor leaves heads out while it calibrates: their outputs have no values, and Marian, mBART and Pegasus add
    a bias to them that has some.
    """
    if "final_logits_bias" not in model._buffers:
        yield
        return
    helpers = importlib.import_module("llmcompressor.utils.helpers")
    with patch_attr(helpers, "disable_lm_head", lambda model: nullcontext()):
        yield
