"""The tables that modifiers log."""

from collections.abc import Iterable

__all__ = ["aligned"]


def aligned(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    """A table's text: in each line a name, padded to the longest, and the rest, whose columns the caller pads."""
    lines = [head, *rows]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {rest}".rstrip() for name, rest in lines)
