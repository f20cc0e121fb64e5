import json
import os
import subprocess
import sys

import yaml

from crepe_llm.cli.main import main
from crepe_llm.recipe_files import recipe_path, shipped_recipes


def test_recipes_are_listed_and_printed(capsys, refusal, tmp_path):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name in ("crepe_2of4", "crepe_4of8", "crepe_unstructured_50", "ria_2of4", "wanda_2of4"):
        assert name in listed
        assert main(["recipes", name]) == 0
        assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(recipe_path(name).read_text())
    assert main(["recipes", "--json", str(tmp_path / "listed.json")]) == 0
    rows = json.loads((tmp_path / "listed.json").read_text())
    assert capsys.readouterr().out == listed and all(f"{name} " in listed and rows[name] in listed for name in rows)
    assert rows.keys() == shipped_recipes().keys()
    assert main(["recipes", "crepe_2of4", "--json", str(tmp_path / "one.json")]) == 0
    assert json.loads((tmp_path / "one.json").read_text())["recipe"] == recipe_path("crepe_2of4").read_text()
    assert "'crepe_3of4'" in refusal(["recipes", "crepe_3of4"])


def test_recipes_are_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "own.yaml").write_text("# für uns\n", encoding="utf-8")
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "crepe_llm", "recipes", str(tmp_path / "own.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=plain)
    assert (done.stdout, done.returncode) == ("# für uns\n", 0), done.stderr
