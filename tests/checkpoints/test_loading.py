"""Loading by transformers: bit-identical weights, and no change for anybody else's checkpoints."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from compressed_tensors.offload import disable_onloading
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from crepe_llm.checkpoints import attach, compress_folder, decompress_folder, read_folder
from crepe_llm.checkpoints.converting import pack_folder
from crepe_llm.checkpoints.loading import Sparse24HfQuantizer
from crepe_llm.functional.bitmask import pack_bits
from crepe_llm.pruning.layer import mask_of
from sparse_models import linears, prune_2of4

IDS = torch.arange(3, 35)[None]


@pytest.fixture(scope="module")
def checkpoints(tiny_model_folder, tmp_path_factory):
    """A function: (family, scheme or None) -> folders of the packed checkpoint and of the same with plain weights."""
    made = {}

    def make(family, scheme=None):
        if (family, scheme) not in made:
            root = tmp_path_factory.mktemp(f"{family}-{scheme}")
            model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(family), dtype=torch.bfloat16)
            prune_2of4(model)
            reset_session()
            if scheme:
                oneshot(model=model, recipe=[QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])])
            attach(model)
            model.save_pretrained(root / "sparse", max_shard_size="20KB")
            decompress_folder(root / "sparse", root / "plain")
            made[family, scheme] = root / "sparse", root / "plain"
        return made[family, scheme]

    return make


def assert_same(model, reference):
    state, expected = model.state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    for name in state:
        assert state[name].dtype == expected[name].dtype
        assert torch.equal(state[name], expected[name]), name
    assert torch.equal(model(IDS).logits, reference(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "opt"])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}, {"device_map": "cpu"}, {"device_map": "auto"}])
def test_sparse_only(checkpoints, family, options):
    sparse, plain = checkpoints(family)
    assert len(read_folder(sparse).layers) == 14 - 2 * (family == "opt")
    model = AutoModelForCausalLM.from_pretrained(sparse, **options)
    assert_same(model, AutoModelForCausalLM.from_pretrained(plain, **options))
    assert model.dtype == options.get("dtype", torch.bfloat16)
    # It is an ordinary model: not quantized, and saved as one.
    assert not hasattr(model.config, "quantization_config") and getattr(model, "hf_quantizer", None) is None


def test_a_loaded_model_saves_as_an_ordinary_one(checkpoints, tmp_path):
    sparse, plain = checkpoints("llama")
    AutoModelForCausalLM.from_pretrained(sparse).save_pretrained(tmp_path / "again")
    assert not read_folder(tmp_path / "again").layers
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), AutoModelForCausalLM.from_pretrained(plain))
    compress_folder(tmp_path / "again", tmp_path / "packed")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), AutoModelForCausalLM.from_pretrained(plain))


def test_disk_offload(checkpoints, tmp_path):
    sparse, plain = checkpoints("llama")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(sparse, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(model(IDS).logits, AutoModelForCausalLM.from_pretrained(plain)(IDS).logits)


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8"])
@pytest.mark.parametrize("dequantize", [False, True])
def test_sparse_and_quantized_load_as_the_plain_checkpoint_does(checkpoints, scheme, dequantize):
    sparse, plain = checkpoints("llama", scheme)
    assert len(read_folder(sparse).layers) == 14
    stored = {layer.dtype for layer in read_folder(sparse).layers.values()}
    assert stored == {torch.int8 if scheme == "W8A8" else torch.float8_e4m3fn}
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model, reference = (AutoModelForCausalLM.from_pretrained(folder, **options) for folder in (sparse, plain))
    with disable_onloading():
        weights = {module.weight.dtype for module in linears(model).values()}
    assert weights == ({torch.bfloat16} if dequantize else stored)
    assert_same(model, reference)
    generated = [m.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=2) for m in (model, reference)]
    assert torch.equal(*generated)


def test_the_quantizer_is_in_place_once(checkpoints):
    from crepe_llm.checkpoints.loading import register

    register()
    assert AUTO_QUANTIZER_MAPPING["compressed-tensors"] is Sparse24HfQuantizer
    assert Sparse24HfQuantizer.__mro__[1].__module__.startswith("transformers.")


# What llm-compressor 0.1 to 0.6 wrote beside plain weights.
DENSE_RECORD = {
    "format": "dense",
    "global_sparsity": 0.14,
    "ignore": [],
    "registry_requires_subclass": False,
    "sparsity_structure": "2:4",
    "targets": ["Linear"],
}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"config_groups": {}, "ignore": [], "format": "dense", "quantization_status": "compressed"},
        {"config_groups": None, "kv_cache_scheme": None, "ignore": None, "global_compression_ratio": None},
        {"sparsity_config": DENSE_RECORD | {"sparsity_structure": "unstructured", "targets": []}},
        {"sparsity_config": {"format": "dense"}},
        {"sparsity_config": {}},
        {"sparsity_config": None},
    ],
)
def test_plain_weights_with_a_record_of_their_sparsity_load(checkpoints, tmp_path, extra):
    _, plain = checkpoints("llama")
    folder = shutil.copytree(plain, tmp_path / "dense")
    content = json.loads((folder / "config.json").read_text())
    content.pop("sparsity_config")
    content["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "version": "0.6.0",
        "sparsity_config": DENSE_RECORD,
    } | extra
    (folder / "config.json").write_text(json.dumps(content))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert_same(model, AutoModelForCausalLM.from_pretrained(plain))
    assert not hasattr(model.config, "quantization_config") and getattr(model, "hf_quantizer", None) is None
    compress_folder(folder, tmp_path / "packed")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), model)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "FP8_DYNAMIC"])
def test_quantized_weights_with_a_record_of_their_sparsity_load(tmp_path, scheme):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prune_2of4(model)
    reset_session()
    oneshot(model=model, recipe=[QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])])
    attach(model)
    model.save_pretrained(tmp_path / "plain", save_compressed=True)
    if read_folder(tmp_path / "plain").layers:
        (tmp_path / "plain").rename(tmp_path / "packed")
        decompress_folder(tmp_path / "packed", tmp_path / "plain")
    folder = shutil.copytree(tmp_path / "plain", tmp_path / "dense")
    content = json.loads((folder / "config.json").read_text())
    content.pop("sparsity_config", None)
    content["quantization_config"]["sparsity_config"] = DENSE_RECORD
    (folder / "config.json").write_text(json.dumps(content))
    assert_same(AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))


INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", ["int4", "int8, unpacked", "int8, not 2:4", "dense"])
def test_an_int8_embedding_beside_layers_that_are_not_packed(tmp_path, layers, tied):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=96, **sizes, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    if "not 2:4" not in layers and layers != "dense":
        prune_2of4(model)
    groups = {"head": {"targets": ["re:.*(lm_head|embed_tokens)$"], "weights": INT8}}
    if layers != "dense":
        groups["layers"] = {"targets": ["Linear"], "weights": INT4 if layers == "int4" else INT8}
    reset_session()
    oneshot(model=model, recipe=[QuantizationModifier(config_groups=groups)])
    attach(model)
    model.save_pretrained(tmp_path / "saved")
    folder = tmp_path / "saved"
    if read_folder(folder).layers:
        decompress_folder(folder, tmp_path / "unpacked")
        folder = tmp_path / "unpacked"
    assert not read_folder(folder).layers and "model.embed_tokens.weight_packed" in read_folder(folder).tensors
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(IDS).logits, loaded(IDS).logits)


def test_a_head_that_is_quantized_alone_stays_so(tmp_path):
    """transformers multiplies with the codes of a linear layer, so that nothing needs expanding."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=96, **sizes)).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    reset_session()
    groups = {"head": {"targets": ["re:.*lm_head$"], "weights": INT4}}
    oneshot(model=model, recipe=[QuantizationModifier(config_groups=groups)])
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.lm_head.weight_packed.dtype == torch.int32
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


REPORT = """
    import hashlib, sys
    import torch, transformers
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert ("crepe_llm" in sys.modules) == (sys.argv[2] == "with"), "autoloading is not what this run is about"
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    logits = model(torch.arange(3, 35)[None]).logits
    digest.update(logits.contiguous().view(torch.uint8).detach().numpy().tobytes())
    classes = sorted({type(module).__name__ for module in model.modules()})
    print(digest.hexdigest(), classes, model.config.to_dict().get("quantization_config"))
"""


def report(folder, crepe):
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "1" if crepe == "with" else "0"}
    command = [sys.executable, "-c", textwrap.dedent(REPORT), str(folder), crepe]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_packed_checkpoints_load_without_any_import_of_ours(checkpoints):
    sparse, plain = checkpoints("llama")
    assert report(sparse, "with") == report(plain, "without")


def test_other_checkpoints_load_as_without_us(checkpoints):
    _, plain = checkpoints("llama", "W8A8")
    assert report(plain, "with") == report(plain, "without")


def test_kept_weights_that_are_zero_are_known_as_kept(tiny_model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"))
    masks = prune_2of4(model)
    for name, module in linears(model).items():
        row, column = masks[name].nonzero()[7].tolist()
        with torch.no_grad():
            module.weight[row, column] = 0
    model.save_pretrained(tmp_path / "packed")
    pack_folder(tmp_path / "packed", {name: pack_bits(mask) for name, mask in masks.items()})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for name, module in linears(loaded).items():
        assert torch.equal(mask_of(module), masks[name]) and not torch.equal(module.weight != 0, masks[name]), name
