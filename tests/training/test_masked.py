"""Masks that hold under any optimiser and loop: pruned weights stay exactly zero, kept ones train as without masks."""

import copy
import gc
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from crepe_llm.pruning.layer import record_mask
from crepe_llm.training.masked import find_masks, held_masks, keep_masks
from masked_models import OPTIMIZERS, ids, loss_of, model_of, pruned, step
from sparse_models import linears
from tiny_models import VOCABULARY

TRAINING = Path(__file__).parents[2] / "src" / "crepe_llm" / "training"


def assert_masked(model, masks, before):
    """Pruned weights are exactly +0.0, and kept ones have been trained."""
    for name, module in linears(model).items():
        weight = module.weight.detach()
        assert torch.equal(weight[~masks[name]], torch.zeros_like(weight[~masks[name]])), name
        assert not torch.signbit(weight[~masks[name]]).any(), name
        assert not torch.equal(weight, before[f"{name}.weight"]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_exactly_zero(name, dtype):
    model, masks = pruned(dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    held = keep_masks(model)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for seed in range(4):
        step(model, optimizer, seed, micro_batches=2)
    assert_masked(model, masks, before)
    assert held.broken() == []
    held.check()
    if name == "Muon":  # mixes a matrix's entries, so only the weights can be masked
        return
    for name, module in linears(model).items():
        for key, value in optimizer.state[module.weight].items():
            if isinstance(value, torch.Tensor) and value.shape == module.weight.shape:
                assert not value[~masks[name]].any(), (name, key)


def test_kept_weights_train_as_if_pruned_ones_were_no_parameters():
    """One step of AdamW is a step of the model whose weights are multiplied by their masks."""
    model, masks = pruned()
    reference = copy.deepcopy(model)
    keep_masks(model)
    for optimizer_of in (OPTIMIZERS["AdamW"], OPTIMIZERS["SGD, momentum"]):
        ours, theirs = optimizer_of(list(model.parameters())), optimizer_of(list(reference.parameters()))
        for seed in range(3):
            step(model, ours, seed)
            loss_of(reference, ids(100 * seed)).backward()
            for name, module in linears(reference).items():
                module.weight.grad *= masks[name]
            theirs.step()
            theirs.zero_grad()
    for (name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_norm_of_gradients_counts_kept_weights_alone():
    model, masks = pruned()
    keep_masks(model)
    loss_of(model, ids()).backward()
    for name, module in linears(model).items():
        assert not module.weight.grad[~masks[name]].any() and module.weight.grad[masks[name]].all()


def test_a_state_from_elsewhere_brings_no_pruned_weight_back():
    dense = model_of()
    optimizer = OPTIMIZERS["AdamW"](list(dense.parameters()))
    step(dense, optimizer)
    model, masks = pruned()
    before = copy.deepcopy(model.state_dict())
    keep_masks(model)
    resumed = OPTIMIZERS["AdamW"](list(model.parameters()))
    resumed.load_state_dict(optimizer.state_dict())
    step(model, resumed, 1)
    assert_masked(model, masks, before)


def test_a_state_from_a_dense_training_is_freed_of_pruned_weights():
    """Schedule-free optimisers write weights from their state outside of a step, when they evaluate."""
    dense = model_of()
    optimizer = OPTIMIZERS["AdamW"](list(dense.parameters()))
    step(dense, optimizer)
    model, masks = pruned()
    keep_masks(model)
    resumed = OPTIMIZERS["AdamW"](list(model.parameters()))
    resumed.load_state_dict(optimizer.state_dict())
    step(model, resumed, 1)
    for name, module in linears(model).items():
        for state in ("exp_avg", "exp_avg_sq"):
            value = resumed.state[module.weight][state]
            assert not value[~masks[name]].any() and value[masks[name]].any(), name


def test_an_optimizer_of_copies_writes_no_pruned_weight():
    """fp32 copies are trained, and their values written into the model at the end of the step."""

    class OfCopies(torch.optim.Muon):
        def __init__(self, weights):
            self.weights, self.copies = weights, [weight.detach().float().clone() for weight in weights]
            super().__init__(self.copies)

        @torch.no_grad()
        def step(self):
            for weight, one in zip(self.weights, self.copies, strict=True):
                one.grad = weight.grad.float()
            super().step()
            for weight, one in zip(self.weights, self.copies, strict=True):
                weight.copy_(one)

    model, masks = pruned()
    before = copy.deepcopy(model.state_dict())
    keep_masks(model)
    step(model, OfCopies([module.weight for module in linears(model).values()]))
    assert_masked(model, masks, before)


def test_resuming_from_saved_states_gives_the_same_weights():
    straight, _ = pruned()
    keep_masks(straight)
    optimizer = OPTIMIZERS["AdamW"](list(straight.parameters()))
    for seed in range(2):
        step(straight, optimizer, seed)
    saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
    step(straight, optimizer, 2)
    resumed = model_of()
    resumed.load_state_dict(saved[0])
    keep_masks(resumed)
    optimizer = OPTIMIZERS["AdamW"](list(resumed.parameters()))
    optimizer.load_state_dict(saved[1])
    step(resumed, optimizer, 2)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_gradient_checkpointing_and_autocast():
    model, masks = pruned()
    before = copy.deepcopy(model.state_dict())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    keep_masks(model)
    optimizer = OPTIMIZERS["AdamW"](list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, ids())
    loss.backward()
    optimizer.step()
    assert_masked(model, masks, before)


@pytest.mark.parametrize("first", ["masks", "compile"])
def test_compiled_models(first):
    model, masks = pruned()
    before = copy.deepcopy(model.state_dict())
    if first == "masks":
        keep_masks(model)
    compiled = torch.compile(model, backend="aot_eager")
    if first == "compile":
        keep_masks(compiled)
    optimizer = OPTIMIZERS["AdamW"](list(compiled.parameters()))
    for seed in range(2):
        step(compiled, optimizer, seed)
    assert_masked(model, masks, before)


def test_the_optimizer_may_step_inside_of_the_backward_pass():
    model, masks = pruned()
    before = copy.deepcopy(model.state_dict())
    keep_masks(model)
    optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in model.parameters()}

    def update(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    loss_of(model, ids()).backward()
    assert_masked(model, masks, before)


def test_recorded_masks_count_before_zeros():
    model, masks = pruned()
    name, module = next(iter(linears(model).items()))
    keep = masks[name].clone()
    row, column = keep.nonzero()[0].tolist()
    with torch.no_grad():
        module.weight[row, column] = 0.0  # kept, and zero by chance
    record_mask(module, keep)
    keep_masks(model)
    step(model, OPTIMIZERS["AdamW"](list(model.parameters())))
    assert module.weight[row, column] != 0


def test_masks_may_be_given_and_take_weights_away_at_once():
    model = model_of("gpt2")
    masks = {
        "transformer.h.0.mlp.c_fc": torch.rand(128, 32) > 0.7,  # [d_out, d_in] of a layer stored [d_in, d_out]
        "transformer.wte.weight": torch.rand(VOCABULARY, 32) > 0.1,
    }
    held = keep_masks(model, masks)
    fc, table = model.transformer.h[0].mlp.c_fc.weight, model.transformer.wte.weight
    assert torch.equal(fc.T != 0, masks["transformer.h.0.mlp.c_fc"])
    assert torch.equal(table != 0, masks["transformer.wte.weight"])
    step(model, OPTIMIZERS["AdamW"](list(model.parameters())))
    assert torch.equal(fc.T != 0, masks["transformer.h.0.mlp.c_fc"])
    assert torch.equal(table != 0, masks["transformer.wte.weight"])
    assert held.broken() == []


def test_not_even_a_division_of_zero_by_zero_reaches_pruned_weights():
    layer = torch.nn.Linear(8, 8, bias=False)
    keep = torch.arange(8)[None].expand(8, 8) % 4 < 2
    keep_masks(layer, {"": keep})
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, eps=0.0)
    layer(torch.randn(4, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight != 0, keep) and layer.weight.isfinite().all()


def test_experts_held_in_one_tensor():
    model = model_of("mixtral")
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj[..., ::2] = 0
    assert list(find_masks(model)) == ["model.layers.0.mlp.experts.down_proj"]
    keep_masks(model)
    step(model, OPTIMIZERS["AdamW"](list(model.parameters())))
    assert not experts.down_proj[..., ::2].any() and experts.down_proj[..., 1::2].any()


def test_barely_pruned_layers_of_a_sparse_model_count():
    model, _ = pruned()
    head = model_of("qwen2")
    weight = head.lm_head.weight  # not tied, and dense
    assert "lm_head" not in find_masks(model)
    for module in linears(head).values():
        with torch.no_grad():
            module.weight[torch.rand(module.weight.shape) < 0.5] = 0
    with torch.no_grad():
        weight[0, 0] = 0
        head.model.layers[1].mlp.up_proj.weight[:, :2] = 0
    found = find_masks(head)
    assert set(found) == {*linears(head), "lm_head"}


def test_a_matrix_of_zeros_is_not_pruned():
    """A LoRA adapter's second matrix begins so, and must learn."""
    model, masks = pruned("qwen2")  # whose head is not tied
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert find_masks(model).keys() == masks.keys()
    keep_masks(model)
    step(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert model.lm_head.weight.count_nonzero() > 0.9 * model.lm_head.weight.numel()


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_whose_merge_would_fill_the_zeros_are_warned_of(dora):
    model, masks = pruned()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_dora=dora))
    with pytest.warns(
        UserWarning, match="4 masked layers have adapters .* not after merging.*recover --method lora"
    ) as caught:
        held = keep_masks(adapted)
    assert len(caught) == 1 and caught[0].filename == __file__
    step(adapted, OPTIMIZERS["AdamW"]([p for p in adapted.parameters() if p.requires_grad]))
    held.check()
    merged = linears(adapted.merge_and_unload())
    broken = {name for name, keep in masks.items() if merged[name].weight[~keep].any()}
    assert broken == {name for name in masks if name.endswith(("q_proj", "up_proj"))}


def test_adapters_that_only_scale_are_not_warned_of():
    model, _ = pruned()
    adapted = get_peft_model(
        model, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep_masks(adapted)
        keep_masks(pruned()[0])


def test_adapters_that_took_the_zeros_are_told():
    model, _ = pruned()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights="pissa"))
    with pytest.raises(ValueError, match=r"no masks: .*pissa, olora .* add them with init_lora_weights=True, or give"):
        keep_masks(adapted)


def test_checking_names_the_layers_that_broke():
    model, masks = pruned()
    held = keep_masks(model)
    name, module = list(linears(model).items())[3]
    with torch.no_grad():
        module.weight[~masks[name]] = 1.0
    assert held.broken() == [name]
    with pytest.raises(
        ValueError, match=rf"1 of 14 layers have pruned weights that are not zero, the first being {name}"
    ):
        held.check()
    held.apply()
    held.check()


def test_removed_masks_let_weights_go_and_another_call_replaces_the_first():
    model, masks = pruned()
    assert held_masks(model) is None
    keep_masks(model).remove()
    assert held_masks(model) is None
    optimizer = OPTIMIZERS["AdamW"](list(model.parameters()))
    step(model, optimizer)
    name, module = next(iter(linears(model).items()))
    assert module.weight[~masks[name]].any()
    first = keep_masks(model, masks)
    second = keep_masks(model, {name: masks[name]})
    step(model, optimizer, 1)
    assert first.broken() and name not in first.broken() and not second.broken()


def test_a_dropped_model_is_freed():
    model, _ = pruned()
    keep_masks(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    other, _ = pruned()
    step(other, OPTIMIZERS["AdamW"](list(other.parameters())))  # the hooks of the first are no longer there


def test_a_layer_that_is_replaced_is_let_go():
    model, _ = pruned()
    held = keep_masks(model)
    mlp = model.model.layers[0].mlp
    mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    gc.collect()
    step(model, OPTIMIZERS["AdamW"](list(model.parameters())))
    assert held.broken() == [] and len(held.bits) == 13 and mlp.up_proj.weight.all()


def test_masks_take_a_bit_a_weight():
    model, masks = pruned()
    held = keep_masks(model)
    assert sum(bits.numel() for bits in held.bits.values()) == sum(m.numel() for m in masks.values()) // 8


def test_what_cannot_be_masked_is_refused():
    dense = model_of()
    with pytest.raises(ValueError, match=r"the model has no masks: none were recorded, and no matrix .* over 25%"):
        keep_masks(dense)
    with pytest.raises(ValueError, match=r'masks\["model.layers.7"\] is of no layer'):
        keep_masks(dense, {"model.layers.7": torch.ones(2, 2, dtype=torch.bool)})
    name = next(iter(linears(dense)))
    with pytest.raises(ValueError, match=r"is bool \[2, 2\]; expected bool \[32, 32\]"):
        keep_masks(dense, {name: torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"is float32 \[32, 32\]; expected bool"):
        keep_masks(dense, {name: torch.ones(32, 32)})
    keep = torch.ones(32, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match=r'masks\["model.*"\] is a ndarray; expected a bool tensor'):
        keep_masks(dense, {name: keep.numpy()})
    with pytest.raises(ValueError, match=r'masks\["one"\] and masks\["two"\] are of one parameter: give one'):
        shared = torch.nn.ModuleDict({"one": torch.nn.Linear(4, 4), "two": torch.nn.Linear(4, 4)})
        shared["two"].weight = shared["one"].weight
        left = (torch.arange(4) < 2).repeat(4, 1)
        keep_masks(shared, {"one": left, "two": ~left})
    assert shared["one"].weight.all()
    with pytest.raises(ValueError, match=rf'masks\["{name}"\] and masks\["{name}.weight"\] are of one parameter'):
        keep_masks(dense, {name: keep, f"{name}.weight": keep})
    with pytest.raises(ValueError, match="masks is empty: leave it out"):
        keep_masks(dense, {})
    model, _ = pruned()
    held = keep_masks(model)
    module = next(iter(linears(model).values()))
    module.weight = torch.nn.Parameter(module.weight.detach().flatten())
    with pytest.raises(ValueError, match="take FSDP2"):
        held.attach()


@pytest.mark.parametrize(
    "module", sorted(p.stem for p in (Path(__file__).parents[2] / "src/crepe_llm/training").glob("[a-z]*.py"))
)
def test_training_imports_neither_llm_compressor_nor_vllm(module):
    code = (
        f"import sys, crepe_llm.training.{module}\n"
        "assert not {'llmcompressor', 'vllm'} & {name.split('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
