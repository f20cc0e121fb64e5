import math

import pytest
import torch
from hypothesis import given, settings

from crepe_llm.functional.gini import gini_index
from crepe_llm.functional.masks import keep_mask
from crepe_llm.functional.scores import crepe_scores
from crepe_llm.search.fitness import PROXIES, LayerSample, evaluate, prune, sample_layers
from crepe_llm.search.space import RIA, Coefficients, Mask
from searches import COEFFICIENTS, KERNELS, TWO_OF_FOUR, layer, sample


@settings(deadline=None)
@given(COEFFICIENTS)
def test_sampled_scores_are_those_of_the_whole_layer(candidate):
    weight, inputs = layer()
    part = sample(rows=10)
    whole = crepe_scores(weight, inputs.norm(dim=0), **candidate.of_score)
    torch.testing.assert_close(part.scores(candidate), whole[part.rows], rtol=1e-5, atol=0)


def test_zero_rows_columns_and_inputs_give_finite_scores():
    weight, inputs = layer()
    weight[3] = 0
    weight[:, 5] = 0
    inputs[:, 7] = 0
    part = LayerSample("p", weight, inputs.norm(dim=0), inputs.T @ inputs, rows=24, kernel_sizes=KERNELS, seed=0)
    for proxy in PROXIES.values():
        assert math.isfinite(evaluate([part], RIA, TWO_OF_FOUR, proxy))


def test_rows_are_drawn_by_name_and_seed():
    weight, inputs = layer(d_out=500)

    def rows(name, seed):
        return LayerSample(name, weight, inputs.norm(dim=0), rows=20, kernel_sizes=(3,), seed=seed).rows.tolist()

    assert rows("a", 0) == rows("a", 0) == sorted(set(rows("a", 0)))
    assert rows("a", 0) != rows("a", 1)
    assert rows("a", 0) != rows("b", 0)
    assert len(rows("a", 0)) == 20


def test_layer_sample_refuses_what_does_not_fit():
    weight, inputs = layer()
    norm = inputs.norm(dim=0)
    with pytest.raises(ValueError, match="rows=0"):
        LayerSample("p", weight, norm, rows=0, kernel_sizes=(3,), seed=0)
    with pytest.raises(ValueError, match=r"input_norm of p .* expected \[32\]"):
        LayerSample("p", weight, norm[:-1], rows=4, kernel_sizes=(3,), seed=0)
    with pytest.raises(ValueError, match="gram of p"):
        LayerSample("p", weight, norm, torch.eye(3), rows=4, kernel_sizes=(3,), seed=0)
    part = LayerSample("p", weight, norm, rows=4, kernel_sizes=(3,), seed=0)
    with pytest.raises(ValueError, match=r"kernel_size=7 is not among .* \[3\]"):
        part.scores(Coefficients(1, 1, 1, 7, 0.5))
    with pytest.raises(ValueError, match="without a Gram matrix"):
        evaluate([part], RIA, TWO_OF_FOUR, PROXIES["reconstruction"])
    with pytest.raises(ValueError, match="no layer samples"):
        evaluate([], RIA, TWO_OF_FOUR, PROXIES["gini"])


def test_layers_are_spread_over_each_kind():
    names = [f"model.layers.{i}.{kind}" for i in range(30) for kind in ("q_proj", "down_proj")] + ["head"]
    chosen = sample_layers(names, 3, seed=0)
    assert chosen == [name for name in names if name in chosen]
    assert chosen == sample_layers(names, 3, seed=0) != sample_layers(names, 3, seed=1)
    for kind in ("q_proj", "down_proj"):
        blocks = [int(name.split(".")[2]) for name in chosen if name.endswith(kind)]
        assert [block // 10 for block in blocks] == [0, 1, 2]
    assert "head" in chosen
    assert sample_layers(names, 100, seed=0) == names
    with pytest.raises(ValueError, match="per_kind=0"):
        sample_layers(names, 0, seed=0)


@pytest.mark.parametrize(
    "mask",
    [
        TWO_OF_FOUR,
        Mask("4:8", 0.5),
        Mask("0:0", 0.6, "row"),
        Mask("0:0", 0.6, "matrix"),
    ],
)
def test_proxies_against_naive_loops(mask):
    candidate = Coefficients(0.7, 2.0, 0.5, 5, 0.9)
    weight, inputs = layer()
    scores = crepe_scores(weight, inputs.norm(dim=0), **candidate.of_score)
    keep = keep_mask(scores, mask.sparsity, mask.mask_structure, mask.comparison_group)
    # All rows are sampled, so that the sample's mask is the layer's for every structure.
    [pruned] = prune([sample()], candidate, mask)
    assert torch.equal(pruned.keep, keep)

    dense = inputs.double() @ weight.double().T
    error = dense - inputs.double() @ (weight * keep).double().T
    per_row = [float((error[:, i] ** 2).sum() / (dense[:, i] ** 2).sum()) for i in range(len(weight))]
    expected = {
        "gini": gini_index(scores[~keep]),
        "gini_kept": gini_index(scores[keep]),
        "gini_all": gini_index(scores),
        "reconstruction": float((error**2).sum() / (dense**2).sum()),
        "row_reconstruction": (sum(value**4 for value in per_row) / len(per_row)) ** 0.25,
    }
    rows = (sum(value**2 for value in per_row) / len(per_row)) ** 0.5
    expected["balanced_reconstruction"] = math.log((expected["reconstruction"] * rows) ** 0.5)
    assert expected.keys() == PROXIES.keys()
    for name, value in expected.items():
        assert evaluate([sample()], candidate, mask, PROXIES[name]) == pytest.approx(value, rel=1e-4), name


def test_a_proxy_is_the_mean_over_layers():
    parts = [sample(seed=0), sample(seed=1), sample(seed=2)]
    for proxy in PROXIES.values():
        each = [evaluate([part], RIA, TWO_OF_FOUR, proxy) for part in parts]
        assert evaluate(parts, RIA, TWO_OF_FOUR, proxy) == pytest.approx(sum(each) / 3)


def test_keeping_everything_loses_nothing():
    nothing_pruned = Mask("0:0", 0.0)
    assert evaluate([sample()], RIA, nothing_pruned, PROXIES["reconstruction"]) == 0
    assert evaluate([sample()], RIA, nothing_pruned, PROXIES["row_reconstruction"]) == 0


def test_starved_rows_are_seen_by_rows_and_hardly_by_the_layer():
    """The failure that makes the layer's error useless where rows compete: weak rows lose everything."""
    weight, inputs = layer(d_out=64, d_in=64, tokens=500)
    weight[:16] *= 0.05

    def errors(candidate):
        part = LayerSample("p", weight, inputs.norm(dim=0), inputs.T @ inputs, rows=64, kernel_sizes=(3,), seed=0)
        mask = Mask("0:0", 0.6, "matrix")
        return [evaluate([part], candidate, mask, PROXIES[name]) for name in ("reconstruction", "row_reconstruction")]

    by_rows = errors(Coefficients(1, 0.0, 0, 3, 1.0))
    by_columns = errors(Coefficients(0.0, 1, 0, 3, 1.0))
    assert by_columns[0] < by_rows[0]
    assert by_columns[1] > 1.2 * by_rows[1]


def test_nan_is_refused_with_its_layer():
    weight, inputs = layer()
    gram = inputs.T @ inputs
    gram[0, 0] = math.nan
    part = LayerSample("block.3.v_proj", weight, inputs.norm(dim=0), gram, rows=24, kernel_sizes=(3,), seed=0)
    with pytest.raises(ValueError, match=r"reconstruction of block\.3\.v_proj is nan"):
        evaluate([part], RIA, TWO_OF_FOUR, PROXIES["reconstruction"])
