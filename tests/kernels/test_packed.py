"""The packed layout: exact round trips from dense weights and checkpoint tensors, and refusal of what is not 2:4."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm import kernels
from crepe_llm.functional import bitmask
from crepe_llm.kernels import packed
from crepe_llm.kernels.formats import FORMATS, format_of
from crepe_llm.kernels.packed import packed_bytes

WEIGHT_DTYPES = tuple(
    dict.fromkeys(form.dtype for form in FORMATS.values() if form.code is not None and form.zero_point is None)
)


def sparse_weight(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A random 2:4 weight [n, k]; some groups hold fewer than two non-zero values."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(n, k // 4, 4, generator=generator).argsort(-1) < 2
    keep &= torch.rand(n, k // 4, 4, generator=generator) > 0.05
    if dtype == torch.int8:
        weight = torch.randint(-128, 128, (n, k), generator=generator)
    else:
        weight = torch.randn(n, k, generator=generator)
    return (weight * keep.view(n, k)).to(dtype)


def naive_compress(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``compressed`` and ``bitmask`` of sparse-24-bitmask, element by element."""
    n, k = weight.shape
    compressed = torch.zeros(n, k // 2, dtype=weight.dtype)
    bitmask = torch.zeros(n, -(-k // 8), dtype=torch.uint8)
    for row in range(n):
        for group in range(k // 4):
            columns = [c for c in range(4) if weight[row, 4 * group + c].item() != 0]
            columns = sorted((columns + [c for c in range(4) if c not in columns])[:2])
            for value, c in enumerate(columns):
                column = 4 * group + c
                compressed[row, 2 * group + value] = weight[row, column]
                bitmask[row, column // 8] |= 1 << column % 8
    return compressed, bitmask


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 50),
    groups=st.integers(1, 40),
    dtype=st.sampled_from(WEIGHT_DTYPES),
    seed=st.integers(0, 2**31),
)
def test_pack_and_unpack_are_inverse(n, groups, dtype, seed):
    weight = sparse_weight(n, 4 * groups, dtype, seed)
    packed = kernels.pack(weight)
    assert torch.equal(kernels.unpack(packed), weight)
    assert packed.data.numel() == packed_bytes(n, 4 * groups, format_of(dtype))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 20), groups=st.integers(1, 12), dtype=st.sampled_from(WEIGHT_DTYPES), seed=st.integers(0, 999))
def test_pack_compressed_equals_pack_of_the_dense_weight(n, groups, dtype, seed):
    weight = sparse_weight(n, 4 * groups, dtype, seed)
    compressed, bitmask = naive_compress(weight)
    shape = torch.tensor([[n], [4 * groups]])
    packed = kernels.pack_compressed(compressed, bitmask, shape)
    assert torch.equal(kernels.unpack(packed), weight)
    assert packed.shape == (n, 4 * groups) and packed.format.dtype == dtype


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("weights_at_once", [512, 3000])
def test_a_weight_laid_out_in_pieces_has_the_same_bytes(dtype, weights_at_once, monkeypatch):
    weight = sparse_weight(75, 36, dtype)
    scale = torch.ones(75) if dtype == torch.int8 else None
    compressed, bits = naive_compress(weight)
    whole = kernels.pack_compressed(compressed, bits, (75, 36), scale)
    monkeypatch.setattr(packed, "_SPLIT", weights_at_once)
    monkeypatch.setattr(bitmask, "_BLOCK_BYTES", 100)
    in_pieces = kernels.pack_compressed(compressed, bits, (75, 36), scale)
    assert torch.equal(in_pieces.data, whole.data)
    assert torch.equal(kernels.unpack(in_pieces), weight)


def test_every_pair_of_columns_survives():
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    weight = torch.zeros(6, 8)
    for row, (a, b) in enumerate(pairs):
        weight[row, a], weight[row, b] = 1 + row, 10 + row
        weight[row, 4 + a], weight[row, 4 + b] = 20 + row, 30 + row
    for dtype in WEIGHT_DTYPES:
        assert torch.equal(kernels.unpack(kernels.pack(weight.to(dtype))), weight.to(dtype))


def test_bytes_are_nine_sixteenths_of_dense_bf16():
    assert kernels.pack(sparse_weight(64, 128, torch.bfloat16)).nbytes * 16 == 64 * 128 * 2 * 9


def test_float8_is_kept_exactly_as_bf16():
    weight = sparse_weight(17, 64, torch.float32).to(torch.float8_e4m3fn)
    packed = kernels.pack(weight, scale=torch.tensor(0.5))
    assert packed.format is FORMATS["bf16"]
    assert torch.equal(kernels.unpack(packed).float(), weight.float())
    assert torch.equal(packed.scale, torch.full((17,), 0.5))


def test_a_weight_that_is_not_2_of_4_is_refused():
    weight = sparse_weight(8, 16, torch.float32)
    weight[3, 4:7] = 1.0
    with pytest.raises(ValueError, match=r"row 3, columns 4 to 7 hold 3|row 3, columns 4 to 7 hold 4"):
        kernels.pack(weight)


@pytest.mark.parametrize("nibble", [0, 1, 2, 4, 7, 8, 13, 15])
def test_a_damaged_bitmask_is_refused(nibble):
    compressed, bitmask = naive_compress(sparse_weight(5, 16, torch.bfloat16))
    bitmask[2, 1] = (bitmask[2, 1] & 0x0F) | nibble << 4
    with pytest.raises(ValueError, match=r"columns 12 to 15 of row 2.*exactly 2"):
        kernels.pack_compressed(compressed, bitmask, (5, 16))


def test_bits_beyond_the_last_column_are_refused():
    compressed, bitmask = naive_compress(sparse_weight(5, 12, torch.bfloat16))
    bitmask[4, 1] |= 0x30
    with pytest.raises(ValueError, match="beyond column 11"):
        kernels.pack_compressed(compressed, bitmask, (5, 12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (5, 18)}, "5 x 18"),
        ({"shape": (0, 16)}, "at least one row"),
        ({"shape": (6, 16)}, r"compressed has shape \(5, 8\)"),
        ({"bitmask": torch.zeros(5, 3, dtype=torch.uint8)}, "bitmask has shape"),
        ({"scale": torch.ones(4)}, "scale has shape"),
    ],
)
def test_shapes_that_disagree_are_refused(change, message):
    compressed, bitmask = naive_compress(sparse_weight(5, 16, torch.bfloat16))
    arguments = {"compressed": compressed, "bitmask": bitmask, "shape": (5, 16), **change}
    with pytest.raises(ValueError, match=message):
        kernels.pack_compressed(**arguments)


def test_wrong_dtypes_are_refused():
    compressed, bitmask = naive_compress(sparse_weight(5, 16, torch.bfloat16))
    with pytest.raises(TypeError, match="float64"):
        kernels.pack_compressed(compressed.double(), bitmask, (5, 16))
    with pytest.raises(TypeError, match="int16"):
        kernels.pack_compressed(compressed, bitmask.to(torch.int16), (5, 16))
    with pytest.raises(TypeError, match="int16"):
        kernels.pack_dense(torch.zeros(4, 4, dtype=torch.int16))
    with pytest.raises(ValueError, match="no scale; one for each row is needed"):
        kernels.pack_dense(torch.zeros(4, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"scale has shape \(3,\); the weight needs \(4,\)"):
        kernels.pack_dense(torch.zeros(4, 4, dtype=torch.int8), torch.ones(3, 1))
    with pytest.raises(ValueError, match="contiguous"):
        kernels.pack_dense(torch.zeros(4, 8).t())
