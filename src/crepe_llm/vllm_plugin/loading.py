"""What happens while vLLM reads a sparse checkpoint: dense layers get dense weights, and nothing may be left unread.

vLLM does not check that a quantized checkpoint is complete: a parameter that no tensor fills keeps whatever was in its
memory. So the memory that loading writes is recorded, whatever function writes it, and compared with the parameters.

A sparse layer's shape is read here: some models rearrange the rows of all tensors that they are given of a layer.

On a CPU the same record says when all of a sparse layer is read. It is packed then, so that the file's tensors and the
packed weights, which are smaller where they are of 4 bits, are never in memory together but for one layer.
"""

import bisect
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod, KVCacheScaleParameter
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.platforms import current_platform

from crepe_llm.vllm_plugin.config import Sparse24Config
from crepe_llm.vllm_plugin.experts import Sparse24ExpertsMethod
from crepe_llm.vllm_plugin.linear import CheckedLinearMethod, return_freed_memory

_aten = torch.ops.aten
# The operators by which a loader fills a tensor. Arithmetic in place is none: it needs what was there.
_FILLING = {
    _aten.copy_,
    _aten.fill_,
    _aten.zero_,
    _aten.index_copy_,
    _aten.index_put_,
    _aten.masked_scatter_,
    _aten.scatter_,
}
_NAMED = 100  # so many names fit a message


class Run(NamedTuple):
    """The bytes from address ``start`` to before ``stop``."""

    start: int
    stop: int


class WrittenMemory(TorchDispatchMode):
    """Records which bytes of some tensors are filled while it is active.

    Args:
        tensors: what is watched, with all views of its memory.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._watched = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._written: list[Run] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _FILLING and args[0].untyped_storage().data_ptr() in self._watched:
            self._written += runs_of(args[0])
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._written = _merged(self._written)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory is watched: one that was given other memory meanwhile was loaded so."""
        return tensor.untyped_storage().data_ptr() in self._watched

    def has_filled(self, tensor: torch.Tensor) -> bool:
        """Whether all of the tensor is filled by now."""
        self._written = _merged(self._written)
        return self.holds(tensor) and not self.gaps(tensor)

    def gaps(self, tensor: torch.Tensor) -> list[Run]:
        """The tensor's bytes that nothing has filled; for when recording is over."""
        gaps = []
        for start, stop in runs_of(tensor):
            first = max(bisect.bisect(self._written, (start, start)) - 1, 0)
            for written in self._written[first:]:
                if written.start >= stop:
                    break
                if written.start > start:
                    gaps.append(Run(start, written.start))
                start = max(start, written.stop)
            if start < stop:
                gaps.append(Run(start, stop))
        return gaps


def runs_of(tensor: torch.Tensor) -> list[Run]:
    """The addresses of a strided tensor's elements, as contiguous runs."""
    if not tensor.numel():
        return []
    length, starts = 1, [0]
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride == length and len(starts) == 1:
            length *= size
        else:
            starts = [start + step * stride for start in starts for step in range(size)]
    base, width = tensor.data_ptr(), tensor.element_size()
    return [Run(base + start * width, base + (start + length) * width) for start in starts]


def install() -> None:
    """Makes every loader of vLLM expand and check sparse checkpoints; models with other quantizations stay as they are.

    vLLM hands a model to nobody between building it and reading its weights, so the method that builds it is wrapped.
    """
    original = BaseModelLoader.create_model

    @functools.wraps(original)
    def create_model(self: BaseModelLoader, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        config = vllm_config.quant_config
        if not isinstance(config, Sparse24Config):
            return original(self, vllm_config, model_config, prefix)
        if self.load_config.load_format == "dummy":
            raise ValueError(
                "load_format=dummy gives every tensor random values, and random masks and shapes describe no 2:4 "
                f"weights: leave load_format out for {model_config.model}, or time a dense model's dummy weights"
            )
        _guard_workers()
        config.begin_model(get_model_cls(model_config))
        model = original(self, vllm_config, model_config, prefix)
        config.finish_model(model, dense_head=_makes_classifier(model_config))
        track = self.load_config.model_loader_extra_config or {}
        _guard(model, config, model_config.model, check=track.get("enable_weights_track") is not False)
        return model

    BaseModelLoader.create_model = create_model  # type: ignore[method-assign]


def _makes_classifier(model_config: Any) -> bool:
    """Whether vLLM makes a classifier (a reranker's) of rows of the embedding that the head is tied to."""
    text_config = model_config.hf_config.get_text_config()
    asked = [getattr(one, "classifier_from_token", None) for one in (model_config.hf_config, text_config)]
    return model_config.convert_type == "classify" and any(asked) and bool(text_config.tie_word_embeddings)


@functools.cache
def _guard_workers() -> None:
    """Makes vLLM's workers refuse what packed weights cannot do.

    To be replaced: vLLM takes the old ones away before it reads the new. To be saved from memory: they are not among
    the tensors that vLLM saves.
    """
    # Imported here, where vLLM has imported it: it needs all of vLLM, which a process that registers may not need.
    from vllm.v1.worker.gpu_worker import Worker

    for name in ("reload_weights", "start_weight_update", "start_draft_weight_update"):
        setattr(Worker, name, _unless_packed(getattr(Worker, name), _check_unpacked))
    for name in ("save_sharded_state", "save_tensorized_model"):
        setattr(Worker, name, _unless_packed(getattr(Worker, name), _check_saved))


def _unless_packed(original: Callable[..., None], check: Callable[[torch.nn.Module], None]) -> Callable[..., None]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        check(self.get_model())
        original(self, *args, **kwargs)

    return method


def _check_unpacked(model: torch.nn.Module) -> None:
    if _has_packed(model):
        raise NotImplementedError(
            "the weights of sparse layers are packed and cannot be replaced in a running engine: start it again"
        )


def _check_saved(model: torch.nn.Module) -> None:
    if _has_packed(model):
        raise NotImplementedError(
            "the weights of sparse layers are packed and would be missing from what is saved: copy the checkpoint's "
            "folder"
        )


def _has_packed(model: torch.nn.Module) -> bool:
    return any(hasattr(module, "packed") for module in model.modules())


def _guard(model: Any, config: Sparse24Config, checkpoint: str, check: bool) -> None:
    """Wraps the model's ``load_weights``."""
    original = model.load_weights

    @functools.wraps(original)
    def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        _check_unpacked(model)
        with WrittenMemory(parameter for _, _, parameter in _parameters(model)) as written:
            tensors = packing(model, config, written, config.expand(model, weights))
            loaded = original(tensors, *args, **kwargs)
        missing = config.file_names(
            name
            for layer, attribute, parameter in _parameters(model)
            for name in _unread(layer, attribute, parameter, written, config, set(loaded or ()))
        )
        if missing and check:
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise ValueError(
                f"damaged checkpoint: {checkpoint} does not hold {', '.join(missing[:_NAMED])}{more}; download or "
                "export it again"
            )
        return loaded

    model.load_weights = load_weights


def packing(
    model: torch.nn.Module,
    config: Sparse24Config,
    written: WrittenMemory,
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors without the shapes of sparse layers that are one in the file, which are read here.

    On a CPU each sparse linear layer of the model is packed as soon as all of it is read. When a tensor is asked for,
    those before it are read. A layer that is not found so (a model reads later than it asks) is packed when loading is
    over, as vLLM does it.
    """
    layers: dict[str, torch.nn.Module] = {}
    shapes: dict[str, Any] = {}
    unread: dict[torch.nn.Module, set[str]] = {}
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, CheckedLinearMethod):
            parts = [config.stored(part) for part in method.parts]
            kinds = {kind: one for kind, one in module.named_parameters(recurse=False) if kind != "bias"}
            unread[module] = {f"{part}.{kind}" for part in parts for kind in kinds}
            layers |= dict.fromkeys(unread[module], module)
            if len(parts) == 1:
                shapes |= {f"{parts[0]}.{kind}": one for kind, one in kinds.items() if kind.endswith("shape")}
    for name, tensor in tensors:
        if name in shapes:
            shapes[name].weight_loader(shapes[name], tensor)
        else:
            yield name, tensor
        layer = layers.get(name)
        if layer is not None:
            unread[layer].discard(name)
            if not unread[layer] and current_platform.is_cpu() and _is_read(layer, written):
                _pack(layer)


def _is_read(layer: torch.nn.Module, written: WrittenMemory) -> bool:
    """Whether all that a layer is packed from is read; its bias is not packed."""
    return all(
        written.has_filled(parameter.data)
        for name, parameter in layer.named_parameters(recurse=False)
        if name != "bias"
    )


def _pack(layer: Any) -> None:
    """Packs a layer that is read, and frees its parameters, which vLLM's loader still holds."""
    parameters = [parameter for name, parameter in layer.named_parameters(recurse=False) if name != "bias"]
    with _disable_current_modes():
        layer.quant_method.process_weights_after_loading(layer)
        for parameter in parameters:
            parameter.data = parameter.data.new_empty(0)
    return_freed_memory()
    layer.quant_method.process_weights_after_loading = _is_packed


def _is_packed(layer: Any) -> None:
    """What vLLM calls after loading, of a layer that is packed by then."""


def _parameters(model: torch.nn.Module) -> Iterator[tuple["_Layer", str, torch.Tensor]]:
    """The parameters that a checkpoint must fill, each once, with the layer and the name that they have there."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        # Scales of the key-value cache have defaults; online quantization makes its parameters while it loads.
        if isinstance(method, BaseKVCacheMethod) or getattr(method, "uses_meta_device", False):
            continue
        for attribute, parameter in module.named_parameters(recurse=False):
            needed = parameter.numel() and not parameter.is_meta and not isinstance(parameter, KVCacheScaleParameter)
            if needed and id(parameter) not in seen:
                seen.add(id(parameter))
                yield _Layer(name, module), attribute, parameter


class _Layer(NamedTuple):
    name: str
    module: torch.nn.Module


def _unread(
    layer: _Layer,
    attribute: str,
    parameter: torch.Tensor,
    written: WrittenMemory,
    config: Sparse24Config,
    claimed: set[str],
) -> Iterator[str]:
    """The names, as a checkpoint has them, of what of a parameter was not read."""
    name = f"{layer.name}.{attribute}" if layer.name else attribute
    gaps = written.gaps(parameter.data) if written.holds(parameter) else []
    empty = sum(stop - start for start, stop in gaps) == parameter.nbytes
    if not gaps or (empty and name in claimed):  # some models fill a parameter later, and say that they have it
        return
    method = getattr(layer.module, "quant_method", None)
    if isinstance(method, Sparse24ExpertsMethod):
        height = parameter.shape[1]
        empty_rows = (divmod(row, height) for row in _rows(parameter.data.flatten(0, 1), gaps))
        yield from method.unread(attribute, empty_rows, height)
        return
    rows = _rows(parameter, gaps)
    sizes = getattr(layer.module, "output_partition_sizes", [])
    parts = config.parts(layer.name)
    if parameter.ndim and len(parts) > 1 and len(parts) == len(sizes):
        ends = _ends(sizes, parameter.shape[0])
        yield from (f"{parts[part]}.{attribute}" for part in sorted({bisect.bisect(ends, row) for row in rows}))
    elif empty:
        yield name
    else:
        yield f"{name} ({'rows' if parameter.ndim < 3 else 'experts'} {', '.join(_spans(rows))})"


def _rows(parameter: torch.Tensor, gaps: list[Run]) -> list[int]:
    """The rows of a parameter, ascending, that runs of its memory are in."""
    if parameter.ndim == 0 or not parameter.is_contiguous():
        return list(range(parameter.shape[0] if parameter.ndim else 1))
    base, width = parameter.data_ptr(), parameter.nbytes // parameter.shape[0]
    return sorted({row for gap in gaps for row in range((gap.start - base) // width, -(-(gap.stop - base) // width))})


def _spans(numbers: list[int]) -> Iterator[str]:
    """Ascending numbers as "1, 4 to 7"."""
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        span = [number for _, number in group]
        yield str(span[0]) if len(span) == 1 else f"{span[0]} to {span[-1]}"


def _ends(sizes: list[int], rows: int) -> list[int]:
    """Where the parts of a fused layer end in a parameter of ``rows`` rows: one a part, or rows packed together."""
    if rows == len(sizes):
        return list(range(1, rows + 1))
    return [sum(sizes[: part + 1]) * rows // sum(sizes) for part in range(len(sizes))]


def _merged(runs: list[Run]) -> list[Run]:
    merged: list[Run] = []
    for start, stop in sorted(runs):
        if merged and start <= merged[-1].stop:
            merged[-1] = Run(merged[-1].start, max(stop, merged[-1].stop))
        else:
            merged.append(Run(start, stop))
    return merged
