"""The quantization config through which vLLM learns which layers of a checkpoint are 2:4 sparse."""

import functools
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper, is_pp_missing_parameter
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from crepe_llm.checkpoints.formats import SPARSE_24_BITMASK, FormatError
from crepe_llm.checkpoints.reading import read_strictly
from crepe_llm.vllm_plugin import QUANTIZATION
from crepe_llm.vllm_plugin.embeddings import (
    INT8_PARTS,
    DenseEmbeddingMethod,
    Int8EmbeddingMethod,
    hold_int8,
    int8_values,
    is_tied,
)
from crepe_llm.vllm_plugin.experts import ExpertNames, Sparse24ExpertsMethod, let_loaders_find, why_dense
from crepe_llm.vllm_plugin.int4 import PACK_QUANTIZED, Int4LinearMethod, Int4Scheme
from crepe_llm.vllm_plugin.linear import Scheme, Sparse24LinearMethod, full_rows
from crepe_llm.vllm_plugin.plain import PLAIN, pack_weights, read_plain, word_shapes
from crepe_llm.vllm_plugin.whole_experts import apart, stored_name, take_apart

_logger = logging.getLogger(__name__)
_SCALE, _INPUT_SCALE = "weight_scale", "input_scale"


class Sparse24Config(CompressedTensorsConfig):
    """compressed-tensors checkpoints in the format ``sparse-24-bitmask``, with or without INT8 or FP8 on top.

    Which layers are sparse is read from the checkpoint's tensor names; where its sparsity format is ``dense``, plain
    weights that are 2:4 are found by their values and packed while they are loaded, and on a CPU so are weights of 4
    bits (``pack-quantized``), whose record stands at the top of config.json. A sparse linear layer is multiplied from
    its compressed weight, and so are the experts of a mixture on a CPU. Where vLLM has no place for one (a fused layer
    of which only some parts are sparse, experts on a GPU, an embedding, a gate that is built without this config, a
    projection whose dense weight multi-head latent attention reads), its tensors are expanded while they are loaded,
    one at a time, and the layer is served dense, with a warning. Everything else is vLLM's own compressed-tensors.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._checkpoint_name: dict[str, str] = {}  # vLLM's name of a sparse module -> the checkpoint's
        self._int4: dict[str, str] = {}  # the same of a 2:4 module of 4-bit weights
        self._plain_weight: dict[str, str] = {}  # and of a module with a plain weight that is not sparse
        self._word_shapes: dict[str, list[int]] = {}  # what those of 4-bit weights say of themselves
        self._whole: set[str] = set()  # the checkpoint's packed tensors that hold all experts of a layer
        self._plain = False  # whether the sparse modules are stored as plain or 4-bit weights
        self._scaled: dict[str, str] = {}  # the same of a module with a weight_scale
        self._words: dict[str, str] = {}  # and of one whose weight is packed in words of 32 bits
        # Of the model that is being built: the modules served sparse; of those served dense, the layer and the reason
        # (both by the checkpoint's names); and how its mappers of weight names fuse modules.
        self._sparse: set[str] = set()
        self._dense: dict[str, tuple[str, str]] = {}
        self._fusions: list[Mapping[str, Any]] = []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Claims compressed-tensors checkpoints of the sparsity format sparse-24-bitmask or dense, and nothing else.

        On a CPU these are also checkpoints of 4-bit weights that record 2:4 layers at the top of config.json.

        Raises:
            ValueError: the user asks for another quantization of such a checkpoint.
        """
        sparsity = hf_quant_cfg.get("sparsity_config") or {}
        ours = hf_quant_cfg.get("quant_method") == "compressed-tensors" and isinstance(sparsity, dict)
        if not ours or not (
            sparsity.get("format") in (SPARSE_24_BITMASK.name, PLAIN) or _records_int4(hf_quant_cfg, hf_config)
        ):
            return None
        if user_quant not in (None, hf_quant_cfg["quant_method"], QUANTIZATION):
            raise ValueError(
                f"quantization={user_quant} does not fit a 2:4 checkpoint, whose own quantization is "
                f"{hf_quant_cfg['quant_method']}: leave quantization out"
            )
        return QUANTIZATION

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
        if self._plain or _records_int4({"format": self.quant_format}, hf_config):
            self._plain = True
            checkpoint, layers, int4 = read_plain(model_name, revision)
            whole = apart({name: stored.shape for name, stored in checkpoint.tensors.items()}, "weight")
            self._checkpoint_name = {name: name for name in layers if name not in whole}
            self._int4 = {name: name for name in int4 if current_platform.is_cpu()}
            schemes = [scheme["weights"] for scheme in self.target_scheme_map.values()]
            self._word_shapes = word_shapes(checkpoint, [weights.num_bits for weights in schemes if weights])
            self._note_others({name: stored.shape for name, stored in checkpoint.tensors.items()})
            return
        if Path(model_name).is_dir():
            checkpoint = read_strictly(Path(model_name))
            tensors = {name: stored.shape for name, stored in checkpoint.tensors.items()}
        else:
            headers = get_safetensors_params_metadata(model_name, revision=revision)
            tensors = {name: tuple(header["shape"]) for name, header in headers.items()}
        names = _modules_with(SPARSE_24_BITMASK.values, tensors)
        if not names:
            raise ValueError(
                f"{model_name}: config.json says {SPARSE_24_BITMASK.name}, but no tensor is named "
                f"*.{SPARSE_24_BITMASK.values}; "
                "export the model again, or remove sparsity_config from config.json if its weights are dense"
            )
        whole = apart(tensors, SPARSE_24_BITMASK.values)
        self._whole = set(whole)
        self._checkpoint_name = {name: name for name in names - self._whole}
        self._checkpoint_name |= {name: name for matrices in whole.values() for name in matrices}
        self._note_others(tensors)

    def _note_others(self, tensors: Mapping[str, tuple[int, ...]]) -> None:
        words = _modules_with("weight_packed", tensors)  # their scales are vLLM's, or the kernels'
        self._words = {name: name for name in words}
        self._scaled = {name: name for name in _modules_with(_SCALE, tensors) - words}
        self._plain_weight = {
            name: name for name in _modules_with("weight", tensors) if name not in self._checkpoint_name
        }
        self._plain_weight |= {name: name for matrices in apart(tensors, "weight").values() for name in matrices}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self._checkpoint_name = _mapped(self._checkpoint_name, hf_to_vllm_mapper)
        self._int4 = _mapped(self._int4, hf_to_vllm_mapper)
        self._scaled = _mapped(self._scaled, hf_to_vllm_mapper)
        self._words = _mapped(self._words, hf_to_vllm_mapper)
        self._plain_weight = _mapped(self._plain_weight, hf_to_vllm_mapper)

    def begin_model(self, model_class: type) -> None:
        """Forgets the model built before, and learns from the new one's class which modules vLLM fuses.

        Most models have a table of that for quantization configs; all have it in their mappers of weight names, the
        model's own or those of the classes that it is made of.
        """
        self._sparse, self._dense = set(), {}
        files = [sys.modules[base.__module__] for base in model_class.__mro__]
        let_loaders_find(files)
        classes = [value for file in files for value in vars(file).values() if isinstance(value, type)]
        mappers = [getattr(cls, "hf_to_vllm_mapper", None) for cls in (model_class, *classes)]
        self._fusions = [mapper.orig_to_new_stacked for mapper in mappers if isinstance(mapper, WeightsMapper)]

    def finish_model(self, model: torch.nn.Module, dense_head: bool) -> None:
        """Lets the embeddings and the head of a model that is built be INT8 where the checkpoint's are, on a CPU.

        Args:
            model: as vLLM has built it.
            dense_head: whether vLLM reads the head's weight, or that of the embedding which it is tied to.
        """
        if not current_platform.is_cpu():
            return
        names = self._int8_embeddings(model)
        if dense_head and names:
            _logger.warning("%s: INT8, but served dense: vLLM makes a classifier of its rows", ", ".join(sorted(names)))
            return
        hold_int8(model, names)

    def _int8_embeddings(self, model: torch.nn.Module) -> set[str]:
        """The embeddings and heads of a model that the checkpoint has in INT8, as the kernels take it."""
        return {
            name
            for name, layer in model.named_modules()
            if isinstance(layer, VocabParallelEmbedding)
            and name in self._words
            and Int8EmbeddingMethod.serves(self.get_scheme_dict(layer, name))
        }

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Chooses how a layer is computed.

        Raises:
            ValueError: the layer is sparse with a quantization other than INT8 or FP8 W8A8, or vLLM's latent attention
                cannot use it in the served dtype; names the layer.
        """
        if isinstance(layer, LinearBase):
            parts = self.parts(prefix)
            self._check_words(layer, parts)
            int4 = [part for part in parts if part in self._int4]
            if int4:
                return self._int4_method(layer, prefix, parts) or super().get_quant_method(layer, prefix)
            sparse = [part for part in parts if part in self._checkpoint_name]
            if prefix.endswith("kv_b_proj") and _uses_latent_attention(prefix):
                self._serve_dense(prefix, sparse, "multi-head latent attention reads its dense weight")
                return UnquantizedLinearMethod()
            scheme = self._sparse_scheme(layer, prefix) if len(sparse) == len(parts) else None
            if scheme is not None:
                self._sparse.update(self._checkpoint_name[part] for part in sparse)
                return Sparse24LinearMethod(scheme, prefix, parts)
            self._serve_dense(prefix, sparse, "only some of its parts are sparse")
        elif isinstance(layer, RoutedExperts):
            experts = [name for name in self._checkpoint_name if name.startswith(f"{prefix}.")]
            scheme = self._experts_scheme(layer, prefix)
            reason = self._why_dense(layer, prefix, scheme)
            if experts and reason is None and scheme is not None:
                self._sparse.update(self._checkpoint_name[name] for name in experts)
                return Sparse24ExpertsMethod(
                    layer.moe_config, scheme, ExpertNames(layer, prefix, self._checkpoint_name)
                )
            self._serve_dense(prefix, experts, reason or "")
        elif isinstance(layer, VocabParallelEmbedding):
            self._serve_dense(prefix, [prefix] if prefix in self._checkpoint_name else [], "its rows are looked up")
            quantization = self.get_scheme_dict(layer, prefix)
            if quantization is None or (current_platform.is_cpu() and Int8EmbeddingMethod.serves(quantization)):
                return DenseEmbeddingMethod()  # finish_model makes it INT8
        return super().get_quant_method(layer, prefix)

    def _check_words(self, layer: Any, parts: list[str]) -> None:
        """Raise ValueError where packed codes say that they are of another shape than the model's: vLLM reads none."""
        rows = full_rows(layer)
        for place, part in enumerate(parts):
            found = self._word_shapes.get(self._words.get(part, ""))
            wanted = [rows[place] if len(parts) == len(rows) else sum(rows), layer.input_size]
            if found is not None and len(parts) in (1, len(rows)) and found != wanted:
                raise ValueError(
                    f"damaged checkpoint: {self._words[part]}.weight_shape says {found}, the model has {wanted} there; "
                    "export it again"
                )

    def _int4_method(self, layer: torch.nn.Module, prefix: str, parts: list[str]) -> Int4LinearMethod | None:
        """How a layer of 4-bit weights, of which some are 2:4, is multiplied; None, with a warning: as vLLM does it."""
        scheme = Int4Scheme.of(self.get_scheme_dict(layer, prefix))
        if not self._int4.keys() >= set(parts):
            reason = "only some of its parts are 2:4"
        elif scheme is None:
            reason = "the kernels take scales of rows or of 32, 64 or 128 columns in order, and 16-bit inputs"
        elif prefix.endswith("kv_b_proj") and _uses_latent_attention(prefix):
            reason = "multi-head latent attention reads its weight"
        else:
            return Int4LinearMethod(scheme, prefix, parts)
        _warn_of_dense_int4(_kind(prefix), reason)
        return None

    def _sparse_scheme(self, layer: torch.nn.Module, prefix: str) -> Scheme | None:
        """How a sparse layer is quantized; None: in a way that is served dense, which a plain weight can be."""
        try:
            return Scheme.of(prefix, self.get_scheme_dict(layer, prefix))
        except ValueError:
            if not self._plain:
                raise
            return None

    def _experts_scheme(self, layer: RoutedExperts, prefix: str) -> Scheme | None:
        """How all matrices of experts are quantized; None: not alike, or in a way that only dense ones can be."""
        self._add_fused_moe_to_target_scheme_map()
        ends = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        names = [f"{prefix}.0.{end}" for end in ends if end is not None]
        try:
            schemes = {Scheme.of(name, self.get_scheme_dict(layer, name)) for name in names}
        except ValueError:
            return None
        return schemes.pop() if len(schemes) == 1 else None

    def _why_dense(self, layer: RoutedExperts, prefix: str, scheme: Scheme | None) -> str | None:
        if any(name.startswith(f"{prefix}.") for name in self._plain_weight):
            return "only some of its experts are sparse"
        return "vLLM has no sparse kernel for its quantization" if scheme is None else why_dense(layer, scheme)

    def parts(self, layer: str) -> list[str]:
        """The unfused names of a layer: ``...qkv_proj`` is ``...q_proj``, ``...k_proj`` and ``...v_proj``.

        Where the checkpoint has the layer fused already, its one name.
        """
        known_names = self._checkpoint_name.keys() | self._int4.keys()
        if layer in known_names:
            return [layer]
        parent, dot, name = layer.rpartition(".")
        listed = [parent + dot + part for part in self.packed_modules_mapping.get(name, [])]
        mapped = [_parts_by(fusion, layer) for fusion in self._fusions]
        known = [parts for parts in (listed, *mapped) if parts]
        return next((parts for parts in known if known_names & set(parts)), (known or [[layer]])[0])

    def stored(self, part: str) -> str:
        """The checkpoint's name of a sparse module; of any other the module's own."""
        return self._checkpoint_name.get(part) or self._int4.get(part, part)

    def file_names(self, missing: Iterable[str]) -> list[str]:
        """The checkpoint's names, each once, of tensors that may be of experts that it stores in one."""
        return list(dict.fromkeys(stored_name(name, self._whole) for name in missing))

    def expand(
        self, model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """A checkpoint's tensors, the three of each sparse module that vLLM has built dense turned into a weight.

        Plain weights of modules that are served sparse are packed. Where vLLM has built a module without its
        quantization, sparse or not, the weight is of the model's own dtype.
        """
        dense = set() if self._plain else self._here(model) - self._sparse
        self._warn_of_dense(dense)
        unscaled = {name for layer, name in self._scaled.items() if _has_no_scale(model, layer)}
        embeddings = {self._words[name]: model.get_submodule(name) for name in self._int8_embeddings(model)}
        tied = {name for name, layer in embeddings.items() if is_tied(layer)}
        unpacked = {name for name, layer in embeddings.items() if not hasattr(layer, "weight_packed")} - tied
        waiting: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in pack_weights(take_apart(weights, self._whole), self._sparse if self._plain else ()):
            module, _, part = name.rpartition(".")
            if module in tied:
                continue
            if module in unpacked:
                needed = set(INT8_PARTS)
            else:
                needed = set(SPARSE_24_BITMASK.parts if module in dense else ("weight",))
            if module in unscaled:
                needed.add(_SCALE)
            if part in needed and (module in dense or module in unscaled or module in unpacked):
                tensors = waiting.setdefault(module, {})
                tensors[part] = tensor
                if tensors.keys() == needed:
                    yield f"{module}.weight", _weight(module, waiting.pop(module))
            elif part != _INPUT_SCALE or module not in unscaled:
                yield name, tensor
        for module in sorted(unpacked & waiting.keys()):  # vLLM may make another layer of it, and check nothing
            missing = [part for part in INT8_PARTS if part not in waiting[module]]
            raise FormatError(f"damaged checkpoint: {module} has no {', '.join(missing)}; download or export it again")

    def _here(self, model: torch.nn.Module) -> set[str]:
        """The checkpoint's names of sparse modules, but those of other stages of a pipeline."""
        return {
            stored
            for name, stored in self._checkpoint_name.items()
            if not is_pp_missing_parameter(f"{name}.weight", model)
        }

    def _serve_dense(self, layer: str, modules: list[str], reason: str) -> None:
        self._dense |= {self._checkpoint_name[module]: (layer, reason) for module in modules}

    def _warn_of_dense(self, modules: Iterable[str]) -> None:
        """One line for each kind of layer and each reason."""
        layers: dict[tuple[str, str], set[str]] = {}
        for module in modules:
            layer, reason = self._dense.get(
                module, (module, "vLLM builds it without a quantization, or under another name")
            )
            layers.setdefault((_kind(layer), reason), set()).add(layer)
        for (kind, reason), names in sorted(layers.items()):
            name = f"{kind} ({len(names)} layers)" if len(names) > 1 else names.pop()
            _logger.warning("%s: served dense, expanded from 2:4 while it is loaded: %s", name, reason)


def _records_int4(quantization: dict[str, Any], hf_config: Any) -> bool:
    """Whether a checkpoint of 4-bit weights records 2:4 layers at the top of config.json, and runs on a CPU."""
    record = getattr(hf_config, "sparsity_config", None)
    return (
        isinstance(record, dict)
        and record.get("format") == PLAIN
        and quantization.get("format") == PACK_QUANTIZED
        and bool(current_platform.is_cpu())
    )


def _has_no_scale(model: torch.nn.Module, layer: str) -> bool:
    try:
        return not hasattr(model.get_submodule(layer), _SCALE)
    except AttributeError:  # its module has another name in the model, or is part of one
        return False


def _weight(module: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The dense weight of tensors by the name of the part, a scale multiplied in."""
    try:
        if "weight_packed" in tensors:
            weight = int8_values(tensors["weight_packed"].clone())
        else:
            weight = tensors["weight"] if "weight" in tensors else SPARSE_24_BITMASK.unpack(tensors)
    except FormatError as error:
        raise FormatError(f"damaged checkpoint: {module}: {error}") from error
    if _SCALE in tensors:
        return (weight.float() * tensors[_SCALE].float().reshape(-1, 1)).to(torch.get_default_dtype())
    return weight


def _mapped(names: dict[str, str], mapper: WeightsMapper) -> dict[str, str]:
    return {new: name for seen, name in names.items() if (new := mapper.map_name(seen)) is not None}


def _modules_with(part: str, tensors: Iterable[str]) -> set[str]:
    return {name.removesuffix(f".{part}") for name in tensors if name.endswith(f".{part}")}


def _uses_latent_attention(layer: str) -> bool:
    """Whether vLLM multiplies by the layer's weight itself; ValueError where it cannot in the served dtype."""
    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None or not config.model_config.use_mla:
        return False
    chosen, dtype = config.attention_config.backend, config.model_config.dtype
    on_amx = current_platform.is_cpu() and torch.cpu._is_amx_tile_supported()
    if on_amx and dtype == torch.float32 and chosen != AttentionBackendEnum.CPU_MLA:
        raise ValueError(
            f"{layer}: vLLM's latent attention for processors with AMX has no fp32; use --dtype bfloat16, or "
            "--attention-backend CPU_MLA"
        )
    return True


@functools.cache
def _warn_of_dense_int4(kind: str, reason: str) -> None:
    """One line for each kind of layer and each reason."""
    _logger.warning("%s: 2:4 in 4 bits, but left to vLLM's dense product: %s", kind, reason)


def _kind(module: str) -> str:
    """A module's name with * for its numbers."""
    return re.sub(r"\.\d+(?=\.)", ".*", module)


def _parts_by(fusion: Mapping[str, Any], layer: str) -> list[str]:
    """The modules that a mapper's table (``.q_proj`` -> ``.qkv_proj``, shard) fuses into a layer."""
    parts = []
    for name, (fused, _) in fusion.items():
        old, new = (re.sub(r"(\.(weight|bias))?\.?$", "", end) for end in (name, fused))
        if layer.endswith(new):
            parts.append(layer.removesuffix(new) + old)
    return list(dict.fromkeys(parts))
