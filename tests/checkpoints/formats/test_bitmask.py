"""Packing against loops that read the format's definition, and against its limits."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm.checkpoints import FormatError, is_2of4, pack, read_shape, unpack, validate_bitmask
from crepe_llm.checkpoints.formats.bitmask import DTYPES
from crepe_llm.functional.bitmask import unpack_bits
from sparse_models import bytes_of, random_2of4


def naive_unpack(compressed, bitmask, rows, columns):
    weight = torch.zeros(rows, columns, dtype=compressed.dtype)
    for row in range(rows):
        values = iter(range(columns // 2))
        for column in range(columns):
            if int(bitmask[row, column // 8]) >> column % 8 & 1:
                weight[row, column] = compressed[row, next(values)]
    return weight


def zeroed(weight):
    """The weight with its negative zeros made positive, as the format stores them."""
    return torch.where(weight.float() == 0, torch.zeros_like(bytes_of(weight)), bytes_of(weight))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 7),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    dropped=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_round_trip_is_exact(rows, groups, dtype, seed, dropped):
    weight = random_2of4(rows, 4 * groups, dtype, seed, dropped)
    assert is_2of4(weight)
    compressed, bitmask = pack(weight)
    assert compressed.shape == (rows, 2 * groups) and compressed.dtype == dtype
    assert bitmask.shape == (rows, (4 * groups + 7) // 8) and bitmask.dtype == torch.uint8
    validate_bitmask(bitmask, 4 * groups)
    dense = unpack(compressed, bitmask, (rows, 4 * groups))
    assert dense.dtype == dtype
    # A kept negative zero (where fewer than two values are non-zero) keeps its bytes, a dropped one becomes +0.
    assert torch.equal(zeroed(dense), zeroed(weight))
    assert torch.equal(bytes_of(dense), bytes_of(naive_unpack(compressed, bitmask, rows, 4 * groups)))


def test_kept_values_are_in_ascending_column_and_bits_least_significant_first():
    weight = torch.tensor([[0, 1, 0, 2, 3, 0, 4, 0, 0, 0, 5, 6]], dtype=torch.float16)
    compressed, bitmask = pack(weight)
    assert compressed.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert bitmask.tolist() == [[0b0101_1010, 0b0000_1100]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_of_a_group_keeps_two(dtype):
    patterns = [pattern for pattern in itertools.product([0, 1], repeat=4) if sum(pattern) <= 2]
    weight = torch.tensor(patterns).to(dtype)
    _, bitmask = pack(weight)
    for pattern, bits in zip(patterns, bitmask[:, 0].tolist(), strict=True):
        kept = [bits >> column & 1 for column in range(4)]
        assert sum(kept) == 2 and bits < 16
        assert all(kept[column] for column in range(4) if pattern[column])


def test_the_most_negative_int8_is_kept():
    weight = torch.tensor([[-128, 0, 5, 0]], dtype=torch.int8)
    assert torch.equal(unpack(*pack(weight), (1, 4)), weight)


def test_float8_negative_zeros_are_zeros():
    weight = torch.tensor([[0x80, 0x80, 0x31, 0x42]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(bytes_of(unpack(*pack(weight), (1, 4))), torch.tensor([[0, 0, 0x31, 0x42]], dtype=torch.uint8))


def test_strided_and_large_weights_agree_with_contiguous_small_ones():
    # 2^24 weights are one block: more rows than that exercise the seam.
    weight = random_2of4(5, 64, torch.bfloat16).repeat(1, 1 << 16)
    compressed, bitmask = pack(weight)
    small_compressed, small_bitmask = pack(weight[:, :64])
    assert torch.equal(bytes_of(compressed), bytes_of(small_compressed.repeat(1, 1 << 16)))
    assert torch.equal(bitmask, small_bitmask.repeat(1, 1 << 16))
    assert torch.equal(zeroed(unpack(compressed, bitmask, weight.shape)), zeroed(weight))
    strided = random_2of4(6, 16, torch.float32).T.contiguous().T
    assert not strided.is_contiguous() and is_2of4(strided)
    assert torch.equal(zeroed(unpack(*pack(strided), (6, 16))), zeroed(strided))


@pytest.mark.parametrize("dtype", DTYPES)
def test_refuses_the_first_crowded_group_by_name(dtype):
    weight = torch.zeros(3, 16, dtype=torch.float32)
    weight[1, 8:11] = torch.tensor([1.0, -2.0, 3.0])
    weight[2, :4] = 1
    assert not is_2of4(weight.to(dtype))
    with pytest.raises(FormatError, match=r"row 1, columns 8 to 11 hold \[1\.0, -2\.0, 3\.0, 0\.0\]"):
        pack(weight.to(dtype))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4), "two-dimensional"),
        (torch.zeros(2, 2, 4), "two-dimensional"),
        (torch.zeros(2, 6), "multiple of 4"),
        (torch.zeros(0, 4), "multiple of 4"),
        (torch.zeros(2, 4, dtype=torch.float64), "float64"),
    ],
)
def test_refuses_what_the_format_cannot_hold(weight, message):
    assert not is_2of4(weight)
    with pytest.raises(FormatError, match=message):
        pack(weight)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 7),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    dropped=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_a_given_mask_is_the_bitmask(rows, groups, dtype, seed, dropped):
    generator = torch.Generator().manual_seed(seed)
    keep = (torch.rand(rows, groups, 4, generator=generator).argsort(-1) < 2).view(rows, -1)
    keep = keep if seed % 2 else keep.t().contiguous().t()
    weight = torch.where(keep & (torch.rand(rows, 4 * groups, generator=generator) >= dropped), 3.0, 0.0).to(dtype)
    compressed, bitmask = pack(weight, keep)
    assert torch.equal(unpack_bits(bitmask, 4 * groups), keep)
    assert torch.equal(bytes_of(compressed), bytes_of(weight)[keep].view(rows, -1))
    assert torch.equal(bytes_of(unpack(compressed, bitmask, weight.shape)), bytes_of(weight))


def test_a_kept_zero_stays_kept():
    weight = torch.tensor([[0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    keep = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 1]]).bool()
    assert pack(weight, keep)[1].tolist() == [[0b1010_1100]]
    assert pack(weight)[1].tolist() != [[0b1010_1100]]  # inferred, the zeros would be kept elsewhere


def test_refuses_a_mask_that_is_not_the_weights():
    weight = torch.zeros(3, 8)
    weight[1, 5] = 7
    keep = torch.tensor([1, 1, 0, 0, 0, 1, 0, 1]).bool().repeat(3, 1)
    pack(weight, keep)
    for change, message in [
        (lambda mask: mask.to(torch.uint8), r"torch\.uint8 \(3, 8\)"),
        (lambda mask: mask[:, :4], r"torch\.bool \(3, 4\)"),
        (lambda mask: mask.index_fill(1, torch.tensor(2), True), "keeps 3 of columns 0 to 3 of row 0"),
        (lambda mask: mask & (torch.arange(3)[:, None] != 2), "keeps 0 of columns 0 to 3 of row 2"),
        (lambda mask: mask.flip(1), r"row 1, columns 4 to 7 hold \[0\.0, 7\.0, 0\.0, 0\.0\]"),
    ]:
        with pytest.raises(FormatError, match=message):
            pack(weight, change(keep))


@pytest.mark.parametrize("columns", [8, 4])
def test_validates_every_byte(columns):
    for byte in range(256):
        good = (byte & 15).bit_count() == 2 and (byte >> 4).bit_count() == (2 if columns == 8 else 0)
        bitmask = torch.tensor([[0b0011_0011 if columns == 8 else 0b0011], [byte]], dtype=torch.uint8)
        if good:
            validate_bitmask(bitmask, columns)
        else:
            with pytest.raises(FormatError, match=rf"row 1, byte 0 \(columns 0 to {columns - 1}\)"):
                validate_bitmask(bitmask, columns)


def test_unpack_refuses_parts_that_disagree():
    compressed, bitmask = pack(random_2of4(3, 16, torch.float32))
    for parts, shape, message in [
        ((compressed, bitmask), (3, 20), "compressed has shape"),
        ((compressed, bitmask), (4, 16), "compressed has shape"),
        ((compressed, bitmask), (2**62, 4), "compressed has shape"),
        ((compressed, bitmask), (-3, -16), "not positive"),
        ((compressed, bitmask), (3, 15), "multiple of 4"),
        ((compressed, bitmask), (3,), "two dimensions"),
        ((compressed, bitmask[:2]), (3, 16), "3 rows"),
        ((compressed, bitmask[:, :1]), (3, 16), "2 bytes a row"),
        ((compressed, bitmask.to(torch.int8)), (3, 16), "dtype torch.int8"),
        ((compressed.double(), bitmask), (3, 16), "float64"),
        ((compressed, bitmask | 1 << 7), (3, 16), "two of every four"),
    ]:
        with pytest.raises(FormatError, match=message):
            unpack(*parts, shape)


def test_reads_the_stored_shape():
    assert read_shape(torch.tensor([[3], [16]])) == (3, 16)
    for stored in (torch.tensor([3.0, 16.0]), torch.tensor([3, 16, 1]), torch.tensor([True, True])):
        with pytest.raises(FormatError):
            read_shape(stored)


def test_bf16_takes_nine_sixteenths():
    weight = random_2of4(64, 64, torch.bfloat16)
    stored = sum(part.numel() * part.element_size() for part in pack(weight))
    assert stored == weight.numel() * 2 * 9 / 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: packing is checked on the CPU alone")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gpu_packs_the_same_bytes(dtype):
    weight = random_2of4(33, 60, dtype)
    compressed, bitmask = pack(weight.cuda())
    expected_compressed, expected_bitmask = pack(weight)
    assert compressed.is_cuda and torch.equal(bytes_of(compressed.cpu()), bytes_of(expected_compressed))
    assert torch.equal(bitmask.cpu(), expected_bitmask)
    dense = unpack(compressed, bitmask, weight.shape)
    assert dense.is_cuda and torch.equal(bytes_of(dense.cpu()), bytes_of(unpack(*pack(weight), weight.shape)))
