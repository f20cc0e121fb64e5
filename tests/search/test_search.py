import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm.functional.gini import gini_index
from crepe_llm.functional.masks import keep_mask
from crepe_llm.functional.scores import crepe_scores
from crepe_llm.search.fitness import PROXIES, RIA, Coefficients, LayerSample, Mask, evaluate, prune, sample_layers
from crepe_llm.search.search import OPTIMISERS, Finalist, SearchSpace, Study, StudyError, search

TWO_OF_FOUR = Mask("2:4", 0.5)
KERNELS = (3, 5, 9)


def layer(d_out=24, d_in=32, tokens=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    inputs = torch.randn(tokens, d_in, generator=generator) * torch.rand(d_in, generator=generator).mul_(3)
    return weight, inputs


def sample(rows=24, gram=True, **kwargs):
    weight, inputs = layer(**kwargs)
    return LayerSample(
        "block.0.proj",
        weight,
        inputs.norm(dim=0),
        inputs.T @ inputs if gram else None,
        rows=rows,
        kernel_sizes=KERNELS,
        seed=1,
    )


coefficients = st.builds(
    Coefficients,
    row=st.floats(0.01, 10),
    column=st.floats(0, 10),
    neighbourhood=st.floats(0, 10),
    kernel_size=st.sampled_from(KERNELS),
    activation_exponent=st.floats(0, 2),
)


# Samples of layers


@settings(deadline=None)
@given(coefficients)
def test_sampled_scores_are_those_of_the_whole_layer(candidate):
    weight, inputs = layer()
    part = sample(rows=10)
    whole = crepe_scores(weight, inputs.norm(dim=0), **vars(candidate))
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


# Proxies


@pytest.mark.parametrize(
    "mask",
    [
        TWO_OF_FOUR,
        Mask("4:8", 0.5),
        Mask("0:0", 0.6, "row"),
        Mask("0:0", 0.6, "matrix"),
        Mask("0:0", 0.6, "column_block"),
    ],
)
def test_proxies_against_naive_loops(mask):
    candidate = Coefficients(0.7, 2.0, 0.5, 5, 0.9)
    weight, inputs = layer()
    scores = crepe_scores(weight, inputs.norm(dim=0), **vars(candidate))
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


@pytest.mark.parametrize(
    ("mask", "message"),
    [(("2:2", 0.5), "0 < N < M"), (("0:0", 1.5), "sparsity=1.5"), (("0:0", 0.5, "rows"), "comparison_group")],
)
def test_masks_are_checked(mask, message):
    with pytest.raises(ValueError, match=message):
        Mask(*mask)


# The space


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.sampled_from([0, 1, 2, 3, 4, 5, 6]))
def test_points_and_coefficients_are_inverse(point, kernel):
    space = SearchSpace()
    point = [*point, kernel / 6]
    candidate = space.coefficients(point)
    assert space.point(candidate) == pytest.approx(point, abs=1e-9)
    assert space.column[0] * 0.999999 <= candidate.column <= space.column[1] * 1.000001
    assert candidate.kernel_size == space.kernel_sizes[kernel]


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


# Optimisers


def bowl(target=(0.7, 0.3, 0.6, 0.5), space=None):
    """A loss with its minimum of 0 at a known place of the unit cube."""
    space = space or SearchSpace()

    def loss(candidate):
        return sum((a - b) ** 2 for a, b in zip(space.point(candidate), target, strict=True))

    return loss


def study(optimiser="cma", **settings):
    return Study(
        **{"model": "m", "mask": TWO_OF_FOUR, "proxy": "bowl", "higher_is_better": False, **settings},
        optimiser=optimiser,
    )


@pytest.mark.parametrize(
    ("optimiser", "candidates", "reached"), [("cma", 250, 1e-3), ("hill_climb", 250, 0.02), ("random", 250, 0.06)]
)
def test_optimisers_approach_a_known_minimum(optimiser, candidates, reached):
    result = search(bowl(), study(optimiser), candidates=candidates)
    assert result.loss(result.best) < reached < result.loss(result.reference)
    assert result.finished
    assert result.beats_reference


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_direction_is_respected(optimiser):
    loss = bowl()
    lower = search(loss, study(optimiser), candidates=60)
    higher = search(lambda c: -loss(c), study(optimiser, higher_is_better=True), candidates=60)
    assert [c.coefficients for c in lower.candidates] == [c.coefficients for c in higher.candidates]
    assert lower.best.coefficients == higher.best.coefficients


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_seeds_decide_and_global_generators_do_not(optimiser):
    def noisy(candidate):
        np.random.random(3)  # an objective may draw from numpy's generator as it likes
        return bowl()(candidate)

    np.random.seed(5)
    state = np.random.get_state()[1].copy()
    first = search(bowl(), study(optimiser, seed=3), candidates=40)
    assert (np.random.get_state()[1] == state).all()
    np.random.seed(6)
    second = search(noisy, study(optimiser, seed=3), candidates=40)
    other = search(bowl(), study(optimiser, seed=4), candidates=40)
    assert [c.coefficients for c in first.candidates] == [c.coefficients for c in second.candidates]
    assert [c.coefficients for c in first.candidates] != [c.coefficients for c in other.candidates]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("fixed", [{"kernel_sizes": [9]}, {"column": [1.0, 1.0]}, {"activation_exponent": [0.5, 0.5]}])
def test_equal_bounds_fix_a_dimension(optimiser, fixed):
    space = SearchSpace(**fixed)
    result = search(bowl(space=space), study(optimiser, space=space), candidates=30)
    for candidate in result.candidates[1:]:
        if "kernel_sizes" in fixed:
            assert candidate.coefficients.kernel_size == 9
        if "column" in fixed:
            assert candidate.coefficients.column == pytest.approx(1.0)
        if "activation_exponent" in fixed:
            assert candidate.coefficients.activation_exponent == 0.5


def test_cma_searches_a_single_dimension():
    space = SearchSpace(column=(1.0, 1.0), neighbourhood=(1.0, 1.0), kernel_sizes=(3,))
    result = search(lambda c: (c.activation_exponent - 0.9) ** 2, study(space=space), candidates=60)
    assert result.best.coefficients.activation_exponent == pytest.approx(0.9, abs=0.02)


def test_cma_starts_again_where_it_converged():
    result = search(bowl(), study(), candidates=1500)
    exponents = [c.coefficients.activation_exponent for c in result.candidates]
    last = [exponents[i : i + 8] for i in range(1, len(exponents) - 8, 8)]
    spread = [max(generation) - min(generation) for generation in last]
    tight = next(i for i, width in enumerate(spread) if width < 1e-3)
    assert max(spread[tight:]) > 0.05


def test_population_is_the_generation():
    result = search(bowl(), study(population=5), candidates=20)
    assert [c.generation for c in result.candidates] == [-1] + [g for g in range(4) for _ in range(5)]
    with pytest.raises(ValueError, match="population=1"):
        search(bowl(), study(population=1), candidates=20)


def test_hill_climb_ends_by_itself_in_a_minimum():
    calls = 0

    def loss(candidate):
        nonlocal calls
        calls += 1
        return bowl()(candidate)

    result = search(loss, study("hill_climb"), candidates=10_000)
    assert result.finished
    assert calls == len(result.candidates) < 500
    assert result.loss(result.best) < 0.01


# Studies


def test_saved_studies_load_as_they_were(tmp_path):
    path = tmp_path / "folder" / "study.json"
    result = search(bowl(), study(sample={"layers": ["a"], "rows": 3}), candidates=20, path=path)
    assert Study.load(path) == result
    assert [entry.name for entry in path.parent.iterdir()] == ["study.json"]
    assert str(result).splitlines()[-1].endswith("RIA")
    assert "bowl, lower is better" in str(result)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_interrupted_searches_end_as_uninterrupted_ones(tmp_path, optimiser):
    whole = search(bowl(), study(optimiser), candidates=60)
    path = tmp_path / "study.json"
    calls = 0

    def interrupted(candidate):
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return bowl()(candidate)

    with pytest.raises(KeyboardInterrupt):
        search(interrupted, study(optimiser), candidates=60, path=path)
    kept = Study.load(path)
    assert not kept.finished
    assert 20 <= len(kept.candidates) < 30
    resumed = search(bowl(), study(optimiser), candidates=60, path=path)
    assert [(c.coefficients, c.value) for c in resumed.candidates] == [
        (c.coefficients, c.value) for c in whole.candidates
    ]
    assert Study.load(path).finished


def test_a_killed_search_ends_as_an_uninterrupted_one(tmp_path):
    """SIGKILL at moments that fall between and within generations."""
    script = tmp_path / "searching.py"
    script.write_text(
        "import sys, time\n"
        "from crepe_llm.search.fitness import Mask\n"
        "from crepe_llm.search.search import SearchSpace, Study, search\n"
        "space = SearchSpace()\n"
        "def loss(candidate):\n"
        "    time.sleep(0.01)\n"
        "    return sum((a - b) ** 2 for a, b in zip(space.point(candidate), (0.7, 0.3, 0.6, 0.5)))\n"
        "search(loss, Study('m', Mask('2:4', 0.5), 'bowl', False), candidates=120, path=sys.argv[1])\n"
    )
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    uninterrupted = subprocess.Popen([sys.executable, script, whole], env=environment)
    for wanted in (20, 70):
        process = subprocess.Popen([sys.executable, script, killed], env=environment)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if killed.exists() and len(json.loads(killed.read_text())["candidates"]) > wanted:
                break
            assert process.poll() is None
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not Study.load(killed).finished
    subprocess.run([sys.executable, script, killed], env=environment, check=True)
    assert uninterrupted.wait() == 0
    first, second = Study.load(whole), Study.load(killed)
    assert [(c.coefficients, c.value) for c in first.candidates] == [
        (c.coefficients, c.value) for c in second.candidates
    ]
    assert first.best.coefficients == second.best.coefficients


def test_a_larger_budget_continues_and_a_smaller_one_loses_nothing(tmp_path):
    path = tmp_path / "study.json"
    search(bowl(), study(population=8), candidates=24, path=path)
    longer = search(bowl(), study(population=8), candidates=48, path=path)
    assert len(longer.candidates) == 49

    def never(candidate):
        raise AssertionError("everything is on record")

    assert len(search(never, study(population=8), candidates=8, path=path).candidates) == 49
    assert len(Study.load(path).candidates) == 49


def test_minutes_end_a_search():
    def slow(candidate):
        time.sleep(0.01)
        return bowl()(candidate)

    result = search(slow, study(), minutes=0.3 / 60)
    assert result.seconds >= 0.3
    assert len(result.candidates) < 40


def test_progress_is_told_of_each_generation():
    seen = []
    search(bowl(), study(population=6), candidates=18, progress=lambda s: seen.append(len(s.candidates)))
    assert seen == [7, 13, 19]


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"proxy": "gini"},
        {"mask": Mask("4:8", 0.5)},
        {"model": "another"},
        {"sample": {"rows": 4}},
        {"space": SearchSpace(row=2.0)},
        {"population": 12},
    ],
)
def test_another_search_does_not_continue_a_study(tmp_path, other):
    path = tmp_path / "study.json"
    search(bowl(), study(), candidates=8, path=path)
    [field] = other
    with pytest.raises(StudyError, match=f"was made with {field}="):
        search(bowl(), study(**other), candidates=16, path=path)


def test_a_study_that_does_not_replay_is_refused(tmp_path):
    path = tmp_path / "study.json"
    search(bowl(), study(), candidates=80, path=path)
    content = json.loads(path.read_text())
    content["candidates"][70]["value"] -= 10.0
    path.write_text(json.dumps(content))
    with pytest.raises(StudyError, match="does not replay"):
        search(bowl(), study(), candidates=24, path=path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "damaged, it is no JSON"),
        (lambda text: "", "damaged, it is no JSON"),
        (lambda text: "[]", "no study"),
        (lambda text: text.replace('"format": 1', '"format": 99'), "format"),
        (lambda text: text.replace('"value"', '"worth"'), "damaged"),
        (lambda text: text.replace('"kernel_size": 3', '"kernel_size": 4'), "damaged .*kernel_size=4"),
        (lambda text: text.replace('"mask_structure": "2:4"', '"mask_structure": "4:2"'), "damaged"),
    ],
)
def test_damaged_studies_are_refused(tmp_path, damage, message):
    path = tmp_path / "study.json"
    search(bowl(), study(), candidates=8, path=path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(StudyError, match=message):
        Study.load(path)


def test_a_missing_study_is_named(tmp_path):
    with pytest.raises(StudyError, match=r"missing\.json cannot be read"):
        Study.load(tmp_path / "missing.json")


def test_studies_lend_themselves_to_their_own_masks_only():
    study().require_mask(Mask("2:4", 0.5))
    with pytest.raises(StudyError, match=r"searched for 2:4 masks, .* 60% per matrix"):
        study().require_mask(Mask("0:0", 0.6, "matrix"))


def test_constant_and_nan_proxies_are_refused():
    with pytest.raises(ValueError, match=r"bowl is 1\.0 for each of \d+ candidates"):
        search(lambda c: 1.0, study(), candidates=50)
    with pytest.raises(ValueError, match="bowl is nan for row"):
        search(lambda c: math.nan if c != RIA else 1.0, study(), candidates=50)


def test_bad_budgets_and_names_are_refused():
    with pytest.raises(ValueError, match="needs a budget"):
        search(bowl(), study())
    with pytest.raises(ValueError, match="candidates=0"):
        search(bowl(), study(), candidates=0)
    with pytest.raises(ValueError, match="minutes=-1"):
        search(bowl(), study(), minutes=-1)
    with pytest.raises(ValueError, match="optimiser=annealing must be one of cma"):
        search(bowl(), study("annealing"), candidates=1)
    with pytest.raises(StudyError, match="no candidates"):
        _ = study().best


def test_the_shortlist_is_spread_and_finalists_decide():
    result = search(bowl(), study(), candidates=200)
    own = Coefficients(1.0, 4.0, 3.0, 31, 0.85)
    shortlist = result.shortlist(12, [own, RIA])
    assert shortlist[:3] == [own, RIA, result.best.coefficients]
    looked = sorted(result.candidates[1:65], key=result.loss)
    assert shortlist[3:] == [candidate.coefficients for candidate in looked[:9]]
    # The best of all crowd around one place; the shortlist does not.
    crowd = [result.space.point(c.coefficients) for c in sorted(result.candidates, key=result.loss)[:9]]
    assert np.std(crowd, axis=0).max() < np.std([result.space.point(c) for c in shortlist[3:]], axis=0).min()
    assert result.shortlist(1, [own]) == shortlist[:3]
    assert result.recommended == result.best.coefficients
    # The third is best, but not clearly; the fourth is clearly better than the first.
    tokens = (10, 20, 10)
    result.finalists = [
        Finalist(coefficients, losses, tokens, 1.0)
        for coefficients, losses in (
            (own, (30, 60, 30)),
            (RIA, (31, 62, 31)),
            (shortlist[4], (30, 61, 22)),
            (shortlist[5], (28.0, 56.1, 27.8)),
        )
    ]
    assert result.recommended == shortlist[5]
    assert f"{math.exp(3):.2f}  {own}, to be beaten" in str(result)
    assert ", used" in str(result).split(str(shortlist[5]))[-1]
    result.finalists.pop()
    assert result.recommended == own


def test_finalists_are_told_apart_by_paired_differences():
    generator = np.random.default_rng(0)
    tokens = generator.integers(20, 60, 16)
    texts = generator.normal(3, 0.5, 16)  # texts differ far more than the two do
    gains = generator.normal(0.02, 0.01, 16)
    worse = Finalist(RIA, tuple(texts * tokens), tuple(tokens.tolist()), 0.0)
    better = Finalist(RIA, tuple((texts - gains) * tokens), tuple(tokens.tolist()), 0.0)
    assert better.clearly_better(worse)
    assert not worse.clearly_better(better)
    assert not better.clearly_better(better)
    # Against the jackknife's standard error of the ratio.
    differences = gains * tokens
    left_out = np.array(
        [(differences.sum() - d) / (tokens.sum() - t) for d, t in zip(differences, tokens, strict=True)]
    )
    error = np.sqrt(15 / 16 * ((left_out - left_out.mean()) ** 2).sum())
    gain = differences.sum() / tokens.sum()
    for factor in (0.9, 1.1):  # a finalist whose gain is a little below, above twice that error
        shift = gain - 2 * error * factor
        shifted = Finalist(RIA, tuple((texts - gains + shift) * tokens), tuple(tokens.tolist()), 0.0)
        assert shifted.clearly_better(worse) == (factor > 1)
    one = Finalist(RIA, (1.0,), (9,), 0.0)
    assert not one.clearly_better(Finalist(RIA, (2.0,), (9,), 0.0))
    with pytest.raises(ValueError, match="2 losses"):
        Finalist(RIA, (1.0, 2.0), (9,), 0.0)


def test_no_better_than_ria_is_said():
    result = search(lambda c: 0.0 if c == RIA else 1.0 + bowl()(c), study(), candidates=20)
    assert not result.beats_reference
    assert result.best.coefficients == RIA


def test_plot_draws_a_file(tmp_path):
    result = search(bowl(), study(), candidates=16)
    result.plot(tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_coefficients_are_checked():
    with pytest.raises(ValueError, match="kernel_size=4"):
        Coefficients(1, 1, 1, 4, 0.5)
    assert str(RIA) == "row 1, column 1, neighbourhood 0, kernel 3, exponent 0.5"


def test_a_real_search_lowers_the_error_it_searches_for():
    parts = [sample(seed=seed, d_out=40, d_in=64) for seed in range(3)]
    proxy = PROXIES["reconstruction"]
    result = search(
        lambda c: evaluate(parts, c, TWO_OF_FOUR, proxy),
        study(proxy="reconstruction", space=SearchSpace(kernel_sizes=KERNELS)),
        candidates=80,
    )
    assert result.beats_reference
