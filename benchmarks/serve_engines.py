"""The engines of benchmarks/serve.py: what each serves, and how one is measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
from crepe_llm.evaluation import throughput
from crepe_llm.evaluation.throughput import Case
from serve_models import DENSE, Storage, stored, token_bytes


@dataclass(frozen=True)
class Serving:
    """A checkpoint in vLLM."""

    storage: Storage
    dtype: str = "bfloat16"


ENGINES: dict[str, Serving | str] = {  # llama.cpp: the type of its file
    "vLLM bf16": Serving(DENSE),
    "vLLM fp32": Serving(DENSE, "float32"),
    "vLLM W8A8": Serving(Storage("int8", sparse=False)),
    "vLLM W4A16": Serving(Storage("int4", sparse=False)),
    "2:4 bf16": Serving(Storage(None, sparse=True)),
    "2:4 bf16, INT8 head": Serving(Storage(None, sparse=True, int8_head=True)),
    "2:4 INT8, INT8 head": Serving(Storage("int8", sparse=True, int8_head=True)),
    "2:4 INT4, INT8 head": Serving(Storage("int4", sparse=True, int8_head=True)),
    **{f"llama.cpp {kind}": kind for kind in llama_cpp.TYPES},
}


def is_ours(engine: str) -> bool:
    """Whether an engine multiplies by this package's kernels."""
    return engine.startswith("2:4")


@dataclass(frozen=True)
class Bench:
    """How engines are measured.

    Attributes:
        folder: where models are made and kept.
        cases: the loads.
        tokens: that each stream generates.
        repeats: how often a started engine runs a load.
        compiled: whether vLLM compiles the model.
        llama: the build of llama.cpp, or None.
    """

    folder: Path
    cases: Sequence[Case]
    tokens: int
    repeats: int
    compiled: bool
    llama: llama_cpp.LlamaCpp | None

    def make(self, model: str, engine: str) -> Path:
        """The checkpoint, or file, of an engine.

        Raises:
            ValueError: the engine is llama.cpp, and there is no build.
        """
        what = ENGINES[engine]
        if isinstance(what, Serving):
            return stored(model, what.storage, self.folder)
        if self.llama is None:
            raise ValueError(f"{engine} needs a build of llama.cpp: --llama-cpp DIR, or leave it out of --engines")
        return self.llama.stored(stored(model, DENSE, self.folder), what)

    def run(self, model: str, engine: str) -> dict[str, Any]:
        """The figures of one start of an engine."""
        path, what = self.make(model, engine), ENGINES[engine]
        if isinstance(what, str):
            assert self.llama is not None
            return self.llama.measure(path, self.cases, tokens=self.tokens, repeats=self.repeats)
        served = throughput.Engine(engine, str(path), what.dtype, self.compiled)
        measured = throughput.run(served, self.cases, tokens=self.tokens, repeats=self.repeats)
        return measured | {"token_bytes": token_bytes(path, what.dtype, what.storage)}
