"""Embeddings and output heads in INT8: saved by a recipe, loaded by transformers and served by vLLM."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from crepe_llm.evaluation.random_models import write_random_model
from crepe_llm.training.models import load_pruned
from vllm_runs import SIZES, assert_same, gemma3, generate, in_process, llama, one_collection, qwen2, write_adapter

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed")

__all__ = ["in_process"]  # the fixture

HEAD = """
crepe_stage:
  pruning_modifiers:
    CRePEModifier:
      mask_structure: "2:4"
  quantization_modifiers:
    QuantizationModifier:
      config_groups:
        head:
          targets: TARGETS
          weights: {num_bits: 8, type: int, strategy: channel, symmetric: true}
"""
BOTH = '["re:.*(lm_head|embed_tokens)$"]'
PROMPT = torch.arange(3, 40)[None]


def quantized(config, recipe, folder, tokenizer):
    """The model after the recipe, and the folder that it was saved to."""
    write_random_model(config, folder / "dense", sparse=False, dtype=torch.float32)
    PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(folder / "dense")
    reset_session()
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    rows = torch.randint(0, SIZES["vocab_size"], (4, 32), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 32] * 4})
    oneshot(model=model, recipe=recipe, dataset=data, num_calibration_samples=4, output_dir=str(folder / "out"))
    return model, folder / "out"


@pytest.fixture(scope="module", params=[llama, qwen2, gemma3])
def made(request, tmp_path_factory, tiny_model_folder):
    """Gemma's embedding, whose rows are scaled when they are looked up, is of a class of its own."""
    config, recipe = request.param(), HEAD.replace("TARGETS", BOTH)
    kind = "tied" if config.tie_word_embeddings else "untied"
    return *quantized(config, recipe, tmp_path_factory.mktemp("made"), tiny_model_folder("llama")), kind


def test_transformers_gives_the_model_back(made, tmp_path):
    model, folder, kind = made
    names = ("model.embed_tokens",) if kind == "tied" else ("model.embed_tokens", "lm_head")
    tensors = load_file(folder / "model.safetensors")
    assert {name.removesuffix(".weight_packed") for name in tensors if name.endswith("weight_packed")} == set(names)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(PROMPT).logits, model(PROMPT).logits)
    scale, packed = tensors[f"{names[0]}.weight_scale"], tensors[f"{names[0]}.weight_packed"]
    values = packed.view(torch.uint8).to(torch.int16) - 128
    assert torch.equal(loaded.get_input_embeddings().weight, values.to(scale.dtype) * scale)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == (kind == "tied")
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(PROMPT).logits, loaded(PROMPT).logits)


def test_the_body_alone_is_read_from_the_whole_models_files(made):
    _, folder, _ = made
    whole, body = AutoModelForCausalLM.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert torch.equal(body(PROMPT).last_hidden_state, whole.model(PROMPT).last_hidden_state)


def test_vllm_serves_it_from_one_copy(made, tmp_path):
    _, folder, kind = made
    load_pruned(folder, torch.float32).save_pretrained(tmp_path / "dense")

    def look(model):
        modules = {
            name: module for name, module in model.named_modules() if "embed_tokens" in name or "lm_head" in name
        }
        weights = {name: module.packed.weight for name, module in modules.items() if hasattr(module, "packed")}
        left = [name for module in modules.values() for name, _ in module.named_parameters(recurse=False)]
        # vLLM's models of transformers read the head's bias, and an embedding has none.
        assert type(model.lm_head).__name__ == "ParallelLMHead" and model.lm_head.bias is None
        return {name: str(weight.dtype) for name, weight in weights.items()}, left

    ours, (dtypes, left) = generate(folder, inspect=look)
    assert set(dtypes.values()) == {"torch.int8"} and not left
    assert len(dtypes) == (1 if kind == "tied" else 2)
    assert_same(ours, generate(tmp_path / "dense"))


def test_a_tied_head_may_be_in_the_file_besides(tmp_path, tiny_model_folder):
    _, folder = quantized(llama(), HEAD.replace("TARGETS", BOTH), tmp_path, tiny_model_folder("llama"))
    expected = generate(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        name.replace("model.embed_tokens", "lm_head"): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith("model.embed_tokens.")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(generate(folder), expected)


def test_lora_over_a_tied_embedding_gives_the_tokens_of_lora_over_a_dense_one(tmp_path, tiny_model_folder):
    _, folder = quantized(llama(), HEAD.replace("TARGETS", BOTH), tmp_path, tiny_model_folder("llama"))
    load_pruned(folder, torch.float32).save_pretrained(tmp_path / "twin")
    adapter = write_adapter(tmp_path / "adapter", embeddings=True)
    options = {"lora": adapter, "enable_lora": True, "max_lora_rank": 8}
    ours = generate(folder, **options)
    assert_same(ours, generate(tmp_path / "twin", **options))
    assert [tokens for tokens, _ in ours] != [tokens for tokens, _ in generate(folder)]


def test_a_reranker_is_made_of_an_int8_head(made, tmp_path):
    _, folder, kind = made
    load_pruned(folder, torch.float32).save_pretrained(tmp_path / "twin")
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path / "twin")

    ours, theirs = (probability(one) for one in (folder, tmp_path / "twin"))
    assert abs(ours - theirs) < 1e-4 < abs(ours - 0.5)
    without = tmp_path / "without"
    shutil.copytree(folder, without)
    name = f"{'model.embed_tokens' if kind == 'tied' else 'lm_head'}.weight_scale"
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, without / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"damaged checkpoint: .* has no weight_scale"):
        probability(without)


@one_collection()
def probability(folder):
    """What a reranker says of a text that vLLM makes of the model's head, which tells two tokens apart."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    config = json.loads((folder / "config.json").read_text())
    tokens = sorted(PreTrainedTokenizerFast.from_pretrained(folder).get_vocab())[-2:]
    changes = {
        "architectures": [config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")],
        "classifier_from_token": tokens,
        "method": "from_2_way_softmax",
    }
    options = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_model_len": 160, "dtype": "float32"}
    try:
        engine = LLM(str(folder), runner="pooling", hf_overrides=changes, **options)
        (made,) = engine.classify([{"prompt_token_ids": [3, 4, 5]}], use_tqdm=False)
        engine.llm_engine.engine_core.shutdown()
        return made.outputs.probs[0]
    finally:
        cleanup_dist_env_and_memory()


def test_scales_are_not_rounded_to_the_models_dtype(tmp_path, tiny_model_folder):
    """fp32 as the fp32 model's are: in bf16 each row, and so each logit of a token, would be off by one factor."""
    _, folder = quantized(llama(), HEAD.replace("TARGETS", BOTH), tmp_path, tiny_model_folder("llama"))
    scale = load_file(folder / "model.safetensors")["model.embed_tokens.weight_scale"]
    assert scale.dtype == torch.float32 and not torch.equal(scale, scale.bfloat16().float())

    def scales(model):
        return model.model.embed_tokens.packed.scale.flatten().tolist()

    assert generate(folder, dtype="bfloat16", inspect=scales)[1][: len(scale)] == scale.flatten().tolist()


def test_activations_of_a_bf16_head_are_quantized_unless_the_variable_says_no(tmp_path, tiny_model_folder, monkeypatch):
    _, folder = quantized(qwen2(), HEAD.replace("TARGETS", BOTH), tmp_path, tiny_model_folder("llama"))

    def inputs(model):
        return {
            module.packed.inputs for module in model.modules() if hasattr(getattr(module, "packed", None), "inputs")
        }

    assert generate(folder, dtype="float32", inspect=inputs)[1] <= {"exact", None}
    served, found = generate(folder, dtype="bfloat16", inspect=inputs)
    assert "lanes" in found and "exact" not in found
    monkeypatch.setenv("CREPE_INT8_HEAD_A8", "0")
    exact, found = generate(folder, dtype="bfloat16", inspect=inputs)
    assert "exact" in found and "lanes" not in found
    for (_, ours), (_, theirs) in zip(served, exact, strict=True):  # a random model's tokens are nearly tied
        both = ours[0].keys() & theirs[0].keys()
        assert both and max(abs(ours[0][token] - theirs[0][token]) for token in both) < 0.05
    monkeypatch.setenv("CREPE_INT8_HEAD_A8", "no")
    with pytest.raises(ValueError, match=r"CREPE_INT8_HEAD_A8=no: 0 .* or 1 is needed"):
        generate(folder, dtype="bfloat16")


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape"])
def test_missing_and_wrong_parts_are_named(part, made, tmp_path):
    _, folder, kind = made
    name = f"{'model.embed_tokens' if kind == 'tied' else 'lm_head'}.{part}"
    for damage in ("missing", "wrong"):
        target = tmp_path / damage
        target.mkdir()
        for file in folder.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        tensor = tensors.pop(name)
        if damage == "wrong":
            tensors[name] = tensor + 1 if part == "weight_shape" else tensor[:-1].contiguous()
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        # transformers makes a report of values that a conversion refuses.
        by_value = damage == "wrong" and part == "weight_shape"
        with pytest.raises((ValueError, RuntimeError), match="conversion" if by_value else name.rpartition(".")[0]):
            AutoModelForCausalLM.from_pretrained(target)
        if part == "weight_scale":
            with pytest.raises(ValueError, match=r"damaged checkpoint: .*weight_scale"):
                generate(target)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape"])
def test_vllm_refuses_parts_of_other_dtypes(part, made, tmp_path):
    _, folder, kind = made
    name = f"{'model.embed_tokens' if kind == 'tied' else 'lm_head'}.{part}"
    target = shutil.copytree(folder, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(torch.uint8)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"damaged checkpoint: .*{part} holds .* as torch.uint8 where"):
        generate(target)


@pytest.mark.parametrize("make", [llama, gemma3])
def test_the_shipped_recipe(make, tmp_path, tiny_model_folder):
    model, folder = quantized(make(), "crepe_2of4_int8_head", tmp_path, tiny_model_folder("llama"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(PROMPT).logits, model(PROMPT).logits)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert {group["format"] for group in config["config_groups"].values()} == {"int-quantized", "pack-quantized"}
    made = generate(folder)
    assert all(len(tokens) for tokens, _ in made)


def test_a_tied_head_alone_is_untied_by_the_toolkit_and_served(tmp_path, tiny_model_folder):
    recipe = HEAD.replace("TARGETS", '["re:.*lm_head$"]')
    _, folder = quantized(llama(), recipe, tmp_path, tiny_model_folder("llama"))
    load_pruned(folder, torch.float32).save_pretrained(tmp_path / "twin")
    assert_same(generate(folder), generate(tmp_path / "twin"))
