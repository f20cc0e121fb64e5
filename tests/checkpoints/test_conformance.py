"""Conformance with compressed-tensors 0.14.0.1, the last release that reads and writes the format.

It is fetched into a folder of its own and run in a process of its own, beside the current release.
"""

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from crepe_llm.checkpoints import attach, pack, read_folder
from crepe_llm.checkpoints.formats.bitmask import DTYPES
from sparse_models import bytes_of, prune_2of4, random_2of4

PEER = "compressed-tensors==0.14.0.1"
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

SCRIPT = """
    import sys
    import compressed_tensors
    assert compressed_tensors.__version__ == "0.14.0.1", compressed_tensors.__file__
    import torch
    from compressed_tensors import SparsityCompressionConfig
    from compressed_tensors.compressors import BaseCompressor
    from safetensors.torch import load_file, save_file

    what, source, target = sys.argv[1:]
    config = SparsityCompressionConfig.load_from_registry("sparse-24-bitmask", targets=["Linear"])
    peer = BaseCompressor.load_from_registry("sparse-24-bitmask", config=config)
    if what == "write":
        tensors = peer.compress(load_file(source))
    else:
        tensors = {}
        for name, tensor in peer.decompress(source):
            tensors[name] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target)
"""


@pytest.fixture(scope="module")
def peer():
    """A function that runs the peer: ("write" or "read", source, target)."""
    root = (
        os.environ.get("CREPE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crepe-llm"
    )
    folder = Path(root) / PEER.replace("==", "-")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as scratch:
            install = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                scratch + "/peer",
                PEER,
            ]
            subprocess.run(install, check=True, timeout=120)
            os.rename(scratch + "/peer", folder)
    environment = os.environ | {"PYTHONPATH": str(folder), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}

    def run(what, source, target):
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), what, str(source), str(target)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        if result.returncode:
            raise RuntimeError(result.stderr)

    return run


def weights(dropped):
    """2:4 weights of every dtype and of widths with and without a half-filled last byte, by name."""
    made = {}
    for seed, (name, dtype) in enumerate(NAMES.items()):
        for columns in (4, 12, 64, 200):
            weight = random_2of4(37, columns, dtype, seed, dropped)
            if dtype == torch.int8:
                # The peer ranks -128 below zero (its magnitude overflows) and loses it.
                weight[weight == -128] = -127
            if dtype.is_floating_point and dtype.itemsize > 1:
                weight[weight.isnan()] = 1  # so that equality means something
            made[f"{name}_{columns}.weight"] = weight
    return made


@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_the_peer_writes_what_we_write_bit_for_bit(peer, tmp_path, dropped):
    dense = weights(dropped)
    save_file(dense, tmp_path / "dense.safetensors")
    peer("write", tmp_path / "dense.safetensors", tmp_path / "model.safetensors")
    theirs = load_file(tmp_path / "model.safetensors")
    assert len(theirs) == 3 * len(dense)
    for name, weight in dense.items():
        layer = name.removesuffix(".weight")
        compressed, bitmask = pack(weight)
        assert theirs[f"{layer}.compressed"].dtype == compressed.dtype
        assert torch.equal(bytes_of(theirs[f"{layer}.compressed"]), bytes_of(compressed)), name
        assert torch.equal(theirs[f"{layer}.bitmask"], bitmask), name
        shape = theirs[f"{layer}.shape"]
        assert shape.dtype == torch.int64 and shape.tolist() == [[size] for size in weight.shape]
    # And our reader takes its file.
    checkpoint = read_folder(tmp_path)
    for name, weight in dense.items():
        read = checkpoint.load_weight(name.removesuffix(".weight"))
        assert torch.equal(bytes_of(read) * (read.float() != 0), bytes_of(weight) * (weight.float() != 0))


def test_the_peer_reads_what_we_write(peer, tmp_path):
    tensors, dense = {}, weights(0.3)
    for name, weight in dense.items():
        compressed, bitmask = pack(weight)
        shape = torch.tensor(weight.shape).reshape(2, 1)
        for part, value in (("compressed", compressed), ("bitmask", bitmask), ("shape", shape)):
            tensors[name.replace("weight", part)] = value
    folder = tmp_path / "ours"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    peer("read", folder, tmp_path / "read.safetensors")
    read = load_file(tmp_path / "read.safetensors")
    assert read.keys() == dense.keys()
    for name, weight in dense.items():
        assert torch.equal(bytes_of(read[name]) * (read[name].float() != 0), bytes_of(weight) * (weight.float() != 0))


def test_the_peer_reads_a_whole_checkpoint_of_ours(peer, tiny_model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"), dtype=torch.bfloat16)
    prune_2of4(model)
    attach(model)
    model.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    peer("read", tmp_path / "ours", tmp_path / "read.safetensors")
    read, state = load_file(tmp_path / "read.safetensors"), model.state_dict()
    assert set(state) - set(read) == {"lm_head.weight"}  # tied
    assert all(torch.equal(read[name], state[name]) for name in read)
