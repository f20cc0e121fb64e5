"""A training's state on the disk: gone on with, or refused by the name of the file that is damaged."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file

from crepe_llm.training.work_folder import (
    best_evaluation,
    best_state,
    fingerprint,
    hash_windows,
    keep_best,
    resumable,
    working_in,
)

IDENTITY = {"seed": 0, "text": "fox.txt"}


@pytest.fixture
def work(tmp_path):
    """A state after step 10."""
    folder = tmp_path / "work"
    assert not resumable(folder, IDENTITY)
    checkpoint = folder / "checkpoint-10"
    checkpoint.mkdir()
    for path in (folder / "best.safetensors", checkpoint / "model.safetensors"):
        save_file({"weight": torch.ones(64)}, path, {"step": "10"})
    torch.save({"step": 10}, checkpoint / "optimizer.pt")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 10}))
    return folder


def test_a_whole_state_is_gone_on_with(work):
    (work / ".best.safetensors").write_bytes(b"begun")  # by a run that was killed
    assert resumable(work, IDENTITY)


@pytest.mark.parametrize(
    ("file", "removed"),
    [
        ("settings.json", "settings.json"),
        ("best.safetensors", ""),
        ("checkpoint-10/model.safetensors", "checkpoint-10"),
        ("checkpoint-10/optimizer.pt", "checkpoint-10"),
    ],
)
def test_files_that_were_cut_off_are_named_with_the_cure(file, removed, work):
    path = work / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = rf"^{re.escape(str(path))} of an interrupted recovery is damaged \(.*\): remove {work / removed}, and repeat"
    with pytest.raises(ValueError, match=said):
        resumable(work, IDENTITY)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00002.safetensors", "pytorch_model.bin"])
def test_changed_weights_are_told_whatever_file_holds_them(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"some weights")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    os.utime(path, ns=(0, 0))
    assert fingerprint(tmp_path) != before
    path.unlink()
    assert fingerprint(tmp_path) != before


def test_windows_of_another_length_are_other_windows():
    ids = torch.arange(64).view(4, 16)
    assert hash_windows(ids) == hash_windows(ids.clone()) != hash_windows(ids.view(8, 8))
    assert hash_windows(ids) != hash_windows(ids + 1)


def test_what_failed_before_it_trained_leaves_nothing(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    with pytest.raises(ZeroDivisionError), working_in(work, out):
        resumable(work, IDENTITY)
        raise ZeroDivisionError
    assert not work.exists()
    with pytest.raises(KeyboardInterrupt) as stopped, working_in(work, out):
        resumable(work, IDENTITY)
        keep_best(work, 3, {"weight": torch.ones(2, 4).T})
        raise KeyboardInterrupt
    assert stopped.value.__notes__ == ["the same command goes on from the last checkpoint"]
    with working_in(work, out):
        assert resumable(work, IDENTITY)
        assert best_evaluation(work) is None  # as a version that did not write losses has left it
        keep_best(work, 3, {"weight": torch.ones(2, 4).T}, 0.1 + 0.2)
        assert best_evaluation(work) == (3, 0.1 + 0.2)
        step, state = best_state(work)
    assert step == 3 and torch.equal(state["weight"], torch.ones(4, 2))
