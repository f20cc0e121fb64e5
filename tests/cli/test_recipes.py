import yaml

from crepe_llm.cli.main import main
from crepe_llm.recipe_files import recipe_path


def test_recipes_are_listed_and_printed(capsys, refusal):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name in ("crepe_2of4", "crepe_4of8", "crepe_unstructured_50", "ria_2of4", "wanda_2of4"):
        assert name in listed
        assert main(["recipes", name]) == 0
        assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(recipe_path(name).read_text())
    assert "'crepe_3of4'" in refusal(["recipes", "crepe_3of4"])
