"""The GPU products against dense fp64, for every dtype, in and out of CUDA graphs, and in vLLM. They need a GPU."""

import pytest
import torch

from crepe_llm import kernels
from crepe_llm.kernels import cuda, dispatch, reference
from crepe_llm.kernels.cuda import plans, products
from crepe_llm.kernels.cuda.plans import Candidate
from crepe_llm.kernels.cuda.products import CUSPARSELT, CUTLASS, DENSE, EXPAND, TRITON
from crepe_llm.kernels.formats import FORMATS, format_of
from crepe_llm.kernels.packed import Inputs, split

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: GPU products are unverified here"),
]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
QUANTIZED = (torch.int8, torch.float8_e4m3fn)
SHAPES = [(64, 128), (256, 512), (70, 92), (33, 4)]


@pytest.fixture(autouse=True)
def own_plans(tmp_path, monkeypatch):
    """Measures anew, at few token counts, and leaves the user's cache alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(plans, "TOKENS", (1, 16, 64, 256))
    cuda._store.cache_clear()
    yield
    cuda._store.cache_clear()


def sparse(n, k, dtype, seed=0):
    """A random 2:4 weight on the CPU; some kept values are zero."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(n, k // 4, 4, generator=generator).argsort(-1) < 2
    keep &= torch.rand(n, k // 4, 4, generator=generator) > 0.1
    weight = torch.randn(n, k, generator=generator) * (30 if dtype == torch.int8 else 1) * keep.view(n, k)
    return weight.round().clamp(-128, 127).to(dtype) if dtype == torch.int8 else weight.to(dtype)


def exact(x, weight, scale, bias, inputs):
    """fp64 results on the CPU, and the size of their terms."""
    factor = torch.ones(x.shape[0], weight.shape[0], dtype=torch.float64)
    if inputs is not None:
        x, token_scale = reference.quantize_inputs(x, inputs)
        factor = factor if token_scale is None else factor * token_scale.double()[:, None]
    factor = factor if scale is None else factor * scale.double()
    y = x.double() @ weight.double().t() * factor
    size = x.double().abs() @ weight.double().abs().t() * factor.abs()
    return (y, size) if bias is None else (y + bias.double(), size + bias.double().abs())


def assert_close(y, expected, size, dtype, roundings=1):
    """Sums in fp32 (Hopper's of fp8 products: 13 bits), and roundings to y's dtype (three: or bf16 in the library)."""
    eps = torch.finfo(y.dtype).eps if roundings == 1 else torch.finfo(torch.bfloat16).eps
    sums = 2.0**-11 if dtype == torch.float8_e4m3fn else 2.0**-17
    tolerance = size * sums + roundings * eps * expected.abs() + 1e-6
    error = (y.cpu().double() - expected).abs()
    assert bool((error <= tolerance).all()), f"{(error / tolerance).max():.3g} x tolerance"


@pytest.mark.parametrize("dtype", [*FLOATS, *QUANTIZED])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", [TRITON, CUSPARSELT, CUTLASS, EXPAND, DENSE])
def test_every_backend(backend, shape, dtype):
    allowed = (
        *dispatch.cuda_backends(products.capability(torch.device("cuda", 0)), *shape, format_of(dtype)),
        EXPAND,
        DENSE,
    )
    if backend not in allowed:
        pytest.skip(f"{backend} does not serve {shape} {dtype} on this GPU")
    x_dtype = dtype if dtype in FLOATS else torch.bfloat16
    inputs = Inputs(dtype) if dtype in QUANTIZED else None
    weight = sparse(*shape, dtype)
    scale = torch.rand(shape[0]) + 0.5 if dtype in QUANTIZED else None
    base = cuda.pack(split(weight.cuda()), None if scale is None else scale.cuda(), inputs, ())
    packed, usable = cuda._prepared(base, [backend])
    assert usable == [backend]
    roundings = 1 if backend in (TRITON, EXPAND, DENSE) else 3
    for tokens in (1, 7, 16, 64, 100) if backend != TRITON else (1, 7, 16, 64):
        for bias in (None, torch.randn(shape[0]).to(x_dtype)):
            x = torch.randn(tokens, shape[1]).to(x_dtype)
            values, token_scale = (x, None) if inputs is None else reference.quantize_inputs(x, inputs)
            on = [None if t is None else t.cuda() for t in (token_scale, bias)]
            y = products.product(Candidate(backend), values.cuda(), packed, *on, x_dtype)
            assert y.is_cuda and y.dtype == x_dtype and y.is_contiguous()
            assert_close(y, *exact(x, weight, scale, bias, inputs), dtype, roundings)


@pytest.mark.parametrize("inputs", [None, "token", 0.04])
@pytest.mark.parametrize("dtype", [*FLOATS, *QUANTIZED])
def test_pack_and_linear(dtype, inputs):
    if dtype in FLOATS and inputs is not None:
        pytest.skip("float weights quantize no inputs")
    weight, scale = sparse(256, 512, dtype), torch.rand(256) + 0.5
    packed = kernels.pack(weight.cuda(), scale.cuda(), inputs)
    assert torch.equal(kernels.unpack(packed).cpu().double(), weight.double())
    scheme = None if dtype in FLOATS or (dtype != torch.int8 and inputs is None) else Inputs(dtype)
    folded = scale
    if isinstance(inputs, float):
        scheme, folded = Inputs(dtype, inputs), scale * inputs
    for x_dtype in FLOATS:
        for tokens in (0, 1, 16, 33, 300):
            x, bias = torch.randn(2, tokens, 512).to(x_dtype), torch.randn(256).to(x_dtype)
            y = kernels.linear(x.cuda(), packed, bias.cuda())
            assert y.shape == (2, tokens, 256) and y.dtype == x_dtype
            expected = exact(x.view(-1, 512), weight, folded, bias, scheme)
            assert_close(y.view(-1, 256), *expected, dtype, roundings=3)


def test_activations_of_any_strides():
    weight = sparse(64, 128, torch.float16)
    packed = kernels.pack(weight.cuda())
    whole = torch.randn(9, 131, device="cuda", dtype=torch.float16)
    columns = torch.randn(128, 9, device="cuda", dtype=torch.float16)
    for x in (whole[:, 3:], whole[:, 1:129], columns.t()):
        assert_close(kernels.linear(x, packed), *exact(x.cpu(), weight, None, None, None), torch.float16, roundings=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *QUANTIZED])
@pytest.mark.parametrize("backend", [TRITON, CUSPARSELT, CUTLASS, EXPAND, DENSE])
def test_capture_and_replay_in_a_cuda_graph(dtype, backend, monkeypatch):
    allowed = (
        *dispatch.cuda_backends(products.capability(torch.device("cuda", 0)), 256, 512, format_of(dtype)),
        EXPAND,
        DENSE,
    )
    if backend not in allowed:
        pytest.skip(f"{backend} does not serve {dtype} on this GPU")
    inputs = Inputs(dtype) if dtype in QUANTIZED else None
    weight = sparse(256, 512, dtype)
    base = cuda.pack(split(weight.cuda()), torch.ones(256, device="cuda") if inputs else None, inputs, ())
    packed, _ = cuda._prepared(base, [backend])
    monkeypatch.setattr(cuda, "chosen", lambda x, weight: Candidate(backend))
    x = torch.randn(5, 512, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            kernels.linear(x, packed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.linear(x, packed)
    for seed in range(3):
        x.copy_(torch.randn(5, 512, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        assert_close(y, *exact(x.cpu(), weight, None, None, inputs), dtype, roundings=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *QUANTIZED])
def test_torch_compile(dtype):
    weight = sparse(256, 512, dtype)
    packed = kernels.pack(weight.cuda(), inputs="token" if dtype in QUANTIZED else None)

    def model(x):
        return kernels.linear(torch.relu(x), packed)

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for tokens in (3, 100):
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(x), model(x), rtol=0.05, atol=0.5)


def test_every_backend_that_may_serve_was_measured():
    packed = kernels.pack(sparse(256, 512, torch.bfloat16).cuda())
    plan = cuda._store().get(cuda._plan_key(torch.device("cuda", 0), (256, 512), FORMATS["bf16"]))
    measured = {candidate.backend for times in plan.seconds.values() for candidate in times}
    allowed = dispatch.cuda_backends(products.capability(torch.device("cuda", 0)), 256, 512, FORMATS["bf16"])
    assert measured == {EXPAND, DENSE, *allowed}, "a backend failed or gave wrong results: see the warnings"
    assert packed.nbytes > 0


@pytest.mark.vllm
def test_vllm_with_cuda_graphs_is_close_to_dense_fp32(tmp_path, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm_runs import generate, llama, twins

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    sparse_folder, dense_folder = twins(tmp_path, llama(intermediate_size=256))
    ours = generate(sparse_folder, dtype="bfloat16", enforce_eager=False)
    for (_, got), (_, expected) in zip(ours, generate(dense_folder), strict=True):
        shared = got[0].keys() & expected[0].keys()
        assert shared
        for token in shared:
            assert abs(got[0][token] - expected[0][token]) < 0.2
