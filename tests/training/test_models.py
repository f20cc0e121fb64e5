"""The models of a distillation: which are taken without masks."""

import json

import pytest
import torch

from crepe_llm.training.models import masks_of


@pytest.mark.parametrize("part", [None, "text_config"])
@pytest.mark.parametrize("field", ["block_importance", "block_intermediate_sizes"])
def test_a_model_pruned_by_structure_needs_no_masks(field, part, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    config, path = {field: [1]}, tmp_path / "config.json"
    path.write_text(json.dumps({part: config} if part else config))
    assert masks_of(model, tmp_path) == {}
    path.write_text(json.dumps({"text_config": {}}))
    with pytest.raises(ValueError, match=r"is not pruned: the model has no masks"):
        masks_of(model, tmp_path)
