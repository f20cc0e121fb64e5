"""PHOSearchModifier through llm-compressor's own oneshot."""

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

from crepe_llm.functional.masks import keep_mask
from crepe_llm.functional.scores import crepe_scores
from crepe_llm.modifiers import CRePEModifier, PHOSearchModifier
from crepe_llm.search.fitness import PROXIES
from crepe_llm.search.space import RIA, Coefficients, Mask
from crepe_llm.search.study import Study, StudyError
from modifier_helpers import load, run
from tiny_models import FAMILIES

RECIPE = Path(__file__).parents[2] / "recipes" / "crepe_2of4_pho.yaml"


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def pair(tmp_path):
    """A function: fields of PHO, fields of CRePE -> both modifiers, PHO's record in the test's folder."""

    def make(pho=None, crepe=None):
        fields = {"candidates": 20, "record": str(tmp_path / "study.json"), "rows": 16, "layers_per_kind": 1}
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
    assert len(study.candidates) >= 21
    chosen = study.best.coefficients
    assert vars(chosen) == pho.chosen
    assert all(crepe.value(name) == value for name, value in pho.chosen.items())
    # The same coefficients given by hand prune the same, so the search left the weights and the data as they were.
    by_hand = CRePEModifier(mask_structure="2:4", **vars(chosen))
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
        scores = crepe_scores(weight, x.norm(dim=0).float(), **vars(RIA))
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
    text = RECIPE.read_text().replace("candidates: 200", "candidates: 12")
    assert text != RECIPE.read_text()
    (tmp_path / "recipe.yaml").write_text(text)
    model = run(load(tiny_model_folder("llama")), str(tmp_path / "recipe.yaml"), calibration_data)
    zeros = (model.model.layers[0].mlp.up_proj.weight == 0).double().mean().item()
    assert zeros == 0.5
    [record] = (tmp_path / "cache" / "crepe_llm" / "pho_studies").iterdir()
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


def test_searches_repeat_and_resume(tiny_model_folder, calibration_data, pair, tmp_path, messages):
    values = []
    for budget in (20, 40):
        pho, crepe = pair({"candidates": budget, "record": str(tmp_path / f"{budget}.json")})
        run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
        values.append([(c.coefficients, c.value) for c in pho.result.candidates])
    assert values[1][: len(values[0])] == values[0]
    resumed, crepe = pair({"candidates": 40, "record": str(tmp_path / "20.json")})
    run(load(tiny_model_folder("llama")), [resumed, crepe], calibration_data)
    assert [(c.coefficients, c.value) for c in resumed.result.candidates] == values[1]


def test_a_killed_run_is_resumed_to_the_same_end(tiny_model_folder, calibration_data, pair, tmp_path):
    """SIGKILL during the search of a whole oneshot run in another process."""
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
        "evaluate = pho.evaluate\n"
        "pho.evaluate = lambda *a: time.sleep(0.05) or evaluate(*a)\n"
        "record, folder, data = sys.argv[1:]\n"
        "rows = [json.loads(line) for line in open(data)]\n"
        "search = pho.PHOSearchModifier(candidates=40, record=record, rows=16, layers_per_kind=1)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)\n"
        "recipe = [search, pho.CRePEModifier(mask_structure='2:4')]\n"
        "oneshot(model=model, recipe=recipe, dataset=Dataset.from_list(rows), batch_size=4,\n"
        "        num_calibration_samples=len(rows), shuffle_calibration_samples=False)\n"
    )
    killed, whole = tmp_path / "killed.json", tmp_path / "whole.json"
    command = [sys.executable, str(script), str(killed), str(folder), str(tmp_path / "data.jsonl")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while not (killed.exists() and len(json.loads(killed.read_text())["candidates"]) > 12):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not Study.load(killed).finished
    outcomes = []
    for record in (killed, whole):
        pho, crepe = pair({"candidates": 40, "record": str(record)})
        model = run(load(folder), [pho, crepe], calibration_data)
        outcomes.append(([(c.coefficients, c.value) for c in Study.load(record).candidates], weights(model)))
    assert outcomes[0][0] == outcomes[1][0]
    assert same(outcomes[0][1], outcomes[1][1])


def test_an_earlier_study_is_used_instead_of_searching(tiny_model_folder, calibration_data, pair, tmp_path, messages):
    pho, crepe = pair()
    run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
    before = (tmp_path / "study.json").read_bytes()
    # On another model, too.
    reused, crepe = pair({"study": str(tmp_path / "study.json"), "record": None})
    transferred = run(load(tiny_model_folder("qwen2")), [reused, crepe], calibration_data)
    assert reused.chosen == pho.chosen
    assert (tmp_path / "study.json").read_bytes() == before
    by_hand = CRePEModifier(mask_structure="2:4", **pho.chosen)
    assert same(weights(transferred), weights(run(load(tiny_model_folder("qwen2")), [by_hand], calibration_data)))

    other, crepe = pair({"study": str(tmp_path / "study.json"), "record": None}, {"mask_structure": "4:8"})
    with pytest.raises(StudyError, match=r"searched for 2:4 masks, .* to prune 4:8"):
        run(load(tiny_model_folder("llama")), [other, crepe], calibration_data)
    missing, crepe = pair({"study": str(tmp_path / "none.json"), "record": None})
    with pytest.raises(StudyError, match="cannot be read"):
        run(load(tiny_model_folder("llama")), [missing, crepe], calibration_data)


def test_a_result_no_better_than_ria_is_not_used(tiny_model_folder, calibration_data, pair, monkeypatch, messages):
    monkeypatch.setattr(
        "crepe_llm.modifiers.pho.evaluate",
        lambda samples, c, mask, proxy: 0.0 if c == RIA else c.activation_exponent,
    )
    pho, crepe = pair()
    run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
    assert Coefficients(**pho.chosen) == RIA
    assert (crepe.value("neighbourhood"), crepe.value("activation_exponent")) == (0.0, 0.5)
    assert any("RIA's are used" in line for line in messages)


def test_verification_measures_real_perplexity_and_restores_the_model(
    tiny_model_folder, calibration_data, pair, tmp_path
):
    own = {"row": 1.0, "column": 4.0, "neighbourhood": 3.0, "kernel_size": 31, "activation_exponent": 0.85}
    verified, crepe = pair({"verify": True, "finalists": 6}, own)
    model = run(load(tiny_model_folder("llama")), [verified, crepe], calibration_data)
    study = Study.load(tmp_path / "study.json")
    finalists = {finalist.coefficients: finalist.perplexity for finalist in study.finalists}
    assert len(finalists) == len(study.finalists) == 6
    assert list(finalists)[:2] == [Coefficients(**own), RIA]
    assert study.best.coefficients in finalists
    ranked = [candidate.coefficients for candidate in sorted(study.candidates, key=study.loss)]
    assert set(list(finalists)[2:]) < set(ranked[:6])
    # What is used prunes as if it had been given by hand.
    used = Coefficients(**verified.chosen)
    assert used == study.recommended
    by_hand = CRePEModifier(mask_structure="2:4", **vars(used))
    expected = run(load(tiny_model_folder("llama")), [by_hand], calibration_data)
    assert same(weights(model), weights(expected))
    ria = finalists[RIA]
    # RIA's perplexity, from a model pruned by dense statistics, layer by layer.
    dense = load(tiny_model_folder("llama"))
    norms = {}
    ids, masks = torch.tensor(calibration_data["input_ids"]), torch.tensor(calibration_data["attention_mask"])

    def hook(module, args):
        norms[module] = norms.get(module, 0) + args[0].detach()[masks.bool()].double().square().sum(0)

    layers = [m for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    with torch.no_grad():
        dense(input_ids=ids, attention_mask=masks)
        for handle in handles:
            handle.remove()
        for layer in layers:
            scores = crepe_scores(layer.weight, norms[layer].sqrt().float(), **vars(RIA))
            layer.weight *= keep_mask(scores, 0.5, "2:4")
        total = count = 0
        for row, mask in list(zip(ids, masks, strict=True))[:8]:
            row = row[mask.bool()]
            logits = dense(input_ids=row[None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
            count += len(row) - 1
    assert ria == pytest.approx(float(torch.tensor(total / count).exp()), abs=2e-3)


@pytest.mark.parametrize("winner", ["own", "ria"])
def test_verification_decides_against_the_proxy(
    tiny_model_folder, calibration_data, pair, monkeypatch, messages, winner
):
    # A proxy that leads astray: it prefers exponents whose scores look at the inputs least.
    monkeypatch.setattr(
        "crepe_llm.modifiers.pho.evaluate", lambda samples, c, mask, proxy: 9.0 if c == RIA else c.activation_exponent
    )
    own = Coefficients(row=1.0, column=2.0, neighbourhood=0.5, kernel_size=5, activation_exponent=0.7)
    good = own if winner == "own" else RIA

    def losses(self, model, coefficients):
        return ((20.0, 31.0) if coefficients == good else (22.0, 33.0)), (10, 10)

    monkeypatch.setattr(PHOSearchModifier, "_losses", losses)
    pho, crepe = pair({"verify": True}, vars(own))
    run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
    assert len(pho.result.finalists) == 8
    assert pho.result.best.coefficients not in (own, RIA)
    assert Coefficients(**pho.chosen) == good
    kept = any("no finalist is clearly better than row 1, column 2" in line for line in messages)
    assert kept == (winner == "own")


def test_interrupted_verification_goes_on(tiny_model_folder, calibration_data, pair, monkeypatch):
    measure, measured = PHOSearchModifier._losses, []

    def interrupted(self, model, coefficients):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(coefficients)
        return measure(self, model, coefficients)

    def counted(self, model, coefficients):
        measured.append(coefficients)
        return measure(self, model, coefficients)

    with monkeypatch.context() as patch:
        patch.setattr(PHOSearchModifier, "_losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(load(tiny_model_folder("llama")), list(pair({"verify": True, "finalists": 5})), calibration_data)
    monkeypatch.setattr(PHOSearchModifier, "_losses", counted)
    resumed, crepe = pair({"verify": True, "finalists": 5})
    run(load(tiny_model_folder("llama")), [resumed, crepe], calibration_data)
    whole, crepe = pair({"verify": True, "finalists": 5, "record": resumed.record + ".whole"})
    run(load(tiny_model_folder("llama")), [whole, crepe], calibration_data)
    # Three before the interrupt, two after it; then five of the uninterrupted run.
    assert len(measured) == 3 + 2 + 5
    assert [(f.coefficients, f.losses) for f in resumed.result.finalists] == [
        (f.coefficients, f.losses) for f in whole.result.finalists
    ]
    assert resumed.chosen == whole.chosen


def test_ctrl_c_keeps_the_study(tiny_model_folder, calibration_data, pair, monkeypatch, tmp_path, messages):
    from crepe_llm.search.fitness import evaluate

    calls = 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 18:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr("crepe_llm.modifiers.pho.evaluate", interrupted)
    pho, crepe = pair()
    with pytest.raises(KeyboardInterrupt):
        run(load(tiny_model_folder("llama")), [pho, crepe], calibration_data)
    assert 8 < len(Study.load(tmp_path / "study.json").candidates) < 18
    assert any("the study is kept in" in line for line in messages)


def test_a_search_alone_changes_nothing(tiny_model_folder, calibration_data, pair):
    pho, _ = pair({"mask_structure": "2:4"})
    model = load(tiny_model_folder("llama"))
    before = weights(model)
    run(model, [pho], calibration_data)
    assert same(before, weights(model))
    assert pho.result.finished


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
        ({"space": {"column": [2, 1]}}, "column=.*is empty"),
        ({"space": {"colum": [1, 2]}}, "no bounds called colum; it has"),
        ({"study": "a", "record": "b"}, "one of the two"),
        ({"found": {"row": 1.0}}, "must hold exactly row, column"),
        ({"optimiser": "adam"}, "cma"),
        ({"population": 3}, "Extra inputs"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PHOSearchModifier(**fields)


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
    arguments += ["--sparsity", "0.6", "--candidates", "16", "--study", str(study), "--plot", str(plot)]
    arguments += ["--json", str(tmp_path / "figures.json")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    recorded = Study.load(study)
    assert recorded.mask == Mask("0:0", 0.6, "matrix")
    assert recorded.finished
    assert plot.stat().st_size > 1000
    lines = yaml.safe_load(printed[printed.index("CRePEModifier:") :])["CRePEModifier"]
    chosen = recorded.best.coefficients
    assert lines == pytest.approx(vars(chosen), rel=1e-3)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["coefficients"] == vars(chosen) and figures["candidates"] == len(recorded.candidates)

    recipe = [
        PHOSearchModifier(study=str(study)),
        CRePEModifier(mask_structure="0:0", sparsity=0.6, comparison_group="matrix"),
    ]
    run(load(folder), recipe, calibration_data)
    assert recipe[0].chosen == vars(chosen)

    # The same study, verified: the candidates stay, the finalists come.
    capsys.readouterr()
    assert main([*arguments, "--verify"]) == 0
    verified = Study.load(study)
    assert verified.candidates == recorded.candidates
    assert [finalist.coefficients for finalist in verified.finalists] == recorded.shortlist(8)
    assert "perplexity of 8 finalists" in capsys.readouterr().out

    assert main([*arguments[:-4], "--study", str(study), "--seed", "1"]) == 2
    assert "was made with sample=" in capsys.readouterr().err
    assert main([*arguments[:-4], "--study", str(study), "--proxy", "luck"]) == 2
    assert "proxy=luck must be one of" in capsys.readouterr().err
