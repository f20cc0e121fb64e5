"""docs/recipes.md: its generated parts are current, its recipes run, and its order rules hold."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import yaml
from llmcompressor.recipe import Recipe

import crepe_llm.modifiers
from crepe_llm.recipe_files import shipped_recipes
from modifier_helpers import load, run

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "recipes.md").read_text()
TUTORIAL = GUIDE.partition("## Which stack is best")[0]
RECIPES = re.findall(r"```yaml\n(.*?)```", TUTORIAL, re.DOTALL)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("recipe_reference", ROOT / "scripts" / "recipe_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PHO records its search in the working directory


def test_the_guide_is_not_stale(script):
    assert script.written(GUIDE) == GUIDE, "run python scripts/recipe_reference.py"


def test_what_is_stale_is_made_anew(script):
    old = GUIDE.replace("| `max_cycles` | integer |", "| `cycles` | number |").replace(
        "| `crepe_2of4_dsnot` |", "| ` |"
    )
    assert old != GUIDE and script.written(old) == GUIDE
    with pytest.raises(ValueError, match="has no lines <!-- generated: reference -->"):
        script.written(GUIDE.replace("<!-- generated: reference -->", ""))


def test_every_modifier_recipe_and_field_is_there():
    for modifier in crepe_llm.modifiers.__all__:
        section = GUIDE.partition(f"\n### {modifier}\n")[2].partition("\n### ")[0]
        assert "```yaml" in section, modifier
        fields = getattr(crepe_llm.modifiers, modifier).model_fields
        own = set(fields) - set(crepe_llm.modifiers.SparseCheckpointModifier.model_fields)
        rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", section, re.MULTILINE)
        assert {name for name, _ in rows} == own, modifier
        assert all(meaning.strip() for _, meaning in rows), modifier
    assert all(f"| `{name}` | " in GUIDE for name in shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_described_and_name_modifiers_that_exist(name):
    text = shipped_recipes()[name].read_text()
    # `crepe recipes` shows the first line.
    assert re.match(r"# .{20,118}\.\n", text)
    assert Recipe.create_instance(text).modifiers


def test_links_lead_somewhere():
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall("^#+(.*)", GUIDE, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (ROOT / "docs" / target).is_file(), target


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_the_tutorials_recipes_run(recipe, tiny_model_folder, calibration_data):
    small = recipe.replace("candidates: 200", "candidates: 4").replace("round_to: 64", "round_to: 8")
    model = run(load(tiny_model_folder("llama")), small, calibration_data)
    assert bool(model(torch.arange(3, 19)[None]).logits.isfinite().all())
    assert (model.model.layers[0].self_attn.q_proj.weight == 0).float().mean() > 0.3


@pytest.mark.parametrize(
    ("modifier", "other", "message"),
    [
        ("CFSPModifier", "CRePEModifier", "put CFSPModifier first"),
        ("PHOSearchModifier", "ChannelPermutationModifier", "put it behind that"),
        ("ChannelPermutationModifier", "CRePEModifier", "put it in front"),
        ("CRePEModifier", "DSnoTModifier", "no modifier in front of it that prunes"),
        ("CRePEModifier", "WeightCorrectionModifier", "no modifier in front of it that prunes"),
        ("DSnoTModifier", "WeightCorrectionModifier", "put it in front of that one"),
        ("DSnoTModifier", "MaskedGPTQModifier", "put it between"),
        ("WeightCorrectionModifier", "MaskedGPTQModifier", "put it between"),
    ],
)
def test_orders_that_the_guide_excludes_are_refused(modifier, other, message, tiny_model_folder, calibration_data):
    """The guide's largest recipe, with one modifier moved behind another that it has to stand in front of."""
    order = list(yaml.safe_load(RECIPES[-1])["my_stage"]["my_modifiers"].items())
    names = [name for name, _ in order]
    moved = order.pop(names.index(modifier))
    order.insert(names.index(other), moved)
    model = load(tiny_model_folder("llama"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    recipe = yaml.safe_dump({"my_stage": {"my_modifiers": dict(order)}}, sort_keys=False).replace("64", "8")
    with pytest.raises(ValueError, match=message):
        run(model, recipe, calibration_data)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in before.items())
