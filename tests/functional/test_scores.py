import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm.functional.masks import keep_n_of_m, keep_unstructured
from crepe_llm.functional.scores import (
    crepe_scores,
    cvr_scores,
    magnitude_scores,
    wanda_scores,
    window_mean,
)

shapes = st.tuples(st.integers(1, 9), st.integers(1, 12))
coefficients = st.fixed_dictionaries(
    {
        "row": st.floats(0.1, 4),
        "column": st.floats(0, 4),
        "neighbourhood": st.floats(0, 4),
        "kernel_size": st.sampled_from([1, 3, 5, 9, 25]),
        "activation_exponent": st.floats(0, 1.5),
    }
)


def layer(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    return weight, torch.rand(shape[1], generator=generator) * 3


def naive_window_mean(values, kernel_size):
    half = kernel_size // 2
    rows, columns = values.shape
    means = torch.empty_like(values)
    for i in range(rows):
        for j in range(columns):
            means[i, j] = values[
                max(0, i - half) : min(rows, i + half + 1), max(0, j - half) : min(columns, j + half + 1)
            ].mean()
    return means


def naive_crepe(weight, norm, row, column, neighbourhood, kernel_size, activation_exponent):
    """The formula entry by entry, in fp64; 0/0 counts as 0."""
    a = weight.double().abs()
    means = naive_window_mean(a, kernel_size)
    scores = torch.zeros_like(a)
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            if a[i, j] == 0:
                continue
            relative = row * a[i, j] / a[i].sum() + column * a[i, j] / a[:, j].sum()
            relative += neighbourhood * a[i, j] / (math.sqrt(a.numel()) * means[i, j])
            scores[i, j] = relative * norm[j].double() ** activation_exponent
    return scores


@settings(max_examples=150, deadline=None)
@given(shapes, coefficients, st.integers(0, 10**6))
def test_crepe_equals_the_formula(shape, fields, seed):
    weight, norm = layer(shape, seed)
    expected = naive_crepe(weight, norm, **fields)
    torch.testing.assert_close(crepe_scores(weight, norm, **fields).double(), expected, rtol=1e-5, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(0, 1.5), st.integers(0, 10**6))
def test_ria_is_crepe_without_neighbourhood(shape, exponent, seed):
    weight, norm = layer(shape, seed)
    a = weight.abs().double()
    expected = (a / a.sum(dim=1, keepdim=True) + a / a.sum(dim=0)) * norm.double() ** exponent
    crepe = crepe_scores(weight, norm, row=1, column=1, neighbourhood=0, activation_exponent=exponent)
    torch.testing.assert_close(crepe.double(), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_wanda_is_crepe_with_the_row_term_within_rows_and_groups(seed):
    weight, norm = layer((24, 64), seed)
    crepe = crepe_scores(weight, norm, row=1, column=0, neighbourhood=0, activation_exponent=1)
    wanda = wanda_scores(weight, norm)
    torch.testing.assert_close(wanda, weight.abs() * norm)
    assert torch.equal(keep_n_of_m(crepe, 2, 4), keep_n_of_m(wanda, 2, 4))
    assert torch.equal(keep_unstructured(crepe, 0.6, "row"), keep_unstructured(wanda, 0.6, "row"))


@pytest.mark.parametrize("seed", range(5))
def test_row_term_alone_without_activations_is_magnitude_within_rows(seed):
    weight, norm = layer((24, 64), seed)
    crepe = crepe_scores(weight, norm, row=1, column=0, neighbourhood=0, activation_exponent=0)
    assert torch.equal(keep_unstructured(crepe, 0.5), keep_unstructured(magnitude_scores(weight), 0.5))


def test_kernel_of_one_adds_a_constant():
    weight, norm = layer((8, 12))
    with_constant = crepe_scores(weight, norm, neighbourhood=2.0, kernel_size=1, activation_exponent=0)
    without = crepe_scores(weight, norm, neighbourhood=0.0, activation_exponent=0)
    torch.testing.assert_close(with_constant - without, torch.full_like(without, 2 / math.sqrt(8 * 12)))


def test_kernel_beyond_the_layer_compares_with_the_mean_of_the_matrix():
    weight, norm = layer((8, 12))
    huge = crepe_scores(weight, norm, row=0, column=0, kernel_size=99, activation_exponent=0)
    torch.testing.assert_close(huge, weight.abs() / weight.abs().mean() / math.sqrt(8 * 12))


@settings(max_examples=150, deadline=None)
@given(shapes, st.sampled_from([1, 3, 5, 7, 31, 101]), st.integers(0, 10**6))
def test_window_mean_equals_loops(shape, kernel_size, seed):
    values = layer(shape, seed)[0].abs()
    torch.testing.assert_close(
        window_mean(values, kernel_size).double(), naive_window_mean(values.double(), kernel_size), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("kernel_size", [3, 31])
def test_window_mean_of_a_large_layer_is_accurate(kernel_size):
    values = layer((1500, 2300))[0].abs()
    half = kernel_size // 2
    exact = torch.nn.functional.avg_pool2d(
        values.double()[None, None], kernel_size, stride=1, padding=half, count_include_pad=False
    )
    torch.testing.assert_close(window_mean(values, kernel_size).double(), exact[0, 0], rtol=1e-5, atol=0)


def test_a_layer_of_subnormal_weights_still_has_finite_scores():
    weight = torch.full((4, 8), 1e-41)
    assert bool(crepe_scores(weight, torch.ones(8)).isfinite().all())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"row": -1.0}, r"row=-1\.0"),
        ({"column": float("nan")}, "column=nan"),
        ({"neighbourhood": float("inf")}, "neighbourhood=inf"),
        ({"activation_exponent": -0.5}, r"activation_exponent=-0\.5"),
        ({"row": 0.0, "column": 0.0, "neighbourhood": 0.0}, "all 0"),
        ({"row": 0.0, "column": 0.0, "kernel_size": 1}, "kernel_size=1 .* all scores would be alike"),
        ({"kernel_size": 4}, "kernel_size=4 must be odd.*use 3 or 5"),
        ({"kernel_size": 0}, "kernel_size=0"),
        ({"kernel_size": -3}, "kernel_size=-3"),
    ],
)
def test_impossible_coefficients_are_named(fields, message):
    weight, norm = layer((4, 8))
    with pytest.raises(ValueError, match=message):
        crepe_scores(weight, norm, **fields)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\[12\].*got \[8\]"):
        crepe_scores(torch.ones(4, 12), torch.ones(8))
    with pytest.raises(ValueError, match=r"matrix \[d_out, d_in\]"):
        magnitude_scores(torch.ones(3))
    with pytest.raises(ValueError, match=r"at least one entry, got torch.float32 \[8, 0\]"):
        crepe_scores(torch.ones(8, 0), torch.ones(0))
    with pytest.raises(ValueError, match="int8"):
        magnitude_scores(torch.ones(3, 4, dtype=torch.int8))


def test_peak_memory_is_at_most_three_copies():
    """Measured in a process of its own, whose peak of resident memory Linux lets us reset."""
    program = """
import torch
from crepe_llm.functional.scores import crepe_scores

def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

crepe_scores(torch.randn(64, 64), torch.ones(64), kernel_size=31)
weight, norm = torch.randn(2048, 6144), torch.ones(6144)
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
crepe_scores(weight, norm, kernel_size=31)
print((resident("VmHWM") - before) / (weight.numel() * 4))
"""
    copies = float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
    assert 1.0 < copies <= 3.0


@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(0, 2), st.integers(0, 10**6))
def test_cvr_equals_the_formula_up_to_a_factor(shape, alpha, seed):
    weight, variance = layer((shape[0] + 1, shape[1]), seed)
    columns = [sum((v - sum(c) / len(c)) ** 2 for v in c) / len(c) for c in weight.double().T.tolist()]
    mean = sum(columns) / len(columns)
    expected = torch.tensor(
        [
            [abs(w) * (v + 1e-8 * mean) ** (-alpha / 2) * u**0.25 for w, v, u in zip(row, columns, us, strict=True)]
            for us in [variance.double().tolist()]
            for row in weight.double().tolist()
        ]
    )
    found = cvr_scores(weight, variance, alpha=alpha) * mean ** (-alpha / 2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("exponent", [-100, 100])
def test_cvr_ranks_alike_whatever_the_scale(exponent):
    weight, variance = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)), torch.rand(12)
    found = cvr_scores(torch.ldexp(weight, torch.tensor(exponent)), variance)
    assert torch.equal(torch.ldexp(found, torch.tensor(-exponent)), cvr_scores(weight, variance))


def test_cvr_of_constant_columns_is_finite():
    for weight in (torch.ones(3, 4), torch.zeros(3, 4), torch.tensor([[1.0, 2.0]])):
        for alpha in (1, 9):
            assert bool(cvr_scores(weight, torch.ones(weight.shape[1]), alpha=alpha).isfinite().all())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": -1.0}, r"alpha=-1\.0"),
        ({"epsilon": 0.0}, r"epsilon=0\.0 must be a finite pos"),
        ({"alpha": 9.1}, r"alpha=9\.1 with epsilon=1e-08 makes scores that fp32 cannot hold: use at most 9\.0"),
    ],
)
def test_bad_cvr_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        cvr_scores(torch.ones(2, 2), torch.ones(2), **fields)
