"""Packed experts: each family's names, and the same weights and logits as its plain checkpoint after loading."""

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

from crepe_llm.checkpoints import FormatError, compress_folder, decompress_folder, read_folder
from crepe_llm.checkpoints.experts import Expert, expert_of, incomplete
from sparse_models import prune_2of4

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
LATENT = {
    **{"n_routed_experts": 4, "moe_intermediate_size": 20, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
}
FAMILIES = {
    "mixtral": (t.MixtralConfig, {"num_local_experts": 4, "num_key_value_heads": 2}),
    "qwen2_moe": (
        t.Qwen2MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 24},
    ),
    "qwen3_moe": (t.Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 20, "head_dim": 8}),
    "olmoe": (t.OlmoeConfig, {"num_experts": 12}),
    "deepseek_v2": (t.DeepseekV2Config, LATENT),
    "deepseek_v3": (t.DeepseekV3Config, LATENT),
    "granitemoe": (t.GraniteMoeConfig, {"num_local_experts": 3, "intermediate_size": 20}),
}
SINGLE = "model.safetensors"
IDS = torch.arange(3, 35)[None]


@pytest.fixture(scope="module")
def folders_of(tmp_path_factory):
    """A function: family -> the folder of a plain checkpoint whose experts are 2:4, and that of the packed one."""
    made = {}

    def make(family):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            kind, fields = FAMILIES[family]
            torch.manual_seed(0)
            model = t.AutoModelForCausalLM.from_config(kind(**{**SIZES, **fields}), dtype=torch.float32)
            prune_2of4(model)
            for parameter in model.parameters():
                if parameter.ndim == 3:
                    parameter.data[..., 1::4] = parameter.data[..., 2::4] = 0
            model.save_pretrained(root / "plain")
            compress_folder(root / "plain", root / "packed")
            made[family] = root / "plain", root / "packed"
        return made[family]

    return make


def load(folder, **options):
    return t.AutoModelForCausalLM.from_pretrained(folder, **options)


def experts_in(folder):
    return [layer for layer in read_folder(folder).layers if expert_of(layer)]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_load_as_the_plain_ones_do(family, folders_of, tmp_path):
    plain, packed = folders_of(family)
    assert len(experts_in(packed)) == sum(expert_of(n.removesuffix(".weight")) is not None for n in weights(plain))
    model, twin = load(packed), load(plain)
    state, expected = model.state_dict(), twin.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert torch.equal(model(IDS).logits, twin(IDS).logits)
    model.save_pretrained(tmp_path / "again")
    assert_same_weights(tmp_path / "again", plain)


def weights(folder):
    return {name: tensor for name, tensor in load_file(folder / SINGLE).items() if name.endswith(".weight")}


def assert_same_weights(folder, other):
    found, expected = load_file(folder / SINGLE), load_file(other / SINGLE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_packed_layers_that_transformers_splits(tmp_path):
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "initializer_range": 0.1}
    model = t.AutoModelForCausalLM.from_config(t.AutoConfig.for_model("hrm_text", **sizes))
    prune_2of4(model)
    model.save_pretrained(tmp_path / "plain")
    packed = compress_folder(tmp_path / "plain", tmp_path / "packed")
    assert any(name.endswith(".attn.gqkv_proj") for name in packed)
    assert any(name.endswith(".mlp.gate_up_proj") for name in packed)
    for dtype in (torch.float32, torch.bfloat16):
        loaded, info = load(tmp_path / "packed", dtype=dtype, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        found, expected = loaded.state_dict(), load(tmp_path / "plain", dtype=dtype).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    load(tmp_path / "packed").save_pretrained(tmp_path / "again")
    assert_same_weights(tmp_path / "again", tmp_path / "plain")


def test_packed_experts_can_be_decompressed(folders_of, tmp_path):
    plain, packed = folders_of("mixtral")
    decompress_folder(packed, tmp_path / "out")
    assert_same_weights(tmp_path / "out", plain)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "granitemoe"])
def test_experts_load_in_another_dtype(family, folders_of):
    plain, packed = folders_of(family)
    model, twin = (load(folder, dtype=torch.bfloat16).state_dict() for folder in (packed, plain))
    assert all(torch.equal(model[name], value) for name, value in twin.items())


def test_one_dense_expert_keeps_those_of_its_layer_plain(folders_of, tmp_path, caplog):
    plain, _ = folders_of("qwen3_moe")
    dense = "model.layers.1.mlp.experts.2.up_proj"
    changed(plain, tmp_path / "plain", lambda tensors: tensors[f"{dense}.weight"].fill_(1.0))
    compress_folder(tmp_path / "plain", tmp_path / "packed")
    assert {expert_of(layer).group for layer in experts_in(tmp_path / "packed")} == {"model.layers.0.mlp.experts"}
    assert "model.layers.1.mlp.experts is stored plain: 1 of its 12 matrices are not 2:4" in caplog.text
    assert dense in caplog.text
    assert torch.equal(load(tmp_path / "packed")(IDS).logits, load(tmp_path / "plain")(IDS).logits)


def changed(source, target, change):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / SINGLE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / SINGLE, {"format": "pt"})
    return target


EXPERT = "model.layers.1.mlp.experts.1.up_proj"
PARTS = ("compressed", "bitmask", "shape")


def without(*layers):
    return lambda tensors: [tensors.pop(f"{layer}.{part}") for layer in layers for part in PARTS]


def plain_expert(tensors):
    without(EXPERT)(tensors)
    tensors[f"{EXPERT}.weight"] = torch.ones(20, 32)


def shorter(tensors):
    for part, rows in (("compressed", 16), ("bitmask", 16)):
        tensors[f"{EXPERT}.{part}"] = tensors[f"{EXPERT}.{part}"][:rows]
    tensors[f"{EXPERT}.shape"][0] = 16


def uneven(tensors):
    tensors[f"{EXPERT}.bitmask"][3, 1] = 0xFF


LAST = [f"model.layers.1.mlp.experts.3.{kind}_proj" for kind in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(EXPERT), rf"{EXPERT} is missing, but other experts"),
        (
            without(*LAST),
            r"model\.layers\.1\.mlp\.experts\.down_proj F32 \[3, 32, 20\], the model has F32 \[4, 32, 20\]",
        ),
        (plain_expert, rf"{EXPERT} is stored plain, but other experts"),
        (shorter, rf"{EXPERT} is packed from torch\.float32 \[16, 32\], .*experts\.0\.up_proj from .*\[20, 32\]"),
        (uneven, rf"{EXPERT}\.bitmask.*row 3"),
    ],
    ids=["one missing", "the last missing", "one plain", "another shape", "a bad mask"],
)
def test_experts_that_do_not_belong_together_are_named(change, message, folders_of, tmp_path):
    _, packed = folders_of("qwen3_moe")
    with pytest.raises(FormatError, match=message):
        load(changed(packed, tmp_path / "bad", change))


def test_names_of_experts():
    assert expert_of("model.layers.3.mlp.experts.12.up_proj") == ("model.layers.3.mlp.experts", 12, "up_proj")
    assert expert_of("a.experts.0.w1").name == "a.experts.0.w1"
    for other in ("model.layers.3.mlp.shared_expert.up_proj", "model.layers.3.mlp.experts.gate_up_proj", "experts.1"):
        assert expert_of(other) is None
    layers = [f"a.experts.{number}.{kind}" for number in range(12) for kind in ("x", "y")]
    assert incomplete([*layers, "b.q_proj"]) == {}
    assert incomplete(layers[:3] + layers[5:]) == {
        "a.experts": [Expert("a.experts", 1, "y"), Expert("a.experts", 2, "x")]
    }


WHOLE = "model.layers.1.block_sparse_moe.input_linear"


def test_experts_in_one_tensor_are_packed_with_an_axis_of_experts(folders_of, tmp_path):
    plain, packed = folders_of("granitemoe")
    checkpoint = read_folder(packed)
    assert checkpoint.layers[WHOLE].shape == (3, 40, 32)
    assert [checkpoint.tensors[f"{WHOLE}.{part}"].shape for part in PARTS] == [(3, 40, 16), (3, 40, 4), (3, 1)]
    kept = checkpoint.load(f"{WHOLE}.compressed")
    assert torch.equal(kept[1, 7], read_folder(plain).load(f"{WHOLE}.weight")[1, 7].view(-1, 4)[:, [0, 3]].flatten())
    decompress_folder(packed, tmp_path / "out")
    assert_same_weights(tmp_path / "out", plain)


def fewer_experts(tensors):
    for part in ("compressed", "bitmask"):
        tensors[f"{WHOLE}.{part}"] = tensors[f"{WHOLE}.{part}"][:2]
    tensors[f"{WHOLE}.shape"][0] = 2


def one_matrix(tensors):
    for part in ("compressed", "bitmask"):
        tensors[f"{WHOLE}.{part}"] = tensors[f"{WHOLE}.{part}"].flatten(0, 1)
    tensors[f"{WHOLE}.shape"] = torch.tensor([[120], [32]])


DAMAGED = {
    fewer_experts: r"input_linear.compressed is packed from F32 \[2, 40, 32\], the model has F32 \[3, 40, 32\]",
    one_matrix: r"input_linear.compressed is packed from F32 \[120, 32\], the model has F32 \[3, 40, 32\]",
    lambda tensors: tensors[f"{WHOLE}.bitmask"][2, 3].fill_(7): "input_linear.bitmask: bitmask row 83, byte 0",
    lambda tensors: tensors[f"{WHOLE}.shape"][0].fill_(-3): "input_linear.shape: the dense shape .* is not positive",
    lambda tensors: tensors[f"{WHOLE}.shape"][0].fill_(4): r"input_linear.compressed is F32 .* needs F32 \[4, 40, 16\]",
    without(WHOLE): r"layers.1.block_sparse_moe.experts.gate_up_proj is missing",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.items(), ids=range(len(DAMAGED)))
def test_damaged_experts_in_one_tensor_are_refused(damage, message, folders_of, tmp_path):
    folder = changed(folders_of("granitemoe")[1], tmp_path / "damaged", damage)
    with pytest.raises(FormatError, match=message):
        load(folder)
