"""Which tokens count for an expert: those that its router sends to it.

llm-compressor calibrates with every token in every expert (`moe_calibrate_all_experts`), of which an expert's output
uses its own alone. Scores from all tokens are those of other inputs. docs/notes/experts.md has the measurement.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.llama4 import Llama4LinearExperts

from crepe_llm.pruning.block_pass import TokenWeights, Wanted

__all__ = ["UNROUTED", "Routing"]

UNROUTED = 1e-3
"""How much a token counts for an expert that it is not routed to, beside 1 for the expert's own. An expert with few
tokens of its own, or none, is so calibrated on those of all. Ours."""


class Routing:
    """Sees which tokens the routers of a model choose for which experts.

    Args:
        model: in oneshot's hands, which has taken experts apart.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._counts: dict[torch.nn.Module, TokenWeights] = {}  # by linear layer; the same for those of one expert
        self._copies: dict[torch.nn.Module, int] = {}  # by linear layer: how often each token is among its inputs
        self._chosen: dict[torch.nn.Module, torch.Tensor] = {}  # by layer of experts: of each token [tokens, k]
        self._handles: list[Any] = []
        for experts in (module for module in model.modules() if isinstance(module, LinearExperts2D)):
            self._handles.append(experts.register_forward_pre_hook(self._see, with_kwargs=True))
            for number, expert in enumerate(experts):
                count = partial(self._count, experts, number)
                self._counts.update(dict.fromkeys(expert.modules(), count))
                if isinstance(experts, Llama4LinearExperts):
                    self._copies.update(dict.fromkeys(expert.modules(), experts.num_experts))

    def counting(self, module: torch.nn.Module, wanted: Wanted) -> Wanted:
        """What is wanted of a layer, from the tokens that its router sends to it; the same outside of experts."""
        count, weights = self._counts.get(module), wanted.token_weights
        if count is None:
            return wanted
        weighting = count if weights is None else partial(_both, count, weights)
        return replace(wanted, token_weights=weighting, copies=self.copies(module))

    def copies(self, module: torch.nn.Module) -> int:
        """How often a layer's inputs may hold the batch's tokens: Llama 4's experts are given those of all experts."""
        return self._copies.get(module, 1)

    def stop(self) -> None:
        """Remove the hooks. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._chosen.clear()

    def _see(self, experts: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(experts, Llama4LinearExperts):  # is given the tokens of all experts, one expert's after another's
            hidden = args[0] if args else kwargs["hidden_states"]
            count = experts.num_experts
            self._chosen[experts] = torch.arange(count).repeat_interleave(len(hidden) // count)[:, None]
        else:
            self._chosen[experts] = args[1] if len(args) > 1 else kwargs["top_k_index"]

    def _count(
        self, experts: torch.nn.Module, number: int, inputs: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        own = (self._chosen[experts] == number).any(-1).to(inputs.device)
        if own.numel() != inputs.shape[:-1].numel():  # the expert is given its own tokens alone
            return torch.ones(inputs.shape[:-1], device=inputs.device)
        return torch.where(own, 1.0, UNROUTED).view(inputs.shape[:-1])


def _both(one: TokenWeights, other: TokenWeights, inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return one(inputs, mask) * other(inputs, mask)
