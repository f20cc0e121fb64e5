"""The points that a search tries in any case."""

import pytest
import yaml

from crepe_llm.recipe_files import recipe_path
from crepe_llm.search.known import known_points
from crepe_llm.search.space import Coefficients, Mask, SearchSpace


@pytest.mark.parametrize(
    ("recipe", "mask"),
    [
        ("crepe_2of4", Mask("2:4", 0.5)),
        ("crepe_4of8", Mask("4:8", 0.5)),
        ("crepe_unstructured_50", Mask("0:0", 0.7, "matrix")),
    ],
)
def test_shipped_coefficients_are_known(recipe, mask):
    [stage] = yaml.safe_load(recipe_path(recipe).read_text()).values()
    fields = stage["pruning_modifiers"]["CRePEModifier"]
    ratios = {name: fields[name] / fields["row"] for name in ("row", "column", "neighbourhood")}
    rest = {name: fields[name] for name in ("kernel_size", "activation_exponent")}
    assert Coefficients(**ratios, **rest) in known_points(mask)


@pytest.mark.parametrize("mask", [Mask("2:4", 0.5), Mask("0:0", 0.5)])
def test_known_points_lie_in_the_space(mask):
    space = SearchSpace()
    for point in known_points(mask):
        again = space.coefficients(space.point(point))
        assert again.of_score == pytest.approx(point.of_score)
