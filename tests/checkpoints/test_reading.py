"""Broken and hostile checkpoints: a clear error that names file and tensor, whatever was done to the files."""

import json
import pickle
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from crepe_llm.checkpoints import FormatError, compress_folder, decompress_folder, read_files, read_folder
from crepe_llm.checkpoints.reading import INDEX, SINGLE, read_config, read_strictly
from sparse_models import prune_2of4

LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def packed(tiny_model_folder, tmp_path_factory):
    """A real packed checkpoint in one file."""
    root = tmp_path_factory.mktemp("packed")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"), dtype=torch.bfloat16)
    prune_2of4(model)
    model.save_pretrained(root / "dense")
    compress_folder(root / "dense", root / "sparse")
    return root / "sparse"


@pytest.fixture(scope="module")
def sharded(tiny_model_folder, tmp_path_factory):
    """The same in several files with an index."""
    root = tmp_path_factory.mktemp("sharded")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"), dtype=torch.bfloat16)
    prune_2of4(model)
    model.save_pretrained(root / "dense", max_shard_size="10KB")
    compress_folder(root / "dense", root / "sparse")
    return root / "sparse"


def rewritten(source, target, change):
    """A copy of a one-file checkpoint whose tensors `change` has altered in place."""
    shutil.copytree(source, target)
    tensors = load_file(target / SINGLE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / SINGLE, {"format": "pt"})
    return target


def load_everything(folder):
    checkpoint = read_folder(folder)
    for layer in checkpoint.layers:
        checkpoint.load_weight(layer)
    return checkpoint


def test_reads_layers_and_their_weights(packed):
    checkpoint = load_everything(packed)
    assert len(checkpoint.layers) == 14
    layer = checkpoint.layers[LAYER]
    assert layer.shape == (32, 48) and layer.dtype == torch.bfloat16
    assert checkpoint.load_weight(LAYER).shape == (32, 48)


def extra_bit(tensors):
    tensors[f"{LAYER}.bitmask"][3, 1] = 0b0111_0011


def put(part, value):
    def change(tensors):
        tensors[f"{LAYER}.{part}"] = value(tensors[f"{LAYER}.{part}"])

    return change


def without(part):
    def change(tensors):
        del tensors[f"{LAYER}.{part}"]

    return change


MALFORMED = {
    "a group of three bits": (extra_bit, "bitmask.*row 3, byte 1"),
    "an empty bitmask": (put("bitmask", torch.zeros_like), "row 0, byte 0"),
    "a bitmask longer than the shape": (put("bitmask", lambda t: t.repeat(1, 2)), r"bitmask is U8 \[32, 12\]"),
    "a bitmask shorter than the shape": (put("bitmask", lambda t: t[:, :-1]), r"bitmask is U8 \[32, 5\]"),
    "a flat bitmask": (put("bitmask", torch.flatten), r"bitmask is U8 \[192\]"),
    "a bitmask of another dtype": (put("bitmask", lambda t: t.to(torch.int8)), "bitmask is I8"),
    "values of another dtype": (put("compressed", lambda t: t.double()), "compressed has dtype F64"),
    "values of another shape": (put("compressed", lambda t: t[:, :-2]), r"compressed is BF16 \[32, 22\]"),
    "transposed values": (put("compressed", lambda t: t.T), r"compressed is BF16 \[24, 32\]"),
    "a shape of another dtype": (put("shape", lambda t: t.int()), "shape is I32"),
    "a float shape": (put("shape", lambda t: t.float()), "shape is F32"),
    "a shape of three": (put("shape", lambda t: torch.tensor([32, 48, 1])), "not a multiple of 4"),
    "a shape of four": (put("shape", lambda t: torch.tensor([32, 48, 1, 1])), r"shape is I64 \[4\]"),
    "experts that there are not": (put("shape", lambda t: torch.tensor([2, 16, 48])), r"shape \[2, 16, 48\] needs"),
    "a negative shape": (put("shape", lambda t: -t), "not positive"),
    "a huge shape": (put("shape", lambda t: torch.tensor([[2**62], [48]])), r"needs BF16 \[4611686018427387904, 24\]"),
    "a huge width": (put("shape", lambda t: torch.tensor([[32], [2**63 - 4]])), "stored shape"),
    "a shape of odd width": (put("shape", lambda t: torch.tensor([[32], [47]])), "multiple of 4"),
    "no bitmask": (without("bitmask"), "not bitmask"),
    "no values": (without("compressed"), "not compressed"),
    "no shape": (without("shape"), "not shape"),
    "the weight as well": (lambda t: t.update({f"{LAYER}.weight": torch.zeros(32, 48)}), "both packed and as a weight"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_layers_are_named(packed, tmp_path, name):
    change, message = MALFORMED[name]
    folder = rewritten(packed, tmp_path / "bad", change)
    with pytest.raises(FormatError, match=message) as error:
        load_everything(folder)
    assert LAYER in str(error.value) and SINGLE in str(error.value)
    with pytest.raises(FormatError, match=message) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert LAYER in str(error.value) and SINGLE in str(error.value)
    with pytest.raises(FormatError, match=message):
        decompress_folder(folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"bad"}


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 2000, -1])
def test_truncated_files_are_named(packed, tmp_path, length):
    folder = shutil.copytree(packed, tmp_path / "bad")
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:length])
    with pytest.raises(FormatError, match=SINGLE):
        read_folder(folder)
    with pytest.raises(FormatError, match=SINGLE):
        AutoModelForCausalLM.from_pretrained(folder)


def test_headers_that_claim_more_than_the_file_are_refused_before_anything_is_allocated(tmp_path):
    for size, shape, end in [(2**63, [2**62], 2**64), (2**40, [2**40], 2**40), (16, [2**31, 2**31, 2**31], 2**62)]:
        header = json.dumps({"x.bitmask": {"dtype": "U8", "shape": shape, "data_offsets": [0, end]}}).encode()
        for claimed in (len(header), size):
            (tmp_path / SINGLE).write_bytes(struct.pack("<Q", claimed) + header + bytes(16))
            with pytest.raises(FormatError, match=SINGLE):
                read_folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "sub\\model.safetensors", 7, None,
     ["model.safetensors"], "model.bin", "model.safetensors\0"],
)  # fmt: skip
def test_index_names_that_are_no_plain_file_names_are_refused(sharded, tmp_path, name):
    folder = shutil.copytree(sharded, tmp_path / "bad")
    shutil.copytree(sharded, tmp_path / "other")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"model\.norm\.weight.*not the plain name"):
        read_folder(folder)
    with pytest.raises(FormatError):
        decompress_folder(folder, tmp_path / "out")


def test_transformers_is_kept_inside_the_folder_too(sharded, packed, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "bad")
    shutil.copytree(packed, tmp_path / "other")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][f"{LAYER}.bitmask"] = "../other/model.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(FormatError, match="outside the checkpoint's folder"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_index_that_does_not_match_its_files_is_refused(sharded, tmp_path):
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    first = next(name for name, file in index["weight_map"].items() if file == files[0])
    for change, message in [
        ({"weight_map": index["weight_map"] | {first: "absent.safetensors"}}, "absent.safetensors.*does not exist"),
        ({"weight_map": index["weight_map"] | {first: files[-1]}}, f"{first}.*does not have it"),
        ({"weight_map": index["weight_map"] | {"ghost.weight": files[0]}}, "ghost.weight.*does not have it"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": [1]}, "weight_map"),
        ([], "not a JSON object"),
    ]:
        folder = shutil.copytree(sharded, tmp_path / "bad", dirs_exist_ok=True)
        (folder / INDEX).write_text(json.dumps(change))
        with pytest.raises(FormatError, match=message):
            read_folder(folder)
    (folder / INDEX).write_bytes(b"[" * 100_000)
    with pytest.raises(FormatError, match=INDEX):
        read_folder(folder)
    (folder / INDEX).unlink()
    with pytest.raises(FormatError, match="only safetensors"):
        read_folder(folder)


def test_a_single_file_beside_an_index_is_what_is_read_as_by_transformers(packed, sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "both")
    shutil.copyfile(packed / SINGLE, folder / SINGLE)
    for change in (lambda tensors: None, put("compressed", torch.zeros_like)):
        shutil.rmtree(tmp_path / "old", ignore_errors=True)
        old = rewritten(packed, tmp_path / "old", change) / SINGLE
        shutil.copyfile(old, folder / SINGLE)
        assert read_folder(folder).files == (folder / SINGLE,)
        loaded = AutoModelForCausalLM.from_pretrained(folder).get_parameter(f"{LAYER}.weight")
        assert torch.equal(read_folder(folder).load_weight(LAYER), loaded)
        # Whoever reads the index, as vLLM does, has to know that there are two.
        with pytest.raises(FormatError, match=r"both model\.safetensors and model\.safetensors\.index\.json"):
            read_strictly(folder)
    decompress_folder(folder, tmp_path / "plain")
    assert [path.name for path in (tmp_path / "plain").glob("*.safetensors*")] == [SINGLE]
    for whole in (packed, sharded, tmp_path / "plain"):
        assert read_strictly(whole).files == read_folder(whole).files


@pytest.mark.parametrize("name", [f"{LAYER}.compressed", "model.norm.weight"])
def test_one_16_bit_float_among_others_is_a_wrong_label(packed, tmp_path, name):
    bad = rewritten(packed, tmp_path / "bad", lambda t: t.update({name: t[name].view(torch.float16)}))
    with pytest.raises(FormatError, match=rf"tensor {name} is F16, \d+ others are BF16; one of the labels is wrong"):
        read_strictly(bad)
    with pytest.raises(FormatError, match=r"is F16, \d+ others are BF16"):
        decompress_folder(bad, tmp_path / "plain")
    decompress_folder(packed, tmp_path / "plain")
    dense = f"{LAYER}.weight"
    mixed = rewritten(tmp_path / "plain", tmp_path / "mixed", lambda t: t.update({dense: t[dense].half()}))
    with pytest.raises(FormatError, match=rf"tensor {dense} is F16"):
        compress_folder(mixed, tmp_path / "packed")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.norm.weight", torch.int16),
        ("model.norm.weight", torch.int32),
        ("model.embed_tokens.weight", torch.int8),
        (f"{LAYER}.bias", torch.int64),
        (f"{LAYER}.weight_scale", torch.uint8),
        (f"{LAYER}.input_scale", torch.bool),
    ],
)
def test_integers_where_only_floats_make_sense_are_named(packed, tmp_path, name, dtype):
    """Whoever reads the folder without comparing it with a model, as vLLM does, would cast them."""

    def change(tensors):
        tensors[name] = tensors.get(name, torch.ones(32)).to(dtype)

    with pytest.raises(FormatError, match=rf"tensor {name} is \w+ \[\d+.*\], not one of F64, F32, F16, BF16"):
        read_strictly(rewritten(packed, tmp_path / "bad", change))


def test_integers_of_layers_that_are_quantized_but_not_packed_are_read(packed, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = torch.ones(8, 8, dtype=torch.int8)
        tensors["lm_head.weight_scale"] = torch.ones(8, 1)
        tensors["other.weight_packed"] = torch.ones(8, 1, dtype=torch.int32)
        tensors["other.weight_scale"] = torch.ones(8, 1, dtype=torch.uint8)

    assert len(read_strictly(rewritten(packed, tmp_path / "mixed", change)).layers) == 14


@pytest.mark.parametrize("groups", [None, {}, {"g": 1}, {"g": {"weights": {"type": "float", "num_bits": 8}}}, "x"])
def test_layers_of_8_bits_that_the_config_does_not_tell_of_are_named(packed, tmp_path, groups):
    bad = rewritten(packed, tmp_path / "bad", put("compressed", lambda t: t.to(torch.int8)))
    config = read_config(bad)
    config["quantization_config"]["config_groups"] = groups
    (bad / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FormatError, match=rf"tensor {LAYER}\.compressed is I8, but config.json quantizes nothing to 8-bit ints"
    ):
        decompress_folder(bad, tmp_path / "plain")


def test_a_tensor_in_two_files_is_refused(packed, tmp_path):
    twice = [shutil.copyfile(packed / SINGLE, tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    with pytest.raises(FormatError, match=r"b\.safetensors: tensor .* is also in .*a\.safetensors"):
        read_files(twice)


def test_pickles_are_not_read(packed, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copyfile(packed / "config.json", folder / "config.json")
    for name in ("pytorch_model.bin", SINGLE):
        (folder / name).write_bytes(pickle.dumps(Trap()))
        for convert in (compress_folder, decompress_folder):
            with pytest.raises(FormatError, match="safetensors"):
                convert(folder, tmp_path / "out")
    assert not (tmp_path / "sprung").exists()


def test_a_config_that_is_missing_or_no_object_is_named(packed, tmp_path):
    with pytest.raises(FormatError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match=r"config\.json is not JSON"):
        read_config(tmp_path)


# Fuzzing: any change of the bytes is either read without harm or refused with a FormatError.


def fuzz(examples):
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def survives(folder):
    try:
        load_everything(folder)
    except FormatError as error:
        assert str(folder) in str(error)


@fuzz(1500)
@given(data=st.data())
def test_fuzzed_bytes(packed, tmp_path, data):
    content = bytearray((packed / SINGLE).read_bytes())
    (header,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of the changes hit the header, which is what a reader trusts.
        end = data.draw(st.sampled_from([8, 8 + header, len(content)]))
        position = data.draw(st.integers(0, min(end, len(content)) - 1))
        replacement = data.draw(st.binary(min_size=0, max_size=6))
        removed = data.draw(st.sampled_from([len(replacement), 0, 1, 1000]))
        content[position : position + removed] = replacement
        if len(content) < 9:
            break
    (tmp_path / SINGLE).write_bytes(content)
    survives(tmp_path)


SCALARS = st.one_of(
    st.integers(-(2**65), 2**65), st.sampled_from(["U8", "I64", "BF16", "F4", "F8_E5M2", "BOOL", "", "\0"]), st.none()
)


@fuzz(1500)
@given(data=st.data())
def test_fuzzed_headers(packed, tmp_path, data):
    content = (packed / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
        match data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "rename", "drop", "swap"])):
            case "dtype":
                header[name]["dtype"] = data.draw(SCALARS)
            case "shape":
                header[name]["shape"] = data.draw(st.lists(st.integers(-1, 2**64), max_size=4))
            case "data_offsets":
                header[name]["data_offsets"] = data.draw(st.lists(st.integers(-1, 2**64), max_size=3))
            case "rename":
                header[data.draw(st.sampled_from([f"{LAYER}.bitmask", "a.shape", ".compressed", "x"]))] = header[name]
            case "drop":
                del header[name]
            case "swap":
                other = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
                header[name], header[other] = header[other], header[name]
    encoded = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])
    survives(tmp_path)


@fuzz(500)
@given(data=st.data())
def test_fuzzed_values(packed, tmp_path, data):
    tensors = load_file(packed / SINGLE)
    part = data.draw(st.sampled_from(["compressed", "bitmask", "shape"]))
    tensor = tensors[f"{LAYER}.{part}"]
    match data.draw(st.sampled_from(["value", "dtype", "shape", "cut"])):
        case "value":
            flat = tensor.flatten().clone()
            position = data.draw(st.integers(0, flat.numel() - 1))
            limit = {"compressed": 1000, "bitmask": 255, "shape": 2**63 - 1}[part]
            flat[position] = data.draw(st.integers(0 if part == "bitmask" else -limit, limit))
            tensor = flat.view_as(tensor)
        case "dtype":
            kinds = [torch.int8, torch.uint8, torch.float64, torch.bool, torch.int32, torch.float8_e4m3fn]
            tensor = tensor.to(data.draw(st.sampled_from(kinds)))
        case "shape":
            tensor = tensor.reshape(data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1), (2, -1)])))
        case "cut":
            tensor = tensor[: data.draw(st.integers(0, tensor.shape[0]))].contiguous()
    tensors[f"{LAYER}.{part}"] = tensor
    save_file(tensors, tmp_path / SINGLE)
    survives(tmp_path)


@fuzz(300)
@given(
    content=st.recursive(
        SCALARS | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
        max_leaves=6,
    ),
    wrapped=st.booleans(),
)
def test_fuzzed_index(packed, tmp_path, content, wrapped):
    shutil.copyfile(packed / SINGLE, tmp_path / "a.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": content} if wrapped else content))
    survives(tmp_path)


def test_why_a_file_cannot_be_read_is_the_systems_word(tmp_path):
    """safetensors calls each such file a missing one."""
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FormatError, match=r"model\.safetensors: not a readable safetensors file: Is a directory$"):
        read_files([tmp_path / "model.safetensors"])
