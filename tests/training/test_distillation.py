"""Recovery by distillation: masks bit for bit, a loss that falls, the same result after a kill, and what is refused."""

import itertools
import json
import math
import os
import shutil

import pytest
import torch
import yaml
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer, BartConfig, GPT2Config, LlamaConfig, OPTConfig, Trainer

from crepe_llm.checkpoints.converting import pack_folder
from crepe_llm.checkpoints.leftovers import claimed
from crepe_llm.checkpoints.reading import read_config, read_folder
from crepe_llm.functional.bitmask import pack_bits, unpack_bits
from crepe_llm.models import per_block
from crepe_llm.models.ffn import cut, find_ffns
from crepe_llm.samples.windows import token_windows
from crepe_llm.training import distillation
from crepe_llm.training.distillation import DistillationSettings, distill
from crepe_llm.training.loop import DivergedError, Plan
from crepe_llm.training.lora import add_updates, merge_updates
from crepe_llm.training.masked import find_masks
from sparse_models import linears, prune_2of4
from tiny_models import letters_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog. " * 60
LENGTH = 32


def config(family="llama", **fields):
    if family == "gpt2":
        return GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    if family in ("opt", "bart"):  # which call the decoder in their body, not the body
        kind = {"opt": OPTConfig, "bart": BartConfig}[family]
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
        ffn = {
            "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
            "bart": {"decoder_ffn_dim": 64, "encoder_ffn_dim": 64},
        }
        return kind(vocab_size=96, init_std=0.2, **sizes, **ffn[family])
    return LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
        }
        | fields
    )


def save(model, folder, bos=True):
    model.save_pretrained(folder)
    letters_tokenizer(bos).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A function: family -> folder of a small dense model."""
    folders = {}

    def make(family="llama"):
        if family not in folders:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("dense") / family
            folders[family] = save(AutoModelForCausalLM.from_config(config(family)), folder)
        return folders[family]

    return make


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    """A packed 2:4 folder with kept weights that are zero, in bf16."""
    folder = tmp_path_factory.mktemp("packed")
    model = AutoModelForCausalLM.from_pretrained(dense(), dtype=torch.bfloat16)
    masks = prune_2of4(model)
    for name, module in linears(model).items():
        row, column = masks[name].nonzero()[5].tolist()
        with torch.no_grad():
            module.weight[row, column] = 0
    save(model, folder)
    pack_folder(folder, {name: pack_bits(mask) for name, mask in masks.items()})
    (folder / "recipe.yaml").write_text("a_stage: {}\n")
    return folder


def windows(tokenizer, count=40):
    return token_windows(tokenizer, [TEXT], LENGTH, tokens=count * LENGTH)


def run(source, teacher, tmp_path, name="out", windows=windows, **options):
    destination = tmp_path / name
    destination.mkdir(exist_ok=True)
    settings = {"learning_rate": 1e-2, "batch": 4, "tokens": 24 * 4 * LENGTH, "warmup": 2, "precision": "fp32"}
    settings = DistillationSettings(**(settings | options))
    return distill(source, destination, tmp_path / f"{name}-work", teacher, windows, settings)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def bits(folder):
    checkpoint = read_folder(folder)
    return {name: checkpoint.load(f"{name}.bitmask") for name in checkpoint.layers}


def assert_same_masks(one, other):
    ours, theirs = bits(one), bits(other)
    assert ours.keys() == theirs.keys() and len(ours) == 14
    for name, mask in ours.items():
        assert torch.equal(mask, theirs[name]), name


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_weights_learn_and_masks_stay_bit_for_bit(method, precision, dense, packed, tmp_path):
    result = run(
        packed, dense(), tmp_path, method=method, precision=precision, **({"rank": 4} if method == "lora" else {})
    )
    out = tmp_path / "out"
    losses = [loss for _, loss in result.trained.held_out]
    assert min(losses) < (0.6 if method == "full" else 0.8) * losses[0]
    assert result.trained.steps == 24 and result.tokens == 24 * 4 * LENGTH
    assert (result.windows, result.held_out, result.length) == (36, 4, LENGTH)
    kept = sum(int(unpack_bits(mask, 8 * mask.shape[1]).sum()) for mask in bits(packed).values())
    assert result.masked == (kept, 2 * kept)
    assert_same_masks(out, packed)
    assert read_config(out)["dtype"] == read_config(packed)["dtype"] == "bfloat16"
    before, after = weights(packed), weights(out)
    for name in before:
        trained = "embed" not in name and "lm_head" not in name
        assert torch.equal(before[name], after[name]) != trained, name
    assert {"recipe.yaml", "tokenizer.json", "generation_config.json"} <= {path.name for path in out.iterdir()}
    assert (out / "tokenizer.json").read_bytes() == (packed / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out-work").exists()


def test_a_generation_config_that_transformers_refuses_to_save_is_mended(dense, packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "packed")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    run(folder, dense(), tmp_path, method="full")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["do_sample"]) == (0.6, True)


def test_another_pruned_model_is_no_teacher(dense, packed, tmp_path):
    sibling = shutil.copytree(packed, tmp_path / "sibling")
    with pytest.raises(
        ValueError, match=r"sibling was pruned itself: its config.json has a sparsity_config\. Give the"
    ):
        run(packed, sibling, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(dense())
    layers = linears(plain)
    with torch.no_grad():
        first, second = (
            layers[name].weight for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
        )
        first *= torch.rand(first.shape) > 0.11  # as many zeros as one dequantised from 4 bit has
        second.zero_()
    taught = save(plain, tmp_path / "plain")
    run(packed, taught, tmp_path, tokens=8 * 4 * LENGTH)
    with torch.no_grad():
        second.normal_()[::2] = 0
    with pytest.raises(ValueError, match=r"plain was pruned itself: 50% of model.layers.1.mlp.up_proj are zeros"):
        run(packed, save(plain, taught), tmp_path, "again")
    assert not (tmp_path / "again-work").exists()


def test_what_tells_of_the_pruned_weights_is_not_copied(dense, packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "packed")
    about = ("README.md", "report.html", "recovery.json", "loss.png", "sparsity.png", "losses.png")
    for name in (*about, "notes.txt"):
        (folder / name).write_text("of the pruned model")
    shutil.copytree(dense(), folder / "backup" / "dense")
    (folder / "code").mkdir()
    (folder / "code" / "made.py").write_text("")
    run(folder, dense(), tmp_path, tokens=8 * 4 * LENGTH)
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"notes.txt", "code", "recipe.yaml"} <= copied and not copied & {*about, "backup"}


def test_the_pruned_model_is_no_teacher_and_needs_a_tokenizer(dense, packed, tmp_path):
    with pytest.raises(ValueError, match="is the pruned model itself: give the dense model"):
        run(packed, packed, tmp_path)
    folder = shutil.copytree(packed, tmp_path / "packed")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"packed has no tokenizer that transformers can load .*: put the files"):
        run(folder, dense(), tmp_path)


def test_the_state_that_is_written_is_the_best(dense, packed, tmp_path):
    """Its held-out loss, computed anew in one piece, is the lowest of the report."""
    result = run(packed, dense(), tmp_path, patience=50, evaluations=24, learning_rate=3e-2)
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (dense(), tmp_path / "out")
    )
    ids = windows(AutoTokenizer.from_pretrained(packed))[-4:]
    with torch.no_grad():
        p, q = (torch.log_softmax(model(input_ids=ids).logits[:, :-1], -1) for model in (teacher, student))
    loss = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item() / (4 * (LENGTH - 1))
    # The folder is in bf16, the trained state in fp32.
    assert loss == pytest.approx(min(loss for _, loss in result.trained.held_out), rel=0.05)


def test_lora_updates_are_of_their_rank_under_the_mask(dense, packed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    masks = find_masks(model)
    plain = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    add_updates(model, masks, 3)
    for name, parameter in model.named_parameters():
        if name.endswith((".up", ".down")):
            torch.nn.init.normal_(parameter)
    ids = windows(AutoTokenizer.from_pretrained(packed))[:2]
    with torch.no_grad():
        trained = model(input_ids=ids).logits
    before = {name: module.weight.detach().clone() for name, module in linears(plain).items()}
    merge_updates(plain, masks, dict(model.named_parameters()))
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, trained)
    for name, module in linears(plain).items():
        keep = unpack_bits(masks[name], module.weight.shape[1])
        up, down = (model.get_parameter(f"{name}.parametrizations.weight.0.{part}") for part in ("up", "down"))
        torch.testing.assert_close(module.weight - before[name], 2 * (up @ down) * keep, rtol=1e-4, atol=1e-4)


def test_gradients_of_lora_are_those_of_autograd():
    keep = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    layer = torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False))
    weight = layer[0].weight.detach().clone()
    add_updates(layer, {"0": pack_bits(keep)}, 2)
    update = layer[0].parametrizations.weight[0]
    torch.nn.init.normal_(update.up)
    x = torch.randn(4, 16)
    found = torch.autograd.grad(layer(x).square().sum(), [update.up, update.down])
    wanted = torch.autograd.grad(
        (x @ (weight + 2 * keep * (update.up @ update.down)).T).square().sum(), [update.up, update.down]
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def interrupted_at(monkeypatch, number):
    """Make the training step of this number, counted over all runs, a kill; gives the list of calls."""
    step, calls = Trainer.training_step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    return calls


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 8, "cross_entropy": 0.2},
        {"method": "lora", "micro_batch": 2},
        {"evaluations": 2},  # so that the checkpoint is of a step without an evaluation
    ],
)
def test_a_kill_and_a_resume_give_the_same_weights(options, dense, packed, tmp_path, monkeypatch):
    straight = run(packed, dense(), tmp_path, "straight", **options)
    calls = interrupted_at(monkeypatch, 17 * (2 if "micro_batch" in options else 1))
    with pytest.raises(KeyboardInterrupt):
        run(packed, dense(), tmp_path, "resumed", **options)
    with pytest.raises(ValueError, match="an interrupted recovery with other settings"):
        run(packed, dense(), tmp_path, "resumed", **options, seed=1)
    # What a kill in the middle of writing a checkpoint leaves.
    for number, state in ((900, None), (901, '{"global_step": 9')):
        (tmp_path / "resumed-work" / f"checkpoint-{number}").mkdir()
        if state:
            (tmp_path / "resumed-work" / f"checkpoint-{number}" / "trainer_state.json").write_text(state)
    resumed = run(packed, dense(), tmp_path, "resumed", **options)
    assert len(calls) < 2 * 24 * (2 if "micro_batch" in options else 1)  # not from the start again
    assert resumed.trained.held_out == straight.trained.held_out
    assert resumed.trained.losses == straight.trained.losses
    one, other = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_gradient_checkpointing_and_micro_batches_change_nothing_but_rounding(dense, packed, tmp_path):
    plain = run(packed, dense(), tmp_path, "plain", tokens=6 * 4 * LENGTH)
    other = run(packed, dense(), tmp_path, "other", tokens=6 * 4 * LENGTH, gradient_checkpointing=True, micro_batch=1)
    torch.testing.assert_close(plain.trained.losses, other.trained.losses, rtol=1e-3, atol=1e-4)


def test_embeddings_train_on_request(dense, packed, tmp_path):
    run(packed, dense(), tmp_path, tokens=8 * 4 * LENGTH, embeddings=True)
    before, after = weights(packed), weights(tmp_path / "out")
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert_same_masks(tmp_path / "out", packed)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_pruned_head_that_trains_keeps_its_mask(method, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(tie_word_embeddings=False))
    teacher = save(model, tmp_path / "dense")
    prune_2of4(model)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[:, ::2] = 0
    before = head.detach().clone()
    source = save(model, tmp_path / "pruned")
    run(source, teacher, tmp_path, method=method, embeddings=True, tokens=8 * 4 * LENGTH)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_output_embeddings().weight
    assert not after[:, ::2].any() and not torch.equal(after, before)


def test_weights_that_are_no_numbers_are_not_written(dense, packed, tmp_path):
    """Where nothing is held out, no loss is taken after the last step."""
    with pytest.raises(DivergedError, match=r"holds NaN or infinity after 1 steps: .*none is written"):
        run(packed, dense(), tmp_path, held_out=0, learning_rate=1e39, tokens=4 * LENGTH, warmup=0)
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "out-work").exists()


def test_after_weights_too_large_for_fp16_a_lower_rate_may_follow(dense, packed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float16)
    model.config.quantization_config = None
    source = save(model, tmp_path / "half")
    with pytest.raises(ValueError, match=r"what \S+ has learnt is too large for torch.float16: take a lower learning"):
        run(source, dense(), tmp_path, held_out=0, learning_rate=1e5, tokens=4 * LENGTH, warmup=0)
    run(source, dense(), tmp_path, held_out=0, tokens=4 * LENGTH)


def test_a_loss_that_is_no_number_at_the_start_leaves_nothing(dense, packed, tmp_path, monkeypatch):
    """The teacher's text is there by then, which other settings would be refused for."""
    with monkeypatch.context() as patch:
        patch.setattr(distillation._Loss, "__call__", lambda self, model, inputs: torch.tensor(math.nan))
        patch.setattr(distillation._Run, "_estimate", lambda self, plan: None)
        with pytest.raises(DivergedError, match=r"is nan before any training: .* are no numbers.*none is written"):
            run(packed, dense(), tmp_path, windows=None, self_generated=24 * LENGTH, length=LENGTH)
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "out-work").exists()


def test_a_budget_of_minutes(dense, packed, tmp_path, capsys):
    result = run(packed, dense(), tmp_path, tokens=None, minutes=0.1, evaluations=3, patience=99)
    assert 0.5 < result.trained.seconds <= 12 and result.trained.steps > 1
    assert 2 <= len(result.trained.held_out) <= 5
    assert "0.1 minutes, about" in capsys.readouterr().out


def test_the_estimate_comes_before(dense, packed, tmp_path, capsys):
    run(packed, dense(), tmp_path, tokens=8 * 4 * LENGTH)
    assert (
        f"s for a step of {4 * LENGTH} tokens; 8 steps, {8 * 4 * LENGTH:,} tokens, about 0" in capsys.readouterr().out
    )


@pytest.mark.parametrize("with_text", [False, True])
def test_text_that_the_teacher_writes(with_text, dense, packed, tmp_path):
    options = {"self_generated": 24 * LENGTH, "length": LENGTH}
    result = run(packed, dense(), tmp_path, windows=windows if with_text else None, **options)
    assert result.windows + result.held_out == 24 + (40 if with_text else 0)
    losses = [loss for _, loss in result.trained.held_out]
    assert min(losses) < 0.8 * losses[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bart"])
def test_unstructured_masks_stay(family, dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense(family))
    layers = [
        m
        for n, m in model.named_modules()
        if getattr(m, "weight", None) is not None
        and m.weight.dim() == 2
        and not isinstance(m, torch.nn.Embedding)
        and n != "lm_head"
    ]
    for index, module in enumerate(layers):
        with torch.no_grad():
            # One layer is pruned so little that its zeros alone would not tell.
            module.weight *= torch.rand(module.weight.shape) > (0.1 if index == 2 else 0.6)
    source = save(model, tmp_path / "sparse")
    result = run(source, dense(family), tmp_path)
    losses = [loss for _, loss in result.trained.held_out]
    assert min(losses) < 0.8 * losses[0]
    before, after = weights(source), weights(tmp_path / "out")
    for name in before:
        if before[name].dim() == 2 and "w" in name and "embed" not in name and "wte" not in name and "wpe" not in name:
            if "lm_head" in name:
                continue
            assert torch.equal(before[name] == 0, after[name] == 0), name


def test_structured_models_learn_from_the_dense_one(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense())
    for ffn, width in zip(find_ffns(model), (24, 40), strict=True):
        cut(ffn, torch.arange(width))
    model.config.block_importance = [0.1, 0.3]
    per_block.convert(model, [24, 40])
    source = save(model, tmp_path / "cut")
    for method in ("full", "lora"):
        result = run(source, dense(), tmp_path, method, method=method)
        losses = [loss for _, loss in result.trained.held_out]
        assert min(losses) < 0.8 * losses[0]
        again = AutoModelForCausalLM.from_pretrained(tmp_path / method)
        assert [ffn.width for ffn in find_ffns(again)] == [24, 40]


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8", "masked GPTQ"])
def test_what_comes_out_quantizes_without_losing_its_mask(scheme, dense, packed, tmp_path, calibration_data):
    run(packed, dense(), tmp_path, tokens=8 * 4 * LENGTH)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    fields = {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": scheme}
    modifier = {"QuantizationModifier": fields}
    if scheme == "masked GPTQ":
        modifier = {"MaskedGPTQModifier": fields | {"scheme": "W8A8"}}
    recipe = {"a_stage": {"a_modifiers": modifier | {"SparseCheckpointModifier": {}}}}
    oneshot(model=model, recipe=yaml.safe_dump(recipe), dataset=calibration_data, num_calibration_samples=12)
    model.save_pretrained(tmp_path / "quantized")
    assert_same_masks(tmp_path / "quantized", packed)


def test_it_stops_when_held_out_text_gets_worse(dense, packed, tmp_path):
    few = lambda tokenizer: windows(tokenizer, 12)  # noqa: E731
    result = run(
        packed, dense(), tmp_path, windows=few, tokens=10**6, evaluations=2000, patience=2, held_out=4,
        learning_rate=2e-2,
    )  # fmt: skip
    assert result.trained.ended.startswith("2 evaluations in a row")
    best = min(result.trained.held_out, key=lambda evaluation: evaluation[1])
    assert result.trained.best_step == best[0] == result.trained.held_out[-3][0]


def test_divergence_is_told_and_the_best_state_kept(dense, packed, tmp_path, monkeypatch):
    with pytest.raises(DivergedError, match=r"diverges at a learning rate of 50.*none is written"):
        run(packed, dense(), tmp_path, "a", learning_rate=50.0, warmup=0)
    assert not list((tmp_path / "a").iterdir()) and not (tmp_path / "a-work").exists()
    # A learning rate that explodes in the middle: what was best until then is written.
    rate = Plan.rate
    monkeypatch.setattr(Plan, "rate", lambda plan, step, seconds: 1e5 if step > 14 else rate(plan, step, seconds))
    with pytest.raises(DivergedError, match=r"The best state, that of step \d+, is written"):
        run(packed, dense(), tmp_path, "b")
    assert_same_masks(tmp_path / "b", packed)
    assert not torch.equal(weights(packed)["model.norm.weight"], weights(tmp_path / "b")["model.norm.weight"])


def test_no_number_is_a_divergence(dense, packed, tmp_path, monkeypatch):
    losses = itertools.count()
    call = distillation._Loss.__call__

    def broken(self, model, inputs):
        loss = call(self, model, inputs)
        return loss * (math.nan if model.training and next(losses) > 9 else 1)

    monkeypatch.setattr(distillation._Loss, "__call__", broken)
    with pytest.raises(DivergedError, match=r"the loss of step \d+ is nan.*The best state"):
        run(packed, dense(), tmp_path, evaluations=24)
    assert_same_masks(tmp_path / "out", packed)


@pytest.mark.parametrize(
    ("rate", "cure"),
    [
        ({"learning_rate": 1.3e-2}, "lower learning rate than 0.013"),
        ({"learning_rate": None, "relative_rate": 0.06}, "lower relative rate than 0.06"),
    ],
)
def test_no_better_state_is_an_error(rate, cure, dense, packed, tmp_path):
    with pytest.raises(ValueError, match=rf"no state was better than .* itself, whose held-out loss is 0\.\d+.*{cure}"):
        run(dense_and_zero(dense, tmp_path), dense(), tmp_path, tokens=4 * LENGTH, warmup=0, **rate)
    # A run with other settings, as the error asks for, is not refused for the state of this one.
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "out-work").exists()


def dense_and_zero(dense, tmp_path):
    """A sparse model that predicts nearly as the dense one, so that a large step can only make it worse."""
    model = AutoModelForCausalLM.from_pretrained(dense())
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight *= torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    return save(model, tmp_path / "nearly")


def test_what_does_not_belong_together_is_refused_before_any_work(dense, packed, tmp_path):
    def refused(match, source=packed, teacher=None, **options):
        with pytest.raises(ValueError, match=match):
            run(source, teacher or dense(), tmp_path, **options)
        assert not (tmp_path / "out-work").exists()

    torch.manual_seed(1)
    stranger = save(AutoModelForCausalLM.from_config(config()), tmp_path / "stranger")
    refused(r"is not the parent of .* inner products of embeddings.* differ by \d+%", teacher=stranger)
    wide = save(AutoModelForCausalLM.from_config(config(hidden_size=48)), tmp_path / "wide")
    refused("its hidden_size is 48, the model's is 32", teacher=wide)
    deep = save(AutoModelForCausalLM.from_config(config(num_hidden_layers=3)), tmp_path / "deep")
    refused("its num_hidden_layers is 3, the model's is 2", teacher=deep)
    refused("its model_type is gpt2, the model's is llama", teacher=dense("gpt2"))
    larger = save(AutoModelForCausalLM.from_config(config(vocab_size=128)), tmp_path / "larger")
    refused("its vocab_size is 128, the model's is 96", teacher=larger)
    other = AutoModelForCausalLM.from_pretrained(dense())
    other.save_pretrained(tmp_path / "other")
    tokenizer = letters_tokenizer(True)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "other")
    refused("another vocabulary than .*: 96 tokens, not 95|another vocabulary", teacher=tmp_path / "other")
    letters_tokenizer(False).save_pretrained(tmp_path / "other")
    refused("another tokenizer than .*: they cut the same text differently", teacher=tmp_path / "other")
    refused(r"is not pruned: the model has no masks", source=dense())
    refused("less than one window", windows=lambda tokenizer: token_windows(tokenizer, ["short"], LENGTH))
    refused("exceeds the model's context of 64", windows=lambda tokenizer: token_windows(tokenizer, [TEXT], 65))
    refused("holds 4 windows of 32 tokens: too few for held_out=1", windows=lambda tokenizer: windows(tokenizer, 4))
    refused(
        r"self_generated=128 is 4 windows of 32 tokens: too few for held_out=1 .*batch=4. Give more tokens",
        windows=None, self_generated=4 * LENGTH, length=LENGTH,
    )  # fmt: skip
    refused(
        "the window of 65 tokens exceeds the model's context of 64", windows=None, self_generated=80 * 65, length=65
    )
    refused("batch=4 is not a multiple of micro_batch=3", micro_batch=3)
    for broken in ("source", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(packed if broken == "source" else dense(), dtype=torch.float32)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] = math.nan
        model.config.quantization_config = None
        folder = save(model, tmp_path / f"broken-{broken}")
        refused(r"broken-.*: model.layers.1.mlp.up_proj.weight holds NaN or infinity", **{broken: folder})
    refused("there is nothing to train on", windows=None)
    refused("absent is not a folder with a model", source=tmp_path / "absent")


def test_folders_of_others_are_left_alone(dense, packed, tmp_path):
    work, out = tmp_path / "out-work", tmp_path / "out"
    with claimed(work), pytest.raises(BlockingIOError, match=rf"out-work is in use by process {os.getpid()} on"):
        run(packed, dense(), tmp_path)
    (work / "precious.txt").touch()
    with pytest.raises(ValueError, match="out-work is no folder of an interrupted recovery, and would be removed"):
        run(packed, dense(), tmp_path)
    assert (work / "precious.txt").exists()
    (out / "old.safetensors").touch()
    with pytest.raises(ValueError, match="out is not empty: give a new folder"):
        distill(packed, out, tmp_path / "other", dense(), windows)


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": -1},
        {"seed": 1 << 32},
        {"rank": 8},
        {"relative_rate": 1e-3, "learning_rate": 1e-4},
        {"relative_rate": 1e-3, "method": "lora"},
        {"top_k": 8, "cross_entropy": 1},
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"tokens": 0},
        {"minutes": -1},
        {"tokens": 1, "minutes": 1},
        {"batch": 0},
        {"cross_entropy": 1.5},
        {"top_k": -1},
        {"held_out": -1},
        {"patience": 0},
        {"method": "adapters"},
        {"precision": "fp16"},
        {"optimizer_state": "2bit"},
        {"rank": 0},
        {"length": 1},
    ],
)
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match="=".join(map(str, [next(iter(fields)), ""])).rstrip("=")):
        DistillationSettings(**fields)


def test_a_relative_rate_moves_each_parameter_by_a_share_of_its_size(packed, dense, tmp_path):
    # AdamW's first step is its learning rate for every weight with a gradient, whatever the gradient's size.
    run(packed, dense(), tmp_path, learning_rate=None, relative_rate=0.01, tokens=4 * LENGTH, warmup=0, held_out=0)
    before, after, masks = weights(packed), weights(tmp_path / "out"), bits(packed)
    for name, mask in masks.items():
        old, new = before[f"{name}.weight"], after[f"{name}.weight"]
        moved = (new - old).abs()[unpack_bits(mask, old.shape[1])]
        size = old[old != 0].square().mean().sqrt()
        # The folder is bf16: a step is rounded to it.
        assert moved.median() == pytest.approx(0.01 * size.item(), rel=0.2), name
    norm = "model.norm.weight"
    assert (after[norm] - before[norm]).abs().median() == pytest.approx(0.01, rel=0.5)


def test_which_rate_a_method_takes():
    assert DistillationSettings().is_relative and DistillationSettings().rate == DistillationSettings().relative_rate
    absolute = DistillationSettings(learning_rate=1e-4)
    assert not absolute.is_relative and absolute.rate == 1e-4
    assert not DistillationSettings(method="lora").is_relative
    with pytest.raises(ValueError, match="relative_rate=0 must be positive"):
        DistillationSettings(relative_rate=0)
