"""Recovery of a pruned model: its kept weights, norms and biases learn the predictions of the dense model.

The loss is the Kullback-Leibler divergence from the dense model's predictions (distillation of logits; Hinton et al.,
arXiv 1503.02531), on request mixed with the negative log-likelihood of the text.
"""

import dataclasses
import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, TrainerCallback

from crepe_llm.checkpoints.converting import pack_folder
from crepe_llm.checkpoints.copying import copy_rest
from crepe_llm.functional.bitmask import unpack_bits
from crepe_llm.models.classes import load_tokenizer
from crepe_llm.models.linear import is_transposed
from crepe_llm.models.losses import check_tokens
from crepe_llm.models.parent import check_config, check_embeddings, check_tokenizers
from crepe_llm.training.callback import KeepMasksCallback
from crepe_llm.training.loop import DivergedError, OptimizerState, Plan, Trained, check_seed, train
from crepe_llm.training.lora import add_updates, merge_updates
from crepe_llm.training.masked import keep_masks
from crepe_llm.training.models import (
    linear_layers,
    load_dense,
    load_pruned,
    masks_of,
    not_finite,
    parameter_name,
    refuse_quantized,
    refuse_sparse_config,
)
from crepe_llm.training.targets import Head, Predictions, Target, find_head, mean_loss
from crepe_llm.training.teacher import Teacher, count_windows, keep_predictions, sample_windows
from crepe_llm.training.work_folder import best_state, fingerprint, hash_windows, resumable, working_in

__all__ = ["DistillationSettings", "Distilled", "distill"]

Precision = Literal["auto", "bf16", "fp32"]
Windows = Callable[[Any], torch.Tensor]

_HELD_OUT = 16
_LORA_RATE = 1e-3
# A loss that changes by less than this share of it has not moved.
_UNMOVED = 1e-4


@dataclass(frozen=True)
class DistillationSettings:
    """How a pruned model learns from the dense one.

    The budget is `tokens` or `minutes`; without either every window is seen once.

    Attributes:
        method: `full` trains the weights that the masks keep, `lora` masked low-rank updates of them; norms and biases
            train with either.
        rank: of the updates.
        tokens: to train on; a text with fewer is seen again.
        minutes: of training, evaluations included.
        relative_rate: learning rate of AdamW after the warm-up, as a share of each parameter's root mean square (of the
            kept weights, at least 1e-3); it falls linearly to 0. For `full`.
        learning_rate: the same, absolute and for all parameters alike, instead; None: 1e-3 for `lora`, whose updates
            start at 0, and the relative rate for `full`.
        warmup: steps in which it rises.
        batch: windows a step.
        micro_batch: windows at once; None for the whole batch of a process.
        cross_entropy: share of the text's negative log-likelihood in the loss, the rest being the divergence.
        top_k: keep the teacher's so many likeliest tokens in a file instead of asking it in every epoch; 0: ask it.
        embeddings: whether embeddings and head train, too.
        precision: of products; weights are trained in fp32. `auto` is bf16 where the device is fast at it.
        optimizer_state: precision of AdamW's state; less than fp32 needs torchao.
        gradient_checkpointing: compute activations again instead of keeping them.
        held_out: windows kept aside to tell the best state; None for a tenth, at most 16.
        evaluations: of them, spread over the budget.
        patience: so many evaluations in a row that are clearly (1 %) worse than the best end the training.
        self_generated: tokens of text that the teacher writes, trained on besides the text given.
        length: of the windows that it writes.
        seed: of the order of the windows, the updates' start and the text that the teacher writes.

    Raises:
        ValueError: a number out of its range, or both budgets.
    """

    method: Literal["full", "lora"] = "full"
    rank: int = 16
    tokens: int | None = None
    minutes: float | None = None
    relative_rate: float = 1.5e-3
    learning_rate: float | None = None
    warmup: int = 10
    batch: int = 4
    micro_batch: int | None = None
    cross_entropy: float = 0.0
    top_k: int = 0
    embeddings: bool = False
    precision: Precision = "auto"
    optimizer_state: OptimizerState = "fp32"
    gradient_checkpointing: bool = False
    held_out: int | None = None
    evaluations: int = 10
    patience: int = 3
    self_generated: int = 0
    length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("rank", "tokens", "minutes", "relative_rate", "learning_rate", "batch", "micro_batch")
        for name in (*positive, "evaluations", "patience"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} must be positive")
        for name in ("warmup", "top_k", "held_out", "self_generated"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.cross_entropy <= 1:
            raise ValueError(f"cross_entropy={self.cross_entropy} is a share of the loss: give 0 to 1")
        if self.tokens is not None and self.minutes is not None:
            raise ValueError(f"tokens={self.tokens} and minutes={self.minutes} are two budgets: give one")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"batch={self.batch} is not a multiple of micro_batch={self.micro_batch}")
        if self.length < 2:
            raise ValueError(f"length={self.length} must be at least 2")
        check_seed(self.seed)
        for name, wanted in (("relative_rate", self.is_relative), ("rank", self.method == "lora")):
            if getattr(self, name) != getattr(type(self), name) and not wanted:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect with method={self.method} and "
                    f"learning_rate={self.learning_rate}: leave it out"
                )
        if self.top_k and self.cross_entropy == 1:
            raise ValueError(f"top_k={self.top_k} has no effect with cross_entropy=1, which asks no teacher")
        choices = {"method": ("full", "lora"), "precision": ("auto", "bf16", "fp32")}
        for name, known in (choices | {"optimizer_state": ("fp32", "8bit", "4bit")}).items():
            if getattr(self, name) not in known:
                raise ValueError(f'{name}="{getattr(self, name)}" must be one of {", ".join(known)}')

    @property
    def is_relative(self) -> bool:
        """Whether learning rates are shares of the parameters' sizes."""
        return self.learning_rate is None and self.method == "full"

    @property
    def rate(self) -> float:
        """The highest learning rate, relative or not."""
        return self.relative_rate if self.is_relative else self.learning_rate or _LORA_RATE


@dataclass(frozen=True)
class Distilled:
    """What a distillation did.

    Attributes:
        trained: the loop's report.
        tokens: that were trained on, repetitions included.
        windows: that there were to train on.
        held_out: windows kept aside.
        length: tokens of a window.
        masked: how many weights the masks keep, of how many.
    """

    trained: Trained
    tokens: int
    windows: int
    held_out: int
    length: int
    masked: tuple[int, int]


def distill(
    source: str | Path,
    destination: str | Path,
    work: str | Path,
    teacher: str | Path,
    windows: Windows | None,
    settings: DistillationSettings | None = None,
    trust_remote_code: bool = False,
    keep_work: bool = False,
) -> Distilled:
    """Train a pruned model on the dense model's predictions, and write it with the same masks.

    Interrupted, the same call goes on where the last checkpoint in `work` was made; `work` is removed at the end,
    whether a model is written or not, unless `keep_work` says otherwise. Under `accelerate launch` or `torchrun` every
    process makes the same call, and one of them writes.

    Args:
        source: the pruned model's folder, with its tokenizer: 2:4 packed or plain, unstructured, or structured.
        destination: an existing empty folder for the recovered model.
        work: a folder for checkpoints of the training.
        teacher: the dense model that was pruned, with its tokenizer.
        windows: of the model's tokenizer, the token ids to train on, int64 [windows, length]; None to train on the
            teacher's own text alone.
        settings: of the training; None for the default ones.
        trust_remote_code: whether code that the models bring along runs, if they need that.
        keep_work: leave `work` where a model is written, for a caller who removes it when that model is safe.

    Raises:
        ValueError: source or teacher or text cannot be trained with, `work` holds other files, or `destination` any;
            before anything is trained. Or no state was better than the model given.
        BlockingIOError: another process uses `work`.
        DivergedError: a loss is no number, or the held-out loss has doubled; after the best state was written, if
            there is one that is better than the model given.
    """
    settings = settings or DistillationSettings()
    source, destination, work = Path(source), Path(destination), Path(work)
    run = _Run(source, work, teacher, settings, trust_remote_code, keep_work)
    with working_in(work, destination) if run.process.is_main_process else nullcontext():
        run.prepare(windows)
        try:
            trained = run.train()
        except DivergedError as error:
            raise DivergedError(f"{error}. {run.rescue(destination)}") from error
        if trained.held_out and not trained.best_step:
            run.discard()
            raise ValueError(
                f"no state was better than {source} itself, whose held-out loss is {trained.held_out[0][1]:.4f}: take "
                f"a {_other(trained.held_out)} {'relative rate' if settings.is_relative else 'learning rate'} than "
                f"{settings.rate:g}, or more text"
            )
        run.save(destination)
    return run.report(trained)


def _other(held_out: list[tuple[int, float]]) -> str:
    """How a learning rate has to change that made no state better, by the held-out losses."""
    first, *losses = (loss for _, loss in held_out)
    return "higher" if all(abs(loss - first) < _UNMOVED * first for loss in losses) else "lower"


class _Run:
    """One distillation, from its checks to its folder."""

    def __init__(
        self,
        source: Path,
        work: Path,
        teacher: str | Path,
        settings: DistillationSettings,
        trust: bool,
        keep_work: bool,
    ) -> None:
        # Every process needs the weights, to find their masks; accelerate's option leaves them empty in all but one.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        refuse_quantized(source)
        config, dense = (AutoConfig.from_pretrained(name, trust_remote_code=trust) for name in (source, teacher))
        check_config(config, dense, source, f"teacher={teacher}")
        self.dense_config, self.trust, self.keep_work = dense, trust, keep_work
        self.source, self.work, self.teacher_name, self.settings = source, work, teacher, settings
        self.tokenizer, other = (load_tokenizer(name, trust_remote_code=trust) for name in (source, teacher))
        check_tokenizers(self.tokenizer, other, source, f"teacher={teacher}")
        self.process = PartialState(cpu=not torch.cuda.is_available())
        together = self.micro_batch * self.process.num_processes
        if settings.batch % together:
            raise ValueError(
                f"batch={settings.batch} is not a multiple of the {together} windows that {self.process.num_processes} "
                f"processes take at once, {self.micro_batch} each"
            )
        if settings.optimizer_state != "fp32" and importlib.util.find_spec("torchao") is None:
            raise ImportError(f"optimizer_state={settings.optimizer_state} needs torchao: pip install torchao")
        self.bf16 = settings.precision == "bf16" or (settings.precision == "auto" and _is_bf16_fast(self.device))

    @property
    def device(self) -> torch.device:
        return self.process.device

    @property
    def micro_batch(self) -> int:
        """Windows that a process takes at once."""
        return self.settings.micro_batch or max(1, self.settings.batch // self.process.num_processes)

    def prepare(self, windows: Windows | None) -> None:
        """Load and check all that a training needs."""
        settings = self.settings
        if windows is None and not settings.self_generated:
            raise ValueError("there is nothing to train on: give windows, or self_generated")
        ids = None if windows is None else windows(self.tokenizer)
        if ids is None:
            self._held_out_of(count_windows(settings.self_generated, settings.length), generated=True)
        if ids is not None and settings.self_generated and ids.shape[1] != settings.length:
            raise ValueError(f"length={settings.length} of self-generated windows, {ids.shape[1]} of the others")
        self.student = load_pruned(self.source, torch.float32, self.trust)
        self.masks = masks_of(self.student, self.source)
        if Path(self.teacher_name).resolve() == self.source.resolve():
            raise ValueError(
                f"teacher={self.teacher_name} is the pruned model itself: give the dense model that it was made from"
            )
        refuse_sparse_config(self.dense_config, self.teacher_name)
        dense = load_dense(self.teacher_name, torch.bfloat16 if self.bf16 else torch.float32, self.trust)
        check_embeddings(self.student, dense, self.source, f"teacher={self.teacher_name}")
        if ids is not None:
            check_tokens(self.student, ids)
            self._split(ids)
        if settings.self_generated:
            check_tokens(dense, torch.zeros(1, settings.length, dtype=torch.int64))
        with self.process.main_process_first():
            resumable(self.work, self._identity(ids))
        dense = dense.to(self.device)
        if settings.self_generated:
            self._add_generated(dense, ids)
        self.student.to(self.device)
        self._choose_parameters()
        self._make_loss(dense)

    def train(self) -> Trained:
        plan = self._plan()
        if self.process.num_processes == 1:
            self._estimate(plan)
        callbacks: list[TrainerCallback] = []
        masks = {name: bits for name, bits in self.masks.items() if name not in self.updated}
        if masks:
            keep_masks(self.student, {name: self._unpacked(name, bits) for name, bits in masks.items()})
            callbacks.append(KeepMasksCallback())
        trained = train(self.student, self.windows, self.held_out, self.loss, plan, self.work, callbacks)
        self.process.wait_for_everyone()
        return trained

    def save(self, destination: Path) -> None:
        """Write the best state over the model that was given, in its precision and with its masks."""
        if self.process.is_main_process:
            model = load_pruned(self.source, "auto", self.trust)
            _, state = best_state(self.work)
            if self.settings.method == "lora":
                merge_updates(model, self.updated, state)
            own = dict(model.named_parameters())
            with torch.no_grad():
                for name, tensor in state.items():
                    if name in own:
                        own[name].copy_(tensor)
            found = not_finite(model)
            if found is not None:
                self.discard()
                raise ValueError(f"what {found} has learnt is too large for {model.dtype}: take a lower learning rate")
            _write(model, self.source, destination, self.masks)
        self.process.wait_for_everyone()
        if not self.keep_work:
            self.discard()

    def discard(self) -> None:
        """Remove the state of a training that has ended, so that one with other settings may begin."""
        if self.process.is_main_process:
            shutil.rmtree(self.work)

    def rescue(self, destination: Path) -> str:
        """After a divergence write the best state, if one is better than the start; says what was done."""
        step, _ = best_state(self.work)
        if not step:
            self.discard()
            return "No state was better than the model given, and none is written"
        self.save(destination)
        return f"The best state, that of step {step}, is written"

    def report(self, trained: Trained) -> Distilled:
        length = self.windows.shape[1]
        kept = sum(int(unpack_bits(bits, 8 * bits.shape[1]).count_nonzero()) for bits in self.masks.values())
        every = sum(self.student.get_parameter(parameter_name(self.student, name)).numel() for name in self.masks)
        return Distilled(
            trained=trained,
            tokens=trained.steps * self.settings.batch * length,
            windows=len(self.windows),
            held_out=len(self.held_out),
            length=length,
            masked=(kept, every),
        )

    def _held_out_of(self, windows: int, length: int = 0, generated: bool = False) -> int:
        """How many of so many windows are kept aside. Raises ValueError if too few are left to train on."""
        settings = self.settings
        count = max(1, min(_HELD_OUT, windows // 10)) if settings.held_out is None else settings.held_out
        if windows - count < settings.batch:
            what, more = f"the text holds {windows} windows of {length} tokens", "more text"
            if generated:
                what = f"self_generated={settings.self_generated} is {windows} windows of {settings.length} tokens"
                more = "more tokens"
            raise ValueError(
                f"{what}: too few for held_out={count} and a step of batch={settings.batch}. Give {more}, or a smaller "
                "length"
            )
        return count

    def _split(self, ids: torch.Tensor) -> None:
        """Keep the last windows aside: an article's own windows tell little of what was learnt."""
        count = self._held_out_of(*ids.shape)
        self.windows, self.held_out = ids[: len(ids) - count], ids[len(ids) - count :]

    def _add_generated(self, dense: Any, ids: torch.Tensor | None) -> None:
        settings = self.settings
        with self.process.main_process_first():
            written = sample_windows(
                dense, self.tokenizer, settings.self_generated, settings.length, settings.seed, self._file("generated")
            )
        if ids is None:
            self._split(written)
        else:
            self.windows = torch.cat([self.windows, written])

    def _choose_parameters(self) -> None:
        """Say which parameters train, and add updates for LoRA."""
        student, settings = self.student, self.settings
        tables = {id(module.weight) for module in student.modules() if isinstance(module, torch.nn.Embedding)}
        head = student.get_output_embeddings()
        tables |= {id(parameter) for parameter in head.parameters()} if head is not None else set()
        for parameter in student.parameters():
            parameter.requires_grad_(settings.embeddings or id(parameter) not in tables)
        self.updated: dict[str, torch.Tensor | None] = {}
        if settings.method == "lora":
            torch.manual_seed(settings.seed)
            self.updated = {name: self.masks.get(name) for name in linear_layers(student)}
            for parameter in student.parameters():
                parameter.requires_grad_(parameter.requires_grad and (parameter.dim() < 2 or id(parameter) in tables))
            add_updates(student, self.updated, settings.rank)

    def _make_loss(self, dense: Any) -> None:
        teacher: Callable[[torch.Tensor, torch.Tensor], Predictions] = Teacher(dense, len(self.windows))
        if self.settings.top_k:
            with self.process.main_process_first():
                every = torch.cat([self.windows, self.held_out])
                assert isinstance(teacher, Teacher)
                teacher = keep_predictions(teacher, every, self.settings.top_k, self._file("teacher"))
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        self.loss = _Loss(self.student, teacher, self.settings.cross_entropy, dtype)

    def _plan(self) -> Plan:
        settings = self.settings
        tokens = settings.tokens if settings.tokens is not None else self.windows.numel()
        per_step = settings.batch * self.windows.shape[1]
        return Plan(
            learning_rate=settings.rate,
            relative=settings.is_relative,
            batch=settings.batch,
            micro_batch=self.micro_batch,
            steps=max(1, tokens // per_step) if settings.minutes is None else None,
            minutes=settings.minutes,
            warmup=settings.warmup,
            betas=(0.9, 0.95),
            bf16=self.bf16,
            state=settings.optimizer_state,
            gradient_checkpointing=settings.gradient_checkpointing,
            evaluations=settings.evaluations,
            patience=settings.patience,
            seed=settings.seed,
        )

    def _estimate(self, plan: Plan) -> None:
        """Print how long the budget takes, or how far it goes, by two batches that train nothing."""
        batch = {
            "input_ids": self.windows[: plan.micro_batch].to(self.device),
            "index": torch.arange(len(self.windows[: plan.micro_batch])),
        }
        seconds = 0.0
        for _ in range(2):
            started = time.perf_counter()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.loss(self.student, batch)
            loss.backward()
            loss.item()
            seconds = time.perf_counter() - started
        self.student.zero_grad()
        step = seconds * plan.batch / plan.micro_batch
        tokens = plan.batch * self.windows.shape[1]
        budget = (
            f"{plan.steps} steps, {plan.steps * tokens:,} tokens, about {plan.steps * step / 60:.1f} minutes"
            if plan.steps is not None
            else f"{plan.minutes:g} minutes, about {60 * (plan.minutes or 0) / step * tokens:,.0f} tokens"
        )
        if plan.steps is not None and plan.steps <= plan.warmup:
            highest = max(plan.rate(done, 0) for done in range(plan.steps))
            budget += (
                f"; that ends within the warm-up of {plan.warmup} steps, at {highest:.0%} of the learning rate: "
                "train on more tokens, or lower warmup"
            )
        print(f"training: {step:.1f} s for a step of {tokens:,} tokens; {budget}", flush=True)

    def _unpacked(self, name: str, bits: torch.Tensor) -> torch.Tensor:
        """The mask of a layer, bool [d_out, d_in], or of another parameter, in its shape."""
        parameter = self.student.get_parameter(parameter_name(self.student, name))
        keep = unpack_bits(bits, parameter.shape[-1]).view(parameter.shape)
        modules = dict(self.student.named_modules())
        return keep.T if name in modules and is_transposed(modules[name]) else keep

    def _file(self, name: str) -> Path:
        return self.work / f"{name}.safetensors"

    def _identity(self, ids: torch.Tensor | None) -> dict[str, Any]:
        """What an interrupted training must share with the one that goes on with it."""
        teacher = Path(self.teacher_name)
        return dataclasses.asdict(self.settings) | {
            "source": fingerprint(self.source),
            "teacher": fingerprint(teacher) if teacher.is_dir() else str(self.teacher_name),
            "windows": None if ids is None else hash_windows(ids),
            "bf16": self.bf16,
        }


class _Loss:
    """The distillation loss of a batch, through the student as transformers and accelerate have wrapped it."""

    def __init__(
        self,
        student: Any,
        teacher: Callable[[torch.Tensor, torch.Tensor], Predictions],
        share: float,
        dtype: torch.dtype,
    ) -> None:
        ids = torch.arange(min(8, student.get_input_embeddings().weight.shape[0]))[None].to(student.device)
        head = find_head(student, ids)
        body = None if head is None else _body_that_is_called(student, ids)
        self.head: Head | None = None if body is None else head
        self.teacher, self.share, self.dtype = teacher, share, dtype
        self._hidden: torch.Tensor | None = None
        if body is not None:
            body.register_forward_hook(self._see)

    def __call__(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = inputs["input_ids"]
        predictions = self.teacher(ids, inputs["index"]) if self.share < 1 else None
        target = Target(predictions, ids[:, 1:].flatten(), self.share)
        if self.head is None:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            return mean_loss(logits.flatten(0, 1), None, target)
        # Called as a whole, so that wrappers see it; what its body gave is caught by the hook.
        outputs = model(input_ids=ids, use_cache=False, logits_to_keep=1)
        hidden, self._hidden = self._hidden, None
        assert hidden is not None
        loss = mean_loss(hidden[:, :-1].flatten(0, 1), self.head, target, self.dtype)
        if isinstance(self.head.module.weight, DTensor):
            # FSDP2 gathers what lies outside of the blocks when a gradient comes back through the outputs.
            loss = loss + 0 * outputs.logits.sum()
        return loss

    def _see(self, module: Any, args: Any, output: Any) -> None:
        self._hidden = output[0]


@torch.no_grad()
def _body_that_is_called(model: Any, ids: torch.Tensor) -> torch.nn.Module | None:
    """The module that gives what the head takes when a causal language model is called; None if there is none.

    That is its body, but some go past that to the decoder in it (OPT, BART).
    """
    seen: dict[torch.nn.Module, torch.Tensor] = {}

    def see(module: torch.nn.Module, args: Any, output: Any) -> None:
        seen[module] = output[0]

    hooks = [module.register_forward_hook(see) for module in {model.base_model, model.get_decoder()}]
    training = model.training
    model.eval()
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    wanted = model.base_model(input_ids=ids, use_cache=False)[0]
    model.train(training)
    return next((module for module, hidden in seen.items() if torch.allclose(hidden, wanted)), None)


def _is_bf16_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def _write(model: Any, source: Path, destination: Path, masks: dict[str, torch.Tensor]) -> None:
    for name, bits in masks.items():
        parameter = model.get_parameter(parameter_name(model, name))
        pruned = ~unpack_bits(bits, parameter.shape[-1]).view(parameter.shape).to(parameter.device)
        if bool(parameter[pruned].any()):
            raise RuntimeError(f"{name} has pruned weights that are not zero after its training; nothing is written")
    copy_rest(source, destination, other_weights=True)
    model.save_pretrained(destination)
    pack_folder(destination, masks)
