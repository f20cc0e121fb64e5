import os
import re
import shlex
import subprocess
import sys

import pytest

from crepe_llm import __version__
from crepe_llm.cli import recipes
from crepe_llm.cli.main import main, parser


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
    for status in ("  0    ", "  2    ", "  130  ", "  141  "):
        assert status in done.stdout


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"crepe-llm {__version__}\n"


def helped():
    """Every command's name and parser."""
    (commands,) = [each for each in parser()._actions if isinstance(each.choices, dict)]
    return commands.choices


@pytest.mark.parametrize("name", helped())
def test_help_describes_every_option_and_has_examples_that_are_understood(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    command = helped()[name]
    assert all(action.help for action in command._actions), name
    text = command.format_help()
    assert max(map(len, text.partition("example")[0].splitlines())) <= 100  # the description is wrapped
    lines = re.sub(r"\\\n +", "", text.partition("example")[2]).splitlines()
    examples = [re.split(r" {4,}| > ", line.strip())[0] for line in lines if line.startswith("  ")]
    assert any(example.startswith(f"crepe {name}") for example in examples), examples
    for example in examples:
        words = shlex.split(example)
        parser().parse_args(words[1:] if words[0] == "crepe" else words[words.index("crepe_llm") + 1 :])


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command_and_option(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("prune", "recover", "report", "compare", "doctor", "mask-structure", "gradient-checkpointing"):
        assert word in script


def test_bash_completes(tmp_path):
    script = subprocess.run([sys.executable, "-m", "crepe_llm", "completion", "bash"], capture_output=True, check=True)
    (tmp_path / "crepe").write_bytes(script.stdout)
    ask = 'source ./crepe; COMP_WORDS=(crepe re); COMP_CWORD=1; _shtab_crepe crepe re crepe; echo "${COMPREPLY[@]}"'
    said = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sorted(said.stdout.split()) == ["recipes", "recover", "report"], said


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["recipes"], 141), (["recipes", "crepe_2of4"], 141), (["--help"], 0)],  # argparse ends by itself
)
def test_a_reader_that_ends_first_is_no_error(arguments, status):
    read, write = os.pipe()
    os.close(read)  # as `head` has when it has read enough
    done = subprocess.run([sys.executable, "-m", "crepe_llm", *arguments], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (status, b"")


@pytest.mark.parametrize(
    ("arguments", "absent", "wanted"),
    [
        (["recover", "D", "--output", "O", "--sample"], ["transformers"], 'transformers: pip install ".[rec'),
        (
            ["recover", "D", "--output", "O", "--sample", "--teacher", "T"],
            ["accelerate", "compressed_tensors"],
            'accelerate and compressed-tensors: pip install ".[recover]" in the checkout',
        ),
        (["recover", "D", "--output", "O", "--sample"], ["peft"], 'peft: pip install ".[recover]" in the checkout'),
        (
            ["prune", "D", "--output", "O", "--sample", "--recipe", "crepe_2of4"],
            ["llmcompressor"],
            'llm-compressor: pip install ".[compress]" in the checkout',
        ),
        (["search", "D", "--study", "S", "--sample"], ["llmcompressor"], 'llm-compressor: pip install ".[com'),
        (["evaluate", "D", "--sample"], ["transformers"], 'transformers: pip install ".[compress]" in the checkout'),
    ],
)
def test_a_missing_package_is_named_with_its_extra(arguments, absent, wanted, monkeypatch, refusal):
    for package in absent:
        monkeypatch.setitem(sys.modules, package, None)  # what `import` then raises is ModuleNotFoundError
    assert refusal(arguments).startswith(f"crepe: error: crepe {arguments[0]} needs {wanted}")


def test_no_error_is_a_traceback_unless_one_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(recipes, "recipe_path", lambda name: {}[name])
    assert main(["recipes", "mine"]) == 2
    assert capsys.readouterr().err == "crepe: error: KeyError: 'mine' (CREPE_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("CREPE_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main(["recipes", "mine"])
