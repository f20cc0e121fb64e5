"""Perplexity and size after each quantization: of dense models, of 2:4 ones, and of those after recovery.

    python benchmarks/quantization.py                                         # both models, three seeds
    python benchmarks/quantization.py --models SmolLM2-135M-Instruct --starts dense CRePE --tokens 0
    python benchmarks/quantization.py --report

A start is a method of methods.py, pruned once a seed, or the dense model. With --tokens the best stack is trained as in
recover.py, whose folders in --folder are used, and made where they are missing. Every quantization starts from that
folder, and the benchmark stops if a mask changes. What is measured is the folder saved, loaded again: perplexity on the
test and validation articles and on news. A dense model's INT4 by GPTQ is llm-compressor's own. "As served" is with the
inputs of INT4 layers in int8, 32 columns of a token together, or those of an INT8 head, 16 columns together, as the
vLLM plugin multiplies them.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from loguru import logger
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, PreTrainedModel

from crepe_llm import samples
from crepe_llm.checkpoints import attach, is_2of4, read_folder
from crepe_llm.kernels.formats import COLUMN_CHUNK
from crepe_llm.kernels.reference import quantize_per_chunk, quantize_per_lane
from crepe_llm.pruning.layer import mask_of
from crepe_llm.recipe_files import recipe_path
from method_recipes import MODELS
from records import RESULTS, Row, append, is_done, read
from recover import keys_of, mean_of
from recovered_models import CORPORA, RELATIVE_RATE, TRAINING, add_model_options, measure, pruned, recovered

# Raised by every change of a default or of how something is measured. 1: CRePE's mask alone, one seed, one corpus. 2:
# scales of INT4 up to the largest weight of a group.
PROTOCOL = 3

BEST = "CRePE + permutation + admm"
HEAD = "INT8 (W8A8), head INT8"
AS_SERVED = ", as served"
QUANTIZATIONS = {
    "none": None,
    "FP8 (W8A8)": "crepe_2of4_fp8",
    "INT8 (W8A8)": "crepe_2of4_int8",
    HEAD: "crepe_2of4_int8_head",
    "INT4 (W4A16), nearest": "crepe_2of4_w4a16",
    "INT4 (W4A16), GPTQ": "crepe_2of4_w4a16_gptq",
    f"{HEAD}{AS_SERVED}": "crepe_2of4_int8_head",
    f"INT4 (W4A16), nearest{AS_SERVED}": "crepe_2of4_w4a16",
    f"INT4 (W4A16), GPTQ{AS_SERVED}": "crepe_2of4_w4a16_gptq",
}
OF_SPARSE = {name for name in QUANTIZATIONS if name == HEAD or name.endswith(AS_SERVED)}


def quantization_of(name: str, dense: bool) -> str:
    """A shipped recipe without its pruning, as YAML; for a dense model with llm-compressor's own GPTQ.

    The models here have no routers: a run by a recipe that does not name them is the same run.
    """
    (stage,) = yaml.safe_load(recipe_path(name).read_text()).values()
    modifiers = stage["quantization_modifiers"]
    for fields in modifiers.values():
        ignored = [pattern for pattern in fields.pop("ignore") if "router" not in pattern]
        fields |= {"ignore": ignored} if ignored else {}
    if dense:
        modifiers = {name.replace("MaskedGPTQ", "GPTQ"): fields for name, fields in modifiers.items()}
    return yaml.safe_dump({"quantization_stage": {"quantization_modifiers": modifiers}})


def starts_of(options: argparse.Namespace) -> list[Row]:
    """The conditions of every model that is quantized: recover.py's, the best stack alone trained."""
    common: dict[str, Any] = {"structures": ["2:4"], "methods": ["full"], "relative_rate": RELATIVE_RATE} | TRAINING
    asked = argparse.Namespace(**common | vars(options))
    asked.starts = [start for start in options.starts if start != "dense"]
    keys = [key for key in keys_of(asked) if key["start"] in options.starts]
    return [key for key in keys if not key["method"] or (key["start"] == BEST and key["tokens"])]


def runs_of(options: argparse.Namespace) -> list[Row]:
    """Every start with every quantization; GPTQ of a dense model calibrates, too, with the first seed."""
    return [
        start | {"quantization": label, "quantized_by": None if name is None else quantization_of(name, dense)}
        for start in starts_of(options)
        for dense in [start["start"] == "dense"]
        for label, name in QUANTIZATIONS.items()
        # transformers reads a tied head of codes in this package's folders only, and the plugin serves sparse layers.
        if label in options.quantizations and not (dense and label in OF_SPARSE)
    ]


def start_of(key: Row, folder: Path) -> Path:
    """The folder of a run's model before it is quantized."""
    if key["start"] == "dense":
        return MODELS[key["model"]]()
    source, _ = pruned(key, folder)
    return recovered(key, source, folder)[0] if key["method"] else source


def quantize(key: Row, source: Path, target: Path) -> None:
    """Load, quantize and save; the calibration text of a seed is that of its pruning."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, key["dtype"]))
    if key["quantized_by"]:
        data = samples.calibration_windows(
            tokenizer, samples.wikipedia().train, windows=key["windows"], length=key["length"], seed=key["seed"] or 0
        )
        reset_session()
        oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=key["quantized_by"],
            dataset=data,
            num_calibration_samples=key["windows"],
            max_seq_length=key["length"],
            shuffle_calibration_samples=False,
        )
        attach(model)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def linear_layers(folder: Path) -> dict[str, torch.nn.Linear]:
    """A model's linear layers but the head, by name; quantized weights as the numbers they stand for."""
    quantized = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    says = "quantization_config" in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **(quantized if says else {}))
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def check_masks(source: Path, target: Path) -> None:
    """Raise RuntimeError where a quantized model has a weight that the mask removed."""
    before = linear_layers(source)
    for name, layer in linear_layers(target).items():
        if not is_2of4(layer.weight) or layer.weight[~mask_of(before[name])].any():
            raise RuntimeError(f"{target}: {name} left the mask of {source}")


def quantize_inputs(model: PreTrainedModel) -> None:
    """Round what a model's INT4 layers, or else its head, are given to int8, as the vLLM plugin does."""

    def by_chunk(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = quantize_per_chunk(x)
        return values, scales.repeat_interleave(COLUMN_CHUNK, 1)[:, : x.shape[1]]

    def hook(module: torch.nn.Module, rounding: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        def rounded(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x, *rest = inputs
            values, scales = rounding(x.flatten(0, -2))
            return (values * scales).view(x.shape).to(x.dtype), *rest

        module.register_forward_pre_hook(rounded)

    layers = [module for module in model.modules() if getattr(module, "quantization_scheme", None) is not None]
    if not layers:
        raise RuntimeError("no layer of the model is quantized")
    of_codes = [layer for layer in layers if layer.quantization_scheme.weights.num_bits == 4]
    for layer in of_codes:
        hook(layer, by_chunk)
    if not of_codes:
        hook(model.get_output_embeddings(), quantize_per_lane)


def row_of(key: Row, folder: Path, scratch: Path) -> Row:
    """Quantize, check and measure."""
    source = start_of(key, folder)
    quantize(key, source, scratch)
    if key["start"] != "dense":
        check_masks(source, scratch)
    tokenizer = AutoTokenizer.from_pretrained(scratch)
    model = AutoModelForCausalLM.from_pretrained(scratch, dtype=getattr(torch, key["dtype"])).eval()
    size = sum(path.stat().st_size for path in scratch.glob("*.safetensors"))
    if key["quantization"].endswith(AS_SERVED):
        quantize_inputs(model)
    found = measure(model, tokenizer, key["length"], key["measured"])
    return key | found | {"bytes": size, "packed": len(read_folder(scratch).layers)}


def table(rows: list[Row], options: argparse.Namespace) -> str:
    """Markdown: a line for each model, start and quantization; means over seeds, and the change by quantization."""
    lines = [f"| model | start | quantization | {' | '.join(CORPORA)} | test, against none | MB |", f"|{'---|' * 8}"]
    plain = {(*_start(row), row["seed"]): row["perplexity"]["test"] for row in rows if row["quantization"] == "none"}
    for cell in dict.fromkeys((*_start(row), row["quantization"]) for row in rows):
        mine = [row for row in rows if (*_start(row), row["quantization"]) == cell]
        pairs = [(row["perplexity"]["test"], plain.get((*_start(row), row["seed"]))) for row in mine]
        change = "" if None in [b for _, b in pairs] else f"{statistics.mean(a / b for a, b in pairs if b) - 1:+.1%}"
        figures = " | ".join(mean_of(mine, corpus) for corpus in CORPORA)
        start = f"{cell[1]}, {cell[2]} tokens" if cell[2] else cell[1]
        lines.append(f"| {cell[0]} | {start} | {cell[3]} | {figures} | {change} | {mine[0]['bytes'] / 1e6:.1f} |")
    lines.append(
        f"\nPerplexity on {options.measured} tokens of the test and validation articles and of ABC news, in windows of "
        f"{options.length}; mean ± half the range over the seeds measured of {', '.join(map(str, options.seeds))}; MB "
        "are the safetensors'."
    )
    return "\n".join(lines)


def _start(row: Row) -> tuple[str, str, int]:
    return row["model"], row["start"], row["tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    starts = ["dense", "CRePE", BEST]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--starts", nargs="+", choices=starts, default=starts, metavar="START", help="of: %(choices)s")
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[400_000], help="of the best stack's training; 0: none"
    )
    parser.add_argument(
        "--quantizations", nargs="+", choices=QUANTIZATIONS, default=list(QUANTIZATIONS), metavar="NAME"
    )
    add_model_options(parser)
    parser.add_argument("--results", type=Path, default=RESULTS / "quantization.jsonl", help="a row a checkpoint")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    logger.remove()
    runs, rows = runs_of(options), read(options.results)
    missing = [] if options.report else [run for run in runs if not is_done(run, rows, PROTOCOL)]
    for run in tqdm(missing, unit=" checkpoints"):
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(append(options.results, PROTOCOL, row_of(run, options.folder, Path(scratch))))
    print(table([row for run in runs for row in rows if is_done(run, [row], PROTOCOL)], options))


if __name__ == "__main__":
    main()
