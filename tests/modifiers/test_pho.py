"""PHOSearchModifier through llm-compressor's own oneshot."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from llmcompressor.modifiers.pruning import SparseGPTModifier
from transformers import AutoModelForCausalLM

from crepe_llm.functional.masks import keep_mask
from crepe_llm.functional.scores import crepe_scores
from crepe_llm.modifiers import ADMMModifier, CRePEModifier, PHOSearchModifier, WeightCorrectionModifier
from crepe_llm.modifiers.judging import texts_in
from crepe_llm.search.fitness import PROXIES
from crepe_llm.search.space import RIA, Coefficients, Mask
from crepe_llm.search.study import Study, StudyError
from crepe_llm.search.whole_model import WholeModel
from modifier_helpers import linears, load, run
from tiny_models import FAMILIES

RECIPE = Path(__file__).parents[2] / "recipes" / "crepe_2of4_pho.yaml"


SHIPPED = yaml.safe_load((RECIPE.parent / "crepe_unstructured_50.yaml").read_text())["crepe_stage"]
COEFFICIENTS = ("row", "column", "neighbourhood", "kernel_size", "activation_exponent")


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def pair(tmp_path):
    """A function: fields of PHO, fields of CRePE -> both modifiers, PHO's record in the test's folder."""

    def make(pho=None, crepe=None):
        fields = {"candidates": 8, "record": str(tmp_path / "study.json"), "rows": 16, "layers_per_kind": 1}
        fields["tokens"] = 1000
        fields.update(pho or {})
        fields = {name: value for name, value in fields.items() if value is not None}
        return PHOSearchModifier(**fields), CRePEModifier(**{"mask_structure": "2:4", **(crepe or {})})

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_crepe_prunes_with_what_pho_found(tiny_model_folder, calibration_data, pair, tmp_path, family):
    pho, crepe = pair()
    model = run(load(tiny_model_folder(family)), [pho, crepe], calibration_data)
    study = Study.load(tmp_path / "study.json")
    assert study.finished
    assert len(study.candidates) >= 9
    assert len(study.stages) == 2
    chosen = study.recommended
    assert chosen.fields == pho.chosen
    assert all(crepe.value(name) == value for name, value in pho.chosen.items())
    # The same coefficients given by hand prune the same, so the search left the weights and the data as they were.
    by_hand = CRePEModifier(mask_structure="2:4", **chosen.fields)
    expected = run(load(tiny_model_folder(family)), [by_hand], calibration_data)
    assert same(weights(model), weights(expected))


def test_the_sample_holds_true_statistics(tiny_model_folder, calibration_data, pair):
    """RIA's value in the study, against the layers' errors computed from captured inputs of the dense model."""
    pho, crepe = pair({"proxy": "reconstruction", "rows": 1000, "layers_per_kind": 5})
    model = load(tiny_model_folder("llama"))
    inputs = {}

    def hook(name):
        def capture(module, args):
            inputs.setdefault(name, []).append(args[0].detach()[mask.bool()])

        return capture

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    ids, masks = torch.tensor(calibration_data["input_ids"]), torch.tensor(calibration_data["attention_mask"])
    with torch.no_grad():
        for start in range(0, len(ids), 4):
            mask = masks[start : start + 4]
            model(input_ids=ids[start : start + 4], attention_mask=mask)
    for handle in handles:
        handle.remove()
    errors = []
    for name, module in layers.items():
        x, weight = torch.cat(inputs[name]).double(), module.weight.detach()
        scores = crepe_scores(weight, x.norm(dim=0).float(), **RIA.of_score)
        lost = weight.masked_fill(keep_mask(scores, 0.5, "2:4"), 0).double()
        errors.append(float((x @ lost.T).square().sum() / (x @ weight.double().T).square().sum()))
    run(model, [pho, crepe], calibration_data)
    assert sorted(pho.result.sample["layers"]) == sorted(layers)
    assert pho.result.sample["tokens"] == int(masks.sum())
    assert pho.result.reference.value == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_saved_recipe_prunes_the_same_without_searching(tiny_model_folder, calibration_data, pair, tmp_path, messages):
    pho, crepe = pair()
    first = run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data, output_dir=str(tmp_path / "out"))
    (tmp_path / "study.json").unlink()
    saved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    [stage] = saved.values()
    [modifiers] = stage.values()
    found = modifiers["PHOSearchModifier"]["found"]
    assert {name: modifiers["CRePEModifier"][name] for name in found} == found == pho.chosen
    assert isinstance(found["kernel_size"], int)
    messages.clear()
    again = run(load(tiny_model_folder("llama")), str(tmp_path / "out" / "recipe.yaml"), calibration_data)
    assert same(weights(first), weights(again))
    assert any("no search" in line for line in messages)
    assert not (tmp_path / "study.json").exists()


def test_the_recipe_of_this_project(tiny_model_folder, calibration_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = RECIPE.read_text().replace("PHOSearchModifier: {}", "PHOSearchModifier: {candidates: 12, tokens: 1000}")
    assert text != RECIPE.read_text()
    (tmp_path / "recipe.yaml").write_text(text)
    model = run(load(tiny_model_folder("llama")), str(tmp_path / "recipe.yaml"), calibration_data)
    zeros = (model.model.layers[0].mlp.up_proj.weight == 0).double().mean().item()
    assert zeros == 0.5
    [record] = (tmp_path / "cache" / "crepe-llm" / "pho_studies").iterdir()
    assert not (tmp_path / "pho_studies").exists()
    assert "2of4" in record.name
    assert Study.load(record).finished


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("group", ["row", "matrix"])
def test_every_proxy_and_unstructured_group(tiny_model_folder, calibration_data, pair, proxy, group):
    pho, crepe = pair(
        {"proxy": proxy, "candidates": 10}, {"mask_structure": "0:0", "sparsity": 0.6, "comparison_group": group}
    )
    run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
    assert pho.result.mask == Mask("0:0", 0.6, group)
    assert pho.result.proxy == proxy


def test_which_weights_compete_is_searched_for(tiny_model_folder, calibration_data, pair, monkeypatch, tmp_path):
    """Both groups are tried; what was found prunes so, and is in the saved recipe."""
    own = Coefficients(1.0, 0.2, 0.06, 19, 1.0, "matrix")
    fields = own.of_score | {"mask_structure": "0:0", "sparsity": 0.6, "comparison_group": "matrix"}
    best = dataclasses.replace(own, comparison_group="row")
    spoilt(monkeypatch, best)
    pho, crepe = pair({"tokens": 3000}, fields)
    first = run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data, output_dir=str(tmp_path / "out"))
    tried = [trial.coefficients for trial in pho.result.stages[0].trials]
    assert (
        tried[0] == own
        and {RIA.of_score["column"]: "matrix", 0.0: "row"}.items()
        <= {each.column: each.comparison_group for each in tried}.items()
    )
    assert {each.coefficients.comparison_group for each in pho.result.candidates[1:]} == {"row", "matrix"}
    assert pho.chosen == best.of_score | {"comparison_group": "row"}
    for module in linears(first).values():
        zeros = (module.weight == 0).sum(1)
        assert bool((zeros == zeros[0]).all())
    monkeypatch.undo()
    again = run(load(tiny_model_folder("llama")), str(tmp_path / "out" / "recipe.yaml"), calibration_data)
    assert same(weights(first), weights(again))


def test_comparison_groups_can_be_kept(tiny_model_folder, calibration_data, pair):
    pho, crepe = pair({"space": {"comparison_groups": []}}, {"mask_structure": "0:0", "sparsity": 0.6})
    run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
    assert all(trial.coefficients.comparison_group is None for stage in pho.result.stages for trial in stage.trials)
    assert "comparison_group" not in pho.chosen
    pho, crepe = pair({"space": {"comparison_groups": ["row", "matrix"]}})
    with pytest.raises(
        ValueError, match="in 2:4 masks the weights of a group of M compete: leave comparison_groups out"
    ):
        run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)


def seen(study):
    """What a study holds but times."""
    stages = [[(trial.coefficients, trial.losses) for trial in stage.trials] for stage in study.stages]
    return [(c.coefficients, c.value) for c in study.candidates], stages


def test_searches_repeat_and_go_on(tiny_model_folder, calibration_data, pair, tmp_path):
    """A search by proxy with a larger budget goes on where the smaller one ended; what was measured stays."""
    found = []
    for record, budget in (("small", 8), ("large", 24), ("small", 24), ("large", 24)):
        pho, crepe = pair({"candidates": budget, "record": str(tmp_path / record)})
        run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
        found.append(seen(pho.result))
    assert found[1][0][:9] == found[0][0]
    assert found[1] == found[2] == found[3]


def test_a_killed_run_is_resumed_to_the_same_end(tiny_model_folder, calibration_data, pair, tmp_path):
    """SIGKILL of a whole oneshot run in another process while it measures the pruned model."""
    folder = tiny_model_folder("llama")
    calibration_data.to_json(tmp_path / "data.jsonl")
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys, time\n"
        "import torch\n"
        "from datasets import Dataset\n"
        "from llmcompressor import oneshot\n"
        "from transformers import AutoModelForCausalLM\n"
        "import crepe_llm.modifiers.pho as pho\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "from crepe_llm.search.divergence import Divergence\n"
        "call = Divergence.__call__\n"
        "Divergence.__call__ = lambda *a: time.sleep(0.02) or call(*a)\n"
        "record, folder, data = sys.argv[1:]\n"
        "rows = [json.loads(line) for line in open(data)]\n"
        "search = pho.PHOSearchModifier(candidates=8, tokens=1000, record=record, rows=16, layers_per_kind=1)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)\n"
        "recipe = [search, pho.CRePEModifier(mask_structure='2:4')]\n"
        "oneshot(model=model, recipe=recipe, dataset=Dataset.from_list(rows), batch_size=4,\n"
        "        num_calibration_samples=len(rows), shuffle_calibration_samples=False)\n"
    )
    killed, whole = tmp_path / "killed.json", tmp_path / "whole.json"
    command = [sys.executable, str(script), str(killed), str(folder), str(tmp_path / "data.jsonl")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while not (killed.exists() and sum(len(stage.trials) for stage in Study.load(killed).stages) > 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not Study.load(killed).finished
    outcomes = []
    for record in (killed, whole):
        pho, crepe = pair({"record": str(record)})
        model = run(load(folder), [pho, crepe], calibration_data)
        outcomes.append((seen(Study.load(record)), weights(model)))
    assert outcomes[0][0] == outcomes[1][0]
    assert same(outcomes[0][1], outcomes[1][1])


def test_an_earlier_study_is_judged_by_the_last_stage_alone(
    tiny_model_folder, calibration_data, pair, tmp_path, monkeypatch
):
    pho, crepe = pair()
    run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
    before = (tmp_path / "study.json").read_bytes()
    # On another model, and before a correction that the study knew nothing of.
    reused, crepe = pair({"study": str(tmp_path / "study.json"), "record": str(tmp_path / "second.json")})
    recipe = [reused, crepe, WeightCorrectionModifier()]
    transferred = run(load(tiny_model_folder("qwen2")), recipe, calibration_data)
    assert (tmp_path / "study.json").read_bytes() == before
    [stage] = Study.load(tmp_path / "second.json").stages
    own = Coefficients(row=1.0, column=1.0, neighbourhood=1.0, kernel_size=3, activation_exponent=0.5)
    challengers = [each for each in pho.result.challengers if each != own]
    assert [trial.coefficients for trial in stage.trials] == [own, *challengers]
    assert reused.chosen == stage.winner.coefficients.fields
    by_hand = [CRePEModifier(mask_structure="2:4", **reused.chosen), WeightCorrectionModifier()]
    assert same(weights(transferred), weights(run(load(tiny_model_folder("qwen2")), by_hand, calibration_data)))

    other, crepe = pair({"study": str(tmp_path / "study.json"), "record": None}, {"mask_structure": "4:8"})
    with pytest.raises(StudyError, match=r"searched for 2:4 masks, .* to prune 4:8"):
        run(load(tiny_model_folder("llama")), [other, crepe], calibration_data)
    content = json.loads((tmp_path / "study.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps(content | {"stages": [], "candidates": []}))
    empty, crepe = pair({"study": str(tmp_path / "empty.json"), "record": None})
    monkeypatch.setattr(PHOSearchModifier, "on_calibration_start", lambda *_, **__: pytest.fail("it calibrates"))
    with pytest.raises(StudyError, match=r"study=.*empty\.json: the study has no candidates yet; restore the file"):
        run(load(tiny_model_folder("llama")), [empty, crepe], calibration_data)
    missing, crepe = pair({"study": str(tmp_path / "none.json"), "record": None})
    with pytest.raises(StudyError, match="cannot be read"):
        run(load(tiny_model_folder("llama")), [missing, crepe], calibration_data)


OWN = Coefficients(row=1.0, column=1.0, neighbourhood=1.0, kernel_size=3, activation_exponent=0.5)  # the defaults


def sharp(folder):
    """A model whose predictions are far from even, so that pruning moves them by much."""
    model = load(folder).eval()
    with torch.no_grad():
        model.model.norm.weight *= 10
    return model


def test_the_last_stage_prunes_as_the_recipe_does(tiny_model_folder, calibration_data, pair):
    """ADMM included: the incumbent's loss is the divergence of the model that the recipe without a search gives."""
    pho, crepe = pair()
    run(sharp(tiny_model_folder("llama")), [pho, crepe, ADMMModifier(rounds=2, iterations=3)], calibration_data)
    last = pho.result.stages[-1]
    used, masks = calibration_data["input_ids"], calibration_data["attention_mask"]
    texts = [torch.tensor(ids)[torch.tensor(mask).bool()] for ids, mask in zip(used, masks, strict=True)]
    dense = sharp(tiny_model_folder("llama"))
    recipe = [CRePEModifier(mask_structure="2:4"), ADMMModifier(rounds=2, iterations=3)]
    model = run(sharp(tiny_model_folder("llama")), recipe, calibration_data, batch_size=1)
    expected = []
    for text in texts:
        with torch.no_grad():
            p, q = (m.eval()(text[None]).logits[0, :-1].double().log_softmax(1) for m in (dense, model))
        expected.append((p.exp() * (p - q)).sum().item())
    assert last.trials[0].coefficients == OWN
    # The dense model's log-probabilities are kept in half precision.
    losses = last.trials[0].losses
    assert len(losses) >= 8 and losses == pytest.approx(expected[: len(losses)], rel=0.02, abs=8e-3)
    assert sum(expected) > 0.5
    # The recipe's own run begins with empty tables.
    assert set(recipe_errors(crepe)) == set(crepe.realised)
    # The first stage prunes by masks alone.
    quick = pho.result.stages[0].trials[0].losses
    assert quick != losses[: len(quick)]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_judged_are_the_weights_that_the_recipe_makes(
    tiny_model_folder, calibration_data, pair, monkeypatch, family, batch_size
):
    """Bit for bit, in 16-bit floats and with padding, where attention with and without a mask differ."""
    from crepe_llm.search.divergence import Divergence

    found, measure = [], Divergence.__call__

    def seen(self, window):
        found.append({name: module.weight.clone() for name, module in linears(self._model).items()})
        return measure(self, window)

    monkeypatch.setattr(Divergence, "__call__", seen)
    folder = tiny_model_folder(family)
    pho, crepe = pair()
    more = [WeightCorrectionModifier(method="pcg")]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    run(model, [pho, crepe, *copy.deepcopy(more)], calibration_data, batch_size=batch_size)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    run(model, [CRePEModifier(mask_structure="2:4"), *more], calibration_data, batch_size=batch_size)
    for name, module in linears(model).items():
        assert torch.equal(found[0][name], module.weight), name


def test_known_points_are_tried(tiny_model_folder, calibration_data, pair):
    """Among them the shipped recipes' coefficients, whatever coefficients the CRePEModifier has."""
    pho, crepe = pair({"tokens": 3000})
    run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
    tried = [trial.coefficients for trial in pho.result.stages[0].trials]
    shipped = yaml.safe_load(RECIPE.read_text())["crepe_stage"]["pruning_modifiers"]["CRePEModifier"]
    assert tried[:2] == [OWN, Coefficients(**{name: shipped[name] for name in COEFFICIENTS})]
    start = {"row": 1.0, "column": 2.5, "neighbourhood": 0.5, "kernel_size": 5, "activation_exponent": 0.7}
    pho, crepe = pair({"tokens": 3000, "starts": [start], "record": pho.record + "2"})
    run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
    again = [trial.coefficients for trial in pho.result.stages[0].trials]
    assert again[:2] == [OWN, Coefficients(**start)] and tried[1] not in again


def recipe_errors(crepe):
    return crepe.pruning_pass._modifiers[1].errors


def spoilt(monkeypatch, best):
    """Have every candidate but one lose more on every window."""

    def losses(coefficients, windows):
        return [float(window + (2 if coefficients == best else 3)) for window in windows]

    measures = WholeModel.measures
    monkeypatch.setattr(
        WholeModel, "measures", lambda self: tuple(dataclasses.replace(each, losses=losses) for each in measures(self))
    )


@pytest.mark.parametrize("winner", ["own", "ria"])
def test_the_last_stage_decides_and_says_so(
    tiny_model_folder, calibration_data, pair, monkeypatch, messages, winner, tmp_path
):
    own = Coefficients(row=1.0, column=2.0, neighbourhood=0.5, kernel_size=5, activation_exponent=0.7)
    good = own if winner == "own" else RIA
    spoilt(monkeypatch, good)
    pho, crepe = pair({}, own.of_score)
    run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
    assert Coefficients(**pho.chosen) == good
    assert any("nothing is clearly better than row 1, column 2" in line for line in messages) == (winner == "own")
    assert any("is better than row 1, column 2" in line for line in messages) == (winner == "ria")


def test_costs_are_told_and_a_budget_that_is_too_small_keeps_the_incumbent(
    tiny_model_folder, calibration_data, pair, messages
):
    pho, crepe = pair()
    run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
    told = next(number for number, line in enumerate(messages) if "minutes more" in line)
    assert told < next(number for number, line in enumerate(messages) if "first stage" in line)
    pho, crepe = pair({"minutes": 1e-4, "tokens": None, "record": pho.record + "2"})
    run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
    assert pho.chosen == {name: crepe.value(name) for name in pho.chosen}
    assert Coefficients(**pho.chosen) == Coefficients(1.0, 1.0, 1.0, 3, 0.5)
    assert any("minutes=0.0001 does not pay" in line for line in messages)


def test_ctrl_c_keeps_the_study(tiny_model_folder, calibration_data, pair, monkeypatch, tmp_path, messages):
    from crepe_llm.search.divergence import Divergence

    measure, calls = Divergence.__call__, 0

    def interrupted(self, window):
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return measure(self, window)

    monkeypatch.setattr(Divergence, "__call__", interrupted)
    pho, crepe = pair()
    model = load(tiny_model_folder("llama"))
    before = weights(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, [pho, crepe], calibration_data)
    assert sum(len(stage.trials) for stage in Study.load(tmp_path / "study.json").stages) > 3
    assert any("the study is kept in" in line for line in messages)
    assert same(before, weights(model))


def test_one_sequence_has_no_halves(tiny_model_folder, calibration_data, pair):
    with pytest.raises(ValueError, match=r"at least two sequences .* there are 1: calibrate"):
        run(load(tiny_model_folder("llama")), list(pair()), calibration_data.select([1]))


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is damaged, it is not JSON"), ('{"format": 2}', "is damaged"), (None, "was made with mask=")],
)
def test_a_record_that_does_not_fit_is_refused_before_the_calibration(
    tiny_model_folder, calibration_data, pair, tmp_path, monkeypatch, content, message
):
    record = tmp_path / "record.json"
    if content is None:
        model = Path(tiny_model_folder("llama")).name
        Study(model, Mask("4:8", 0.5), "balanced_reconstruction", higher_is_better=False).save(record)
    else:
        record.write_text(content)
    before = record.read_text()
    pho, crepe = pair({"record": str(record)})
    monkeypatch.setattr(PHOSearchModifier, "on_calibration_start", lambda *_, **__: pytest.fail("it calibrates"))
    with pytest.raises(StudyError, match=message):
        run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
    assert record.read_text() == before


def test_masks_that_prune_nothing_are_not_searched_for(tiny_model_folder, calibration_data, pair):
    pho, crepe = pair({}, {"mask_structure": "0:0", "sparsity": 0.0})
    with pytest.raises(ValueError, match="sparsity=0 prunes nothing"):
        run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)


def test_a_search_alone_changes_nothing(tiny_model_folder, calibration_data, pair):
    pho, _ = pair({"mask_structure": "2:4"})
    model = load(tiny_model_folder("llama"))
    before = weights(model)
    run(model, [pho], calibration_data)
    assert same(before, weights(model))
    assert pho.result.finished
    assert all(stage.trials[0].coefficients == RIA for stage in pho.result.stages)


def test_experts_that_were_never_routed_to_are_left_out(tiny_model_folder, calibration_data, pair):
    pho, _ = pair({"mask_structure": "2:4", "layers_per_kind": 8, "ignore": ["re:.*lm_head", "re:.*gate$"]})
    run(load(tiny_model_folder("mixtral")), [pho], calibration_data)
    assert pho.result.sample["layers"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"proxy": "perplexity"}, "proxy=perplexity must be one of gini"),
        ({"candidates": 0}, r"candidates\n  Input should be greater than 0"),
        ({"minutes": -1}, r"minutes\n  Input should be greater than 0"),
        ({"rows": 0}, r"rows\n  Input should be greater than 0"),
        ({"sparsity": 0.0}, r"sparsity\n  Input should be greater than 0"),
        ({"sparsity": 50}, r"sparsity\n  Input should be less than 1"),
        ({"space": {"column": [2, 1]}}, "column=.*is empty"),
        ({"space": {"column": 7.0}}, r"space=\{'column': 7\.0\}: .*give two numbers for each of column"),
        ({"space": {"kernel_sizes": 31}}, r"space=.*a list of kernel_sizes"),
        ({"space": {"row": "x"}}, r"space=.*one number for row"),
        ({"incumbent": RIA.of_score | {"kernel_size": 3.7}}, "kernel_size must be a whole number"),
        ({"space": {"colum": [1, 2]}}, "no bounds called colum; it has"),
        ({"study": "a", "record": "a"}, "give record another file"),
        ({"tokens": 5, "minutes": 1}, "tokens=5 and minutes=1.0 are both budgets"),
        ({"tokens": 0}, r"tokens\n  Input should be greater than 0"),
        ({"found": {"row": 1.0}}, "found=.* must hold exactly row, column"),
        ({"incumbent": {"row": 1.0}}, "incumbent=.* must hold exactly row, column"),
        ({"verify": True}, "Extra inputs"),
        ({"optimiser": "adam"}, "cma"),
        ({"population": 3}, "Extra inputs"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PHOSearchModifier(**fields)


def test_a_search_for_a_modifier_without_coefficients_is_refused(tiny_model_folder, calibration_data):
    recipe = [PHOSearchModifier(mask_structure="2:4"), SparseGPTModifier(mask_structure="2:4", sparsity=0.5)]
    with pytest.raises(ValueError, match="of which SparseGPTModifier has none: leave PHOSearchModifier out"):
        run(load(tiny_model_folder("llama")), recipe, calibration_data)


def test_bad_places_in_a_recipe_are_refused(tiny_model_folder, calibration_data, pair):
    def refused(recipe, **kwargs):
        run(load(tiny_model_folder("llama")), recipe, calibration_data, **kwargs)

    pho, crepe = pair()
    with pytest.raises(ValueError, match=r"has CRePEModifier before it .* Put it before"):
        refused([crepe, pho])
    pho, crepe = pair()
    with pytest.raises(ValueError, match="2 CRePEModifiers after it"):
        refused([pho, crepe, CRePEModifier(mask_structure="2:4")])
    pho, crepe = pair()
    with pytest.raises(ValueError, match="independent"):
        refused([pho, crepe], pipeline="sequential")
    pho, _ = pair()
    with pytest.raises(ValueError, match="does not know what to search for"):
        refused([pho])
    pho, crepe = pair({"mask_structure": "4:8"})
    with pytest.raises(ValueError, match="mask_structure=4:8 contradicts the CRePEModifier's mask_structure=2:4"):
        refused([pho, crepe])
    pho, crepe = pair({}, {"mask_structure": "0:0", "sparsity": {"re:.*mlp.*": 0.6, "re:.*": 0.4}})
    with pytest.raises(ValueError, match="differs between layers"):
        refused([pho, crepe])
    pho, crepe = pair({}, {"mask_structure": {"re:.*mlp.*": "5:8", "re:.*": "3:8"}})
    with pytest.raises(ValueError, match=r"mask_structure differs between layers.*give PHOSearchModifier a mask_str"):
        refused([pho, crepe])
    pho, crepe = pair({"incumbent": RIA.of_score})
    with pytest.raises(ValueError, match="whose own coefficients are to be beaten"):
        refused([pho, crepe])
    pho, crepe = pair({}, {"score": "cvr"})
    with pytest.raises(ValueError, match="has score: cvr, which has none: leave PHOSearchModifier out"):
        refused([pho, crepe])
    pho, crepe = pair({"sparsity": 0.5}, {"mask_structure": "0:0", "sparsity": {"re:.*mlp.*": 0.6, "re:.*": 0.4}})
    run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
    assert pho.result.mask == Mask("0:0", 0.5, "row")


def test_another_calibration_does_not_continue_a_study(tiny_model_folder, calibration_data, pair):
    pho, crepe = pair()
    run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
    pho, crepe = pair()
    with pytest.raises(StudyError, match="was made with sample="):
        run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data.select(range(8)))


def test_another_mapping_does_not_continue_a_study(tiny_model_folder, calibration_data, pair):
    def searched(mlp):
        mapping = {"re:.*mlp.*": mlp, "re:.*": 0.5}
        pho, crepe = pair({"sparsity": 0.5}, {"mask_structure": "0:0", "sparsity": mapping})
        run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)

    searched(0.6)
    searched(0.6)
    with pytest.raises(StudyError, match="was made with sample="):
        searched(0.4)


def test_structures_that_cut_no_layer_are_refused_before_the_calibration(
    tiny_model_folder, calibration_data, monkeypatch
):
    monkeypatch.setattr(PHOSearchModifier, "on_calibration_start", lambda *_, **__: pytest.fail("it calibrates"))
    with pytest.raises(
        ValueError, match=r'has \d+ input channels, which mask_structure="2:5" cannot cut into groups of 5'
    ):
        run(load(tiny_model_folder("llama")), [PHOSearchModifier(mask_structure="2:5")], calibration_data)


def test_the_environment_stays_as_it_was(tiny_model_folder, calibration_data, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pho, crepe = pair()
    run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
    assert not os.path.exists("outcmaes")
    assert {entry.name for entry in tmp_path.iterdir()} <= {"study.json", "sparse_logs"}


def test_the_command_searches_and_a_recipe_uses_its_study(tiny_model_folder, calibration_data, tmp_path, capsys):
    from crepe_llm.cli.main import main

    folder = tiny_model_folder("llama")
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(3, 95, (400,), generator=generator).tolist()
    (tmp_path / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    study, plot = tmp_path / "study.json", tmp_path / "study.png"
    arguments = ["search", str(folder), "--text", str(tmp_path / "text.txt"), "--samples", "8", "--length", "16"]
    arguments += [
        "--sparsity",
        "0.6",
        "--candidates",
        "16",
        "--tokens",
        "1000",
        "--study",
        str(study),
        "--plot",
        str(plot),
    ]
    arguments += ["--json", str(tmp_path / "figures.json")]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    printed = shown.out
    assert printed.startswith("model: ") and "\nstudy: " in printed and "\nlog: " in printed
    assert shown.err.count("nothing is clearly better") <= 1
    assert "Calibrating" not in shown.err and "INFO" not in shown.err
    recorded = Study.load(study)
    assert recorded.mask == Mask("0:0", 0.6, "matrix")
    assert recorded.finished
    assert plot.stat().st_size > 1000
    lines = yaml.safe_load(printed[printed.index("CRePEModifier:") :])["CRePEModifier"]
    chosen = recorded.recommended
    assert lines.pop("comparison_group") == chosen.comparison_group
    assert lines == pytest.approx(chosen.of_score, rel=1e-3)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["coefficients"] == chosen.fields and figures["candidates"] == len(recorded.candidates)
    # The shipped coefficients are to be beaten.
    assert recorded.stages[-1].trials[0].coefficients == Coefficients(
        **{name: SHIPPED["pruning_modifiers"]["CRePEModifier"][name] for name in COEFFICIENTS},
        comparison_group="matrix",
    )
    assert "incumbent" in printed

    assert main([*arguments[:-4], "--study", str(study), "--seed", "1"]) == 2
    assert "was made with sample=" in capsys.readouterr().err
    assert main([*arguments[:-4], "--study", str(study), "--proxy", "luck"]) == 2
    assert "proxy=luck must be one of" in capsys.readouterr().err


def test_calibration_data_without_text_is_named():
    with pytest.raises(ValueError, match=r"PHOSearchModifier compares predictions of text, .* holds input_features"):
        texts_in([{"input_features": torch.zeros(1, 4, 8)}], "PHOSearchModifier")
