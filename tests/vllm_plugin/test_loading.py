"""What the plugin claims, what it leaves to vLLM, and how it refuses damaged checkpoints."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2Config

from crepe_llm.checkpoints import FormatError
from crepe_llm.checkpoints.formats import SPARSE_24_BITMASK
from crepe_llm.evaluation.random_models import write_random_model
from crepe_llm.vllm_plugin import QUANTIZATION, register
from vllm_runs import llama, one_collection

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed")

from crepe_llm.vllm_plugin.loading import WrittenMemory, _guard  # noqa: E402 - imports vLLM

LAYER = "model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
    )
    return write_random_model(config, tmp_path, sparse=True)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces tensors of LAYER by the part's name, or drops them (None)."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for part, tensor in changes.items():
        tensors.pop(f"{LAYER}.{part}")
        if tensor is not None:
            tensors[f"{LAYER}.{part}"] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def quantization_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert isinstance(config, dict)
    return config


def read(folder: Path) -> Any:
    from crepe_llm.vllm_plugin.config import Sparse24Config

    made = Sparse24Config.from_config(quantization_of(folder))
    made.maybe_update_config(str(folder))
    return made


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    from vllm import LLM

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    with one_collection():
        return LLM(str(folder), skip_tokenizer_init=True, enforce_eager=True, kv_cache_memory_bytes=16 << 20, **options)


def test_random_weights_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="load_format=dummy gives every tensor random values"):
        start(write_random_model(llama(), tmp_path, sparse=True), monkeypatch, load_format="dummy")


def test_registering_again_changes_nothing() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    first = get_quantization_config(QUANTIZATION)
    register()
    assert get_quantization_config(QUANTIZATION) is first
    assert QUANTIZATION_METHODS.count(QUANTIZATION) == 1


@pytest.mark.parametrize(
    ("config", "ours"),
    [
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, True),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}, True),
        ({"quant_method": "compressed-tensors", "sparsity_config": {}}, False),
        ({"quant_method": "compressed-tensors", "sparsity_config": None}, False),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, False),
        ({"quant_method": "gptq", "bits": 4}, False),
        ({"quant_method": "other", "sparsity_config": {"format": "sparse-24-bitmask"}}, False),
    ],
)
def test_claims_two_formats_only(config: dict[str, Any], ours: bool) -> None:
    """No other registered method may be asked in our place, nor ours in another's."""
    from crepe_llm.vllm_plugin.config import Sparse24Config

    assert Sparse24Config.override_quantization_method(config, None) == (QUANTIZATION if ours else None)
    if not ours:  # what is not ours may be asked for in any way
        assert Sparse24Config.override_quantization_method(config, "fp8") is None


def test_vllm_resolves_the_checkpoint_to_the_plugin(folder: Path) -> None:
    from vllm.config import ModelConfig

    for asked in (None, "compressed-tensors", QUANTIZATION):
        assert ModelConfig(str(folder), skip_tokenizer_init=True, quantization=asked).quantization == QUANTIZATION


@pytest.mark.parametrize("asked", ["fp8", "awq", "bitsandbytes"])
def test_another_quantization_than_the_checkpoints_is_refused(folder: Path, asked: str) -> None:
    from vllm.config import ModelConfig

    with pytest.raises(ValueError, match=f"quantization={asked} does not fit a 2:4 checkpoint, .*leave quantization"):
        ModelConfig(str(folder), skip_tokenizer_init=True, quantization=asked)


def test_config_leaves_the_callers_dictionary_alone(folder: Path) -> None:
    from crepe_llm.vllm_plugin.config import Sparse24Config

    config = quantization_of(folder)
    Sparse24Config.from_config(config)
    assert config["sparsity_config"]["format"] == "sparse-24-bitmask"


def test_no_sparse_tensor_is_refused(folder: Path) -> None:
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if t.dtype != torch.uint8}
    kept = {name: t for name, t in tensors.items() if not name.endswith((".compressed", ".shape"))}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no tensor is named \*\.compressed"):
        read(folder)


def test_missing_part_is_refused_by_name(folder: Path) -> None:
    rewrite(folder, bitmask=None)
    with pytest.raises(FormatError, match=r"model\.safetensors: layer model\.layers\.0\.self_attn\.o_proj .*bitmask"):
        read(folder)


def test_truncated_file_is_refused_by_name(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        read(folder)


def test_bitmask_with_three_of_four_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = load_file(folder / "model.safetensors")[f"{LAYER}.bitmask"].clone()
    mask[5, 2] = 0b0111_0011
    rewrite(folder, bitmask=mask)
    with pytest.raises(ValueError, match=r"o_proj.*columns 20 to 23 of row 5"):
        start(folder, monkeypatch)


def test_weight_of_another_size_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(ValueError, match=r"mlp\.\w+_proj\.\w+ holds \[\d+, \d+\]"):
        start(folder, monkeypatch)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda scale: scale.flatten(), r"\[128\]"),
        (lambda scale: scale.max(), r"\[1\]"),
        (lambda scale: scale.expand(128, 2).contiguous(), r"\[128, 2\]"),
    ],
    ids=["one axis", "scalar", "groups"],
)
def test_scales_of_another_shape_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, found: str
) -> None:
    folder = write_random_model(llama(), tmp_path, sparse=True, quantization="int8")
    rewrite(folder, weight_scale=change(load_file(folder / "model.safetensors")[f"{LAYER}.weight_scale"]))
    with pytest.raises(ValueError, match=rf"o_proj\.weight_scale holds {found} as .* the model needs \[128, 1\]"):
        start(folder, monkeypatch)


def test_missing_layer_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(folder, compressed=None, bitmask=None, shape=None)
    with pytest.raises(ValueError, match=r"self_attn\.o_proj"):
        start(folder, monkeypatch)


def test_ranks_that_split_a_byte_of_bitmask_are_refused() -> None:
    from crepe_llm.vllm_plugin.linear import Scheme, Sparse24LinearMethod

    method = Sparse24LinearMethod(Scheme(), "model.layers.0.mlp.down_proj", ["model.layers.0.mlp.down_proj"])
    with pytest.raises(ValueError, match=r"down_proj: 200 input columns over 2 .*fewer ranks"):
        method.create_weights(torch.nn.Module(), 100, [64], 200, 64, torch.float32, weight_loader=None)


def quantization_args(**changes: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(**{"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", **changes})


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        ({"num_bits": 4}, None),
        ({"strategy": "group", "group_size": 32}, None),
        ({"symmetric": False}, None),
        ({}, {"strategy": "token", "dynamic": True, "symmetric": False}),
        ({"type": "float"}, {"strategy": "token", "dynamic": True}),
    ],
    ids=["4-bit", "group", "asymmetric", "asymmetric inputs", "mixed types"],
)
def test_other_quantizations_are_refused_with_the_layers_name(weights: Any, inputs: Any) -> None:
    from crepe_llm.vllm_plugin.linear import Scheme

    described = {
        "weights": quantization_args(**weights),
        "input_activations": None if inputs is None else quantization_args(**inputs),
    }
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.up_proj"):
        Scheme.of("model.layers.3.mlp.up_proj", described)


GONE = {
    "model.layers.0.self_attn.k_proj": (*SPARSE_24_BITMASK.parts, "weight_scale", "bias"),
    "model.layers.0.self_attn.q_proj": ("bias",),
    "model.layers.0.mlp.gate_proj": SPARSE_24_BITMASK.parts,
    "model.layers.0.mlp.down_proj": ("weight_scale",),
    "model.layers.0.input_layernorm": ("weight",),
    "model.layers.1.self_attn.v_proj": ("weight",),  # dense
    "model.layers.2": (),  # the whole block
    "model.norm": ("weight",),
    "model.embed_tokens": ("weight",),
    "lm_head": ("weight",),
}


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_all_that_is_missing_is_named_before_anything_is_served(
    quantization: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        architectures=["Qwen2ForCausalLM"],
        tie_word_embeddings=False,
    )
    dense = [r"layers\.1\.self_attn"]
    folder = write_random_model(config, tmp_path, sparse=True, quantization=quantization, dense_layers=dense)
    tensors = load_file(folder / "model.safetensors")
    gone = {name for name in tensors if name.startswith("model.layers.2.")}
    gone |= {f"{layer}.{part}" for layer, parts in GONE.items() for part in parts} & tensors.keys()
    left = {name: tensor for name, tensor in tensors.items() if name not in gone}
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="damaged checkpoint") as raised:
        start(folder, monkeypatch)
    listed = set(str(raised.value).partition("does not hold ")[2].partition(";")[0].split(", "))
    # What is sparse now has no tensor there that says so: vLLM's own name of the weight stands for the three parts.
    wanted = {name for name in gone if name.rpartition(".")[2] not in SPARSE_24_BITMASK.parts}
    wanted |= {f"{name.rpartition('.')[0]}.weight" for name in gone if name.endswith(".compressed")}
    assert listed == wanted


def to_four_bits(folder: Path, layers: list[str]) -> None:
    """Quantizes dense layers to INT4 with a scale for 32 columns, as compressed-tensors stores them."""
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    tensors = load_file(file)
    for layer in layers:
        weight = tensors.pop(f"{layer}.weight").float()
        groups = weight.view(weight.shape[0], -1, 32)
        scale = groups.abs().amax(-1, keepdim=True) / 7
        quantized = (groups / scale).round().clamp(-8, 7).to(torch.int8).view_as(weight)
        tensors[f"{layer}.weight_packed"] = pack_to_int32(quantized, 4)
        tensors[f"{layer}.weight_scale"] = scale.squeeze(-1).bfloat16()
        tensors[f"{layer}.weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, file, metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    config["quantization_config"] |= {
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": layers, "weights": weights}},
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_four_bit_layers_beside_sparse_ones_must_be_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = llama(intermediate_size=256)
    folder = write_random_model(config, tmp_path, sparse=True, dense_layers=["down_proj"])
    to_four_bits(folder, [f"model.layers.{block}.mlp.down_proj" for block in range(2)])
    tensors = load_file(folder / "model.safetensors")
    start(folder, monkeypatch).llm_engine.engine_core.shutdown()
    gone = ["model.layers.0.mlp.down_proj.weight_scale", "model.layers.1.mlp.down_proj.weight_packed"]
    left = {name: tensor for name, tensor in tensors.items() if name not in gone}
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"does not hold {', '.join(gone)};"):
        start(folder, monkeypatch)


def filled(shape: tuple[int, ...], index: Any, how: str) -> tuple[torch.Tensor, torch.Tensor, WrittenMemory]:
    """A parameter of which a part was written, where that was, and the record of it."""
    parameter, mask = torch.empty(shape), torch.zeros(shape, dtype=torch.bool)
    with WrittenMemory([parameter]) as written:
        view = parameter.data[index]
        if how == "copy":
            view.copy_(torch.ones(view.shape))
        elif how == "fill":
            view.fill_(2.0)
        elif how == "item":
            parameter[index] = torch.ones(view.shape)
        else:
            view.add_(1.0)
    if how != "add":
        mask[index] = True
    return parameter, mask, written


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    how=st.sampled_from(["copy", "fill", "item", "add"]),
    data=st.data(),
)
def test_gaps_are_the_elements_that_nothing_has_filled(shape: tuple[int, ...], how: str, data: st.DataObject) -> None:
    bounds = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    steps = [data.draw(st.integers(1, 3)) for _ in shape]
    index = tuple(slice(*bound, step) for bound, step in zip(bounds, steps, strict=True))
    parameter, mask, written = filled(shape, index, how)
    base = parameter.data_ptr()
    unread = {at for gap in written.gaps(parameter) for at in range(gap.start - base, gap.stop - base, 4)}
    assert unread == {4 * at for at in (~mask).flatten().nonzero().flatten().tolist()}
    if len(shape) == 2:
        turned = parameter.t()
        assert {at - base for gap in written.gaps(turned) for at in range(gap.start, gap.stop, 4)} == unread


class Loads(torch.nn.Module):
    """A model that reads what it is given by name, and says that it has read ``claimed``, too."""

    def __init__(self, claimed: set[str]) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(4)
        self.embedding, self.head = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight  # tied
        self.later = torch.nn.Parameter(torch.empty(3))
        self.experts = torch.nn.Parameter(torch.empty(4, 2, 2))
        self.register_buffer("table", torch.zeros(5))
        self.claimed = claimed

    def load_weights(self, weights: Any) -> set[str]:
        parameters = dict(self.named_parameters())
        read = set()
        for name, tensor in weights:
            parameters[name].data[: len(tensor)].copy_(tensor)
            read.add(name)
        return read | self.claimed


def loads(folder: Path, check: bool = True, claimed: tuple[str, ...] = ("later",), **changes: Any) -> Loads:
    model = Loads(set(claimed))
    _guard(model, read(folder), "folder", check)
    tensors = {"norm.weight": torch.ones(4), "norm.bias": torch.ones(4), "embedding.weight": torch.ones(8, 4)}
    tensors["experts"] = torch.ones(4, 2, 2)
    tensors = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    model.load_weights(iter(tensors.items()))
    return model


def test_tied_weights_buffers_and_what_a_model_fills_later_are_not_missing(folder: Path) -> None:
    assert torch.equal(loads(folder).head.weight, torch.ones(8, 4))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"claimed": ()}, "hold later;"),
        ({"norm.bias": None, "norm.weight": None}, r"hold norm\.weight, norm\.bias;"),
        ({"norm.bias": torch.ones(3)}, r"hold norm\.bias \(rows 3\);"),
        ({"embedding.weight": torch.ones(5, 4)}, r"hold embedding\.weight \(rows 5 to 7\);"),
        ({"experts": torch.ones(2, 2, 2)}, r"hold experts \(experts 2 to 3\);"),
        # A model that claims to have read a weight of which it has read a part is not believed.
        ({"embedding.weight": torch.ones(5, 4), "claimed": ("embedding.weight", "later")}, "rows 5 to 7"),
    ],
)
def test_what_is_missing_is_named(folder: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        loads(folder, **changes)
    loads(folder, check=False, **changes)


def test_sparse_layers_cannot_be_reloaded(folder: Path) -> None:
    model = loads(folder)
    model.head.packed = object()
    with pytest.raises(NotImplementedError, match="cannot be replaced in a running engine"):
        model.load_weights([])


def test_an_engine_that_refuses_new_weights_goes_on_serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams

    engine = start(folder, monkeypatch)

    def answer() -> list[int]:
        wanted = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
        outputs = engine.generate([{"prompt_token_ids": [3, 4, 5]}], wanted, use_tqdm=False)
        return list(outputs[0].outputs[0].token_ids)

    try:
        before = answer()
        for call in ("reload_weights", "start_weight_update", "start_draft_weight_update"):
            with pytest.raises(NotImplementedError, match="cannot be replaced in a running engine: start it again"):
                engine.collective_rpc(call)
        with pytest.raises(NotImplementedError, match=r"would be missing from what is saved: copy the .* folder"):
            engine.collective_rpc("save_sharded_state", kwargs={"path": str(folder.parent / "sharded")})
        assert not (folder.parent / "sharded").exists()
        assert answer() == before
    finally:
        engine.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_layer_that_vllm_does_not_quantize_gets_its_scaled_weight(
    folder: Path, packed: bool, quantized: bool
) -> None:
    model = torch.nn.Module()
    model.gate = torch.nn.Linear(64, 64)
    if quantized:
        model.gate.weight_scale = torch.nn.Parameter(torch.ones(64, 1))
    config, scale = read(folder), torch.rand(64, 1)
    config._checkpoint_name = {"gate": "gate"} if packed else {}
    config._scaled = {"gate": "gate"}
    stored = load_file(folder / "model.safetensors")
    parts = {part: stored[f"{LAYER}.{part}"] for part in SPARSE_24_BITMASK.parts}
    weight = SPARSE_24_BITMASK.unpack(parts)
    given = {f"gate.{part}": tensor for part, tensor in (parts if packed else {"weight": weight}).items()}
    others = {"gate.weight_scale": scale, "gate.input_scale": torch.ones(1)}
    got = dict(config.expand(model, {**given, **others, "norm.weight": torch.ones(64)}.items()))
    wanted = {"gate.weight": weight, **others} if quantized else {"gate.weight": weight.float() * scale}
    assert got.keys() == {*wanted, "norm.weight"}
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def test_layers_of_other_pipeline_stages_are_left_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from vllm.model_executor.models.utils import PPMissingLayer

    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([PPMissingLayer()])
    stored = load_file(folder / "model.safetensors")
    got = dict(read(folder).expand(model, stored.items()))
    assert got.keys() == stored.keys() and not caplog.records


@pytest.mark.parametrize(
    ("fusion", "layer", "parts"),
    [
        ({".q_proj": (".qkv_proj", "q"), ".k_proj": (".qkv_proj", "k")}, "a.0.qkv_proj", ["a.0.q_proj", "a.0.k_proj"]),
        ({".mlp.up_proj": (".mlp.gate_up_proj", 1)}, "b.mlp.gate_up_proj", ["b.mlp.up_proj"]),
        ({".mlp.up_proj": (".mlp.gate_up_proj", 1)}, "b.shared.gate_up_proj", []),
        ({".attn.q.": (".attn.qkv.", "q"), ".attn.v.": (".attn.qkv.", "v")}, "attn.qkv", []),
        ({".q.weight": (".qkv.weight", "q"), ".q.bias": (".qkv.bias", "q")}, "x.qkv", ["x.q"]),
    ],
)
def test_parts_of_a_fused_layer_from_a_mapper(fusion: Any, layer: str, parts: list[str]) -> None:
    from crepe_llm.vllm_plugin.config import _parts_by

    assert _parts_by(fusion, layer) == parts


@pytest.mark.parametrize("kind", ["int", "float"])
@pytest.mark.parametrize("inputs", [None, "static", "token"])
def test_quantized_products_follow_their_definition(kind: str, inputs: str | None) -> None:
    """Against the definition in fp64: rounded inputs times rounded weights times both scales."""
    from crepe_llm.checkpoints import pack
    from crepe_llm.vllm_plugin.linear import Scheme, Sparse24LinearMethod

    torch.manual_seed(0)
    described = {
        "weights": quantization_args(type=kind, strategy="tensor"),
        "input_activations": None
        if inputs is None
        else quantization_args(
            type=kind, strategy="token" if inputs == "token" else "tensor", dynamic=inputs == "token"
        ),
    }
    scheme = Scheme.of("layer", described)
    dtype = torch.int8 if kind == "int" else torch.float8_e4m3fn
    largest = 127.0 if kind == "int" else 448.0
    keep = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(16)
    weight = (torch.randn(24, 64) * largest / 4).clamp(-largest, largest).round() * keep
    weight = weight.to(dtype)
    scales = torch.tensor([0.01, 0.02])  # two fused parts, of 8 and 16 rows
    layer: Any = torch.nn.Module()
    layer.compressed, layer.bitmask = (torch.nn.Parameter(t, requires_grad=False) for t in pack(weight))
    layer.weight_scale = torch.nn.Parameter(scales)
    layer.logical_widths, layer.output_size = [8, 16], 24
    if inputs == "static":
        layer.input_scale = torch.nn.Parameter(torch.tensor([2.0, 3.0]) / largest)
    method = Sparse24LinearMethod(scheme, "layer", ["layer"])
    method.process_weights_after_loading(layer)
    assert not list(layer.parameters()), "the checkpoint's tensors must be freed"
    held = ("int8" if inputs == "token" else "int8_weight_only") if kind == "int" else "bf16"
    assert layer.packed.format.name == held

    x, bias = torch.randn(5, 64) * 1.3, torch.randn(24)
    scale: Any = 1.0
    rounded = x.double()
    if inputs is not None:
        scale = 3.0 / largest if inputs == "static" else x.double().abs().amax(1, keepdim=True) / largest
        rounded = x.double() / scale
        clamped = rounded.clamp(-128 if kind == "int" else -largest, largest)
        rounded = clamped.round() if kind == "int" else clamped.float().to(dtype).double()
    rows = scales.double().repeat_interleave(torch.tensor([8, 16]))
    wanted = (rounded * scale) @ weight.double().T * rows + bias.double()
    torch.testing.assert_close(method.apply(layer, x, bias).double(), wanted, rtol=1e-4, atol=1e-3)


def test_unknown_vllm_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A vLLM without the surface must go on serving: a warning that names the range, and no exception."""
    import sys

    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.quantization", SimpleNamespace())
    register()
    assert "vllm>=0.32,<0.34" in caplog.text
