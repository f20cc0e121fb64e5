"""Which channels the modules of a model share, to permute them exactly."""

from collections.abc import Iterable
from typing import Any

from crepe_llm.models.blocks import kind_of
from crepe_llm.models.families import FAMILIES, Axes, Family

__all__ = ["AXES", "family_of", "module_axes", "normalises_outputs"]

AXES = ("mlp", "attention", "residual")


def family_of(config: Any) -> str:
    """The family of a model by its configuration: of one with images that of its part for text.

    Models whose blocks differ in width have a `model_type` that begins with it (:mod:`crepe_llm.models.per_block`).
    """
    return str(config.get_text_config().model_type).partition(" ")[0]


def normalises_outputs(model_type: str) -> bool:
    """Whether models of a family normalise what attention and feed-forward give before it is added to the residual.

    False of a family that is not in :data:`crepe_llm.models.families.FAMILIES`.
    """
    return FAMILIES.get(model_type, Family()).normalises_outputs


def module_axes(model_type: str, parameters: Iterable[str]) -> dict[str, Axes]:
    """The axes of every module of a model, as :mod:`crepe_llm.models.families` defines them.

    Args:
        model_type: as :func:`family_of` gives it.
        parameters: names of all parameters, those of tied weights included.

    Returns:
        By module name the axes of its weight.

    Raises:
        ValueError: if the family's axes are not known, or a parameter is not among them.
    """
    table = FAMILIES.get(model_type, Family()).axes
    if not table:
        known = ", ".join(name for name, family in FAMILIES.items() if family.axes)
        raise ValueError(
            f"the channels of a model of the family {model_type} cannot be permuted, because which modules share them "
            f"is known of {known} only"
        )
    axes = {}
    for parameter in parameters:
        module, _, kind = parameter.rpartition(".")
        pattern = kind_of(module)
        if kind not in ("weight", "bias") or pattern not in table:
            raise ValueError(
                f"{parameter} is not a parameter that a model of the family {model_type} has, so which channels it "
                "shares is unknown and they cannot be permuted"
            )
        axes[module] = table[pattern]
    return axes
