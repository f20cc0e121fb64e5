"""The products, for every instruction set that this machine runs, against naive references."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm import kernels
from crepe_llm.kernels import cpu, reference
from crepe_llm.kernels.formats import FORMATS

WEIGHT_DTYPES = tuple(
    dict.fromkeys(form.dtype for form in FORMATS.values() if form.code is not None and form.zero_point is None)
)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ISAS = list(cpu.instruction_sets()) or [pytest.param("none", marks=pytest.mark.skip("no CPU kernel library"))]

pytestmark = pytest.mark.parametrize("isa", ISAS)


def sparse_weight(n, k, dtype, generator):
    keep = torch.rand(n, k // 4, 4, generator=generator).argsort(-1) < 2
    if dtype == torch.int8:
        weight = torch.randint(-128, 128, (n, k), generator=generator)
    else:
        weight = torch.randn(n, k, generator=generator)
    return (weight * keep.view(n, k)).to(dtype)


def naive(x, weight, scale, bias):
    """float64 result, and the size of its terms (what rounding errors are measured against)."""
    x, weight = x.double(), weight.double()
    y, size = x @ weight.t(), x.abs() @ weight.abs().t()
    if scale is not None:
        y, size = y * scale.double(), size * scale.double().abs()
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    return y, size


def assert_close(y, expected, size):
    # Sums in fp32 (or products of bf16 pairs) plus one rounding to y's dtype.
    tolerance = size * 2.0**-18 + expected.abs() * torch.finfo(y.dtype).eps + torch.finfo(y.dtype).smallest_normal
    error = (y.double() - expected).abs()
    assert bool((error <= tolerance).all()), f"error {error.max():.3g}, {(error / tolerance).max():.3g} x tolerance"


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    groups=st.integers(1, 60),
    m=st.integers(0, 40),
    weight_dtype=st.sampled_from(FLOATS),
    x_dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(["contiguous", "rows", "columns", "offset"]),
    with_bias=st.booleans(),
    with_scale=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_float_weights(isa, n, groups, m, weight_dtype, x_dtype, layout, with_bias, with_scale, seed):
    generator = torch.Generator().manual_seed(seed)
    k = 4 * groups
    weight = sparse_weight(n, k, weight_dtype, generator)
    scale = torch.rand(n, generator=generator) + 0.5 if with_scale else None
    bias = torch.randn(n, generator=generator).to(x_dtype) if with_bias else None
    if layout == "rows":
        x = torch.randn(m, k + 7, generator=generator).to(x_dtype)[:, 3 : 3 + k]
    elif layout == "columns":
        x = torch.randn(k, m, generator=generator).to(x_dtype).t()
    elif layout == "offset":
        x = torch.randn(m * k + 1, generator=generator).to(x_dtype)[1:].view(m, k)
    else:
        x = torch.randn(m, k, generator=generator).to(x_dtype)
    y = cpu.multiply(x, kernels.pack(weight, scale), bias, isa)
    assert y.shape == (m, n) and y.dtype == x_dtype
    assert_close(y, *naive(x, weight, scale, bias))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 70),
    groups=st.integers(1, 60),
    m=st.integers(0, 30),
    x_dtype=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_int8_weights_match_the_definition(isa, n, groups, m, x_dtype, with_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = sparse_weight(n, 4 * groups, torch.int8, generator)
    scale = torch.rand(n, generator=generator) * 0.01
    bias = torch.randn(n, generator=generator) if with_bias else None
    x = torch.randn(m, 4 * groups, generator=generator).to(x_dtype)
    y = cpu.multiply(x, kernels.pack(weight, scale), bias, isa)
    largest = x.float().abs().amax(-1, keepdim=True)
    values = (x.float() * (torch.full_like(largest, 127.0) / largest)).round()
    expected = (values.double() @ weight.double().t()) * (largest.double() / 127) * scale.double()
    size = expected.abs()
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    assert_close(y, expected, size)


def test_int8_extremes_do_not_saturate(isa):
    weight = torch.zeros(20, 4096, dtype=torch.int8)
    weight[:, 0::4], weight[:, 3::4] = -128, 127
    weight[7] = weight[7].neg().clamp(max=-127)
    weight[7, 1::4] = weight[7, 2::4] = 0
    x = torch.ones(3, 4096)
    x[1] = -1
    x[2, 0::4] = -1
    y = cpu.multiply(x, kernels.pack(weight), None, isa)
    expected = (x.double() * 127) @ weight.double().t() / 127
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 130),
    m=st.integers(0, 20),
    weight_dtype=st.sampled_from((*FLOATS, torch.int8)),
    x_dtype=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
    with_scale=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_dense_weights(isa, n, k, m, weight_dtype, x_dtype, with_bias, with_scale, seed):
    generator = torch.Generator().manual_seed(seed)
    if weight_dtype == torch.int8:
        weight, with_scale = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8), True
    else:
        weight = torch.randn(n, k, generator=generator).to(weight_dtype)
    bias = torch.randn(n, generator=generator) if with_bias else None
    scale = torch.rand(n, generator=generator) if with_scale else None
    x = torch.randn(m, k, generator=generator).to(x_dtype)
    y = cpu.multiply(x, kernels.pack_dense(weight, scale), bias, isa)
    if as_int16(isa, weight_dtype, x_dtype):
        x = of_int16(x)
    assert_close(y, *naive(x, weight, scale, bias))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.int8, torch.float32])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [2048, 2049, 2111, 6000])
def test_dense_weights_of_many_columns(isa, weight_dtype, x_dtype, k):
    """Columns of which several tokens' activations do not fit the first cache; a token does not depend on its batch."""
    generator = torch.Generator().manual_seed(k)
    weight = torch.randint(-128, 128, (37, k), generator=generator).to(weight_dtype)
    scale = torch.full((37,), 0.01)
    x = torch.randn(21, k, generator=generator).to(x_dtype)
    packed = kernels.pack_dense(weight, scale)
    together = cpu.multiply(x, packed, None, isa)
    assert_close(together, *naive(of_int16(x) if as_int16(isa, weight_dtype, x_dtype) else x, weight, scale, None))
    for tokens in range(1, 10):
        assert torch.equal(cpu.multiply(x[:tokens], packed, None, isa), together[:tokens])


def as_int16(isa, weight_dtype, x_dtype):
    """Whether the dense product makes int16 of activations."""
    return isa == "avx512_vnni" and weight_dtype == torch.int8 and x_dtype == torch.bfloat16


def of_int16(x):
    """What 16 bits leave of activations [tokens, K]: whole numbers times a 32,639th of the largest magnitude."""
    largest, most = x.float().abs().amax(-1, keepdim=True), torch.tensor(32639.0)
    factor = most / largest
    whole = torch.where(factor.isfinite(), (x.float() * factor).round(), 0.0)
    return whole.clamp(-32639, 32639).double() * (largest / most)


LANES = ("avx512_bf16", "avx512_vnni")  # the instruction sets that quantize activations of dense int8 weights


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 1100),
    m=st.integers(0, 20),
    x_dtype=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_dense_int8_weights_with_quantized_activations(isa, n, k, m, x_dtype, with_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
    scale, bias = torch.rand(n, generator=generator), torch.randn(n, generator=generator) if with_bias else None
    x = torch.randn(m, k, generator=generator).to(x_dtype)
    y = cpu.multiply(x, kernels.pack_dense(weight, scale, "lanes"), bias, isa)
    if isa not in LANES:
        assert torch.equal(y, cpu.multiply(x, kernels.pack_dense(weight, scale), bias, isa))
        return
    values, factors = reference.quantize_per_lane(x)
    assert_close(y, *naive(values.double() * factors.double(), weight, scale, bias))
    strided = torch.empty(k, m, dtype=x_dtype).t().copy_(x)
    assert torch.equal(cpu.multiply(strided, kernels.pack_dense(weight, scale, "lanes"), bias, isa), y)


@pytest.mark.parametrize("k", [2048, 2049, 6000, 20000])
def test_quantized_activations_of_many_columns(isa, k):
    """A token does not depend on its batch; what is not finite makes its own token's outputs NaN, and no others. Where
    activations are not quantized, the product is the exact one."""
    generator = torch.Generator().manual_seed(k)
    weight = torch.full((37, k), -128, dtype=torch.int8)
    weight[1:] = torch.randint(-128, 128, (36, k), generator=generator).to(torch.int8)
    x = torch.randn(21, k, generator=generator).to(torch.bfloat16)
    x[1], x[2], x[3], x[4, 5], x[5, k - 1] = -1, 0, 2.0**-126, float("nan"), float("inf")
    packed = kernels.pack_dense(weight, torch.full((37,), 0.01), "lanes")
    together = cpu.multiply(x, packed, None, isa)
    if isa not in LANES:
        exact = cpu.multiply(x, kernels.pack_dense(weight, packed.scale), None, isa)
        torch.testing.assert_close(together, exact, rtol=0, atol=0, equal_nan=True)
        return
    assert bool(together[4:6].isnan().all())
    finite = [row for row in range(21) if row not in (4, 5)]
    values, factors = reference.quantize_per_lane(x[finite])
    exact, size = naive(values.double() * factors.double(), weight, torch.full((37,), 0.01), None)
    assert_close(together[finite], exact, size)
    for tokens in range(1, 10):
        alone = cpu.multiply(x[:tokens], packed, None, isa)
        torch.testing.assert_close(alone, together[:tokens], rtol=0, atol=0, equal_nan=True)


def test_dense_int8_weights_of_extreme_values(isa):
    """Sums of the largest and the smallest weights and activations neither saturate nor overflow."""
    weight = torch.full((17, 8192), -128, dtype=torch.int8)
    weight[1], weight[2, ::2] = 127, 127
    x = torch.ones(10, 8192, dtype=torch.bfloat16)
    x[1], x[2, ::2], x[3, 1:], x[4, 1:], x[5] = -1, -1, 2.0**-7, 2.0**-9, 0
    x[6, 5], x[7, 8191], x[8] = float("nan"), float("inf"), 2.0**-126
    y = cpu.multiply(x.repeat(2, 1), kernels.pack_dense(weight, torch.ones(17)), None, isa)
    torch.testing.assert_close(y[:10], y[10:], rtol=0, atol=0, equal_nan=True)
    assert bool(y[6].isnan().all()) and not y[7].isfinite().any()
    finite = of_int16(x[:6]) if as_int16(isa, torch.int8, torch.bfloat16) else x[:6]
    assert_close(y[:6], *naive(finite, weight, None, None))
    assert bool((y[8].double() - naive(x[8:9], weight, None, None)[0]).abs().max() < 1e-30)


@pytest.mark.parametrize("tokens", [1, 5, 8, 16, 30])
def test_dense_int8_weights_need_no_more_than_16_bits(isa, tokens):
    """Against float64, on activations of which one column is far larger: less than rounding it to bf16 may change."""
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randint(-128, 128, (40, 2048), generator=generator).to(torch.int8)
    x = torch.randn(tokens, 2048, generator=generator)
    x[:, 77] *= 100
    x = x.to(torch.bfloat16)
    y = cpu.multiply(x, kernels.pack_dense(weight, torch.full((40,), 0.01)), None, isa)
    expected, _ = naive(x, weight, torch.full((40,), 0.01), None)
    most = x.double().abs().amax(-1, keepdim=True) * weight.double().abs().sum(-1) * 0.01 * 2.0**-16
    assert bool(((y.double() - expected).abs() <= most + expected.abs() * 2.0**-8).all())


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_a_token_does_not_depend_on_its_batch(isa, dtype):
    """Also covers the blocked loops: several tiles, several column blocks, several tasks, weights decoded once."""
    generator = torch.Generator().manual_seed(0)
    packed = kernels.pack(sparse_weight(300, 2336, dtype, generator))
    x = torch.randn(70 if isa == "portable" else 300, 2336, generator=generator)
    for x_dtype in (torch.bfloat16, torch.float32):
        together = cpu.multiply(x.to(x_dtype), packed, None, isa)
        for m in (1, 2, 9, 23):
            assert torch.equal(cpu.multiply(x[:m].to(x_dtype), packed, None, isa), together[:m])
        torch.testing.assert_close(
            together,
            reference.sparse_linear(x.to(x_dtype), packed, None),
            rtol=2e-2,
            atol=1e-2 * together.abs().max().item(),
        )


@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_and_nans_reach_exactly_the_outputs_that_keep_their_column(isa, dtype):
    weight = torch.zeros(3, 36)
    weight[0, 1], weight[1, 2], weight[2, 3] = 1, 2, 3
    weight[:, 0] = 1
    x = torch.zeros(4, 36)
    x[0, 1], x[1, 2], x[2, 3] = torch.inf, -torch.inf, torch.nan
    y = cpu.multiply(x.to(dtype), kernels.pack(weight.to(dtype)), None, isa).float()
    expected = torch.zeros(4, 3)
    expected[0, 0], expected[1, 1], expected[2, 2] = torch.inf, -torch.inf, torch.nan
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_a_token_that_is_not_finite_gives_nan_with_int8_weights(isa):
    weight = sparse_weight(33, 64, torch.int8, torch.Generator().manual_seed(0))
    x = torch.ones(4, 64)
    x[1, 5], x[2, 9] = torch.inf, torch.nan
    x[3] = 0
    y = cpu.multiply(x, kernels.pack(weight), None, isa)
    assert bool(y[1:3].isnan().all()) and bool(y[0].isfinite().all()) and bool((y[3] == 0).all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_outputs_round_like_torch(isa, dtype):
    """Every fp16 value (subnormals, overflow, NaN) and ties of both half formats go through the epilogue."""
    weight = torch.zeros(1, 4)
    weight[0, 0] = 1
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    ties = torch.cat(
        [every, every * 1.00048828125, every * 1.00390625, torch.tensor([65519.9, 65520.0, 1e-8, 3e38, -1e-41])]
    )
    x = torch.zeros(len(ties), 4)
    x[:, 0] = ties
    packed = kernels.pack(weight)
    y = cpu.multiply(x.to(dtype), packed, None, isa)
    assert torch.equal(y[:, 0].nan_to_num(7.0), x[:, 0].to(dtype).nan_to_num(7.0))
    # The sum is rounded once: the bias carries what does not fit the activation's dtype.
    biased = cpu.multiply(torch.zeros(1, 4, dtype=dtype), kernels.pack(torch.zeros(len(ties), 4)), ties, isa)
    assert torch.equal(biased[0].nan_to_num(7.0), ties.to(dtype).nan_to_num(7.0))


def test_threads_are_those_of_torch(isa):
    """No second pool: calls on several thread counts add no thread that torch's own team does not have."""
    script = f"""
import os, torch
from crepe_llm import kernels
from crepe_llm.kernels import cpu, reference
def threads():
    return int(next(l for l in open('/proc/self/status') if l.startswith('Threads')).split()[1])
torch.set_num_threads(3)
w = torch.randn(512, 512); w[:, ::2] = 0
packed = kernels.pack(w); x = torch.randn(256, 512)
torch.randn(4000, 1000).sum(); (torch.randn(2000, 2000) + 1).exp()
before = threads()
for _ in range(5): cpu.multiply(x, packed, None, {isa!r}); torch.randn(2000, 1000).exp()
assert cpu.parallel(), 'torch has no OpenMP runtime'
assert before >= 3, before
assert threads() == before, (before, threads())
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
