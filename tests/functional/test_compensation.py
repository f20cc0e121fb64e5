"""Weight updates under a fixed mask, against naive loops, exact solutions and what they promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm.functional.compensation import (
    asymmetric_target,
    conjugate_gradients,
    energy_compensation,
    mean_compensation,
    output_error,
    sparsegpt_update,
)
from crepe_llm.functional.masks import keep_n_of_m, keep_unstructured
from crepe_llm.functional.scores import wanda_scores


def layer(seed=0, rows=6, columns=16, tokens=64, dead=()):
    """Correlated inputs, so that there is something for kept weights to make up for."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator)
    inputs = inputs @ torch.randn(columns, columns, generator=generator) + inputs.abs()
    inputs[:, list(dead)] = 0
    weight = torch.randn(rows, columns, generator=generator)
    return weight, inputs.T @ inputs, inputs


CORRECTIONS = {
    "energy": lambda weight, keep, gram, **fields: energy_compensation(weight, keep, **fields),
    # Any means do that have no larger squares than the inputs.
    "mean": lambda weight, keep, gram: mean_compensation(
        weight, keep, gram.diagonal().sqrt() / 2, gram.diagonal() * 3 / 4
    ),
    "sparsegpt": sparsegpt_update,
    "pcg": conjugate_gradients,
}
every_correction = pytest.mark.parametrize("correct", CORRECTIONS.values(), ids=CORRECTIONS)


def test_output_error_is_the_squared_distance_of_the_outputs():
    weight, gram, inputs = layer()
    changed = weight * keep_n_of_m(weight.abs(), 2, 4)
    expected = ((inputs @ weight.T - inputs @ changed.T) ** 2).sum(0)
    torch.testing.assert_close(output_error(weight, changed, gram), expected, rtol=1e-4, atol=1e-3)
    assert bool((output_error(weight, weight, gram) == 0).all())


def test_the_asymmetric_target_is_the_least_squares_solution():
    """All of it, undamped: no weight has outputs on the given inputs closer to the dense layer's on its own."""
    weight, gram, inputs = layer()
    own = inputs + 0.3 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(5))
    expected = torch.linalg.lstsq(inputs.double(), own.double() @ weight.double().T).solution.T
    found = asymmetric_target(weight, gram, own.T @ inputs, share=1.0, dampening=1e-7)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)
    part = asymmetric_target(weight, gram, own.T @ inputs, share=0.25, dampening=1e-7)
    torch.testing.assert_close(part, weight + 0.25 * (found - weight))


def test_the_asymmetric_target_is_damped_towards_the_weight():
    """By the normal equations of what the docstring says is minimised."""
    weight, gram, inputs = layer()
    own = inputs.roll(1, 0)
    damping = 0.05 * gram.diagonal().mean()
    found = asymmetric_target(weight, gram, own.T @ inputs, share=1.0, dampening=0.05)
    gradient = (found @ inputs.T - weight @ own.T) @ inputs + damping * (found - weight)
    assert float(gradient.norm() / (weight @ own.T @ inputs).norm()) < 1e-4


@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=25, deadline=None)
def test_without_an_error_in_the_inputs_the_asymmetric_target_is_the_weight(seed, share, dtype):
    weight, gram, _ = layer(seed, dead=[3])
    weight = weight.to(dtype)
    before = gram.clone()
    assert torch.equal(asymmetric_target(weight, gram, gram, share=share), weight.float())
    assert torch.equal(asymmetric_target(weight, gram, gram.flip(0), share=0.0), weight.float())
    assert torch.equal(gram, before)


@every_correction
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 7),
    columns=st.integers(1, 24),
    tokens=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_masks_are_kept_and_nothing_becomes_nan(correct, seed, rows, columns, tokens, dtype):
    weight, gram, _ = layer(seed, rows, columns, tokens)
    weight = weight.to(dtype)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    before = weight.clone(), keep.clone(), gram.clone()
    corrected = correct(weight, keep, gram)
    assert corrected.dtype == torch.float32 and corrected.shape == weight.shape
    assert bool(corrected.isfinite().all())
    assert bool((corrected[~keep] == 0).all())
    assert torch.equal(corrected, correct(weight, keep, gram))
    assert all(torch.equal(one, other) for one, other in zip(before, (weight, keep, gram), strict=True))


@every_correction
def test_inputs_that_are_all_zero_leave_the_kept_weights_finite(correct):
    weight, gram, _ = layer()
    keep = keep_n_of_m(weight.abs(), 2, 4)
    corrected = correct(weight, keep, torch.zeros_like(gram))
    assert bool(corrected.isfinite().all())
    if correct is not CORRECTIONS["energy"]:
        assert torch.equal(corrected, weight * keep)


@pytest.mark.parametrize("seed", range(10))
def test_second_order_updates_lower_the_output_error(seed):
    """On inputs of few factors and some noise, as those of language models are, and masks that look at them."""
    weight, _, noise = layer(seed, rows=8, columns=64, tokens=400)
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(400, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    inputs = factors + 0.5 * noise / noise.std()
    gram = inputs.T @ inputs
    scores = wanda_scores(weight, gram.diagonal().sqrt())
    for keep in (keep_n_of_m(scores, 2, 4), keep_unstructured(scores, 0.7)):
        masked, column_by_column, least_squares = (
            output_error(weight, changed, gram).sum()
            for changed in (
                weight * keep,
                sparsegpt_update(weight, keep, gram),
                conjugate_gradients(weight, keep, gram),
            )
        )
        assert column_by_column < 0.9 * masked
        assert least_squares < 0.5 * column_by_column


def exact(weight, keep, gram, dampening):
    """Row by row, the normal equations on the support in fp64."""
    hessian = gram.double() + dampening * gram.diagonal().double().mean() * torch.eye(len(gram), dtype=torch.float64)
    solution = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(keep):
        right = hessian[kept] @ weight[row].double()
        solution[row, kept] = torch.linalg.solve(hessian[kept][:, kept], right)
    return solution


def test_conjugate_gradients_reach_the_least_squares_solution():
    weight, gram, _ = layer(columns=24, tokens=300)
    keep = keep_unstructured(weight.abs(), 0.6)
    found = conjugate_gradients(weight, keep, gram, dampening=0.05, iterations=100, tolerance=1e-7)
    torch.testing.assert_close(found.double(), exact(weight, keep, gram, 0.05), rtol=1e-3, atol=1e-3)


def test_every_iteration_of_conjugate_gradients_lowers_every_row():
    weight, gram, _ = layer(columns=24, tokens=300)
    keep = keep_n_of_m(weight.abs(), 2, 4)
    dampened = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    error = output_error(weight, weight * keep, dampened)
    for iterations in range(1, 12):
        solution = conjugate_gradients(weight, keep, gram, iterations=iterations, tolerance=1e-4)
        following = output_error(weight, solution, dampened)
        assert bool((following <= error * (1 + 1e-4)).all())
        error = following


def test_sparsegpt_is_optimal_column_by_column():
    """What the update does, by its definition: after each column is pruned, the later ones are refitted exactly."""
    weight, gram, _ = layer(columns=12, tokens=200)
    keep = keep_n_of_m(weight.abs(), 2, 4)
    hessian = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(12, dtype=torch.float64)
    work = weight.double()
    for column in range(12):
        lost = torch.where(keep[:, column], 0, work[:, column])
        work[:, column] -= lost
        later = slice(column + 1, 12)
        # The change d of the later columns with the least (-lost, d) H (-lost, d)^T.
        work[:, later] += lost[:, None] * torch.linalg.solve(hessian[later, later], hessian[later, column])
    for block_size in (1, 5, 128):
        found = sparsegpt_update(weight, keep, gram, block_size=block_size)
        torch.testing.assert_close(found.double(), work, rtol=1e-3, atol=1e-3)


def naive_energy(weight, keep, low, high, epsilon=1e-8):
    original, changed = weight.double(), weight.double() * keep
    for axis in (1, 0):
        lines = original.T if axis else original
        current = (changed.T if axis else changed).clone()
        for index, line in enumerate(lines):
            mean = line.mean()
            energy = sum((value - mean) ** 2 for value in line)
            left = sum((value - mean) ** 2 for value in current[index])
            scale = min(high, max(low, (energy / (left + epsilon * energy)) ** 0.5)) if energy else 1.0
            current[index] = (current[index] - mean) * scale + mean
        changed = (current.T if axis else current) * keep
    return changed


@pytest.mark.parametrize("clamp", [(0.5, 2.0), (0.9, 1.05)])
def test_energy_compensation_by_loops(clamp):
    weight, _, _ = layer(rows=9, columns=12)
    weight[:, 4] = 1.5
    keep = keep_unstructured(weight.abs(), 0.6)
    found = energy_compensation(weight, keep, clamp=clamp)
    torch.testing.assert_close(found.double(), naive_energy(weight, keep, *clamp), rtol=1e-4, atol=1e-5)


def test_energy_of_rows_is_matched_where_means_are_zero():
    """With a zero mean the mask takes nothing back, so the row step, the last one, restores the energies."""
    weight, _, _ = layer(rows=8, columns=40)
    weight -= weight.mean(1, keepdim=True)
    keep = keep_unstructured(weight.abs(), 0.25, "matrix")
    found = energy_compensation(weight, keep)
    torch.testing.assert_close(found.square().sum(1), weight.square().sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dampening", [0.01, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_compensation_is_least_squares_without_covariances(dampening, dtype):
    weight, _, inputs = layer(rows=9, columns=24, tokens=100, dead=[3])
    weight = weight.to(dtype)
    inputs[:, 7] = 2  # which has a mean only
    mean, variance = inputs.double().mean(0), inputs.double().var(0, correction=0)
    damping = dampening * inputs.double().square().mean()
    gram = torch.diag(variance + damping) + mean.outer(mean)
    for keep in (keep_n_of_m(weight.float().abs(), 2, 4), keep_unstructured(weight.float().abs(), 0.7)):
        found = mean_compensation(weight, keep, mean, variance, dampening=dampening)
        torch.testing.assert_close(found.double(), exact(weight, keep, gram, 0.0), rtol=1e-4, atol=1e-4)


def test_mean_compensation_restores_means_and_lowers_the_error():
    """Of inputs that do not vary together, which are what it takes them for."""
    weight, _, _ = layer(rows=9, columns=32)
    inputs = torch.randn(4000, 32, generator=torch.Generator().manual_seed(1)) + 2
    mean, variance, gram = inputs.mean(0), inputs.var(0, correction=0), inputs.T @ inputs
    keep = keep_unstructured(weight.abs(), 0.5)
    found = mean_compensation(weight, keep, mean, variance)
    lost, left = ((weight - changed) @ mean for changed in (weight * keep, found))
    assert bool((left.abs() < 0.05 * lost.abs()).all())
    best = conjugate_gradients(weight, keep, gram, iterations=50)
    before, after, least = (output_error(weight, changed, gram) for changed in (weight * keep, found, best))
    assert bool((after < before).all()) and bool((after < 1.02 * least).all())


def test_mean_compensation_does_nothing_without_means_or_with_nothing_pruned():
    weight, _, inputs = layer()
    keep = keep_n_of_m(weight.abs(), 2, 4)
    variance = inputs.var(0, correction=0)
    assert torch.equal(mean_compensation(weight, keep, torch.zeros(16), variance), weight * keep)
    everything = torch.ones_like(keep)
    assert torch.equal(mean_compensation(weight, everything, inputs.mean(0), variance), weight)
    assert not mean_compensation(weight, ~everything, inputs.mean(0), variance).any()


def test_an_all_pruned_column_stays_pruned_and_scales_are_clamped():
    weight, _, _ = layer(rows=8, columns=40)
    weight -= weight.mean(1, keepdim=True)
    keep = torch.ones_like(weight, dtype=torch.bool)
    keep[2, 1:] = False
    keep[:, 5] = False
    found = energy_compensation(weight, keep)
    # Column 0 has lost nothing, so only the row step changes what is left of row 2.
    torch.testing.assert_close(found[2, 0], 2 * weight[2, 0])
    assert bool((found[:, 5] == 0).all())


def test_an_indefinite_gram_matrix_is_an_error():
    weight, gram, _ = layer()
    with pytest.raises(torch.linalg.LinAlgError):
        sparsegpt_update(weight, weight > 0, -gram)
    with pytest.raises(torch.linalg.LinAlgError):
        asymmetric_target(weight, -gram, gram, share=1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, k, g: sparsegpt_update(w, k, g[:4, :4]), r"gram must be \[d_in, d_in\], \[16, 16\]"),
        (lambda w, k, g: conjugate_gradients(w, k[:2], g), r"\[6, 16\].*\[2, 16\] must both be"),
        (lambda w, k, g: asymmetric_target(w, g, g[:4], share=1.0), r"gram must be .* got \[4, 16\]"),
        (lambda w, k, g: output_error(w[0], w[0], g), r"must both be \[d_out, d_in\]"),
        (lambda w, k, g: energy_compensation(w, k, clamp=(2.0, 0.5)), "clamp=.*the smaller first"),
        (lambda w, k, g: mean_compensation(w, k, g[0, :4], g[0]), r"mean must be \[d_in\], \[16\], got \[4\]"),
        (lambda w, k, g: mean_compensation(w, k, g[0], g), r"variance must be \[d_in\], \[16\], got \[16, 16\]"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    weight, gram, _ = layer()
    with pytest.raises(ValueError, match=message):
        call(weight, weight > 0, gram)
