import math

import numpy as np
import pytest

from crepe_llm.search.search import search
from crepe_llm.search.space import RIA, Coefficients, Mask
from crepe_llm.search.study import Finalist, Study, StudyError
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


def test_plot_draws_a_file(tmp_path):
    result = search(bowl(), study(), candidates=16)
    result.plot(tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_studies_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "study.json"
    result = search(bowl(), study(), candidates=8, path=path)
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 0,\n "population": null'))
    assert Study.load(path) == result
