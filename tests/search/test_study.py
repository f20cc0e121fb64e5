import itertools
import json
import math

import pytest

from crepe_llm.search.search import search
from crepe_llm.search.space import RIA, Coefficients, Mask
from crepe_llm.search.study import Study, StudyError
from crepe_llm.search.trials import Plan, Round, Stage, Trial
from searches import bowl, study


def test_saved_studies_load_as_they_were(tmp_path):
    path = tmp_path / "folder" / "study.json"
    result = search(bowl(), study(sample={"layers": ["a"], "rows": 3}), candidates=20, path=path)
    assert Study.load(path) == result
    assert [entry.name for entry in path.parent.iterdir()] == ["study.json"]
    assert str(result).splitlines()[-1].endswith("RIA")
    assert "bowl, lower is better" in str(result)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "damaged, it is not JSON"),
        (lambda text: "", "damaged, it is not JSON"),
        (lambda text: "[]", "not a study"),
        (lambda text: text.replace('"format": 2', '"format": 99'), "format"),
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


def test_the_shortlist_is_spread():
    result = search(bowl(), study(), candidates=200)
    own = Coefficients(1.0, 4.0, 3.0, 31, 0.85)
    shortlist = result.shortlist(12, [own, RIA])
    assert shortlist[:3] == [own, RIA, result.best.coefficients]
    half = sorted(result.candidates[1:65], key=result.loss)[:32]
    assert set(shortlist[3:]) < {candidate.coefficients for candidate in half}

    def nearest(of):
        points = [result.space.point(coefficients) for coefficients in of]
        return min(math.dist(a, b) for a, b in itertools.combinations(points, 2))

    # The best of that half are nearer to each other, and those of all crowd around one place.
    assert nearest(shortlist) > 1.5 * nearest(candidate.coefficients for candidate in half[:9])
    crowd = sorted(result.candidates, key=result.loss)[:9]
    assert nearest(shortlist) > 5 * nearest(candidate.coefficients for candidate in crowd)
    assert result.shortlist(1, [own]) == [own, result.best.coefficients]
    assert result.recommended == result.challengers[0] == result.best.coefficients


def test_the_last_stage_decides():
    result = search(bowl(), study(), candidates=8)
    own, other, third = (candidate.coefficients for candidate in result.candidates[1:4])
    tokens = (10, 20, 10)
    result.stages = [
        Stage("first", [Trial(third, (1, 1, 1), tokens, 1.0)]),
        Stage("last", [Trial(own, (30, 60, 30), tokens, 1.0), Trial(other, (31, 50, 30), tokens, 1.0)]),
    ]
    # Better on the whole, but not clearly.
    assert result.recommended == own
    assert result.challengers == [own, other]
    result.stages[-1].trials.append(Trial(third, (28.0, 56.1, 27.8), tokens, 1.0))
    assert result.recommended == third
    assert result.challengers == [third, other]
    lines = str(result).splitlines()
    assert [line for line in lines if "incumbent" in line and str(own) in line]
    assert [line for line in lines if line.endswith(f"{third}  <- best that is clearly better")]


def with_stages():
    result = search(bowl(), study(), candidates=16)
    first, second = result.candidates[1].coefficients, result.candidates[2].coefficients
    result.plan = Plan("tokens=900", (Round(8, 2), Round(2, 2)), 12.5)
    result.stages = [
        Stage("stage 1, quick", [Trial(first, (3, 4), (5, 6), 0.1), Trial(second, (2.5, 3.5), (5, 6), 0.2)]),
        Stage("last", [Trial(first, (7.0,), (9,), 0.5)]),
    ]
    return result


def test_plot_draws_a_panel_for_each_stage(tmp_path):
    without, result = search(bowl(), study(), candidates=16), with_stages()
    sizes = []
    for number, each in enumerate((without, result)):
        path = tmp_path / f"{number}.png"
        each.plot(path)
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        sizes.append(int.from_bytes(path.read_bytes()[16:20], "big"))
    assert sizes[1] > 2 * sizes[0]


def test_stages_and_plans_are_saved(tmp_path):
    result = with_stages()
    result.save(tmp_path / "study.json")
    assert Study.load(tmp_path / "study.json") == result


def test_studies_of_the_first_format_are_read(tmp_path):
    path = tmp_path / "study.json"
    result = search(bowl(), study(), candidates=8, path=path)
    content = json.loads(path.read_text())
    del content["plan"], content["stages"]
    own, better = content["candidates"][1]["coefficients"], content["candidates"][2]["coefficients"]
    finalists = [
        {"coefficients": own, "losses": [30.0, 61.0, 30.0], "tokens": [10, 20, 10], "seconds": 2.0},
        {"coefficients": better, "losses": [28.0, 57.1, 27.8], "tokens": [10, 20, 10], "seconds": 2.0},
    ]
    path.write_text(json.dumps(content | {"format": 1, "population": None, "finalists": []}))
    assert Study.load(path) == result
    path.write_text(json.dumps(content | {"format": 1, "finalists": finalists}))
    old = Study.load(path)
    assert [trial.losses for trial in old.stages[0].trials] == [(30.0, 61.0, 30.0), (28.0, 57.1, 27.8)]
    assert old.challengers == [Coefficients(**better), Coefficients(**own)]
