"""Int8 2:4 weights whose inputs are not quantized: every value, products, and what keeps a fixed input scale."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm import kernels
from crepe_llm.kernels import cpu, dispatch, reference
from crepe_llm.kernels.experts import experts_linear, pack_experts
from crepe_llm.kernels.formats import FORMATS

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FORMAT = FORMATS["int8_weight_only"]
ISAS = list(cpu.instruction_sets()) or [pytest.param("none", marks=pytest.mark.skip("no CPU kernel library"))]


def int8_weight(n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(n, k // 4, 4, generator=generator).argsort(-1) < 2
    return (torch.randint(-128, 128, (n, k), generator=generator) * keep.view(n, k)).to(torch.int8)


def assert_close(y, x, weight, scale, bias=None):
    """Within the rounding of fp32 sums and of the result."""
    exact = weight.double() * scale.double()[:, None]
    expected, size = x.double() @ exact.t(), x.double().abs() @ exact.abs().t()
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    tolerance = size * 2.0**-18 + expected.abs() * torch.finfo(y.dtype).eps + torch.finfo(y.dtype).smallest_normal
    assert bool(((y.double() - expected).abs() <= tolerance).all())


def test_a_kept_value_and_its_place_take_ten_bits():
    weight = int8_weight(32, 128)
    packed = kernels.pack(weight, inputs="exact")
    assert packed.format is FORMAT and packed.inputs is None
    assert 8 * packed.nbytes == 10 * 32 * 64
    assert torch.equal(kernels.unpack(packed), weight)


def test_a_fixed_input_scale_keeps_ten_bits_too():
    weight, scale, x = int8_weight(24, 64), torch.rand(24) / 50, torch.randn(9, 64)
    packed = kernels.pack(weight, scale, inputs=0.05)
    assert packed.format is FORMAT
    values = (x / 0.05).round().clamp(-128, 127).double()
    expected = (values * 0.05) @ (weight.double() * scale.double()[:, None]).t()
    torch.testing.assert_close(kernels.linear(x, packed).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("isa", ISAS)
def test_every_value_in_every_pair_of_columns(isa, x_dtype):
    """256 values in both places x 6 pairs of columns, element by element."""
    pairs = list(itertools.combinations(range(4), 2))
    weight = torch.zeros(256 * len(pairs) * 2, 4, dtype=torch.int8)
    x, expected = torch.tensor([[1.0, 3.0, -5.0, 7.0]]), []
    for row, (value, pair, place) in enumerate(itertools.product(range(-128, 128), pairs, range(2))):
        other = (value + 200) % 256 - 128
        kept = (value, other) if place == 0 else (other, value)
        weight[row, list(pair)] = torch.tensor(kept, dtype=torch.int8)
        # Halved by the scale, all sums are exact in fp32; one rounding gives the output's dtype.
        expected.append(sum(v * x[0, column].item() for v, column in zip(kept, pair, strict=True)) / 2)
    y = cpu.multiply(x.to(x_dtype), kernels.pack(weight, torch.tensor(0.5), "exact"), None, isa)
    assert torch.equal(y[0], torch.tensor(expected).to(x_dtype))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 70),
    quads=st.integers(1, 90),
    m=st.integers(0, 40),
    x_dtype=st.sampled_from(FLOATS),
    strided=st.booleans(),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("isa", ISAS)
def test_products(isa, n, quads, m, x_dtype, strided, with_bias, seed):
    k, generator = 4 * quads, torch.Generator().manual_seed(seed)
    weight, scale = int8_weight(n, k, seed), torch.rand(n, generator=generator) * 0.01
    x = torch.randn((k, m) if strided else (m, k), generator=generator).to(x_dtype)
    x = x.t() if strided else x
    bias = torch.randn(n, generator=generator) if with_bias else None
    packed = kernels.pack(weight, scale, "exact")
    y = cpu.multiply(x, packed, bias, isa)
    assert y.shape == (m, n) and y.dtype == x_dtype
    assert_close(y, x, weight, scale, bias)
    assert_close(reference.sparse_linear(x, packed, bias), x, weight, scale, bias)


@pytest.mark.parametrize("isa", ISAS)
def test_a_token_does_not_depend_on_its_batch(isa):
    """Also covers the blocked loops: several tiles, several column blocks, several tasks, weights decoded once."""
    packed = kernels.pack(int8_weight(300, 2336), inputs="exact")
    x = torch.randn(100, 2336, generator=torch.Generator().manual_seed(0))
    for x_dtype in (torch.bfloat16, torch.float32):
        together = cpu.multiply(x.to(x_dtype), packed, None, isa)
        for m in (1, 2, 9, 23):
            assert torch.equal(cpu.multiply(x[:m].to(x_dtype), packed, None, isa), together[:m])


@pytest.mark.parametrize("isa", ISAS)
def test_infinities_and_nans_reach_exactly_the_outputs_that_keep_their_column(isa):
    weight = torch.zeros(3, 36, dtype=torch.int8)
    weight[0, 1], weight[1, 2], weight[2, 3] = 1, 2, 3
    weight[:, 0] = 1
    x = torch.zeros(4, 36)
    x[0, 1], x[1, 2], x[2, 3] = torch.inf, -torch.inf, torch.nan
    expected = torch.zeros(4, 3)
    expected[0, 0], expected[1, 1], expected[2, 2] = torch.inf, -torch.inf, torch.nan
    for x_dtype in FLOATS:
        y = cpu.multiply(x.to(x_dtype), kernels.pack(weight, inputs="exact"), None, isa).float()
        torch.testing.assert_close(y, expected, equal_nan=True)


def test_experts_multiply_as_each_alone():
    packed = [kernels.pack(int8_weight(40, 64, seed), torch.rand(40), "exact") for seed in range(3)]
    x, begins = torch.randn(11, 64).bfloat16(), [0, 4, 4, 11]
    y = experts_linear(x, torch.tensor(begins[1:]), pack_experts(packed, 3))
    for weight, begin, end in zip(packed, begins, begins[1:], strict=False):
        assert torch.equal(y[begin:end], dispatch.linear(x[begin:end], weight))


def test_only_formats_that_can_quantize_inputs_are_told_not_to():
    with pytest.raises(ValueError, match="inputs='exact', but the weight is fp32; only int8 and float8_e4m3fn"):
        kernels.pack(torch.zeros(4, 4), inputs="exact")
    assert kernels.pack(torch.zeros(4, 4).to(torch.float8_e4m3fn), inputs="exact").inputs is None
