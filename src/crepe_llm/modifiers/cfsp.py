"""CFSP structured pruning as a modifier."""

from typing import Any

import torch
from compressed_tensors.quantization import initialize_module_for_quantization
from compressed_tensors.utils import align_module_device
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr

from crepe_llm import processes
from crepe_llm.calibration.data import calibration_data
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.functional.structured import (
    BlockImportance,
    ChannelImportance,
    channel_importance,
    keep_ratios,
    kept_channels,
    kept_widths,
)
from crepe_llm.models import per_block
from crepe_llm.models.blocks import find_blocks
from crepe_llm.models.ffn import FFN, cut, find_ffns
from crepe_llm.modifiers import order
from crepe_llm.modifiers.crepe import CRePEModifier
from crepe_llm.modifiers.layers import save_sparse
from crepe_llm.modifiers.observe import Observer
from crepe_llm.pruning.block_pass import Wanted, block_inputs, block_outputs
from crepe_llm.pruning.layer import weight_matrix

__all__ = ["CFSPModifier"]


class CFSPModifier(Modifier):
    """
    Modifier that removes FFN channels by CFSP (https://arxiv.org/abs/2409.13199): blocks that turn the hidden state
    more keep more channels, and each block keeps those that score highest. The matrices become smaller, so that any
    hardware runs the model faster. See `crepe_llm.functional.structured` for the formulas.

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        CFSPModifier:
          sparsity: 0.2
          importance: activation
          round_to: 128
    ```

    Lifecycle:

    - on_initialize
        - find the FFNs, check fields against them
    - on_calibration_start
        - watch how far each block turns the hidden state, and the inputs of the layer that reads the channels
    - on_calibration_end
        - remove_hooks()
        - cut all FFNs, so that the next modifier of the recipe calibrates the smaller model
    - on_finalize
        - make the model save the config that belongs to it

    :param sparsity: fraction of all FFN channels to remove, from 0 to 0.99
    :param importance: how a channel is scored within its block: `activation` (what the released code's scores amount
        to), `relative` (normalised across the block's channels, as in the paper) or `wanda`
    :param uniform: keep the same number of channels in every block, which gives an ordinary checkpoint that any tool
        loads. Else blocks differ: such a checkpoint loads in transformers and vLLM where crepe-llm is installed
    :param round_to: keep a multiple of so many channels in every block
    """

    requires_calibration_data: bool = True

    sparsity: float = Field(ge=0, le=0.99, allow_inf_nan=False)
    importance: ChannelImportance = "activation"
    uniform: bool = False
    round_to: int = Field(default=128, ge=1)

    _dataloader: Any = PrivateAttr(default=None)
    _ffns: list[FFN] = PrivateAttr(default_factory=list)
    _turns: dict[torch.nn.Module, BlockImportance] = PrivateAttr(default_factory=dict)
    _observer: Observer | None = PrivateAttr(default=None)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Find the FFNs, and refuse what cannot work before any time is spent."""
        order.check(self)
        self._dataloader = calibration_data(self, state, order.first(self) is not self, **kwargs)
        self._ffns = find_ffns(state.model)
        widths = [ffn.width for ffn in self._ffns]
        kept_widths([1 - self.sparsity if self.uniform else 1.0] * len(widths), widths, self.round_to)
        if not self.uniform:
            per_block.check_family(state.model)
        elif len(set(widths)) > 1:
            raise ValueError(
                f"uniform: true needs FFNs of one width, and this model's are from {min(widths)} to {max(widths)}: "
                "set `uniform: false`"
            )
        else:
            per_block.check_width(state.model.config.get_text_config(), widths[0])
        self._check_groups_after(state.model)
        return True

    def _check_groups_after(self, model: Any) -> None:
        """Raise ValueError if N:M masks that follow could not cut the channels that are kept into groups of M."""
        readers = {ffn.output for ffn in self._ffns}
        for modifier in order.modifiers_after(self):
            if not isinstance(modifier, CRePEModifier):
                continue
            names = [name for module, name in modifier.find_layers(model).items() if module in readers]
            for text, structure in map(modifier.structure_of, names):
                if structure is not None and self.round_to % structure[1]:
                    raise ValueError(
                        f"round_to={self.round_to} keeps widths that CRePEModifier cannot cut into groups of "
                        f'{structure[1]} for mask_structure="{text}": give a multiple of {structure[1]}'
                    )

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Watch every block, and the inputs of the layer that reads its channels."""
        others = [m for m in active_session().lifecycle.recipe.modifiers if m is not self]
        if others:
            raise ValueError(
                f"CFSPModifier must have cut the FFNs before {type(others[0]).__name__} works on them, so each needs a "
                'calibration epoch of its own: leave out pipeline=, or give oneshot pipeline="independent"'
            )
        wanted = {ffn.output: Wanted(ffn.name) for ffn in self._ffns}
        self._observer = Observer(self, state.model, self._dataloader, wanted)
        for block in find_blocks(state.model).values():
            self._turns[block] = BlockImportance()
            self._observer.watch_block(block, self._see_block, "forward")

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Cut the FFNs."""
        assert self._observer is not None
        self._observer.stop()
        statistics = {ffn.output: self._observer.take(ffn.output) for ffn in self._ffns}
        importance = self._block_importance(statistics)
        widths = [ffn.width for ffn in self._ffns]
        if self.uniform:
            kept = kept_widths([1 - self.sparsity], widths[:1], self.round_to) * len(widths)
        else:
            kept = kept_widths(keep_ratios(importance, self.sparsity, widths=widths), widths, self.round_to)
        for ffn, count in zip(self._ffns, kept, strict=True):
            self._cut(ffn, count, statistics[ffn.output].norm)
        state.model.config.get_text_config().block_importance = importance
        if len(set(kept)) == 1:
            per_block.set_width(state.model, kept[0])
        else:
            per_block.convert(state.model, kept)
        self._log(widths, kept, importance)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Make the model save the config that belongs to it."""
        if self._observer is not None:
            self._observer.stop()
        save_sparse(state.model, finish=lambda folder: per_block.write_config(state.model.config, folder))
        return True

    def _see_block(self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert self._observer is not None
        inputs = block_inputs(args, kwargs)
        self._turns[block].update(inputs, block_outputs(output), self._observer.mask(inputs))

    def _block_importance(self, statistics: dict[torch.nn.Module, InputStatistics]) -> list[float]:
        for ffn in self._ffns:
            found = statistics[ffn.output]
            if found.tokens == 0:
                raise ValueError(f"{ffn.name} never saw a calibration token: calibrate with more or other text")
            if not bool(torch.isfinite(found.square_sum).all()):
                raise ValueError(
                    f"the activations of {ffn.name} are NaN or infinite: the model overflows on this data; load it "
                    "with dtype=float32 or bfloat16"
                )
        for turn in self._turns.values():
            sums = processes.gather((turn.tokens, turn.total))
            turn.tokens, turn.total = (sum(each) for each in zip(*sums, strict=True))
        return [turn.mean for turn in self._turns.values()]

    def _cut(self, ffn: FFN, count: int, norm: torch.Tensor) -> None:
        members = (*ffn.inputs, ffn.output)
        with torch.no_grad(), align_module_device(ffn.output):
            inputs = [weight_matrix(module).to(norm.device) for module in ffn.inputs]
            scores = channel_importance(self.importance, norm, weight_matrix(ffn.output), inputs)
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(f"the weights of {ffn.name} contain NaN or infinity: the checkpoint is damaged")
        cut(ffn, processes.from_first(kept_channels(scores, count).cpu()))
        for module in members:
            # A modifier after this one that quantizes has made its scales for the larger layer.
            initialize_module_for_quantization(module)

    def _log(self, widths: list[int], kept: list[int], importance: list[float]) -> None:
        removed = 1 - sum(kept) / sum(widths)
        lines = [
            f"{ffn.name}: {count} of {width} channels, importance {value:.4f}"
            for ffn, width, count, value in zip(self._ffns, widths, kept, importance, strict=True)
        ]
        logger.info(f"CFSP: {removed:.2%} of the FFN channels are removed:\n" + "\n".join(lines))
        if abs(removed - self.sparsity) > 0.01:
            logger.warning(
                f"CFSP: {removed:.1%} of the FFN channels are removed where sparsity={self.sparsity} was asked for: "
                f"widths are multiples of round_to={self.round_to}; a smaller one comes closer"
            )
