"""llm-compressor modifiers: one file each, lifecycle and fields only (the mathematics is above this package).

Importing this package makes the modifiers known to llm-compressor's recipes by their class names.
"""

try:
    from llmcompressor.modifiers import ModifierFactory
except ImportError as error:
    raise ImportError('crepe_llm.modifiers needs llm-compressor: pip install ".[compress]" in the checkout') from error

from crepe_llm.modifiers.admm import ADMMModifier
from crepe_llm.modifiers.allocation import SparsityAllocationModifier
from crepe_llm.modifiers.cfsp import CFSPModifier
from crepe_llm.modifiers.crepe import CRePEModifier
from crepe_llm.modifiers.dsnot import DSnoTModifier
from crepe_llm.modifiers.gptq import MaskedGPTQModifier
from crepe_llm.modifiers.permutation import ChannelPermutationModifier
from crepe_llm.modifiers.pho import PHOSearchModifier
from crepe_llm.modifiers.sparse_checkpoint import SparseCheckpointModifier
from crepe_llm.modifiers.weight_correction import WeightCorrectionModifier

__all__ = [
    "ADMMModifier",
    "CFSPModifier",
    "CRePEModifier",
    "ChannelPermutationModifier",
    "DSnoTModifier",
    "MaskedGPTQModifier",
    "PHOSearchModifier",
    "SparseCheckpointModifier",
    "SparsityAllocationModifier",
    "WeightCorrectionModifier",
]

for _name in __all__:
    ModifierFactory.register(_name, globals()[_name])
