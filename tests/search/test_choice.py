"""Which of a few candidates is chosen, by losses that are known."""

import pytest

from crepe_llm.search.choice import choose
from crepe_llm.search.stages import Measure


class Known:
    """Losses by stage and candidate, of 40 windows of 512 tokens; every window differs from the others."""

    def __init__(self, quick, last):
        self.asked = []
        self._tables = {"first": quick, "last": last}

    def measures(self):
        return tuple(
            Measure(name, (512,) * 40, lambda candidate, windows, name=name: self._losses(name, candidate, windows))
            for name in self._tables
        )

    def _losses(self, name, candidate, windows):
        self.asked.append((name, candidate, len(windows)))
        mean, spread = self._tables[name][candidate]
        return [512 * (mean + 0.3 * (window % 7) + spread * (-1) ** window) for window in windows]


@pytest.mark.parametrize(
    ("last", "chosen"),
    [
        ({"none": (1.0, 0.0), "b": (0.9, 0.01), "c": (0.8, 0.01)}, "c"),
        ({"none": (1.0, 0.0), "b": (0.9, 0.01), "c": (0.8, 5.0)}, "b"),  # c is better by luck, as far as one can tell
        ({"none": (1.0, 0.0), "b": (1.1, 0.01), "c": (0.99, 0.2)}, "none"),
    ],
)
def test_the_first_candidate_stays_unless_another_is_clearly_better(last, chosen):
    quick = {"none": (1.0, 0.0), "a": (1.5, 0.0), "b": (0.9, 0.0), "c": (0.95, 0.0)}
    known = Known(quick, last)
    choice = choose(known, list(quick))
    assert choice.chosen == chosen
    # All are judged by masks alone on 8192 tokens, the best two and the first as the recipe prunes on all of the text.
    assert known.asked == [("first", one, 16) for one in quick] + [("last", one, 40) for one in ("none", "b", "c")]
    assert choice.first["a"][0] == pytest.approx(-0.5) and choice.last["b"][0] == pytest.approx(1 - last["b"][0])
    assert choice.last["none"] == (0.0, 0.0)
