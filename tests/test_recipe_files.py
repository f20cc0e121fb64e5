import subprocess
import sys
from pathlib import Path

from crepe_llm.recipe_files import recipe_path, shipped_recipes

ROOT = Path(__file__).parents[1]


def test_a_file_goes_before_a_shipped_name(tmp_path, monkeypatch):
    assert recipe_path("crepe_2of4") == recipe_path("crepe_2of4.yaml") == shipped_recipes()["crepe_2of4"]
    monkeypatch.chdir(tmp_path)
    Path("crepe_2of4.yaml").write_text("mine: {}\n")
    assert recipe_path("crepe_2of4.yaml") == Path("crepe_2of4.yaml")


def test_the_package_carries_the_recipes(tmp_path):
    # The step of building a wheel that gathers its files; the extensions are of no interest here.
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    carried = {path.name: path.read_text() for path in (tmp_path / "crepe_llm" / "recipes").iterdir()}
    assert carried == {path.name: path.read_text() for path in (ROOT / "recipes").glob("*.yaml")}
    assert (tmp_path / "crepe_llm" / "py.typed").is_file()
