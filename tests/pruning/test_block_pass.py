"""Asymmetric and true sequential calibration through llm-compressor's own oneshot, as computed from outside."""

import re
import weakref
from collections import Counter

import pytest
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.pruning import WandaPruningModifier
from transformers import AutoConfig, AutoModelForCausalLM

from crepe_llm.functional.compensation import conjugate_gradients
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.models.blocks import find_blocks
from crepe_llm.modifiers import ADMMModifier, CRePEModifier, WeightCorrectionModifier, observe
from crepe_llm.modifiers.pruning_pass import PruningPass
from crepe_llm.pruning import block_pass
from modifier_helpers import OFFLOADED, crepe, inputs_of, linears, load, matrix, output_norms, refused, run
from tiny_models import FAMILIES


class Watched(WeightCorrectionModifier):
    """Remembers what each layer was to come close to, and by which Gram matrix."""

    def reconstruct(self, layer, target):
        seen[layer.name], gathered[layer.name] = target.clone(), layer.gram.clone()
        return super().reconstruct(layer, target)


seen: dict[str, torch.Tensor] = {}
gathered: dict[str, torch.Tensor] = {}


@pytest.fixture(autouse=True)
def forget():
    seen.clear()
    gathered.clear()


def deep(folder, blocks):
    """The family with more blocks, the same each time."""
    config = AutoConfig.from_pretrained(folder, num_hidden_layers=blocks, layer_types=None)
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def target_of(weight, x, x0, share, dampening=0.01):
    """By the normal equations, in fp64."""
    gram = x.T @ x
    damped = gram + dampening * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return weight + share * weight @ (x0.T @ x - gram) @ torch.linalg.inv(damped)


def expected_targets(dense, pruned, data, share, weighting="uniform"):
    """In fp64, and each block's inputs from a model of which the earlier blocks are the pruned ones."""
    targets = {}
    dense_inputs = inputs_of(dense, data)
    mixed_blocks, pruned_blocks = find_blocks(dense), find_blocks(pruned)
    for block, module in mixed_blocks.items():
        inputs = inputs_of(dense, data)  # `dense` by now has the pruned blocks before this one
        for name, layer in linears(dense).items():
            if not name.startswith(f"{block}."):
                continue
            x, x0 = inputs[name], dense_inputs[name]
            sizes = output_norms(layer, x) if weighting == "relative" else 1
            targets[name] = target_of(matrix(layer).double(), x / sizes, x0 / sizes, share)
        module.load_state_dict(pruned_blocks[block].state_dict())
    return targets


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("pipeline", "weighting"), [("independent", "relative"), ("sequential", "uniform")])
def test_targets_are_those_computed_from_outside(family, pipeline, weighting, tiny_model_folder, calibration_data):
    """Padding left out (the windows have some)."""
    folder = tiny_model_folder(family)
    pruning = crepe(mask_structure="6:8")
    pruned = run(
        load(folder),
        [pruning, Watched(asymmetric_calibration=0.7, true_sequential=False, token_weighting=weighting)],
        calibration_data,
        pipeline=pipeline,
    )
    expected = expected_targets(load(folder), pruned, calibration_data, 0.7, weighting)
    dense = linears(load(folder))
    assert set(seen) == set(expected) == set(dense)
    for name, target in expected.items():
        torch.testing.assert_close(seen[name].double(), target, rtol=1e-3, atol=1e-4)
    moved = {name for name in dense if not torch.equal(seen[name], matrix(dense[name]))}
    first = next(iter(find_blocks(load(folder))))
    assert moved == {name for name in dense if not name.startswith(f"{first}.")}


@pytest.mark.parametrize("targets", [["Linear"], ["re:.*layers.[12].*proj"]])
def test_the_dense_stream_goes_on_from_block_to_block(targets, tiny_model_folder, calibration_data):
    """Also past blocks that are not pruned, and from the first that is."""
    folder = tiny_model_folder("llama")
    recipe = [crepe(mask_structure="6:8", targets=targets), Watched(asymmetric_calibration=1.0, true_sequential=False)]
    pruned = run(deep(folder, 4), recipe, calibration_data)
    expected = expected_targets(deep(folder, 4), pruned, calibration_data, 1.0)
    assert len(seen) == (28 if targets == ["Linear"] else 14)
    for name, target in seen.items():
        torch.testing.assert_close(target.double(), expected[name], rtol=1e-3, atol=1e-3)


def test_the_model_comes_closer_to_dense(tiny_model_folder, calibration_data):
    """On its calibration data, where all of the error is to be made up for."""
    folder = tiny_model_folder("llama")
    ids = torch.tensor(calibration_data["input_ids"])[1:3]
    with torch.no_grad():
        wanted = deep(folder, 4)(ids).logits
        errors = []
        for share in (0.0, 1.0):
            recipe = [CRePEModifier(sparsity=0.75), ADMMModifier(asymmetric_calibration=share)]
            model = run(deep(folder, 4), recipe, calibration_data)
            errors.append(float((model(ids).logits - wanted).square().mean()))
    assert errors[1] < 0.95 * errors[0]


def test_errors_are_those_to_the_targets_and_hooks_are_gone(tiny_model_folder, calibration_data):
    folder = tiny_model_folder("llama")
    modifier = Watched(asymmetric_calibration=1.0, true_sequential=False)
    model = run(load(folder), [crepe(), modifier], calibration_data)
    name = "model.layers.1.mlp.up_proj"
    model.model.layers[1].load_state_dict(load(folder).model.layers[1].state_dict())
    x = inputs_of(model, calibration_data)[name]
    keep = (
        matrix(linears(run(load(folder), [crepe(), Watched(asymmetric_calibration=1.0)], calibration_data))[name]) != 0
    )
    target = seen[name].double()
    found = conjugate_gradients(target, keep, x.T @ x).double()
    distance = ((x @ found.T - x @ target.T) ** 2).sum() / ((x @ target.T) ** 2).sum()
    assert modifier.errors[name][1] == pytest.approx(float(distance), rel=1e-2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("true_sequential", [False, True])
def test_offloaded_weights(true_sequential, tiny_model_folder, calibration_data, tmp_path):
    folder = tiny_model_folder("llama")

    def recipe():
        return [crepe(), ADMMModifier(asymmetric_calibration=0.5, true_sequential=true_sequential)]

    expected = linears(run(load(folder), recipe(), calibration_data))
    offloaded = load(folder, device_map=OFFLOADED, offload_folder=str(tmp_path))
    for name, module in linears(run(offloaded, recipe(), calibration_data)).items():
        torch.testing.assert_close(module.weight.detach().cpu(), expected[name].weight.detach())


@pytest.mark.parametrize("true_sequential", [False, True])
def test_experts_that_get_some_tokens_only_are_fitted_without_and_named(
    true_sequential, tiny_model_folder, calibration_data, messages
):
    """In the first block, too, where attention is pruned before them."""
    model = load(tiny_model_folder("mixtral"))
    linearize_moe(model)
    correction = Watched(asymmetric_calibration=1.0, true_sequential=true_sequential)
    recipe = [crepe(uncalibrated="dense", ignore=["lm_head", "re:.*gate$"]), correction]
    run(model, recipe, calibration_data, moe_calibrate_all_experts=False)
    (table,) = [message for message in messages if "Squared output error" in message]
    marked = [line.split()[0] for line in table.splitlines() if "gets some tokens only" in line]
    assert marked and all(".experts." in name for name in marked)
    assert any(".layers.0." in name for name in marked) == true_sequential
    dense = load(tiny_model_folder("mixtral"))
    linearize_moe(dense)
    assert all(torch.equal(seen[name], linears(dense)[name].weight) for name in marked)
    assert not torch.equal(seen["model.layers.1.self_attn.q_proj"], dense.model.layers[1].self_attn.q_proj.weight)


@pytest.mark.parametrize("fit", [WeightCorrectionModifier, ADMMModifier])
def test_each_expert_is_fitted_by_the_products_of_its_own_tokens(fit, tiny_model_folder, calibration_data, monkeypatch):
    """And no more Gram matrices are in memory than one block has layers."""
    alive, most, grams = weakref.WeakSet(), [0], {}

    class Counted(InputStatistics):
        def __init__(self, channels, *, gram=False, device="cpu"):
            super().__init__(channels, gram=gram, device=device)
            if gram:
                alive.add(self.gram)
                most[0] = max(most[0], len(alive))

    def remember(self, layer):
        grams[layer.name] = layer.gram.clone()
        prune_layer(self, layer)

    prune_layer = PruningPass._prune_layer
    monkeypatch.setattr(PruningPass, "_prune_layer", remember)
    monkeypatch.setattr(observe, "InputStatistics", Counted)
    dense, model = (load(tiny_model_folder("mixtral")) for _ in range(2))
    linearize_moe(model)
    recipe = [crepe(uncalibrated="dense", ignore=["lm_head", "re:.*gate$"])]
    recipe.append(fit(asymmetric_calibration=0, true_sequential=False))
    run(model, recipe, calibration_data, moe_calibrate_all_experts=False)
    block = dense.model.layers[0].mlp
    expected = [torch.zeros_like(next(iter(grams.values()))) for _ in range(block.gate.weight.shape[0])]

    def route(module, args):
        tokens = args[0].flatten(0, -2)
        for token, chosen in zip(tokens, module.gate(tokens)[2], strict=True):
            for number in chosen:
                expected[number] += torch.outer(token, token)

    block.register_forward_pre_hook(route)
    with torch.no_grad():
        for row in calibration_data:
            dense(torch.tensor([row["input_ids"]]), attention_mask=torch.tensor([row["attention_mask"]]))
    for number, wanted in enumerate(expected):
        if f"model.layers.0.mlp.experts.{number}.gate_proj" in grams:
            torch.testing.assert_close(grams[f"model.layers.0.mlp.experts.{number}.gate_proj"], wanted)
    assert sum(bool(wanted.any()) for wanted in expected) > 1
    assert most[0] <= len([name for name in linears(model) if "layers.0." in name])


def in_turn(dense, pruned, data, share, weighting="uniform"):
    """What the layers come close to, and their Gram matrices, each layer calibrated on what comes before it."""
    targets, grams = {}, {}
    dense_inputs = inputs_of(dense, data)  # in the order of calls
    replacements, layers = linears(pruned), linears(dense)
    for name in dense_inputs:
        if name in targets:
            continue
        alike = [other for other in dense_inputs if torch.equal(dense_inputs[other], dense_inputs[name])]
        x, x0 = inputs_of(dense, data)[name], dense_inputs[name]
        for other in alike:
            sizes = output_norms(layers[other], x) if weighting == "relative" else 1
            grams[other] = (x / sizes).T @ (x / sizes)
            targets[other] = target_of(matrix(layers[other]).double(), x / sizes, x0 / sizes, share)
        for other in alike:
            layers[other].load_state_dict(replacements[other].state_dict())
    return targets, grams


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("share", "weighting"), [(0.0, "relative"), (0.6, "relative"), (0.6, "uniform")])
def test_true_sequential_calibrates_each_layer_on_what_is_pruned_in_its_block(
    family, share, weighting, tiny_model_folder, calibration_data
):
    """Batches of two sizes, with padding."""
    folder = tiny_model_folder(family)
    correction = Watched(asymmetric_calibration=share, true_sequential=True, token_weighting=weighting)
    pruned = run(load(folder), [crepe(mask_structure="6:8"), correction], calibration_data, batch_size=5)
    targets, grams = in_turn(load(folder), pruned, calibration_data, share, weighting)
    assert set(seen) == set(targets)
    for name, target in targets.items():
        torch.testing.assert_close(gathered[name].double(), grams[name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(seen[name].double(), target, rtol=1e-3, atol=1e-3)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pruned.modules())


def test_true_sequential_masks_by_what_is_pruned_before(tiny_model_folder, calibration_data):
    """CRePE's own statistics are the new ones, too."""
    folder = tiny_model_folder("gemma3")
    norms = {}

    class Scored(CRePEModifier):
        def scores(self, name, weight, statistics):
            norms[name] = statistics.norm.double()
            return super().scores(name, weight, statistics)

    recipe = [Scored(mask_structure="6:8"), Watched(true_sequential=True)]
    pruned = run(load(folder), recipe, calibration_data)
    _, grams = in_turn(load(folder), pruned, calibration_data, 0.25, "relative")
    for name, norm in norms.items():
        torch.testing.assert_close(norm, grams[name].diagonal().sqrt(), rtol=1e-4, atol=1e-5)


def test_the_basic_pipeline_changes_what_is_within_a_block_only(tiny_model_folder, calibration_data):
    """Its blocks are calibrated on what the dense model gives them, and pruned when all have been."""
    folder = tiny_model_folder("llama")
    pruned = run(load(folder), [crepe(mask_structure="6:8"), Watched()], calibration_data, pipeline="basic")
    assert len(gathered) == 14
    for place, block in enumerate(pruned.model.layers):
        one_pruned = load(folder)
        one_pruned.model.layers[place].load_state_dict(block.state_dict())
        _, grams = in_turn(load(folder), one_pruned, calibration_data, 0.25)
        for name in gathered:
            if f".layers.{place}." in name:
                torch.testing.assert_close(gathered[name].double(), grams[name], rtol=1e-3, atol=1e-4)


def test_no_batch_is_gathered_twice(tiny_model_folder, calibration_data, monkeypatch):
    """Layers with the same inputs are gathered for once, and only when what comes before them has been pruned."""
    counted = Counter()

    def counting(name, original):
        def count(*args):
            counted[name] += 1
            return original(*args)

        return count

    monkeypatch.setattr(InputStatistics, "update", counting("given", InputStatistics.update))
    monkeypatch.setattr(block_pass, "token_products", counting("dense", block_pass.token_products))
    model = load(tiny_model_folder("llama"))
    run(model, [crepe(), WeightCorrectionModifier()], calibration_data, batch_size=1)
    windows, blocks, groups = len(calibration_data), 2, 4  # q, k and v; o; gate and up; down
    # What the first group of the first block is given is what the dense model gives it.
    assert counted == {"given": blocks * groups * windows, "dense": (blocks * groups - 1) * windows}


def test_experts_are_calibrated_again_together(tiny_model_folder, calibration_data):
    model = load(tiny_model_folder("mixtral"))
    linearize_moe(model)
    order = []

    class Scored(CRePEModifier):
        def scores(self, name, weight, statistics):
            order.append(name)
            return super().scores(name, weight, statistics)

    recipe = [
        Scored(mask_structure="2:4", uncalibrated="dense", ignore=["lm_head", "re:.*gate$"]),
        WeightCorrectionModifier(true_sequential=True),
    ]
    run(model, recipe, calibration_data, moe_calibrate_all_experts=False)
    kinds = [re.sub(r"experts\.\d+\.", "", name.split("layers.1.")[1]) for name in order if "layers.1." in name]
    groups = [{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, {"self_attn.o_proj"}]
    expected = [*groups, {"mlp.gate_proj", "mlp.up_proj"}, {"mlp.down_proj"}]
    places = [next(place for place, group in enumerate(expected) if kind in group) for kind in kinds]
    assert places == sorted(places) and set(places) == {0, 1, 2, 3} and places.count(2) > 2


def test_blocks_in_parts_are_refused(tiny_model_folder, calibration_data):
    off = {"asymmetric_calibration": 0, "true_sequential": False}
    for kept in off:
        recipe = [crepe(), ADMMModifier(**{name: value for name, value in off.items() if name != kept})]
        message = (
            "calibrated in parts: leave out sequential_targets.*`true_sequential: false` and `asymmetric_cal.*: 0`"
        )
        with pytest.raises(ValueError, match=message):
            run(load(tiny_model_folder("llama")), recipe, calibration_data, sequential_targets=["Linear"])
    recipe = [crepe(), ADMMModifier(**off)]
    run(load(tiny_model_folder("llama")), recipe, calibration_data, sequential_targets=["Linear"])


def test_a_model_without_one_list_of_blocks_is_refused(tiny_model_folder, calibration_data):
    model = load(tiny_model_folder("llama"))
    model.model.more = torch.nn.ModuleList([torch.nn.Identity() for _ in model.model.layers])
    message = r"has 2 lists of decoder blocks .*: set `asymmetric_calibration: 0` and `true_sequential: false`"
    refused(model, [crepe(), ADMMModifier()], calibration_data, message)


def wanda():
    return WandaPruningModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"])


@pytest.mark.parametrize(
    ("family", "pruning", "method", "share", "in_turn", "weighting"),
    [
        ("llama", crepe, "pcg", 0.25, True, "uniform"),
        ("gemma3", crepe, "pcg", 0.25, True, "relative"),
        ("llama", crepe, "sparsegpt", 0.25, True, "uniform"),
        ("gemma3", crepe, "sparsegpt", 0.25, True, "relative"),
        ("gemma3", wanda, "pcg", 0.0, False, "uniform"),
        ("llama", crepe, "energy", 0.0, False, "uniform"),
        ("gemma3", crepe, "mean", 0.0, False, "uniform"),
    ],
)
def test_left_out_all_are_used_where_that_is_possible(
    family, pruning, method, share, in_turn, weighting, tiny_model_folder, calibration_data
):
    folder = tiny_model_folder(family)
    run(load(folder), [pruning(), Watched(method=method)], calibration_data)
    found, by = dict(seen), dict(gathered)
    explicit = {"asymmetric_calibration": share, "true_sequential": in_turn, "token_weighting": weighting}
    run(load(folder), [pruning(), Watched(method=method, **explicit)], calibration_data)
    assert len(found) == 14
    assert all(torch.equal(found[name], seen[name]) and torch.equal(by[name], gathered[name]) for name in seen)
    if pruning is crepe:
        run(load(folder), [pruning(), Watched(method=method, true_sequential=not in_turn)], calibration_data)
        name = "model.layers.0.mlp.down_proj"
        assert not torch.equal(by[name], gathered[name])
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(found[name], load(folder).model.layers[1].mlp.up_proj.weight) == (share == 0)


def test_after_other_pruning_tokens_are_weighted_by_what_the_layer_has_become(tiny_model_folder, calibration_data):
    folder = tiny_model_folder("gemma3")
    pruned = run(load(folder), [wanda()], calibration_data)
    run(load(folder), [wanda(), Watched(token_weighting="relative")], calibration_data)
    inputs = inputs_of(pruned, calibration_data)
    for name, layer in linears(pruned).items():
        if ".layers.0." in name:
            x = inputs[name] / output_norms(layer, inputs[name])
            torch.testing.assert_close(gathered[name].double(), x.T @ x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fields", [{"asymmetric_calibration": 0.25}, {"true_sequential": True}])
def test_after_other_pruning_they_are_refused(fields, tiny_model_folder, calibration_data):
    ((name, value),) = fields.items()
    message = (
        f"{name}={value} needs .* one CRePEModifier and no other that prunes, not WandaPruningModifier: leave it out"
    )
    recipe = [wanda(), WeightCorrectionModifier(**fields)]
    refused(load(tiny_model_folder("llama")), recipe, calibration_data, message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ADMMModifier(asymmetric_calibration=1.5),
            r"asymmetric_calibration\n  Input should be less than or equal to 1",
        ),
        (
            lambda: ADMMModifier(asymmetric_calibration=float("nan")),
            r"asymmetric_calibration\n  Input should be a finite number",
        ),
        (
            lambda: WeightCorrectionModifier(method="energy", asymmetric_calibration=0.5),
            "energy does not: leave it out",
        ),
        (
            lambda: WeightCorrectionModifier(method="mean", token_weighting="relative"),
            "token_weighting=relative is .* mean does not: leave it out",
        ),
        (lambda: ADMMModifier(token_weighting="absolute"), "token_weighting"),
    ],
)
def test_bad_fields_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
