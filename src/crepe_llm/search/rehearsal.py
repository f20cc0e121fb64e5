"""A model that is pruned for a while: by cached statistics of its dense layers, or block by block as a recipe does."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from compressed_tensors.utils import align_module_device, get_execution_device

from crepe_llm.functional.masks import keep_mask
from crepe_llm.functional.scores import crepe_scores
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.models.blocks import find_blocks
from crepe_llm.pruning.block_pass import Batch, Calibration, Wanted, block_inputs, block_outputs, prune_block
from crepe_llm.pruning.layer import Layer, input_channels, set_weight_matrix, weight_matrix
from crepe_llm.pruning.steps import Mask as MaskStep
from crepe_llm.search.space import Coefficients, Mask

__all__ = ["Pruning", "input_norms", "mask_step", "pruned", "rehearsed"]


@contextmanager
def _restored(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Give layers back, at the end, the weights that they have at the beginning."""
    originals = {}
    for module in modules:
        with torch.no_grad(), align_module_device(module):
            originals[module] = weight_matrix(module).detach().clone()
    try:
        yield
    finally:
        for module, weight in originals.items():
            with torch.no_grad(), align_module_device(module):
                set_weight_matrix(module, weight)


@contextmanager
def input_norms(layers: Iterable[torch.nn.Module]) -> Iterator[dict[torch.nn.Module, torch.Tensor]]:
    """What the norms of layers' input channels are over all that a model is run on meanwhile, without padding.

    Gives a dictionary that holds them, fp32 [d_in] each, when the context has been left; layers that no token reached
    are not in it.
    """
    norms: dict[torch.nn.Module, torch.Tensor] = {}
    statistics: dict[torch.nn.Module, InputStatistics] = {}

    def see(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if module not in statistics:
            statistics[module] = InputStatistics(input_channels(module), device=get_execution_device(module))
        statistics[module].update(args[0])

    handles = [module.register_forward_pre_hook(see) for module in layers]
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()
    norms |= {module: found.norm for module, found in statistics.items() if found.tokens}


@contextmanager
def pruned(norms: Mapping[torch.nn.Module, torch.Tensor], coefficients: Coefficients, mask: Mask) -> Iterator[None]:
    """Prune layers meanwhile, by the dense model's input statistics, and restore them.

    Args:
        norms: by linear layer the norms of its input channels, fp32 [d_in].
        coefficients: of CRePE's score.
        mask: the structure and sparsity of the masks.
    """
    with _restored(list(norms)):
        for module, norm in norms.items():
            with torch.no_grad(), align_module_device(module):
                weight = weight_matrix(module)
                keep = _keep(weight, norm, coefficients, mask)
                set_weight_matrix(module, weight.masked_fill(~keep, 0))
        yield


def mask_step(coefficients: Coefficients, mask: Mask) -> MaskStep:
    """The step of a recipe that prunes by CRePE's score and does nothing else."""

    def scores(name: str, weight: torch.Tensor, statistics: Any) -> torch.Tensor:
        return crepe_scores(weight, statistics.norm, **dataclasses.asdict(coefficients))

    return MaskStep(
        scores, lambda name, found: keep_mask(found, mask.sparsity, mask.mask_structure, mask.comparison_group)
    )


@dataclasses.dataclass(frozen=True)
class Pruning:
    """How a recipe prunes layers.

    Attributes:
        wanted: the layers, and what is gathered for each.
        calibration: how layers are calibrated.
        run: runs the steps on a layer, which changes its `weight` only; the module's follows.
    """

    wanted: Mapping[torch.nn.Module, Wanted]
    calibration: Calibration
    run: Callable[[Layer], None]

    def __call__(self, layer: Layer) -> None:
        with torch.no_grad(), align_module_device(layer.module):
            self.run(layer)
            set_weight_matrix(layer.module, layer.weight)


@contextmanager
def rehearsed(model: Any, sequences: Sequence[torch.Tensor], pruning: Pruning) -> Iterator[None]:
    """Prune a model meanwhile, block by block, each calibrated on what the pruned blocks before it give; restore it.

    Layers outside of decoder blocks stay dense.

    Args:
        model: a transformers causal language model.
        sequences: what it is calibrated on, int64 [any] each.
        pruning: how.

    Raises:
        ValueError: the model has no list of decoder blocks.
    """
    blocks = list(find_blocks(model).values())
    captured = _captured(model, blocks, sequences)
    hidden: list[torch.Tensor] = []
    dense: list[torch.Tensor | None] = []
    with ExitStack() as stack, torch.no_grad():
        for block in blocks:
            batches = captured.pop(block)
            if hidden:
                batches = [_with_hidden(batch, states) for batch, states in zip(batches, hidden, strict=True)]
            for batch, beside in zip(batches, dense, strict=False):
                batch.dense = beside
            wanted = {module: pruning.wanted[module] for module in block.modules() if module in pruning.wanted}
            stack.enter_context(_restored(list(wanted)))
            prune_block(block, batches, wanted, pruning.calibration, pruning)
            hidden, dense = [_outputs(block, batch) for batch in batches], [batch.dense for batch in batches]
        del hidden, dense
        yield


def _captured(
    model: Any, blocks: Sequence[torch.nn.Module], sequences: Sequence[torch.Tensor]
) -> dict[torch.nn.Module, list[Batch]]:
    """The calls of every block, one for each sequence; hidden states of the first block's only."""
    captured: dict[torch.nn.Module, list[Batch]] = {block: [] for block in blocks}

    def see(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = Batch(send_to_device(args, "cpu"), send_to_device(kwargs, "cpu"))
        if block is not blocks[0]:
            batch = _with_hidden(batch, None)
        alike = captured[block][-1:] or [other[-1] for other in captured.values() if other][-1:]
        captured[block].append(batch.sharing_with(alike[0]) if alike else batch)

    handles = [block.register_forward_pre_hook(see, with_kwargs=True) for block in blocks]
    device = model.get_input_embeddings().weight.device
    try:
        with torch.no_grad():
            for sequence in sequences:
                getattr(model, "base_model", model)(input_ids=sequence[None].to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return captured


def _with_hidden(batch: Batch, hidden: torch.Tensor | None) -> Batch:
    if batch.args:
        return dataclasses.replace(batch, args=(hidden, *batch.args[1:]))
    return dataclasses.replace(batch, kwargs=batch.kwargs | {"hidden_states": hidden})


def _outputs(block: torch.nn.Module, batch: Batch) -> torch.Tensor:
    args, kwargs = batch.on(get_execution_device(block))
    return block_outputs(block(*args, **kwargs)).to(block_inputs(batch.args, batch.kwargs).device)


def _keep(weight: torch.Tensor, norm: torch.Tensor, coefficients: Coefficients, mask: Mask) -> torch.Tensor:
    scores = crepe_scores(weight, norm, **dataclasses.asdict(coefficients))
    return keep_mask(scores, mask.sparsity, mask.mask_structure, mask.comparison_group)
