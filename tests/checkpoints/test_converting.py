"""From folder to folder: what is written, and what is refused."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from crepe_llm.checkpoints import FormatError, compress_folder, decompress_folder, read_folder
from crepe_llm.checkpoints.copying import copy_rest
from crepe_llm.cli.main import main
from sparse_models import bytes_of, config_of, linears, names_in, pruned, stored_tensors


@pytest.fixture
def dense_folder(tiny_model_folder):
    return tiny_model_folder("llama")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shard", ["10KB", "1GB"])
def test_compress_and_decompress_are_inverse(dense_folder, tmp_path, dtype, shard):
    model, _ = pruned(dense_folder, dtype)
    model.save_pretrained(tmp_path / "dense", max_shard_size=shard)
    AutoTokenizer.from_pretrained(dense_folder).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense/.cache").mkdir()
    layers = compress_folder(tmp_path / "dense", tmp_path / "sparse")
    assert sorted(layers) == sorted(linears(model))
    assert (tmp_path / "sparse/tokenizer.json").is_file() and not (tmp_path / "sparse/.cache").exists()
    decompress_folder(tmp_path / "sparse", tmp_path / "back")
    original, back = stored_tensors(tmp_path / "dense"), stored_tensors(tmp_path / "back")
    assert original.keys() == back.keys()
    assert all(torch.equal(original[name], back[name]) for name in original)
    config = config_of(tmp_path / "back")
    assert config.pop("sparsity_config")["format"] == "dense"
    assert config == config_of(tmp_path / "dense")
    assert not any(name.startswith(".") for name in names_in(tmp_path))


def test_conversions_that_make_no_sense_are_refused(dense_folder, tmp_path):
    model, _ = pruned(dense_folder)
    model.save_pretrained(tmp_path / "sparse-to-be")
    compress_folder(tmp_path / "sparse-to-be", tmp_path / "sparse")
    with pytest.raises(FormatError, match="already packed"):
        compress_folder(tmp_path / "sparse", tmp_path / "out")
    with pytest.raises(FormatError, match=r"no 2:4 layer: for instance model\.layers\.0.*row 0, columns 0 to 3 hold"):
        compress_folder(dense_folder, tmp_path / "out")
    with pytest.raises(FormatError, match="nothing to decompress"):
        decompress_folder(dense_folder, tmp_path / "out")
    with pytest.raises(FileExistsError, match="already holds a model"):
        decompress_folder(tmp_path / "sparse", tmp_path / "sparse-to-be")
    with pytest.raises(FormatError, match="neither"):
        compress_folder(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "busy").mkdir()
    for name in ("sparse", "busy"):
        (tmp_path / name / "tokenizer.json").write_text(name)
    with pytest.raises(FileExistsError, match=r"busy already has tokenizer\.json, which .*sparse has, too: name"):
        decompress_folder(tmp_path / "sparse", tmp_path / "busy")
    assert names_in(tmp_path / "busy") == ["tokenizer.json"]
    shutil.rmtree(tmp_path / "busy")
    assert names_in(tmp_path) == ["sparse", "sparse-to-be"]


def test_a_folder_is_not_written_over_the_one_that_is_read(dense_folder, tmp_path):
    model, _ = pruned(dense_folder)
    model.save_pretrained(tmp_path / "dense")
    compress_folder(tmp_path / "dense", tmp_path / "packed")
    for name in ("dense", "packed"):
        (tmp_path / f"to_{name}").symlink_to(name)
        convert = compress_folder if name == "dense" else decompress_folder
        before = stored_tensors(tmp_path / name)
        for source, destination in [(name, f"to_{name}"), (f"to_{name}", name), (name, name), (name, f"x/../{name}")]:
            with pytest.raises(FileExistsError, match=r"is the folder .* that is to be read"):
                convert(tmp_path / source, tmp_path / destination)
        assert stored_tensors(tmp_path / name).keys() == before.keys()
    assert names_in(tmp_path) == ["dense", "packed", "to_dense", "to_packed"]


def test_a_destination_inside_the_source(dense_folder, tmp_path):
    model, _ = pruned(dense_folder)
    source = tmp_path / "dense"
    model.save_pretrained(source)
    (source / "sub").mkdir()
    compress_folder(source, source / "sub" / "packed")
    assert names_in(source / "sub") == ["packed"]
    assert names_in(source / "sub/packed") == ["config.json", "generation_config.json", "model.safetensors", "sub"]
    assert names_in(source / "sub/packed/sub") == []


def test_what_links_out_of_the_folder_name_is_not_copied(dense_folder, tmp_path, caplog):
    model, _ = pruned(dense_folder)
    source, secret = tmp_path / "dense", tmp_path / "secret"
    model.save_pretrained(source)
    secret.mkdir()
    (secret / "key").write_text("key")
    (source / "code").mkdir()
    (source / "code/file.py").write_text("code")
    for link, target in {
        "tokenizer.json": secret / "key",
        "vocab.txt": "../secret/key",
        "keys": secret,
        "code/key": secret / "key",
        "loop": ".",
        "dangling": "nowhere",
        "alias.py": "code/file.py",
    }.items():
        (source / link).symlink_to(target)
    os.mkfifo(source / "pipe")
    compress_folder(source, tmp_path / "out")
    assert names_in(tmp_path / "out") == [
        "alias.py",
        "code",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert names_in(tmp_path / "out/code") == ["file.py"]
    assert (tmp_path / "out/alias.py").read_text() == "code" and not (tmp_path / "out/alias.py").is_symlink()
    for name in ("tokenizer.json", "vocab.txt", "keys", "code/key", "loop", "dangling", "pipe"):
        assert f"{source / name} is " in caplog.text


def test_other_weights_than_the_models_get_a_line(dense_folder, tmp_path, caplog):
    folder, (model, _) = tmp_path / "dense", pruned(dense_folder)
    model.save_pretrained(folder)
    save_file({"lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    others = ("adapter_model.bin", "consolidated.00.pth", "flax_model.msgpack", "model-q4.gguf", "tf_model.h5")
    needed = {"training_args.bin", "vocabulary.txt", "spk_dict.pt", "modeling_mine.bin"}
    for name in (*others, *needed):
        (folder / name).write_text("")
    compress_folder(folder, tmp_path / "packed")
    for name in ("adapter_model.safetensors", *others):
        assert f"{name} holds other weights than the model's and was not copied" in caplog.text
        assert not (tmp_path / "packed" / name).exists()
    assert needed < set(names_in(tmp_path / "packed"))
    (folder / "original").mkdir()
    (folder / "original/consolidated.00.pth").write_text("")
    (tmp_path / "trained").mkdir()
    copy_rest(folder, tmp_path / "trained", other_weights=True)
    assert f"{folder / 'original'} holds weights of its own and was not copied" in caplog.text
    assert not {"original", *others} & set(names_in(tmp_path / "trained"))


def test_a_folder_of_the_hubs_cache_is_copied_whole(dense_folder, tmp_path):
    model, _ = pruned(dense_folder)
    model.save_pretrained(tmp_path / "dense")
    cache = tmp_path / "models--someone--model"
    snapshot = cache / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate((tmp_path / "dense").iterdir()):
        path.rename(cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    compress_folder(snapshot, tmp_path / "out")
    assert names_in(tmp_path / "out") == ["config.json", "generation_config.json", "model.safetensors"]
    assert len(read_folder(tmp_path / "out").layers) == 14


ROTATIONS = {"config_groups": {"R4": {"type": "hadamard", "apply": [{"targets": ["down_proj"], "location": "input"}]}}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_cache_scheme", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        ("transform_config", ROTATIONS),
    ],
)
def test_what_is_not_of_the_weights_survives_unpacking(dense_folder, tmp_path, field, value):
    model, _ = pruned(dense_folder)
    model.save_pretrained(tmp_path / "dense")
    compress_folder(tmp_path / "dense", tmp_path / "packed")
    config = config_of(tmp_path / "packed")
    config["quantization_config"][field] = value
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    decompress_folder(tmp_path / "packed", tmp_path / "plain")
    quantization = config_of(tmp_path / "plain")["quantization_config"]
    assert quantization[field] == value and quantization["sparsity_config"] == {}


def test_float8_negative_zeros_survive_as_zeros(tmp_path):
    from safetensors.torch import save_file

    weight = torch.tensor([[-0.0, 1.5, -0.0, -2.0] * 4], dtype=torch.float32).to(torch.float8_e4m3fn)
    source = tmp_path / "source"
    source.mkdir()
    save_file({"a.weight": weight, "a.weight_scale": torch.ones(1, 1)}, source / "model.safetensors")
    (source / "config.json").write_text(
        '{"quantization_config": {"config_groups": {"g": 1}, "format": "float-quantized"}}'
    )
    assert compress_folder(source, tmp_path / "out") == ["a"]
    stored = read_folder(tmp_path / "out").load_weight("a")
    assert torch.equal(bytes_of(stored), bytes_of(weight) * (bytes_of(weight) != 0x80))
    quantization = config_of(tmp_path / "out")["quantization_config"]
    assert quantization["format"] == "float-quantized" and quantization["config_groups"] == {"g": 1}
    assert quantization["sparsity_config"]["global_sparsity"] == 0.5


def test_the_command_line_converts_both_ways(dense_folder, tmp_path, capsys):
    model, _ = pruned(dense_folder)
    model.save_pretrained(tmp_path / "dense")
    assert main(["compress", str(tmp_path / "dense"), str(tmp_path / "packed")]) == 0
    assert "14 layers packed" in capsys.readouterr().out
    assert main(["decompress", str(tmp_path / "packed"), str(tmp_path / "plain")]) == 0
    assert "14 layers unpacked" in capsys.readouterr().out
    original, back = stored_tensors(tmp_path / "dense"), stored_tensors(tmp_path / "plain")
    assert all(torch.equal(original[name], back[name]) for name in original | back)
    # Errors are one line and status 2.
    assert main(["compress", str(dense_folder), str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "crepe: error:" in error and "no 2:4 layer" in error
    assert not (tmp_path / "none").exists()
