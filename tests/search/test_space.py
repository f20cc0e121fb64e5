import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crepe_llm.search.space import RIA, Coefficients, Mask, SearchSpace


def test_coefficients_are_checked():
    with pytest.raises(ValueError, match="kernel_size=4"):
        Coefficients(1, 1, 1, 4, 0.5)
    with pytest.raises(ValueError, match="comparison_group='rows' must be one of row, matrix"):
        Coefficients(1, 1, 1, 3, 0.5, "rows")
    assert str(RIA) == "row 1, column 1, neighbourhood 0, kernel 3, exponent 0.5"


@pytest.mark.parametrize(
    ("mask", "message"),
    [(("2:2", 0.5), "0 < N < M"), (("0:0", 1.5), "sparsity=1.5"), (("0:0", 0.5, "rows"), "comparison_group")],
)
def test_masks_are_checked(mask, message):
    with pytest.raises(ValueError, match=message):
        Mask(*mask)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.sampled_from([0, 1, 2, 3, 4, 5, 6]))
def test_points_and_coefficients_are_inverse(point, kernel):
    space = SearchSpace()
    point = [*point, kernel / 6]
    candidate = space.coefficients(point)
    assert space.point(candidate) == pytest.approx(point, abs=1e-9)
    assert space.column[0] * 0.999999 <= candidate.column <= space.column[1] * 1.000001
    assert candidate.kernel_size == space.kernel_sizes[kernel]


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.sampled_from(["row", "matrix"]))
def test_the_comparison_group_is_an_axis_where_there_is_a_choice(point, group):
    space = SearchSpace(comparison_groups=("row", "matrix"))
    assert space.axes == 5 and space.varying() == [0, 1, 2, 3, 4] and space.dimensions == 5
    candidate = space.coefficients([*point, 0.5, float(group == "matrix")])
    assert candidate.comparison_group == group and str(candidate).endswith(f", per {group}")
    assert space.point(candidate)[4] == float(group == "matrix")
    assert candidate.fields == candidate.of_score | {"comparison_group": group}
    assert SearchSpace().coefficients([*point, 0.5]).fields == candidate.of_score
    assert space.competing(candidate, "row") == candidate
    assert space.competing(RIA, group).comparison_group == group
    assert SearchSpace().competing(candidate, group).comparison_group is None


@pytest.mark.parametrize("group", ["row", "matrix"])
def test_a_candidates_own_group_counts(group):
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    kept = Mask("0:0", 0.5, "row" if group == "matrix" else "matrix").keep(
        scores, dataclasses.replace(RIA, comparison_group=group)
    )
    assert kept.sum(1).tolist() == ([2, 2] if group == "row" else [0, 4])


def test_point_uses_ratios_and_clips():
    space = SearchSpace()
    assert space.point(Coefficients(1, 2, 3, 9, 0.7)) == pytest.approx(space.point(Coefficients(10, 20, 30, 9, 0.7)))
    assert space.point(RIA)[1] == 0  # no neighbourhood
    assert space.point(Coefficients(0, 1, 1, 3, 5))[:3] == [1, 1, 1]
    assert space.coefficients([-1, 2, 0.5, 9]) == space.coefficients([0, 1, 0.5, 1])


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"column": (2.0, 1.0)}, r"column=\(2.0, 1.0\) is empty"),
        ({"neighbourhood": (0.0, 1.0)}, r"neighbourhood=.* must be positive"),
        ({"activation_exponent": (0.1, math.nan)}, "two finite numbers"),
        ({"activation_exponent": (-0.1, 1.0)}, "must be positive"),
        ({"kernel_sizes": ()}, "kernel_sizes"),
        ({"kernel_sizes": (3, 4)}, "odd"),
        ({"kernel_sizes": (5, 3)}, "ascending"),
        ({"row": 0.0}, "row=0.0"),
        ({"comparison_groups": ("row",)}, "comparison_groups=.* must be row and matrix, or none"),
        (
            {
                "column": (1.0, 1.0),
                "neighbourhood": (1.0, 1.0),
                "activation_exponent": (1.0, 1.0),
                "kernel_sizes": (3,),
            },
            "nothing to search",
        ),
    ],
)
def test_bad_spaces_are_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace(**bounds)
