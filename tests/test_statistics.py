import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm.statistics import InputStatistics


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(11, 6), (3, 5, 6), (2, 2, 3, 6), (6,)])
def test_sums_equal_those_of_all_tokens_in_fp64(dtype, shape):
    inputs = torch.randn(shape).to(dtype)
    statistics = InputStatistics(6, gram=True)
    statistics.update(inputs)
    tokens = inputs.double().reshape(-1, 6)
    assert statistics.tokens == len(tokens)
    torch.testing.assert_close(statistics.sum, tokens.sum(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.square_sum, tokens.square().sum(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.norm.double(), tokens.norm(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.gram.double(), tokens.T @ tokens, rtol=1e-5, atol=1e-5)
    if len(tokens) > 1:
        torch.testing.assert_close(statistics.mean, tokens.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(statistics.variance, tokens.var(0, unbiased=False), rtol=1e-4, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 5))
def test_parts_merged_equal_the_whole(sizes, cut):
    batches = [torch.randn(size, 4) for size in sizes]
    whole, first, second = (InputStatistics(4, gram=True) for _ in range(3))
    for index, batch in enumerate(batches):
        whole.update(batch)
        (first if index < cut else second).update(batch)
    first.merge(second)
    assert first.tokens == whole.tokens
    for name in ("sum", "square_sum", "gram"):
        torch.testing.assert_close(getattr(first, name), getattr(whole, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mask_shape", [(2, 5), (10,)])
def test_padding_tokens_are_left_out(mask_shape):
    inputs = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    masked, expected = InputStatistics(3, gram=True), InputStatistics(3, gram=True)
    masked.update(inputs, mask.view(mask_shape))
    expected.update(inputs[mask.bool()])
    assert masked.tokens == expected.tokens == 7
    for name in ("sum", "square_sum", "gram"):
        assert torch.equal(getattr(masked, name), getattr(expected, name))


def test_long_sums_of_bf16_do_not_stall():
    """A bf16 running sum of ones stops at 256; these must count every token."""
    statistics = InputStatistics(2)
    for _ in range(40):
        statistics.update(torch.ones(100, 2, dtype=torch.bfloat16))
    assert statistics.sum.tolist() == [4000.0, 4000.0]
    torch.testing.assert_close(statistics.square_sum, torch.full((2,), 4000.0, dtype=torch.float64))


@pytest.mark.parametrize("gram", [False, True])
def test_reordered_is_what_reordered_inputs_give(gram):
    inputs = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 0, 4, 1, 2])
    first, second = InputStatistics(5, gram=gram), InputStatistics(5, gram=gram)
    first.update(inputs)
    second.update(inputs[:, order])
    moved = first.reordered(order)
    assert moved.tokens == second.tokens
    torch.testing.assert_close(moved.sum, second.sum)
    torch.testing.assert_close(moved.square_sum, second.square_sum)
    assert (moved.gram is None) == (second.gram is None)
    if gram:
        torch.testing.assert_close(moved.gram, second.gram)


def test_bad_shapes_and_missing_tokens_are_named():
    statistics = InputStatistics(4)
    with pytest.raises(ValueError, match="3 channels, the statistics 4"):
        statistics.update(torch.ones(2, 3))
    with pytest.raises(ValueError, match="5 entries for 2 tokens"):
        statistics.update(torch.ones(2, 4), torch.ones(5))
    with pytest.raises(ValueError, match="3 channels into 4"):
        statistics.merge(InputStatistics(3))
    with pytest.raises(ValueError, match="Gram"):
        statistics.merge(InputStatistics(4, gram=True))
    with pytest.raises(ValueError, match="no calibration token"):
        _ = statistics.mean
