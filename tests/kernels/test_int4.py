"""4-bit 2:4 weights: packing, and products on every instruction set against the arithmetic of their definition."""

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm import kernels
from crepe_llm.kernels import cpu, reference
from crepe_llm.kernels import packed as layout

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
GROUPS = (None, 32, 64, 128)
PAIRS = list(itertools.combinations(range(4), 2))
ISAS = list(cpu.instruction_sets()) or [pytest.param("none", marks=pytest.mark.skip("no CPU kernel library"))]


class Quantized(NamedTuple):
    """A 2:4 weight of codes [N, K] with zero points and scales [N, groups], as numbers and as a checkpoint has it."""

    codes: torch.Tensor
    zero: torch.Tensor
    scale: torch.Tensor
    group_size: int | None
    symmetric: bool

    def of_columns(self, of_groups):
        return of_groups.repeat_interleave(self.group_size or self.codes.shape[1], 1)[:, : self.codes.shape[1]]

    @property
    def differences(self):
        return self.codes - self.of_columns(self.zero)

    @property
    def dense(self):
        return self.differences.double() * self.of_columns(self.scale.double())

    def packed(self, **changes):
        arguments = {
            "weight": words(self.codes),
            "scale": self.scale,
            "shape": tuple(self.codes.shape),
            "group_size": self.group_size,
            "zero_point": None if self.symmetric else words(self.zero.t()).t(),
        }
        return kernels.pack_int4(**{**arguments, **changes})


def words(codes):
    """Eight codes an int32, the first in the lowest bits."""
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8))
    unsigned = sum(padded[..., place] << 4 * place for place in range(8))
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def quantized(n, k, group_size, symmetric, seed=0, scale_dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size is None else -(-k // group_size)
    zero = torch.full((n, groups), 8) if symmetric else torch.randint(0, 16, (n, groups), generator=generator)
    keep = (torch.rand(n, k // 4, 4, generator=generator).argsort(-1) < 2).view(n, k)
    scale = (torch.rand(n, groups, generator=generator) + 0.5).to(scale_dtype)
    made = Quantized(torch.randint(0, 16, (n, k), generator=generator), zero, scale, group_size, symmetric)
    return made._replace(codes=torch.where(keep, made.codes, made.of_columns(zero)))


def rounds_inputs(isa, x_dtype):
    """Whether the instruction set multiplies in whole numbers, of activations rounded to 16 bits."""
    return isa == "avx2" and x_dtype == torch.bfloat16


def rounding(x):
    """The most that rounding to 16 bits changes each activation: 2^-15 of the power of two in the largest of its 32
    columns (of 2^-112 where that is larger), and nothing where the activation is at least 2^-7 of that power."""
    padded = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    power = torch.exp2(padded.abs().amax(-1, keepdim=True).clamp_min(2.0**-112).log2().floor())
    most = torch.where(padded.abs() >= power * 2.0**-7, 0.0, power * 2.0**-15)
    return most.flatten(1)[:, : x.shape[1]]


def quantizing(x):
    """The most that quantizing to int8 changes each activation: half of a 127th of the largest of its 32 columns."""
    padded = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    return (padded.abs().amax(-1, keepdim=True) * 1.001 / 254).expand_as(padded).flatten(1)[:, : x.shape[1]]


def quantized_by_definition(x):
    """Activations as products with `inputs="group"` take them, fp64."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    largest = padded.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.full_like(largest, 127.0) / largest, 0.0)
    values = (padded * inverse).round().clamp(-127, 127)
    return (values.double() * (largest / 127).double()).flatten(1)[:, : x.shape[1]]


def assert_close(y, x, weight, bias=None, isa="exact"):
    """Within the rounding of fp32 sums and of the result, and of the activations where they are rounded."""
    expected, size = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    tolerance = size * 2.0**-18 + expected.abs() * torch.finfo(y.dtype).eps + torch.finfo(y.dtype).smallest_normal
    if rounds_inputs(isa, x.dtype):
        tolerance = tolerance + rounding(x) @ weight.abs().t()
    assert bool(((y.double() - expected).abs() <= tolerance).all())


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    quads=st.integers(1, 70),
    group_size=st.sampled_from(GROUPS),
    symmetric=st.booleans(),
    seed=st.integers(0, 999),
)
def test_unpack_gives_the_codes_less_their_zero_points(n, quads, group_size, symmetric, seed):
    made = quantized(n, 4 * quads, group_size, symmetric, seed)
    assert torch.equal(kernels.unpack(made.packed()).long(), made.differences)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_that_is_taken_apart_in_pieces(symmetric, monkeypatch):
    made = quantized(23, 64, 32, symmetric)
    whole = made.packed()
    monkeypatch.setattr(layout, "_SPLIT", 5 * 64)
    pieces = made.packed()
    assert torch.equal(pieces.data, whole.data)
    codes = made.codes.clone()
    codes[17, 8:12] = made.of_columns(made.zero)[17, 8:12] ^ 1
    with pytest.raises(ValueError, match="row 17, columns 8 to 11 hold 4 non-zero values"):
        made._replace(codes=codes).packed()


@pytest.mark.parametrize(("group_size", "bits"), [(32, 3.5), (64, 3.25), (128, 3.125), (None, 3 + 32 / 4096)])
def test_bits_a_weight(group_size, bits):
    packed = quantized(32, 4096, group_size, symmetric=True).packed()
    assert 8 * packed.nbytes / (32 * 4096) == bits


def test_scales_are_held_exactly_in_the_narrowest_dtype():
    made = quantized(5, 64, 32, symmetric=True)
    for dtype, odd in ((torch.bfloat16, 0.5), (torch.float16, 1 + 2**-10), (torch.float32, 1 + 2**-20)):
        scale = made.scale.float()
        scale[:] = 0.25
        scale[2, 1] = odd
        packed = made.packed(scale=scale)
        assert packed.scale.dtype == dtype
        assert packed.scale[0, 1, 2].item() == odd


def test_what_is_not_2_of_4_is_refused():
    made = quantized(6, 32, 32, symmetric=False)
    made.codes[4, 8:12] = (made.zero[4, 0] + 1) % 16
    with pytest.raises(ValueError, match="row 4, columns 8 to 11 hold 4 non-zero values"):
        made.packed()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(6, 3, dtype=torch.int32)}, ValueError, r"weight has shape \(6, 3\)"),
        ({"weight": torch.zeros(6, 4)}, TypeError, "int32 is needed"),
        ({"shape": (6, 30)}, ValueError, "multiple of 4"),
        ({"scale": torch.ones(6, 2)}, ValueError, r"scale has shape \(6, 2\); one for each of \(6, 1\)"),
        ({"zero_point": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, r"zero_point has shape \(2, 1\)"),
        ({"inputs": "token"}, ValueError, "inputs='token'; of 4-bit weights 'exact' or 'group' is needed"),
        ({"group_size": 16}, ValueError, "groups of 32, 64, 128, or whole rows"),
        ({"weight": torch.zeros(6, 4, dtype=torch.int32, device="meta")}, ValueError, "weight is on meta"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        quantized(6, 32, 32, symmetric=True).packed(**change)


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("isa", ISAS)
def test_every_code_in_every_pair_of_columns(isa, x_dtype):
    """16 codes in both places x 6 pairs of columns x 16 zero points, element by element."""
    cases = list(itertools.product(range(16), PAIRS, range(2), range(16)))
    codes = torch.empty(len(cases), 4, dtype=torch.int64)
    zero = torch.empty(len(cases), 1, dtype=torch.int64)
    x = torch.tensor([[1.0, 3.0, -5.0, 7.0]])
    expected = []
    for row, (code, pair, place, zero_point) in enumerate(cases):
        other = (code + 5) % 16
        kept = (code, other) if place == 0 else (other, code)
        codes[row], zero[row] = zero_point, zero_point
        codes[row, list(pair)] = torch.tensor(kept)
        expected.append(sum((c - zero_point) * x[0, column].item() for c, column in zip(kept, pair, strict=True)))
    for group_size in (None, 32):
        made = Quantized(codes, zero, torch.ones(len(cases), 1), group_size, symmetric=False)
        y = cpu.multiply(x.to(x_dtype), made.packed(), None, isa)
        assert y.flatten().tolist() == expected
        # 127 times a power of two is the largest, so that whole numbers are quantized to themselves.
        whole = torch.cat((x * 2, torch.zeros(1, 3), torch.full((1, 1), 127.0)), 1)
        wide = torch.cat((codes, zero.expand(-1, 4)), 1)
        y = cpu.multiply(whole.to(x_dtype), made._replace(codes=wide).packed(inputs="group"), None, isa)
        assert y.flatten().tolist() == [2 * value for value in expected]
    symmetric = [row for row, case in enumerate(cases) if case[3] == 8]
    made = Quantized(codes[symmetric], zero[symmetric], torch.ones(len(symmetric), 1), 64, symmetric=True)
    y = cpu.multiply(x.to(x_dtype), made.packed(), None, isa)
    assert y.flatten().tolist() == [expected[row] for row in symmetric]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    quads=st.integers(1, 90),
    m=st.integers(0, 40),
    group_size=st.sampled_from(GROUPS),
    symmetric=st.booleans(),
    x_dtype=st.sampled_from(FLOATS),
    scale_dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(["contiguous", "rows", "columns"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("isa", ISAS)
def test_products(isa, n, quads, m, group_size, symmetric, x_dtype, scale_dtype, layout, with_bias, seed):
    k, generator = 4 * quads, torch.Generator().manual_seed(seed)
    made = quantized(n, k, group_size, symmetric, seed, scale_dtype)
    if layout == "rows":
        x = torch.randn(m, k + 7, generator=generator).to(x_dtype)[:, 3 : 3 + k]
    elif layout == "columns":
        x = torch.randn(k, m, generator=generator).to(x_dtype).t()
    else:
        x = torch.randn(m, k, generator=generator).to(x_dtype)
    bias = torch.randn(n, generator=generator) if with_bias else None
    packed = made.packed()
    y = cpu.multiply(x, packed, bias, isa)
    assert y.shape == (m, n) and y.dtype == x_dtype
    assert_close(y, x, made.dense, bias, isa)
    assert_close(reference.sparse_linear(x, packed, bias), x, made.dense, bias)
    rounding_inputs = made.packed(inputs="group")
    assert torch.equal(kernels.unpack(rounding_inputs), kernels.unpack(packed))
    assert rounding_inputs.nbytes == packed.nbytes
    for y in (cpu.multiply(x, rounding_inputs, bias, isa), reference.sparse_linear(x, rounding_inputs, bias)):
        assert_close(y, quantized_by_definition(x), made.dense, bias)
    exact = x.double() @ made.dense.t() + (0 if bias is None else bias.double())
    most = (quantizing(x) + x.double().abs() * 2.0**-17) @ made.dense.abs().t()
    most = most + y.double().abs() * torch.finfo(x_dtype).eps + torch.finfo(x_dtype).smallest_normal
    assert bool(((y.double() - exact).abs() <= most).all())


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("inputs", ["exact", "group"])
def test_a_token_does_not_depend_on_its_batch(isa, group_size, inputs):
    """Also covers the blocked loops: several tiles, several column blocks, several tasks, weights decoded once."""
    packed = quantized(300, 2336, group_size, symmetric=group_size != 64).packed(inputs=inputs)
    x = torch.randn(70, 2336, generator=torch.Generator().manual_seed(0))
    for x_dtype in (torch.bfloat16, torch.float32):
        together = cpu.multiply(x.to(x_dtype), packed, None, isa)
        for m in (1, 2, 9, 23):
            assert torch.equal(cpu.multiply(x[:m].to(x_dtype), packed, None, isa), together[:m])


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("isa", ISAS)
def test_infinities_and_nans_reach_exactly_the_outputs_that_keep_their_column(isa, x_dtype):
    codes = torch.full((3, 36), 8)
    codes[0, 1], codes[1, 2], codes[2, 3] = 9, 11, 4
    codes[:, 0] = 10
    made = Quantized(codes, torch.full((3, 2), 8), torch.ones(3, 2), 32, symmetric=True)
    x = torch.zeros(4, 36)
    x[0, 1], x[1, 2], x[2, 3] = torch.inf, -torch.inf, torch.nan
    y = cpu.multiply(x.to(x_dtype), made.packed(), None, isa).float()
    expected = torch.zeros(4, 3)
    expected[0, 0], expected[1, 1], expected[2, 2] = torch.inf, -torch.inf, torch.nan
    rounded = torch.zeros(4, 3)
    rounded[:3] = torch.nan  # as with int8
    torch.testing.assert_close(y, rounded if rounds_inputs(isa, x_dtype) else expected, equal_nan=True)
    packed = made.packed(inputs="group")
    for y in (cpu.multiply(x.to(x_dtype), packed, None, isa), reference.sparse_linear(x.to(x_dtype), packed, None)):
        torch.testing.assert_close(y.float(), rounded, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
def test_tiny_activations_are_quantized_or_count_as_zeros(isa):
    made = quantized(20, 96, 32, symmetric=True)
    packed = made.packed(inputs="group", scale=torch.ones(20, 3))
    x = torch.zeros(4, 96)
    x[0, :32], x[1, 40], x[2, 64:] = 1e-30, 1e-36, 1e-39
    y = cpu.multiply(x, packed, None, isa)
    expected = x.double() @ made.differences.double().t()
    assert bool((expected[:3].abs().amax(1) > 0).all()) and not y[2:].any()
    torch.testing.assert_close(y[:2].double(), expected[:2], rtol=1e-5, atol=0)


@pytest.mark.skipif("avx2" not in ISAS, reason="AVX2 alone rounds activations")
@pytest.mark.parametrize("power", [-110, 0, 100])
def test_rounded_activations_keep_their_digits_within_two_powers_of_ten(power):
    """Whole numbers: bf16 activations down to 2^-7 of the largest of 32 columns count exactly, smaller ones nearly."""
    codes = torch.full((8 * 32, 64), 8)
    column = torch.arange(8 * 32) % 32
    codes[torch.arange(8 * 32), column], codes[:, 32] = 8 + torch.arange(8 * 32) // 32 - 4, 9
    made = Quantized(codes, torch.full((8 * 32, 2), 8), torch.ones(8 * 32, 2), 32, symmetric=True)
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    x[0, :32] = torch.randint(128, 255, (32,)) * 2.0 ** (power - torch.arange(32) % 8)
    x[0, 0] = 255 * 2.0**power
    x[1, :32] = 2.0 ** (power - torch.arange(32))
    x[2, 32] = 3e-38  # alone in its columns: the smallest factors
    y = cpu.multiply(x, made.packed(), None, "avx2").double()
    exact = x.double() @ made.dense.t()
    assert torch.equal(y[0], exact[0].bfloat16().double())
    assert bool(((y - exact).abs() <= rounding(x) @ made.dense.abs().t() + exact.abs() * 2.0**-8).all())


def test_torch_compile_traces_without_a_break():
    packed = quantized(24, 64, 32, symmetric=False).packed()
    x, bias = torch.randn(3, 64), torch.randn(24)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: kernels.linear(x.relu(), packed, bias), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), kernels.linear(x.relu(), packed, bias))
    arguments = (x, packed.data, packed.scale, packed.zero, bias, *packed.shape, packed.format.name)
    torch.library.opcheck(torch.ops.crepe_llm.sparse24_linear.default, arguments)
