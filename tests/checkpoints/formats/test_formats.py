"""The registry of checkpoint formats."""

import pytest
import torch

from crepe_llm.checkpoints.formats import FORMATS, CheckpointFormat, format_of_part
from sparse_models import random_2of4


def test_names_and_parts_tell_formats_apart():
    for name, form in FORMATS.items():
        assert isinstance(form, CheckpointFormat) and form.name == name
        assert {form.values, form.pattern} < set(form.parts) and "weight" not in form.parts
        assert all(format_of_part(part) is form for part in form.parts)
    assert format_of_part("weight") is None


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_every_format_packs_and_unpacks(form):
    weight = random_2of4(6, 32, torch.float32, dropped=0)
    assert form.fits(weight) and not form.fits(torch.ones(6, 32))
    parts = form.pack(weight)
    assert tuple(parts) == form.parts
    form.validate(parts[form.pattern], (6, 32))
    assert torch.equal(form.unpack(parts).view(torch.int32), weight.view(torch.int32))
