"""Saving through llm-compressor: what is written, and when it appears."""

import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from compressed_tensors.offload import dispatch_with_map
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.transformers.compression import compressed_tensors_utils
from llmcompressor.transformers.compression.compressed_tensors_utils import modify_save_pretrained
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    FalconConfig,
    LlamaConfig,
)

from crepe_llm.checkpoints import attach, compress_folder, read_folder, unpack
from crepe_llm.functional.bitmask import pack_bits
from sparse_models import config_of, linears, names_in, prune_2of4, pruned, random_2of4, stored_tensors
from tiny_models import save_model

IDS = torch.arange(3, 35)[None]


@pytest.fixture
def dense_folder(tiny_model_folder):
    return tiny_model_folder("llama")


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


def test_a_copy_saves_itself(dense_folder, tmp_path):
    """llm-compressor's `save_pretrained` of a copied model saves the weights of the one that was copied."""
    model, kept = pruned(dense_folder)
    attach(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name in kept:
            copied.get_submodule(name).weight *= 2
    copied.save_pretrained(tmp_path / "copied")
    model.save_pretrained(tmp_path / "out")
    for folder, saved in (("out", model), ("copied", copied)):
        tensors = stored_tensors(tmp_path / folder)
        for name in kept:
            weight = unpack(*(tensors[f"{name}.{part}"] for part in ("compressed", "bitmask", "shape")))
            assert torch.equal(weight, saved.get_submodule(name).weight)


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
    from transformers import LlamaForCausalLM

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


def write_plain(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')


@pytest.mark.parametrize("dense", ["layers.0.ffn.router.layer", "embed_out"])
def test_targets_leave_out_linear_layers_that_stay_dense(tmp_path, dense):
    """A reader that goes by `targets` would take them for packed."""
    layer = "layers.0.attn.q_proj"
    weights = {f"{layer}.weight": random_2of4(8, 16, torch.float32), f"{dense}.weight": torch.ones(8, 16)}
    write_plain(tmp_path / "in", weights | {"lm_head.weight": torch.ones(8, 16), "wte.weight": torch.ones(9, 16)})
    assert compress_folder(tmp_path / "in", tmp_path / "out") == [layer]
    sparsity = config_of(tmp_path / "out")["quantization_config"]["sparsity_config"]
    assert sparsity["targets"] == [layer] and sparsity["ignore"] == []


def test_layers_named_after_embeddings_are_packed(tmp_path):
    names = ["altup_unembed_projections.0", "embed_tokens", "embed_tokens.0", "x_embedding_norm", "wpe"]
    weights = {f"model.{name}.weight": random_2of4(8, 16, torch.float32) for name in names}
    write_plain(tmp_path / "in", weights)
    assert compress_folder(tmp_path / "in", tmp_path / "out") == ["model.altup_unembed_projections.0"]
    assert config_of(tmp_path / "out")["quantization_config"]["sparsity_config"]["targets"] == ["Linear"]


def test_the_embedding_of_an_encoder_and_a_decoder_is_no_layer(tmp_path):
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=16, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes)
    model = BartForConditionalGeneration(config)
    model.model.shared.weight.data.view(-1, 4)[:, :2] = 0
    model.model.encoder.layers[0].fc1.weight.data.view(-1, 4)[:, :2] = 0
    attach(model)
    model.save_pretrained(tmp_path / "out")
    assert list(read_folder(tmp_path / "out").layers) == ["model.encoder.layers.0.fc1"]


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
