"""What the plugin claims, what it leaves to vLLM, and how it refuses damaged checkpoints."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from crepe_llm.checkpoints import FormatError
from crepe_llm.evaluation.random_models import write_random_model
from crepe_llm.vllm_plugin import QUANTIZATION, register

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed")

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


def start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm import LLM

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    return LLM(str(folder), skip_tokenizer_init=True, enforce_eager=True, kv_cache_memory_bytes=16 << 20)


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


def test_vllm_resolves_the_checkpoint_to_the_plugin(folder: Path) -> None:
    from vllm.config import ModelConfig

    assert ModelConfig(str(folder), skip_tokenizer_init=True).quantization == QUANTIZATION


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


def test_missing_dense_weight_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        start(folder, monkeypatch)


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
    method.rows_loaded = dict.fromkeys(method.rows_loaded, 24)
    method.process_weights_after_loading(layer)
    assert not list(layer.parameters()), "the checkpoint's tensors must be freed"

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
    assert "vllm>=0.32,<0.33" in caplog.text
