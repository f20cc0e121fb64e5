"""W4A16 checkpoints with 2:4 layers: packed to 3 bits a weight, and the tokens of the same weights stored dense."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from crepe_llm.checkpoints.converting import pack_folder
from crepe_llm.evaluation.random_models import write_random_model
from crepe_llm.vllm_plugin import QUANTIZATION, register
from vllm_runs import assert_same, generate, in_process, qwen2

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed")

from crepe_llm.vllm_plugin.config import Sparse24Config  # noqa: E402 - imports vLLM

__all__ = ["in_process"]  # the fixture


class Weights(NamedTuple):
    """How weights are quantized, as compressed-tensors says it, and the kernels' format for that."""

    format: str
    symmetric: bool
    group_size: int | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        common = {"num_bits": 4, "type": "int", "symmetric": self.symmetric}
        if self.group_size is None:
            return common | {"strategy": "channel"}
        return common | {"strategy": "group", "group_size": self.group_size}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


def quantize(source: Path, folder: Path, weights: Weights) -> Path:
    """Rounds a checkpoint's linear layers by llm-compressor, and records which are 2:4."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    group = {"targets": ["Linear"], "weights": weights.arguments}
    model = AutoModelForCausalLM.from_pretrained(source)
    oneshot(model=model, recipe=[QuantizationModifier(ignore=["lm_head"], config_groups={"group_0": group})])
    model.save_pretrained(folder)
    pack_folder(folder, {})
    return folder


def nibbles(words: torch.Tensor) -> torch.Tensor:
    return torch.stack([words >> 4 * place & 15 for place in range(8)], -1).flatten(-2)


def dequantize(folder: Path, twin: Path) -> Path:
    """The same weights as plain fp32 tensors, by compressed-tensors' definition."""
    tensors = load_file(folder / "model.safetensors")
    for layer in [name.removesuffix("_packed") for name in tensors if name.endswith(".weight_packed")]:
        codes, scale = nibbles(tensors.pop(f"{layer}_packed")), tensors.pop(f"{layer}_scale")
        rows, columns = tensors.pop(f"{layer}_shape").tolist()
        zero = torch.full_like(scale, 8)
        if f"{layer}_zero_point" in tensors:
            zero = nibbles(tensors.pop(f"{layer}_zero_point").t().contiguous()).t()[:rows]
        width = columns // scale.shape[1]
        weight = (codes[:, :columns] - zero.repeat_interleave(width, 1)) * scale.repeat_interleave(width, 1)
        tensors[layer] = weight.contiguous()
    twin.mkdir()
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in ("quantization_config", "sparsity_config")}
    (twin / "config.json").write_text(json.dumps(kept))
    return twin


def packed_formats(model: torch.nn.Module) -> dict[str, str]:
    return {n: m.packed.format.name for n, m in model.named_modules() if "layers." in n and hasattr(m, "packed")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = qwen2()
    config.intermediate_size = 256
    folder = tmp_path_factory.mktemp("source")
    return write_random_model(config, folder, sparse=False, dtype=torch.float32)


@pytest.fixture(scope="module")
def grouped(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(source, tmp_path_factory.mktemp("grouped") / "w4a16", Weights("int4_g64", True, 64))


@pytest.mark.parametrize(
    "weights", [Weights("int4_g32", True, 32), Weights("int4_g128", False, 128), Weights("int4", True)], ids=str
)
def test_same_tokens_as_the_decompressed_weights(weights: Weights, source: Path, tmp_path: Path) -> None:
    folder = quantize(source, tmp_path / "w4a16", weights)
    served, layers = generate(folder, dtype="float32", inspect=packed_formats)
    assert len(layers) == 8
    assert set(layers.values()) == {weights.format}
    assert_same(served, generate(dequantize(folder, tmp_path / "twin"), dtype="float32"))


def test_bf16_activations_are_quantized_unless_vllms_own_variable_says_no(
    grouped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, layers = generate(grouped, dtype="bfloat16", inspect=packed_formats)
    assert set(layers.values()) == {"int4_g64_a8"}
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    exact, layers = generate(grouped, dtype="bfloat16", inspect=packed_formats)
    assert set(layers.values()) == {"int4_g64"}
    assert served != exact
    for (_, ours), (_, theirs) in zip(served, exact, strict=True):  # a random model's tokens are nearly tied
        both = ours[0].keys() & theirs[0].keys()
        assert len(both) > len(theirs[0]) // 2
        assert max(abs(ours[0][token] - theirs[0][token]) for token in both) < 0.05


def test_a_layer_is_packed_and_its_file_form_freed_before_the_last_is_read(
    grouped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expand, packed, freed = Sparse24Config.expand, [], []

    def watched(config: Sparse24Config, model: torch.nn.Module, tensors: Any) -> Any:
        first = model.get_parameter("model.layers.0.mlp.down_proj.weight_packed")
        for item in expand(config, model, tensors):
            packed.append(sum(hasattr(module, "packed") for module in model.modules()))
            freed.append(first.numel() == 0)
            yield item

    monkeypatch.setattr(Sparse24Config, "expand", watched)
    generate(grouped)
    assert packed[0] == 0
    assert packed[-1] == 8
    assert (freed[0], freed[-1]) == (False, True)


def test_two_tensor_parallel_ranks_same_tokens_as_one(grouped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = generate(grouped, dtype="float32")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    two, layers = generate(grouped, dtype="float32", inspect=packed_formats, tensor_parallel_size=2)
    assert set(layers.values()) == {"int4_g64"}
    assert_same(two, one)


def test_vllm_resolves_the_checkpoint_to_the_plugin(grouped: Path) -> None:
    from vllm.config import ModelConfig

    assert ModelConfig(str(grouped), skip_tokenizer_init=True).quantization == QUANTIZATION


def change(folder: Path, to: Path, name: str, tensor: torch.Tensor | None) -> Path:
    """A copy of a checkpoint with another tensor of that name, or without it."""
    to.mkdir()
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    save_file(tensors | ({} if tensor is None else {name: tensor}), to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("weight_scale", None, r"does not hold model\.layers\.0\.mlp\.gate_proj\.weight_scale"),
        (
            "weight_scale",
            torch.full((256, 2), torch.nan),
            r"weight_scale is missing or not finite in one of .*gate_proj",
        ),
        ("weight_scale", torch.ones(255, 2), r"gate_proj\.weight_scale is \[255, 2\], but .*says \[256, 128\]"),
        ("weight_scale", torch.ones(256, 4), r"gate_proj\.weight_scale holds \[256, 4\] .* needs \[256, 2\]"),
        ("weight_scale", torch.ones(256, 2, dtype=torch.int32), r"gate_proj\.weight_scale holds .* as torch\.int32"),
        (
            "weight_packed",
            torch.zeros(257, 16, dtype=torch.int32),
            r"gate_proj\.weight_packed is \[257, 16\], but .*weight_shape says \[256, 128\]",
        ),
        ("weight_shape", None, r"gate_proj has weight_packed but no weight_shape"),
        ("weight_shape", torch.tensor([256, 127]), r"gate_proj\.weight_shape says \[256, 127\], .* has \[256, 128\]"),
    ],
)
def test_damage_ends_start_up_by_name(
    part: str, tensor: torch.Tensor | None, message: str, grouped: Path, tmp_path: Path
) -> None:
    folder = change(grouped, tmp_path / "damaged", f"model.layers.0.mlp.gate_proj.{part}", tensor)
    with pytest.raises(ValueError, match=message):
        generate(folder, dtype="float32")


def test_a_layer_of_which_one_part_is_not_2of4_is_left_to_vllm(
    grouped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "model.layers.1.mlp.up_proj.weight_packed"
    folder = change(grouped, tmp_path / "mixed", name, torch.full((256, 16), 0x11111111, dtype=torch.int32))
    _, layers = generate(folder, dtype="bfloat16", inspect=packed_formats)  # vLLM's product of 4 bits has no fp32
    assert len(layers) == 7
    assert "model.layers.*.mlp.gate_up_proj: 2:4 in 4 bits, but left to vLLM's dense product: only some" in caplog.text
