"""The docs: the reference is current, order rules hold, and links lead somewhere.

The commands and recipes are run in test_packaging.py, from the wheel.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from llmcompressor.recipe import Recipe
from pydantic import Field

import crepe_llm.modifiers
from crepe_llm.cli.main import parser
from crepe_llm.recipe_files import recipe_path, shipped_recipes
from modifier_helpers import load, run
from script_modules import load_script

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
RECOVER = (ROOT / "docs" / "recover.md").read_text()
BLOCKS = {
    f"{page.stem}-{number}": block
    for page in PAGES
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL))
}
LARGEST = next(block for block in BLOCKS.values() if "CFSPModifier" in block and "DSnoTModifier" in block)
EXTENSION = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(), re.DOTALL)[1]


@pytest.fixture(scope="module")
def script():
    return load_script("reference")


def test_what_a_gpu_needs_to_recover_is_what_the_script_computes():
    assert f"\n{load_script('recovery_cost').table(989e12, 0.4)}\n" in RECOVER


def test_readme_has_the_perplexities_that_are_recorded():
    figures = load_script("readme_figures")
    cells = re.findall(r"^\| .* \| \**([\d. ±]+?)\** \| \d+ MB", PAGES[0].read_text(), re.MULTILINE)
    assert cells == [figures.in_words(*each) for each in figures.perplexities().values()]
    assert f"(docs/{figures.PICTURE.name})" in PAGES[0].read_text()


def test_readme_is_a_page_that_comes_to_the_point():
    text = PAGES[0].read_text()
    before = text.partition("\n## Use\n")[0]
    assert len(text.splitlines()) < 100
    assert len(re.findall(r"^\|[-|]+\|$", before, re.MULTILINE)) == 1 and before.count("![") == 1


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where PHO records its search


def test_the_reference_is_not_stale(script):
    assert script.page() == REFERENCE, "run python scripts/reference.py"


def test_check_mode_tells_a_stale_page_and_leaves_it(script, tmp_path, monkeypatch):
    page = tmp_path / "reference.md"
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["reference.py", "--check"])
    page.write_text(REFERENCE.replace("| `max_cycles` | integer", "| `cycles` | number"))
    with pytest.raises(SystemExit, match=r"docs/reference\.md is stale"):
        script.main()
    page.write_text(REFERENCE)
    script.main()


def test_fields_without_a_description_are_refused(script):
    class Undescribed(crepe_llm.modifiers.CRePEModifier):
        """
        :param row: described
        """

        __module__ = "crepe_llm.modifiers.made_up"
        row: float = 2.0
        extra: int = Field(default=1, ge=1)

    with pytest.raises(ValueError, match="Undescribed has a field `extra`"):
        script.check(Undescribed)

    class Redefined(crepe_llm.modifiers.CRePEModifier):
        """Another default, of which nothing is said."""

        __module__ = "crepe_llm.modifiers.made_up"
        row: float = 2.0

    with pytest.raises(ValueError, match="Redefined has a field `row`"):
        script.check(Redefined)

    class Misdescribed(crepe_llm.modifiers.CRePEModifier):
        """
        :param rows: no such field
        """

    with pytest.raises(ValueError, match=r"describes \['rows'\]"):
        script.check(Misdescribed)


def _sections(page: str) -> dict[str, str]:
    return {part.partition("\n")[0]: part for part in page.split("\n### ")[1:]}


def _rows(section: str) -> list[tuple[str, str]]:
    return re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", section.partition("\n## ")[0], re.MULTILINE)


def test_every_modifier_recipe_and_field_is_there():
    sections = _sections(REFERENCE)
    for modifier in crepe_llm.modifiers.__all__:
        section = sections[modifier]
        assert "```yaml" in section, modifier
        fields = getattr(crepe_llm.modifiers, modifier).model_fields
        own = set(fields) - set(crepe_llm.modifiers.SparseCheckpointModifier.model_fields)
        rows = _rows(section)
        further = section.partition("\nFurther fields: ")[2].partition("\n")[0]
        linked = re.findall(r"`(\w+)`", further)
        assert sorted([name for name, _ in rows] + linked) == sorted(own), modifier
        assert all(meaning.strip() for _, meaning in rows), modifier
        for base in re.findall(r"\]\(#(\w+)\)", further):
            assert base in {heading.lower() for heading in sections}, (modifier, base)
    assert all(f"| `{name}` | " in REFERENCE for name in shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_described_and_name_modifiers_that_exist(name):
    text = shipped_recipes()[name].read_text()
    # `crepe recipes` shows the first line.
    assert re.match(r"# .{20,118}\.\n", text)
    assert Recipe.create_instance(text).modifiers


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target


def test_every_page_is_linked():
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text())
    }
    assert [page for page in PAGES[1:] if page not in linked] == []


def test_files_that_code_and_docs_name_exist():
    """Paths such as docs/formats.md or benchmarks/methods.py, wherever they are mentioned."""
    named = re.compile(r"(?<![\w/])((?:docs|benchmarks|scripts|tests)/[\w/]+\.(?:md|py|png))")
    sources = [ROOT / "Makefile", *PAGES]
    for folder in ("src", "scripts", "benchmarks", "recipes", "integration"):
        sources += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".sh")]
    for source in sources:
        for path in named.findall(source.read_text()):
            assert (ROOT / path).is_file(), f"{source.relative_to(ROOT)} names {path}"


@pytest.fixture(scope="module")
def extension():
    """What the example of a score of one's own defines; it is registered with llm-compressor."""
    defined = {}
    exec(EXTENSION, defined)
    return defined


def test_the_example_of_a_score_is_wanda_at_power_one(extension, tiny_model_folder, calibration_data):
    recipe = yaml.safe_load(BLOCKS["extend-0"])
    fields = recipe["my_stage"]["my_modifiers"]["PowerScoreModifier"]
    masks = []
    for mine in (extension["PowerScoreModifier"](**fields | {"power": 1.0}), recipe_path("wanda_2of4").read_text()):
        model = run(load(tiny_model_folder("llama")), mine, calibration_data)
        masks.append({name: weight != 0 for name, weight in model.named_parameters() if "proj" in name})
    assert masks[0] and all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    assert len(EXTENSION.strip().splitlines()) <= 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_compile_and_import_what_is_there(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        tree = ast.parse(block)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), page.name, "exec"), {})


def commands(page):
    """The `crepe` commands of a page's indented blocks, words as a shell would cut them."""
    for line in re.findall(r"^ {4}(crepe .*)$", page.read_text(), re.MULTILINE):
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if "..." not in words and "[any" not in words:
                yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_are_understood(page):
    for words in commands(page):
        if words != ["--help"]:
            options = parser().parse_args(words)
            recipe = getattr(options, "recipe", None)
            assert recipe in (None, "my_recipe.yaml") or recipe in shipped_recipes(), words


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.relative_to(tmp_path).with_suffix("").as_posix() for path in tmp_path.rglob("*.html")}
    assert {page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in PAGES if page.parent != ROOT} <= made
    notebook = (tmp_path / "notebook.html").read_text()
    assert "data:image/png;base64," in notebook and "perplexity" in notebook
    assert 'href="notebook.html"' in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("modifier", "other", "message"),
    [
        ("CFSPModifier", "CRePEModifier", "Put CFSPModifier first"),
        ("PHOSearchModifier", "ChannelPermutationModifier", "Put ChannelPermutationModifier after it"),
        ("ChannelPermutationModifier", "CRePEModifier", "Put ChannelPermutationModifier before it"),
        ("CRePEModifier", "DSnoTModifier", "needs a modifier that prunes before it"),
        ("CRePEModifier", "WeightCorrectionModifier", "needs a modifier that prunes before it"),
        ("DSnoTModifier", "WeightCorrectionModifier", "put this one first"),
        ("DSnoTModifier", "MaskedGPTQModifier", "put this one first"),
        ("WeightCorrectionModifier", "MaskedGPTQModifier", "Put it between"),
    ],
)
def test_orders_that_the_table_excludes_are_refused(modifier, other, message, tiny_model_folder, calibration_data):
    """The docs' largest recipe, with one modifier moved after another that it has to come before."""
    order = list(yaml.safe_load(LARGEST)["my_stage"]["my_modifiers"].items())
    names = [name for name, _ in order]
    moved = order.pop(names.index(modifier))
    order.insert(names.index(other), moved)
    model = load(tiny_model_folder("llama"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    recipe = yaml.safe_dump({"my_stage": {"my_modifiers": dict(order)}}, sort_keys=False).replace("64", "8")
    with pytest.raises(ValueError, match=message):
        run(model, recipe, calibration_data)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in before.items())
