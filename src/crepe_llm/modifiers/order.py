"""In which order modifiers may stand in a recipe: one table, which refuses wrong recipes and is printed in the docs."""

from dataclasses import dataclass, field
from typing import Literal

from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.quip import QuIPModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier

from crepe_llm import processes

__all__ = [
    "check",
    "check_processes",
    "first",
    "markdown_table",
    "modifiers_after",
    "modifiers_before",
    "needing_data",
    "role_of",
]

Role = Literal["cuts", "searches", "allocates", "permutes", "prunes", "re-prunes", "refits", "quantizes", "saves"]


@dataclass(frozen=True)
class Need:
    """Modifiers that prune and must be in the recipe: a CRePEModifier or any, exactly one or more; and the cure."""

    cure: str
    crepe: bool = False
    one: bool = True

    def __str__(self) -> str:
        kinds = "CRePEModifier" if self.crepe else "modifier that prunes"
        return f"one {kinds}" if self.one else f"a {kinds}"

    def is_met_by(self, pruning: list[Modifier]) -> bool:
        """Whether these modifiers, all of which prune, are what is needed."""
        if self.crepe and not all(_is_a(modifier, "CRePEModifier") for modifier in pruning):
            return False
        return len(pruning) == 1 if self.one else bool(pruning)


@dataclass(frozen=True)
class Place:
    """What a modifier demands of the rest of its recipe.

    Attributes:
        role: what it does.
        not_after: roles that no modifier before it may have, each with the reason and the cure.
        not_before: roles that no modifier after it may have, likewise.
        after: what must come before it.
        before: what must come after it.
        once: why a recipe may have it only once; empty where it may have several.
    """

    role: Role
    not_after: dict[Role, str] = field(default_factory=dict)
    not_before: dict[Role, str] = field(default_factory=dict)
    after: Need | None = None
    before: Need | None = None
    once: str = ""


# Of llm-compressor's own modifiers, those that add up over processes what they have seen of the calibration data.
_ADD_UP = (QuantizationModifier, GPTQModifier)
# Those of which each process writes weights that it has read, whoever else shares them.
_WRITE_TWICE = (AWQModifier, SmoothQuantModifier)

# Those that leave few zeros of what is pruned before them.
_ROTATES = "it rotates the weights, which leaves no zero in place. Put it before the modifier that prunes"
_BREAK_MASKS: dict[type[Modifier], str] = {
    GPTQModifier: "it moves pruned weights away from zero. Take MaskedGPTQModifier",
    QuIPModifier: _ROTATES,
    SpinQuantModifier: _ROTATES,
}

_CUT = "it would cut through what that one made of the layers. Put CFSPModifier first"
_DENSE = "it permutes the dense model and would undo that. Put ChannelPermutationModifier before it"
_LATER = "that one has pruned by then. Put it before"
_QUANTIZED = "it would undo the quantization. Put it between the modifier that prunes and the one that quantizes"
_FROM_DENSE = "it starts from the dense weights and would undo that. Keep one of the two, or put this one first"
_MASKS = "it chooses masks of its own and would undo that. Keep one of the two"
_FINDS = "it needs to know what that one will have found. Put ChannelPermutationModifier after it"
_PRUNED = Need(
    "there is no mask to work on and no dense layer to come closer to. Put it after CRePEModifier (or "
    "SparseGPTModifier or WandaPruningModifier) in the same recipe",
    one=False,
)

PLACES: dict[str, Place] = {
    "CFSPModifier": Place("cuts", not_after=dict.fromkeys(("prunes", "quantizes", "permutes", "allocates"), _CUT)),
    "PHOSearchModifier": Place("searches", not_after={"prunes": _LATER}),
    "SparsityAllocationModifier": Place(
        "allocates",
        not_after={"prunes": _LATER},
        before=Need(
            "it chooses the sparsities of one. Put one CRePEModifier (or SparseGPTModifier or WandaPruningModifier) "
            "after it"
        ),
        once="the second would undo the first. Keep one",
    ),
    "ChannelPermutationModifier": Place(
        "permutes",
        not_after={"prunes": _DENSE, "quantizes": _DENSE},
        not_before={"searches": _FINDS, "allocates": _FINDS},
        before=Need('it permutes for the masks of one. Put one after it, with mask_structure: "2:4"', crepe=True),
        once="one undoes the other. Keep one",
    ),
    "CRePEModifier": Place("prunes"),
    "DSnoTModifier": Place("re-prunes", not_after={"refits": _FROM_DENSE, "quantizes": _QUANTIZED}, after=_PRUNED),
    "WeightCorrectionModifier": Place(
        "refits", not_after={"refits": _FROM_DENSE, "quantizes": _QUANTIZED}, after=_PRUNED
    ),
    "ADMMModifier": Place(
        "refits",
        not_after={"re-prunes": _MASKS, "refits": _FROM_DENSE, "quantizes": _QUANTIZED},
        after=Need(
            "it takes score, structure and sparsity from one, and no other modifier may prune. Put CRePEModifier "
            "before it",
            crepe=True,
        ),
    ),
    "MaskedGPTQModifier": Place("quantizes"),
    "SparseCheckpointModifier": Place("saves"),
}


def role_of(modifier: Modifier) -> Role | None:
    """What a modifier does, llm-compressor's own included; None where the order of a recipe does not depend on it."""
    place = _place_of(modifier)
    if place is not None:
        return place.role
    if isinstance(modifier, SparsityModifierBase):
        return "prunes"
    return "quantizes" if isinstance(modifier, QuantizationMixin) else None


def modifiers_before(modifier: Modifier) -> list[Modifier]:
    """The modifiers before this one in the recipe that is being applied, in order."""
    return _around(modifier)[0]


def modifiers_after(modifier: Modifier) -> list[Modifier]:
    """The modifiers after this one in the recipe that is being applied, in order."""
    return _around(modifier)[1]


def first(modifier: Modifier, kind: type[Modifier] = Modifier) -> Modifier:
    """The first modifier of this package and of a kind in the recipe that is being applied, or this one outside it."""
    modifiers = active_session().lifecycle.recipe.modifiers
    ours = [other for other in modifiers if isinstance(other, kind) and _place_of(other) is not None]
    return ours[0] if any(other is modifier for other in ours) else modifier


def needing_data(modifier: Modifier) -> Modifier | None:
    """The modifier itself if it needs calibration data, else the first of its recipe that does; None if none does."""
    before, after = _around(modifier)
    return next((other for other in (modifier, *before, *after) if other.requires_calibration_data), None)


def check(modifier: Modifier) -> None:
    """Raise ValueError if the recipe has a modifier where this one cannot work; called before any time is spent."""
    own, place = type(modifier).__name__, _place_of(modifier)
    assert place is not None
    before, after = _around(modifier)
    for others, refused, need, word in (
        (before, place.not_after, place.after, "before"),
        (after, place.not_before, place.before, "after"),
    ):
        for other in others:
            role = role_of(other)
            if role in refused:
                raise ValueError(f"{own} has {type(other).__name__} {word} it in the recipe: {refused[role]}")
        pruning = [other for other in others if role_of(other) == "prunes"]
        if need is not None and not need.is_met_by(pruning):
            found = ", ".join(type(other).__name__ for other in pruning) or "none"
            raise ValueError(f"{own} needs {need} {word} it in the recipe, and has {found}: {need.cure}")
    if place.role in ("prunes", "re-prunes", "refits"):
        for other in after:
            reason = next((why for kind, why in _BREAK_MASKS.items() if isinstance(other, kind)), "")
            if reason and _place_of(other) is None:
                raise ValueError(f"{own} has {type(other).__name__} after it in the recipe: {reason}")
    if place.once and any(_place_of(other) is place for other in after):
        raise ValueError(f"the recipe has two {own}s: {place.once}")
    check_processes([modifier])


def check_processes(modifiers: list[Modifier]) -> None:
    """Raise ValueError if one of these modifiers works in one process only, and there are several."""
    if processes.count() == 1:
        return
    for modifier in modifiers:
        name = type(modifier).__name__
        if isinstance(modifier, _WRITE_TWICE):
            raise ValueError(
                f"{name} works in one process, and this job has {processes.count()}: processes of a machine share "
                "weights, and each would smooth them once more. Apply it in one process, and prune what comes of it"
            )
        if _place_of(modifier) is None and modifier.requires_calibration_data and not isinstance(modifier, _ADD_UP):
            known = ", ".join(kind.__name__ for kind in _ADD_UP)
            raise ValueError(
                f"{name} works in one process, and this job has {processes.count()}: llm-compressor's {name} looks at "
                f"its own share of the calibration data only; {known} do not"
            )


def markdown_table() -> str:
    """The table for the docs: each modifier, its role, and what may stand before and after it."""
    heads = ("modifier", "role", "needs before it", "refuses before it", "needs after it", "refuses after it")
    rows = [heads, ("---",) * len(heads)]
    for name, place in PLACES.items():
        after = ", ".join(place.not_before) + "; a second one" * bool(place.once)
        needs = (str(place.after or ""), ", ".join(place.not_after), str(place.before or ""), after.removeprefix("; "))
        rows.append((f"`{name}`", place.role, *needs))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _around(modifier: Modifier) -> tuple[list[Modifier], list[Modifier]]:
    modifiers = active_session().lifecycle.recipe.modifiers
    place = next((place for place, other in enumerate(modifiers) if other is modifier), len(modifiers))
    return modifiers[:place], modifiers[place + 1 :]


def _place_of(modifier: Modifier) -> Place | None:
    return next((PLACES[kind.__name__] for kind in type(modifier).__mro__ if kind.__name__ in PLACES), None)


def _is_a(modifier: Modifier, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(modifier).__mro__)
