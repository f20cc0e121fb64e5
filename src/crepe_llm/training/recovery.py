"""Recovery fine-tuning of a model that CFSP has cut: LoRA whose rank in each block follows the block's importance."""

import hashlib
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from crepe_llm.functional.structured import RankAllocation, recovery_ranks
from crepe_llm.models.blocks import find_blocks
from crepe_llm.models.ffn import is_transposed

__all__ = ["Recovered", "RecoverySettings", "recover"]

_SETTINGS = "settings.json"
# A dense model holds few exact zeros, one dequantised from 4 bit up to 11 % a layer (Gemma-3-270M), a pruned one more.
_SPARSE = 0.25
# LoRA's alpha over its rank: what the product of its matrices is multiplied by, the same for blocks of any rank.
_SCALE = 2
_CHECKPOINTS = 10


@dataclass(frozen=True)
class Recovered:
    """What a recovery did.

    Attributes:
        steps: of the optimiser.
        first_loss: mean training loss over the first tenth of the steps.
        last_loss: over the last.
        ranks: LoRA rank of each block.
        seconds: this run took; an earlier, interrupted one is not counted.
    """

    steps: int
    first_loss: float
    last_loss: float
    ranks: list[int]
    seconds: float


@dataclass(frozen=True)
class RecoverySettings:
    """How a recovery trains.

    Attributes:
        rank: the mean LoRA rank of the blocks.
        allocation: which blocks get more: see :func:`crepe_llm.functional.structured.recovery_ranks`.
        epochs: how often each window is seen.
        learning_rate: of AdamW at the start; it falls linearly to 0.
        batch: windows a step.
        dtype: of the weights: a name, or `auto` for that of the checkpoint. The updates are trained in fp32.
        seed: of the updates' start and of the order of the windows.

    Raises:
        ValueError: a number of epochs, a batch or a learning rate that is not positive.
    """

    rank: int = 8
    allocation: RankAllocation = "important"
    epochs: int = 1
    learning_rate: float = 2e-4
    batch: int = 8
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


def recover(
    source: str | Path,
    destination: str | Path,
    work: str | Path,
    windows: Callable[[Any], torch.Tensor],
    settings: RecoverySettings | None = None,
) -> Recovered:
    """Train low-rank updates of all linear layers in a pruned model's blocks, and merge them into its weights.

    Interrupted, the same call goes on where the last checkpoint in `work` was made; `work` is removed at the end.

    Args:
        source: a checkpoint's folder, with its tokenizer. Its config.json holds the blocks' importances.
        destination: an existing empty folder for the recovered model.
        work: a folder for checkpoints of the training.
        windows: of the checkpoint's tokenizer, the token ids to train on, int64 [windows, length].
        settings: of the training; None for the default ones.

    Raises:
        ValueError: the checkpoint is sparse or quantized, or holds no importances, or `work` belongs to another
            training.
        ImportError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError('crepe recover needs peft: pip install "crepe-llm[recover]"')
    settings = settings or RecoverySettings()
    source, destination, work = Path(source), Path(destination), Path(work)
    _refuse_compressed(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = windows(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=settings.dtype)
    blocks = find_blocks(model)
    importance = _importance(model, len(blocks), settings.allocation)
    ranks = recovery_ranks(importance, settings.rank, settings.allocation)
    layers = _linear_layers(blocks)
    _refuse_sparse(source, layers)
    last = _resumable(work, _identity(source, ids, ranks, str(model.dtype), settings))

    torch.manual_seed(settings.seed)
    adapted = _with_updates(model, layers, dict(zip(blocks, ranks, strict=True)), settings.rank)
    trainer = _trainer(adapted, ids, work, settings)
    result = trainer.train(resume_from_checkpoint=last)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tenth = max(1, len(losses) // 10)

    adapted.merge_and_unload(safe_merge=True).save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    if (source / "recipe.yaml").is_file():
        shutil.copyfile(source / "recipe.yaml", destination / "recipe.yaml")
    shutil.rmtree(work)
    return Recovered(
        steps=trainer.state.global_step,
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
        ranks=ranks,
        seconds=result.metrics["train_runtime"],
    )


def _identity(
    source: Path, ids: torch.Tensor, ranks: list[int], dtype: str, settings: RecoverySettings
) -> dict[str, Any]:
    """What an interrupted training must share with the one that goes on with it."""
    return {
        "source": [str(source.resolve()), *_fingerprint(source)],
        "windows": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16],
        "ranks": ranks,
        "epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "batch": settings.batch,
        "dtype": dtype,
        "seed": settings.seed,
    }


def _with_updates(model: Any, layers: dict[str, torch.nn.Module], ranks: dict[str, int], mean: int) -> Any:
    """The model with a trainable low-rank update of each layer; ranks by name of the block."""
    from peft import LoraConfig, get_peft_model

    of_block = {rf"{re.escape(name)}\..*": number for name, number in ranks.items()}
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=mean,
        lora_alpha=_SCALE * mean,
        rank_pattern=of_block,
        alpha_pattern={block: _SCALE * number for block, number in of_block.items()},
        target_modules=list(layers),
        fan_in_fan_out=any(map(is_transposed, layers.values())),
    )
    return get_peft_model(model, lora)


def _trainer(model: Any, ids: torch.Tensor, work: Path, settings: RecoverySettings) -> Trainer:
    steps = settings.epochs * -(-len(ids) // settings.batch)
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        logging_steps=1,
        save_strategy="steps",
        save_steps=max(1, steps // _CHECKPOINTS),
        save_total_limit=2,
        report_to=[],
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    data = [{"input_ids": window, "labels": window} for window in ids]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[_Progress()])
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Progress(TrainerCallback):
    """One bar over all steps with the loss; transformers' own prints a line a step."""

    bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="recovering", unit=" steps")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def _refuse_compressed(source: Path) -> None:
    path = source / "config.json"
    if not path.is_file():
        raise ValueError(f"{source} is not a folder with a model: it has no config.json")
    config = json.loads(path.read_text())
    for field in ("quantization_config", "sparsity_config"):
        if config.get(field):
            raise ValueError(
                f"{source} is sparse or quantized ({field} in config.json), and training would fill its zeros and "
                "leave its scales: recover the model that CFSP has cut, and prune or quantize what comes of it"
            )


def _refuse_sparse(source: Path, layers: dict[str, torch.nn.Module]) -> None:
    for name, module in layers.items():
        weight = cast(torch.Tensor, module.weight)
        zeros = 1 - int(weight.count_nonzero()) / weight.numel()
        if zeros > _SPARSE:
            raise ValueError(
                f"{source} is sparse: {zeros:.0%} of {name} are zeros, which training would fill. Recover the model "
                "that CFSP has cut, and prune what comes of it"
            )


def _importance(model: Any, blocks: int, allocation: RankAllocation) -> list[float]:
    importance = getattr(model.config.get_text_config(), "block_importance", None)
    if importance is None and allocation == "uniform":
        return [0.0] * blocks
    if not isinstance(importance, list) or len(importance) != blocks:
        raise ValueError(
            f"config.json has no block_importance of {blocks} blocks, which CFSPModifier writes: share ranks out with "
            "the allocation `uniform`"
        )
    return importance


def _linear_layers(blocks: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    return {
        f"{block}.{name}": module
        for block, inside in blocks.items()
        for name, module in inside.named_modules()
        if isinstance(module, torch.nn.Linear) or is_transposed(module)
    }


def _fingerprint(source: Path) -> list[list[Any]]:
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(source.glob("*.safetensors"))]


def _resumable(work: Path, settings: dict[str, Any]) -> str | None:
    """The last checkpoint of an interrupted training with the same settings, None if there is none."""
    path = work / _SETTINGS
    if path.is_file():
        if json.loads(path.read_text()) != settings:
            raise ValueError(
                f"{work} holds an interrupted recovery with other settings, text or model: repeat that command to "
                "finish it, or remove the folder"
            )
        return get_last_checkpoint(str(work))
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n")
    return None
