"""Which 4-bit weights are zero: of every code and zero point, whatever shape and order they are stored in."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

from crepe_llm.checkpoints import FormatError, read_folder
from crepe_llm.checkpoints.int4 import int4_kept

NAME = "a.weight_packed"


def stored(folder, codes, **parts):
    """A checkpoint of one layer: codes from -8 to 7, and what else it has, as compressed-tensors stores it."""
    tensors = {
        "weight_packed": pack_to_int32(codes, 4),
        "weight_shape": torch.tensor(codes.shape),
        "weight_scale": torch.ones(len(codes), 1),
    }
    save_file(
        {f"a.{name}": part.contiguous() for name, part in (tensors | parts).items()}, folder / "model.safetensors"
    )
    return read_folder(folder)


def random_codes(*shape):
    return torch.randint(-8, 8, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 20])
@pytest.mark.parametrize("groups", [None, 1, 2, 4])
@pytest.mark.parametrize("ordered", [True, False])
def test_zeros_are_the_zero_points(rows, groups, ordered, tmp_path):
    """Eight rows' zero points share a word: with eight rows or fewer there is one word a group."""
    codes, parts = random_codes(rows, 32), {}
    expected = codes != 0
    if groups is not None:
        zeros = random_codes(rows, groups).roll(1, 0)
        group = torch.arange(groups).repeat_interleave(32 // groups)
        if not ordered:
            group = group[torch.randperm(32, generator=torch.Generator().manual_seed(1))]
            parts["weight_g_idx"] = group.int()
        parts["weight_zero_point"] = pack_to_int32(zeros, 4, packed_dim=0)
        expected = codes != zeros[:, group]
    assert torch.equal(int4_kept(stored(tmp_path, codes, **parts), NAME), expected)


@pytest.mark.parametrize("shape", [[4, 32, 1], [4], [0, 32], [-4, 32], [4.0, 32.0]])
def test_a_shape_that_is_none_is_named(shape, tmp_path):
    checkpoint = stored(tmp_path, random_codes(4, 32), weight_shape=torch.tensor(shape))
    with pytest.raises(FormatError, match=r"model\.safetensors: tensor a\.weight_shape holds \["):
        int4_kept(checkpoint, NAME)


@pytest.mark.parametrize("groups", [[0] * 31, [2] * 32, [-1] * 32])
def test_groups_that_are_not_there_say_nothing(groups, tmp_path):
    parts = {
        "weight_zero_point": pack_to_int32(random_codes(8, 2), 4, packed_dim=0),
        "weight_g_idx": torch.tensor(groups),
    }
    assert int4_kept(stored(tmp_path, random_codes(8, 32), **parts), NAME) is None
