"""The grouped products of a mixture of experts, for every instruction set, against the product of each expert."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from crepe_llm import kernels
from crepe_llm.kernels import cpu
from crepe_llm.kernels.experts import ACTIVATIONS, experts_linear, mixture, pack_experts
from crepe_llm.kernels.formats import FORMATS
from crepe_llm.kernels.packed import PackedExperts

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ISAS = list(cpu.instruction_sets()) or [pytest.param("none", marks=pytest.mark.skip("no CPU kernel library"))]


def experts_of(count, n, k, dtype, generator):
    keep = torch.rand(count, n, k // 4, 4, generator=generator).argsort(-1) < 2
    weights = torch.randn(count, n, k, generator=generator)
    if dtype == torch.int8:
        weights = torch.randint(-128, 128, (count, n, k), generator=generator)
    weights = (weights * keep.view(count, n, k)).to(dtype)
    scale = torch.rand(n, generator=generator) + 0.5 if dtype == torch.int8 else None
    return [kernels.pack(weight, scale) for weight in weights]


def naive_mixture(x, ids, weights, gate_up, down, activation):
    """One token and one expert at a time."""
    y = torch.zeros(x.shape[0], down[0].shape[0])
    for token, slot in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(ids.shape[1])).tolist():
        expert = int(ids[token, slot])
        gate, up = kernels.linear(x[token : token + 1], gate_up[expert]).float().chunk(2, -1)
        hidden = (activation(gate) * up).to(x.dtype)
        y[token] += float(weights[token, slot]) * kernels.linear(hidden, down[expert])[0].float()
    return y.to(x.dtype)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 9),
    n=st.integers(1, 50),
    groups=st.integers(1, 40),
    m=st.integers(0, 40),
    dtype=st.sampled_from((*FLOATS, torch.int8)),
    x_dtype=st.sampled_from(FLOATS),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rows_are_those_of_each_experts_product(isa, count, n, groups, m, dtype, x_dtype, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    k = 4 * groups
    weights = experts_of(count, n, k, dtype, generator)
    experts = torch.randint(count, (m,), generator=generator).sort().values
    ends = torch.bincount(experts, minlength=count).cumsum(0)
    x = torch.randn(m, k + 5, generator=generator).to(x_dtype)[:, 2 : 2 + k]
    x = x if strided else x.contiguous()
    y = cpu.multiply_experts(x, ends, pack_experts(weights, count), isa)
    assert y.shape == (m, n) and y.dtype == x_dtype
    for row in range(m):
        assert torch.equal(y[row : row + 1], cpu.multiply(x[row : row + 1], weights[experts[row]], None, isa))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_mixture_is_its_definition(dtype, tokens, activation, library, monkeypatch):
    if not library:
        monkeypatch.setattr(cpu, "library", lambda: None)
    generator = torch.Generator().manual_seed(3)
    gate_up = experts_of(5, 48, 32, dtype, generator)
    down = experts_of(5, 32, 24, dtype, generator)
    x = torch.randn(tokens, 32, generator=generator)
    ids = torch.rand(tokens, 5, generator=generator).argsort(-1)[:, :3].to(torch.int32)
    weights = torch.rand(tokens, 3, generator=generator)
    y = mixture(x, ids, weights, (pack_experts(gate_up, 5), pack_experts(down, 5)), activation)
    expected = naive_mixture(x, ids, weights, gate_up, down, ACTIVATIONS[activation])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max() if tokens else 1))


def test_a_token_does_not_depend_on_its_batch():
    generator = torch.Generator().manual_seed(4)
    layers = tuple(pack_experts(experts_of(6, n, k, torch.bfloat16, generator), 6) for n, k in ((96, 64), (64, 48)))
    x = torch.randn(64, 64, generator=generator).bfloat16()
    ids = torch.rand(64, 6, generator=generator).argsort(-1)[:, :2]
    weights = torch.rand(64, 2, generator=generator)
    together = mixture(x, ids, weights, layers, "silu")
    for token in range(64):
        rows = slice(token, token + 1)
        assert torch.equal(mixture(x[rows], ids[rows], weights[rows], layers, "silu"), together[rows])


def test_each_expert_is_what_was_packed():
    weights = experts_of(3, 20, 36, torch.int8, torch.Generator().manual_seed(5))
    experts = pack_experts(iter(weights), 3)
    for index, weight in enumerate(weights):
        assert torch.equal(kernels.unpack(experts[index]), kernels.unpack(weight))
        assert torch.equal(experts[index].scale, weight.scale)
    assert experts.nbytes == sum(weight.nbytes for weight in weights)


def one(n, k, **changes):
    weight = torch.zeros(n, k)
    weight[:, ::4] = 1
    return kernels.pack(weight.to(changes.pop("dtype", torch.float32)), **changes)


@pytest.mark.parametrize(
    ("weights", "count", "message"),
    [
        ([one(4, 8)], 2, "count is 2, but there are the weights of 1 experts"),
        ([one(4, 8)] * 3, 2, "count is 2, but there are the weights of 3 experts"),
        ([], 1, "weights of 0 experts"),
        ([one(4, 8), one(4, 12)], 2, r"expert 1 has shape \(4, 12\), expert 0 \(4, 8\)"),
        ([one(4, 8), one(4, 8, dtype=torch.bfloat16)], 2, "expert 1 has format"),
        ([one(4, 8), one(4, 8, scale=torch.ones(4))], 2, "of experts 0 and 1 one has scales"),
        ([one(4, 8, dtype=torch.float8_e4m3fn, inputs="token")], 1, "expert 0 quantizes its inputs"),
    ],
)
def test_weights_that_are_no_experts_of_one_layer(weights, count, message):
    with pytest.raises(ValueError, match=message):
        pack_experts(weights, count)


EXPERTS = pack_experts([one(16, 32)] * 2, 2)
X, ENDS = torch.ones(3, 32), torch.tensor([1, 3])


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize(
    ("x", "ends", "error", "message"),
    [
        (X[:, :28], ENDS, ValueError, "its last dimension must be 32"),
        (X.double(), ENDS, TypeError, "x has dtype torch.float64"),
        (X, ENDS.int(), TypeError, "ends has dtype torch.int32"),
        (X, torch.tensor([3]), ValueError, r"2 experts need \(2,\)"),
        (X, torch.tensor([2, 4]), ValueError, "3 rows"),
        (X, torch.tensor([1, 2]), ValueError, "3 rows"),
        (X, torch.tensor([4, 3]), ValueError, "3 rows"),
        (X, torch.tensor([-1, 3]), ValueError, "3 rows"),
        (X.clone().requires_grad_(), ENDS, RuntimeError, "requires a gradient"),
        (X, ENDS.to("meta"), ValueError, "ends on meta"),
    ],
)
def test_operands_that_do_not_fit(library, x, ends, error, message, monkeypatch):
    if not library:
        monkeypatch.setattr(cpu, "library", lambda: None)
    with pytest.raises(error, match=message):
        experts_linear(x, ends, EXPERTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": EXPERTS.data[:-1]},
        {"count": 3},
        {"count": 0},
        {"shape": (32, 32)},
        {"shape": (16, 30)},
        {"scale": torch.ones(16)},
        {"format": FORMATS["fp8"]},
        {"format": FORMATS["int4"]},
    ],
)
def test_tensors_that_are_no_packed_experts(changes):
    fields = {name: getattr(EXPERTS, name) for name in ("data", "count", "shape", "format", "scale")}
    with pytest.raises(ValueError, match=r"needs|needed|has no kernel|multiple of 4"):
        PackedExperts(**fields | changes)


DOWN = pack_experts([one(32, 8)] * 2, 2)
IDS, SHARES = torch.tensor([[0], [1], [1]]), torch.ones(3, 1)
CALL = {
    **{"x": X, "expert_ids": IDS, "expert_weights": SHARES, "gate_up": EXPERTS.data, "gate_up_scale": None},
    **{"down": DOWN.data, "down_scale": None, "count": 2, "hidden": 32, "inner": 8, "format": "fp32"},
    "activation": "silu",
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"expert_ids": IDS + 1}, ValueError, "expert_ids are 1 to 2; there are 2 experts"),
        ({"expert_ids": -IDS}, ValueError, "expert_ids are -1 to 0"),
        ({"expert_ids": IDS[:2]}, ValueError, "expert_ids has shape"),
        ({"expert_ids": IDS.float()}, TypeError, "expert_ids are torch.float32"),
        ({"expert_weights": torch.ones(3, 2)}, ValueError, "expert_weights"),
        ({"expert_weights": SHARES.int()}, TypeError, "expert_weights torch.int32"),
        ({"expert_weights": SHARES.clone().requires_grad_()}, RuntimeError, "require a gradient"),
        ({"x": X[:, :28]}, ValueError, "its last dimension must be 32"),
        ({"x": X[:2]}, ValueError, "expert_ids has shape"),
        ({"x": X.clone().requires_grad_()}, RuntimeError, "requires a gradient"),
        ({"gate_up": EXPERTS.data[:-1]}, ValueError, "packed data"),
        ({"gate_up_scale": torch.ones(2)}, ValueError, "scale has shape"),
        ({"down": DOWN.data[1:]}, ValueError, "packed data"),
        ({"count": 3}, ValueError, "packed data"),
        ({"inner": 12}, ValueError, "packed data"),
        ({"format": "int3"}, ValueError, "format is"),
        ({"format": "int4"}, ValueError, "no grouped product"),
        ({"activation": "relu"}, ValueError, "activation is 'relu'; one of silu"),
    ],
)
def test_the_operator_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        torch.ops.crepe_llm.sparse24_mixture(**CALL | changes)


def test_layers_that_do_not_follow_each_other():
    with pytest.raises(ValueError, match=r"the second needs 2 x \(64, 16\) fp32 before it"):
        mixture(X, IDS, SHARES, (EXPERTS, EXPERTS), "silu")


def test_the_operator_is_traced():
    torch.library.opcheck(torch.ops.crepe_llm.sparse24_mixture.default, tuple(CALL.values()))

    def twice(x):
        return mixture(x, IDS, SHARES, (EXPERTS, DOWN), "silu") * 2

    assert torch.equal(torch.compile(twice, backend="aot_eager", fullgraph=True)(X), twice(X))
    with torch.no_grad():
        assert torch.equal(make_fx(twice)(X)(-X), twice(-X))
