"""ChannelPermutationModifier through llm-compressor's own oneshot: exactness in fp64, what the masks keep, order."""

import logging
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from llmcompressor.modifiers.pruning import WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from loguru import logger
from pydantic import PrivateAttr
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from crepe_llm.checkpoints import is_2of4
from crepe_llm.functional.permutation import retained_score
from crepe_llm.functional.scores import crepe_scores
from crepe_llm.models import families
from crepe_llm.models.channels import AXES, normalises_outputs
from crepe_llm.modifiers import (
    ChannelPermutationModifier,
    CRePEModifier,
    PHOSearchModifier,
    SparsityAllocationModifier,
    WeightCorrectionModifier,
)
from crepe_llm.modifiers.judging import working_head
from modifier_helpers import OFFLOADED, crepe, inputs_of, linears, load, refused, run, save

FAMILIES = [name for name, family in families.FAMILIES.items() if family.axes]
# Those whose layers have Llama's names, and whose experts are not taken apart.
GATED = [name for name in FAMILIES if name in ("glm", "glm4", "olmo", "cohere", "nemotron", "phi3")] + [
    name
    for name in FAMILIES
    if families.FAMILIES[name].axes.keys() >= families.FAMILIES["llama"].axes.keys()
    and all("expert" not in key and "fc1" not in key and "c_fc" not in key for key in families.FAMILIES[name].axes)
]
RECIPE = Path(__file__).parents[2] / "recipes" / "crepe_2of4_permuted.yaml"
IDS = torch.randint(3, 95, (3, 16), generator=torch.Generator().manual_seed(5))

# What a family can have besides its table's minimum: biases, grouped queries, untied heads.
VARIANTS = {
    "llama-attention-bias": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-no-gqa": ("llama", {"num_key_value_heads": 4}),
    "qwen3-untied": ("qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
    "gemma3_text-softcapped": ("gemma3_text", {"final_logit_softcapping": 30.0, "attention_bias": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "cohere-head-norms": ("cohere", {"use_qk_norm": True}),
    "gpt_neox-in-turn": ("gpt_neox", {"use_parallel_residual": False}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon-bias": ("falcon", {"bias": True}),
} | {family: (family, {}) for family in FAMILIES}


class Fp64(TorchFunctionMode):
    """Norms and attention compute in fp32 whatever the model's dtype; here what asks for fp32 gets fp64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        return function(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()})


# What a family calls the sizes that the others call by the same names, and what it needs besides.
SIZES = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "n_inner": 48},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "n_inner": 48, "rotary_dim": 4},
    "bloom": {"n_head": 4, "n_layer": 2},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "granitemoe": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "olmoe": {"num_experts": 2, "num_experts_per_tok": 1},
    "qwen2_moe": {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
}


# Fields of the others that a family's config refuses. OPT and GPT-J take num_key_value_heads, and do not read it.
UNKNOWN = {"falcon": ["head_dim"]}


def config_of(variant):
    family, fields = VARIANTS[variant]
    fields = SIZES.get(family, {}) | fields
    common = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "sliding_window": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
        **fields,
    }
    for name in UNKNOWN.get(family, ()):
        del common[name]
    return transformers.CONFIG_MAPPING[family](**common)


@pytest.fixture(scope="module")
def folder_of(tiny_model_folder, tmp_path_factory):
    """A function: variant -> folder of a saved model, every parameter of which is random, norms and biases included."""
    folders = {}

    def make(variant):
        if variant not in folders:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config_of(variant), dtype=torch.float64)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() == 1:
                        parameter.copy_(torch.randn_like(parameter).exp())
                    else:
                        spread = 0.5 * torch.randn(parameter.shape[-1], dtype=parameter.dtype)
                        parameter.copy_(0.2 * torch.randn_like(parameter) * spread.exp())
                    if name.endswith("v_proj.weight"):  # channels of values differ as well
                        parameter.mul_((0.7 * torch.randn(len(parameter), 1, dtype=parameter.dtype)).exp())
            folders[variant] = tmp_path_factory.mktemp(variant)
            model.save_pretrained(folders[variant])
            transformers.AutoTokenizer.from_pretrained(tiny_model_folder("llama")).save_pretrained(folders[variant])
        return folders[variant]

    return make


class Watched(ChannelPermutationModifier):
    """Keeps the outputs and the weights of the model right before and right after the permutation."""

    _before: dict = PrivateAttr()
    _after: dict = PrivateAttr()

    def on_calibration_end(self, state, event, **kwargs):
        self._before = self._look(state.model)
        super().on_calibration_end(state, event, **kwargs)
        self._after = self._look(state.model)

    def _look(self, model):
        # The wrapper that makes attention and norms fp64 serves no other model.
        fp64 = Fp64() if model.dtype == torch.float64 else nullcontext()
        with HooksMixin.disable_hooks(), working_head(model), torch.no_grad(), fp64:
            return {"logits": model(input_ids=IDS).logits} | {
                n: m.weight.detach().clone() for n, m in linears(model).items()
            }


@pytest.mark.parametrize("family", GATED)
def test_what_is_normalised_may_be_of_any_size(family, folder_of):
    model = load(folder_of(family), torch.float64)
    with torch.no_grad(), Fp64():
        expected = model(IDS).logits
        for name, layer in linears(model).items():
            if name.endswith(("o_proj", "down_proj")):
                layer.weight.mul_(100)
        found = model(IDS).logits
    # But for the norms' epsilon.
    same = torch.allclose(found, expected, rtol=0.01, atol=0.01 * float(expected.std()))
    assert same == normalises_outputs(family)
    assert not normalises_outputs("gpt2")


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_those_of_the_dense_model_before_it_is_pruned(variant, folder_of, calibration_data):
    permutation = Watched()
    run(load(folder_of(variant), torch.float64), [permutation, crepe()], calibration_data)
    before, after = permutation._before, permutation._after
    assert before["logits"].dtype == torch.float64 and before["logits"].abs().max() > 0.1
    torch.testing.assert_close(after["logits"], before["logits"], rtol=1e-10, atol=1e-10)
    # Every layer reads or writes the residual stream, so each must have moved for the above to mean something.
    fused = not any(name.endswith(".v_proj") for name in before)
    experts = sum(".experts." in name and name.endswith("down_proj") for name in before)
    shared = sum("shared_expert." in name and name.endswith("down_proj") for name in before)
    assert len(permutation.retained) == 1 + 2 * (not fused) + (experts + shared if experts else 2)
    assert sum(after > before for before, after in permutation.retained.values()) >= len(permutation.retained) - 1
    for name in before.keys() - {"logits"}:
        assert not torch.equal(before[name], after[name]), name
        assert torch.equal(before[name].flatten().sort().values, after[name].flatten().sort().values), name


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("variant", ["llama-attention-bias", "gemma3_text"])
def test_each_kind_of_channels_alone(variant, axis, folder_of, calibration_data):
    permutation = Watched(**{name: name == axis for name in AXES})
    run(load(folder_of(variant), torch.float64), [permutation, crepe()], calibration_data)
    before, after = permutation._before, permutation._after
    torch.testing.assert_close(after["logits"], before["logits"], rtol=1e-10, atol=1e-10)
    moved = {name.split(".")[-1] for name in before.keys() - {"logits"} if not torch.equal(before[name], after[name])}
    expected = {"mlp": {"gate_proj", "up_proj", "down_proj"}, "attention": {"v_proj", "o_proj"}}
    assert moved == expected.get(axis, {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")})
    assert all(site.endswith(axis) for site in permutation.retained)
    assert all(after > before for before, after in permutation.retained.values())


class WatchedCRePE(CRePEModifier):
    """Keeps every layer's scores and the share of them that its mask keeps."""

    _seen: dict = PrivateAttr(default_factory=dict)
    _shares: dict = PrivateAttr(default_factory=dict)

    def scores(self, name, weight, statistics):
        self._seen[name] = super().scores(name, weight, statistics)
        return self._seen[name]

    def mask(self, name, scores):
        keep = super().mask(name, scores)
        self._shares[name] = float(scores.double()[keep].sum() / scores.double().sum())
        return keep


@pytest.mark.parametrize("variant", ["llama-attention-bias", "qwen2", "gemma3_text"])
def test_masks_keep_more_of_the_scores(variant, folder_of, calibration_data):
    plain, permuted = (WatchedCRePE(mask_structure="2:4") for _ in range(2))
    run(load(folder_of(variant)), [plain], calibration_data)
    model = run(load(folder_of(variant)), [ChannelPermutationModifier(), permuted], calibration_data)
    assert plain._shares.keys() == permuted._shares.keys() == linears(model).keys()
    readers = {
        "mlp": ("down_proj",),
        "attention": ("o_proj",),
        "residual": ("q_proj", "k_proj", "gate_proj", "up_proj"),
    }
    for axis, kinds in readers.items():
        names = [name for name in plain._shares if name.endswith(kinds)]
        before, after = (sum(crepe._shares[name] for name in names) / len(names) for crepe in (plain, permuted))
        assert after > before + 0.002, axis
    for name, module in linears(model).items():
        assert bool(((module.weight.view(-1, 4) != 0).sum(1) == 2).all()), name


def test_retained_shares_are_as_computed_independently(folder_of, calibration_data):
    """Before and after, from the dense model's inputs; the residual stream's over its ten readers, by their sizes."""
    model, permutation = load(folder_of("llama")), ChannelPermutationModifier()
    inputs, dense = (
        inputs_of(model, calibration_data),
        {n: m.weight.detach().clone() for n, m in linears(model).items()},
    )
    pruning = crepe(kernel_size=5)
    run(model, [permutation, pruning], calibration_data)
    sites = {"residual": [n for n in dense if not n.endswith(("o_proj", "down_proj"))]}
    for block in range(2):
        sites[f"model.layers.{block}.mlp"] = [f"model.layers.{block}.mlp.down_proj"]
        sites[f"model.layers.{block}.attention"] = [f"model.layers.{block}.self_attn.o_proj"]
    assert sites.keys() == permutation.retained.keys()
    for site, names in sites.items():
        kept = torch.zeros(2, dtype=torch.float64)
        for name in names:
            scores = crepe_scores(dense[name], inputs[name].norm(dim=0), kernel_size=5)
            columns = pruning._orders[name][1]
            for place, ordered in enumerate([scores, scores[:, columns]]):
                kept[place] += retained_score(ordered / scores.mean(), 2, 4)
        total = sum(dense[name].numel() for name in names)
        assert permutation.retained[site] == pytest.approx((kept / total).tolist(), rel=1e-4), site


def test_layers_are_scored_in_their_original_order(folder_of, calibration_data):
    """The first layers' inputs are the dense model's, so their scores are those of the dense layers, permuted along."""
    dense = load(folder_of("llama"))
    inputs = inputs_of(dense, calibration_data)
    pruning = WatchedCRePE(mask_structure="2:4", kernel_size=5)
    model = run(load(folder_of("llama")), [ChannelPermutationModifier(), pruning], calibration_data)
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{name}"
        rows, columns = pruning._orders[name]
        rows = torch.arange(len(dense.get_submodule(name).weight)) if rows is None else rows
        weight = dense.get_submodule(name).weight.detach()
        expected = crepe_scores(weight, inputs[name].norm(dim=0), kernel_size=5)[rows][:, columns]
        torch.testing.assert_close(pruning._seen[name], expected, rtol=1e-4, atol=1e-8)
        kept = model.get_submodule(name).weight.detach()
        assert torch.equal(kept, weight[rows][:, columns] * (kept != 0))
        assert not torch.allclose(crepe_scores(weight[rows][:, columns], inputs[name].norm(dim=0)[columns]), expected)


@pytest.mark.parametrize("variant", ["llama-attention-bias", "llama", "qwen2", "gemma3_text"])
def test_the_shipped_recipe_saves_an_ordinary_2of4_checkpoint(variant, folder_of, calibration_data, tmp_path):
    model = run(load(folder_of(variant)), str(RECIPE), calibration_data, output_dir=str(tmp_path / "out"))
    loaded = load(tmp_path / "out")
    assert type(loaded) is type(load(folder_of(variant)))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    for name, module in linears(loaded).items():
        assert is_2of4(module.weight), name


def test_the_saved_recipe_and_a_second_run_do_the_same(folder_of, calibration_data, tmp_path):
    folder = folder_of("gemma3_text")
    fields = {"rows": 20, "seed": 3, "sweeps": 2}
    first, second = (
        run(load(folder), [ChannelPermutationModifier(**fields), crepe()], calibration_data, output_dir=str(output))
        for output in (tmp_path / "first", tmp_path / "second")
    )
    third = run(load(folder), str(tmp_path / "first" / "recipe.yaml"), calibration_data)
    for one, other, again in zip(first.parameters(), second.parameters(), third.parameters(), strict=True):
        assert torch.equal(one, other) and torch.equal(one, again)


@pytest.mark.parametrize("tied", [True, False])
def test_offloaded_weights(tied, folder_of, calibration_data, tmp_path):
    folder = folder_of("llama" if tied else "llama-attention-bias")
    recipe = [ChannelPermutationModifier(), crepe()]
    offloaded = load(folder, device_map=OFFLOADED, offload_folder=tmp_path / "offload")
    run(offloaded, recipe, calibration_data, output_dir=str(tmp_path / "out"))
    expected = run(load(folder), [ChannelPermutationModifier(), crepe()], calibration_data)
    loaded = load(tmp_path / "out")
    for (name, one), (_, other) in zip(expected.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_16_bit_models(folder_of, calibration_data):
    permutation = Watched()
    model = run(load(folder_of("qwen2"), torch.bfloat16), [permutation, crepe()], calibration_data)
    for name, module in linears(model).items():
        assert module.weight.dtype == torch.bfloat16
        assert torch.equal(module.weight, permutation._after[name] * (module.weight != 0)), name


def test_other_groups_and_layers_left_dense(folder_of, calibration_data):
    """Heads of 8 channels are one group of 4:8; and where down_proj stays dense, its channels stay as well."""
    permutation = ChannelPermutationModifier()
    pruning = crepe(mask_structure="4:8", ignore=["lm_head", "re:.*down_proj"])
    model = run(load(folder_of("llama")), [permutation, pruning], calibration_data)
    assert permutation.retained.keys() == {"residual", "model.layers.0.attention", "model.layers.1.attention"}
    for name in ("model.layers.0.attention", "model.layers.1.attention"):
        assert permutation.retained[name][0] == permutation.retained[name][1]
    assert permutation.retained["residual"][0] < permutation.retained["residual"][1]
    assert bool((model.model.layers[0].mlp.gate_proj.weight.view(-1, 8) != 0).sum(1).eq(4).all())


def test_blocks_of_different_structures(folder_of, calibration_data):
    structures = {"re:.*layers.0.*": "1:4", "re:.*": "2:4"}
    with pytest.raises(ValueError, match=r"residual channels have different mask structures.*residual: false"):
        recipe = [ChannelPermutationModifier(), crepe(mask_structure=structures)]
        run(load(folder_of("llama")), recipe, calibration_data)
    permutation = ChannelPermutationModifier(residual=False)
    run(load(folder_of("llama")), [permutation, crepe(mask_structure=structures)], calibration_data)
    assert all(after >= before for before, after in permutation.retained.values())
    assert permutation.retained["model.layers.0.mlp"][0] > permutation.retained["model.layers.1.mlp"][1]


@pytest.mark.parametrize(("method", "residual"), [("dlp", False), ("uniform", True)])
def test_after_an_allocation_by_groups(method, residual, folder_of, calibration_data):
    """Blocks may have structures of their own where no channels are shared by all, and `uniform` gives all the same."""
    permutation = ChannelPermutationModifier(residual=residual)
    recipe = [SparsityAllocationModifier(method=method, sparsity=0.5), permutation, crepe(mask_structure="4:8")]
    run(load(folder_of("llama")), recipe, calibration_data)
    assert ("residual" in permutation.retained) == residual


def test_after_a_search_and_before_a_correction(folder_of, calibration_data, tmp_path):
    """The correction starts from the permuted dense weights, and the coefficients are those that were found."""
    permutation, correction, pruning = Watched(), WeightCorrectionModifier(method="pcg"), crepe()
    pho = PHOSearchModifier(candidates=3, record=str(tmp_path / "study.json"))
    model = run(load(folder_of("llama")), [pho, permutation, pruning, correction], calibration_data)
    assert pruning.value("kernel_size") == pho.chosen["kernel_size"] and pruning.value("row") == pho.chosen["row"]
    inputs = inputs_of(model, calibration_data)
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{name}"
        dense, corrected = permutation._after[name].double(), linears(model)[name].weight.detach().double()
        wanted = inputs[name] @ dense.T
        error = float((inputs[name] @ corrected.T - wanted).square().sum() / wanted.square().sum())
        assert error == pytest.approx(correction.errors[name][1], rel=1e-3)
        assert correction.errors[name][1] < correction.errors[name][0] < 0.5
        assert bool(((corrected.view(-1, 4) != 0).sum(1) == 2).all())


def test_shares_before_and_after_are_logged(folder_of, calibration_data):
    messages = []
    handler = logger.add(messages.append, level=logging.INFO)
    permutation = ChannelPermutationModifier()
    try:
        run(load(folder_of("llama")), [permutation, crepe()], calibration_data)
    finally:
        logger.remove(handler)
    (table,) = [str(message) for message in messages if "Share of the scores" in message]
    for site, (before, after) in permutation.retained.items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"{site} ")]
        assert f"{before:6.2%}" in line and f"{after:6.2%}" in line
        assert line.endswith("left as it was") == (before == after)


def quantization():
    return QuantizationModifier(targets=["Linear"], scheme="W8A8", ignore=["lm_head"])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (lambda p: [p], "needs one CRePEModifier after it in the recipe, and has none.*Put one after it"),
        (
            lambda p: [crepe(), p],
            "has CRePEModifier before it .* would undo that. Put ChannelPermutationModifier before it",
        ),
        (
            lambda p: [p, WandaPruningModifier(sparsity=0.5, mask_structure="2:4")],
            "needs one CRePEModifier after it in the recipe, and has WandaPruningModifier",
        ),
        (
            lambda p: [WandaPruningModifier(sparsity=0.5), p, crepe()],
            "has WandaPruningModifier before it .* would undo",
        ),
        (lambda p: [quantization(), p, crepe()], "has QuantizationModifier before it .* would undo"),
        (
            lambda p: [p, crepe(), crepe()],
            "needs one CRePEModifier after it in the recipe, and has CRePEModifier, CRePEModifier",
        ),
        (lambda p: [p, ChannelPermutationModifier(), crepe()], "two ChannelPermutationModifiers.*Keep one"),
        (
            lambda p: [p, PHOSearchModifier(), crepe()],
            "has PHOSearchModifier after it .* Put ChannelPermutationModifier after it",
        ),
        (
            lambda p: [p, SparsityAllocationModifier(method="uniform", sparsity=0.5), crepe(mask_structure="4:8")],
            "has SparsityAllocationModifier after it",
        ),
        (lambda p: [p, crepe(mask_structure="0:0", sparsity=0.5)], 'is unstructured: give it mask_structure: "2:4"'),
        (
            lambda p: [SparsityAllocationModifier(method="dlp", sparsity=0.5), p, crepe(mask_structure="4:8")],
            "method: dlp gives each block's N:M masks an N of its own.*residual: false",
        ),
        (lambda p: [p, crepe(mask_structure="8:16")], "o_proj has 8 channels in each head.*attention: false"),
        (
            lambda p: [ChannelPermutationModifier(mlp=False, attention=False), crepe(targets=["re:.*down_proj"])],
            "prunes no layer whose input channels.*mlp=False",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_calibration(recipe, message, folder_of, calibration_data):
    refused(load(folder_of("llama")), recipe(ChannelPermutationModifier()), calibration_data, message)


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_a_shared_epoch_is_refused(pipeline, folder_of, calibration_data):
    with pytest.raises(ValueError, match=r"epoch of its own: leave out pipeline="):
        recipe = [ChannelPermutationModifier(), crepe()]
        run(load(folder_of("llama")), recipe, calibration_data, pipeline=pipeline)


def test_families_that_are_not_in_the_tables_go_on_without(calibration_data, tiny_model_folder, tmp_path, messages):
    torch.manual_seed(0)
    config = transformers.MptConfig(vocab_size=96, d_model=32, n_heads=4, n_layers=2, max_seq_len=64)
    folder = save(AutoModelForCausalLM.from_config(config), tmp_path / "mpt", tiny_model_folder("llama"))
    model = run(load(folder), str(RECIPE), calibration_data)
    plain = run(load(folder), "crepe_2of4", calibration_data)
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    (line,) = [line for line in messages if "goes on without it" in line]
    assert "family mpt cannot be permuted" in line and "llama" in line


def test_a_module_that_the_family_does_not_have_is_named(folder_of, calibration_data, messages):
    model = load(folder_of("llama"))
    model.model.layers[1].mlp.adapter = torch.nn.Linear(16, 16)
    run(model, str(RECIPE), calibration_data)
    (line,) = [line for line in messages if "goes on without it" in line]
    assert "model.layers.1.mlp.adapter.weight is not a parameter that a model of the family llama has" in line
    assert (model.model.layers[0].mlp.up_proj.weight == 0).sum() == model.model.layers[
        0
    ].mlp.up_proj.weight.numel() // 2
    assert model.model.layers[1].mlp.adapter.weight.count_nonzero() == 256


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp": False, "attention": False, "residual": False}, "all false.*switch one on"),
        ({"sweeps": 0}, r"sweeps\n  Input should be greater than or equal to 1"),
        ({"rows": 0}, r"rows\n  Input should be greater than or equal to 1"),
        ({"down_proj": True}, "down_proj"),
    ],
)
def test_bad_fields_are_refused_with_the_field_and_the_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        ChannelPermutationModifier(**fields)
