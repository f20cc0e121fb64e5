"""Where this package keeps what outlives a run: sample models and texts, studies, logs, measured plans."""

import os
from pathlib import Path

__all__ = ["user_cache"]


def user_cache() -> Path:
    """`crepe-llm` under `XDG_CACHE_HOME`, or under `~/.cache`; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crepe-llm"
