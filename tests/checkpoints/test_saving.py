"""Saving through llm-compressor and from folder to folder: what is written, and when it appears."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from compressed_tensors.offload import dispatch_with_map
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.transformers.compression import compressed_tensors_utils
from llmcompressor.transformers.compression.compressed_tensors_utils import modify_save_pretrained
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig, LlamaConfig

from crepe_llm.checkpoints import FormatError, attach, compress_folder, decompress_folder, read_folder, unpack
from crepe_llm.checkpoints.saving import _least_bytes, _least_packed_bytes, _plain_bytes
from crepe_llm.cli.main import main
from crepe_llm.functional.bitmask import pack_bits
from sparse_models import bytes_of, linears, prune_2of4
from tiny_models import save_model

IDS = torch.arange(3, 35)[None]


@pytest.fixture
def dense_folder(tiny_model_folder):
    return tiny_model_folder("llama")


def pruned(folder, dtype=torch.bfloat16):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    kept = prune_2of4(model)
    return model, kept


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def stored_tensors(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def test_what_an_attached_model_writes(dense_folder, tmp_path):
    model, kept = pruned(dense_folder)
    attach(model)
    before = model(IDS).logits
    model.save_pretrained(tmp_path / "out", save_compressed=True)
    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == ["config.json", "generation_config.json", "model.safetensors", "recipe.yaml"]
    tensors = stored_tensors(tmp_path / "out")
    for name, module in linears(model).items():
        assert f"{name}.weight" not in tensors
        shape = tensors[f"{name}.shape"]
        assert shape.dtype == torch.int64 and shape.tolist() == [[size] for size in module.weight.shape]
        assert tensors[f"{name}.compressed"].dtype == torch.bfloat16
        weight = unpack(tensors[f"{name}.compressed"], tensors[f"{name}.bitmask"], shape)
        assert torch.equal(weight, module.weight)
        assert not weight[~kept[name]].any()
    assert "model.embed_tokens.weight" in tensors and "lm_head.weight" not in tensors  # tied
    config = config_of(tmp_path / "out")
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert config["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "version": "0.14.0.1",
        "transform_config": {},
        "sparsity_config": {
            "format": "sparse-24-bitmask",
            "global_sparsity": pytest.approx(zeros / model.num_parameters()),
            "ignore": ["lm_head"],
            "registry_requires_subclass": False,
            "sparsity_structure": "2:4",
            "targets": ["Linear"],
        },
    }
    assert "sparsity_config" not in config
    # The model in memory is as it was, and can be saved again.
    assert torch.equal(model(IDS).logits, before)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert model.save_pretrained._overridden  # llm-compressor does not wrap it once more


def test_a_model_that_was_changed_is_described_as_it_is(dense_folder, tmp_path):
    """llm-compressor writes the config.json that the model came with."""
    model, _ = pruned(dense_folder)
    before = config_of(dense_folder)
    model.resize_token_embeddings(before["vocab_size"] + 8)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    attach(model)
    model.save_pretrained(tmp_path / "out")
    after = config_of(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]} - {"dtype", "transformers_version"}
    assert changed == {"vocab_size", "num_hidden_layers"}
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_packed_layers_take_nine_sixteenths_on_disk(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8, hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    prune_2of4(model)
    attach(model)
    model.save_pretrained(tmp_path / "out")
    dense = sum(module.weight.numel() * 2 for module in linears(model).values())
    rest = sum(p.numel() * 2 for p in model.parameters()) - dense
    assert (tmp_path / "out/model.safetensors").stat().st_size - rest <= 0.5626 * dense + 4096  # the JSON header


def test_only_real_2of4_layers_are_packed_and_listed(dense_folder, tmp_path):
    model, _ = pruned(dense_folder)
    odd = "model.layers.1.mlp.up_proj"
    model.get_submodule(odd).weight.data[5, :4] = 1
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))  # 2:4, but no layer to pack
    model.config.tie_word_embeddings = False
    attach(model)
    model.save_pretrained(tmp_path / "out")
    sparsity = config_of(tmp_path / "out")["quantization_config"]["sparsity_config"]
    packed = [name for name in linears(model) if name != odd]
    assert sparsity["targets"] == sorted(packed) and sparsity["ignore"] == []
    assert sorted(read_folder(tmp_path / "out").layers) == sorted(packed)
    tensors = stored_tensors(tmp_path / "out")
    assert torch.equal(tensors[f"{odd}.weight"], model.get_submodule(odd).weight)
    assert "lm_head.weight" in tensors


def test_a_kept_weight_that_is_exactly_zero_stays_kept(dense_folder, tmp_path):
    model, kept = pruned(dense_folder)
    for name, module in linears(model).items():
        first = kept[name].view(-1, 4)[0]
        module.weight.data.view(-1, 4)[0] = 0
        first[:] = torch.tensor([False, True, False, True])
    attach(model)
    model.save_pretrained(tmp_path / "inferred")
    attach(model, masks=lambda: {name: pack_bits(keep) for name, keep in kept.items()})
    model.save_pretrained(tmp_path / "given", max_shard_size="10KB")
    inferred, given = stored_tensors(tmp_path / "inferred"), stored_tensors(tmp_path / "given")
    for name, module in linears(model).items():
        assert torch.equal(given[f"{name}.bitmask"], pack_bits(kept[name]))
        assert not torch.equal(inferred[f"{name}.bitmask"], given[f"{name}.bitmask"])
        for folder in ("inferred", "given"):
            assert torch.equal(read_folder(tmp_path / folder).load_weight(name), module.weight)


def test_masks_that_are_not_the_layers_are_not_used(dense_folder, tmp_path):
    model, kept = pruned(dense_folder)
    names = sorted(kept)
    masks = {name: pack_bits(keep) for name, keep in kept.items()}
    masks[names[0]] = masks[names[0]].roll(1, 0)  # not this weight's
    masks[names[1]] = torch.zeros_like(masks[names[1]])  # not two of four
    masks[names[2]] = masks[names[2]][:, :-1]
    masks[names[3]] = masks[names[3]].to(torch.int32)
    masks["absent"] = masks.pop(names[4])
    attach(model)
    model.save_pretrained(tmp_path / "inferred")
    attach(model, masks=lambda: masks)
    model.save_pretrained(tmp_path / "given")
    inferred, given = stored_tensors(tmp_path / "inferred"), stored_tensors(tmp_path / "given")
    assert inferred.keys() == given.keys()
    assert all(torch.equal(inferred[name], given[name]) for name in inferred)


def test_later_calls_add_masks_and_last_steps_once(dense_folder, tmp_path):
    model, kept = pruned(dense_folder)
    first, second = sorted(kept)[:2]
    steps, looked_up = [], []

    def masks():
        looked_up.append(1)
        return {first: torch.zeros_like(pack_bits(kept[first]))}

    def finish(folder):
        assert folder.name.startswith(".out.partial-") and not (tmp_path / "out").exists()
        assert len(read_folder(folder).layers) == len(kept)
        steps.append((folder / "config.json").read_text())

    for _ in range(2):
        attach(model, masks=masks, finish=finish)
        attach(model)
    attach(model, masks=lambda: {second: pack_bits(kept[second])}, finish=lambda folder: (folder / "last").touch())
    save = model.save_pretrained
    model.save_pretrained(tmp_path / "out")
    attach(model)
    assert model.save_pretrained is save
    assert len(steps) == len(looked_up) == 1
    assert steps[0] == (tmp_path / "out/config.json").read_text()
    assert (tmp_path / "out/last").is_file()


def test_a_last_step_that_fails_leaves_no_folder(dense_folder, tmp_path):
    model, _ = pruned(dense_folder)

    def finish(folder):
        raise RuntimeError("no space")

    attach(model, finish=finish)
    with pytest.raises(RuntimeError, match="no space"):
        model.save_pretrained(tmp_path / "out")
    assert names_in(tmp_path) == []


def test_uncompressed_saves_load_anywhere_and_carry_the_record(dense_folder, tmp_path):
    model, _ = pruned(dense_folder)
    attach(model)
    model.save_pretrained(tmp_path / "out", save_compressed=False)
    config = config_of(tmp_path / "out")
    assert "quantization_config" not in config
    assert config["sparsity_config"]["format"] == "dense"
    assert config["sparsity_config"]["sparsity_structure"] == "2:4"
    assert config["sparsity_config"]["targets"] == ["Linear"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_dense_model_is_saved_as_ever(dense_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    attach(model)
    model.save_pretrained(tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert "quantization_config" not in config and "sparsity_config" not in config
    reference = AutoModelForCausalLM.from_pretrained(dense_folder)
    modify_save_pretrained(reference)
    reference.save_pretrained(tmp_path / "reference")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()


def test_shards_have_a_correct_index(dense_folder, tmp_path):
    model, _ = pruned(dense_folder)
    attach(model)
    model.save_pretrained(tmp_path / "out", max_shard_size="10KB")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    tensors = stored_tensors(tmp_path / "out")
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_offloaded_weights(dense_folder, tmp_path):
    model, _ = pruned(dense_folder)
    logits = model(IDS).logits
    cpu = torch.device("cpu")
    places = {name: "disk" if name.startswith("model.layers.1") else cpu for name, _ in model.named_modules()}
    (tmp_path / "offload").mkdir()
    dispatch_with_map(model, {name: (cpu, place) for name, place in places.items()}, str(tmp_path / "offload"))
    assert next(model.model.layers[1].mlp.parameters()).device == cpu  # read back when touched
    attach(model)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(IDS).logits, logits)
    assert torch.equal(model(IDS).logits, logits)


def test_a_model_that_cannot_be_taken_back_costs_no_folder(dense_folder, tmp_path, monkeypatch):
    """After the files are written, llm-compressor undoes its offloading to accelerate, which has been seen to fail."""
    model, _ = pruned(dense_folder)
    attach(model)

    def fails(model):
        raise RuntimeError("cannot take it back")

    monkeypatch.setattr(compressed_tensors_utils, "from_accelerate", fails)
    with pytest.raises(RuntimeError, match="cannot take it back"):
        model.save_pretrained(tmp_path / "out")
    assert read_folder(tmp_path / "out").layers
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_existing_folders(dense_folder, tmp_path):
    model, _ = pruned(dense_folder)
    attach(model)
    target = tmp_path / "out"
    # A folder with other files keeps them, and becomes a model.
    AutoTokenizer.from_pretrained(dense_folder).save_pretrained(target)
    model.save_pretrained(target)
    assert {"tokenizer.json", "config.json", "model.safetensors"} <= set(names_in(target))
    # One with a model is left alone, and the work is not lost.
    content = (target / "model.safetensors").read_bytes()
    for number in (1, 2):
        with pytest.raises(FileExistsError, match=f"out-{number}"):
            model.save_pretrained(target)
        assert (tmp_path / f"out-{number}/model.safetensors").read_bytes() == content
    assert (target / "model.safetensors").read_bytes() == content
    # So is one in which a file of ours would be overwritten.
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy/recipe.yaml").write_text("mine")
    with pytest.raises(FileExistsError, match=r"recipe\.yaml.*the finished folder is .*busy-1"):
        model.save_pretrained(tmp_path / "busy")
    assert names_in(tmp_path / "busy") == ["recipe.yaml"]
    assert (tmp_path / "busy-1/model.safetensors").read_bytes() == content
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)
    with pytest.raises(ValueError, match="variant='fp16' is not supported"):
        model.save_pretrained(tmp_path / "hub", variant="fp16")
    assert names_in(tmp_path) == ["busy", "busy-1", "file", "out", "out-1", "out-2"]


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
        least = _least_bytes(model)
        model.save_pretrained(tmp_path / f"{scheme}")
        if scheme is None:
            packed = read_folder(tmp_path / "None")
            assert _plain_bytes(packed) == least == whole
            decompress_folder(tmp_path / "None", tmp_path / "plain")
            plain = read_folder(tmp_path / "plain")
            assert written(tmp_path / "plain") == least
            sizes = sum(_least_packed_bytes(plain, name) for name in plain.tensors)
            assert written(tmp_path / "None") * 0.99 < sizes <= written(tmp_path / "None")
        elif scheme == "W4A16":  # which is not packed any further
            assert whole / 3 < written(tmp_path / scheme) * 0.9 < least <= written(tmp_path / scheme)
        else:
            assert whole / 2 < least < whole


def test_a_quantized_key_value_cache_survives_unpacking(dense_folder, tmp_path):
    model, _ = pruned(dense_folder)
    model.save_pretrained(tmp_path / "dense")
    compress_folder(tmp_path / "dense", tmp_path / "packed")
    config, scheme = config_of(tmp_path / "packed"), {"num_bits": 8, "type": "float", "strategy": "tensor"}
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    decompress_folder(tmp_path / "packed", tmp_path / "plain")
    quantization = config_of(tmp_path / "plain")["quantization_config"]
    assert quantization["kv_cache_scheme"] == scheme and quantization["sparsity_config"] == {}


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


KILLED = """
    # Saves again and again, each time killed at a later file operation, until one save gets through.
    import os, pathlib, signal, sys
    import torch
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM
    from crepe_llm.checkpoints import attach, compress_folder

    how, dense, root, step = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]), int(sys.argv[4])
    if how == "attached":
        model = AutoModelForCausalLM.from_pretrained(dense)
        attach(model)
    operations, finished, kills = 0, False, 0
    while not finished:
        operations += step
        target = root / f"{operations}" / "out"
        target.parent.mkdir()
        child = os.fork()
        if child == 0:
            seen = 0

            def count(event, arguments):
                global seen
                if event in ("open", "os.rename", "os.mkdir", "os.chmod", "os.scandir", "os.listdir", "shutil.copyfile",
                             "tempfile.mkdtemp", "os.rmdir", "os.remove", "shutil.rmtree"):
                    seen += 1
                    if seen == operations:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            compress_folder(dense, target) if how == "folder" else model.save_pretrained(target)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        finished = os.WIFEXITED(status)
        if finished and os.WEXITSTATUS(status):
            sys.exit("the save failed")
        kills += not finished
    print(kills)
"""


@pytest.mark.parametrize(("how", "step"), [("folder", 1), ("attached", 2)])
def test_a_kill_at_any_point_leaves_nothing_that_looks_finished(dense_folder, tmp_path, how, step):
    model, _ = pruned(dense_folder)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(KILLED), how, tmp_path / "dense", tmp_path / "runs", str(step)]
    environment = os.environ | {"LLM_COMPRESSOR_LOG_DISABLED": "true", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    kills = int(result.stdout.split()[-1])
    assert kills >= 10
    complete = 0
    for run in (tmp_path / "runs").iterdir():
        if (run / "out").exists():
            complete += 1
            assert len(read_folder(run / "out").layers) == 14
            loaded = AutoModelForCausalLM.from_pretrained(run / "out")
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        assert all(path.name == "out" or path.name.startswith(".out.partial-") for path in run.iterdir())
    # The last run was not killed; a kill after the rename also leaves a whole folder.
    assert 1 <= complete <= kills


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


def test_linear_layers_of_a_class_of_their_own_are_quantized(tmp_path):
    sizes = {"vocab_size": 96, "hidden_size": 32, "ffn_hidden_size": 64, "num_hidden_layers": 1}
    config = FalconConfig(**sizes, num_attention_heads=2, new_decoder_architecture=True, num_kv_heads=1)
    save_model(config, tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    data = Dataset.from_dict({"input_ids": [list(range(3, 35))] * 2, "attention_mask": [[1] * 32] * 2})
    oneshot(model=model, recipe="crepe_2of4_int8", dataset=data, num_calibration_samples=2)
    model.save_pretrained(tmp_path / "out")
    # Falcon's blocks have linear layers of a class of their own, its head is a torch.nn.Linear.
    stored = read_folder(tmp_path / "out")
    assert {layer.dtype for layer in stored.layers.values()} == {torch.int8} and len(stored.layers) == 4
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 35)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)
    assert config_of(tmp_path / "out")["quantization_config"]["ignore"] == ["lm_head"]
