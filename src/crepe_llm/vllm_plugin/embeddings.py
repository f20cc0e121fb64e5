"""Embeddings and output heads beside sparse layers: dense, of the model's dtype or of INT8."""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter, PackedvLLMParameter

from crepe_llm import kernels
from crepe_llm.kernels.memory import on_huge_pages
from crepe_llm.vllm_plugin.linear import FLOATS, return_freed_memory

_logger = init_logger("vllm.crepe_llm")  # vLLM shows no other logger's information

INT8_PARTS = ("weight_packed", "weight_scale", "weight_shape")
"""The tensors that a checkpoint has of an INT8 embedding."""

# pack-quantized stores a value as it is plus 128, four to a word.
_PER_WORD = 4
# The environment variable by which activations of an INT8 head are not quantized.
_QUANTIZES = "CREPE_INT8_HEAD_A8"


def int8_values(words: torch.Tensor) -> torch.Tensor:
    """The INT8 values of rows in ``pack-quantized`` words, in the words' own memory."""
    return words.view(torch.uint8).bitwise_xor_(0x80).view(torch.int8)


class DenseEmbeddingMethod(UnquantizedEmbeddingMethod):
    """A dense embedding or output head on a CPU, without the second copy that vLLM keeps for its matrix product.

    The head is multiplied by the kernels' own dense product, from the rows that the embedding looks up.
    """

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        super().create_weights(layer, *sizes, **attributes)
        on_huge_pages(layer.weight.data)

    def process_weights_after_loading(self, layer: Any) -> None:
        is_head = isinstance(layer, ParallelLMHead)
        if layer.weight.device.type != "cpu":
            super().process_weights_after_loading(layer)
        elif is_head:
            layer.packed = kernels.pack_dense(layer.weight.data)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        packed = getattr(layer, "packed", None)
        if packed is not None:
            return kernels.linear(x, packed, bias)
        if layer.weight.device.type == "cpu":
            return torch.nn.functional.linear(x, layer.weight, bias)
        return super().apply(layer, x, bias)


class Int8EmbeddingMethod(QuantizeMethodBase):
    """An embedding or output head on a CPU in INT8, a scale a row, stored as compressed-tensors' ``pack-quantized``.

    Looked-up rows and the head's product share one weight in memory: the checkpoint's own bytes. In bf16 the head's
    activations are quantized to INT8 where that is faster (:func:`crepe_llm.kernels.pack_dense`), unless
    ``CREPE_INT8_HEAD_A8`` is 0.

    Args:
        layer_name: vLLM's name of the layer, for messages.
    """

    def __init__(self, layer_name: str) -> None:
        self.name = layer_name

    @staticmethod
    def serves(quantization: dict[str, Any] | None) -> bool:
        """Whether compressed-tensors' description of a layer is of weights in symmetric INT8 with a scale a row."""
        weights: QuantizationArgs | None = (quantization or {}).get("weights")
        return (
            quantization is not None
            and weights is not None
            and quantization.get("input_activations") is None
            and (weights.num_bits, weights.type, weights.strategy, weights.symmetric)
            == (8, QuantizationType.INT, QuantizationStrategy.CHANNEL, True)
        )

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
        rows, columns, loader = (
            sum(output_partition_sizes),
            input_size_per_partition,
            extra_weight_attrs["weight_loader"],
        )
        if columns % _PER_WORD:
            raise ValueError(
                f"{self.name} is INT8 with {columns} columns; a multiple of {_PER_WORD} is needed: leave it out of the "
                "recipe's quantization"
            )
        words = on_huge_pages(torch.empty(rows, columns // _PER_WORD, dtype=torch.int32))
        packed = {"output_dim": 0, "input_dim": 1, "packed_dim": 1, "packed_factor": _PER_WORD}
        scale = torch.empty(rows, 1, dtype=torch.float32)  # holds every scale exactly
        shape = torch.empty(2, dtype=torch.int64)
        checked, full = functools.partial(self._checked, loader), layer.org_vocab_size
        load = checked("weight_packed", [full, words.shape[1]], torch.int32)
        layer.register_parameter("weight_packed", PackedvLLMParameter(data=words, weight_loader=load, **packed))
        load = checked("weight_scale", [full, 1], *FLOATS)
        layer.register_parameter(
            "weight_scale", ChannelQuantScaleParameter(data=scale, output_dim=0, weight_loader=load)
        )
        load = checked("weight_shape", [2], torch.int64, torch.int32)
        layer.register_parameter("weight_shape", BasevLLMParameter(data=shape, weight_loader=load))

    def _checked(
        self, loader: Callable[..., None], kind: str, shape: list[int], *dtypes: torch.dtype
    ) -> Callable[..., None]:
        """vLLM's loader of one tensor, which would convert any dtype, for these dtypes and this shape alone."""

        def load(param: torch.nn.Parameter, loaded: torch.Tensor) -> None:
            if loaded.dtype not in dtypes or list(loaded.shape) != shape:
                raise ValueError(
                    f"damaged checkpoint: {self.name}.{kind} holds {list(loaded.shape)} as {loaded.dtype} where "
                    f"{shape} as {' or '.join(str(dtype) for dtype in dtypes)} is needed; export it again"
                )
            loader(param, loaded)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        words, scale, columns = layer.weight_packed.data, layer.weight_scale.data, layer.embedding_dim
        if not torch.isfinite(scale).all():
            raise ValueError(f"damaged checkpoint: {self.name}.weight_scale is not finite; export it again")
        if layer.weight_shape.tolist() != [layer.org_vocab_size, columns]:
            raise ValueError(
                f"damaged checkpoint: {self.name}.weight_shape is {layer.weight_shape.tolist()}, and the model needs "
                f"{[layer.org_vocab_size, columns]}; export it again"
            )
        layer.packed = kernels.pack_dense(int8_values(words), scale, self._inputs(layer.params_dtype))
        for name in INT8_PARTS:
            delattr(layer, name)
        return_freed_memory()

    def _inputs(self, dtype: torch.dtype) -> str:
        """How the head's activations are quantized."""
        asked = os.environ.get(_QUANTIZES, "1")
        if asked not in ("0", "1"):
            raise ValueError(f"{_QUANTIZES}={asked}: 0 (activations of an INT8 head stay as they are) or 1 is needed")
        if dtype != torch.bfloat16 or asked == "0":
            return "exact"
        _logger.info_once(
            "INT8 head: its activations may be quantized to INT8, 16 columns of a token together; "
            f"{_QUANTIZES}=0 multiplies them as they are"
        )
        return "lanes"

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return kernels.linear(x, layer.packed, bias)

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        rows, scale = layer.packed.weight[input_], layer.packed.scale[input_]
        return (rows * scale[..., None]).to(layer.params_dtype)


class WithoutValues(NamedTuple):
    """What ``weight`` is of a layer whose weight is INT8: vLLM's LoRA asks it for these, and reads no value."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class TiedMethod(QuantizeMethodBase):
    """A head that has an INT8 embedding's weight: the embedding's method multiplies it.

    Args:
        embedding: the layer that holds the weight.
    """

    def __init__(self, embedding: Any) -> None:
        self._embedding = embedding

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """The embedding has them."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._embedding.quant_method.apply(self._embedding, x, bias)


def is_tied(layer: Any) -> bool:
    """Whether a head or an embedding has the INT8 weight of another."""
    return isinstance(getattr(layer, "quant_method", None), TiedMethod)


def hold_int8(model: torch.nn.Module, names: set[str]) -> None:
    """Give embeddings and heads of a model that vLLM has built, before weights are read, room for INT8 weights.

    Few models tell a quantization config the names of their embeddings, so that it cannot choose while they are built.
    A head that shares an embedding's weight goes on sharing it, also where the checkpoint holds tensors of both: vLLM
    reads those of the embedding.
    """
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        holders.setdefault(id(module._parameters.get("weight")), []).append(name)
    for name in sorted(names, key=lambda name: isinstance(model.get_submodule(name), ParallelLMHead)):
        layer: Any = model.get_submodule(name)
        if is_tied(layer):
            continue
        without_values = WithoutValues(layer.weight.shape, layer.weight.dtype, layer.weight.device)
        for other in holders[id(layer.weight)]:
            holder: Any = model.get_submodule(other)
            del holder.weight
            holder.weight = without_values
            holder.quant_method = TiedMethod(layer)
        layer.quant_method = Int8EmbeddingMethod(name)
        layer.quant_method.create_weights(
            layer,
            layer.input_size_per_partition,
            layer.output_partition_sizes,
            layer.input_size,
            layer.output_size,
            params_dtype=layer.params_dtype,
            weight_loader=layer.weight_loader,
        )
