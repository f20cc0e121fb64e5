"""The models of a distillation: which are taken without masks."""

import json

import pytest
import torch

from crepe_llm.training.models import masks_of, refuse_quantized


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


@pytest.mark.parametrize(
    ("field", "said"), [("config_groups", "is quantized"), ("transform_config", "rotates its inputs")]
)
def test_what_training_would_undo_is_refused(field, said, tmp_path):
    groups = {"group_0": {}}
    content = {field: groups if field == "config_groups" else {"config_groups": groups}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": content}))
    with pytest.raises(ValueError, match=said):
        refuse_quantized(tmp_path)
