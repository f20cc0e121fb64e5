"""Recipes as users write them: what is read, and the one line that says what is wrong."""

import re

import pytest

from crepe_llm.modifiers import CRePEModifier, SparseCheckpointModifier
from crepe_llm.oneshot.recipes import read_recipe
from crepe_llm.recipe_files import recipe_path, shipped_recipes
from modifier_helpers import linears, load, run

GROUP = "s_stage:\n  p_modifiers:\n"
START = "s_stage:\n  p_modifiers:\n    CRePEModifier:\n"
BITS = (
    f"{GROUP}    QuantizationModifier:\n      config_groups:\n"
    "        g: {{targets: [Linear], weights: {{num_bits: {}, type: {}}}}}\n"
)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_read_by_name_file_and_text(name):
    by_name = read_recipe(name)
    assert by_name.modifiers
    assert by_name.to_dict() == read_recipe(recipe_path(name)).to_dict()
    assert by_name.to_dict() == read_recipe(recipe_path(name).read_text()).to_dict()


def test_oneshot_takes_a_shipped_name(tiny_model_folder, calibration_data):
    model = run(load(tiny_model_folder("llama")), "crepe_2of4", calibration_data)
    for name, module in linears(model).items():
        assert bool(((module.weight.view(-1, 4) != 0).sum(1) == 2).all()), name


def test_stages_targets_as_text_and_modifiers_without_fields():
    fields = "      mask_structure: '2:4'\n      targets: Linear\n      ignore: lm_head\n"
    text = f"{START}{fields}    SparseCheckpointModifier:\n"
    crepe, saves = read_recipe(text).modifiers
    assert isinstance(crepe, CRePEModifier) and isinstance(saves, SparseCheckpointModifier)
    assert crepe.targets == ["Linear"] and crepe.ignore == ["lm_head"]
    assert read_recipe(text, stage="other").modifiers == []


def test_tuples_are_read_as_llm_compressor_saves_them():
    (crepe,) = read_recipe(f"{START}      mask_structure: '2:4'\n      ignore: !!python/tuple [lm_head]\n").modifiers
    assert crepe.ignore == ["lm_head"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{START}      mask_structure: 2:4\n", r'number 124.*quote it, mask_structure: "2:4"'),
        (f"{START}      mask_structure: 16:32\n", r'quote it, mask_structure: "16:32"'),
        (f"{START}      mask_structure: {{'re:.*': 4:8}}\n", r'quote it, mask_structure: "4:8"'),
        (f"{GROUP}    PHOSearchModifier:\n      mask_structure: 2:4\n", r'quote it.*"2:4"'),
        (f"{GROUP}    WandaPruningModifier:\n      mask_structure: 2:4\n", r'WandaPruningModifier: .*quote it.*"2:4"'),
        (f"{GROUP}   CRePEModifier:\n      row: 1\n     column: 3\n", r"the recipe, line 5 is not YAML.*indentation"),
        (f'{START}      mask_structure: "2:4\n', r"is not YAML.*quotes"),
        (f"{START}    mask_structure: '2:4'\n", r"mask_structure stands beside CRePEModifier.*indent it"),
        (f"{GROUP}    CrepeModifier: {{}}\n", r"no modifier is called CrepeModifier: did you mean CRePEModifier\?"),
        (f"{GROUP}    Blah: {{}}\n", r"no modifier is called Blah; there are ADMMModifier, "),
        (f"{START}      colunm: 3\n", r"CRePEModifier has no field colunm: did you mean column\?"),
        (f"{START}      targets: ['re:(']\n", r"CRePEModifier: targets has 're:\(', which is not a regular expression"),
        (f"{START}      ignore: 're:['\n", r"CRePEModifier: ignore has 're:\[', which is not a regular expression"),
        (f"{START}      row: many\n", r"CRePEModifier: row='many': "),
        (f"{START}      kernel_size: 3.5\n", r"CRePEModifier: kernel_size=3.5: "),
        (f"{GROUP}    CRePEModifier: [row]\n", r"CRePEModifier has \['row'\] where its fields go"),
        (f"{GROUP}    CFSPModifier:\n", r"CFSPModifier needs the field sparsity"),
        ("s_stage:\n  CRePEModifier:\n    row: 1\n", r"nothing reads CRePEModifier under s_stage: modifiers go"),
        ("s_stage:\n  s_modifiers:\n    row: 1\n", r"no modifier is called row"),
        ("s_stage:\n  other: {}\n", r"names no modifiers: modifiers go under `NAME_stage:`"),
        ("CRePEModifier: {}\n", r"nothing reads CRePEModifier at the top: "),
        (f"{START}      row: 1\n      row: 7\n", r"the recipe, line 5: row stands twice, .* leave one out"),
        (f"{START}      row: 1\n    CRePEModifier:\n", r"CRePEModifier stands twice.*another `NAME_modifiers:`"),
        (f"{START}second:\n  s_modifiers:\n    ADMMModifier: {{}}\n", r"nothing reads ADMMModifier under second and s"),
        ("\n# only a comment\n", r"the recipe is empty: modifiers go under"),
        ("a: b: c", r"is not YAML"),
        ("- CRePEModifier:\n", r"is not a mapping but list"),
        ("", r"the recipe's name is empty"),
        (f"{GROUP}    QuantizationModifier:\n      scheme: W4A61\n", r"scheme is called W4A61: did you mean W4A16\?"),
        (f"{GROUP}    GPTQModifier:\n      scheme: {{W9A9x: [Linear]}}\n", r"GPTQModifier: no scheme is called W9A9x"),
        (BITS.format(9, "int"), r"weights of type int have num_bits=9: give a number from 1 to 8"),
        (BITS.format(0, "int"), r"num_bits=0: give a number"),
        (BITS.format(-3, "int"), r"num_bits=-3: give a number"),
        (BITS.format(5, "float"), r"the recipe: Only num_bits in \(8\) are supported"),
        ("no_such_recipe", r"no recipe 'no_such_recipe': it is neither a file nor one of the shipped .*crepe_2of4"),
        ("no/such/recipe.yaml", r"no recipe 'no/such/recipe\.yaml'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(text, message):
    with pytest.raises(ValueError) as caught:
        read_recipe(text)
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value), str(caught.value)


def test_fields_of_runs_are_not_proposed():
    with pytest.raises(ValueError, match="there are") as caught:
        read_recipe(f"{START}      zzz: 3\n")
    assert "kernel_size" in str(caught.value) and "ended_" not in str(caught.value)


def test_markdown_has_its_recipe_between_dashes(tmp_path):
    path = tmp_path / "card.md"
    path.write_text(f"\n---\n{START}      mask_structure: '2:4'\n---\n\n# A card\n\nText: with a colon\n")
    assert [modifier.mask_structure for modifier in read_recipe(str(path)).modifiers] == ["2:4"]
    path.write_text(f"---\n{START}      row: 1\n      row: 7\n---\n")
    with pytest.raises(ValueError, match=r"card\.md, line 6: row stands twice"):
        read_recipe(path)
    path.write_text("# No recipe\n")
    with pytest.raises(ValueError, match=r"card\.md has no YAML between two lines of `---`"):
        read_recipe(path)


def test_files_are_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"{START}      mask_structure: 2:4\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*quote it"):
        read_recipe(path)


def test_dictionaries_and_modifiers_are_recipes():
    fields = {"mask_structure": "2:4"}
    given = {"s_stage": {"p_modifiers": {"CRePEModifier": fields, "SparseCheckpointModifier": None}}}
    crepe, saves = CRePEModifier(**fields), SparseCheckpointModifier()
    for recipe in (given, [crepe, saves], (crepe, saves), [[crepe], saves], read_recipe(given)):
        assert [type(modifier) for modifier in read_recipe(recipe).modifiers] == [type(crepe), type(saves)]
    assert read_recipe(crepe).modifiers == [crepe]
    assert given["s_stage"]["p_modifiers"]["SparseCheckpointModifier"] is None  # the caller's own is left as it was


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"s_stage": {"p_modifiers": {"CrepeModifier": {}}}},
            r"no modifier is called CrepeModifier: did you",
        ),
        ({"s_stage": {"p_modifiers": {"CRePEModifier": {"row": -1}}}}, r"the recipe: CRePEModifier: row=-1: "),
        ({"CRePEModifier": {}}, r"the recipe: nothing reads CRePEModifier at the top"),
        ({}, r"the recipe names no modifiers"),
        (5, r"the recipe is int: give a shipped recipe's name"),
        ([CRePEModifier], r"the recipe is a list with CRePEModifier: give"),
        (["crepe_2of4"], r"the recipe is a list with str: give"),
        ([read_recipe("crepe_2of4")], r"the recipe is a list with Recipe: give"),
    ],
)
def test_what_is_no_recipe_is_named(recipe, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(recipe)
