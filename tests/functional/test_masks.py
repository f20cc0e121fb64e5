import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm.functional.masks import (
    keep_mask,
    keep_n_of_m,
    keep_unstructured,
    nonzero,
    parse_mask_structure,
    prune_count,
)

# Few distinct values make ties common.
values = st.integers(0, 4).map(float) | st.floats(0, 10, width=32)


@st.composite
def matrices(draw, group=1):
    rows, columns = draw(st.integers(1, 6)), group * draw(st.integers(1, 6))
    data = draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(data).view(rows, columns)


def naive_keep(scores, count):
    """Prune `count` of a flat list: lowest score first, then lowest position."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    keep = [True] * len(scores)
    for i in order[:count]:
        keep[i] = False
    return keep


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([(2, 4), (4, 8), (1, 4), (3, 4), (1, 2), (5, 8), (9, 16), (7, 32)]))
def test_n_of_m_equals_sorting_every_group(data, structure):
    n, m = structure
    scores = data.draw(matrices(group=m))
    keep = keep_n_of_m(scores, n, m)
    expected = [
        naive_keep(row[start : start + m], n) for row in scores.tolist() for start in range(0, scores.shape[1], m)
    ]
    assert keep.view(-1, m).tolist() == expected


@settings(max_examples=300, deadline=None)
@given(matrices(), st.floats(0, 0.99))
def test_rows_and_matrices_prune_the_exact_count_lowest_first(scores, sparsity):
    columns = scores.shape[1]
    per_row = keep_unstructured(scores, sparsity, "row")
    assert per_row.tolist() == [naive_keep(row, prune_count(columns, sparsity)) for row in scores.tolist()]
    per_matrix = keep_unstructured(scores, sparsity, "matrix")
    assert per_matrix.flatten().tolist() == naive_keep(scores.flatten().tolist(), prune_count(scores.numel(), sparsity))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16, torch.float16])
def test_scores_that_fp32_does_not_tell_apart_are_ranked(dtype):
    size = 60
    steps = torch.randperm(size, generator=torch.Generator().manual_seed(0)).double()
    scores = {torch.float64: 1 + 1e-12 * steps, torch.int64: 2**40 + steps}.get(dtype, steps).to(dtype)[None]
    lowest = steps.argsort()[: size // 2]
    for group in ("row", "matrix"):
        keep = keep_unstructured(scores.requires_grad_(dtype.is_floating_point), 0.5, group)
        assert keep.sum() == size // 2 and not keep[0, lowest].any()


def test_all_equal_scores_lose_their_first_positions_only():
    assert keep_n_of_m(torch.ones(1, 4), 2, 4).tolist() == [[False, False, True, True]]
    assert keep_unstructured(torch.zeros(2, 5), 0.4, "matrix").tolist() == [[False] * 4 + [True], [True] * 5]


def test_non_contiguous_scores_are_read_right():
    scores = torch.rand(8, 12).T
    assert torch.equal(keep_n_of_m(scores, 2, 4), keep_n_of_m(scores.contiguous(), 2, 4))
    assert torch.equal(keep_unstructured(scores, 0.5), keep_unstructured(scores.contiguous(), 0.5))


@pytest.mark.parametrize(("numel", "sparsity", "count"), [(100, 0.29, 29), (10, 0.7, 7), (7, 0.5, 3), (5, 0.0, 0)])
def test_prune_count_is_the_floor_of_the_exact_product(numel, sparsity, count):
    assert prune_count(numel, sparsity) == count


def test_keep_mask_reads_recipe_names():
    scores = torch.rand(8, 32)
    assert torch.equal(keep_mask(scores, 0.5, "2:4"), keep_n_of_m(scores, 2, 4))
    assert torch.equal(keep_mask(scores, 0.3, "0:0", "matrix"), keep_unstructured(scores, 0.3, "matrix"))
    assert bool(keep_mask(scores, 0.0, "0:0").all())


@pytest.mark.parametrize("text", ["2", "2:4:8", "a:b", "4:2", "4:4", "0:4", "-1:4", "", "2:", "1.5:4"])
def test_unreadable_structures_are_refused(text):
    with pytest.raises(ValueError, match="mask_structure"):
        parse_mask_structure(text)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 2.0, math.nan])
def test_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match="sparsity="):
        keep_unstructured(torch.rand(2, 4), sparsity)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="6 input channels cannot be cut into groups of 4"):
        keep_n_of_m(torch.rand(2, 6), 2, 4)
    with pytest.raises(ValueError, match="NaN"):
        keep_n_of_m(torch.tensor([[1.0, math.nan, 2.0, 3.0]]), 2, 4)
    with pytest.raises(ValueError, match='comparison_group="column"'):
        keep_unstructured(torch.rand(2, 4), 0.5, "column")


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.float8_e4m3fn]
)
def test_zeros_of_both_signs_are_not_kept(dtype):
    weight = torch.tensor([[0.0, -0.0, 1.0, -2.0], [3.0, 0.0, -0.0, 0.0]]).to(dtype)
    expected = torch.tensor([[False, False, True, True], [True, False, False, False]])
    assert torch.equal(nonzero(weight), expected)
    assert torch.equal(nonzero(weight.t()), expected.t())
