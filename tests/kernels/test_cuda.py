"""What the GPU backends are, as far as a CPU can tell: layouts, rules, plans, operators."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from crepe_llm import kernels
from crepe_llm.kernels import cuda, dispatch, reference
from crepe_llm.kernels.cuda import plans, products
from crepe_llm.kernels.cuda.plans import TOKENS, Candidate, Plan, PlanStore
from crepe_llm.kernels.cuda.products import CUSPARSELT, CUTLASS, DENSE, EXPAND, TRITON
from crepe_llm.kernels.cuda.weight import (
    CudaWeight,
    columns_of,
    cutlass_metadata,
    from_cutlass_metadata,
    metadata_words,
    to_dense,
)
from crepe_llm.kernels.formats import FORMATS, format_of
from crepe_llm.kernels.packed import Inputs, split, split_compressed

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
QUANTIZED = (torch.int8, torch.float8_e4m3fn)


def sparse(n, k, dtype=torch.float32, seed=0, full=False):
    """A random 2:4 weight; ``full``: two non-zero values in every group."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(n, k // 4, 4, generator=generator).argsort(-1) < 2
    weight = torch.randn(n, k, generator=generator)
    weight = weight.sign() * (weight.abs() + 0.5)
    if not full:
        weight *= torch.rand(n, k, generator=generator) > 0.2
    return (weight * (20 if dtype == torch.int8 else 1) * keep.view(n, k)).to(dtype)


def on_cpu(weight, scale=None, inputs=None):
    """The GPU's form of a weight, on the CPU."""
    if scale is None and inputs is not None:
        scale = torch.ones(weight.shape[0])
    return cuda.pack(split(weight), scale, inputs, ())


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 20),
    groups=st.integers(1, 40),
    dtype=st.sampled_from((*FLOATS, *QUANTIZED)),
    seed=st.integers(0, 2**31),
)
def test_layout_and_back(n, groups, dtype, seed):
    weight = sparse(n, 4 * groups, dtype, seed)
    columns = split(weight).columns
    words = metadata_words(columns)
    for row in range(n):
        for group in range(groups):
            nibble = int(words[row, group // 8]) >> 4 * (group % 8) & 15
            assert nibble == int(columns[row, group, 0]) | int(columns[row, group, 1]) << 2
    assert torch.equal(columns_of(words, 4 * groups), columns)
    packed = on_cpu(weight)
    assert torch.equal(kernels.unpack(packed).double(), weight.double())
    assert packed.nbytes == weight.nbytes // 2 + 4 * n * -(-groups // 8)


def test_pack_compressed_gives_the_same_layout():
    weight = sparse(12, 40, torch.bfloat16, full=True)
    kept = weight != 0
    bitmask = (kept.view(12, 5, 8) << torch.arange(8)).sum(-1).to(torch.uint8)
    kept = split_compressed(weight[kept].view(12, 20), bitmask, (12, 40))
    made, expected = cuda.pack(kept, None, None, ()), on_cpu(weight)
    assert torch.equal(made.values, expected.values) and torch.equal(made.metadata, expected.metadata)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize(("n", "k"), [(32, 128), (64, 256), (96, 640), (160, 128)])
def test_cutlass_metadata_is_torchs_bit_for_bit(n, k, dtype):
    weight = sparse(n, k, dtype, full=True)
    packed = on_cpu(weight)
    values, expected = sparse_semi_structured_from_dense_cutlass(weight)
    meta = cutlass_metadata(packed.metadata, packed.format)
    assert torch.equal(packed.values, values)
    assert meta.dtype == expected.dtype and torch.equal(meta, expected)
    assert torch.equal(from_cutlass_metadata(expected), packed.metadata)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_torch_reads_our_cutlass_form_of_groups_with_zeros(dtype):
    weight = sparse(64, 256, dtype)
    packed = on_cpu(weight)
    meta = cutlass_metadata(packed.metadata, packed.format)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed.values, meta), weight)
    assert torch.equal(from_cutlass_metadata(meta), packed.metadata)


@pytest.mark.parametrize(
    ("limits", "theirs"),
    [
        (products.CUSPARSELT_LIMITS, SparseSemiStructuredTensorCUSPARSELT),
        (products.CUTLASS_LIMITS, SparseSemiStructuredTensorCUTLASS),
    ],
)
def test_limits_are_torchs(limits, theirs):
    for dtype, limit in theirs._DTYPE_SHAPE_CONSTRAINTS.items():
        if dtype == torch.float32:  # 1:2, not 2:4
            assert "fp32" not in limits
            continue
        ours = limits[format_of(dtype).name]
        assert (limit.sparse_min_rows, limit.sparse_min_cols) == ours[:2]
        assert limit.dense_min_rows == limit.dense_min_cols == ours.tokens


@pytest.mark.parametrize(
    ("capability", "n", "k", "dtype", "expected"),
    [
        ((7, 5), 64, 128, torch.float16, set()),
        ((8, 0), 64, 128, torch.bfloat16, {TRITON, CUTLASS, CUSPARSELT}),
        ((8, 6), 64, 128, torch.int8, {TRITON, CUTLASS, CUSPARSELT}),
        ((8, 6), 64, 128, torch.float8_e4m3fn, {TRITON}),
        ((8, 9), 64, 128, torch.float8_e4m3fn, {TRITON, CUSPARSELT}),
        ((9, 0), 64, 128, torch.float16, {TRITON, CUSPARSELT}),
        ((10, 0), 64, 128, torch.float8_e4m3fn, {TRITON, CUSPARSELT}),
        ((9, 0), 64, 128, torch.float32, {TRITON}),
        ((8, 0), 48, 80, torch.bfloat16, {TRITON, CUSPARSELT}),  # CUTLASS: N % 32, K % 64
        ((8, 0), 64, 96, torch.int8, {TRITON, CUSPARSELT}),  # CUTLASS: K % 128
        ((9, 0), 48, 96, torch.int8, {TRITON}),  # cuSPARSELt: N % 32
        ((9, 0), 24, 64, torch.bfloat16, {TRITON}),
        (None, 64, 128, torch.bfloat16, {TRITON}),
    ],
)
def test_rules(capability, n, k, dtype, expected, monkeypatch):
    products.has_triton.cache_clear()
    monkeypatch.setattr(products.importlib.util, "find_spec", lambda name: object())
    assert set(dispatch.cuda_backends(capability, n, k, format_of(dtype))) == expected
    products.has_triton.cache_clear()
    monkeypatch.setattr(products.importlib.util, "find_spec", lambda name: None)
    assert dispatch.cuda_backends(capability, n, k, format_of(dtype)) == ()
    products.has_triton.cache_clear()


def test_choice_from_given_timings():
    a, b, dense = Candidate(TRITON, 1), Candidate(CUSPARSELT, 7), Candidate(DENSE)
    plan = Plan({1: {a: 1.0, b: 3.0, dense: 2.0}, 16: {a: 2.0, b: 1.5, dense: 1.2}, 64: {b: 2.0, dense: 4.0}})
    assert [plan.choose(m, True) for m in (1, 2, 16, 17, 64, 5000)] == [a, dense, dense, b, b, b]
    assert [plan.choose(m, False) for m in (1, 2, 16, 17, 64, 5000)] == [a, b, b, b, b, b]
    assert plan.wants_dense()
    assert plan.backends(True) == {TRITON, DENSE, CUSPARSELT} and plan.backends(False) == {TRITON, CUSPARSELT}


def test_a_dense_copy_needs_a_clear_gain():
    def plan(dense):
        return Plan({1: {Candidate(TRITON): 1.0, Candidate(DENSE): dense}})

    assert not plan(0.96).wants_dense() and plan(0.94).wants_dense()
    assert Plan({1: {Candidate(DENSE): 0.1}}).wants_dense()
    assert Plan({1: {}}).choose(1, False) == Candidate(EXPAND)


@given(
    st.dictionaries(
        st.sampled_from(TOKENS),
        st.dictionaries(
            st.tuples(st.sampled_from([TRITON, CUSPARSELT, CUTLASS, EXPAND]), st.integers(0, 3)),
            st.floats(1e-6, 1.0),
            min_size=1,
        ),
        min_size=1,
    ),
    st.floats(1e-6, 1.0),
)
def test_nothing_is_served_slower_than_dense_where_memory_allows(times, dense):
    seconds = {m: {Candidate(*c): s for c, s in row.items()} | {Candidate(DENSE): dense} for m, row in times.items()}
    plan = Plan(seconds)
    keep = plan.wants_dense()
    for tokens, row in seconds.items():
        served = row[plan.choose(tokens, keep)]
        assert served <= dense * (1 if keep else plans.DENSE_GAIN)
        assert plan.choose(tokens, False).backend != DENSE


def test_the_memory_policy():
    assert plans.dense_copy_allowed(30, 100, 20)
    assert not plans.dense_copy_allowed(31, 100, 20)


def test_plans_are_measured_once_and_remembered(tmp_path):
    path, calls = tmp_path / "new" / "plans.json", []

    def measure():
        calls.append(1)
        return Plan({1: {Candidate(TRITON, 2): 0.5, Candidate(CUSPARSELT, 11): 0.25}, 4096: {Candidate(DENSE): 1.0}})

    store = PlanStore(path)
    assert store.get("a") is None
    plan = store.get_or_measure("a", measure)
    assert store.get_or_measure("a", measure) is plan and store.get("a") is plan and len(calls) == 1
    PlanStore(path).get_or_measure("b", measure)
    assert len(calls) == 2 and set(json.loads(path.read_text())) == {"a", "b"}
    assert PlanStore(path).get_or_measure("a", measure) == plan and len(calls) == 2
    assert [file.name for file in path.parent.iterdir()] == ["plans.json"]


@pytest.mark.parametrize(
    "content",
    [
        *("", "[1]", '{"a": 3}', '{"a": {"x": {}}}', '{"a": {"1": {"triton": 1}}}', '{"a": {}}'),
        '{"a": {"1": {"tritn/0": 1}}}',
    ],
)
def test_a_damaged_cache_is_measured_again(tmp_path, content):
    path = tmp_path / "plans.json"
    path.write_text(content)
    plan = Plan({1: {Candidate(TRITON): 1.0}})
    assert PlanStore(path).get_or_measure("a", lambda: plan) is plan
    assert PlanStore(path).get_or_measure("a", lambda: Plan({})) == plan


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    plan = Plan({1: {Candidate(TRITON): 1.0}})
    assert PlanStore(tmp_path / "file" / "plans.json").get_or_measure("a", lambda: plan) is plan


def naive(x, weight, scale, bias, inputs):
    token_scale = None
    if inputs is not None:
        x, token_scale = reference.quantize_inputs(x, inputs)
    y = x.double() @ weight.double().t()
    if scale is not None:
        y *= scale.double()
    if token_scale is not None:
        y *= token_scale.double()[:, None]
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, *QUANTIZED])
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_linear_without_a_gpu_expands(dtype, x_dtype, with_bias):
    weight, x = sparse(10, 24, dtype), torch.randn(3, 5, 24).to(x_dtype)
    inputs = Inputs(dtype) if dtype in QUANTIZED else None
    scale = torch.rand(10) + 0.5 if dtype in QUANTIZED else None
    bias = torch.randn(10).to(x_dtype) if with_bias else None
    y = kernels.linear(x, on_cpu(weight, scale, inputs), bias)
    assert y.shape == (3, 5, 10) and y.dtype == x_dtype
    expected = naive(x.view(-1, 24), weight, scale, bias, inputs).view(3, 5, 10)
    torch.testing.assert_close(y, expected.to(x_dtype), rtol=3 * torch.finfo(x_dtype).eps, atol=1e-3)
    assert kernels.linear(x[:0], on_cpu(weight, scale, inputs), bias).shape == (0, 5, 10)


@pytest.mark.parametrize("inputs", ["token", 0.05])
@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_quantized_inputs_are_the_same_on_both_devices(dtype, inputs, x_dtype):
    weight, x, bias = sparse(12, 32, dtype), torch.randn(6, 32).to(x_dtype), torch.randn(12).to(x_dtype)
    scale = torch.rand(12) + 0.5
    scheme = Inputs(dtype) if inputs == "token" else Inputs(dtype, inputs)
    ours = kernels.linear(x, kernels.pack(weight, scale, inputs), bias)
    folded = scale * (1.0 if inputs == "token" else inputs)
    expected = naive(x, weight, folded, bias, scheme).to(x_dtype)
    torch.testing.assert_close(ours, expected, rtol=4 * torch.finfo(x_dtype).eps, atol=1e-2)
    torch.testing.assert_close(kernels.linear(x, on_cpu(weight, folded, scheme), bias), expected)


@pytest.mark.parametrize(
    ("dtype", "inputs", "message"),
    [
        (torch.bfloat16, "token", "only int8 and float8_e4m3fn quantize inputs"),
        (torch.int8, "tensor", "'token', 'exact', a positive scale or None"),
        (torch.float8_e4m3fn, -1.0, "'token', 'exact', a positive scale or None"),
        (torch.int8, float("nan"), "'token', 'exact', a positive scale or None"),
    ],
)
def test_wrong_input_schemes_are_refused(dtype, inputs, message):
    with pytest.raises(ValueError, match=message):
        kernels.pack(sparse(4, 8, dtype), inputs=inputs)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("aot_eager", torch.bfloat16), ("inductor", torch.int8), ("aot_eager", torch.float8_e4m3fn)],
)
def test_torch_compile_traces_without_a_break(backend, dtype):
    inputs = Inputs(dtype) if dtype in QUANTIZED else None
    packed, bias = on_cpu(sparse(24, 32, dtype), inputs=inputs), torch.randn(24)

    def model(x):
        return kernels.linear(torch.relu(x), packed, bias) + 1

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (3, 7):
        x = torch.randn(tokens, 32)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])  # opcheck itself multiplies, which float8 cannot
def test_the_operator_meets_torch_librarys_contract(dtype):
    packed = on_cpu(sparse(10, 8, dtype), inputs=Inputs(dtype) if dtype in QUANTIZED else None)
    x = torch.randn(3, 8).to(dtype)
    token_scale = torch.rand(3) if dtype in QUANTIZED else None
    tensors = (packed.values, packed.metadata, None, None, None, packed.scale, torch.randn(10))
    torch.library.opcheck(
        torch.ops.crepe_llm.sparse24_cuda_linear.default,
        (x, token_scale, *tensors, 10, 8, packed.format.name, torch.bfloat16),
    )


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, 37])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(CUSPARSELT, FORMATS[f].dtype) for f in products.CUSPARSELT_LIMITS]
    + [(CUTLASS, FORMATS[f].dtype) for f in products.CUTLASS_LIMITS],
)
def test_library_calls_pass_torchs_own_shape_and_dtype_checks(backend, tokens, dtype, with_scale, with_bias):
    """torch's meta implementations of the library's operators see our arguments; nothing is computed."""
    n, k, quantized = 64, 128, dtype in QUANTIZED
    x_dtype = torch.float16 if quantized else dtype
    with FakeTensorMode():
        compressed = torch.empty(n, k * (10 if quantized else 9) // 16, dtype=dtype)
        meta = torch.empty(n, k // 32, dtype=torch.int32) if quantized else torch.empty(n, k // 16, dtype=torch.int16)
        scale = torch.empty(n) if with_scale or quantized else None
        values = torch.empty(n, k // 2, dtype=dtype)
        weight = CudaWeight((n, k), format_of(dtype), values, None, meta, compressed, None, scale)
        bias = torch.empty(n, dtype=x_dtype) if with_bias else None
        token_scale = torch.empty(tokens) if quantized else None
        x = torch.empty(tokens, k, dtype=dtype)
        y = products.product(Candidate(backend, 3), x, weight, token_scale, bias, x_dtype)
        assert y.shape == (tokens, n) and y.dtype == x_dtype and y.is_contiguous()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(CUSPARSELT, FORMATS[f].dtype) for f in products.CUSPARSELT_LIMITS]
    + [(CUTLASS, FORMATS[f].dtype) for f in products.CUTLASS_LIMITS],
)
def test_scales_and_bias_around_the_libraries(backend, dtype, with_scale, with_bias, monkeypatch):
    """CPU builds lack the libraries: products with the operators' documented meaning stand in for them."""
    dense = sparse(64, 128, dtype)

    def multiply(columns, bias, alpha, out_dtype):
        y = dense.double() @ columns.double()
        y = y if alpha is None else y * alpha.double()[:, None]
        y = y if bias is None else y + bias.double()[:, None]
        return y.to(out_dtype or dtype)

    def cusparselt(compressed, columns, bias=None, alpha=None, out_dtype=None, transpose_result=False, alg_id=0):
        assert transpose_result and alg_id == 7 and (alpha is None or alpha.shape == (64,))
        return multiply(columns, bias, alpha, out_dtype).t()

    monkeypatch.setattr(torch, "_cslt_sparse_mm", cusparselt)
    monkeypatch.setattr(
        torch, "_sparse_semi_structured_mm", lambda w, meta, x, out_dtype=None: multiply(x, None, None, out_dtype)
    )
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", lambda bias, w, meta, x: multiply(x, bias, None, None))
    quantized = dtype in QUANTIZED
    x_dtype = torch.bfloat16 if quantized else dtype
    scale = torch.rand(64) + 0.5 if with_scale or quantized else None
    bias = torch.randn(64).to(x_dtype) if with_bias else None
    packed = on_cpu(dense, scale, Inputs(dtype) if quantized else None)
    packed = dataclasses.replace(packed, cutlass=packed.metadata, cusparselt=packed.values)
    x = torch.randn(5, 128).to(x_dtype)
    values, token_scale = reference.quantize_inputs(x, packed.inputs) if quantized else (x, None)
    y = products.product(Candidate(backend, 7), values, packed, token_scale, bias, x_dtype)
    expected = naive(x, dense, scale, bias, packed.inputs)
    eps = torch.finfo(x_dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=3 * eps, atol=3 * eps * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, *QUANTIZED])
@pytest.mark.parametrize("row_major", [True, False])
def test_values_are_shared_with_cusparselt_only_where_its_order_is_ours(dtype, row_major, monkeypatch):
    """cuSPARSELt is no part of CPU builds: a compressor that keeps the first non-zero values stands in for it."""

    def compress(dense):
        values, columns, _ = split(dense)
        values = values.reshape(dense.shape[0], -1)
        values = values if row_major else values.view(torch.uint8).flip(0).view(dtype)
        tail = metadata_words(columns).view(torch.uint8).flatten()
        return torch.cat((values.contiguous().view(torch.uint8).flatten(), tail)).view(dtype)

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    weight = on_cpu(sparse(32, 64, dtype), inputs=Inputs(dtype) if dtype in QUANTIZED else None)
    made = cuda._with_cusparselt(weight)
    shared = made.values.untyped_storage().data_ptr() == made.cusparselt.untyped_storage().data_ptr()
    assert shared == row_major
    assert torch.equal(made.values.double(), weight.values.double())
    assert torch.equal(to_dense(made).double(), to_dense(weight).double())
    if row_major:
        assert made.nbytes == made.cusparselt.nbytes + made.metadata.nbytes + (
            0 if made.scale is None else made.scale.nbytes
        )


def test_a_backend_that_fails_is_left_out_with_a_warning():
    base = on_cpu(sparse(32, 64, torch.bfloat16))
    with pytest.warns(RuntimeWarning, match="does not use cusparselt for 32 x 64"):
        weight, usable = cuda._prepared(base, [CUSPARSELT, CUTLASS, DENSE, EXPAND])
    assert usable == [CUTLASS, DENSE, EXPAND]
    assert weight.cusparselt is None and weight.cutlass is not None and torch.equal(weight.dense, to_dense(base))


def test_a_result_that_is_not_the_dense_one_is_refused():
    expected = torch.randn(8, 8)
    plans._check(expected + 1e-3, expected)
    for wrong in (expected.t(), torch.full_like(expected, torch.nan), torch.zeros_like(expected)):
        with pytest.raises(ValueError, match="differs from the dense product"):
            plans._check(wrong, expected)


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plans.cache_path() == tmp_path / "crepe-llm" / "cuda_plans.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert plans.cache_path().parts[-3:] == (".cache", "crepe-llm", "cuda_plans.json")
