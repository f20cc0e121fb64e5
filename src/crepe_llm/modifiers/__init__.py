"""llm-compressor modifiers: one file each, lifecycle and fields only (the mathematics is above this package)."""

try:
    from llmcompressor.modifiers import ModifierFactory
except ImportError as error:
    raise ImportError('crepe_llm.modifiers needs llm-compressor: pip install "crepe-llm[compress]"') from error

from crepe_llm.modifiers.crepe import CRePEModifier
from crepe_llm.modifiers.gptq import MaskedGPTQModifier
from crepe_llm.modifiers.pho import PHOSearchModifier
from crepe_llm.modifiers.weight_correction import WeightCorrectionModifier

__all__ = ["CRePEModifier", "MaskedGPTQModifier", "PHOSearchModifier", "WeightCorrectionModifier", "register"]


def register() -> None:
    """Make the modifiers known to llm-compressor's recipes by their class names. Idempotent."""
    for modifier in (CRePEModifier, MaskedGPTQModifier, PHOSearchModifier, WeightCorrectionModifier):
        ModifierFactory.register(modifier.__name__, modifier)
