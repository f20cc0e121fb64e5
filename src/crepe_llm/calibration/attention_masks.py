"""Attention masks of models that llm-compressor runs block by block."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from compressed_tensors.utils import patch_attr
from llmcompressor.pipelines.sequential.ast_utils import AutoWrapper

__all__ = ["masks_are_made"]

_MAKERS = "transformers.masking_utils"


@contextmanager
def masks_are_made() -> Iterator[None]:
    """Have the traced model make its attention mask, also where it calls the function that does by another name.

    Mistral, Mixtral, Phi-3, Qwen3-MoE and others choose the function first: `mask_function = create_causal_mask if ...
    else ...`. llm-compressor 0.14 leaves functions out of its tracing by their own names. It traces into this one, and
    what it has traced makes no mask: in the calibration every token then sees those after it, and padding.
    """
    with patch_attr(AutoWrapper, "visit_Assign", _visit_assign):
        yield


def _visit_assign(self: AutoWrapper, node: ast.Assign) -> Any:
    """Remember a name that is given to a function that makes masks as that function, and leave it out of the tracing.

    The name is then known where it is called.
    """
    names = [target.id for target in node.targets if isinstance(target, ast.Name)]
    if len(names) == len(node.targets) and isinstance(node.value, ast.IfExp | ast.Name):
        try:
            value = self._eval_expr(node.value)
        except Exception:  # it depends on what is only known when the model runs
            value = None
        if isinstance(value, FunctionType) and value.__module__ == _MAKERS:
            self.namespace.update(dict.fromkeys(names, value))
            self.ignore = [*self.ignore, value.__name__]
    return self.generic_visit(node)
