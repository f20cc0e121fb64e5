"""Bits of masks against loops over columns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm.functional import bitmask
from crepe_llm.functional.bitmask import kept_columns, pack_bits, unpack_bits, wrong_byte, zero_pruned_


def random_two_of_four(rows, columns, seed):
    scores = torch.rand(rows, columns // 4, 4, generator=torch.Generator().manual_seed(seed))
    return (scores.argsort(-1) < 2).view(rows, columns)


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_pack_and_unpack_any_mask(rows, columns, seed):
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_bits(keep)
    assert bits.shape == (rows, -(-columns // 8)) and bits.dtype == torch.uint8
    for row in range(rows):
        for column in range(8 * bits.shape[1]):
            kept = column < columns and bool(keep[row, column])
            assert int(bits[row, column // 8]) >> column % 8 & 1 == kept
    assert torch.equal(unpack_bits(bits, columns), keep)
    assert torch.equal(pack_bits(keep.t().contiguous().t()), bits)


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 5), groups=st.integers(1, 10), seed=st.integers(0, 2**31))
def test_kept_columns_are_those_of_the_mask(rows, groups, seed):
    keep = random_two_of_four(rows, 4 * groups, seed)
    bits = pack_bits(keep)
    assert wrong_byte(bits, 4 * groups) is None
    columns = kept_columns(bits, 4 * groups)
    for row in range(rows):
        for group in range(groups):
            assert columns[row, group].tolist() == [c for c in range(4) if keep[row, 4 * group + c]]


def test_every_byte_that_is_not_two_of_four_is_wrong():
    for columns in (8, 4):
        for byte in range(256):
            good = (byte & 15).bit_count() == 2 and (byte >> 4).bit_count() == (2 if columns == 8 else 0)
            bits = torch.tensor([[0b0011_0011 if columns == 8 else 0b0011], [byte]], dtype=torch.uint8)
            assert wrong_byte(bits, columns) == (None if good else (1, 0))


def test_the_first_wrong_byte_of_many_rows_is_named():
    bits = pack_bits(random_two_of_four(3000, 8192, 0))
    assert wrong_byte(bits, 8192) is None
    bits[2900, 1023] = 0b0111_0011
    bits[2500, 7] = 0
    bits[2500, 9] = 0
    assert wrong_byte(bits, 8192) == (2500, 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(300, 577), (3, 8), (5, 3), (4, 6, 20), (0, 16), (0, 6, 20)])
def test_entries_outside_the_mask_become_zero_whatever_they_are(shape, dtype, monkeypatch):
    monkeypatch.setattr(bitmask, "_BLOCK_ENTRIES", 1000)
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(shape, generator=generator) < 0.5
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < 0.1] = float("nan")
    weight[torch.rand(shape, generator=generator) < 0.1] = -0.0
    weight = weight.to(dtype)
    expected = torch.where(keep, weight.float(), 0.0)
    zero_pruned_(weight, pack_bits(keep.flatten(0, -2)))
    torch.testing.assert_close(weight.float(), expected, rtol=0, atol=0, equal_nan=True)
    assert not torch.signbit(weight.float()[~keep]).any()


def test_columns_that_are_not_side_by_side_are_zeroed_in_place():
    keep = torch.rand(24, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    stored = torch.ones(16, 24)
    zero_pruned_(stored.T, pack_bits(keep))
    assert torch.equal(stored.T.bool(), keep)
