"""A model that is pruned for a while: by statistics that are there, or block by block as a recipe does."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from compressed_tensors.offload.cache import CPUCache, OffloadCache
from compressed_tensors.utils import align_module_device, get_execution_device, get_offloaded_device

from crepe_llm import processes
from crepe_llm.functional.scores import crepe_scores
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.models.blocks import find_blocks
from crepe_llm.pruning.block_pass import Batch, Calibration, Wanted, block_inputs, block_outputs, prune_block
from crepe_llm.pruning.layer import Layer, input_channels, set_weight_matrix, weight_matrix
from crepe_llm.pruning.steps import Mask as MaskStep
from crepe_llm.search.space import Coefficients, Mask

__all__ = [
    "Calls",
    "Pruning",
    "calls_of",
    "input_statistics",
    "mask_step",
    "own_weights",
    "pruned",
    "rehearsed",
    "remembering",
]


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
def own_weights(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Give this process parameters of its own of these layers meanwhile, where processes share them.

    The toolkit keeps weights that wait on the CPU or the disk once for all processes of a machine. A process that
    changed them would change them for all. In one process nothing is done.
    """
    shared = {}
    for module in modules:
        if processes.count() > 1 and isinstance(module._parameters, OffloadCache) and not _is_on_device(module):
            shared[module] = module._parameters
            with torch.no_grad(), align_module_device(module):
                own = {name: copy.deepcopy(value) for name, value in module._parameters.items()}
            module._parameters = CPUCache.from_mapping(own, get_execution_device(module))
    try:
        yield
    finally:
        for module, parameters in shared.items():
            module._parameters = parameters


def _is_on_device(module: torch.nn.Module) -> bool:
    """Whether a layer waits on an accelerator, where each process has weights of its own."""
    return get_offloaded_device(module) not in ("disk", torch.device("cpu"))


@contextmanager
def input_statistics(
    wanted: Mapping[torch.nn.Module, Wanted],
) -> Iterator[dict[torch.nn.Module, InputStatistics]]:
    """Statistics of layers' inputs over all that a model is run on meanwhile, without padding.

    Gives a dictionary that fills while the model runs; layers that no token reached are not in it. No Gram matrices.
    """
    statistics: dict[torch.nn.Module, InputStatistics] = {}

    def see(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if module not in statistics:
            statistics[module] = InputStatistics(input_channels(module), device=get_execution_device(module))
        count = wanted[module].token_weights
        statistics[module].update(args[0], None, None if count is None else count(args[0], None))

    handles = [module.register_forward_pre_hook(see) for module in wanted]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def pruned(statistics: Mapping[torch.nn.Module, InputStatistics], pruning: "Pruning") -> Iterator[None]:
    """Prune layers meanwhile, by statistics of their inputs that are there already, and restore them.

    Args:
        statistics: of the layers to prune, all of them known to `pruning`; no step may need a Gram matrix that they
            do not have.
        pruning: how. Its calibration is not looked at.
    """
    with _restored(list(statistics)):
        for module, found in statistics.items():
            with torch.no_grad(), align_module_device(module):
                dense = weight_matrix(module).detach()
                pruning(Layer(pruning.wanted[module].name, module, dense, found, dense))
        yield


def mask_step(coefficients: Coefficients, mask: Mask) -> MaskStep:
    """The step of a recipe that prunes by CRePE's score and does nothing else."""

    def scores(name: str, weight: torch.Tensor, statistics: Any) -> torch.Tensor:
        return crepe_scores(weight, statistics.norm, **coefficients.of_score)

    return MaskStep(scores, lambda name, found: mask.keep(found, coefficients))


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


def remembering(pruning: Pruning, statistics: dict[torch.nn.Module, InputStatistics]) -> Pruning:
    """The same pruning, that puts the statistics of each layer into a dictionary, without the Gram matrix."""

    def run(layer: Layer) -> None:
        found = copy.copy(layer.statistics)
        found.gram = None
        statistics[layer.module] = found
        pruning.run(layer)

    return dataclasses.replace(pruning, run=run)


class Calls:
    """What a dense model calls its decoder blocks with, for some batches of text; on the CPU.

    Args:
        blocks: the model's, in order.
        tokens: after so many, padding included, no more batches are kept; None for all.
    """

    def __init__(self, blocks: Iterable[torch.nn.Module], tokens: int | None = None) -> None:
        self._batches: dict[torch.nn.Module, list[Batch]] = {block: [] for block in blocks}
        self._first = next(iter(self._batches))
        self._tokens = tokens

    def see(
        self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mask: torch.Tensor | None = None
    ) -> None:
        """Keep a block's next call; blocks see batches in the same order, the first block before the others."""
        mine, first = self._batches[block], self._batches[self._first]
        if block is self._first:
            if self._tokens is not None and sum(batch.tokens for batch in mine) >= self._tokens:
                return
            batch = Batch.of(args, kwargs, mask)
        elif len(mine) == len(first):
            return
        else:
            batch = _with_hidden(Batch.of(args, kwargs, mask), None)
        alike = mine[-1:] or [other[-1] for other in self._batches.values() if other][-1:]
        mine.append(batch.sharing_with(alike[0]) if alike else batch)

    def of(self, block: torch.nn.Module) -> list[Batch]:
        """A block's calls; hidden states are in the first block's only."""
        return [dataclasses.replace(batch) for batch in self._batches[block]]

    @property
    def blocks(self) -> list[torch.nn.Module]:
        """The model's blocks, in order."""
        return list(self._batches)


def calls_of(model: Any, sequences: Sequence[torch.Tensor]) -> Calls:
    """What a model calls its blocks with when it is run on sequences, int64 [any] each, one at a time.

    Raises:
        ValueError: the model has no list of decoder blocks.
    """
    calls = Calls(find_blocks(model).values())
    handles = [block.register_forward_pre_hook(calls.see, with_kwargs=True) for block in calls.blocks]
    device = model.get_input_embeddings().weight.device
    try:
        with torch.no_grad():
            for sequence in sequences:
                getattr(model, "base_model", model)(input_ids=sequence[None].to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def rehearsed(calls: Calls, pruning: Pruning) -> Iterator[None]:
    """Prune a model meanwhile, block by block, each calibrated on what the pruned blocks before it give; restore it.

    Layers outside of decoder blocks stay dense.

    Args:
        calls: what it is calibrated on. Those of a recipe's pipeline make the weights that the recipe makes; others
            with the same text do not, quite: attention takes another way where it is given a mask, in 16-bit floats a
            few masks in a thousand fall the other way then, and with what follows from that perplexity moves by some
            per cent.
        pruning: how.
    """
    hidden: list[torch.Tensor] = []
    dense: list[torch.Tensor | None] = []
    with ExitStack() as stack, torch.no_grad():
        for block in calls.blocks:
            batches = calls.of(block)
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


def _with_hidden(batch: Batch, hidden: torch.Tensor | None) -> Batch:
    if batch.args:
        return dataclasses.replace(batch, args=(hidden, *batch.args[1:]))
    return dataclasses.replace(batch, kwargs=batch.kwargs | {"hidden_states": hidden})


def _outputs(block: torch.nn.Module, batch: Batch) -> torch.Tensor:
    args, kwargs = batch.on(get_execution_device(block))
    return block_outputs(block(*args, **kwargs)).to(block_inputs(batch.args, batch.kwargs).device)
