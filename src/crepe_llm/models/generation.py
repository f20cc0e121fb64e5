"""The generation settings that are saved with a model."""

import copy
import re
from typing import Any

__all__ = ["repair_generation_config"]


def repair_generation_config(model: Any) -> str:
    """Mend a generation config that transformers loads and refuses to save, in place. Returns what was changed.

    Settings of sampling without `do_sample` (early Llama 2, Vicuna) get `do_sample`, as their authors have corrected
    them since and as vLLM reads them; any other setting that is refused goes back to its default.

    Raises:
        ValueError: if transformers refuses what comes of it, too.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not _refusal(config):
        return ""
    mended = copy.deepcopy(config)
    changes = []
    if "do_sample" in _refusal(mended):
        mended.do_sample = True
        changes.append("do_sample: true")
    defaults = type(config)()
    while refusal := _refusal(mended):
        named = [name for name in re.findall(r"`(\w+)`", refusal) if hasattr(mended, name)]
        name = next((each for each in named if getattr(mended, each) != getattr(defaults, each, None)), None)
        if name is None:
            raise ValueError(
                "generation_config.json is invalid, and transformers would refuse to save the model after all the "
                f"work; mend or delete that file: {' '.join(refusal.split())}"
            )
        setattr(mended, name, getattr(defaults, name, None))
        changes.append(f"{name}: {getattr(mended, name)}")
    model.generation_config = mended
    return ", ".join(changes)


def _refusal(config: Any) -> str:
    try:
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        return str(error) or type(error).__name__
    return ""
