"""Candidates on the whole model, pruned and judged by all of the text."""

import pytest
import torch

from crepe_llm.pruning.block_pass import Calibration, Wanted
from crepe_llm.search.divergence import Divergence
from crepe_llm.search.rehearsal import Pruning, calls_of, mask_step, pruned, rehearsed, remembering
from crepe_llm.search.space import RIA, WANDA, Mask
from crepe_llm.search.whole_model import WholeModel, _in_turn
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


def test_stages_prune_and_judge_by_all_text(model, texts):
    whole, pruning = WholeModel(model, texts, RIA, pruning_of(model)), pruning_of(model)
    first, last = whole.measures()
    divergence = Divergence(model, texts[:4])
    expected, statistics = {}, {}
    for coefficients in (WANDA, RIA):
        with rehearsed(calls_of(model, texts), remembering(pruning(coefficients, False), statistics)):
            expected[coefficients] = [divergence(window) for window in range(4)]
    with pruned(statistics, pruning(WANDA, True)):
        expected["cheap"] = [divergence(window) for window in range(4)]
    assert whole.tokens == (15,) * 4  # of five sequences one half has two
    # First without statistics, as in a search that goes on.
    assert first.losses(WANDA, range(4)) == expected["cheap"]
    assert last.losses(WANDA, range(4)) == expected[WANDA]
    assert first.losses(RIA, range(4)) == last.losses(RIA, range(4)) == expected[RIA]
    assert first.losses(WANDA, range(1, 3)) == expected["cheap"][1:3]


def test_the_guess_is_pruned_once_for_both_stages(model, texts, monkeypatch):
    import crepe_llm.search.whole_model as module

    rehearsals = []
    monkeypatch.setattr(module, "rehearsed", lambda *args: rehearsals.append(args) or rehearsed(*args))
    first, last = WholeModel(model, texts, RIA, pruning_of(model)).measures()
    last.losses(RIA, range(4))
    first.losses(WANDA, range(4))
    first.losses(RIA, range(4))
    assert len(rehearsals) == 1


def test_windows_of_many_sequences_come_first():
    first, second = torch.arange(1300), torch.arange(600)
    assert [len(window) for window in _in_turn([first, second])] == [512, 512, 512, 88, 276]


def test_without_blocks_statistics_are_the_dense_model_s(model, texts):
    pruning, statistics = pruning_of(model), {}
    dense = Pruning(pruning(RIA, True).wanted, Calibration(), lambda layer: None)
    with rehearsed(calls_of(model, texts), remembering(dense, statistics)):
        pass
    model.model.others = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(2)])
    whole = WholeModel(model, texts, RIA, pruning)
    divergence = Divergence(model, texts[:2])
    with pruned(statistics, pruning(WANDA, True)):
        expected = [divergence(half) for half in (0, 1)]
    for measure in whole.measures():
        assert measure.losses(WANDA, range(2)) == pytest.approx(expected, rel=1e-4)
