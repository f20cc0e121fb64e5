"""What the pipeline keeps of batches: equal tensors once, and nothing else changed."""

from contextlib import nullcontext

import pytest
import torch
from llmcompressor.pipelines.cache import IntermediatesCache

from crepe_llm.calibration.kept_values import equal_values_are_held_once
from modifier_helpers import crepe, load, run


def test_equal_tensors_are_held_once():
    mask, angles = torch.ones(1, 1, 4, 4), (torch.zeros(1, 4, 2), torch.ones(1, 4, 2))
    cache = IntermediatesCache.empty(3, torch.device("cpu"))
    hidden = [torch.zeros(1, 4, 8), torch.ones(1, 4, 8), torch.zeros(1, 4, 8)]
    values = [
        {"mask": mask.clone(), "angles": tuple(a.clone() for a in angles), "hidden": given} for given in hidden[:2]
    ]
    values.append({"mask": mask.tril(), "angles": (angles[0].half(), angles[1][:, :2]), "hidden": hidden[2]})
    with equal_values_are_held_once():
        for number, given in enumerate(values):
            cache.update(number, given)
    first, second, third = (cache.fetch(number) for number in range(3))
    assert second["mask"] is first["mask"] and second["angles"][1] is first["angles"][1]
    assert second["hidden"] is not first["hidden"] and third["hidden"] is first["hidden"]
    assert third["mask"] is not first["mask"] and third["angles"][0] is not first["angles"][0]
    for number, given in enumerate(values):
        found = cache.fetch(number)
        assert torch.equal(found["mask"], given["mask"]) and torch.equal(found["hidden"], given["hidden"])
        assert all(map(torch.equal, found["angles"], given["angles"]))
    before = IntermediatesCache.update
    with equal_values_are_held_once():
        assert IntermediatesCache.update is not before
    assert IntermediatesCache.update is before


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_recipes_hold_masks_once(family, tiny_model_folder, calibration_data, monkeypatch):
    """Of all batches with the same padding, and with the weights that separate masks give."""
    masks = set()
    fetch = IntermediatesCache.fetch

    def watch(self, *args, **kwargs):
        found = fetch(self, *args, **kwargs)
        tensors = [value for value in found.values() if isinstance(value, torch.Tensor)]
        masks.update(tensor.data_ptr() for tensor in tensors if tensor.dim() == 4)
        return found

    monkeypatch.setattr(IntermediatesCache, "fetch", watch)
    rows = calibration_data.map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})
    assert len(rows) > 4
    model = run(load(tiny_model_folder(family)), [crepe()], rows)
    assert 0 < len(masks) <= 2  # Gemma has one for sliding windows, too
    monkeypatch.undo()
    monkeypatch.setattr("crepe_llm.oneshot.checked.equal_values_are_held_once", nullcontext)
    apart = run(load(tiny_model_folder(family)), [crepe()], rows)
    for one, other in zip(model.parameters(), apart.parameters(), strict=True):
        assert torch.equal(one, other)
