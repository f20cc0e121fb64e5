"""What the operators refuse, whoever calls them, and odd operands that they take: no kernel reads out of bounds."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from crepe_llm import kernels
from crepe_llm.kernels import DenseWeight, PackedWeight, cpu, cuda, reference
from crepe_llm.kernels.formats import FORMATS, int4_format
from crepe_llm.kernels.packed import Inputs, split

N, K = 24, 32
# What a message of ours has.
REFUSED = r"; .*(need|has|most|must|one of)|requires a gradient|: call |neither values"
CPU = torch.ops.crepe_llm.sparse24_linear
GPU = torch.ops.crepe_llm.sparse24_cuda_linear
DENSE = torch.ops.crepe_llm.dense_linear


def sparse(n=N, k=K, dtype=torch.float32):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * (20 if dtype == torch.int8 else 1)
    weight[:, 1::4] = weight[:, 2::4] = 0
    return weight.to(dtype)


def strided(tensor):
    """The same values, two elements apart."""
    return torch.stack((tensor, tensor), -1).flatten(-2)[..., ::2]


def negated(tensor):
    """The same values; memory holds the other sign, as in the imaginary part of a conjugate."""
    return torch._neg_view(-tensor)


def with_gradient(tensor):
    return tensor.detach().clone().requires_grad_()


def cpu_operands(**changes):
    packed = kernels.pack(sparse(), torch.rand(N) + 0.5)
    made = {"x": torch.randn(3, K), "data": packed.data, "scale": packed.scale, "zero": None, "bias": torch.randn(N)}
    return list({**made, "n": N, "k": K, "format": "fp32", **changes}.values())


def int4_operands(**changes):
    form = int4_format(32)
    made = {"x": torch.randn(3, K), "data": torch.zeros(2 * form.chunk_bytes, dtype=torch.uint8)}
    made |= {"scale": torch.rand(form.packed_scale_shape(N, K)), "zero": torch.ones(2, 1, 16, dtype=torch.uint8)}
    return list({**made, "bias": torch.randn(N), "n": N, "k": K, "format": form.name, **changes}.values())


def gpu_operands(**changes):
    packed = cuda.pack(split(sparse()), torch.rand(N) + 0.5, None, ())
    made = {"x": torch.randn(3, K), "token_scale": torch.rand(3), "values": packed.values, "metadata": packed.metadata}
    made |= {"cutlass": None, "cusparselt": None, "dense": kernels.unpack(packed), "scale": packed.scale}
    made |= {"bias": torch.randn(N), "n": N, "k": K, "format": "fp32", "out_dtype": torch.float32}
    return list({**made, **changes}.values())


def dense_operands(**changes):
    made = {"x": torch.randn(3, K), "weight": torch.randn(N, K), "scale": torch.rand(N), "bias": torch.randn(N)}
    made |= {"inputs": "exact"}
    return list({**made, **changes}.values())


PACKED = kernels.pack(sparse())
X = {
    "narrow": {"x": torch.ones(3, K - 1)},
    "wide": {"x": torch.ones(3, 2 * K)},
    "a vector": {"x": torch.ones(K)},
    "three dimensions": {"x": torch.ones(1, 3, K)},
    "fp64 x": {"x": torch.ones(3, K, dtype=torch.float64)},
    "int x": {"x": torch.ones(3, K, dtype=torch.int32)},
    "complex x": {"x": torch.ones(3, K, dtype=torch.complex64)},
    "short bias": {"bias": torch.ones(N - 1)},
    "one bias": {"bias": torch.ones(1)},
    "int bias": {"bias": torch.ones(N, dtype=torch.int64)},
    "complex bias": {"bias": torch.ones(N, dtype=torch.complex64)},
    "meta bias": {"bias": torch.ones(N, device="meta")},
    "gradient of x": {"x": with_gradient(torch.ones(3, K))},
    "gradient of the bias": {"bias": with_gradient(torch.ones(N))},
}
SCALED = {
    "one scale": {"scale": torch.ones(1)},
    "short scale": {"scale": torch.ones(N - 1)},
    "fp64 scale": {"scale": torch.ones(N, dtype=torch.float64)},
    "bf16 scale": {"scale": torch.ones(N, dtype=torch.bfloat16)},
    "strided scale": {"scale": strided(torch.ones(N))},
    "meta scale": {"scale": torch.ones(N, device="meta")},
    "gradient of the scale": {"scale": with_gradient(torch.ones(N))},
    "more rows": {"n": N + 16},
    "more columns": {"k": K + 32},
    "no rows": {"n": 0},
    "no columns": {"k": 0},
    "negative size": {"n": -N, "k": -K},
    "odd columns": {"k": K - 2},
    "unknown format": {"format": "int3"},
    "other format": {"format": "int8"},
}
CPU_CASES = {
    **X,
    **SCALED,
    "short data": {"data": PACKED.data[:-1]},
    "int8 data": {"data": PACKED.data.view(torch.int8)},
    "strided data": {"data": strided(PACKED.data)},
    "meta data": {"data": PACKED.data.to("meta")},
    "zero points of numbers": {"zero": torch.zeros(2, 1, 16, dtype=torch.uint8)},
    "too many columns for int8": {
        "k": 262176,
        "n": 1,
        "format": "int8",
        "data": torch.zeros(8193 * 320, dtype=torch.uint8),
    },
}
INT4_CASES = {
    **X,
    "no scale": {"scale": None},
    "scales of rows": {"scale": torch.ones(N)},
    "short scale": {"scale": torch.ones(1, 1, 16)},
    "fp64 scale": {"scale": torch.ones(2, 1, 16, dtype=torch.float64)},
    "strided scale": {"scale": strided(torch.ones(2, 1, 16))},
    "short zero points": {"zero": torch.zeros(1, 1, 16, dtype=torch.uint8)},
    "int8 zero points": {"zero": torch.zeros(2, 1, 16, dtype=torch.int8)},
    "strided zero points": {"zero": strided(torch.zeros(2, 1, 16, dtype=torch.uint8))},
    "meta zero points": {"zero": torch.zeros(2, 1, 16, dtype=torch.uint8, device="meta")},
    "more rows": {"n": N + 16},
    "more columns": {"k": K + 32},
    "short data": {"data": torch.zeros(383, dtype=torch.uint8)},
    "a scale for each row of another format": {"format": "int4"},
}
GPU_CASES = {
    **X,
    **SCALED,
    "short metadata": {"metadata": torch.zeros(N - 1, 1, dtype=torch.int32)},
    "int16 metadata": {"metadata": torch.zeros(N, 2, dtype=torch.int16)},
    "narrow values": {"values": torch.zeros(N, K // 2 - 2)},
    "bf16 values": {"values": torch.zeros(N, K // 2, dtype=torch.bfloat16)},
    "strided values": {"values": strided(torch.zeros(N, K // 2))},
    "small dense": {"dense": torch.zeros(N, K - 4)},
    "small cutlass metadata": {"cutlass": torch.zeros(N, 1, dtype=torch.int16)},
    "small cusparselt": {"cusparselt": torch.zeros(N * K // 2 - 1)},
    "short token scale": {"token_scale": torch.ones(2)},
    "fp64 token scale": {"token_scale": torch.ones(3, dtype=torch.float64)},
    "int outputs": {"out_dtype": torch.int32},
    "nothing to multiply by": {"values": None, "dense": None},
}
DENSE_CASES = {
    **X,
    "transposed": {"weight": torch.ones(K, N).t()},
    "fp64 weight": {"weight": torch.ones(N, K, dtype=torch.float64)},
    "int16 weight": {"weight": torch.ones(N, K, dtype=torch.int16)},
    "int8 weight without a scale": {"weight": torch.ones(N, K, dtype=torch.int8), "scale": None},
    **{name: change for name, change in SCALED.items() if "scale" in change},
    "meta weight": {"weight": torch.ones(N, K, device="meta")},
    "unknown inputs": {"inputs": "token"},
    "inputs that only int8 weights have": {"inputs": "lanes"},
    "a vector as weight": {"weight": torch.ones(K)},
    "gradient of the weight": {"weight": with_gradient(torch.ones(N, K))},
}
CASES = [
    pytest.param(operator, make, changes, id=f"{name}: {case}")
    for name, operator, make, cases in (
        ("cpu", CPU, cpu_operands, CPU_CASES),
        ("int4", CPU, int4_operands, INT4_CASES),
        ("gpu", GPU, gpu_operands, GPU_CASES),
        ("dense", DENSE, dense_operands, DENSE_CASES),
    )
    for case, changes in cases.items()
]


def cases_without(told):
    """The cases none of whose tensors is as told."""
    return [
        case for case in CASES if not any(torch.is_tensor(value) and told(value) for value in case.values[2].values())
    ]


def test_the_operands_are_right_without_a_change():
    for operator, make in ((CPU, cpu_operands), (CPU, int4_operands), (GPU, gpu_operands), (DENSE, dense_operands)):
        assert operator(*make()).shape == (3, N)


@pytest.mark.parametrize(("operator", "make", "changes"), CASES)
def test_wrong_operands_are_refused(operator, make, changes):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=REFUSED):
        operator(*make(**changes))


@pytest.mark.parametrize(("operator", "make", "changes"), cases_without(lambda tensor: tensor.requires_grad))
def test_wrong_operands_are_refused_in_inference_mode(operator, make, changes):
    """Where the CPU's operator is C++ alone, and no gradient is recorded."""
    with torch.inference_mode(), pytest.raises((ValueError, TypeError), match=REFUSED):
        operator(*make(**changes))


@pytest.mark.parametrize(("operator", "make", "changes"), cases_without(lambda tensor: tensor.is_meta))
def test_wrong_operands_are_refused_while_tracing(operator, make, changes):
    """By the implementation that only gives shapes; fake tensors are all on one device."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in make(**changes)]
    with mode, pytest.raises((ValueError, TypeError, RuntimeError), match=REFUSED):
        operator(*fake)


def test_the_message_names_operand_and_cure():
    with pytest.raises(TypeError, match=r"scale has dtype torch\.float64; float32 is needed"):
        dataclasses.replace(PACKED, scale=torch.ones(N, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"scale has shape \(1,\); the weight needs \(24,\)"):
        PackedWeight(PACKED.data, PACKED.shape, PACKED.format, torch.ones(1))
    with pytest.raises(ValueError, match=r"strides \(1, 24\).*contiguous\(\)"):
        DenseWeight(torch.ones(K, N).t())
    with pytest.raises(ValueError, match=r"resolve_neg\(\)"):
        DenseWeight(negated(torch.ones(N, K)))
    with pytest.raises(ValueError, match="x is on cpu, the weight or the bias on meta"):
        kernels.linear(torch.ones(1, K), PACKED, torch.ones(N, device="meta"))
    with pytest.raises(RuntimeError, match=r"requires a gradient.*no_grad\(\)"):
        kernels.linear(with_gradient(torch.ones(1, K)), PACKED)
    with pytest.raises(ValueError, match="the CPU has no kernel for fp8"):
        data = torch.zeros(2 * FORMATS["fp8"].chunk_bytes, dtype=torch.uint8)
        cpu.multiply(torch.ones(1, K), PackedWeight(data, (N, K), FORMATS["fp8"]), None)


def test_the_operator_in_inference_mode_gives_the_product():
    """Every kind of operand and of weight, strided activations and no tokens among them."""
    calls = [cpu_operands(), cpu_operands(bias=None, scale=None), int4_operands(), int4_operands(zero=None)]
    calls += [cpu_operands(x=torch.randn(5, 2 * K)[:, ::2]), cpu_operands(x=torch.randn(0, K))]
    calls += [cpu_operands(x=torch.randn(3, K).to(d), bias=torch.randn(N).to(d)) for d in (torch.half, torch.bfloat16)]
    for operands in calls:
        expected = CPU(*operands)  # checked, and by the operator in Python where that serves
        packed = PackedWeight(operands[1], (N, K), FORMATS[operands[-1]], operands[2], zero=operands[3])
        assert torch.equal(expected, kernels.linear(operands[0], packed, operands[4]))
        with torch.inference_mode():
            assert torch.equal(CPU(*operands), expected) and CPU(*operands).is_inference()


@pytest.mark.skipif(cpu.library() is None, reason="no CPU kernel library")
def test_no_python_runs_between_torch_and_the_kernel(monkeypatch):
    operands = cpu_operands()
    expected = CPU(*operands)
    for name in ("_multiply", "multiply", "multiply_plain"):
        monkeypatch.setattr(cpu, name, None)
    with torch.inference_mode():
        assert torch.equal(CPU(*operands), expected)


@pytest.mark.skipif(cpu.library() is None, reason="no CPU kernel library")
def test_the_operator_gives_back_what_it_was_given():
    """References of tensors and memory: what is called a thousand times a second must not leak."""
    operands = int4_operands()
    with torch.inference_mode():
        uses = [value._use_count() for value in operands if isinstance(value, torch.Tensor)]
        for _ in range(3):
            CPU(*operands)
            with pytest.raises(ValueError, match="format is 'int3'"):
                CPU(*operands[:-1], "int3")
        assert [value._use_count() for value in operands if isinstance(value, torch.Tensor)] == uses


@pytest.mark.skipif(cpu.library() is None, reason="no CPU kernel library")
def test_the_library_refuses_sizes_that_do_not_belong_together():
    packed = kernels.pack(sparse())
    with torch.inference_mode():
        kernels.linear(torch.ones(2, K), packed)  # which looks the operands up
    packed.data.resize_(64)
    with pytest.raises(ValueError, match="the operands do not fit a product of 2 tokens with a weight of 24 x 32"):
        kernels.linear(torch.ones(2, K), packed)
    with torch.inference_mode(), pytest.raises(ValueError, match="24 x 32"):
        kernels.linear(torch.ones(2, K), packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("turn", [negated, strided], ids=["negated", "strided"])
def test_views_give_the_values_of_their_copies(dtype, turn):
    weight, x, bias = sparse(dtype=dtype), torch.randn(5, K), torch.randn(N)
    scale = torch.rand(N) + 0.5
    inputs = Inputs(dtype) if dtype == torch.int8 else None
    for packed in (kernels.pack(weight, scale), cuda.pack(split(weight), scale, inputs, ())):
        expected = kernels.linear(x, packed, bias)
        torch.testing.assert_close(kernels.linear(turn(x), packed, turn(bias)), expected)
    dense = kernels.pack_dense(weight.float())
    for tokens in (1, 5):
        expected = kernels.linear(x[:tokens], dense, bias)
        torch.testing.assert_close(kernels.linear(turn(x[:tokens]), dense, turn(bias)), expected)
    assert torch.equal(kernels.linear(x, PACKED, bias.view(1, N)), kernels.linear(x, PACKED, bias))


def test_operators_see_the_values_of_negated_views():
    for operator, make in ((CPU, cpu_operands), (GPU, gpu_operands), (DENSE, dense_operands)):
        operands = make()
        turned = [
            negated(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for value in operands
        ]
        torch.testing.assert_close(operator(*turned), operator(*operands))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_packing_a_view_gives_the_weight_of_its_copy(dtype):
    weight, scale = sparse(dtype=dtype), torch.rand(N) + 0.5
    expected = kernels.pack(weight, scale)
    for turn in (negated, strided):
        packed = kernels.pack(turn(weight), turn(scale))
        assert torch.equal(packed.data, expected.data) and torch.equal(packed.scale, expected.scale)
    compressed = weight.view(N, K // 4, 4)[..., [0, 3]].reshape(N, K // 2)
    bitmask = torch.full((N, K // 8), 0b1001_1001, dtype=torch.uint8)
    packed = kernels.pack_compressed(negated(compressed), strided(bitmask), (N, K), negated(scale))
    assert torch.equal(kernels.unpack(packed), weight) and torch.equal(packed.scale, scale)


@pytest.mark.parametrize("tokens", [0, 1, 3, 400])
def test_zero_sizes(tokens):
    bias = torch.randn(N)
    no_columns = kernels.linear(torch.ones(tokens, 0), DenseWeight(torch.ones(N, 0)), bias)
    torch.testing.assert_close(no_columns, bias.expand(tokens, N))
    assert kernels.linear(torch.ones(tokens, K), DenseWeight(torch.ones(0, K))).shape == (tokens, 0)
    assert kernels.linear(torch.ones(tokens, 0, K), PACKED).shape == (tokens, 0, N)


@pytest.mark.parametrize("inputs", [None, "token", 0.1])
def test_a_gradient_is_never_lost_in_silence(inputs):
    weight = sparse(dtype=torch.int8 if inputs else torch.float32)
    x, bias = torch.randn(2, K), torch.randn(N)
    made = [kernels.pack(weight, inputs=inputs), kernels.pack_dense(torch.randn(N, K))]
    for packed in made:
        expected = kernels.linear(x, packed, bias)
        for operands in ((with_gradient(x), bias), (x, with_gradient(bias))):
            with pytest.raises(RuntimeError, match="requires a gradient"):
                kernels.linear(operands[0], packed, operands[1])
            with torch.no_grad():
                assert torch.equal(kernels.linear(operands[0], packed, operands[1]), expected)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="requires a gradient"):
            kernels.linear(forward_ad.make_dual(x, x), packed, bias)
    with pytest.raises(RuntimeError, match="requires a gradient"):
        kernels.linear(x, kernels.pack_dense(torch.nn.Linear(K, N).weight))


def test_a_gradient_is_not_lost_in_a_compiled_function():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: kernels.linear(x, PACKED), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="requires a gradient"):
        compiled(with_gradient(torch.randn(2, K)))


def test_outputs_are_on_the_device_of_x_whatever_the_default_is():
    x = torch.randn(2, K)
    with torch.device("meta"):
        y = kernels.linear(x, PACKED)
    torch.testing.assert_close(y, reference.sparse_linear(x, PACKED, None))
