"""Linear layers with 2:4 compressed weights."""

import ctypes
import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from crepe_llm import kernels
from crepe_llm.checkpoints.formats import SPARSE_24_BITMASK
from crepe_llm.kernels.formats import FORMATS, Format

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The kernels' formats of weights of 8 bits.
_QUANTIZED = {QuantizationType.INT: FORMATS["int8"], QuantizationType.FLOAT: FORMATS["fp8"]}


@dataclass(frozen=True)
class Scheme:
    """How a sparse layer's weights and inputs are quantized.

    Attributes:
        format: the format of the kept weights (int8 or fp8), or None: they are of the model's own dtype.
        per_channel: whether weight scales are one a row, or one a matrix.
        input: "token" (a scale for each token, found at run time), "static" (one scale, in the checkpoint) or
            None (inputs are not quantized).
    """

    format: Format | None = None
    per_channel: bool = True
    input: str | None = None

    @classmethod
    def of(cls, layer: str, quantization: dict[str, Any] | None) -> "Scheme":
        """Reads compressed-tensors' description of a layer.

        Args:
            layer: the layer's name, for messages.
            quantization: what ``CompressedTensorsConfig.get_scheme_dict`` says of it; None: it is not quantized.

        Raises:
            ValueError: the layer is quantized otherwise than as symmetric INT8 or FP8, 8-bit inputs included.
        """
        weights: QuantizationArgs | None = (quantization or {}).get("weights")
        if quantization is None or weights is None:
            return cls()
        inputs: QuantizationArgs | None = quantization.get("input_activations")
        known = (
            weights.num_bits == 8
            and weights.symmetric
            and not weights.dynamic
            and weights.strategy in (QuantizationStrategy.CHANNEL, QuantizationStrategy.TENSOR)
        )
        if inputs is not None:
            strategy = QuantizationStrategy.TOKEN if inputs.dynamic else QuantizationStrategy.TENSOR
            known = known and inputs.num_bits == 8 and inputs.symmetric and inputs.strategy == strategy
            known = known and inputs.type == weights.type
        if not known:
            raise ValueError(
                f"{layer} is 2:4 sparse and quantized as weights={weights}, inputs={inputs}; sparse layers are served "
                "with symmetric INT8 or FP8 weights (a scale per channel or tensor) and inputs that are quantized per "
                "token, statically per tensor, or not at all. Quantize the model with W8A8, or leave it sparse only"
            )
        return cls(
            format=_QUANTIZED[weights.type],
            per_channel=weights.strategy == QuantizationStrategy.CHANNEL,
            input=None if inputs is None else "token" if inputs.dynamic else "static",
        )


def full_rows(layer: Any) -> list[int]:
    """The rows of each part in the checkpoint, all tensor-parallel ranks together."""
    if isinstance(layer, QKVParallelLinear):
        return [
            layer.total_num_heads * layer.head_size,
            layer.total_num_kv_heads * layer.head_size,
            layer.total_num_kv_heads * layer.v_head_size,
        ]
    if isinstance(layer, MergedColumnParallelLinear):
        return list(layer.output_sizes)
    return [layer.output_size]


class CheckedLinearMethod(LinearMethodBase):
    """Multiplies by a packed 2:4 weight, and checks the tensors of the checkpoint that it is packed from.

    Args:
        layer_name: vLLM's name of the layer, for messages.
        parts: the names of the layer's unfused parts, for messages.
    """

    def __init__(self, layer_name: str, parts: Sequence[str]) -> None:
        self.name = layer_name
        self.parts = list(parts)
        request_amx()

    @abstractmethod
    def expected(self, kind: str, rows: int, columns: int) -> tuple[list[int], tuple[torch.dtype, ...]]:
        """The shape (of a tensor that holds a shape: its values) and the dtypes of one tensor of a part."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return kernels.linear(x, layer.packed, bias)

    def keep(self, layer: Any, packed: Any, loaded: Sequence[str]) -> None:
        """Gives the layer its packed weight, and frees what was loaded: parameters by name."""
        for name in loaded:
            if hasattr(layer, name):
                delattr(layer, name)
        layer.packed = packed
        # vLLM's LoRA looks here for the device of the layer that it wraps.
        layer.weight_packed = torch.empty(0, device=packed.tensors[0].device)
        return_freed_memory()

    def checked(
        self, layer: Any, kind: str, loader: Callable[..., None]
    ) -> Callable[[torch.nn.Parameter, torch.Tensor], None]:
        """Wraps vLLM's loader of one tensor: what does not fit the layer stops loading with the tensor's name."""

        def load(param: torch.nn.Parameter, loaded: torch.Tensor, shard: Any = None) -> None:
            sizes = full_rows(layer)
            if shard is None:
                chosen = list(range(len(sizes)))
            elif isinstance(shard, tuple):
                chosen = list(shard)
            else:
                chosen = ["qkv".index(shard) if isinstance(shard, str) else int(shard)]
            rows = sum(sizes[index] for index in chosen)
            part = self.parts[chosen[0]] if len(chosen) == 1 and chosen[0] < len(self.parts) else self.name
            found = loaded.flatten().tolist() if kind.endswith("shape") else list(loaded.shape) or [1]
            wanted, dtypes = self.expected(kind, rows, layer.input_size)
            if found != wanted or loaded.dtype not in dtypes:
                raise ValueError(
                    f"damaged checkpoint: {part}.{kind} holds {found} as {loaded.dtype} where the model needs {wanted} "
                    f"as {' or '.join(str(dtype) for dtype in dtypes)}; export it again, with the config.json that "
                    "belongs to it"
                )
            loader(param, loaded) if shard is None else loader(param, loaded, shard)

        return load

    def check_scales(self, kind: str, scale: torch.Tensor) -> None:
        """Raises ValueError, with the layer's name, where a scale is not finite."""
        if not torch.isfinite(scale).all():
            raise ValueError(
                f"damaged checkpoint: {self.name}: .{kind} is missing or not finite in one of {', '.join(self.parts)}"
            )


@register_weight_loader_v2_supported_method
class Sparse24LinearMethod(CheckedLinearMethod):
    """Multiplies by a 2:4 weight that stays compressed.

    The checkpoint's tensors are read into parameters of the same layout, so that vLLM fuses and splits them as it
    does dense weights; after loading they are packed for the kernels, one layer at a time, and freed.

    Args:
        scheme: how weights and inputs are quantized.
        layer_name: vLLM's name of the layer, for messages.
        parts: the names of the layer's unfused parts, for messages.
    """

    def __init__(self, scheme: Scheme, layer_name: str, parts: Sequence[str]) -> None:
        super().__init__(layer_name, parts)
        self.scheme = scheme

    def expected(self, kind: str, rows: int, columns: int) -> tuple[list[int], tuple[torch.dtype, ...]]:
        if kind == "compressed":
            return [rows, columns // 2], FLOATS if self.scheme.format is None else (self.scheme.format.dtype,)
        if kind == "bitmask":
            return [rows, (columns + 7) // 8], (torch.uint8,)
        if kind.endswith("_scale"):
            return [rows, 1] if kind == "weight_scale" and self.scheme.per_channel else [1], FLOATS
        return [rows, columns], (torch.int64,)

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
        if columns != input_size and columns % 8:
            raise ValueError(
                f"{self.name}: {input_size} input columns over {input_size // columns} tensor-parallel ranks leave "
                f"{columns} each, which is not a multiple of 8 (a byte of the bitmask); use fewer ranks"
            )
        loader = extra_weight_attrs["weight_loader"]
        layer.logical_widths = output_partition_sizes

        def weight(kind: str, width: int, dtype: torch.dtype) -> ModelWeightParameter:
            data = torch.empty(rows, width, dtype=dtype)
            return ModelWeightParameter(
                data=data, input_dim=1, output_dim=0, weight_loader=self.checked(layer, kind, loader)
            )

        form = self.scheme.format
        layer.register_parameter("compressed", weight("compressed", columns // 2, form.dtype if form else params_dtype))
        layer.register_parameter("bitmask", weight("bitmask", (columns + 7) // 8, torch.uint8))
        shape = BasevLLMParameter(
            data=torch.empty(2, 1, dtype=torch.int64), weight_loader=self.checked(layer, "shape", keep_shape)
        )
        layer.register_parameter("shape", shape)
        if form is None:
            return
        a_part = torch.empty(len(output_partition_sizes), dtype=torch.float32)
        if self.scheme.per_channel:
            scale: BasevLLMParameter = ChannelQuantScaleParameter(
                data=torch.empty(rows, 1, dtype=torch.float32),
                output_dim=0,
                weight_loader=self.checked(layer, "weight_scale", loader),
            )
        else:
            scale = PerTensorScaleParameter(data=a_part, weight_loader=self.checked(layer, "weight_scale", loader))
        layer.register_parameter("weight_scale", scale)
        if self.scheme.input == "static":
            input_scale = PerTensorScaleParameter(
                data=torch.empty_like(a_part), weight_loader=self.checked(layer, "input_scale", loader)
            )
            layer.register_parameter("input_scale", input_scale)

    def process_weights_after_loading(self, layer: Any) -> None:
        compressed, scale, form = layer.compressed.data, None, self.scheme.format
        if form is not None:
            scale = layer.weight_scale.data
            self.check_scales("weight_scale", scale)
            if not self.scheme.per_channel:
                scale = scale.repeat_interleave(torch.tensor(layer.logical_widths, device=scale.device))
        inputs: str | float | None = self.scheme.input
        if inputs == "static":
            # A fused layer's parts see the same input; their scales differ only where they were calibrated apart, and
            # vLLM's dense W8A8 takes the largest, too.
            self.check_scales("input_scale", layer.input_scale.data)
            inputs = float(layer.input_scale.data.max())
        elif inputs is None and form is not None:
            inputs = "exact"
        shape = (compressed.shape[0], 2 * compressed.shape[1])
        try:
            packed = kernels.pack_compressed(compressed, layer.bitmask.data, shape, scale, inputs)
        except ValueError as error:
            raise ValueError(f"damaged checkpoint: {self.name} ({', '.join(self.parts)}): {error}") from error
        self.keep(layer, packed, (*SPARSE_24_BITMASK.parts, "weight_scale", "input_scale"))


@functools.cache
def request_amx() -> None:
    """Ask Linux to let this process use AMX tiles, once.

    vLLM's attention on the CPU uses them wherever the processor has them, and relies on oneDNN's dense products to have
    asked. Where all products are sparse, nobody has, and the first attention would end in an illegal instruction.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def return_freed_memory() -> None:
    """Freed weights of a few MB stay in glibc's heap, between the packed ones, unless it is told to return them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_shape(parameter: torch.nn.Parameter, loaded: torch.Tensor, shard: Any = None) -> None:
    """vLLM's way to load the shape of a layer's part, which nothing is made of."""
    parameter.data.copy_(loaded.reshape(parameter.shape))
