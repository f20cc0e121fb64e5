"""The Triton kernels against fp64; test_kernels_triton.py runs this file, under Triton's interpreter without a GPU."""

import contextlib

import pytest
import torch

from crepe_llm import kernels
from crepe_llm.kernels import cuda, reference
from crepe_llm.kernels.cuda import plans, triton_kernels
from crepe_llm.kernels.cuda.plans import Candidate
from crepe_llm.kernels.cuda.products import CUSPARSELT, CUTLASS, DENSE, EXPAND, TRITON
from crepe_llm.kernels.cuda.triton_kernels import CONFIGS
from crepe_llm.kernels.cuda.weight import CudaWeight, metadata_words
from crepe_llm.kernels.formats import format_of
from crepe_llm.kernels.packed import Inputs, split

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def weight(n, k, dtype, seed=0):
    """A random 2:4 weight: dense (on the CPU), values and metadata; some kept values are zero."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.rand(n, k // 4, 4, generator=generator).argsort(-1)[..., :2].sort(-1).values
    values = torch.randn(n, k // 4, 2, generator=generator)
    values *= torch.rand(values.shape, generator=generator) > 0.1
    values = (values * 30).round().clamp(-128, 127).to(dtype) if dtype == torch.int8 else values.to(dtype)
    dense = torch.zeros(n, k // 4, 4, dtype=torch.float64).scatter_(-1, columns, values.double()).view(n, k)
    return dense, values.view(n, k // 2).to(DEVICE), metadata_words(columns.to(torch.uint8)).to(DEVICE)


def packed_weight(values, metadata, scale=None):
    n, kept = values.shape
    return CudaWeight((n, 2 * kept), format_of(values.dtype), values, metadata, scale=scale)


def check(m, n, k, dtype, x_dtype, config, with_bias=True, with_scale=True, seed=0):
    generator = torch.Generator().manual_seed(seed + 1)
    dense, values, metadata = weight(n, k, dtype, seed)
    x = torch.randn(m, k, generator=generator).to(x_dtype)
    token_scale, exact = None, x
    if dtype.itemsize == 1:
        exact, token_scale = reference.quantize_inputs(x, Inputs(dtype))
    scale = torch.rand(n, generator=generator) + 0.5 if with_scale else None
    bias = torch.randn(n, generator=generator).to(x_dtype) if with_bias else None
    on, *rest = [None if t is None else t.to(DEVICE) for t in (scale, token_scale, bias)]
    y = triton_kernels.decode(exact.to(DEVICE), packed_weight(values, metadata, on), *rest, x_dtype, config).cpu()

    row = torch.ones(n) if scale is None else scale
    token = torch.ones(m) if token_scale is None else token_scale
    factor = row.double() * token.double()[:, None]
    expected, size = exact.double() @ dense.t() * factor, exact.double().abs() @ dense.abs().t() * factor.abs()
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    tolerance = size * 2.0**-18 + expected.abs() * torch.finfo(x_dtype).eps + torch.finfo(x_dtype).smallest_normal
    assert y.shape == (m, n) and y.dtype == x_dtype
    assert bool(((y.double() - expected).abs() <= tolerance).all())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.float8_e4m3fn])
def test_every_configuration(dtype, config):
    check(5, 70, 4 * 83, dtype, dtype if dtype in FLOATS else torch.bfloat16, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 4), (3, 17, 36), (16, 16, 256), (17, 33, 520), (64, 5, 44), (70, 9, 8)]
)
def test_sizes_that_do_not_divide(m, n, k, dtype):
    check(m, n, k, dtype, torch.bfloat16, CONFIGS[0], seed=m)


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_and_activations_of_different_dtypes(dtype, x_dtype):
    check(4, 20, 60, dtype, x_dtype, CONFIGS[0])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
def test_without_bias_or_scale(with_bias, with_scale):
    check(4, 20, 60, torch.float16, torch.float16, CONFIGS[0], with_bias, with_scale)


def test_every_float8_number_is_read_exactly():
    bits = torch.arange(256, dtype=torch.uint8)
    values = torch.stack((bits, bits.flip(0)), dim=-1).reshape(256, 2).view(torch.float8_e4m3fn)
    columns = torch.tensor([1, 2], dtype=torch.uint8).expand(256, 1, 2)
    packed = packed_weight(values.to(DEVICE), metadata_words(columns).to(DEVICE))
    for column, kept in ((1, values[:, 0]), (2, values[:, 1])):
        x = torch.zeros(1, 4).index_fill_(1, torch.tensor(column), 1.0).to(torch.float8_e4m3fn)
        y = triton_kernels.decode(x.to(DEVICE), packed, None, None, torch.float32, CONFIGS[0]).cpu()
        other = values[:, 1] if column == 1 else values[:, 0]
        expected = torch.where(other.float().isnan(), torch.nan, kept.float())  # 0 x NaN: a dense tile is multiplied
        torch.testing.assert_close(y[0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("n", "k"), [(1, 4), (19, 4 * 67), (40, 256)])
def test_expand(n, k, dtype):
    dense, values, metadata = weight(n, k, dtype)
    expanded = triton_kernels.expand(values, metadata, k).cpu()
    assert expanded.dtype == dtype and torch.equal(expanded.double(), dense)


def test_hostile_metadata_reads_nothing_outside():
    values = torch.randn(20, 30).to(DEVICE)
    words = torch.randint(-(2**31), 2**31 - 1, (20, 2), dtype=torch.int32, device=DEVICE)
    x = torch.randn(3, 60, device=DEVICE)
    y = triton_kernels.decode(x, packed_weight(values, words), None, None, torch.float32, CONFIGS[0])
    assert bool(torch.isfinite(y).all())


@contextlib.contextmanager
def default_dtype(dtype):
    """As vLLM has it while weights are packed: a model's dtype is that of tensors made without one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_a_backend_that_does_not_compile_is_left_out(monkeypatch):
    from triton.runtime.errors import PTXASError

    def refused(*arguments, **options):
        raise PTXASError("ptxas fatal")

    monkeypatch.setattr("triton.testing.do_bench", lambda call, **options: 1.0)
    monkeypatch.setattr(plans, "TOKENS", (1,))
    monkeypatch.setattr(triton_kernels, "decode", refused)
    _, values, metadata = weight(32, 64, torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="does not use triton for 32 x 64 bf16 weights on this GPU"):
        plan = plans.measure(packed_weight(values, metadata), [TRITON])
    assert TRITON not in {candidate.backend for candidate in plan.seconds[1]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_kernels_gpu.py measures for real")
@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_packing_measures_and_linear_follows(dtype, room, tmp_path, monkeypatch):
    """The whole way with given times: the libraries, which no CPU has, are refused with a warning."""
    times = {(DENSE, 0): 1.0, (EXPAND, 0): 5.0, (TRITON, 0): 4.0, (TRITON, 1): 2.0, (TRITON, 2): 3.0, (TRITON, 3): 4.0}

    def bench(call, **options):
        ((backend, setting),) = call.args
        tokens = call.keywords["x"].shape[0]
        return 1e3 * times[backend, setting] * (5.0 if backend == DENSE and tokens == 1 else 1.0)

    monkeypatch.setattr("triton.testing.do_bench", bench)
    monkeypatch.setattr(plans, "TOKENS", (1, 16))
    monkeypatch.setattr(cuda, "_has_room", lambda device, copy: room)
    store = plans.PlanStore(tmp_path / "plans.json")
    monkeypatch.setattr(cuda, "_store", lambda: store)
    dense = weight(64, 128, dtype)[0]
    scale, inputs = (torch.rand(64), Inputs(dtype)) if dtype.itemsize == 1 else (None, None)
    libraries = [CUSPARSELT] if dtype == torch.float8_e4m3fn else [CUSPARSELT, CUTLASS]
    backends = (TRITON, *libraries)
    with pytest.warns(RuntimeWarning, match="does not use") as caught, default_dtype(torch.bfloat16):
        packed = cuda.pack(split(dense.to(dtype)), scale, inputs, backends)
    assert sorted(str(warning.message).split()[4] for warning in caught) == libraries
    assert (packed.dense is not None) == room and packed.cusparselt is None and packed.cutlass is None
    assert torch.equal(kernels.unpack(packed).double(), dense)
    monkeypatch.setattr("triton.testing.do_bench", None)  # the second of a shape is not measured
    cuda.pack(split(dense.to(dtype)), scale, inputs, backends)

    for tokens, expected in ((1, Candidate(TRITON, 1)), (2, Candidate(DENSE) if room else Candidate(TRITON, 1))):
        x = torch.randn(tokens, 128)
        assert cuda.chosen(x.to(dtype), packed) == expected
        y = kernels.linear(x.to(torch.bfloat16), packed)
        exact, token_scale = x.to(torch.bfloat16), torch.ones(tokens)
        if inputs is not None:
            exact, token_scale = reference.quantize_inputs(exact, inputs)
        wanted = exact.double() @ dense.t() * token_scale.double()[:, None] * (1 if scale is None else scale.double())
        torch.testing.assert_close(y.double(), wanted, rtol=2.0**-7, atol=1e-3)


def test_operands_of_other_sizes_are_refused():
    _, values, metadata = weight(32, 64, torch.bfloat16)
    packed, config = packed_weight(values, metadata), CONFIGS[0]
    for columns in (32, 128):
        x = torch.ones(2, columns, dtype=torch.bfloat16, device=DEVICE)
        with pytest.raises(ValueError, match="its last dimension must be 64"):
            triton_kernels.decode(x, packed, None, None, torch.bfloat16, config)
    x = torch.ones(2, 64, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match="bias has 31 elements"):
        triton_kernels.decode(x, packed, None, torch.ones(31, device=DEVICE), torch.bfloat16, config)
    with pytest.raises(ValueError, match="token_scale has shape"):
        triton_kernels.decode(x, packed, torch.ones(1, device=DEVICE), None, torch.bfloat16, config)
    with pytest.raises(ValueError, match="metadata has shape"):
        triton_kernels.expand(values, metadata[:-1], 64)
    with pytest.raises(ValueError, match="values has shape"):
        triton_kernels.expand(values, metadata, 128)
