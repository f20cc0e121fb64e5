"""The checkpoint formats by the name that config.json gives them; one file a format."""

from crepe_llm.checkpoints.formats.base import CheckpointFormat, FormatError, StoredTensor
from crepe_llm.checkpoints.formats.bitmask import SPARSE_24_BITMASK

__all__ = ["FORMATS", "SPARSE_24_BITMASK", "CheckpointFormat", "FormatError", "StoredTensor", "format_of_part"]

FORMATS: dict[str, CheckpointFormat] = {SPARSE_24_BITMASK.name: SPARSE_24_BITMASK}


def format_of_part(part: str) -> CheckpointFormat | None:
    """Find the format that has tensors with the last name `part`, or None."""
    return next((form for form in FORMATS.values() if part in form.parts), None)
