"""A sample of the mutants of scripts/fuzz_checkpoints.py, and its judgement itself."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_checkpoints.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_checkpoints", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_no_mutant_of_a_sample_loads_in_silence(fuzz, capsys):
    assert fuzz.main(["--mutants", "100"]) == 0, capsys.readouterr().out
    last = capsys.readouterr().out.splitlines()
    assert len(last) == 2 and all("0 SILENT WRONG" in line for line in last)
    assert all(int(line.split()[1]) > 40 for line in last)  # refused


@pytest.mark.parametrize("way", ["transformers", "crepe_llm"])
def test_what_no_reader_can_notice_is_judged_as_wrong(fuzz, tmp_path, way):
    base, *_ = fuzz.write_bases(tmp_path / "bases")
    expected = fuzz.digest(fuzz.WAYS[way](base))
    assert fuzz.judge(way, base, expected).outcome == fuzz.EQUAL
    mutant = shutil.copytree(base, tmp_path / "mutant")
    tensors = load_file(mutant / fuzz.SINGLE)
    name = next(name for name in tensors if name.endswith(".compressed"))
    tensors[name] = tensors[name] + 1
    save_file(tensors, mutant / fuzz.SINGLE, {"format": "pt"})
    assert fuzz.judge(way, mutant, expected).outcome == fuzz.WRONG
    (mutant / fuzz.SINGLE).write_bytes(b"")
    verdict = fuzz.judge(way, mutant, expected)
    assert verdict.outcome == fuzz.REFUSED and fuzz.SINGLE in verdict.why


def test_mutants_are_the_same_each_time(fuzz, tmp_path):
    bases = fuzz.write_bases(tmp_path / "bases")
    said = [[fuzz.mutate(bases, tmp_path / "mutant", 3, number)[1] for number in range(20)] for _ in range(2)]
    assert said[0] == said[1] and len(set(said[0])) > 10
