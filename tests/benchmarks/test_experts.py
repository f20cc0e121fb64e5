"""The benchmark of experts at a tiny size: what it compares is the same, and a difference is found."""

import argparse

import pytest

import experts

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed")

TINY = experts.Shape(experts=4, chosen=2, hidden=64, inner=32)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_row_has_the_times_of_ours_and_of_vllms_experts(dtype):
    options = argparse.Namespace(dtype=dtype, seconds=0.01, fastest=False)
    row = experts.measure("tiny", TINY, 3, options)
    assert row["shape"] == "tiny" and row["inner"] == 32 and row["tokens"] == 3
    assert row["ours"] > 0 and "vec" in row["dense"] and all(time > 0 for time in row["dense"].values())


def test_other_outputs_are_refused():
    calls = experts.calls_of(TINY, 2, "bf16")
    with pytest.raises(ValueError, match=r"outputs of wrong differ from ours"):
        experts.compare(calls | {"wrong": lambda i: -calls["ours"](i)}, 0.02)
