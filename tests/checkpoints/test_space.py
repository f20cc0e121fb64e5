import shutil

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, LlamaConfig

from crepe_llm.checkpoints import attach, decompress_folder, read_folder
from crepe_llm.checkpoints.space import check_destination, least_bytes, least_packed_bytes, plain_bytes
from sparse_models import pruned, stored_tensors


def test_places_that_can_be_written(tmp_path):
    check_destination(tmp_path, 1000)
    check_destination(tmp_path / "new" / "newer", 1000)


def test_places_that_cannot(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file"):
        check_destination(tmp_path / "file", 1000)
    with pytest.raises(OSError, match=r"1e\+06 GB are to be written, but .* GB free; make room"):
        check_destination(tmp_path / "new", 10**15)
    with pytest.raises(NotADirectoryError, match="file is a file"):
        check_destination(tmp_path / "file" / "new", 1000)
    with pytest.raises(OSError, match=r"/proc/crepe/new cannot be written \("):
        check_destination("/proc/crepe/new", 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_shard_is_written_beside_the_others(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=15 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="16 GB are to be written"):
        check_destination(tmp_path, 10**10)
    check_destination(tmp_path, 10**10, shard_bytes=10**9)
    with pytest.raises(OSError, match=r"15\.6 GB are to be written"):
        check_destination(tmp_path, 10**10, 5 * 10**9, shard_bytes=10**9)


def test_the_least_size_is_no_more_than_what_is_written(tmp_path):
    def written(folder):
        return sum(tensor.nbytes for tensor in stored_tensors(folder).values())

    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    for scheme in (None, "W8A8", "W4A16"):
        model, _ = pruned(tmp_path / "dense")
        whole = sum(parameter.nbytes for parameter in model.parameters())
        if scheme:
            reset_session()
            oneshot(model=model, recipe=[QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])])
        attach(model)
        least = least_bytes(model)
        model.save_pretrained(tmp_path / f"{scheme}")
        if scheme is None:
            packed = read_folder(tmp_path / "None")
            assert plain_bytes(packed) == least == whole
            decompress_folder(tmp_path / "None", tmp_path / "plain")
            plain = read_folder(tmp_path / "plain")
            assert written(tmp_path / "plain") == least
            sizes = sum(least_packed_bytes(plain, name) for name in plain.tensors)
            assert written(tmp_path / "None") * 0.99 < sizes <= written(tmp_path / "None")
        elif scheme == "W4A16":  # which is not packed any further
            assert whole / 3 < written(tmp_path / scheme) * 0.9 < least <= written(tmp_path / scheme)
        else:
            assert whole / 2 < least < whole
