"""The linear layers of a transformers model, and how they keep their weights."""

import torch

__all__ = ["is_linear", "is_transposed"]


def is_transposed(module: torch.nn.Module) -> bool:
    """Whether the module stores its weight as [d_in, d_out], as GPT-2's Conv1D does."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: torch.nn.Module) -> bool:
    """Whether the module is a linear layer, whichever way it stores its weight."""
    return isinstance(module, torch.nn.Linear) or is_transposed(module)
