"""Runs recipes in the processes that torchrun starts, or in one: MODEL_FOLDER OUTPUT_FOLDER, for test_processes.py.

Each run writes OUTPUT_FOLDER/NAME.pt (weights, masks and notes of the first process) or NAME.txt (why it was refused).
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from crepe_llm import processes
from crepe_llm.pruning.layer import recorded_masks
from crepe_llm.recipe_files import recipe_path, shipped_recipes
from leaving import leave

VOCABULARY, ROWS, LENGTH = 96, 64, 32
# What searches in two processes is in tests/modifiers/test_pho_processes.py, with a small budget.
SHIPPED = [name for name in shipped_recipes() if name != "crepe_2of4_pho"]
MEASURED = """
a_stage:
  pruning_modifiers:
    SparsityAllocationModifier: {method: atp, sparsity: 0.6, spread: measured}
    CRePEModifier: {comparison_group: row}
"""
REFUSED = {
    "sparsegpt": "a_stage:\n  pruning_modifiers:\n    SparseGPTModifier: {sparsity: 0.5, targets: [Linear]}\n"
    "    SparseCheckpointModifier: {}\n",
    "smoothquant": "a_stage:\n  some_modifiers:\n    SmoothQuantModifier: {smoothing_strength: 0.5}\n"
    "    CRePEModifier: {mask_structure: '2:4'}\n",
}


def data():
    """Windows of tokens, the first of them padded."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(ROWS, LENGTH, generator=generator) * (VOCABULARY - 4) + 3
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, 10:] = 0
    return Dataset.from_dict({"input_ids": drawn.long().tolist(), "attention_mask": mask.tolist()})


def run(folder, recipe, rows=ROWS, **options):
    """The model after a recipe."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fields = {"num_calibration_samples": rows, "shuffle_calibration_samples": False, "batch_size": 2}
    oneshot(model=model, recipe=recipe, dataset=data().select(range(rows)), tokenizer=str(folder), **fields | options)
    return model


def runs():
    """By name a model, a recipe and what else oneshot is given."""
    found = {name: ("llama", name, {}) for name in SHIPPED}
    leaving = recipe_path("crepe_2of4_dsnot").read_text().replace("row: 1.0", "uncalibrated: dense\n      row: 1.0")
    found["experts"] = ("mixtral", leaving, {"moe_calibrate_all_experts": False})
    found["all experts"] = ("mixtral", "crepe_2of4", {})
    found["measured"] = ("llama", MEASURED, {})
    found["half"] = ("llama", "crepe_2of4", {"rows": ROWS // 2})
    found["shuffled"] = ("llama", "wanda_2of4", {"shuffle_calibration_samples": True})
    return found


def main(folder, output):
    processes.start()
    for name, (family, recipe, options) in runs().items():
        torch.manual_seed(processes.rank())  # what is drawn must not depend on it
        model = run(Path(folder) / family, recipe, **options)
        if processes.is_first():
            weights = {key: value.clone() for key, value in model.state_dict().items()}
            torch.save({"weights": weights, "masks": recorded_masks(model)}, Path(output) / f"{name}.pt")
    if processes.count() == 1:
        return
    for name, recipe in REFUSED.items():
        try:
            run(Path(folder) / "llama", recipe)
        except ValueError as error:
            if processes.is_first():
                (Path(output) / f"{name}.txt").write_text(str(error))
    run(Path(folder) / "llama", "crepe_2of4", output_dir=str(Path(output) / "saved"))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
