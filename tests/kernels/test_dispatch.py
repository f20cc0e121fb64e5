"""``kernels.linear``: shapes, errors, torch.compile, the dense rule, and life without a library."""

import copy
import os
import struct
import subprocess
import sys
import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from crepe_llm import kernels
from crepe_llm.kernels import cpu, dispatch, reference


def sparse(n, k, dtype=torch.float32):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    weight[:, 1::4] = weight[:, 2::4] = 0
    return (weight * (20 if dtype == torch.int8 else 1)).to(dtype)


@pytest.mark.parametrize("leading", [(), (3,), (2, 5), (0,), (2, 0, 3)])
def test_leading_dimensions(leading):
    weight = sparse(10, 8)
    x = torch.randn(*leading, 8)
    torch.testing.assert_close(kernels.linear(x, kernels.pack(weight)), torch.nn.functional.linear(x, weight))
    torch.testing.assert_close(kernels.linear(x, kernels.pack_dense(weight)), torch.nn.functional.linear(x, weight))


def test_errors_name_the_shapes():
    packed = kernels.pack(sparse(10, 8))
    with pytest.raises(ValueError, match=r"10 x 8, so its last dimension must be 8"):
        kernels.linear(torch.ones(2, 9), packed)
    with pytest.raises(ValueError, match="bias has 9 elements"):
        kernels.linear(torch.ones(2, 8), packed, torch.ones(9))
    with pytest.raises(TypeError, match="float64"):
        kernels.linear(torch.ones(2, 8, dtype=torch.float64), packed)
    with pytest.raises(ValueError, match="needs"):
        torch.ops.crepe_llm.sparse24_linear(torch.ones(2, 8), packed.data[:-1], None, None, None, 10, 8, "fp32")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_torch_compile_traces_without_a_break(backend, dtype):
    packed, dense = kernels.pack(sparse(24, 32, dtype)), kernels.pack_dense(torch.randn(16, 24))
    bias = torch.randn(24)

    def model(x):
        return kernels.linear(torch.relu(kernels.linear(x, packed, bias)), dense) + 1

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for tokens in (3, 7):
        x = torch.randn(tokens, 32)
        torch.testing.assert_close(compiled(x), model(x))


def test_operators_meet_torch_librarys_contract():
    packed = kernels.pack(sparse(10, 8))
    arguments = (torch.randn(3, 8), packed.data, packed.scale, None, None, 10, 8, "fp32")
    torch.library.opcheck(torch.ops.crepe_llm.sparse24_linear.default, arguments)
    x, bias = torch.randn(3, 8), torch.randn(10)
    int8 = torch.ones(10, 8, dtype=torch.int8), torch.rand(10)
    for weight, scale, inputs in ((torch.randn(10, 8), None, "exact"), (*int8, "exact"), (*int8, "lanes")):
        torch.library.opcheck(torch.ops.crepe_llm.dense_linear.default, (x, weight, scale, bias, inputs))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dense_rule_changes_speed_only(monkeypatch, weight_dtype, x_dtype):
    x, bias = torch.randn(5, 72).to(x_dtype), torch.randn(40)
    weight = torch.randint(-128, 128, (40, 72)) if weight_dtype == torch.int8 else torch.randn(40, 72)
    scale = torch.rand(40) / 100 if weight_dtype == torch.int8 else None
    packed, results = kernels.pack_dense(weight.to(weight_dtype), scale), []
    monkeypatch.setattr(dispatch, "_EXPANDED_ROWS", 16)
    for tokens in (-1, 1000):
        monkeypatch.setattr(dispatch, "_dense_tokens", lambda dtype, tokens=tokens: tokens if cpu.library() else -1)
        results.append(kernels.linear(x, packed, bias))
        assert results[-1].dtype == x_dtype
    torch.testing.assert_close(*results, rtol=2e-2, atol=6e-2)


def test_which_columns_share_a_scale():
    """By the definition, one column after the other."""
    x = torch.randn(3, 700, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 701)
    values, factors = reference.quantize_per_lane(x)
    groups = {}
    for column in range(700):
        groups.setdefault((column // 256, column % 64 // 4), []).append(column)
    assert max(len(columns) for columns in groups.values()) == 16
    for columns in groups.values():
        expected, scale = reference.quantize_per_token(x[:, columns])
        assert torch.equal(values[:, columns], expected)
        assert torch.equal(factors[:, columns], scale[:, None].expand(-1, len(columns)))


def test_the_rule_names_every_instruction_set():
    assert set(cpu.instruction_sets()) <= set(dispatch._DENSE_TOKENS)


def test_without_a_library_the_reference_serves_with_one_warning(monkeypatch):
    weight, x = sparse(10, 8), torch.randn(3, 8)
    cpu.library.cache_clear()
    monkeypatch.setattr(cpu.Path, "exists", lambda self: False)
    try:
        with pytest.warns(RuntimeWarning, match="not built when crepe-llm was installed") as caught:
            for _ in range(3):
                y = kernels.linear(x, kernels.pack(weight))
                torch.testing.assert_close(kernels.linear(x, kernels.pack_dense(weight)), y)
        assert len(caught) == 1
        torch.testing.assert_close(y, reference.sparse_linear(x, kernels.pack(weight), None))
        assert cpu.instruction_sets.__wrapped__() == {}
    finally:
        cpu.library.cache_clear()


@pytest.mark.skipif(not cpu.instruction_sets(), reason="no CPU kernel library")
def test_a_library_of_another_version_is_not_called(monkeypatch):
    cpu.library.cache_clear()
    monkeypatch.setattr(cpu, "_PROBLEM", struct.Struct(f"{cpu._PROBLEM.format}q"))
    try:
        with pytest.warns(RuntimeWarning, match=r"_kernels\S* was built from another version of the source"):
            assert cpu.library() is None
    finally:
        cpu.library.cache_clear()


@pytest.mark.skipif(not cpu.instruction_sets(), reason="no CPU kernel library")
def test_the_environment_chooses_the_instruction_set():
    script = "from crepe_llm.kernels import cpu; print(cpu.default_instruction_set())"

    def run(isa):
        environment = {**os.environ, cpu.ISA_VARIABLE: isa}
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120
        )

    assert run("portable").stdout.strip() == "portable"
    wrong = run("mmx")
    assert wrong.returncode != 0 and "CREPE_CPU_ISA=mmx: this machine runs" in wrong.stderr


def test_the_short_way_gives_what_the_checked_way_gives(monkeypatch):
    """Without recorded gradients the usual operands skip the checks; all others get them."""
    x, bias = torch.randn(1, 3, 32).bfloat16(), torch.randn(24).bfloat16()
    weights = [kernels.pack(sparse(24, 32, torch.bfloat16), torch.rand(24)), kernels.pack_dense(torch.randn(24, 32))]
    weights.append(kernels.pack(sparse(24, 32, torch.int8), torch.rand(24), "exact"))
    calls = [(weight, b) for weight in weights for b in (None, bias)]
    checked = [kernels.linear(x, *call) for call in calls]
    if cpu.library() is not None:
        monkeypatch.setattr(cpu.checks, "product", None)
    with torch.no_grad():
        assert torch.equal(torch.stack([kernels.linear(x, *call) for call in calls]), torch.stack(checked))
        copied = copy.deepcopy(weights[0])
        copied.data.zero_()
        assert not kernels.linear(x, copied).any() and torch.equal(kernels.linear(x, weights[0]), checked[0])


def test_inference_mode_gives_what_the_checked_way_gives():
    """There the operator is called at once; what it refuses is told apart as elsewhere."""
    packed = kernels.pack(sparse(24, 32, torch.bfloat16), torch.rand(24))
    operands = [(torch.randn(*shape, 32).bfloat16(), None) for shape in ((3,), (2, 3), (0,))]
    operands += [(torch.randn(3, 32), torch.randn(24, dtype=dtype)) for dtype in (torch.half, torch.float64)]
    expected = [kernels.linear(x, packed, bias) for x, bias in operands]
    with torch.inference_mode():
        for (x, bias), y in zip(operands, expected, strict=True):
            assert torch.equal(kernels.linear(x, packed, bias), y)
        with pytest.raises(ValueError, match=r"24 x 32, so its last dimension must be 32"):
            kernels.linear(torch.ones(2, 31), packed)
        with pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
            kernels.linear(torch.ones(2, 32, dtype=torch.float64), packed)


def test_unusual_operands_are_checked_without_gradients_too():
    packed, x = kernels.pack(sparse(24, 32)), torch.randn(3, 32)
    expected = kernels.linear(x, packed)
    with torch.no_grad():
        wide = torch.randn(3, 40)
        wide[:, 4:36] = x
        assert torch.equal(kernels.linear(wide[:, 4:36], packed), expected)
        assert torch.equal(kernels.linear(torch._neg_view(-x), packed), expected)
        assert torch.equal(kernels.linear(x, packed, torch.zeros(24, dtype=torch.float64)), expected)
        with pytest.raises(ValueError, match="bias has 23 elements"):
            kernels.linear(x, packed, torch.zeros(23))
        with pytest.raises(ValueError, match="last dimension must be 32"):
            kernels.linear(x[:, :8], packed)
        with pytest.raises(TypeError, match="float64"):
            kernels.linear(x.double(), packed)
        with pytest.raises(ValueError, match="x is on cpu"):
            kernels.linear(x, kernels.PackedWeight(packed.data.to("meta"), packed.shape, packed.format))


@pytest.mark.parametrize("tokens", [1, dispatch._DENSE_INT8_TOKENS + 1])
def test_fp16_outputs_are_scaled_before_they_are_rounded(tokens):
    """What fits into fp16 after its scale need not do so before."""
    codes, x = torch.full((3, 2048), 127, dtype=torch.int8), torch.ones(tokens, 2048, dtype=torch.float16)
    scale = torch.full((3,), 1e-3)
    y = kernels.linear(x, kernels.pack_dense(codes, scale))
    torch.testing.assert_close(y, torch.full((tokens, 3), 127 * 2.048, dtype=torch.float16))
    eights = torch.full((3, 2048), 448.0)
    eights[:, 1::2] = 0
    for form in (torch.float8_e4m3fn, torch.int8):
        codes = eights.to(form) if form != torch.int8 else eights.clamp(max=127).to(form)
        y = kernels.linear(x, kernels.pack(codes, scale, "token"))
        torch.testing.assert_close(y, (x.float() @ codes.float().t() * 1e-3).half())
    dense = kernels.pack_dense(torch.full((3, 2048), 100.0, dtype=torch.float16), scale)
    torch.testing.assert_close(kernels.linear(x, dense), torch.full((tokens, 3), 204.8, dtype=torch.float16))


@pytest.mark.parametrize("inputs", ["token", 0.02])
def test_int8_does_not_hide_activations_that_are_no_numbers(inputs):
    packed = kernels.pack(sparse(24, 32, torch.int8), torch.ones(24), inputs)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    alone = kernels.linear(x[3:], packed)
    x[0, 5], x[1, 7], x[2] = torch.nan, torch.inf, -torch.inf
    y = kernels.linear(x, packed)
    assert bool(y[:3].isnan().all())
    assert torch.equal(y[3:], alone)


def traced(function, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a size becomes a constant; torch.jit is deprecated
        return torch.jit.trace(function, x, check_trace=False)


@pytest.mark.parametrize("trace", [traced, lambda function, x: make_fx(function)(x)], ids=["jit.trace", "make_fx"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dense", [False, True])
def test_what_records_calls_records_the_product(trace, mode, dense):
    """A kernel that writes by address is not seen by torch, which would record memory that nothing wrote."""
    weight = sparse(32, 64)
    packed = kernels.pack_dense(weight) if dense else kernels.pack(weight)
    with mode():
        x, other = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
        recorded = trace(lambda x: kernels.linear(x, packed).relu(), x)
        torch.testing.assert_close(recorded(other), torch.nn.functional.linear(other, weight).relu())


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_no_scales_dtype(default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        packed = kernels.pack(sparse(32, 64, torch.int8))
    finally:
        torch.set_default_dtype(before)
    assert packed.scale is not None and packed.scale.dtype == torch.float32 and bool((packed.scale == 1).all())
