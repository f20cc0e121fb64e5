"""SparsityAllocationModifier through llm-compressor's own oneshot, against numbers computed from captured inputs."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from crepe_llm.functional.allocation import tail_exponent
from crepe_llm.modifiers import (
    CFSPModifier,
    CRePEModifier,
    PHOSearchModifier,
    SparsityAllocationModifier,
    WeightCorrectionModifier,
)
from modifier_helpers import OFFLOADED, inputs_of, linears, load, matrix, refused, run
from tiny_models import FAMILIES

RECIPES = Path(__file__).parents[2] / "recipes"
METHODS = ["owl", "alphapruning", "dlp", "atp", "uniform"]


def allocation(method="owl", sparsity=0.7, **fields):
    return SparsityAllocationModifier(method=method, sparsity=sparsity, **fields)


def crepe(**fields):
    return CRePEModifier(**{"comparison_group": "matrix", **fields})


def wanda(**fields):
    return WandaPruningModifier(**{"sparsity": None, "targets": ["Linear"], "ignore": ["re:.*lm_head"], **fields})


@pytest.fixture(scope="module")
def llama_of(tiny_model_folder, tmp_path_factory):
    """A function: number of blocks -> folder of a tiny Llama whose blocks have weights of different distributions."""
    folders = {}

    def make(blocks):
        if blocks not in folders:
            folders[blocks] = folder = tmp_path_factory.mktemp("deep")
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=blocks, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
            )  # fmt: skip
            model = LlamaForCausalLM(config)
            for block, layer in enumerate(model.model.layers):
                for module in linears(layer).values():
                    module.weight.data *= torch.rand(module.weight.shape).pow(block % 4) * (1 + 0.1 * block)
            model.save_pretrained(folder)
            PreTrainedTokenizerFast.from_pretrained(tiny_model_folder("llama")).save_pretrained(folder)
        return folders[blocks]

    return make


@pytest.fixture
def deep_folder(llama_of):
    return llama_of(4)


def block_of(name):
    parts = name.split(".")
    return ".".join(parts[: next(place for place, part in enumerate(parts) if part.isdecimal()) + 1])


def by_block(model):
    """The layers of each block: block's name to the layers' names and modules."""
    blocks = {}
    for name, module in linears(model).items():
        blocks.setdefault(block_of(name), {})[name] = module
    return blocks


def realised(model):
    """Fraction of zeros of each block, and of all blocks."""
    zeros = {
        block: (
            sum(int((m.weight == 0).sum()) for m in layers.values()),
            sum(m.weight.numel() for m in layers.values()),
        )
        for block, layers in by_block(model).items()
    }
    total = [sum(numbers) for numbers in zip(*zeros.values(), strict=True)]
    return {block: zero / size for block, (zero, size) in zeros.items()}, total[0] / total[1]


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_pruned_to_the_target_and_blocks_as_found(method, deep_folder, calibration_data, tmp_path):
    modifier = allocation(method)
    run(load(deep_folder), [modifier, crepe()], calibration_data, output_dir=str(tmp_path / "out"))
    blocks, everything = realised(load(tmp_path / "out"))
    # Each of the seven matrices of a block has less than one weight too few pruned.
    assert everything == pytest.approx(0.7, abs=7 / 7680) and everything <= 0.7
    assert blocks.keys() == modifier.chosen.keys()
    for block, fraction in blocks.items():
        assert fraction == pytest.approx(modifier.chosen[block], abs=7 / 7680), block
    assert (len(set(modifier.chosen.values())) == 1) == (method == "uniform")


def wanda_scores_of_blocks(folder, data):
    """fp64 scores of each block of the dense model, all layers together, from captured inputs."""
    model = load(folder)
    norms = {name: inputs.square().sum(0).sqrt() for name, inputs in inputs_of(model, data).items()}
    return {
        block: torch.cat([(matrix(module).double().abs() * norms[name]).flatten() for name, module in layers.items()])
        for block, layers in by_block(model).items()
    }


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [(family, {"method": "dlp", "statistic": "mean"}, lambda a: float(a.mean())) for family in FAMILIES]
    + [
        ("llama", {"method": "dlp"}, lambda a: float(a.sort().values[(len(a) - 1) // 2])),
        ("llama", {"method": "owl", "threshold": 2.0}, lambda a: 100 * float((a > 2 * a.mean()).double().mean())),
    ],
)
def test_blocks_are_measured_as_computed_independently(family, fields, expected, tiny_model_folder, calibration_data):
    folder, modifier = tiny_model_folder(family), allocation(**fields)
    scores = wanda_scores_of_blocks(folder, calibration_data)
    run(load(folder), [modifier, crepe()], calibration_data)
    assert list(modifier.measures) == list(scores)
    for block, a in scores.items():
        # Rounding may put a score on the other side of OWL's threshold.
        rounding = 100 * 2 / len(a) if "threshold" in fields else 0
        assert modifier.measures[block] == pytest.approx(expected(a), rel=1e-5, abs=rounding), block


def test_owl_and_dlp_allocate_by_the_papers_formulas(deep_folder, calibration_data):
    scores = wanda_scores_of_blocks(deep_folder, calibration_data)
    outliers = torch.tensor([100 * (a > 5 * a.mean()).double().mean() for a in scores.values()])
    medians = torch.stack([a.median() for a in scores.values()])
    importance = 1 - medians / medians.sum()
    for fields, worth, half in (
        ({"method": "owl"}, outliers, 0.08),
        ({"method": "owl", "spread": 0.02}, outliers, 0.02),
        ({"method": "dlp"}, importance, 0.15),
    ):
        density = (worth - worth.min()) / (worth.max() - worth.min()) * 2 * half
        density = density - density.mean() + 0.3
        modifier = allocation(**fields)
        run(load(deep_folder), [modifier, crepe()], calibration_data)
        assert list(modifier.chosen.values()) == pytest.approx((1 - density).tolist(), abs=1e-4)


@pytest.mark.parametrize("tail", ["peak", "middle"])
def test_alphapruning_needs_no_data(tail, deep_folder, calibration_data, messages):
    modifier = allocation("alphapruning", tail=tail)
    run(load(deep_folder), [modifier, crepe()], calibration_data)
    for block, layers in by_block(load(deep_folder)).items():
        exponents = [tail_exponent(layer.weight, tail) for layer in layers.values()]
        assert modifier.measures[block] == pytest.approx(sum(exponents) / len(exponents), rel=1e-4)
    (inferred,) = [line for line in messages if "for `SparsityAllocationModifier`" in line]
    assert "DataFreePipeline" in inferred
    order = sorted(modifier.chosen, key=modifier.chosen.get)
    assert order == sorted(modifier.measures, key=modifier.measures.get)


@pytest.mark.parametrize("fields", [{"slope": 0.02}, {"spread": 0.1}])
def test_masks_per_row_follow_the_blocks_sparsity(fields, llama_of, calibration_data):
    """Eleven blocks, as layers.1 and layers.10 are names that begin alike."""
    modifier = allocation("atp", **fields)
    model = run(load(llama_of(11)), [modifier, crepe(comparison_group="row")], calibration_data)
    for place, (block, layers) in enumerate(by_block(model).items()):
        assert modifier.chosen[block] == pytest.approx(0.7 + 0.02 * (place - 5))
        for name, module in layers.items():
            zeros = (module.weight == 0).sum(1)
            assert set(zeros.tolist()) == {int(module.weight.shape[1] * modifier.chosen[block] + 1e-6)}, name


def test_bounds_cut_off_and_the_target_stays(deep_folder, calibration_data):
    modifier = allocation("atp", slope=0.1, low=0.6, high=0.75)
    run(load(deep_folder), [modifier, crepe()], calibration_data)
    found = list(modifier.chosen.values())
    assert min(found) == 0.6 and max(found) == 0.75
    assert sum(found) / 4 == pytest.approx(0.7, abs=1e-9)


@pytest.mark.parametrize("method", ["owl", "alphapruning", "atp"])
def test_target_zero_changes_nothing(method, tiny_model_folder, calibration_data):
    folder = tiny_model_folder("gpt2")
    model = run(load(folder), [allocation(method, 0.0), crepe()], calibration_data)
    for one, other in zip(model.parameters(), load(folder).parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("method", "structure", "sparsity"), [("owl", "4:8", 0.57), ("uniform", "3:4", 0.7)])
def test_mixed_n_of_m(method, structure, sparsity, deep_folder, calibration_data, tmp_path, messages):
    group = int(structure[-1])
    modifier, pruning = allocation(method, sparsity), CRePEModifier(mask_structure=structure)
    model = run(load(deep_folder), [modifier, pruning], calibration_data, output_dir=str(tmp_path / "out"))
    for block, layers in by_block(model).items():
        n, m = map(int, modifier.chosen[block].split(":"))
        assert m == group
        for name, module in layers.items():
            assert bool(((module.weight.view(-1, m) == 0).sum(1) == n).all()), name
    _, everything = realised(model)
    assert abs(everything - sparsity) <= 0.5 / 4 / group + 1e-9
    (table,) = [line for line in messages if "Sparsity of 4 blocks" in line]
    assert f"{everything:.4%} of all weights for a target of {sparsity:.4%}" in table
    again = run(load(deep_folder), str(tmp_path / "out" / "recipe.yaml"), calibration_data)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("pruning", [WandaPruningModifier, SparseGPTModifier])
@pytest.mark.parametrize("targets", [["Linear"], ["LlamaDecoderLayer"]])
def test_the_toolkits_own_modifiers(pruning, targets, tiny_model_folder, calibration_data, tmp_path):
    modifier = allocation("owl", 0.6, spread=0.2)
    pruner = pruning(sparsity=None, targets=targets, ignore=["re:.*lm_head"])
    model = run(
        load(tiny_model_folder("llama")), [modifier, pruner], calibration_data, output_dir=str(tmp_path / "out")
    )
    assert max(modifier.chosen.values()) - min(modifier.chosen.values()) == pytest.approx(0.4)
    for block, layers in by_block(model).items():
        for name, module in layers.items():
            # Wanda rounds down in each row; SparseGPT prunes up to a threshold among the weights, that one included.
            fraction = (module.weight == 0).double().mean().item()
            assert modifier.chosen[block] - 1 / 32 <= fraction <= modifier.chosen[block] + 1 / module.weight.numel(), (
                name
            )
    again = run(load(tiny_model_folder("llama")), str(tmp_path / "out" / "recipe.yaml"), calibration_data)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["dlp", "alphapruning"])
def test_the_saved_recipe_prunes_the_same_without_measuring(
    method, tiny_model_folder, calibration_data, tmp_path, monkeypatch, messages
):
    modifier = allocation(method)
    recipe = [modifier, crepe(), WeightCorrectionModifier(method="pcg", iterations=2)]
    first = run(load(tiny_model_folder("llama")), recipe, calibration_data, output_dir=str(tmp_path / "out"))
    (stage,) = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text()).values()
    (saved,) = stage.values()
    assert saved["SparsityAllocationModifier"]["found"] == modifier.chosen
    assert sorted(saved["CRePEModifier"]["sparsity"].values()) == sorted(modifier.chosen.values())
    for name in ("typical_score", "tail_exponent"):
        monkeypatch.setattr(f"crepe_llm.functional.allocation.{name}", None)
    messages.clear()
    second = run(load(tiny_model_folder("llama")), str(tmp_path / "out" / "recipe.yaml"), calibration_data)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert any("Inferred `DataFreePipeline` for `SparsityAllocationModifier`" in line for line in messages)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        *((family, "crepe_owl_70") for family in FAMILIES),
        ("llama", "crepe_atp_admm_70"),
        ("llama", "crepe_atp_admm_80"),
        ("gpt2", "crepe_atp_admm_80"),
    ],
)
def test_shipped_recipes(family, recipe, tiny_model_folder, calibration_data, tmp_path):
    folder = tiny_model_folder(family)
    model = run(load(folder), str(RECIPES / f"{recipe}.yaml"), calibration_data, output_dir=str(tmp_path / "out"))
    (stage,) = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text()).values()
    ((_, modifiers),) = stage.items()
    found = modifiers["SparsityAllocationModifier"]["found"]
    assert len(set(found.values())) == 2
    sizes = {block: sum(layer.weight.numel() for layer in layers.values()) for block, layers in by_block(model).items()}
    mean = sum(found[block] * size for block, size in sizes.items()) / sum(sizes.values())
    assert mean == pytest.approx(0.7 if "70" in recipe else 0.8, abs=1e-9)
    by_row = modifiers["CRePEModifier"]["comparison_group"] == "row"
    for name, module in linears(model).items():
        groups = matrix(module) if by_row else matrix(module).reshape(1, -1)
        wanted = int(groups.shape[1] * found[block_of(name)] + 1e-6)
        assert set((groups == 0).sum(1).tolist()) == {wanted}, name


@pytest.mark.parametrize("method", ["owl", "alphapruning"])
def test_offloaded_weights(method, tiny_model_folder, calibration_data, tmp_path):
    folder = tiny_model_folder("qwen2")
    offloaded = load(folder, device_map=OFFLOADED, offload_folder=tmp_path / "offload")
    first, second = allocation(method), allocation(method)
    run(offloaded, [first, crepe()], calibration_data, output_dir=str(tmp_path / "out"))
    run(load(folder), [second, crepe()], calibration_data)
    assert first.measures == second.measures and first.chosen == second.chosen


def test_16_bit_models(tiny_model_folder, calibration_data):
    for method in ("owl", "alphapruning"):
        model = run(load(tiny_model_folder("llama"), torch.bfloat16), [allocation(method), crepe()], calibration_data)
        assert realised(model)[1] == pytest.approx(0.7, abs=1e-3)


def test_experts_that_saw_no_token_are_left_out_of_the_scores(tiny_model_folder, calibration_data):
    from llmcompressor.modeling.moe.linearize import linearize_moe

    model = load(tiny_model_folder("mixtral"))
    linearize_moe(model)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[2] = 0
        layer.mlp.gate.weight.data[:2] = torch.stack([torch.ones(32), -torch.ones(32)]) * 10
    modifier = allocation("dlp", statistic="mean")
    recipe = [modifier, crepe(uncalibrated="dense")]
    run(model, recipe, calibration_data, moe_calibrate_all_experts=False)
    assert len(modifier.measures) == 2 and all(value > 0 for value in modifier.measures.values())
    experts = [module for name, module in linears(model).items() if ".experts." in name]
    assert 0 < sum(bool((expert.weight != 0).all()) for expert in experts) < len(experts)


def test_a_search_between_allocation_and_pruning_is_for_the_target(tiny_model_folder, calibration_data, tmp_path):
    pho = PHOSearchModifier(candidates=5, rows=8, layers_per_kind=1, record=str(tmp_path / "study.json"))
    modifier, pruning = allocation(), crepe()
    model = run(load(tiny_model_folder("llama")), [modifier, pho, pruning], calibration_data)
    assert pho.result.mask.sparsity == 0.7
    assert pruning.value("row") == pho.chosen["row"]
    assert realised(model)[1] == pytest.approx(0.7, abs=1e-3)


def test_data_free_methods_work_in_a_shared_epoch(tiny_model_folder, calibration_data):
    folder = tiny_model_folder("llama")
    first, second = (
        run(load(folder), [allocation("atp"), crepe()], calibration_data, pipeline=pipeline)
        for pipeline in ("sequential", "independent")
    )
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["atp", "owl"])
def test_blocks_are_weighed_as_cfsp_has_cut_them(method, llama_of, calibration_data):
    cut = CFSPModifier(sparsity=0.5, round_to=4)
    model = run(load(llama_of(2)), [cut, allocation(method, 0.6, spread=0.3), crepe()], calibration_data)
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert widths[0] != widths[1]
    assert realised(model)[1] == pytest.approx(0.6, abs=0.02)


def test_the_plot_and_the_table(tiny_model_folder, calibration_data, tmp_path, messages):
    modifier = allocation(plot=str(tmp_path / "plot.png"))
    run(load(tiny_model_folder("gpt2")), [modifier, crepe()], calibration_data)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (table,) = [line for line in messages if "Sparsity of 2 blocks by owl" in line]
    for block, sparsity in modifier.chosen.items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"{block} ")]
        assert f"{sparsity:.2%}" in line and f"{modifier.measures[block]:.6g}" in line


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (lambda: [crepe(sparsity=0.7), allocation()], "has CRePEModifier before it.*has pruned by then. Put it before"),
        (lambda: [wanda(sparsity=0.7), allocation(), crepe()], "has WandaPruningModifier before it"),
        (lambda: [allocation(), allocation("dlp"), crepe()], "two SparsityAllocationModifiers.*Keep one"),
        (lambda: [allocation()], "needs one modifier that prunes after it in the recipe, and has none"),
        (
            lambda: [allocation(), crepe(), wanda()],
            "needs one modifier that prunes after it in the recipe, and has CRePEModifier, Wanda",
        ),
        (lambda: [allocation(), crepe(sparsity=0.6)], r"sparsity=0\.7 .* sparsity=0\.6: leave it out there"),
        (lambda: [allocation(), crepe(sparsity={"re:.*": 0.7})], "leave it out there"),
        (lambda: [allocation(), CRePEModifier(mask_structure="2:4")], "2:4.*the hardware that runs it wants two of"),
        (lambda: [allocation(), CRePEModifier(mask_structure="4:8")], 'far from sparsity=0.7.*write "6:8"'),
        (lambda: [allocation(), CRePEModifier(mask_structure={"re:.*": "4:8"})], 'one structure, such as "4:8"'),
        (
            lambda: [allocation(sparsity=0.5), wanda(mask_structure="4:8")],
            "prunes all layers by one mask_structure",
        ),
        (
            lambda: [allocation(), wanda(sparsity=0.7, sparsity_profile="owl", owl_m=5, owl_lmbda=0.1)],
            "has a sparsity_profile",
        ),
        (
            lambda: [allocation(targets=["re:.*mlp.*"]), crepe()],
            "contradicts the CRePEModifier's targets",
        ),
        (lambda: [allocation(), crepe(targets=["Nothing"])], "targets=\\['Nothing'\\] .* matches no layer"),
        (lambda: [allocation(), wanda(targets="Linear")], "targets=Linear .* matches no layer"),
        (lambda: [allocation("atp"), wanda(targets=["LlamaModel"])], "match a module with 2 decoder layers"),
        (lambda: [allocation("atp", slope=0.7), crepe()], r"slope of 0\.7 takes 2 blocks.*use at most 0\.6"),
        (lambda: [allocation("atp", spread=0.4), crepe()], r"spread=0\.4 takes blocks of mean .* use at most 0\.3"),
        (
            lambda: [
                PHOSearchModifier(tokens=1000),
                allocation("atp", slope=0.7),
                crepe(),
            ],
            r"slope of 0\.7 takes 2 blocks.*use at most 0\.6",
        ),
        (
            lambda: [allocation(sparsity=0.1), CRePEModifier(mask_structure="1:8")],
            r"gives each block from 0\.125 to 0\.875, and sparsity=0\.1 is not between",
        ),
        (
            lambda: [PHOSearchModifier(sparsity=0.5), allocation(), crepe()],
            r"sparsity=0\.5 contradicts the SparsityAllocationModifier's sparsity=0\.7: leave it out",
        ),
        (
            lambda: [allocation("atp"), CFSPModifier(sparsity=0.2, round_to=4), crepe()],
            "CFSPModifier has SparsityAllocationModifier before it.*Put CFSPModifier first",
        ),
        (lambda: [allocation(found={"model.layers.0": 0.7}), crepe()], "remove `found` to allocate anew"),
        (
            lambda: [
                allocation(found={"model.layers.0": 0.7, "model.layers.1": 0.7}),
                CRePEModifier(mask_structure="6:8"),
            ],
            'found=0.7 for model.layers.0 .* mask_structure="6:8".*remove `found`',
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_pruned(recipe, message, tiny_model_folder, calibration_data):
    refused(load(tiny_model_folder("llama")), recipe(), calibration_data, message)


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_a_method_that_looks_at_data_needs_an_epoch(pipeline, tiny_model_folder, calibration_data):
    message = 'method: dlp must have seen the whole dense model.*pipeline="independent"'
    refused(
        load(tiny_model_folder("llama")), [allocation("dlp"), crepe()], calibration_data, message, pipeline=pipeline
    )


@pytest.mark.parametrize(
    "pruning", [lambda: crepe(ignore=[]), lambda: wanda(ignore=[]), lambda: wanda(ignore=["lm_head"])]
)
def test_layers_outside_of_all_blocks_are_refused(pruning, tiny_model_folder, calibration_data):
    """llm-compressor's own modifiers prune lm_head where it is ignored by its exact name."""
    message = "lm_head is in none of the 2 decoder layers of Qwen2ForCausalLM.*add it to `ignore`"
    refused(load(tiny_model_folder("qwen2")), [allocation("atp"), pruning()], calibration_data, message)


def test_damaged_weights_are_refused_by_layer(tiny_model_folder, calibration_data):
    model = load(tiny_model_folder("llama"))
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"weight of model\.layers\.1\.mlp\.down_proj contains NaN"):
        run(model, [allocation("alphapruning"), crepe()], calibration_data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "magic"}, "method"),
        ({"method": "dlp", "threshold": 5.0}, r"threshold=5\.0 is for owl, and method: dlp has no use for it: drop it"),
        (
            {"method": "uniform", "spread": 0.1},
            "spread=0.1 is for owl and alphapruning and dlp and atp, and method: uni",
        ),
        ({"method": "atp", "spread": 0.1, "slope": 0.01}, r"slope=0\.01 and spread=0\.1 say the same in two ways"),
        ({"method": "owl", "slope": 0.1}, "slope=0.1 is for atp"),
        ({"method": "owl", "statistic": "mean"}, "statistic=mean is for dlp"),
        ({"method": "uniform", "tail": "peak"}, "tail=peak is for alphapruning"),
        ({"method": "dlp", "statistic": "mode"}, "statistic"),
        ({"spread": -0.1}, r"spread\.\S+\n  Input should be greater than or equal to 0"),
        ({"method": "atp", "spread": "steep"}, r"spread\.\S+\n  Input should be 'measured'"),
        ({"threshold": float("nan")}, r"threshold\n  Input should be a finite number"),
        ({"sparsity": 1.2}, r"sparsity\n  Input should be less than 1"),
        ({"sparsity": 0.995}, r"sparsity=0\.995 and high=0\.99 must ascend"),
        ({"low": 0.8}, r"low=0\.8, sparsity=0\.7"),
        ({"low": -0.1}, r"low\n  Input should be greater than or equal to 0"),
        ({"high": 1.0}, r"high\n  Input should be less than 1"),
        ({"found": {"model.layers.0": 1.5}}, r"found=1\.5 for model\.layers\.0"),
        ({"found": {"model.layers.0": "8:4"}}, 'mask_structure="8:4"'),
        ({"lambda": 0.1}, "lambda"),
    ],
)
def test_bad_fields_are_refused_with_the_field_and_the_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        allocation(**fields)


@pytest.fixture(scope="module")
def data_of_windows():
    """Thirty-two windows of 32 tokens."""
    ids = torch.randint(3, 95, (32, 32), generator=torch.Generator().manual_seed(1))
    return Dataset.from_dict({"input_ids": ids.tolist()})


def divergence(model, folder, data):
    """How far the pruned model's predictions are from the dense one's, in nats a token."""
    ids = torch.tensor(data["input_ids"])
    with torch.no_grad():
        dense, pruned = (torch.log_softmax(each(ids).logits, -1) for each in (load(folder), model))
    return float((dense.exp() * (dense - pruned)).sum(-1).mean())


@pytest.mark.parametrize("more", [[], [WeightCorrectionModifier(method="pcg")]], ids=["alone", "pcg"])
def test_a_measured_spread_is_one_that_is_better(more, llama_of, data_of_windows, tmp_path, messages):
    """In this model the first blocks matter most: their outputs are all that the others add little to."""
    folder = llama_of(4)
    model = load(folder)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            for name in ("o_proj", "down_proj"):
                for module_name, module in linears(layer).items():
                    if module_name.endswith(name):
                        module.weight.mul_(4.0 if number < 2 else 0.1)
    model.save_pretrained(tmp_path / "dense")
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path / "dense")
    pruned = {}
    for spread in (0.0, "measured"):
        recipe = [allocation("atp", 0.5, spread=spread), crepe(), *copy.deepcopy(more)]
        model = load(tmp_path / "dense")
        pruned[spread] = divergence(run(model, recipe, data_of_windows), tmp_path / "dense", data_of_windows)
    measured = recipe[0].chosen
    assert list(measured.values()) == sorted(measured.values()) and measured["model.layers.0"] < 0.5
    assert sum(measured.values()) / 4 == pytest.approx(0.5)
    assert pruned["measured"] < pruned[0.0]
    assert any("ATP: a spread of" in line for line in messages)
    saved = yaml.safe_dump(recipe[0].model_dump())
    assert "measured" in saved and yaml.safe_load(saved)["found"] == measured


def test_a_spread_is_not_measured_on_one_sequence(tiny_model_folder, calibration_data, monkeypatch):
    monkeypatch.setattr("crepe_llm.modifiers.allocation.Observer", lambda *_: pytest.fail("it calibrates"))
    recipe = [allocation("atp", 0.5, spread="measured"), crepe()]
    with pytest.raises(ValueError, match="SparsityAllocationModifier with spread: measured needs at least two"):
        run(load(tiny_model_folder("llama")), recipe, calibration_data.select([1]))


def test_nothing_is_measured_where_nothing_is_pruned(tiny_model_folder, calibration_data):
    folder = tiny_model_folder("llama")
    model = run(load(folder), [allocation("atp", 0.0, spread="measured"), crepe()], calibration_data)
    for name, module in linears(load(folder)).items():
        assert torch.equal(linears(model)[name].weight, module.weight), name


def test_measuring_needs_a_crepe_modifier_and_atp(tiny_model_folder, calibration_data):
    model = load(tiny_model_folder("llama"))
    message = "spread=measured prunes by a CRePEModifier to measure, not by WandaPruningModifier"
    refused(model, [allocation("atp", spread="measured"), wanda()], calibration_data, message)
    for fields in ({"method": "owl"}, {"method": "atp", "slope": 0.1}):
        with pytest.raises(ValueError, match="spread=measured is for method: atp without slope"):
            allocation(**fields, spread="measured")
