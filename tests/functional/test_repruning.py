"""DSnoT against a loop over rows, what it promises, and what the released code gets wrong."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm.functional.masks import keep_n_of_m, keep_unstructured
from crepe_llm.functional.repruning import DSnoTOptions, dsnot
from crepe_llm.functional.scores import crepe_scores, wanda_scores


def layer(seed=0, rows=8, columns=24, tokens=50):
    """Inputs with means of both signs: the pruned weight has expected errors to make up for."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) * torch.rand(columns, generator=generator)
    inputs += 0.5 * torch.randn(columns, generator=generator)
    return weight, inputs


def reprune(dense, inputs, keep, weight=None, scores=None, **options):
    scores = wanda_scores(dense, inputs.norm(dim=0)) if scores is None else scores
    weight = dense * keep if weight is None else weight
    return dsnot(weight, dense, keep, scores, inputs.mean(0), inputs.var(0, correction=0), DSnoTOptions(**options))


def by_loops(weight, dense, keep, scores, mean, variance, group, max_cycles, threshold, exponent):
    """One row after the other, every list sorted anew; returns the mask and each row's errors on its way."""
    relative = [max(v / float(variance.mean()), 1e-6) if variance.any() else 1e-6 for v in variance.tolist()]
    result, ways = keep.clone(), []
    for row in range(len(weight)):
        held, offered = ((matrix[row] * mean).double() for matrix in (weight, dense))
        error = float((offered - held).sum())
        limit = threshold * float(offered.abs().sum())
        free, used, masks, way = set(range(len(held))), set(), [keep[row].clone()], [error]
        for _ in range(max_cycles):
            if abs(error) <= limit:
                break
            sign = math.copysign(1, error)
            growing = [j for j in free if not keep[row, j] and sign * offered[j] > 0]
            if not growing:
                break
            grow = max(growing, key=lambda j: abs(float(offered[j])) / relative[j] ** exponent)
            if group is None:
                losing = [j for j in range(len(held)) if keep[row, j] and j not in used and sign * held[j] < 0]
            else:
                start = grow // group * group
                losing = [j for j in range(start, start + group) if keep[row, j] and j not in used]
            if group is None and not losing:
                break
            free.remove(grow)
            if not losing:
                continue
            prune = min(losing, key=lambda j: float(scores[row, j]))
            change = float(held[prune] - offered[grow])
            if sign * change >= 0:
                continue
            used.add(prune)
            error += change
            masks.append(masks[-1].clone())
            masks[-1][grow], masks[-1][prune] = True, False
            way.append(error)
        best = min(range(len(way)), key=lambda step: (abs(way[step]), step))
        result[row] = masks[best]
        ways.append(way[: best + 1])
    return result, ways


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 6),
    groups=st.integers(1, 8),
    structure=st.sampled_from([None, (2, 4), (1, 4), (3, 4), (4, 8)]),
    max_cycles=st.sampled_from([1, 2, 7, 50]),
    threshold=st.sampled_from([0.0, 1e-4, 0.02]),
    exponent=st.sampled_from([0.0, 0.5, 1.0]),
    crepe=st.booleans(),
    updated=st.booleans(),
)
def test_against_a_loop_over_rows(seed, rows, groups, structure, max_cycles, threshold, exponent, crepe, updated):
    dense, inputs = layer(seed, rows, groups * (structure[1] if structure else 3))
    scores = (crepe_scores if crepe else wanda_scores)(dense, inputs.norm(dim=0))
    keep = keep_n_of_m(scores, *structure) if structure else keep_unstructured(scores, 0.5)
    # As after SparseGPT, whose kept weights are not the dense ones.
    weight = (dense + 0.1 * torch.randn_like(dense) * updated) * keep
    group = structure[1] if structure else None
    options = {"group": group, "max_cycles": max_cycles, "threshold": threshold, "variance_exponent": exponent}
    found = reprune(dense, inputs, keep, weight, scores, **options)
    mean, variance = inputs.mean(0), inputs.var(0, correction=0)
    expected, ways = by_loops(weight, dense, keep, scores, mean, variance, group, max_cycles, threshold, exponent)
    assert torch.equal(found.keep, expected)
    assert found.swaps.tolist() == [len(way) - 1 for way in ways]
    torch.testing.assert_close(found.before, torch.tensor([way[0] for way in ways]).double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.after, torch.tensor([way[-1] for way in ways]).double(), rtol=1e-3, atol=1e-5)
    for way in ways:
        # Every swap moves the error against its sign; it may overshoot zero.
        assert all((after - before) * before < 0 for before, after in itertools.pairwise(way))


@pytest.mark.parametrize("structure", [None, (2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("seed", range(5))
def test_it_lowers_the_expected_error_of_the_layer_itself(structure, seed):
    dense, inputs = layer(seed, rows=32, columns=128)
    scores = wanda_scores(dense, inputs.norm(dim=0))
    keep = keep_n_of_m(scores, *structure) if structure else keep_unstructured(scores, 0.6)
    found = reprune(dense, inputs, keep, group=structure[1] if structure else None, threshold=1e-4)

    def mean_error(mask):
        return (inputs @ (dense - dense * mask).T).double().mean(0)

    torch.testing.assert_close(found.before, mean_error(keep), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.after, mean_error(found.keep), rtol=1e-3, atol=1e-4)
    assert bool((found.after.abs() <= found.before.abs()).all())
    assert found.after.abs().mean() < (0.1 if structure is None else 0.5) * found.before.abs().mean()
    changed = (found.keep != keep).any(1)
    assert torch.equal(changed, found.swaps > 0)
    assert torch.equal((found.keep != keep).sum(1), 2 * found.swaps)
    assert torch.equal(found.after.abs() < found.before.abs(), changed)
    assert torch.equal(found.keep.sum(1), keep.sum(1))
    if structure:
        kept = structure[1] - structure[0]
        assert bool((found.keep.view(-1, structure[1]).sum(1) == kept).all())


def test_finished_rows_are_untouched_and_others_are_not_affected_by_them():
    dense, inputs = layer(rows=6)
    keep = keep_unstructured(wanda_scores(dense, inputs.norm(dim=0)), 0.5)
    keep[1] = True
    keep[4] = True
    found = reprune(dense, inputs, keep)
    assert bool(found.keep[[1, 4]].all()) and found.swaps[[1, 4]].tolist() == [0, 0]
    for row in range(6):
        alone = reprune(dense[row : row + 1], inputs, keep[row : row + 1])
        assert torch.equal(alone.keep[0], found.keep[row])


def test_an_infinite_threshold_and_full_masks_are_the_identity():
    dense, inputs = layer()
    keep = keep_n_of_m(dense.abs(), 2, 4)
    assert torch.equal(reprune(dense, inputs, keep, group=4, threshold=math.inf).keep, keep)
    whole = torch.ones_like(keep)
    assert torch.equal(reprune(dense, inputs, whole).keep, whole)
    assert torch.equal(reprune(dense, inputs, ~whole).keep, ~whole)  # nothing can be pruned in return


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("factor", [1e-3, 1e4])
def test_the_threshold_does_not_depend_on_scales_or_on_the_number_of_tokens(group, factor):
    """A fault of the released code, whose threshold is a number of output units times tokens."""
    dense, inputs = layer(rows=16, columns=64)
    keep = keep_n_of_m(wanda_scores(dense, inputs.norm(dim=0)), 2, 4)
    options = {"group": group, "threshold": 0.005}
    found = reprune(dense, inputs, keep, **options)
    assert 0 < int(found.swaps.sum()) < int(reprune(dense, inputs, keep, group=group, threshold=0.0).swaps.sum())
    assert torch.equal(reprune(dense * factor, inputs, keep, **options).keep, found.keep)
    assert torch.equal(reprune(dense, inputs * factor, keep, **options).keep, found.keep)
    assert torch.equal(reprune(dense, inputs.repeat(3, 1), keep, **options).keep, found.keep)


@pytest.mark.parametrize("group", [None, 4])
def test_channels_without_variance_or_activity(group):
    """A fault of the released code, which divides by the variance."""
    dense, inputs = layer(rows=16, columns=64)
    inputs[:, 3] = 0.7  # constant
    inputs[:, 8:11] = 0  # dead
    keep = keep_n_of_m(wanda_scores(dense, inputs.norm(dim=0)), 2, 4)
    found = reprune(dense, inputs, keep, group=group)
    assert bool(found.after.isfinite().all()) and int(found.swaps.sum()) > 0
    grown = found.keep & ~keep
    assert not bool(grown[:, 8:11].any()), "a dead channel adds nothing to any output"
    # A constant channel adds to the mean and nothing to the variance: it comes first where its sign is right.
    first = reprune(dense, inputs, keep, group=group, max_cycles=1)
    right = ~keep[:, 3] & (dense[:, 3] * 0.7 * first.before > 0) & (first.swaps > 0)
    assert int(right.sum()) > 0 and bool(first.keep[right, 3].all())
    for nothing in (torch.zeros_like(inputs), inputs[:1].expand(5, -1)):
        result = reprune(dense, nothing, keep, group=group)
        assert bool(result.after.isfinite().all())
    assert torch.equal(reprune(dense, torch.zeros_like(inputs), keep, group=group).keep, keep)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [None, 4])
def test_16_bit_weights_change_nothing_but_their_rounding(dtype, group):
    dense, inputs = layer(rows=16, columns=64)
    dense = dense.to(dtype)
    keep = keep_n_of_m(wanda_scores(dense, inputs.norm(dim=0)), 2, 4)
    found, expected = reprune(dense, inputs, keep, group=group), reprune(dense.float(), inputs, keep, group=group)
    assert torch.equal(found.keep, expected.keep)
    torch.testing.assert_close(found.after, expected.after)


def test_arguments_are_left_as_they_were():
    dense, inputs = layer()
    keep = keep_n_of_m(dense.abs(), 2, 4)
    arguments = (dense * keep, dense, keep, dense.abs(), inputs.mean(0), inputs.var(0))
    before = [argument.clone() for argument in arguments]
    first, second = dsnot(*arguments, DSnoTOptions(group=4)), dsnot(*arguments)
    assert int(first.swaps.sum()) and int(second.swaps.sum())
    assert all(torch.equal(one, other) for one, other in zip(before, arguments, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense": torch.ones(8, 23)}, r"dense \[8, 23\] must both be"),
        ({"scores": torch.ones(24)}, r"scores \[24\] must both be"),
        ({"input_mean": torch.ones(8)}, r"input_mean must have one entry per input channel, \[24\], got \[8\]"),
        ({"input_variance": torch.ones(1, 24)}, "input_variance must have"),
        ({"options": DSnoTOptions(group=5)}, "24 input channels cannot be cut into groups of 5"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    dense, inputs = layer()
    keep = keep_n_of_m(dense.abs(), 2, 4)
    arguments = {
        "weight": dense * keep, "dense": dense, "keep": keep, "scores": dense.abs(), "input_mean": inputs.mean(0),
        "input_variance": inputs.var(0),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        dsnot(**{**arguments, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_cycles": 0}, "max_cycles=0 must be at least 1"),
        ({"threshold": -0.1}, r"threshold=-0.1 must be at least 0"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"variance_exponent": -1.0}, "variance_exponent=-1.0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DSnoTOptions(**options)
