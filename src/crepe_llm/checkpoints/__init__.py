"""Checkpoints with packed 2:4 layers (`sparse-24-bitmask`): packing, saving, reading and loading."""

from crepe_llm.checkpoints.converting import compress_folder, decompress_folder
from crepe_llm.checkpoints.formats import FormatError, StoredTensor
from crepe_llm.checkpoints.formats.bitmask import is_2of4, pack, read_shape, unpack, validate_bitmask
from crepe_llm.checkpoints.reading import Checkpoint, SparseLayer, read_files, read_folder
from crepe_llm.checkpoints.saving import attach

__all__ = [
    "Checkpoint",
    "FormatError",
    "SparseLayer",
    "StoredTensor",
    "attach",
    "compress_folder",
    "decompress_folder",
    "is_2of4",
    "pack",
    "read_files",
    "read_folder",
    "read_shape",
    "unpack",
    "validate_bitmask",
]
