"""A sample of the mutants of scripts/fuzz_checkpoints.py, and its judgement itself."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from crepe_llm.checkpoints import FormatError, decompress_folder
from script_modules import load_script


@pytest.fixture(scope="module")
def fuzz():
    return load_script("fuzz_checkpoints")


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


def tensors_changed(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def label(name, dtype):
    def change(tensors):
        tensors[name] = tensors[name].view(dtype)

    return change


def scalar(name):
    def change(tensors):
        tensors[name] = tensors[name].flatten()[0]

    return change


def one_more(name):
    def change(tensors):
        tensors[name][1] += 1

    return change


ATTENTION = "model.layers.0.self_attn.q_proj"
SCALE = "model.layers.1.block_sparse_moe.experts.0.w3.weight_scale"
DAMAGED = {
    "a norm of integers": ("int4", label("model.norm.weight", torch.int16), r"model.norm.weight is I16 \[32\]"),
    "a scale is missing": (
        "int4",
        lambda t: t.pop(f"{ATTENTION}.weight_scale"),
        f"{ATTENTION}.weight_scale is missing",
    ),
    "another shape": ("int4", one_more(f"{ATTENTION}.weight_shape"), r"weight_shape says \[32, 33\], the model has"),
    "words of floats": ("int4", label(f"{ATTENTION}.weight_packed", torch.float32), "weight_packed is F32"),
    "one bias of another half": ("int4", label(f"{ATTENTION}.bias", torch.float16), "bias is F16, .* others are BF16"),
    "F8_E5M2": ("head", label(f"{ATTENTION}.bitmask", torch.float8_e5m2), "bitmask is F8_E5M2"),
    "a head's scale of integers": ("head", label("model.embed_tokens.weight_scale", torch.int16), "is I16, not F32"),
    "one expert's scale": ("experts-int8", scalar(SCALE), r"weight_scale is F32 \[48, 1\].*weight_scale is F32 \[\]"),
}


@pytest.fixture(scope="module")
def bases(fuzz, tmp_path_factory):
    return {base.name: base for base in fuzz.write_bases(tmp_path_factory.mktemp("bases"))}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_transformers_would_load_in_silence_is_named(name, bases, tmp_path):
    base, change, message = DAMAGED[name]
    folder = tensors_changed(shutil.copytree(bases[base], tmp_path / "mutant"), change)
    with pytest.raises(FormatError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_integers_of_another_width_are_cast(bases, tmp_path):
    name = f"{ATTENTION}.weight_shape"
    folder = tensors_changed(
        shutil.copytree(bases["int4"], tmp_path / "mutant"), lambda t: t.update({name: t[name].int()})
    )
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(bases["int4"]).state_dict()
    assert state[name].dtype == expected[name].dtype == torch.int64 and torch.equal(state[name], expected[name])


def test_4_bit_weights_without_their_config_are_named(bases, tmp_path):
    folder = shutil.copytree(bases["int4"], tmp_path / "mutant")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"weight_packed is quantized, but config\.json has no quantization_config"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_packed_layer_of_8_bits_without_a_scale_is_not_decompressed(bases, tmp_path):
    name = f"{ATTENTION}.compressed"
    folder = shutil.copytree(bases["head"], tmp_path / "mutant")
    tensors_changed(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(FormatError, match=f"{name} is I8, but {ATTENTION}.weight_scale is missing"):
        decompress_folder(folder, tmp_path / "plain")
