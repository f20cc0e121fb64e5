"""The experts of a mixture with 2:4 compressed weights, on a CPU."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from crepe_llm import kernels
from crepe_llm.checkpoints.formats import SPARSE_24_BITMASK
from crepe_llm.kernels.experts import mixture, pack_experts
from crepe_llm.kernels.formats import FORMATS
from crepe_llm.kernels.packed import PackedExperts, PackedWeight
from crepe_llm.vllm_plugin.linear import FLOATS, Scheme, request_amx, return_freed_memory

# vLLM's names of an expert's matrices, by those of the merged ones: gate and up, and down.
_SHARDS = {"w13": ("w1", "w3"), "w2": ("w2",)}
_REMAP = "maybe_remap_moe_expert_param_name"
# By vLLM's name of an activation that of the kernels.
_ACTIVATIONS = {MoEActivation.SILU: "silu", MoEActivation.GELU: "gelu", MoEActivation.GELU_TANH: "gelu_tanh"}


def let_loaders_find(models: Iterable[ModuleType]) -> None:
    """Let the models of some of vLLM's files find the parameters of packed experts.

    GraniteMoeHybrid and Llama 4 take `experts.w13_weight` for `experts.routed_experts.w13_weight`, where their experts
    lie, by a list of the parameters that vLLM itself has.
    """
    for file in models:
        original = getattr(file, _REMAP, None)
        if original is not None and not hasattr(original, "__wrapped__"):
            setattr(file, _REMAP, _finding_all(original))


def _finding_all(original: Callable[[str, Mapping[str, Any]], str]) -> Callable[[str, Mapping[str, Any]], str]:
    @functools.wraps(original)
    def remap(name: str, parameters: Mapping[str, Any]) -> str:
        found = original(name, parameters)
        routed = found.replace(".experts.", ".experts.routed_experts.", 1)
        return routed if found not in parameters and routed in parameters else found

    return remap


class ExpertNames:
    """How a checkpoint calls the matrices of the experts of one layer.

    Args:
        layer: vLLM's module of the experts.
        prefix: its name in vLLM.
        stored: by vLLM's name of a module the checkpoint's, of those that are sparse.
    """

    def __init__(self, layer: Any, prefix: str, stored: Mapping[str, str]) -> None:
        ends = {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name, "w3": layer.ckpt_up_proj_name}
        self._prefix, self._shards = prefix, {shard: end for shard, end in ends.items() if end is not None}
        self._stored = {name: stored[name] for name in stored if name.startswith(f"{prefix}.")}

    def __iter__(self) -> Iterator[str]:
        """The checkpoint's names of the sparse matrices."""
        return iter(self._stored.values())

    def of(self, expert: int, shard: str) -> str:
        """The checkpoint's name of a matrix, whether it is there or not."""
        end = self._shards[shard]
        name = f"{self._prefix}.{expert}.{end}"
        for known, stored in self._stored.items():
            number, _, kind = known.removeprefix(f"{self._prefix}.").partition(".")
            if kind == end:
                before, dot, after = stored.rpartition(f".{number}.")
                name = f"{before}.{expert}.{after}" if dot else name
                break
        return name


def why_dense(layer: Any, scheme: Scheme) -> str | None:
    """Why vLLM's module of experts cannot be served from packed weights, or None: it can."""
    moe = layer.moe_config
    parallel = moe.moe_parallel_config
    reasons = {
        "there is a grouped 2:4 product on CPUs only": not current_platform.is_cpu(),
        "its experts are spread over several processes": parallel.tp_size > 1 or parallel.use_ep,
        "its experts can be moved while they are served": parallel.enable_eplb,
        "LoRA adapters need vLLM's own experts": moe.is_lora_enabled,
        "its experts have biases": moe.has_bias,
        f"the activation {moe.activation.value} is applied by vLLM's own experts": moe.activation not in _ACTIVATIONS,
        "its activation is clamped": layer.swiglu_limit is not None,
        "its inputs are scaled by the router": layer.apply_router_weight_on_input,
        "vLLM pads its experts": moe.intermediate_size_per_partition_unpadded
        not in (None, moe.intermediate_size_per_partition),
        "its quantization is none of symmetric INT8 weights with a scale a row and inputs quantized per token": not (
            scheme.format is None
            or (scheme.format == FORMATS["int8"] and scheme.per_channel and scheme.input == "token")
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class Sparse24ExpertsMethod(FusedMoEMethodBase):
    """Multiplies by the 2:4 weights of experts that stay compressed: tokens sorted by expert, one call for them all.

    The checkpoint's tensors are read into parameters of the same layout; after loading they are packed for the kernels,
    one expert at a time, and freed.

    Args:
        moe: vLLM's description of the layer.
        scheme: how weights and inputs are quantized; one that :func:`why_dense` allows.
        names: how the checkpoint calls the matrices.
    """

    def __init__(self, moe: Any, scheme: Scheme, names: ExpertNames) -> None:
        super().__init__(moe)
        self.scheme = scheme
        self.names = names
        request_amx()

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        form = self.scheme.format
        for merged, columns, rows in (
            ("w13", hidden_size, intermediate_size_per_partition),
            ("w2", intermediate_size_per_partition, hidden_size),
        ):
            if columns % 4:
                raise ValueError(f"{self.names.of(0, _SHARDS[merged][0])}: {columns} columns are not a multiple of 4")
            # One row of the third axis for each row of a matrix; two numbers a matrix for its shape.
            sizes = {
                "compressed": (rows, columns // 2, form.dtype if form else params_dtype),
                "bitmask": (rows, -(-columns // 8), torch.uint8),
                "shape": (1, 2, torch.int64),
            }
            if form is not None:
                sizes["weight_scale"] = (rows, 1, torch.float32)
            for kind, (height, width, dtype) in sizes.items():
                data = torch.empty(num_experts, height * len(_SHARDS[merged]), width, dtype=dtype)
                parameter = torch.nn.Parameter(data, requires_grad=False)
                layer.register_parameter(f"{merged}_{kind}", parameter)
                set_weight_attrs(parameter, {"weight_loader": self._load, "shape_of_one": (rows, columns)})

    def _load(
        self,
        param: Any,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool:
        """vLLM's loader of one tensor of one expert; one that does not fit the layer is named."""
        merged, _, kind = weight_name.rpartition(".")[2].partition("_")
        shards = _SHARDS[merged]
        height = param.shape[1] // len(shards)
        wanted: list[int] = list(param.shape_of_one) if kind == "shape" else [height, param.shape[2]]
        found = loaded_weight.flatten().tolist() if kind == "shape" else list(loaded_weight.shape)
        dtypes = FLOATS if param.dtype in FLOATS else (param.dtype,)
        if found != wanted or loaded_weight.dtype not in dtypes:
            raise ValueError(
                f"damaged checkpoint: {self.names.of(expert_id, shard_id)}.{kind} holds {found} as "
                f"{loaded_weight.dtype} where the model needs {wanted} as {' or '.join(map(str, dtypes))}; export it "
                "again, with the config.json that belongs to it"
            )
        start = shards.index(shard_id) * height
        param.data[expert_id, start : start + height].copy_(loaded_weight.reshape(height, -1))
        return True

    def unread(self, attribute: str, empty: Iterable[tuple[int, int]], height: int) -> list[str]:
        """The checkpoint's names of what was not read of a parameter.

        Args:
            attribute: the parameter's name.
            empty: expert and row of what nothing has filled.
            height: the rows of an expert in the parameter.
        """
        merged, _, kind = attribute.partition("_")
        shards = _SHARDS[merged]
        places = sorted({(expert, row * len(shards) // height) for expert, row in empty})
        return [f"{self.names.of(expert, shards[place])}.{kind}" for expert, place in places]

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.packed = tuple(self._pack(layer, merged) for merged in _SHARDS)

    def _pack(self, layer: Any, merged: str) -> PackedExperts:
        compressed, bitmask = (getattr(layer, f"{merged}_{kind}").data for kind in ("compressed", "bitmask"))
        scales = getattr(layer, f"{merged}_weight_scale", None)
        experts = pack_experts(self._packed(merged, compressed, bitmask, scales), len(compressed))
        for kind in (*SPARSE_24_BITMASK.parts, "weight_scale"):
            if hasattr(layer, f"{merged}_{kind}"):
                delattr(layer, f"{merged}_{kind}")
        return_freed_memory()
        return experts

    def _packed(
        self, merged: str, compressed: torch.Tensor, bitmask: torch.Tensor, scales: torch.Tensor | None
    ) -> Iterator[PackedWeight]:
        shape = (compressed.shape[1], 2 * compressed.shape[2])
        for expert in range(len(compressed)):
            name = " and ".join(self.names.of(expert, shard) for shard in _SHARDS[merged])
            scale = None if scales is None else scales.data[expert]
            if scale is not None and not torch.isfinite(scale).all():
                raise ValueError(f"damaged checkpoint: a weight_scale of {name} is not finite")
            try:
                packed = kernels.pack_compressed(
                    compressed[expert], bitmask[expert], shape, scale, inputs=self.scheme.input
                )
            except ValueError as error:
                raise ValueError(f"damaged checkpoint: {name}: {error}") from error
            assert isinstance(packed, PackedWeight)
            yield packed

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        return mixture(x, topk_ids, topk_weights, layer.packed, _ACTIVATIONS[layer.activation])
