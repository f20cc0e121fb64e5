"""Recovery fine-tuning of a model that CFSP has cut: LoRA whose rank in each block follows the block's importance."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from crepe_llm.functional.structured import RankAllocation, recovery_ranks
from crepe_llm.models.blocks import find_blocks
from crepe_llm.models.classes import load_tokenizer
from crepe_llm.models.generation import repair_generation_config
from crepe_llm.models.linear import is_linear, is_transposed
from crepe_llm.models.losses import check_tokens
from crepe_llm.training.loop import DivergedError, Plan, check_seed, train
from crepe_llm.training.masked import sparse_layer
from crepe_llm.training.work_folder import fingerprint, hash_windows, resumable, working_in

__all__ = ["Recovered", "RecoverySettings", "recover"]

# LoRA's alpha over its rank: what the product of its matrices is multiplied by, the same for blocks of any rank.
_SCALE = 2


@dataclass(frozen=True)
class Recovered:
    """What a recovery did.

    Attributes:
        steps: of the optimiser.
        first_loss: mean training loss over the first tenth of the steps.
        last_loss: over the last.
        ranks: LoRA rank of each block.
        seconds: it took, interrupted runs included up to their last checkpoint.
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
        ValueError: a number of epochs, a batch or a learning rate that is not positive, or a dtype that is none.
    """

    rank: int = 8
    allocation: RankAllocation = "important"
    epochs: int = 1
    learning_rate: float = 2e-4
    batch: int = 8
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "batch", "learning_rate"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} must be positive and finite")
            if name != "learning_rate" and value != int(value):
                raise ValueError(f"{name}={value} must be a whole number")
        check_seed(self.seed)
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f'dtype="{self.dtype}" must be auto or a dtype of torch, such as bfloat16')


def recover(
    source: str | Path,
    destination: str | Path,
    work: str | Path,
    windows: Callable[[Any], torch.Tensor],
    settings: RecoverySettings | None = None,
    trust_remote_code: bool = False,
    keep_work: bool = False,
) -> Recovered:
    """Train low-rank updates of all linear layers in a pruned model's blocks, and merge them into its weights.

    Interrupted, the same call goes on where the last checkpoint in `work` was made; `work` is removed at the end,
    unless `keep_work` says otherwise.

    Args:
        source: a checkpoint's folder, with its tokenizer. Its config.json holds the blocks' importances.
        destination: an existing empty folder for the recovered model.
        work: a folder for checkpoints of the training.
        windows: of the checkpoint's tokenizer, the token ids to train on, int64 [windows, length].
        settings: of the training; None for the default ones.
        trust_remote_code: whether code that the model brings along runs, if it needs that.
        keep_work: leave `work` where a model is written, for a caller who removes it when that model is safe.

    Raises:
        ValueError: the checkpoint is sparse or quantized, or holds no importances, or windows are longer than its
            context, or `work` belongs to another training or holds other files, or `destination` holds any.
        BlockingIOError: another process uses `work`.
        ImportError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError('crepe recover needs peft: pip install ".[recover]" in the checkout')
    settings = settings or RecoverySettings()
    source, destination, work = Path(source), Path(destination), Path(work)
    _refuse_compressed(source)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    ids = windows(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=settings.dtype, trust_remote_code=trust_remote_code)
    check_tokens(model, ids)
    repair_generation_config(model)  # or transformers would refuse to save it after the training
    blocks = find_blocks(model)
    importance = _importance(model, len(blocks), settings.allocation)
    ranks = recovery_ranks(importance, settings.rank, settings.allocation)
    layers = _linear_layers(blocks)
    _refuse_sparse(source, layers)
    with working_in(work, destination):
        resumable(work, _identity(source, ids, ranks, str(model.dtype), settings))
        torch.manual_seed(settings.seed)
        adapted = _with_updates(model, layers, dict(zip(blocks, ranks, strict=True)), settings.rank)
        try:
            trained = train(adapted, ids, ids[:0], _likelihood, _plan(len(ids), settings), work)
        except DivergedError:
            shutil.rmtree(work)  # so that another rate may follow
            raise
        adapted.merge_and_unload(safe_merge=True).save_pretrained(destination)
        tokenizer.save_pretrained(destination)
        if (source / "recipe.yaml").is_file():
            shutil.copyfile(source / "recipe.yaml", destination / "recipe.yaml")
        if not keep_work:
            shutil.rmtree(work)
    losses = trained.losses
    tenth = max(1, len(losses) // 10)
    return Recovered(
        steps=trained.steps,
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
        ranks=ranks,
        seconds=trained.seconds,
    )


def _identity(
    source: Path, ids: torch.Tensor, ranks: list[int], dtype: str, settings: RecoverySettings
) -> dict[str, Any]:
    """What an interrupted training must share with the one that goes on with it."""
    return {
        "source": fingerprint(source),
        "windows": hash_windows(ids),
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


def _plan(windows: int, settings: RecoverySettings) -> Plan:
    return Plan(
        learning_rate=settings.learning_rate,
        batch=settings.batch,
        steps=-(-settings.epochs * windows // settings.batch),
        seed=settings.seed,
    )


def _likelihood(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean negative log-likelihood of a batch's tokens."""
    return model(input_ids=inputs["input_ids"], labels=inputs["input_ids"]).loss


def _refuse_compressed(source: Path) -> None:
    path = source / "config.json"
    if not path.is_file():
        raise ValueError(f"{source} is not a folder with a model: it has no config.json")
    config = json.loads(path.read_text())
    for field in ("quantization_config", "sparsity_config"):
        if config.get(field):
            raise ValueError(
                f"{source} is sparse or quantized ({field} in config.json), and training would fill its zeros and "
                "leave its scales: give --teacher to recover a sparse model, or recover the model that CFSP has cut "
                "and prune or quantize what comes of it"
            )


def _refuse_sparse(source: Path, layers: dict[str, torch.nn.Module]) -> None:
    found = sparse_layer(layers)
    if found is not None:
        raise ValueError(
            f"{source} is sparse: {found[1]:.0%} of {found[0]} are zeros, which training would fill. Give --teacher to "
            "recover it with its masks, or recover the model that CFSP has cut, and prune what comes of it"
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
        if is_linear(module)
    }
