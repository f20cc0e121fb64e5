"""GPTQ quantization of a pruned model as a modifier."""

from typing import Any

import torch
from compressed_tensors.offload import disable_offloading
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, fake_quantize
from compressed_tensors.utils import getattr_chain
from llmcompressor.core import Event, State
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq.helpers import column_scale_window, prepare_batch, update_batch_qparams
from loguru import logger
from pydantic import PrivateAttr, model_validator

from crepe_llm import processes
from crepe_llm.calibration.data import calibration_data
from crepe_llm.functional.masked_gptq import masked_gptq
from crepe_llm.functional.statistics import counted_tokens
from crepe_llm.modifiers.layers import save_sparse
from crepe_llm.modifiers.observe import Observer
from crepe_llm.pruning.layer import mask_of

__all__ = ["MaskedGPTQModifier"]


class MaskedGPTQModifier(GPTQModifier):
    """
    llm-compressor's GPTQModifier for a pruned model: what is zero before quantization is zero after it.

    The toolkit's own GPTQ moves pruned weights away from zero. Here the error feedback of a column still reaches every
    later column, but a pruned position may only become zero, and what it would have become is handed on to the kept
    weights; see `crepe_llm.functional.masked_gptq.masked_gptq`. Put it after the modifier that prunes.

    Sample yaml:

    ```yaml
    quantization_stage:
      quantization_modifiers:
        MaskedGPTQModifier:
          targets: ["Linear"]
          ignore: ["lm_head"]
          scheme: W4A16
    ```

    Lifecycle:

    - on_initialize, on_calibration_start, on_calibration_end
        - as GPTQModifier, and leave padding out of what the layers are given
    - on_sequential_epoch_end
        - observe the pruned weights, quantize them under their mask
    - on_finalize
        - make the model save 2:4 layers as such

    The fields are those of GPTQModifier. Layers are quantized one at a time, so `batched_quantization` is left out.
    """

    _dataloader: Any = PrivateAttr(default=None)
    _observer: Observer | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_fields(self) -> "MaskedGPTQModifier":
        if self.batched_quantization not in ("auto", None, 1):
            raise ValueError(
                f"batched_quantization={self.batched_quantization} has no use: MaskedGPTQModifier quantizes "
                "layers one at a time, each under its own mask: leave it out"
            )
        if self.actorder in ("group", "dynamic"):
            raise ValueError(
                f"actorder={self.actorder} is no longer read by compressed-tensors: take static, or null for none"
            )
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self._dataloader = calibration_data(self, state, True, **kwargs)
        return super().on_initialize(state, **kwargs)

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        super().on_calibration_start(state, event, **kwargs)
        self._observer = Observer(self, state.model, self._dataloader, {})  # for its masks alone

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        super().on_calibration_end(state, event, **kwargs)
        if self._observer is not None:
            self._observer.stop()

    def calibrate_module(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Add a batch to the Hessian of a layer's inputs, without its padding."""
        assert self._observer is not None
        mask = self._observer.mask(args[0], module)
        inputs = args[0] if mask is None else counted_tokens(args[0], mask)
        super().calibrate_module(module, (inputs, *args[1:]), output)

    def compress_modules(self) -> None:
        """Quantize what was calibrated; several processes share the layers out, and go on when all are done."""
        super().compress_modules()
        processes.wait()

    def compress_module_list(self, module_list: list[torch.nn.Module]) -> None:
        """Quantize the calibrated layers one by one, each under its own mask."""
        for module in module_list:
            name = self._module_names[module]
            logger.info(f"Quantizing {name} under its mask")
            with torch.no_grad(), disable_offloading():
                self._quantize(name, module)
            self._num_compressed_modules += 1

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        super().on_finalize(state, **kwargs)
        save_sparse(state.model)
        return True

    def _quantize(self, name: str, module: torch.nn.Module) -> None:
        args = getattr_chain(module, "quantization_scheme.weights")
        observed = getattr_chain(module, "weight_observer").get_qparams()
        weights, hessians, scales, zero_points, global_scales = prepare_batch(
            [module], [observed], self._hessians, self._num_samples
        )
        weight, hessian = weights[0], hessians[0]
        keep = mask_of(module).to(weight.device)
        quantize = _column_quantizer(args, weight.shape, scales, zero_points, global_scales)
        try:
            quantized, loss = masked_gptq(
                weight,
                hessian,
                keep,
                quantize,
                dampening=self.dampening_frac or 0.0,
                block_size=self.block_size,
                activation_order=args.actorder is not None,
            )
            logger.debug(f"{name}: weighted squared error {loss.sum().item():.4g}")
        except torch.linalg.LinAlgError:
            # The parent's summary at the end names the layers that had to be rounded to nearest.
            self._rtn_fallback_module_names.append(name)
            columns = [quantize(weight[:, index], index) for index in range(weight.shape[1])]
            quantized = torch.stack(columns, dim=1).masked_fill_(~keep, 0)
        update_batch_qparams([module], quantized[None], scales, zero_points, global_scales, args)


def _column_quantizer(
    args: QuantizationArgs,
    shape: torch.Size,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    global_scales: torch.Tensor | None,
) -> Any:
    """The toolkit's rounding of one column, with the scale that the column's group has in each row."""
    rows, columns = shape
    width = {
        QuantizationStrategy.GROUP: args.group_size,
        QuantizationStrategy.TENSOR_GROUP: args.group_size,
        QuantizationStrategy.BLOCK: args.block_structure[1] if args.block_structure else None,
    }.get(args.strategy)
    groups = None if width is None else torch.arange(columns, device=scales.device, dtype=torch.int) // width
    scale, zero_point = column_scale_window(scales, zero_points, global_scales, groups, args, rows, 0, columns)
    channelwise = args.model_copy(update={"strategy": QuantizationStrategy.CHANNEL})

    def quantize(column: torch.Tensor, index: int) -> torch.Tensor:
        zero = None if zero_point is None else zero_point[0, :, index, None]
        return fake_quantize(column[:, None], scale[0, :, index, None], zero, channelwise)[:, 0]

    return quantize
