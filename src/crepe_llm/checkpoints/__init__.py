"""The 2:4 checkpoint format `sparse-24-bitmask`: packing, saving and loading."""

from crepe_llm.checkpoints.bitmask import FormatError, is_2of4, pack, read_shape, unpack, validate_bitmask

__all__ = ["FormatError", "is_2of4", "pack", "read_shape", "unpack", "validate_bitmask"]
