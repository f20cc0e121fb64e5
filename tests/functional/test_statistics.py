import pytest
import torch

from crepe_llm.functional.statistics import InputStatistics, relative_weights, token_products


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_counts_as_often_as_its_weight_says(dtype):
    inputs, weights = torch.randn(2, 5, 3).to(dtype), torch.randint(4, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    weighted, repeated = InputStatistics(3, gram=True), InputStatistics(3, gram=True)
    for half in (0, 1):
        weighted.update(inputs[half], mask[half], weights[half].float())
    repeated.update(inputs[mask.bool()].repeat_interleave(weights[mask.bool()], dim=0))
    assert weighted.tokens == 7 and weighted.weight == repeated.weight == int(weights[mask.bool()].sum())
    for name in ("sum", "square_sum", "gram", "mean", "variance"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(weighted.reordered(torch.arange(3)).mean, weighted.mean)


def test_tokens_that_count_nothing_leave_no_mean():
    statistics = InputStatistics(3)
    statistics.update(torch.randn(4, 3), token_weights=torch.zeros(4))
    assert statistics.mean.tolist() == statistics.variance.tolist() == [0, 0, 0]


def test_products_of_two_inputs_of_each_token():
    first, second, weights = torch.randn(7, 3), torch.randn(7, 3), torch.rand(7)
    expected = sum(w * torch.outer(x, y) for w, x, y in zip(weights, first, second, strict=True))
    torch.testing.assert_close(token_products(first, second, token_weights=weights), expected)
    with pytest.raises(ValueError, match="token_mask has 6 entries for 7 tokens"):
        token_products(first, second, torch.ones(6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weighted_by_its_outputs_an_error_is_relative(dtype):
    """Huge outputs do not overflow."""
    outputs = (torch.randn(2, 4, 300) * torch.tensor([0.1, 1.0, 20.0, 3e3])[:, None]).to(dtype)
    weights = relative_weights(outputs)
    assert weights.dtype == torch.float32
    energies = weights.double() * outputs.double().square().sum(-1)
    torch.testing.assert_close(energies, torch.ones(2, 4, dtype=torch.float64), rtol=1e-5, atol=0)


def test_tokens_without_outputs_do_not_decide_a_fit():
    outputs = torch.ones(6, 4)
    outputs[2], outputs[4] = 0, 1e-20
    weights = relative_weights(outputs)
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.25, 0.0, 0.25, 2500.0, 0.25]))
    assert relative_weights(torch.zeros(3, 4)).tolist() == [0, 0, 0]
    assert relative_weights(torch.zeros(0, 4)).tolist() == []


def test_padding_does_not_decide_which_tokens_count():
    """More padding than text, with huge outputs, such as those of attention sinks: its median is not the text's."""
    text, padding = torch.randn(2, 5, 8) * torch.rand(2, 5, 1), 1e4 * torch.randn(2, 9, 8)
    outputs, mask = torch.cat([padding, text], 1), torch.tensor([[0] * 9 + [1] * 5] * 2)
    assert torch.equal(relative_weights(outputs, mask)[:, 9:], relative_weights(text))


def test_long_sums_of_bf16_do_not_stall():
    """A bf16 running sum of ones stops at 256; these must count every token."""
    statistics = InputStatistics(2)
    for _ in range(40):
        statistics.update(torch.ones(100, 2, dtype=torch.bfloat16))
    assert statistics.sum.tolist() == [4000.0, 4000.0]
    torch.testing.assert_close(statistics.square_sum, torch.full((2,), 4000.0, dtype=torch.float64))


def test_reordered_is_what_reordered_inputs_give():
    inputs = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 0, 4, 1, 2])
    first, second = InputStatistics(5, gram=True), InputStatistics(5)
    first.update(inputs)
    second.update(inputs[:, order])
    moved = first.reordered(order)
    assert moved.tokens == second.tokens
    torch.testing.assert_close(moved.sum, second.sum)
    torch.testing.assert_close(moved.square_sum, second.square_sum)
    assert moved.gram is None


def test_bad_shapes_and_missing_tokens_are_named():
    statistics = InputStatistics(4)
    with pytest.raises(ValueError, match="3 channels, the statistics 4"):
        statistics.update(torch.ones(2, 3))
    with pytest.raises(ValueError, match="5 entries for 2 tokens"):
        statistics.update(torch.ones(2, 4), torch.ones(5))
    with pytest.raises(ValueError, match="no calibration token"):
        _ = statistics.mean


@pytest.mark.parametrize("channels", [1, 7, 513, 1030])
def test_the_gram_matrix_of_many_channels_is_whole_and_symmetric(channels):
    tokens = torch.randn(9, channels, generator=torch.Generator().manual_seed(0))
    found = InputStatistics(channels, gram=True)
    found.update(tokens[:4])
    found.update(tokens[4:])
    torch.testing.assert_close(found.gram.double(), tokens.double().T @ tokens.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.gram, found.gram.T)
