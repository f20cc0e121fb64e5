"""Which product serves a weight's shape at how many tokens: measured on the GPU at load, chosen here, remembered.

A plan belongs to a shape, a format and a kind of GPU. It holds the seconds that each candidate took at each number of
tokens in :data:`TOKENS`; the choice from them is a pure function.
"""

import bisect
import contextlib
import functools
import json
import os
import subprocess
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from crepe_llm.kernels.cuda import products
from crepe_llm.kernels.cuda.products import CUSPARSELT, CUTLASS, DENSE, EXPAND, TRITON, Candidate
from crepe_llm.kernels.cuda.weight import CudaWeight
from crepe_llm.user_cache import user_cache

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Dense must win by more than timings scatter before it costs the memory of a dense copy.
DENSE_GAIN = 1.05
# A dense copy is kept while this process holds less than this share of the GPU's memory. What other processes hold does
# not count, so that every start of a server decides alike.
DENSE_MEMORY = 0.5


@dataclass(frozen=True)
class Plan:
    """Seconds of each candidate at each number of tokens of :data:`TOKENS`."""

    seconds: Mapping[int, Mapping[Candidate, float]]

    def wants_dense(self) -> bool:
        """Whether the dense product is clearly the fastest somewhere."""
        return any(
            DENSE_GAIN * times[Candidate(DENSE)] < _fastest(times, without=DENSE)[1]
            for times in self.seconds.values()
            if Candidate(DENSE) in times
        )

    def choose(self, tokens: int, with_dense: bool) -> Candidate:
        """The fastest candidate at ``tokens`` tokens: as measured at the next larger number (or the largest).

        ``with_dense``: whether there is a dense copy of the weight.
        """
        measured = sorted(self.seconds)
        times = self.seconds[measured[min(bisect.bisect_left(measured, tokens), len(measured) - 1)]]
        best, seconds = _fastest(times, without=DENSE)
        dense = times.get(Candidate(DENSE))
        return Candidate(DENSE) if with_dense and dense is not None and dense < seconds else best

    def backends(self, with_dense: bool) -> set[str]:
        """The backends that :meth:`choose` can name."""
        return {self.choose(tokens, with_dense).backend for tokens in self.seconds}


def dense_copy_allowed(allocated: int, total: int, copy: int) -> bool:
    """Whether a dense copy of ``copy`` bytes fits the policy, of ``total`` bytes with ``allocated`` of this process."""
    return allocated + copy <= DENSE_MEMORY * total


def measure(weight: CudaWeight, backends: Iterable[str]) -> Plan:
    """Times the backends on a GPU, with a weight that holds what they all need.

    A backend that fails, or whose result is not the dense product's, is left out with a warning. The level-2 cache is
    emptied before each call.
    """
    from triton.errors import TritonError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    seconds: dict[int, dict[Candidate, float]] = {}
    refused: set[str] = set()
    for tokens in TOKENS:
        x = _random_inputs(tokens, weight)
        quantized = weight.format.inputs is not None
        out_dtype = torch.bfloat16 if quantized else weight.format.dtype
        token_scale = torch.ones(tokens, dtype=torch.float32, device=x.device) if quantized else None

        run = functools.partial(
            products.product, x=x, weight=weight, token_scale=token_scale, bias=None, out_dtype=out_dtype
        )
        expected = run(Candidate(EXPAND))
        seconds[tokens] = {}
        for backend in (EXPAND, DENSE, *backends):
            if backend in refused:
                continue
            try:
                for candidate in _candidates(backend, tokens, x, weight):
                    call = functools.partial(run, candidate)
                    with contextlib.suppress(OutOfResources):  # this GPU has too little shared memory for the tile
                        _check(call(), expected)
                        seconds[tokens][candidate] = 1e-3 * do_bench(call, warmup=5, rep=20, return_mode="median")
            except (RuntimeError, ValueError, TritonError, subprocess.CalledProcessError) as error:
                refused.add(backend)
                warn_refused(backend, weight, error)
    return Plan({t: {c: s for c, s in times.items() if c.backend not in refused} for t, times in seconds.items()})


def warn_refused(backend: str, weight: CudaWeight, error: Exception) -> None:
    """Says that a backend does not work for a weight, and why; the others serve."""
    n, k = weight.shape
    warnings.warn(
        f"crepe-llm does not use {backend} for {n} x {k} {weight.format.name} weights on this GPU: {error}",
        RuntimeWarning,
        stacklevel=2,
    )


class PlanStore:
    """Plans by key, in memory and in a JSON file, so that a server measures each shape once on a machine.

    A file that cannot be read or written is not an error: plans are measured again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._plans: dict[str, Plan] = {}

    def get(self, key: str) -> Plan | None:
        return self._plans.get(key)

    def get_or_measure(self, key: str, measure: Callable[[], Plan]) -> Plan:
        plan = self._plans.get(key)
        if plan is None:
            stored = self._read().get(key)
            plan = _from_json(stored) if stored else None
            if plan is None:
                plan = measure()
                self._write({**self._read(), key: _to_json(plan)})
            self._plans[key] = plan
        return plan

    def _read(self) -> dict:
        try:
            return dict(json.loads(self.path.read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def _write(self, content: dict) -> None:
        temporary = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content, indent=1))
            temporary.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()


def cache_path() -> Path:
    """The JSON file of plans in the user's cache."""
    return user_cache() / "cuda_plans.json"


def _fastest(times: Mapping[Candidate, float], without: str) -> tuple[Candidate, float]:
    # Nothing was measured (or all failed): expanding works everywhere.
    return min(
        ((c, t) for c, t in times.items() if c.backend != without),
        key=lambda entry: entry[1],
        default=(Candidate(EXPAND), float("inf")),
    )


def _candidates(backend: str, tokens: int, x: torch.Tensor, weight: CudaWeight) -> list[Candidate]:
    if backend == TRITON:
        from crepe_llm.kernels.cuda import triton_kernels

        settings = range(len(triton_kernels.CONFIGS)) if tokens <= triton_kernels.MAX_TOKENS else range(0)
        return [Candidate(TRITON, setting) for setting in settings]
    if backend == CUSPARSELT:
        return sorted({Candidate(CUSPARSELT), Candidate(CUSPARSELT, products.search_cusparselt(x, weight))})
    return [Candidate(backend)]


def _random_inputs(tokens: int, weight: CudaWeight) -> torch.Tensor:
    device = (weight.values if weight.values is not None else weight.dense).device  # type: ignore[union-attr]
    x = torch.randn(tokens, weight.shape[1], dtype=torch.float32, device=device)
    dtype = weight.format.dtype
    return x.to(dtype) if dtype.is_floating_point else (30 * x).clamp(-127, 127).to(dtype)


def _check(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises ValueError where a result is further from the dense one than another order of summation explains."""
    error = (result.float() - expected.float()).abs().max()
    limit = 0.02 * expected.float().abs().max()
    if not bool(error <= limit):
        raise ValueError(f"it differs from the dense product by {float(error):.3g} (at most {float(limit):.3g})")


def _to_json(plan: Plan) -> dict:
    return {
        str(tokens): {f"{c.backend}/{c.setting}": seconds for c, seconds in times.items()}
        for tokens, times in plan.seconds.items()
    }


def _from_json(content: dict) -> Plan | None:
    try:
        seconds = {
            int(tokens): {_candidate(name): float(s) for name, s in times.items()} for tokens, times in content.items()
        }
    except (AttributeError, IndexError, TypeError, ValueError):
        return None
    return Plan(seconds) if seconds else None


def _candidate(name: str) -> Candidate:
    """Of a name in a file; raises ValueError if there is no such one."""
    backend, setting = name.split("/")
    if backend not in (TRITON, CUSPARSELT, CUTLASS, EXPAND, DENSE):
        raise ValueError(f"{backend} is no backend")
    return Candidate(backend, int(setting))
