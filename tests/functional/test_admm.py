"""ADMM against a naive loop in fp64, and what it promises."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm.functional.admm import ADMMOptions, admm
from crepe_llm.functional.compensation import conjugate_gradients, output_error
from crepe_llm.functional.masks import keep_mask
from crepe_llm.functional.scores import wanda_scores


def a_layer(seed=0, rows=12, columns=32, tokens=300, dtype=torch.float32):
    """Inputs of few factors and some noise, as those of language models are."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(tokens, 6, generator=generator) @ torch.randn(6, columns, generator=generator)
    inputs = factors + 0.5 * torch.randn(tokens, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator).to(dtype), inputs.T @ inputs


def chosen_by_wanda(gram, sparsity, structure="0:0", group="row"):
    norm = gram.diagonal().sqrt()
    return lambda weight: wanda_scores(weight, norm), lambda scores: keep_mask(scores, sparsity, structure, group)


def naive(dense, gram, scores, mask, *, dampening, penalty, rounds, iterations):
    """The docstring's iteration in fp64, with a matrix inverse and sorted scores; the weights before refinement."""
    gram, dense = gram.double(), dense.double()
    norms = torch.tensor([float(value) ** 0.5 or 1.0 for value in gram.diagonal()], dtype=torch.float64)
    hessian = torch.zeros_like(gram)
    for i in range(len(gram)):
        for j in range(len(gram)):
            hessian[i, j] = 1 + dampening if i == j else gram[i, j] / (norms[i] * norms[j])
    inverse = torch.linalg.inv(hessian + penalty * torch.eye(len(gram), dtype=torch.float64))
    start = dense * norms
    weight, dual = start, torch.zeros_like(start)
    for t in range(1, iterations + 1):
        if t <= rounds:
            found = scores(((weight + dual) / norms).float())
            final = mask(found)
            keep = torch.ones_like(final)
            lost = [(float(found[i, j]), i, j) for i, j in (~final).nonzero().tolist()]
            for _, i, j in sorted(lost)[: int(len(lost) * (1 - (1 - t / rounds) ** 3) + 1e-9)]:
                keep[i, j] = False
        masked = (weight + dual) * keep
        dual = weight + dual - masked
        weight = (start @ hessian + penalty * (masked - dual)) @ inverse
    return keep, masked / norms


@pytest.mark.parametrize(("sparsity", "structure"), [(0.5, "2:4"), (0.7, "0:0")])
@pytest.mark.parametrize(("rounds", "iterations"), [(1, 1), (1, 4), (4, 6), (15, 20)])
def test_admm_by_loops(sparsity, structure, rounds, iterations):
    weight, gram = a_layer()
    choose = chosen_by_wanda(gram, sparsity, structure)
    fields = {"dampening": 0.05, "penalty": 0.7, "rounds": rounds, "iterations": iterations}
    keep, expected = naive(weight, gram, *choose, **fields)
    alternated = admm(weight, gram, *choose, ADMMOptions(**fields, refinement=0))
    assert torch.equal(alternated.keep, keep)
    torch.testing.assert_close(alternated.weight, expected.float(), rtol=1e-3, atol=1e-3)
    found = admm(weight, gram, *choose, ADMMOptions(**fields))
    assert torch.equal(found.keep, keep)
    # From the same start: where a row's conjugate gradients stop depends on the last digits of it.
    refined = conjugate_gradients(weight, keep, gram, start=alternated.weight, dampening=0.05)
    assert torch.equal(found.weight, refined)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 9),
    groups=st.integers(1, 6),
    tokens=st.integers(1, 40),
    sparsity=st.floats(0, 0.95),
    structure=st.sampled_from(["2:4", "3:4", "0:0"]),
    group=st.sampled_from(["row", "matrix"]),
    rounds=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_masks_are_exact_and_nothing_becomes_nan(
    seed, rows, groups, tokens, sparsity, structure, group, rounds, dtype
):  # fmt: skip
    weight, gram = a_layer(seed, rows, 4 * groups, tokens, dtype=dtype)
    gram[:, 1], gram[1] = 0, 0  # a dead channel
    before = weight.clone(), gram.clone()
    choose = chosen_by_wanda(gram, sparsity, structure, group)
    found = admm(weight, gram, *choose, ADMMOptions(rounds=rounds, iterations=8))
    assert found.weight.dtype == torch.float32 and found.weight.shape == weight.shape
    assert bool(found.weight.isfinite().all()) and bool((found.weight[~found.keep] == 0).all())
    counts = keep_mask(torch.rand(weight.shape), sparsity, structure, group)
    if structure != "0:0":
        assert torch.equal(found.keep.view(rows, -1, 4).sum(2), counts.view(rows, -1, 4).sum(2))
    elif group == "row":
        assert torch.equal(found.keep.sum(1), counts.sum(1))
    else:
        assert int(found.keep.sum()) == int(counts.sum())
    again = admm(weight, gram, *choose, ADMMOptions(rounds=rounds, iterations=8))
    assert torch.equal(found.keep, again.keep) and torch.equal(found.weight, again.weight)
    assert all(torch.equal(one, other) for one, other in zip(before, (weight, gram), strict=True))


@pytest.mark.parametrize(("sparsity", "structure"), [(0.5, "2:4"), (0.8, "0:0")])
def test_outputs_come_closer_than_with_the_best_weights_on_the_first_mask(sparsity, structure):
    ratios = []
    for seed in range(10):
        weight, gram = a_layer(seed, rows=32, columns=64)
        scores, mask = chosen_by_wanda(gram, sparsity, structure)
        fixed = conjugate_gradients(weight, mask(scores(weight)), gram, iterations=100, tolerance=1e-6)
        found = admm(weight, gram, scores, mask)
        ratios.append(float(output_error(weight, found.weight, gram).sum() / output_error(weight, fixed, gram).sum()))
    assert max(ratios) < 1 and sum(ratios) / len(ratios) < 0.97, ratios


def test_a_full_mask_leaves_the_weights():
    weight, gram = a_layer()
    found = admm(weight, gram, *chosen_by_wanda(gram, 0.0))
    assert bool(found.keep.all())
    torch.testing.assert_close(found.weight, weight, rtol=1e-4, atol=1e-4)


def test_the_mask_follows_the_weights():
    """What seemed to be worth keeping in the dense weight is not what is kept, round after round."""
    weight, gram = a_layer(rows=64, columns=64)
    scores, mask = chosen_by_wanda(gram, 0.7)
    masks = []

    def watched(found):
        masks.append(mask(found))
        return masks[-1]

    keep = admm(weight, gram, scores, watched, ADMMOptions(rounds=6)).keep
    assert len(masks) == 6 and torch.equal(masks[-1], keep)
    assert torch.equal(masks[0], mask(scores(weight)))
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(masks))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"penalty": 0.0}, r"penalty=0\.0 must be positive"),
        ({"dampening": -1.0}, r"dampening=-1\.0 not negative"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"rounds": 9, "iterations": 8}, "rounds=9 must be at least 1 and at most iterations=8"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ADMMOptions(**fields)


def test_shapes_that_do_not_fit_are_refused():
    weight, gram = a_layer()
    with pytest.raises(ValueError, match=r"gram \[8, 8\] must be \[d_in, d_in\]"):
        admm(weight, gram[:8, :8], *chosen_by_wanda(gram, 0.5))


def test_an_indefinite_gram_matrix_is_an_error():
    weight, gram = a_layer()
    gram[0, 1] = gram[1, 0] = 1e9
    with pytest.raises(torch.linalg.LinAlgError):
        admm(weight, gram, *chosen_by_wanda(gram, 0.5))
