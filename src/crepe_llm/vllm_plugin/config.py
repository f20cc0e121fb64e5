"""The quantization config through which vLLM learns which layers of a checkpoint are 2:4 sparse."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from crepe_llm.checkpoints.formats import SPARSE_24_BITMASK, FormatError
from crepe_llm.checkpoints.reading import read_folder, refuse_two_checkpoints
from crepe_llm.vllm_plugin import QUANTIZATION
from crepe_llm.vllm_plugin.linear import DenseEmbeddingMethod, DenseLinearMethod, Scheme, Sparse24LinearMethod
from crepe_llm.vllm_plugin.plain import PLAIN, modules_2of4, pack_weights

_logger = logging.getLogger(__name__)


class Sparse24Config(CompressedTensorsConfig):
    """compressed-tensors checkpoints in the format ``sparse-24-bitmask``, with or without INT8 or FP8 on top.

    Which layers are sparse is read from the checkpoint's tensor names; where its sparsity format is ``dense``, plain
    weights that are 2:4 are found by their values and packed while they are loaded. A sparse linear layer is multiplied
    from its compressed weight. Where vLLM has no place for one (a fused layer of which only some parts are sparse, the
    experts of a Mixture of Experts, an embedding), its tensors are expanded while they are loaded, one at a time,
    and the layer is served dense, with a warning. Everything else is vLLM's own compressed-tensors.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._checkpoint_name: dict[str, str] = {}  # vLLM's name of a sparse module -> the checkpoint's
        self._expanded: set[str] = set()  # the checkpoint's names of the sparse modules that are served dense
        self._plain = False  # whether the sparse modules are stored as plain weights
        self._packed: set[str] = set()  # the checkpoint's names of those among them that are packed while loaded

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Claims compressed-tensors checkpoints of the sparsity format sparse-24-bitmask or dense, and nothing else."""
        sparsity = hf_quant_cfg.get("sparsity_config") or {}
        ours = hf_quant_cfg.get("quant_method") == "compressed-tensors" and isinstance(sparsity, dict)
        return QUANTIZATION if ours and sparsity.get("format") in (SPARSE_24_BITMASK.name, PLAIN) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Sparse24Config":
        """Reads config.json's ``quantization_config``; the sparsity part is left out, vLLM refuses it."""
        used = {key: value for key, value in config.items() if key != "sparsity_config" and value is not None}
        made = super().from_config(used)
        assert isinstance(made, cls)
        made._plain = (config.get("sparsity_config") or {}).get("format") == PLAIN
        return made

    def get_name(self) -> Any:
        return QUANTIZATION

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Finds the sparse modules in the checkpoint's headers.

        Raises:
            ValueError: none is sparse, or a file or tensor of the checkpoint is missing or damaged (named; a checkpoint
                that is still on the hub is checked while it is loaded).
        """
        if Path(model_name).is_dir():
            refuse_two_checkpoints(Path(model_name))
        if self._plain:
            self._checkpoint_name = {name: name for name in modules_2of4(model_name, revision)}
            return
        if Path(model_name).is_dir():
            names = set(read_folder(model_name).layers)
        else:
            tensors = get_safetensors_params_metadata(model_name, revision=revision)
            values = f".{SPARSE_24_BITMASK.values}"
            names = {name.removesuffix(values) for name in tensors if name.endswith(values)}
        if not names:
            raise ValueError(
                f"{model_name}: config.json says {SPARSE_24_BITMASK.name}, but no tensor is named "
                f"*.{SPARSE_24_BITMASK.values}; "
                "export the model again, or remove sparsity_config from config.json if its weights are dense"
            )
        self._checkpoint_name = {name: name for name in names}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self._checkpoint_name = {
            mapped: name
            for seen, name in self._checkpoint_name.items()
            if (mapped := hf_to_vllm_mapper.map_name(seen)) is not None
        }

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """The loader's view of the checkpoint: modules that are served dense arrive as a plain ``.weight``, and plain
        weights that are served sparse arrive packed."""
        return _ExpandingMapper(super().get_checkpoint_weight_mapper(), self._expanded, self._packed)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Chooses how a layer is computed.

        Raises:
            ValueError: the layer is sparse with a quantization other than INT8 or FP8 W8A8; names the layer.
        """
        if isinstance(layer, LinearBase):
            parts = self._parts(prefix)
            sparse = [part for part in parts if part in self._checkpoint_name]
            if sparse and len(sparse) == len(parts):
                scheme = self._sparse_scheme(layer, prefix)
                if scheme is not None:
                    self._packed.update(self._checkpoint_name[part] for part in parts if self._plain)
                    return Sparse24LinearMethod(scheme, prefix, parts)
            self._expand(prefix, sparse, "only some of its parts are sparse")
            method = super().get_quant_method(layer, prefix)
            return DenseLinearMethod(prefix, parts) if type(method) is UnquantizedLinearMethod else method
        if isinstance(layer, RoutedExperts):
            experts = [name for name in self._checkpoint_name if name.startswith(prefix + ".")]
            self._expand(prefix, experts, "vLLM's expert kernels are dense")
        elif isinstance(layer, VocabParallelEmbedding):
            self._expand(prefix, [prefix] if prefix in self._checkpoint_name else [], "its rows are looked up")
            if self.get_scheme_dict(layer, prefix) is None:
                return DenseEmbeddingMethod(prefix or type(layer).__name__)
        return super().get_quant_method(layer, prefix)

    def _sparse_scheme(self, layer: torch.nn.Module, prefix: str) -> Scheme | None:
        """How a sparse layer is quantized; None: in a way that is served dense, which a plain weight can be."""
        try:
            return Scheme.of(prefix, self.get_scheme_dict(layer, prefix))
        except ValueError:
            if not self._plain:
                raise
            return None

    def _parts(self, prefix: str) -> list[str]:
        """The unfused names of a layer: ``...qkv_proj`` is ``...q_proj``, ``...k_proj`` and ``...v_proj``."""
        parent, _, name = prefix.rpartition(".")
        return [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(name, [name])]

    def _expand(self, layer: str, modules: list[str], reason: str) -> None:
        if modules and not self._plain:
            _logger.warning("%s is served dense, expanded from 2:4 while it is loaded: %s", layer, reason)
            self._expanded.update(self._checkpoint_name[module] for module in modules)


class _ExpandingMapper(WeightsMapper):
    """A mapper of weight names that also turns the three tensors of chosen modules into one dense weight, and the
    dense weight of others into three tensors.

    vLLM merges the mappers of a model with ``|``; the merged one must still expand, hence the operators.
    """

    def __init__(self, mapper: WeightsMapper, expanded: set[str], packed: set[str]) -> None:
        super().__init__(**vars(mapper))
        self._modules = expanded
        self._plain = packed

    def __or__(self, other: WeightsMapper) -> WeightsMapper:
        return _ExpandingMapper(_fields(self) | other, self._modules, self._plain)

    def __ror__(self, other: WeightsMapper) -> WeightsMapper:
        return _ExpandingMapper(other | _fields(self), self._modules, self._plain)

    def apply(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        return super().apply(self._expand(pack_weights(weights, self._plain)))

    def _expand(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        waiting: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in weights:
            module, _, kind = name.rpartition(".")
            if module not in self._modules or kind not in SPARSE_24_BITMASK.parts:
                yield name, tensor
                continue
            tensors = waiting.setdefault(module, {})
            tensors[kind] = tensor
            if len(tensors) == len(SPARSE_24_BITMASK.parts):
                del waiting[module]
                try:
                    dense = SPARSE_24_BITMASK.unpack(tensors)
                except FormatError as error:
                    raise FormatError(f"damaged checkpoint: {module}: {error}") from error
                yield f"{module}.weight", dense


def _fields(mapper: _ExpandingMapper) -> WeightsMapper:
    return WeightsMapper(**{name: value for name, value in vars(mapper).items() if name not in ("_modules", "_plain")})
