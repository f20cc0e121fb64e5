"""Packed folders whose tensors are not the model's: each is named before a weight is loaded."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from crepe_llm.checkpoints import FormatError, attach, compress_folder, decompress_folder
from crepe_llm.evaluation.random_models import write_random_model
from sparse_models import prune_2of4

SINGLE = "model.safetensors"
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.0.mlp"
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A function: quantization or None -> a packed Qwen2 (biases, a head of its own)."""
    made = {}

    def make(quantization):
        if quantization not in made:
            config = Qwen2Config(**SIZES, architectures=["Qwen2ForCausalLM"], tie_word_embeddings=False)
            folder = tmp_path_factory.mktemp("base") / str(quantization)
            made[quantization] = write_random_model(config, folder, sparse=True, quantization=quantization)
        return made[quantization]

    return make


def changed(source, target, change):
    shutil.copytree(source, target)
    tensors = load_file(target / SINGLE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / SINGLE, {"format": "pt"})
    return target


def replace(name, value):
    return lambda tensors: tensors.update({name: value(tensors[name])})


def without(*prefixes):
    def change(tensors):
        for name in [name for name in tensors if name.startswith(prefixes)]:
            del tensors[name]

    return change


def relabelled(dtype, *names):
    return lambda tensors: tensors.update({name: tensors[name].view(dtype) for name in names})


def packed_as(layer, dtype):
    return replace(f"{layer}.compressed", lambda values: values.to(dtype))


NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
BIAS, SCALE, VALUES = f"{ATTENTION}.k_proj.bias", f"{MLP}.up_proj.weight_scale", f"{MLP}.up_proj.compressed"

# What is changed, in a checkpoint of which quantization, and the error after the file's name.
DAMAGED = {
    "a short norm": (replace(NORM, lambda t: t[:63]), None, rf"{NORM} is BF16 \[63\], the model has BF16 \[64\] there"),
    "a norm that is a number": (replace(NORM, lambda t: t[0]), None, rf"{NORM} is BF16 \[\], the model has BF16"),
    "a norm in a row": (replace(NORM, lambda t: t[None]), None, rf"{NORM} is BF16 \[1, 64\]"),
    "an integer norm": (replace(NORM, lambda t: t.int()), None, rf"{NORM} is I32 \[64\], not one of F64, F32"),
    "a float8 norm": (replace(NORM, lambda t: t.to(torch.float8_e4m3fn)), None, rf"{NORM} is F8_E4M3 \[64\]"),
    "a relabelled norm": (relabelled(torch.int16, NORM), None, rf"{NORM} is I16 \[64\]"),
    "a long embedding": (replace(EMBEDDING, lambda t: torch.cat([t, t[:1]])), None, rf"{EMBEDDING} is BF16 \[97, 64\]"),
    "a boolean embedding": (replace(EMBEDDING, lambda t: t != 0), None, rf"{EMBEDDING} is BOOL \[96, 64\]"),
    "a transposed head": (replace(HEAD, lambda t: t.T), None, rf"{HEAD} is BF16 \[64, 96\], .* BF16 \[96, 64\]"),
    "a bias of another layer": (replace(BIAS, lambda t: t.repeat(2)), None, rf"{BIAS} is BF16 \[64\].*BF16 \[32\]"),
    "half of a scale": (replace(SCALE, lambda t: t[:22]), "int8", rf"{SCALE} is F32 \[22, 1\].* \[44, 1\]"),
    "one scale": (replace(SCALE, lambda t: t[:1, 0]), "int8", rf"{SCALE} is F32 \[1\].* \[44, 1\]"),
    "a flat scale": (replace(SCALE, torch.flatten), "fp8", rf"{SCALE} is F32 \[44\].* \[44, 1\]"),
    "an integer scale": (relabelled(torch.int32, SCALE), "fp8", rf"{SCALE} is I32 \[44, 1\]"),
    "no scale": (without(SCALE), "int8", rf"{SCALE} is missing, the model has .* \[44, 1\]"),
    "no norm": (without(NORM), None, rf"{NORM} is missing, the model has BF16 \[64\]"),
    "no bias": (without(BIAS), "int8", rf"{BIAS} is missing, the model has BF16 \[32\]"),
    "no head": (without(HEAD), None, rf"{HEAD} is missing, the model has BF16 \[96, 64\]"),
    "no embedding": (without(EMBEDDING), None, rf"{EMBEDDING} is missing"),
    "no packed layer": (without(f"{MLP}.up_proj."), None, rf"{MLP}.up_proj.weight is missing, the model has BF16 \[44"),
    "no quantized layer": (without(f"{MLP}.up_proj."), "int8", rf"{MLP}.up_proj.weight is missing, .* and 1 more"),
    "no block": (without("model.layers.0."), None, r"model.layers.0.input_layernorm.weight is missing.* and 11 more"),
    "a tensor more": (lambda t: t.update({f"{MLP}.up_proj.bias": torch.ones(44)}), None,
                      rf"{MLP}.up_proj.bias is not one of the model's, Qwen2ForCausalLM"),
    "a scale more": (lambda t: t.update({SCALE: torch.ones(44, 1)}), None, rf"{SCALE} is not one of the model's"),
    "a block more": (lambda t: t.update({name.replace("s.0.", "s.2."): v.clone() for name, v in list(t.items())}), None,
                     r"model.layers.2.* is not one of the model's, Qwen2ForCausalLM, and 11 more"),
    "two of one": (lambda t: t.update({"norm.weight": torch.zeros(64)}), None, "is the model's model.norm.weight, as"),
    "int8 in a float model": (packed_as(f"{MLP}.up_proj", torch.int8), None,
                              rf"{MLP}.up_proj.compressed is packed from I8 \[44, 64\], the model has BF16 \[44, 64\]"),
    "floats in an int8 model": (packed_as(f"{MLP}.up_proj", torch.bfloat16), "int8",
                                rf"{MLP}.up_proj.compressed is packed from BF16 .*, the model has I8"),
    "int8 labelled float8": (relabelled(torch.float8_e4m3fn, VALUES), "int8", "from F8_E4M3 .* I8"),
    "float8 labelled int8": (relabelled(torch.int8, VALUES), "fp8", "from I8 .* F8_E4M3"),
    "bf16 labelled fp16": (relabelled(torch.float16, VALUES), None,
                           rf"{VALUES} is F16, \d+ others are BF16"),
    "a norm labelled fp16": (relabelled(torch.float16, NORM), "int8", rf"{NORM} is F16, \d+ others are BF16"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_not_the_models_is_named(base, tmp_path, name):
    change, quantization, message = DAMAGED[name]
    folder = changed(base(quantization), tmp_path / "bad", change)
    with pytest.raises(FormatError, match=rf"{SINGLE}: tensor .*" + message):
        AutoModelForCausalLM.from_pretrained(folder)
    # The cast to a dtype that was asked for is no excuse.
    with pytest.raises(FormatError, match=rf"{SINGLE}: tensor "):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_layer_of_another_shape_is_named(base, tmp_path):
    def wider(tensors):
        for part in ("compressed", "bitmask", "shape"):
            tensors[f"{MLP}.down_proj.{part}"] = tensors[f"{MLP}.up_proj.{part}"].clone()

    with pytest.raises(FormatError, match=rf"{MLP}.down_proj.compressed is packed from BF16 \[44, 64\].*\[64, 44\]"):
        AutoModelForCausalLM.from_pretrained(changed(base(None), tmp_path / "bad", wider))


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"vocab_size": 97},
        {"intermediate_size": 48},
        {"head_dim": 8},
    ],
)
def test_a_config_of_another_model_is_noticed(base, tmp_path, change):
    folder = shutil.copytree(base(None), tmp_path / "bad")
    content = json.loads((folder / "config.json").read_text())
    del content["layer_types"]
    (folder / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(FormatError, match=rf"{SINGLE}: tensor .* model"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize(
    "lost",
    [{"quantization_config": None}, {"quantization_config": {"quant_method": "unknown"}}],
    ids=["lost", "unknown"],
)
def test_packed_layers_that_the_config_does_not_tell_of_are_refused(base, tmp_path, quantization, lost):
    folder = shutil.copytree(base(quantization), tmp_path / "bad")
    content = json.loads((folder / "config.json").read_text()) | lost
    (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(FormatError, match=rf"{SINGLE}: holds packed 2:4 layers, but config\.json"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_configuration_or_tensors_given_beside_the_folder(base):
    folder = base(None)
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(FormatError, match=r"state_dict holds packed 2:4 layers, .* give the folder"):
        Qwen2ForCausalLM.from_pretrained(None, config=config, state_dict=load_file(folder / SINGLE))
    del config.quantization_config
    with pytest.raises(
        FormatError, match=r"the configuration that was given has no such quantization, .* leave it out"
    ):
        AutoModelForCausalLM.from_pretrained(folder, config=config)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (None, "config.json has no quantization_config; put the config.json there that was saved with it"),
        ("compression_config", "it has compression_config, which transformers does not read; rename that"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_codes_whose_quantization_transformers_does_not_find_are_refused(base, tmp_path, packed, place, message):
    folder = tmp_path / "bad"
    shutil.copytree(base("int8"), folder) if packed else decompress_folder(base("int8"), folder)
    content = json.loads((folder / "config.json").read_text())
    quantization = content.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(content | ({place: quantization} if place else {})))
    what = "holds packed 2:4 layers" if packed else r"tensor \S+\.weight is quantized"
    with pytest.raises(FormatError, match=f"{what}, but .*{re.escape(message)}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_quantization_in_the_text_models_part_counts(base, tmp_path):
    folder = shutil.copytree(base("int8"), tmp_path / "nested")
    content = json.loads((folder / "config.json").read_text())
    quantization = content.pop("quantization_config")
    content["text_config"] = {"quantization_config": quantization, "depth": 2}
    (folder / "config.json").write_text(json.dumps(content))
    decompress_folder(folder, tmp_path / "plain")
    compress_folder(tmp_path / "plain", tmp_path / "packed")
    for name, form in (("plain", None), ("packed", "sparse-24-bitmask")):
        made = json.loads((tmp_path / name / "config.json").read_text())
        assert made["text_config"] == {"depth": 2}
        assert made["quantization_config"]["config_groups"] == quantization["config_groups"]
        assert made["quantization_config"]["sparsity_config"].get("format") == form


def test_a_config_that_tells_of_packed_layers_that_are_not_there_is_named(base, tmp_path):
    decompress_folder(base(None), tmp_path / "plain")
    shutil.copyfile(base(None) / "config.json", tmp_path / "plain/config.json")
    with pytest.raises(FormatError, match=r"config.json says sparse-24-bitmask, but no tensor is named \*\.compressed"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain")


def test_floats_of_any_width_are_cast(base, tmp_path):
    def widen(tensors):
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.float() if "layers.0" in name else tensor

    loaded = AutoModelForCausalLM.from_pretrained(changed(base(None), tmp_path / "wide", widen)).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(base(None)).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_other_heads_take_what_they_share(base, tmp_path):
    """A model without the head, or with a new one, is loaded; one whose inside is incomplete is not."""
    inner = AutoModel.from_pretrained(base(None))
    full = AutoModelForCausalLM.from_pretrained(base(None))
    classifier = AutoModelForSequenceClassification.from_pretrained(base(None), num_labels=3)
    for name, expected in full.model.state_dict().items():
        assert torch.equal(inner.state_dict()[name], expected)
        assert torch.equal(classifier.model.state_dict()[name], expected)
    assert classifier.score.weight.shape == (3, 64)
    bad = changed(base(None), tmp_path / "bad", without(f"{MLP}.up_proj."))
    for family in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(FormatError, match=r"mlp.up_proj.weight is missing"):
            family.from_pretrained(bad)


def test_tied_weights_may_be_missing(tmp_path):
    config = LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"], tie_word_embeddings=True)
    folder = write_random_model(config, tmp_path / "tied", sparse=True)
    assert "lm_head.weight" not in load_file(folder / SINGLE)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(FormatError, match="is missing"):
        AutoModelForCausalLM.from_pretrained(changed(folder, tmp_path / "bad", without(EMBEDDING)))


def test_merged_experts_are_compared(tmp_path):
    """Experts are stored one by one and merged while they are loaded."""
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    prune_2of4(model)
    model.save_pretrained(tmp_path / "dense")
    compress_folder(tmp_path / "dense", tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").state_dict()
    assert all(torch.equal(loaded[name], expected) for name, expected in model.state_dict().items())
    expert = next(name for name in load_file(tmp_path / "packed" / SINGLE) if "experts.3.w2" in name)
    short = changed(tmp_path / "packed", tmp_path / "short", replace(expert, lambda t: t[:, :-1]))
    with pytest.raises((FormatError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(short)
    fewer = changed(tmp_path / "packed", tmp_path / "fewer", without(expert))
    with pytest.raises((FormatError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(fewer)
    experts = [name for name in load_file(tmp_path / "packed" / SINGLE) if ".experts." in name and "layers.1" in name]
    with pytest.raises(FormatError, match=r"layers\.1\..*experts.* is missing"):
        AutoModelForCausalLM.from_pretrained(changed(tmp_path / "packed", tmp_path / "none", without(*experts)))


def test_buffers_of_old_checkpoints_are_no_surprise(base, tmp_path):
    """Frequencies of rotary positions, masks of attention: saved once, computed now."""

    def add(tensors):
        tensors["model.rotary_emb.inv_freq"] = torch.ones(8)
        tensors[f"{ATTENTION}.rotary_emb.inv_freq"] = torch.ones(8)
        tensors[f"{ATTENTION}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
        tensors[f"{ATTENTION}.masked_bias"] = torch.tensor(-1e9)

    loaded = AutoModelForCausalLM.from_pretrained(changed(base(None), tmp_path / "old", add)).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(base(None)).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_what_this_package_saves_passes(tiny_model_folder, tmp_path):
    """Learned positions, fused projections, norms with biases: every tiny family loads what it saved."""
    for family in ("opt", "gemma3", "mixtral"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(family), dtype=torch.bfloat16)
        prune_2of4(model)
        attach(model)
        model.save_pretrained(tmp_path / family, max_shard_size="20KB")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / family).state_dict()
        assert all(torch.equal(loaded[name], expected) for name, expected in model.state_dict().items()), family
