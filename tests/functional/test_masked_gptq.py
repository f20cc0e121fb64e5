"""Masked GPTQ against a direct column-by-column elimination, and against rounding to nearest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm.functional.masked_gptq import masked_gptq


def problem(rows=8, columns=24, seed=0, bits=4):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(200, columns, generator=generator) @ mixing + 0.3 * torch.randn(200, 1, generator=generator)
    gram = inputs.T @ inputs / 200
    weight = torch.randn(rows, columns, generator=generator)
    groups = (weight.abs() * gram.diagonal().sqrt()).view(rows, -1, 4)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(2, -1).indices, True).view_as(weight)
    weight = weight * keep
    scale = weight.abs().amax(dim=1) / (2 ** (bits - 1) - 0.5)

    def quantize(column, index):
        return (column / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale

    return weight, gram, keep, quantize


def error(weight, quantized, gram):
    difference = quantized - weight
    return ((difference @ gram) * difference).sum().item()


def naive(weight, gram, keep, quantize, dampening):
    """OBQ's elimination in fp64: fix a column, solve for the rest, remove it from the inverse Hessian."""
    columns = weight.shape[1]
    hessian = gram.double() + dampening * gram.double().diagonal().mean() * torch.eye(columns)
    order = gram.diagonal().argsort(descending=True).tolist()
    inverse = torch.linalg.inv(hessian)
    work = weight.double().clone()
    for position, column in enumerate(order):
        target = quantize(work[:, column].float(), column).double() * keep[:, column]
        step = (work[:, column] - target) / inverse[column, column]
        rest = order[position:]
        work[:, rest] -= step[:, None] * inverse[column, rest]
        work[:, column] = target
        inverse = inverse - inverse[:, column, None] * inverse[None, column] / inverse[column, column]
    return work.float()


@pytest.mark.parametrize("block_size", [1, 5, 128])
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_elimination(block_size, seed):
    weight, gram, keep, quantize = problem(seed=seed)
    quantized, _ = masked_gptq(weight, gram, keep, quantize, dampening=0.02, block_size=block_size)
    assert torch.allclose(quantized, naive(weight, gram, keep, quantize, 0.02), atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), bits=st.sampled_from([2, 4, 8]), ordered=st.booleans())
def test_pruned_weights_stay_zero_and_the_rest_on_the_grid(seed, bits, ordered):
    weight, gram, keep, quantize = problem(seed=seed, bits=bits)
    before = weight.clone(), gram.clone(), keep.clone()
    quantized, _ = masked_gptq(weight, gram, keep, quantize, activation_order=ordered)
    assert not quantized[~keep].any()
    for column in range(weight.shape[1]):
        assert torch.allclose(quantize(quantized[:, column], column), quantized[:, column], atol=1e-6)
    assert all(torch.equal(new, old) for new, old in zip((weight, gram, keep), before, strict=True))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_error_is_below_that_of_rounding_and_of_feedback_to_kept_weights_alone(bits):
    weight, gram, keep, quantize = problem(rows=64, columns=128, bits=bits)
    nearest = torch.stack([quantize(weight[:, column], column) for column in range(128)], dim=1)
    quantized, loss = masked_gptq(weight, gram, keep, quantize)
    assert error(weight, quantized, gram) < 0.9 * error(weight, nearest, gram)
    # Without dampening the reported loss is exactly the weighted squared error.
    quantized, loss = masked_gptq(weight, gram, keep, quantize, dampening=0.0)
    assert loss.shape == (64,)
    assert loss.sum().item() == pytest.approx(error(weight, quantized, gram), rel=1e-3)


def test_independent_inputs_leave_nothing_to_feed_back():
    weight, _, keep, quantize = problem()
    quantized, _ = masked_gptq(weight, torch.eye(weight.shape[1]), keep, quantize)
    nearest = torch.stack([quantize(weight[:, column], column) for column in range(weight.shape[1])], dim=1)
    assert torch.allclose(quantized, nearest)


def test_silent_channels_are_rounded_like_any_other():
    weight, gram, keep, quantize = problem()
    gram[3], gram[:, 3] = 0, 0
    quantized, _ = masked_gptq(weight, gram, keep, quantize)
    assert quantized.isfinite().all()
    assert torch.allclose(quantized[:, 3], quantize(weight[:, 3], 3) * keep[:, 3])


def test_refuses_what_does_not_fit():
    weight, gram, keep, quantize = problem()
    with pytest.raises(ValueError, match="do not fit"):
        masked_gptq(weight, gram[:-1, :-1], keep, quantize)
    with pytest.raises(torch.linalg.LinAlgError):
        masked_gptq(weight, -gram, keep, quantize)
