"""No benchmark begins to measure when it is asked what it does."""

from pathlib import Path

import pytest

import masked_gptq

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_every_command_has_a_parser():
    commands = [path for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text()]
    assert masked_gptq.__file__ in map(str, commands)
    assert [path.name for path in commands if "ArgumentParser(description=__doc__" not in path.read_text()] == []


def test_help_records_nothing(tmp_path, monkeypatch, capsys):
    results = tmp_path / "rows.jsonl"
    monkeypatch.setattr("sys.argv", ["masked_gptq.py", "--results", str(results), "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        masked_gptq.main()
    assert "python benchmarks/masked_gptq.py" in capsys.readouterr().out and not results.exists()
