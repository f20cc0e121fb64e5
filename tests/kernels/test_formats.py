"""The table of formats, against the C++ kernels' table and against formats that are not in it."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from crepe_llm import kernels
from crepe_llm.kernels import formats
from crepe_llm.kernels.formats import FORMATS, format_of, int4_format
from crepe_llm.kernels.packed import Kept, deinterleave, fitted_scale, interleave

HEADER = Path(formats.__file__).parent / "cpu" / "weight_formats.h"


def test_the_table_is_the_one_of_the_cpp_kernels():
    text = HEADER.read_text()
    codes = re.search(r"enum : int32_t \{\s(.*?),\s*kFormatCount\s\};", text, re.DOTALL).group(1)
    codes = re.split(r",\s+", codes.strip())
    rows = re.findall(r'\{"(\w+)", (\d+), (true|false), (\d+), (\d+)\}', text)
    assert [code.lower() for code in codes] == [f"k{name.replace('_', '')}" for name, *_ in rows]
    theirs = [
        (code, name, int(bits), flag == "true", *map(int, groups))
        for code, (name, bits, flag, *groups) in enumerate(rows)
    ]
    on_cpu = sorted((form for form in FORMATS.values() if form.code is not None), key=lambda form: form.code)
    ours = [(f.code, f.name, f.bits, f.always_quantizes, f.scale_group or 0, f.input_group or 0) for f in on_cpu]
    assert ours == theirs
    assert {f.zero_point for f in on_cpu if f.bits == 4} == {int(re.search(r"kZeroPoint = (\d+);", text).group(1))}
    for name in ("kRowBlock", "kColumnChunk"):
        ours = {"kRowBlock": formats.ROW_BLOCK, "kColumnChunk": formats.COLUMN_CHUNK}[name]
        assert int(re.search(rf"{name} = (\d+);", text).group(1)) == ours


def test_chunk_bytes_and_column_shifts():
    assert {name: form.chunk_bytes for name, form in FORMATS.items()} == {
        "bf16": 576,
        "fp16": 576,
        "fp32": 1088,
        "int8": 320,
        "fp8": 320,
        "int8_weight_only": 320,
        "int4": 192,
        "int4_g32": 192,
        "int4_g64": 192,
        "int4_g128": 192,
        "int4_a8": 192,
        "int4_g32_a8": 192,
        "int4_g64_a8": 192,
        "int4_g128_a8": 192,
    }
    for group in range(8):
        for value in range(2):
            assert FORMATS["bf16"].column_shifts[2 * group + value] == 4 * group + 2 * value
            place = 2 * (group % 2) + value  # in its pair of groups
            assert FORMATS["int8"].column_shifts[2 * group + value] == 8 * place + 2 * (group // 2)
            assert FORMATS["int4_g64"].column_shifts[2 * group + value] == 4 * group + 2 * value
            place = 2 * value + group % 4 // 2  # in its pair of groups: 0 and 2, 1 and 3, 4 and 6, 5 and 7
            field = 2 * (group // 4) + group % 2
            assert FORMATS["int4_g64_a8"].column_shifts[2 * group + value] == 8 * place + 2 * field


def test_a_format_is_found_by_dtype_or_refused():
    for form in FORMATS.values():
        if form.zero_point is None and form.name != "int8_weight_only":
            assert format_of(form.dtype) is form
    for group in (None, 32, 64, 128):
        assert int4_format(group).scale_group == group and int4_format(group).bits == 4
        quantizing = int4_format(group, quantizes_inputs=True)
        assert quantizing.unquantized == int4_format(group).name and quantizing.scale_group == group
    with pytest.raises(
        ValueError, match="48 columns share a scale; 4-bit weights have groups of 32, 64, 128, or whole"
    ):
        int4_format(48)
    with pytest.raises(TypeError, match="float64; bfloat16, float16, float32, int8 or float8_e4m3fn"):
        format_of(torch.float64)


def test_wider_formats_hold_every_value():
    for form in FORMATS.values():
        if form.wider is None:
            assert form.code is not None
            continue
        bits = torch.arange(256, dtype=torch.uint8).view(form.dtype)
        wider = bits.to(FORMATS[form.wider].dtype)
        torch.testing.assert_close(wider.float(), bits.float(), rtol=0, atol=0, equal_nan=True)


# A lane is at most 32 bits.
LANES = [
    (name, lane) for name, form in FORMATS.items() for lane in (1, 2, 4) if form.code is not None and form.bits > 4
]
LANES = [(name, lane) for name, lane in LANES if lane * FORMATS[name].bits <= 32]


@pytest.mark.parametrize(("name", "lane"), LANES)
@pytest.mark.parametrize("spread", [False, True])
def test_any_order_of_a_chunk_goes_both_ways(name, lane, spread):
    """The layout's code is one for all orders, also for those that no format has yet."""
    form = dataclasses.replace(FORMATS[name], name="new", lane=lane, spread=spread)
    generator = torch.Generator().manual_seed(0)
    columns = torch.rand(37, 21, 4, generator=generator).argsort(-1)[..., :2].sort(-1).values.to(torch.uint8)
    values = torch.randint(-100, 100, (37, 21, 2), generator=generator).to(form.dtype)
    packed = interleave(Kept(values, columns, form))
    expected = torch.zeros(37, 21, 4, dtype=form.dtype).scatter_(-1, columns.long(), values).view(37, 84)
    assert packed.format is form and packed.data.numel() == 3 * 3 * form.chunk_bytes
    assert torch.equal(deinterleave(packed), expected)
    assert sorted(set(form.column_shifts)) == list(range(0, 32, 2))


def test_scales_take_the_layout_of_the_format():
    values, columns = torch.zeros(6, 40, 2), torch.zeros(6, 40, 2, dtype=torch.uint8)
    row = Kept(values, columns, FORMATS["fp32"])
    group = Kept(values, columns, dataclasses.replace(FORMATS["fp32"], scale_group=64))
    assert group.format.scale_shape(6, 160) == (6, 3)
    assert fitted_scale(None, row) is None
    assert torch.equal(fitted_scale(torch.tensor(2, dtype=torch.int64), group), torch.full((6, 3), 2.0))
    scale = torch.rand(6, 3)
    assert torch.equal(fitted_scale(scale, group), scale)
    assert torch.equal(fitted_scale(scale[:, :1], row), scale[:, 0])
    for wrong, kept in ((scale, row), (scale[:, 0], group)):
        with pytest.raises(ValueError, match="scale has shape"):
            fitted_scale(wrong, kept)


def test_more_columns_than_a_format_allows_are_refused():
    k = FORMATS["int8"].max_columns + 4
    with pytest.raises(ValueError, match=f"int8 weight has {k} columns; at most {k - 4}"):
        kernels.pack(torch.zeros(1, k, dtype=torch.int8))
