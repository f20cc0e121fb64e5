"""Linear layers whose 2:4 weights are of 4 bits: ordinary ``pack-quantized`` tensors, packed for the CPU at load."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs, QuantizationStrategy, QuantizationType
from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

from crepe_llm import kernels
from crepe_llm.kernels.formats import FORMATS
from crepe_llm.vllm_plugin.linear import CheckedLinearMethod, keep_shape

PACK_QUANTIZED = "pack-quantized"
_CODES = 8  # an int32
_logger = init_logger("vllm.crepe_llm")  # vLLM shows no other logger's information
_GROUPS = {form.scale_group for form in FORMATS.values() if form.bits == 4}


@dataclass(frozen=True)
class Int4Scheme:
    """How a layer's 4-bit weights are quantized.

    Attributes:
        group_size: the columns of a row that share a scale, or None: the row.
        symmetric: whether the zero point is 8 everywhere; else the checkpoint has one for each scale.
    """

    group_size: int | None
    symmetric: bool

    @classmethod
    def of(cls, quantization: dict[str, Any] | None) -> "Int4Scheme | None":
        """Reads compressed-tensors' description of a layer; None where it is quantized otherwise, or not at all."""
        weights: QuantizationArgs | None = (quantization or {}).get("weights")
        if quantization is None or weights is None or quantization.get("input_activations") is not None:
            return None
        grouped = weights.strategy == QuantizationStrategy.GROUP
        known = (
            quantization.get("format") == PACK_QUANTIZED
            and weights.num_bits == 4
            and weights.type == QuantizationType.INT
            and not weights.dynamic
            and weights.actorder not in (ActivationOrdering.GROUP, ActivationOrdering.DYNAMIC)  # columns in groups
            and (grouped or weights.strategy == QuantizationStrategy.CHANNEL)
        )
        group_size = weights.group_size if grouped else None
        return cls(group_size, bool(weights.symmetric)) if known and group_size in _GROUPS else None


@register_weight_loader_v2_supported_method
class Int4LinearMethod(CheckedLinearMethod):
    """Multiplies by a 2:4 weight of 4 bits that is packed to 3 bits a weight, and scales.

    bf16 activations are quantized to int8, one scale for 32 columns of a token, unless vLLM's VLLM_CPU_INT4_W4A8 is 0:
    vLLM's own products of 4-bit weights do so by it, on processors for which it has such a kernel.

    Args:
        scheme: how weights are quantized.
        layer_name: vLLM's name of the layer, for messages.
        parts: the names of the layer's unfused parts, for messages.
    """

    def __init__(self, scheme: Int4Scheme, layer_name: str, parts: Sequence[str]) -> None:
        super().__init__(layer_name, parts)
        self.scheme = scheme

    def _groups(self, columns: int) -> int:
        return 1 if self.scheme.group_size is None else -(-columns // self.scheme.group_size)

    def expected(self, kind: str, rows: int, columns: int) -> tuple[list[int], tuple[torch.dtype, ...]]:
        if kind == "weight_packed":
            return [rows, -(-columns // _CODES)], (torch.int32,)
        if kind == "weight_scale":
            return [rows, self._groups(columns)], (torch.float32, torch.bfloat16, torch.float16)
        if kind == "weight_zero_point":
            return [-(-rows // _CODES), self._groups(columns)], (torch.int32,)
        return [rows, columns], (torch.int64, torch.int32)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        self._check_columns(columns, input_size)
        self._check_rows(output_partition_sizes, output_size)
        loader = extra_weight_attrs["weight_loader"]
        layer.sparse_shape = (rows, columns)
        layer.quantizes_inputs = params_dtype == torch.bfloat16 and envs.VLLM_CPU_INT4_W4A8

        def of(kind: str) -> dict[str, Any]:
            shape, dtypes = self.expected(kind, rows, columns)
            return {
                "data": torch.empty(shape, dtype=dtypes[0]),  # fp32 holds every scale exactly
                "output_dim": 0,
                "weight_loader": self.checked(layer, kind, loader),
            }

        packed = {"packed_factor": _CODES, "input_dim": 1}
        grouped = self.scheme.group_size is not None
        layer.register_parameter("weight_packed", PackedvLLMParameter(**of("weight_packed"), **packed, packed_dim=1))
        scale: BasevLLMParameter = (
            GroupQuantScaleParameter(**of("weight_scale"), input_dim=1)
            if grouped
            else ChannelQuantScaleParameter(**of("weight_scale"))
        )
        layer.register_parameter("weight_scale", scale)
        if not self.scheme.symmetric:
            zero: BasevLLMParameter = (
                PackedvLLMParameter(**of("weight_zero_point"), **packed, packed_dim=0)
                if grouped
                else PackedColumnParameter(**of("weight_zero_point"), packed_factor=_CODES, packed_dim=0)
            )
            layer.register_parameter("weight_zero_point", zero)
        shape = BasevLLMParameter(
            data=torch.empty(2, dtype=torch.int64), weight_loader=self.checked(layer, "weight_shape", keep_shape)
        )
        layer.register_parameter("weight_shape", shape)

    def _check_columns(self, columns: int, input_size: int) -> None:
        """Raises ValueError where columns that share an int32 or a scale would be cut between ranks."""
        unit = self.scheme.group_size or _CODES
        if columns != input_size and columns % unit:
            raise ValueError(
                f"{self.name}: {input_size} input columns over {input_size // columns} tensor-parallel ranks leave "
                f"{columns} each, which is not a multiple of {unit} (columns that share an integer or a scale); use "
                "fewer ranks"
            )

    def _check_rows(self, rows: list[int], output_size: int) -> None:
        """Raises ValueError where zero points that share an int32 would be cut between ranks or parts."""
        whole = len(rows) == 1 and rows[0] == output_size
        if not self.scheme.symmetric and not whole and any(count % _CODES for count in rows):
            raise ValueError(
                f"{self.name}: its parts have {rows} rows on a tensor-parallel rank, and zero points come in integers "
                f"of {_CODES} rows; use fewer ranks, or quantize the layer symmetrically"
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        scale = layer.weight_scale.data
        self.check_scales("weight_scale", scale)
        zero = None if self.scheme.symmetric else layer.weight_zero_point.data
        inputs = "exact"
        if layer.quantizes_inputs:
            inputs = "group"
            _logger.info_once(
                "2:4 weights of 4 bits: activations are quantized to INT8, 32 columns of a token together; "
                "VLLM_CPU_INT4_W4A8=0 multiplies them as they are"
            )
        try:
            packed = kernels.pack_int4(
                layer.weight_packed.data, scale, layer.sparse_shape, self.scheme.group_size, zero, inputs
            )
        except ValueError as error:
            raise ValueError(f"damaged checkpoint: {self.name} ({', '.join(self.parts)}): {error}") from error
        self.keep(layer, packed, ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"))
