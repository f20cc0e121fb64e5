"""A real model: pruned, saved, reloaded, scored by lm-evaluation-harness."""

import math

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from transformers import AutoModelForCausalLM, AutoTokenizer

from crepe_llm import samples
from crepe_llm.checkpoints import decompress_folder, read_folder
from crepe_llm.evaluation.zero_shot import zero_shot
from crepe_llm.recipe_files import recipe_path
from sparse_models import linears

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2 in bf16, pruned by the shipped recipe through oneshot: (model, packed folder, plain folder)."""
    root = tmp_path_factory.mktemp("smollm2")
    source = samples.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    data = samples.calibration_windows(tokenizer, samples.wikipedia().train, windows=2, length=64, seed=0)
    reset_session()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=str(recipe_path("crepe_2of4")),
        dataset=data,
        num_calibration_samples=2,
        max_seq_length=64,
        output_dir=str(root / "packed"),
    )
    decompress_folder(root / "packed", root / "plain")
    return model, root / "packed", root / "plain"


def test_reloaded_logits_are_equal_bit_for_bit(smollm2):
    model, packed, plain = smollm2
    tokenizer = AutoTokenizer.from_pretrained(packed)
    ids = tokenizer("The Vistula is the longest river in Poland.", return_tensors="pt").input_ids
    expected = model(ids).logits
    for folder in (packed, plain):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(loaded(ids).logits, expected)
    assert len(read_folder(packed).layers) == 210


def test_size_on_disk(smollm2):
    model, packed, plain = smollm2
    dense = sum(2 * module.weight.numel() for module in linears(model).values())
    checkpoint = read_folder(packed)
    stored = 0
    for layer in checkpoint.layers:
        for part, size in (("compressed", 2), ("bitmask", 1), ("shape", 8)):
            stored += size * math.prod(checkpoint.tensors[f"{layer}.{part}"].shape)
    assert dense * 0.5625 < stored <= dense * 0.5626
    before, after = ((folder / "model.safetensors").stat().st_size for folder in (plain, packed))
    print(f"SmolLM2: {before} bytes plain, {after} packed; linear layers {dense} and {stored}")
    # What else the file gains are the names of two more tensors a layer.
    assert 0 <= after - (before - dense + stored) < 300 * len(checkpoint.layers)


def test_lm_eval_scores_the_packed_folder_as_the_plain_one(smollm2):
    _, packed, plain = smollm2
    questions = {task: rows[:8] for task, rows in samples.questions().items()}
    scores = zero_shot(packed, questions, dtype="bfloat16")
    assert scores == zero_shot(plain, questions, dtype="bfloat16")
    assert scores.keys() == questions.keys() and len(scores) == 5
    for score in scores.values():
        assert score["questions"] == 8 and (8 * score["acc"]).is_integer()
        # The standard error of a mean of zeros and ones.
        assert score["acc_stderr"] == pytest.approx(math.sqrt(score["acc"] * (1 - score["acc"]) / 7))
