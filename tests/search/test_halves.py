"""Candidates on the whole model: each half of the text judges what the other half prunes."""

import pytest
import torch

from crepe_llm.pruning.block_pass import Calibration, Wanted
from crepe_llm.search.divergence import Divergence
from crepe_llm.search.halves import Halves, _in_turn
from crepe_llm.search.rehearsal import Pruning, mask_step, pruned, rehearsed, remembering
from crepe_llm.search.space import RIA, WANDA, Mask
from modifier_helpers import linears, load


@pytest.fixture
def model(tiny_model_folder):
    model = load(tiny_model_folder("llama")).eval()
    with torch.no_grad():
        model.model.norm.weight *= 10  # so that predictions are far from even
    return model


@pytest.fixture
def texts(calibration_data):
    return list(torch.tensor(calibration_data["input_ids"])[[1, 2, 4, 5, 7]])


def pruning_of(model):
    wanted = {module: Wanted(name) for name, module in linears(model).items()}
    return lambda coefficients, alone: Pruning(wanted, Calibration(), mask_step(coefficients, Mask("2:4", 0.5)))


def test_each_half_judges_what_the_other_prunes(model, texts):
    halves, pruning = Halves(model, texts, RIA, pruning_of(model)), pruning_of(model)
    first, last = halves.measures()
    divergence = Divergence(model, texts[:4])
    expected = {}
    for half, others in ((0, texts[1::2]), (1, texts[::2])):
        for coefficients in (RIA, WANDA):
            statistics = {}
            with rehearsed(model, others, remembering(pruning(coefficients, True), statistics)):
                expected |= {(coefficients, window): divergence(window) for window in (half, half + 2)}
            if coefficients == RIA:
                with pruned(statistics, pruning(WANDA, True)):
                    expected |= {("cheap", window): divergence(window) for window in (half, half + 2)}
    assert halves.tokens == (15,) * 4
    windows = range(4)
    # First without statistics, as in a search that goes on.
    assert first.losses(WANDA, windows) == [expected["cheap", window] for window in windows]
    for coefficients in (RIA, WANDA):
        assert last.losses(coefficients, windows) == [expected[coefficients, window] for window in windows]
    assert first.losses(RIA, windows) == last.losses(RIA, windows)
    assert first.losses(WANDA, windows) != last.losses(WANDA, windows)
    assert first.losses(WANDA, range(1, 3)) == [expected["cheap", window] for window in (1, 2)]


def test_the_guess_is_pruned_once_for_both_stages(model, texts, monkeypatch):
    import crepe_llm.search.halves as module

    rehearsals = []
    monkeypatch.setattr(module, "rehearsed", lambda *args: rehearsals.append(args) or rehearsed(*args))
    first, last = Halves(model, texts, RIA, pruning_of(model)).measures()
    last.losses(RIA, range(4))
    first.losses(WANDA, range(4))
    first.losses(RIA, range(4))
    assert len(rehearsals) == 2


def test_windows_of_many_sequences_come_first():
    first, second = torch.arange(1300), torch.arange(600)
    assert [len(window) for window in _in_turn([first, second])] == [512, 512, 512, 88, 276]


def test_without_blocks_statistics_are_the_dense_model_s(model, texts):
    pruning = pruning_of(model)
    statistics = {}
    for half in (0, 1):
        dense = Pruning(pruning(RIA, True).wanted, Calibration(), lambda layer: None)
        with rehearsed(model, texts[1 - half :: 2], remembering(dense, statistics.setdefault(half, {}))):
            pass
    model.model.others = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(2)])
    halves = Halves(model, texts, RIA, pruning)
    divergence = Divergence(model, texts[:2])
    expected = []
    for half in (0, 1):
        with pruned(statistics[half], pruning(WANDA, True)):
            expected.append(divergence(half))
    for measure in halves.measures():
        assert measure.losses(WANDA, range(2)) == pytest.approx(expected, rel=1e-4)
