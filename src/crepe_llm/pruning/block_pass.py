"""Pruning one decoder block: run it, group after group of its layers, beside its dense self."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from compressed_tensors.utils import get_execution_device, patch_attr
from tqdm import tqdm
from transformers.cache_utils import Cache

from crepe_llm import processes
from crepe_llm.functional.statistics import InputStatistics, token_products
from crepe_llm.models.blocks import kind_of
from crepe_llm.models.linear import is_transposed
from crepe_llm.pruning.layer import Layer, input_channels, share_layer, weight_matrix

__all__ = [
    "Batch",
    "Calibration",
    "TokenWeights",
    "Wanted",
    "block_inputs",
    "block_outputs",
    "mask_for",
    "prune_block",
    "shared_out",
]

Call = tuple[torch.nn.Module, torch.Tensor]
TokenWeights = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Of a layer's inputs [..., d_in] and their mask, how much each token [...] counts; of padding anything. Layers with
the same inputs that have the same object for it share statistics."""


@dataclass
class Batch:
    """One call of a block.

    Attributes:
        args, kwargs: its arguments, on the device that streams are kept on.
        mask: the attention mask [batch, length] of the tokens; None where all count.
        dense: the hidden states that the dense model has in the place of the ones in `args`; None where they are equal.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: torch.Tensor | None = None
    dense: torch.Tensor | None = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], mask: torch.Tensor | None = None) -> "Batch":
        """A call as a hook sees it, on the CPU and without a cache, which would grow with every run of the block."""
        args = tuple(None if isinstance(value, Cache) else value for value in args)
        kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
        return cls(send_to_device(args, "cpu"), send_to_device(kwargs, "cpu"), mask)

    def on(self, device: torch.device, hidden: torch.Tensor | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments on a device, with other hidden states if some are given."""
        args, kwargs = send_to_device(self.args, device), send_to_device(self.kwargs, device)
        if hidden is None:
            return args, kwargs
        hidden = hidden.to(block_inputs(args, kwargs))
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    @property
    def tokens(self) -> int:
        """How many tokens the call has, padding included."""
        return block_inputs(self.args, self.kwargs).shape[:-1].numel()

    def mask_of(self, inputs: torch.Tensor, copies: int = 1) -> torch.Tensor | None:
        """The mask for a layer's inputs [..., d_in]; None where all tokens count, or where they were routed to it."""
        return mask_for(self.mask, inputs, copies)

    def sharing_with(self, other: "Batch") -> "Batch":
        """The same batch, that holds tensors which are equal to another's (rotary embeddings, masks) only once."""
        kwargs = {
            name: value if name == "hidden_states" else _shared(value, other.kwargs.get(name))
            for name, value in self.kwargs.items()
        }
        return replace(self, kwargs=kwargs)


@dataclass(frozen=True)
class Wanted:
    """What is gathered for one layer.

    Attributes:
        name: the layer's name in the model.
        gram: whether a step needs the Gram matrix of its inputs.
        token_weights: how much each token counts; None where all count alike.
        copies: how often its inputs may hold the batch's tokens, all of them once and then all again.
    """

    name: str
    gram: bool = False
    token_weights: TokenWeights | None = None
    copies: int = 1


@dataclass(frozen=True)
class Calibration:
    """How the layers of a block are calibrated.

    Attributes:
        in_turn: prune layer after layer, each calibrated on what the pruned layers before it in the block give it;
            otherwise all are calibrated on the dense block.
        cross: gather the products of the inputs in the dense model with those that a layer is given.
    """

    in_turn: bool = False
    cross: bool = False

    @property
    def runs_blocks(self) -> bool:
        """Whether blocks are run beside the calibration's own forward passes."""
        return self.in_turn or self.cross


def mask_for(mask: torch.Tensor | None, inputs: torch.Tensor, copies: int = 1) -> torch.Tensor | None:
    """A batch's attention mask where it is one of these inputs [..., d_in], else None.

    It is not where a router has picked tokens for an expert: the toolkit does not say which tokens these are. Inputs
    that hold the batch's tokens `copies` times, all of them once and then all again, have the mask as often.
    """
    if mask is None:
        return None
    tokens = inputs.shape[:-1].numel()
    if mask.numel() == tokens:
        return mask
    return mask.flatten().repeat(copies) if mask.numel() * copies == tokens else None


def block_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among a decoder block's arguments."""
    return cast(torch.Tensor, args[0] if args else kwargs["hidden_states"])


def block_outputs(output: Any) -> torch.Tensor:
    """The hidden states that a decoder block returns, alone or first of several things."""
    return cast(torch.Tensor, output[0] if isinstance(output, tuple | list) else output)


def shared_out(modules: Iterable[torch.nn.Module]) -> dict[torch.nn.Module, int]:
    """For each layer the process that prunes it. The cost is that of its products with a Gram matrix and of solving.

    Multiplications of one d_out x d_in by d_in x d_in product and of one Cholesky factorisation: d_out d_in² + d_in³/3.
    """
    sizes = {module: (cast(torch.Tensor, module.weight).numel(), input_channels(module)) for module in modules}
    return processes.assign({module: size * width + width**3 / 3 for module, (size, width) in sizes.items()})


@torch.no_grad()
def prune_block(
    block: torch.nn.Module,
    batches: list[Batch],
    wanted: dict[torch.nn.Module, Wanted],
    calibration: Calibration,
    prune: Callable[[Layer], None],
) -> None:
    """Prune a block's layers in place, those with the same inputs together, in the order in which the block calls them.

    In memory at a time are the batches, the Gram matrices of one group and, with `calibration.cross`, the dense weights
    of the block's layers. With that, each batch's `dense` afterwards is what the dense block has made of it: the hidden
    states that the next block has in the dense model.

    Several processes add up what they gather, share out the layers of a group, and tell each other the results.

    Args:
        block: the decoder block.
        batches: its calls, in each process others.
        wanted: the layers to prune, and what is gathered for each.
        calibration: how layers are calibrated.
        prune: runs the steps on a layer and puts the result into its module.
    """
    runs = _Runs(block, batches, calibration)
    groups = runs.groups(list(wanted)) if wanted else [[]]
    for group in groups:
        gathered = runs.gather({module: wanted[module] for module in group}, last=group is groups[-1])
        if calibration.cross:
            # The modules' own weights are overwritten when the steps are done.
            runs.dense |= {module: weight_matrix(module).detach().clone() for module in group}
        owners = shared_out(group)
        processes.wait()  # until all have these copies: the processes may share the memory of offloaded weights
        for module in group:
            found = gathered.pop(module)
            dense = runs.dense.get(module, weight_matrix(module).detach())
            cross = None if found.routed else found.cross
            layer = Layer(wanted[module].name, module, dense, found.statistics, dense, None, cross, found.routed)
            # So that the matrices are gone as soon as the last layer that shares them no longer needs them.
            del found, cross
            if owners[module] == processes.rank():
                prune(layer)
        for module, owner in owners.items():
            share_layer(module, owner)


@dataclass
class _Gathered:
    """What is gathered for a layer and those that share its inputs."""

    wanted: Wanted
    statistics: InputStatistics
    cross: torch.Tensor | None = None
    routed: bool = False
    counted: list[torch.Tensor | None] = field(default_factory=list)  # how much tokens count, by call of the last batch

    def update(self, batch: Batch, given: list[torch.Tensor]) -> None:
        count = self.wanted.token_weights
        masks = [batch.mask_of(inputs, self.wanted.copies) for inputs in given]
        self.counted = [
            None if count is None else count(inputs, mask) for inputs, mask in zip(given, masks, strict=True)
        ]
        for inputs, mask, weights in zip(given, masks, self.counted, strict=True):
            self.statistics.update(inputs, mask, weights)

    def update_cross(self, batch: Batch, given: list[torch.Tensor], dense: list[torch.Tensor]) -> None:
        self.routed |= len(given) != len(dense)
        for inputs, weights, beside in zip(given, self.counted, dense, strict=False):
            if beside.shape != inputs.shape or inputs.shape[:-1].numel() != batch.tokens:
                self.routed = True
                continue
            product = token_products(beside, inputs, batch.mask_of(inputs), weights)
            self.cross = product if self.cross is None else self.cross.add_(product)

    def add_up(self) -> None:
        """Give all processes what all have gathered."""
        if processes.count() == 1:
            return
        processes.add_up_statistics(self.statistics)
        found = processes.gather((self.routed, self.cross is not None))
        self.routed = any(routed for routed, _ in found)
        if self.routed or not any(crossed for _, crossed in found):
            self.cross = None
            return
        if self.cross is None:
            width = self.statistics.channels
            self.cross = torch.zeros(width, width, device=self.statistics.sum.device)
        processes.add_up(self.cross)


class _ReachedError(Exception):
    """The last of the watched layers has its inputs, so the rest of the block need not run."""


class _Runs:
    """Runs a block on its batches, and gathers what its layers are given."""

    def __init__(self, block: torch.nn.Module, batches: list[Batch], calibration: Calibration) -> None:
        self._block, self._batches, self._calibration = block, batches, calibration
        self._device = get_execution_device(block)
        #: The dense weights, [d_out, d_in], of the layers that have been pruned.
        self.dense: dict[torch.nn.Module, torch.Tensor] = {}
        self._sharing: dict[torch.nn.Module, torch.nn.Module] = {}  # layer -> the first of those with its inputs
        self._called_again = False
        #: Whether the block is given what the dense model gives it.
        self._starts_equal = all(batch.dense is None for batch in batches)

    def groups(self, layers: list[torch.nn.Module]) -> list[list[torch.nn.Module]]:
        """Layers with the same inputs together, in the order of their calls; all together if none is to wait.

        Layers of one kind, such as the up_proj of all experts, are in one group. Those that no batch reaches come last.
        """
        names = {module: name for name, module in self._block.named_modules()}
        kinds = {module: kind_of(names[module]) for module in layers}
        places: dict[str, int] = {}
        for batch in self._batches:
            calls, _ = self._run(batch, layers, stop=False)
            self._called_again |= len({module for module, _ in calls}) < len(calls)
            for number, (module, inputs) in enumerate(calls):
                same = [other for other, given in calls[:number] if given is inputs]
                self._sharing.setdefault(module, self._sharing[same[0]] if same else module)
                if kinds[module] not in places:
                    places[kinds[module]] = places[kinds[same[0]]] if same else len(set(places.values()))
            if places.keys() >= set(kinds.values()):
                break
        places = self._agree(places, layers)
        ordered: dict[int, list[torch.nn.Module]] = {}
        for module in layers:
            place = places.get(kinds[module], len(places)) if self._calibration.in_turn else 0
            ordered.setdefault(place, []).append(module)
        return [ordered[place] for place in sorted(ordered)]

    def _agree(self, places: dict[str, int], layers: list[torch.nn.Module]) -> dict[str, int]:
        """What the first process has found of which layers share inputs; routers may send others other tokens."""
        number = {module: place for place, module in enumerate(layers)}
        sharing = {number[module]: number[source] for module, source in self._sharing.items()}
        places, sharing = processes.from_first((places, sharing))
        self._sharing = {layers[place]: layers[source] for place, source in sharing.items()}
        return places

    def gather(self, wanted: dict[torch.nn.Module, Wanted], last: bool) -> dict[torch.nn.Module, _Gathered]:
        """What the layers of a group are given over all batches; with the last group, the dense stream runs on."""
        source = self._sources(wanted)
        found: dict[torch.nn.Module, _Gathered] = {}
        for module in dict.fromkeys(source.values()):
            gram = any(wanted[other].gram for other in wanted if source[other] is module)
            statistics = InputStatistics(input_channels(module), gram=gram, device=get_execution_device(module))
            found[module] = _Gathered(wanted[module], statistics)
        if self._calibration.cross and last:
            self._reserve_dense()
        for batch in tqdm(self._batches, desc="Calibrating a group of layers", leave=False):
            given = _by_layer(self._run(batch, list(wanted))[0] if wanted else [], wanted)
            for module, gathered in found.items():
                gathered.update(batch, given[module])
            if self._calibration.cross:
                self._gather_cross(batch, found, given, last)
            for module in wanted:
                if [id(x) for x in given[module]] != [id(x) for x in given[source[module]]]:
                    raise ValueError(
                        f"{wanted[module].name} and {wanted[source[module]].name} have the same inputs in some batches "
                        "only, so they cannot be calibrated together: set `true_sequential: false` and "
                        "`asymmetric_calibration: 0`"
                    )
        for gathered in found.values():
            gathered.add_up()
        return {module: found[source[module]] for module in wanted}

    def _sources(self, wanted: dict[torch.nn.Module, Wanted]) -> dict[torch.nn.Module, torch.nn.Module]:
        """For each layer the one whose statistics it shares: with the same inputs, whose tokens count as much."""
        sources = {}
        for module, options in wanted.items():
            source = self._sharing.get(module, module)
            alike = source in wanted and wanted[source].token_weights is options.token_weights
            sources[module] = source if alike else module
        return sources

    def _reserve_dense(self) -> None:
        """Make room for the dense stream in one piece: made between a batch's many tensors, it would leave gaps."""
        if self._starts_equal:
            for batch in self._batches:
                batch.dense = torch.empty_like(block_inputs(batch.args, batch.kwargs))

    def _gather_cross(
        self,
        batch: Batch,
        found: dict[torch.nn.Module, _Gathered],
        given: dict[torch.nn.Module, list[torch.Tensor]],
        last: bool,
    ) -> None:
        # The first layers of the first block are given what the dense model gives them.
        differs = bool(found) and (bool(self.dense) or not self._starts_equal)
        if not (differs or last):
            return
        with _weights(self.dense):
            hidden = None if self._starts_equal else batch.dense
            calls, output = self._run(batch, list(found), hidden, stop=not last)
        if differs:
            beside = _by_layer(calls, found)
            for module, gathered in found.items():
                gathered.update_cross(batch, given[module], beside[module])
        if last:
            assert batch.dense is not None
            batch.dense.copy_(block_outputs(output))

    def _run(
        self, batch: Batch, layers: list[torch.nn.Module], hidden: torch.Tensor | None = None, stop: bool = True
    ) -> tuple[list[Call], Any]:
        """The inputs of the layers in the order of calls, and the block's output, None if it was stopped before."""
        calls: list[Call] = []
        missing = set(layers)

        def watch(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            calls.append((module, args[0]))
            missing.discard(module)
            if stop and not missing and not self._called_again:
                raise _ReachedError

        handles = [module.register_forward_pre_hook(watch) for module in layers]
        args, kwargs = batch.on(self._device, hidden)
        try:
            return calls, self._block(*args, **kwargs)
        except _ReachedError:
            return calls, None
        finally:
            for handle in handles:
                handle.remove()


def _by_layer(calls: list[Call], layers: Iterable[torch.nn.Module]) -> dict[torch.nn.Module, list[torch.Tensor]]:
    given: dict[torch.nn.Module, list[torch.Tensor]] = {module: [] for module in layers}
    for module, inputs in calls:
        given[module].append(inputs)
    return given


@contextmanager
def _weights(weights: dict[torch.nn.Module, torch.Tensor]) -> Iterator[None]:
    """Let layers have other weights (each [d_out, d_in]) meanwhile."""
    with ExitStack() as stack:
        for module, weight in weights.items():
            parameters = {name: module._parameters[name] for name in module._parameters}
            stored = weight.T if is_transposed(module) else weight
            parameters["weight"] = torch.nn.Parameter(stored, requires_grad=False)
            stack.enter_context(patch_attr(module, "_parameters", parameters))
        yield


def _shared(value: Any, other: Any) -> Any:
    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = value.shape == other.shape and value.dtype == other.dtype and value.device == other.device
        return other if alike and torch.equal(value, other) else value
    if type(value) is tuple and type(other) is tuple and len(value) == len(other):
        return tuple(map(_shared, value, other))
    return value
