"""The Triton kernels: run under Triton's interpreter (or on a GPU), and compiled for GPUs that are not here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)]
DTYPES = [torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn]
NAMES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.float8_e4m3fn: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def test_the_kernels_against_fp64():
    """In a process of its own: whether a kernel is interpreted is decided when it is decorated."""
    environment = {**os.environ, **({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})}
    file = Path(__file__).with_name("interpreted_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b\d+ passed", done.stdout) and (torch.cuda.is_available() or "skipped" not in done.stdout)


def compile_for(target, kernel, pointers, integers, constants, directory, monkeypatch, **options):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(directory))
    signature = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(integers, "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *integers)}
    source = ASTSource(kernel, {name: signature[name] for name in names}, constants, aligned)
    return compile(source, target=GPUTarget(*target), options=options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
def test_decode_compiles_to_tensor_core_code(target, dtype, tmp_path, monkeypatch):
    from crepe_llm.kernels.cuda import triton_kernels

    config = triton_kernels.CONFIGS[0]
    constants = triton_kernels.decode_constants(dtype, dtype, 1, config)
    constants |= {"HAS_SCALE": True, "HAS_TOKEN_SCALE": True, "HAS_BIAS": True}
    pair = NAMES[triton_kernels.PAIRS[dtype.itemsize]]
    pointers = {"x": NAMES[dtype], "pairs": pair, "metadata": "i32", "scale": "fp32", "token_scale": "fp32"}
    pointers |= {"bias": "bf16", "y": "bf16"}
    compiled = compile_for(
        target,
        triton_kernels.decode_kernel,
        pointers,
        ("m", "n", "groups", "words"),
        constants,
        tmp_path,
        monkeypatch,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    code = compiled.asm["ptx" if target[0] == "cuda" else "amdgcn"]
    if dtype != torch.float32:
        assert re.search(r"\bw?gmma|\bmma\.sync|v_mfma", code)
    # Values come in 128-bit reads.
    assert re.search(
        r"cp\.async\.cg\.shared\.global|ld\.global\.(L1\S*\.)?v4|global_load_dwordx4|buffer_load_dwordx4", code
    )
    assert compiled.metadata.shared <= (64 if target[0] == "hip" else 99) * 1024  # what every such GPU has


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
def test_expand_compiles(target, tmp_path, monkeypatch):
    from crepe_llm.kernels.cuda import triton_kernels

    constants = triton_kernels.decode_constants(torch.bfloat16, torch.bfloat16, 1, triton_kernels.CONFIGS[0])
    constants = {name: constants[name] for name in ("VALUE", "BITS", "BLOCK_N", "BLOCK_G")}
    pointers = {"pairs": "i32", "metadata": "i32", "dense": "bf16"}
    compiled = compile_for(
        target, triton_kernels.expand_kernel, pointers, ("n", "groups", "words"), constants, tmp_path, monkeypatch
    )
    assert compiled.asm["cubin" if target[0] == "cuda" else "hsaco"]
