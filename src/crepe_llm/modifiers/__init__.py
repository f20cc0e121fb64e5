"""llm-compressor modifiers: one file each, lifecycle and fields only (the mathematics is above this package)."""

__all__ = ["register"]


def register() -> None:
    """Make the modifiers known to llm-compressor's recipes by their class names. Idempotent."""
