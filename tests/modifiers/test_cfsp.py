"""CFSPModifier through llm-compressor's own oneshot: real surgery, checked against masking by independent code."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from crepe_llm.models.ffn import find_ffns
from crepe_llm.modifiers import CFSPModifier, ChannelPermutationModifier, CRePEModifier, WeightCorrectionModifier
from tiny_models import FAMILIES, VOCABULARY

RECIPES = Path(__file__).parents[2] / "recipes"
PARTS = {
    "opt": ("fc1", "fc2"),
    "gpt2": ("c_fc", "c_proj"),
}
BLOCKS = {"opt": "model.decoder.layers", "gpt2": "transformer.h"}


def load(folder, dtype=torch.float64, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)


def dense_model(folder, dtype=torch.float64):
    """The tiny model, its second block made to turn the hidden state more than the first."""
    model = load(folder, dtype)
    block = model.get_decoder().get_submodule("h.1" if "gpt2" in model.config.model_type else "layers.1")
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "norm.weight" in name:
                parameter += 3
            else:
                parameter *= 5
    return model


def prune(model, recipe, data, **kwargs):
    defaults = {"num_calibration_samples": len(data), "shuffle_calibration_samples": False, "batch_size": 4}
    oneshot(model=model, recipe=recipe, dataset=data, **{**defaults, **kwargs})
    return model


def cfsp(**fields):
    return CFSPModifier(**{"sparsity": 0.25, "round_to": 4, **fields})


def logits(model, data):
    ids = torch.tensor(data["input_ids"])
    with torch.no_grad():
        return model(input_ids=ids).logits


def blocks(model, family):
    return list(model.get_submodule(BLOCKS.get(family, "model.layers")))


def matrices(block, family):
    """The modules that write the channels and the one that reads them, and the dimension of the channels in each."""
    owner = block if family == "opt" else block.mlp
    *inputs, output = PARTS.get(family, ("gate_proj", "up_proj", "down_proj"))
    transposed = family == "gpt2"
    return [(getattr(owner, name), int(transposed)) for name in inputs], (getattr(owner, output), int(not transposed))


def measured(model, family, data):
    """fp64: of each block the mean angle over real tokens, and the square sums of its channels; by plain hooks."""
    ids, masks = torch.tensor(data["input_ids"]), torch.tensor(data["attention_mask"])
    seen, handles = [], []
    for block in blocks(model, family):
        entry = {}
        seen.append(entry)

        def of_block(module, args, kwargs, output, entry=entry):
            entry["in"] = args[0] if args else kwargs["hidden_states"]
            entry["out"] = output[0] if isinstance(output, tuple) else output

        def of_output(module, args, entry=entry):
            entry["channels"] = args[0]

        handles.append(block.register_forward_hook(of_block, with_kwargs=True))
        handles.append(matrices(block, family)[1][0].register_forward_pre_hook(of_output))
    angles, squares = [0.0] * len(seen), [0.0] * len(seen)
    tokens = 0
    with torch.no_grad():
        for row, mask in zip(ids, masks, strict=True):
            model(input_ids=row[None], attention_mask=mask[None])
            real = mask.bool()
            tokens += int(real.sum())
            for index, entry in enumerate(seen):
                before, after = entry["in"][0][real].double(), entry["out"][0][real].double()
                cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
                angles[index] += float(torch.arccos(cosine).sum() / math.pi)
                squares[index] = squares[index] + entry["channels"].reshape(len(mask), -1)[real].double().square().sum(
                    0
                )
    for handle in handles:
        handle.remove()
    return [angle / tokens for angle in angles], squares


def masked(model, family, kept):
    """The model with all channels but those kept zeroed where they are read."""
    for block, channels in zip(blocks(model, family), kept, strict=True):
        module, dim = matrices(block, family)[1]
        gone = [j for j in range(module.weight.shape[dim]) if j not in set(channels)]
        with torch.no_grad():
            module.weight.index_fill_(dim, torch.tensor(gone, dtype=torch.int64), 0)
    return model


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_surgery_equals_masking_the_channels_of_least_activation(family, uniform, tiny_model_folder, calibration_data):
    folder = tiny_model_folder(family)
    dense = dense_model(folder)
    width = matrices(blocks(dense, family)[0], family)[1][0].weight.shape[
        matrices(blocks(dense, family)[0], family)[1][1]
    ]
    angles, squares = measured(dense, family, calibration_data)
    pruned = prune(dense_model(folder), cfsp(importance="activation", uniform=uniform), calibration_data)
    sizes = [ffn.width for ffn in find_ffns(pruned)]
    assert sum(sizes) == 0.75 * width * 2
    assert set(sizes) == {int(0.75 * width)} if uniform else sizes[0] != sizes[1]
    assert pruned.config.block_importance == pytest.approx(angles, abs=1e-7)
    if not uniform:
        assert (sizes[0] > sizes[1]) == (angles[0] > angles[1])
    kept = [square.argsort(descending=True)[:size].tolist() for square, size in zip(squares, sizes, strict=True)]
    assert torch.allclose(
        logits(pruned, calibration_data), logits(masked(dense, family, kept), calibration_data), atol=1e-12, rtol=1e-10
    )
    for ffn, size in zip(find_ffns(pruned), sizes, strict=True):
        for module in ffn.inputs:
            assert size in module.weight.shape
            assert getattr(module, "bias", None) is None or module.bias.shape == (size,)


@pytest.mark.parametrize("mode", ["relative", "wanda"])
def test_the_other_importances_keep_what_they_score_highest(mode, tiny_model_folder, calibration_data):
    folder = tiny_model_folder("llama")
    dense = dense_model(folder)
    _, squares = measured(dense, "llama", calibration_data)
    pruned = prune(dense_model(folder), cfsp(importance=mode, uniform=True), calibration_data)
    kept = []
    for block, square in zip(blocks(dense, "llama"), squares, strict=True):
        weighted = block.mlp.down_proj.weight.detach().abs() * square.sqrt()
        scores = weighted.mean(0)
        if mode == "relative":
            scores = (weighted / weighted.sum(1, keepdim=True)).sum(0)
            for matrix in (block.mlp.gate_proj, block.mlp.up_proj):
                size = matrix.weight.detach().abs()
                scores = scores + (size / size.sum(0, keepdim=True)).sum(1)
        kept.append(scores.argsort(descending=True)[:36].tolist())
    expected = logits(masked(dense, "llama", kept), calibration_data)
    assert torch.allclose(logits(pruned, calibration_data), expected, atol=1e-12, rtol=1e-10)


def reload(folder, data, *, stock):
    """The logits of a checkpoint's model in a process of its own; `stock`: one in which this package does nothing."""
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype=torch.float64)\n"
        f"ids = torch.tensor({list(data['input_ids'])!r})\n"
        f"torch.save(model(input_ids=ids).logits.detach(), {str(folder / 'logits.pt')!r})\n"
        "print(type(model).__name__, 'crepe_llm' in sys.modules)\n"
    )
    environment = {**os.environ} | ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} if stock else {})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if done.returncode:
        return done.stderr
    return torch.load(folder / "logits.pt"), done.stdout.split()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_uniform_result_is_an_ordinary_checkpoint(family, tiny_model_folder, calibration_data, tmp_path):
    pruned = prune(
        dense_model(tiny_model_folder(family)), cfsp(uniform=True), calibration_data, output_dir=tmp_path / "out"
    )
    again = load(tmp_path / "out")
    assert type(again) is type(dense_model(tiny_model_folder(family)))
    assert torch.equal(logits(again, calibration_data), logits(pruned, calibration_data))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    field = {"opt": "ffn_dim", "gpt2": "n_inner"}.get(family, "intermediate_size")
    assert config[field] == find_ffns(pruned)[0].width
    assert "block_intermediate_sizes" not in config
    if family == "llama":
        stock, printed = reload(tmp_path / "out", calibration_data, stock=True)
        assert printed == ["LlamaForCausalLM", "False"]
        assert torch.allclose(stock, logits(pruned, calibration_data), atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_different_widths_load_again(family, tiny_model_folder, calibration_data, tmp_path):
    pruned = prune(dense_model(tiny_model_folder(family)), cfsp(), calibration_data, output_dir=tmp_path / "out")
    again = load(tmp_path / "out")
    assert [ffn.width for ffn in find_ffns(again)] == [ffn.width for ffn in find_ffns(pruned)]
    assert type(again) is type(pruned) and type(again).__name__.startswith("PerBlock")
    assert torch.equal(logits(again, calibration_data), logits(pruned, calibration_data))
    again.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(load(tmp_path / "copy"), calibration_data), logits(pruned, calibration_data))


def test_different_widths_load_without_an_import_and_stock_transformers_says_what_to_install(
    tiny_model_folder, calibration_data, tmp_path
):
    pruned = prune(dense_model(tiny_model_folder("llama")), cfsp(), calibration_data, output_dir=tmp_path / "out")
    loaded, printed = reload(tmp_path / "out", calibration_data, stock=False)
    assert printed == ["PerBlockLlamaForCausalLM", "True"]
    assert torch.allclose(loaded, logits(pruned, calibration_data), atol=1e-12)
    error = reload(tmp_path / "out", calibration_data, stock=True)
    assert "has model type `llama (pip install crepe-llm)` but Transformers does not recognize" in error


def test_damaged_widths_are_refused(tiny_model_folder, calibration_data, tmp_path):
    prune(dense_model(tiny_model_folder("llama")), cfsp(), calibration_data, output_dir=tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for widths, match in (
        (None, "must be a list of 2 widths"),
        ([4], "a list of 2"),
        ([4, 0], "from 1 to"),
        ([4, 99], "99"),
    ):
        path.write_text(json.dumps(config | {"block_intermediate_sizes": widths}))
        with pytest.raises(ValueError, match=match):
            load(tmp_path / "out")


# In one recipe with others


def widths_and_zeros(model):
    return [
        (ffn.width, [float((m.weight == 0).double().mean()) for m in (*ffn.inputs, ffn.output)])
        for ffn in find_ffns(model)
    ]


@pytest.mark.parametrize("uniform", [True, False])
def test_crepe_prunes_the_smaller_layers_to_2of4_and_the_checkpoint_loads(
    uniform, tiny_model_folder, calibration_data, tmp_path
):
    first = cfsp(uniform=uniform)
    recipe = [first, CRePEModifier(mask_structure="2:4")]
    both = prune(
        dense_model(tiny_model_folder("qwen2"), torch.float32), recipe, calibration_data, output_dir=tmp_path / "both"
    )
    alone = prune(dense_model(tiny_model_folder("qwen2"), torch.float32), cfsp(uniform=uniform), calibration_data)
    # The second modifier sees the inputs of the smaller model, as if it were given that one.
    after = prune(alone, [CRePEModifier(mask_structure="2:4")], calibration_data)
    assert torch.equal(logits(both, calibration_data), logits(after, calibration_data))
    assert all(set(zeros) == {0.5} for _, zeros in widths_and_zeros(both))
    config = json.loads((tmp_path / "both" / "config.json").read_text())
    assert config["quantization_config"]["sparsity_config"]["format"] == "sparse-24-bitmask"
    again = load(tmp_path / "both", torch.float32)
    assert torch.equal(logits(again, calibration_data), logits(both, calibration_data))


def test_quantization_after_it_scales_the_smaller_layers(tiny_model_folder, calibration_data, tmp_path):
    fields = {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": "W8A8"}
    folder = tiny_model_folder("llama")
    together = prune(dense_model(folder, torch.float32), [cfsp(), QuantizationModifier(**fields)], calibration_data)
    stepwise = prune(dense_model(folder, torch.float32), [cfsp()], calibration_data)
    stepwise = prune(stepwise, [QuantizationModifier(**fields)], calibration_data)
    assert torch.equal(logits(together, calibration_data), logits(stepwise, calibration_data))
    for ffn in find_ffns(together):
        assert all(module.weight_scale.shape == (ffn.width, 1) for module in ffn.inputs)
    together.save_pretrained(tmp_path / "out", save_compressed=True)
    again = load(tmp_path / "out", torch.float32)
    assert type(again).__name__ == "PerBlockLlamaForCausalLM"
    assert torch.allclose(logits(again, calibration_data), logits(together, calibration_data), atol=1e-4)


def test_weight_correction_after_both_corrects_the_smaller_layers(tiny_model_folder, calibration_data):
    correction = WeightCorrectionModifier(method="energy")
    prune(
        dense_model(tiny_model_folder("llama"), torch.float32),
        [cfsp(), CRePEModifier(mask_structure="2:4"), correction],
        calibration_data,
    )
    assert len(correction.errors) == 14


@pytest.mark.parametrize("recipe", ["cfsp_20", "cfsp_20_crepe_2of4"])
def test_the_shipped_recipes_remove_a_fifth(recipe, tiny_model_folder, calibration_data, tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(vocab_size=VOCABULARY, intermediate_size=640, num_hidden_layers=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_folder("llama")).save_pretrained(tmp_path)
    model = prune(load(tmp_path, torch.float32), str(RECIPES / f"{recipe}.yaml"), calibration_data)
    found = widths_and_zeros(model)
    assert sum(width for width, _ in found) == 2 * 512 and all(width % 128 == 0 for width, _ in found)
    assert all(set(zeros) == ({0.5} if "2of4" in recipe else {0.0}) for _, zeros in found)


# Refusals


def test_fields_are_checked(tiny_model_folder, calibration_data):
    for fields, match in (
        ({"sparsity": 1.0}, r"sparsity\n  Input should be less than or equal to 0\.99"),
        ({"sparsity": -0.1}, r"sparsity\n  Input should be greater than or equal to 0"),
        ({"round_to": 0}, r"round_to\n  Input should be greater than or equal to 1"),
        ({"importance": "magnitude"}, "activation"),
    ):
        with pytest.raises(ValueError, match=match):
            cfsp(**fields)
    folder = tiny_model_folder("llama")
    for fields, match in (
        ({"round_to": 128}, "round_to=128 is larger than the FFN of block 0, which has 48 channels"),
        ({"sparsity": 0.9, "round_to": 16, "uniform": True}, "round_to=16 rounds to none"),
        ({"sparsity": 0.9, "round_to": 16}, "round_to=16 rounds to none"),
    ):
        with pytest.raises(ValueError, match=match):
            prune(dense_model(folder), cfsp(**fields), calibration_data)


def test_a_mixture_of_experts_is_refused(tiny_model_folder, calibration_data):
    with pytest.raises(ValueError, match=r"model\.layers\.0 is a Mixture of Experts \(MixtralDecoderLayer\)"):
        prune(dense_model(tiny_model_folder("mixtral")), cfsp(), calibration_data)


def test_a_width_that_the_config_does_not_tell_is_refused(tiny_model_folder, calibration_data):
    model = dense_model(tiny_model_folder("llama"))
    model.config.intermediate_size = 96
    with pytest.raises(ValueError, match=r"intermediate_size=96 .* is not the width of the model's FFNs, which is 48"):
        prune(model, cfsp(uniform=True), calibration_data)


def test_unknown_ffns_are_refused(tiny_model_folder, calibration_data):
    model = dense_model(tiny_model_folder("llama"))
    mlp = model.model.layers[1].mlp
    mlp.write = mlp.gate_proj
    del mlp.gate_proj, mlp.up_proj
    with pytest.raises(
        ValueError, match=r"the FFN of model\.layers\.1 .* unknown shape: .*mlp\.write.*known are gate_proj"
    ):
        find_ffns(model)
    model = dense_model(tiny_model_folder("llama"))
    model.model.layers[0].mlp.norm = torch.nn.LayerNorm(48)
    with pytest.raises(ValueError, match=r"mlp .* its norm\.weight \[48\] is made for the 48 channels, too"):
        find_ffns(model)
    model = dense_model(tiny_model_folder("llama"))
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 40)
    with pytest.raises(
        ValueError, match=r"mlp has an unknown shape: matrices of \[\(48, 32\), \(40, 32\), \(32, 48\)\]"
    ):
        find_ffns(model)


def test_order_and_pipeline_are_checked(tiny_model_folder, calibration_data):
    folder = tiny_model_folder("llama")
    crepe = CRePEModifier(mask_structure="2:4")
    with pytest.raises(ValueError, match=r"has CRePEModifier before it .* cut through .* Put CFSPModifier first"):
        prune(dense_model(folder), [crepe, cfsp()], calibration_data)
    for before, message in (
        (ChannelPermutationModifier(), "has ChannelPermutationModifier before it .* Put CFSPModifier first"),
        (None, r'round_to=2 keeps widths that CRePEModifier cannot cut into groups of 4 .*"2:4": give a multiple of 4'),
    ):
        recipe = [*([before] if before else []), cfsp(round_to=2), CRePEModifier(mask_structure="2:4")]
        with pytest.raises(ValueError, match=message):
            prune(dense_model(folder), recipe, calibration_data)
    others = CRePEModifier(mask_structure="2:4", ignore=["re:.*down_proj", "lm_head"])
    prune(dense_model(folder), [cfsp(round_to=2), others], calibration_data)  # no width that it cuts is pruned
    with pytest.raises(ValueError, match="must have cut the FFNs before CRePEModifier works on them"):
        prune(
            dense_model(folder), [cfsp(), CRePEModifier(mask_structure="2:4")], calibration_data, pipeline="sequential"
        )
    with pytest.raises(ValueError, match="CFSPModifier needs calibration data"):
        oneshot(model=dense_model(folder), recipe=[cfsp()])


def test_nan_is_refused(tiny_model_folder, calibration_data):
    model = dense_model(tiny_model_folder("llama"), torch.float32)
    model.model.layers[0].mlp.up_proj.weight.data[3] = torch.inf
    with pytest.raises(ValueError, match=r"activations of model\.layers\.0\.mlp are NaN or infinite"):
        prune(model, cfsp(), calibration_data)
