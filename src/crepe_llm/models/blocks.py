"""TEMP"""

import re

from crepe_llm.models.ffn import find_blocks

__all__ = ["find_blocks", "kind_of"]


def kind_of(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
