import os
import subprocess
import sys

import pytest

from crepe_llm.cli import recipes
from crepe_llm.cli.main import main


def test_help_is_cheap_and_teaches():
    code = (
        "import sys; from crepe_llm.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'llmcompressor'} & set(sys.modules)"
    )
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "crepe prune smollm2 --recipe crepe_2of4" in done.stdout


def test_no_error_is_a_traceback_unless_one_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(recipes, "recipe_path", lambda name: {}[name])
    assert main(["recipes", "mine"]) == 2
    assert capsys.readouterr().err == "crepe: error: KeyError: 'mine' (CREPE_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("CREPE_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main(["recipes", "mine"])
