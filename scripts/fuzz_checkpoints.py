"""Damage small packed checkpoints and load them: is any damage of structure, shape or dtype loaded in silence?

    python scripts/fuzz_checkpoints.py                              # 5,000 mutants by transformers and by this package
    python scripts/fuzz_checkpoints.py --mutants 200 --seed 7
    python scripts/fuzz_checkpoints.py --bases int4 head experts    # of some formats only
    python scripts/fuzz_checkpoints.py --mutants 200 --by vllm      # by vLLM's own loader, without an engine

Mutant number n of a seed is always the same: `--only n` loads that one and says what became of it. Every mutant is one
of a few base checkpoints (one file or several; 16-bit, INT8, FP8, INT4, an INT8 embedding and head, experts) with one
damage: tensors missing, added, renamed, of another shape or dtype, or labelled so; files truncated, changed or doubled;
index and config.json changed. Values are never changed alone: no reader could tell. A mutant is

- refused: an error was raised,
- equal: it was loaded, and is in every value what the undamaged checkpoint gives,
- SILENT WRONG: it was loaded, and is not.

Exit status 1 if any is SILENT WRONG.
"""

import argparse
import collections
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import torch
from safetensors.torch import load_file, save_file

from crepe_llm.checkpoints import attach, decompress_folder, read_folder
from crepe_llm.checkpoints.two_of_four import int4_2of4
from crepe_llm.evaluation.random_models import write_random_model

REFUSED, EQUAL, WRONG = "refused", "equal", "SILENT WRONG"
INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
IDS = torch.arange(3, 19)[None]

Tensors = dict[str, torch.Tensor]


# Base checkpoints


def write_bases(root: Path) -> list[Path]:
    """Undamaged checkpoints, named for what they are."""
    from transformers import GraniteMoeConfig, LlamaConfig, MixtralConfig, Qwen2Config

    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    llama = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], tie_word_embeddings=True)
    qwen2 = Qwen2Config(**sizes, architectures=["Qwen2ForCausalLM"], tie_word_embeddings=False)
    mixtral = MixtralConfig(
        **{**sizes, "intermediate_size": 48},  # torch's grouped product needs rows of whole 16 bytes
        architectures=["MixtralForCausalLM"],
        tie_word_embeddings=False,
        num_local_experts=3,
    )
    granite = GraniteMoeConfig(
        **{**sizes, "intermediate_size": 48},
        architectures=["GraniteMoeForCausalLM"],
        tie_word_embeddings=True,
        num_local_experts=3,
    )
    bases = [
        write_random_model(llama, root / "llama", sparse=True),
        write_random_model(qwen2, root / "qwen2-sharded", sparse=True),
        write_random_model(qwen2, root / "qwen2-int8", sparse=True, quantization="int8"),
        write_random_model(llama, root / "llama-fp8-sharded", sparse=True, quantization="fp8"),
        write_random_model(mixtral, root / "experts", sparse=True),
        write_random_model(mixtral, root / "experts-int8", sparse=True, quantization="int8"),
        write_random_model(granite, root / "whole-experts", sparse=True),
        write_int4(write_random_model(qwen2, root / "plain", sparse=False), root / "int4"),
        write_int8_head(write_random_model(llama, root / "tied", sparse=True), root / "head"),
    ]
    for folder in bases:
        if folder.name.endswith("sharded"):
            split(folder, 3)
    return bases


def quantized(source: Path, target: Path, group: dict[str, Any], ignore: list[str]) -> Path:
    """A checkpoint as llm-compressor quantizes it, without data, and saves it with 2:4 layers packed or recorded."""
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    reset_session()
    model = AutoModelForCausalLM.from_pretrained(source)
    oneshot(model=model, recipe=[QuantizationModifier(ignore=ignore, config_groups={"group_0": group})])
    attach(model)
    model.save_pretrained(target)
    return target


def write_int4(source: Path, target: Path) -> Path:
    """2:4 weights of 4 bits, a scale a row."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    return quantized(source, target, {"targets": ["Linear"], "weights": weights}, ["lm_head"])


def write_int8_head(source: Path, target: Path) -> Path:
    """Packed layers, and the embedding with the head that is tied to it in INT8."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    return quantized(source, target, {"targets": ["re:.*(lm_head|embed_tokens)$"], "weights": weights}, [])


def split(folder: Path, shards: int) -> None:
    """Spread the tensors of a one-file checkpoint over files with an index."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard::shards]
        save_file({name: tensors[name] for name in mine}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Damages: each changes a copy of a base and says what it did; None where the base has nothing that it applies to


def some_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def edit(folder: Path, rng: random.Random, change: Callable[[Tensors, str], str | None]) -> str | None:
    """Rewrite one file with its tensors changed; `change` is also given the name of one of them."""
    file = some_file(folder, rng)
    tensors = load_file(file)
    said = change(tensors, rng.choice(sorted(tensors)))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    return said


def relabel(folder: Path, rng: random.Random, change: Callable[[dict[str, Any], str], str | None]) -> str | None:
    """Rewrite the header of one file, its data as they are."""
    file = some_file(folder, rng)
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    said = change(header, rng.choice(sorted(set(header) - {"__metadata__"})))
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])
    return said


def reindex(folder: Path, rng: random.Random) -> None:
    """Make the index say what is in the files, half of the time, so that it does not give every damage away."""
    path = folder / INDEX
    if path.is_file() and rng.random() < 0.5:
        weight_map = {name: file.name for file in sorted(folder.glob("*.safetensors")) for name in load_file(file)}
        path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shape(folder: Path, rng: random.Random) -> str | None:
    def change(tensors: Tensors, name: str) -> str:
        old = tensors[name]
        choices = [
            old[:-1],
            old[:1],
            old[: max(1, old.shape[0] // 2)],
            old[..., :-1],
            torch.cat([old, old[:1]]),
            torch.cat([old, old], -1),
            old.flatten(),
            old[None],
            old.flatten()[0],
            old.flatten()[:0],
            old.reshape(-1, 1),
            old.T if old.ndim == 2 else torch.cat([old.flatten()] * 2),
        ]
        tensors[name] = rng.choice([new for new in choices if new.shape != old.shape])
        return f"{name}: {list(old.shape)} became {list(tensors[name].shape)}"

    return edit(folder, rng, change)


def dtype(folder: Path, rng: random.Random) -> str | None:
    def change(tensors: Tensors, name: str) -> str:
        old = tensors[name]
        kinds = [torch.int32, torch.int64, torch.int8, torch.uint8, torch.bool, torch.float64, torch.float8_e4m3fn]
        tensors[name] = old.float().to(rng.choice([kind for kind in kinds if kind != old.dtype]))
        return f"{name}: {old.dtype} became {tensors[name].dtype}"

    return edit(folder, rng, change)


LABELS = {
    "BF16": ["F16", "I16", "U16"],
    "F32": ["I32", "U32"],
    "I8": ["U8", "F8_E4M3", "F8_E5M2", "BOOL"],
    "U8": ["I8", "F8_E4M3", "BOOL"],
    "F8_E4M3": ["I8", "U8", "F8_E5M2"],
    "I64": ["F64", "U64"],
    "I32": ["F32", "U32"],
}


def label(folder: Path, rng: random.Random) -> str | None:
    def change(header: dict[str, Any], name: str) -> str:
        old = header[name]["dtype"]
        header[name]["dtype"] = rng.choice(LABELS[old])
        return f"{name}: label {old} became {header[name]['dtype']}"

    return relabel(folder, rng, change)


def shape_label(folder: Path, rng: random.Random) -> str | None:
    def change(header: dict[str, Any], name: str) -> str:
        old = header[name]["shape"]
        total = 1
        for length in old:
            total *= length
        choices = [old[::-1], [total], [1, *old], [*old, 1], [2, total // 2], [total // 2, 2], [0], [total + 1]]
        header[name]["shape"] = rng.choice([new for new in choices if new != old])
        return f"{name}: label {old} became {header[name]['shape']}"

    return relabel(folder, rng, change)


def missing(folder: Path, rng: random.Random) -> str | None:
    """A tensor, a module or a block is gone, from every file."""
    names = [name for file in sorted(folder.glob("*.safetensors")) for name in load_file(file)]
    prefix = rng.choice(names)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        prefix = prefix.rpartition(".")[0] or prefix
    for file in folder.glob("*.safetensors"):
        kept = {name: t for name, t in load_file(file).items() if name != prefix and not name.startswith(prefix + ".")}
        save_file(kept, file, {"format": "pt"})
    reindex(folder, rng)
    return f"{prefix} is missing"


def unexpected(folder: Path, rng: random.Random) -> str | None:
    def change(tensors: Tensors, name: str) -> str:
        new = rng.choice([name + "_2", name.replace("0", "7"), "x." + name, name.rpartition(".")[0] + ".bias_2"])
        new = new if new not in tensors else "extra.weight"
        tensors[new] = tensors.pop(name) if rng.random() < 0.5 else tensors[name].clone()
        return f"{name} is {'now' if name not in tensors else 'also'} {new}"

    said = edit(folder, rng, change)
    reindex(folder, rng)
    return said


def both_forms(folder: Path, rng: random.Random) -> str | None:
    def change(tensors: Tensors, name: str) -> str:
        layer = name.rpartition(".")[0]
        tensors[f"{layer}.weight"] = torch.zeros(4, 4)
        return f"{layer} has a weight of zeros"

    return edit(folder, rng, change)


def bits(folder: Path, rng: random.Random) -> str | None:
    def change(tensors: Tensors, name: str) -> str | None:
        masks = [name for name in tensors if name.endswith((".bitmask", "shape"))]
        if not masks:
            return None
        name = rng.choice(sorted(masks))
        flat = tensors[name].flatten().clone()
        position = rng.randrange(flat.numel())
        flat[position] = int(flat[position]) ^ (1 << rng.randrange(7))
        tensors[name] = flat.view(tensors[name].shape)
        return f"{name}: a bit of value {position} flipped"

    return edit(folder, rng, change)


def cut(folder: Path, rng: random.Random) -> str | None:
    file = some_file(folder, rng)
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    end = rng.choice([rng.randrange(len(content)), rng.randrange(8 + length), len(content) - 1, 0])
    file.write_bytes(content[:end] if rng.random() < 0.8 else content + bytes(rng.randrange(1, 99)))
    return f"{file.name}: {len(content)} bytes became {file.stat().st_size}"


def header_bytes(folder: Path, rng: random.Random) -> str | None:
    file = some_file(folder, rng)
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(rng.choice([1, 1, 2, 4])):
        content[rng.randrange(8 + length)] = rng.choice(b'0123456789abIFU_.,:"[]{}\x00\xff')
    file.write_bytes(content)
    return f"{file.name}: bytes of the header changed"


def files(folder: Path, rng: random.Random) -> str | None:
    """A file is gone, emptied, doubled, or a link to nowhere."""
    found = sorted(folder.glob("*.safetensors"))
    file = rng.choice(found)
    match rng.choice(["gone", "empty", "doubled", "link", "other's"]):
        case "gone":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "doubled":
            if len(found) == 1:
                return None
            one = load_file(found[0])
            two = load_file(found[1])
            name = rng.choice(sorted(one))
            save_file(two | {name: torch.zeros_like(one[name])}, found[1], {"format": "pt"})
        case "link":
            file.unlink()
            file.symlink_to("nowhere")
        case "other's":
            if len(found) == 1:
                return None
            shutil.copyfile(found[0], found[1])
    return f"{file.name}: files changed"


def index(folder: Path, rng: random.Random) -> str | None:
    path = folder / INDEX
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    weights = content["weight_map"]
    name = rng.choice(sorted(weights))
    shard = weights[name]
    changed: Any
    match rng.choice(["file", "absent", "outside", "number", "list", "empty", "text", "ghost", "none"]):
        case "file":  # none of its tensors is named
            changed = {"weight_map": {tensor: file for tensor, file in weights.items() if file != shard}}
        case "absent":
            changed = {"weight_map": weights | {name: "absent.safetensors"}}
        case "outside":
            (folder / "sub").mkdir()
            shutil.copyfile(folder / shard, folder / "sub" / shard)
            changed = {"weight_map": weights | {name: f"sub/{shard}"}}
        case "number":
            changed = {"weight_map": weights | {name: rng.choice([7, None, [shard], {}])}}
        case "list":
            changed = rng.choice([[], {"weight_map": list(weights)}, {"weight_map": None}, {}])
        case "empty":
            changed = {"weight_map": {}}
        case "ghost":
            changed = {"weight_map": weights | {"ghost.weight": shard}}
        case "text":
            text = path.read_text()
            path.write_text(text[: rng.randrange(len(text))])
            return "index truncated"
        case "none":
            path.unlink()
            return "index removed"
    path.write_text(json.dumps(changed))
    return "index changed"


def second_checkpoint(folder: Path, rng: random.Random) -> str | None:
    """An old model.safetensors lies beside the index, with other weights or only some."""
    if not (folder / INDEX).is_file():
        return None
    tensors: Tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    dropped = rng.choice(sorted(tensors))
    del tensors[dropped]
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return f"model.safetensors without {dropped} beside the index"


SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
]


def size_in_config(content: dict[str, Any], rng: random.Random) -> str:
    key = rng.choice(SIZES)
    old = content[key]
    content.pop("layer_types", None)  # transformers compares its length
    content[key] = rng.choice([old + 1, old - 1, old * 2, max(1, old // 2), 0, -1, str(old) + "x", None])
    return f"{key}: {old} became {content[key]!r}"


def quantization_in_config(content: dict[str, Any], rng: random.Random) -> str:
    quantization = content["quantization_config"]
    said = rng.choice(["removed", "method", "no object", "bare", "status", "format"])
    match said:
        case "removed":
            del content["quantization_config"]
        case "method":
            quantization["quant_method"] = rng.choice(["gptq", "unknown", "fp8", None, 4])
        case "no object":
            content["quantization_config"] = rng.choice(["x", 3, [], {}, None])
        case "bare":
            content["quantization_config"] = {"quant_method": "compressed-tensors"}
        case "status":
            quantization["quantization_status"] = rng.choice(["frozen", "initialized", "unknown", 3])
        case "format":
            quantization["format"] = rng.choice(["dense", "pack-quantized", "float-quantized", "unknown"])
    return f"quantization_config: {said}, {content.get('quantization_config')}"


def sparsity_in_config(content: dict[str, Any], rng: random.Random) -> str:
    old = content["quantization_config"]["sparsity_config"]
    new = rng.choice([{}, old | {"format": "dense"}, old | {"format": "unknown"}, "x"])
    content["quantization_config"]["sparsity_config"] = new
    return f"sparsity_config became {new}"


def group_in_config(content: dict[str, Any], rng: random.Random) -> str | None:
    quantization = content["quantization_config"]
    if not quantization.get("config_groups"):
        return None
    group = quantization["config_groups"]["group_0"]
    match rng.choice(["bits", "type", "strategy", "targets", "weights", "ignore"]):
        case "bits":
            group["weights"]["num_bits"] = rng.choice([4, 16, 2])
        case "type":
            group["weights"]["type"] = "int" if group["weights"]["type"] == "float" else "float"
        case "strategy":
            group["weights"] |= rng.choice([{"strategy": "tensor"}, {"strategy": "group", "group_size": 4}])
        case "targets":
            group["targets"] = ["re:.*k_proj"]
        case "weights":
            group["weights"] = None
        case "ignore":
            quantization["ignore"] = ["re:.*mlp.*"]
    return f"{quantization}"


def tied_in_config(content: dict[str, Any], rng: random.Random) -> str | None:
    """The head gets weights of its own, which are not there. The reverse is another model of the same structure."""
    if not content["tie_word_embeddings"]:
        return None
    content["tie_word_embeddings"] = False
    return "tie_word_embeddings became False"


def config(folder: Path, rng: random.Random) -> str | None:
    content = json.loads((folder / CONFIG).read_text())
    changes = (size_in_config, quantization_in_config, sparsity_in_config, group_in_config, tied_in_config)
    said = rng.choice(changes)(content, rng)
    (folder / CONFIG).write_text(json.dumps(content))
    return said


def config_text(folder: Path, rng: random.Random) -> str | None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text[: rng.randrange(len(text))])
    return "truncated"


DAMAGES: tuple[Callable[[Path, random.Random], str | None], ...] = (
    shape,
    shape,
    dtype,
    label,
    label,
    shape_label,
    missing,
    missing,
    unexpected,
    both_forms,
    bits,
    cut,
    header_bytes,
    files,
    index,
    second_checkpoint,
    config,
    config,
    config,
    config_text,
)


def mutate(bases: list[Path], target: Path, seed: int, number: int) -> tuple[Path, str]:
    """Write mutant `number` of a seed to `target`; its base and what was done."""
    rng = random.Random(f"{seed}/{number}")
    while True:
        base = rng.choice(bases)
        damage = rng.choice(DAMAGES)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(base, target)
        said = damage(target, rng)
        if said is not None:
            return base, f"{base.name}: {damage.__name__}: {said}"


# Ways of loading: each gives what it loaded as tensors by name


def by_transformers(folder: Path) -> Tensors:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return loaded | {"logits": model(IDS).logits.detach()}


def by_this_package(folder: Path) -> Tensors:
    """Every layer that the folder is found to have, as `crepe decompress` writes it, or the 4-bit ones that are 2:4.
    What else there should be, nobody knows without a model."""
    checkpoint = read_folder(folder)
    if not checkpoint.layers:
        return {f"{name}.weight_packed": checkpoint.load(f"{name}.weight_packed") for name in int4_2of4(checkpoint)}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        layers = decompress_folder(folder, Path(scratch) / "plain")
        plain = read_folder(Path(scratch) / "plain")
        return {f"{name}.weight": plain.load(f"{name}.weight") for name in layers}


def by_vllm(folder: Path) -> Tensors:
    """The tensors of all modules after vLLM's own loader has filled and processed them, in this process."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    arguments = EngineArgs(model=str(folder), skip_tokenizer_init=True, enforce_eager=True, max_model_len=64)
    settings = arguments.create_engine_config()
    with set_current_vllm_config(settings):
        distributed()
        model = get_model(vllm_config=settings)
    loaded = dict(model.state_dict())
    for name, module in model.named_modules():
        packed = getattr(module, "packed", None)
        for index, one in enumerate(packed if isinstance(packed, tuple) else [packed] if packed else []):
            parts = {key: value for key, value in vars(one).items() if isinstance(value, torch.Tensor)}
            loaded |= {f"{name}.packed.{index}.{key}": value for key, value in parts.items()}
    return {name: tensor.detach().clone() for name, tensor in loaded.items()}


started: list[bool] = []


def distributed() -> None:
    """vLLM's process groups, once in this process, and what its runner for CPUs does before it loads a model."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    if not started:
        if not torch.cuda.is_available():
            _set_torch_accelerator_to_noop()
        store = tempfile.mkstemp(prefix="fuzz-")[1]
        init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        with set_current_vllm_config(VllmConfig()):  # of no model: with the groups of experts, too
            ensure_model_parallel_initialized(1, 1)
        started.append(True)


WAYS: dict[str, Callable[[Path], Tensors]] = {
    "transformers": by_transformers,
    "crepe_llm": by_this_package,
    "vllm": by_vllm,
}


# Judging


def digest(tensors: Tensors) -> dict[str, str]:
    def of(tensor: torch.Tensor) -> str:
        values = tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else torch.empty(0)
        return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(values.numpy().tobytes()).hexdigest()}"

    return {name: of(tensor) for name, tensor in tensors.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


@dataclass(frozen=True)
class Verdict:
    outcome: str
    why: str


def judge(way: str, mutant: Path, expected: dict[str, str]) -> Verdict:
    """Load a mutant and compare it with what the undamaged checkpoint gave."""
    try:
        with quiet(), torch.no_grad():
            loaded = digest(WAYS[way](mutant))
    except Exception as error:
        return Verdict(REFUSED, f"{type(error).__name__}: {error}")
    if way == "crepe_llm":
        expected = {name: value for name, value in expected.items() if name in loaded}
    wrong = sorted(name for name in loaded.keys() | expected.keys() if loaded.get(name) != expected.get(name))
    if way == "crepe_llm":
        # A renamed layer is not wrong: its values are what they were.
        wrong = [name for name in wrong if name in expected]
    return Verdict(WRONG, f"{wrong[0]} and {len(wrong) - 1} more differ") if wrong else Verdict(EQUAL, "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--by", nargs="+", choices=WAYS, default=["transformers", "crepe_llm"], help="(%(default)s)")
    parser.add_argument("--bases", nargs="+", metavar="NAME", help="(all)")
    parser.add_argument("--only", type=int, help="one mutant, with the message")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    numbers = range(options.mutants) if options.only is None else [options.only]
    counts: dict[str, collections.Counter[str]] = {way: collections.Counter() for way in options.by}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        with quiet():
            bases = write_bases(Path(scratch) / "bases")
        bases = [base for base in bases if options.bases is None or base.name in options.bases]
        with quiet(), torch.no_grad():
            expected = {(way, base): digest(WAYS[way](base)) for way in options.by for base in bases}
        with contextlib.suppress(KeyboardInterrupt):  # the counts so far
            for number in numbers:
                base, said = mutate(bases, Path(scratch) / "mutant", options.seed, number)
                for way in options.by:
                    verdict = judge(way, Path(scratch) / "mutant", expected[way, base])
                    counts[way][verdict.outcome] += 1
                    if verdict.outcome == WRONG or options.only is not None:
                        print(f"{number} by {way}: {verdict.outcome}: {said}: {verdict.why}", flush=True)
    for way, found in counts.items():
        print(f"{way}: " + ", ".join(f"{found[outcome]} {outcome}" for outcome in (REFUSED, EQUAL, WRONG)))
    return int(any(found[WRONG] for found in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
