"""Types of fields that several modifiers have, with what YAML makes of them."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

__all__ = ["Fraction", "MaskStructure", "NonNegative", "Patterns", "unquoted"]


def unquoted(value: Any) -> Any:
    """A mask structure, or a mapping to some, as it was given.

    Raises:
        ValueError: if it is a number: YAML 1.1 reads 2:4 without quotation marks as two minutes and four seconds.
    """
    for each in value.values() if isinstance(value, dict) else [value]:
        if isinstance(each, int):
            n, m = divmod(each, 60)
            meant = f'"{n}:{m}"' if n and m else '"2:4"'
            raise ValueError(
                f"mask_structure is the number {each}, as YAML reads what is not in quotation marks: quote it, "
                f"mask_structure: {meant}"
            )
    return value


Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MaskStructure = Annotated[str, BeforeValidator(unquoted)]
Patterns = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
