"""One training loop for all that recovers a pruned model: transformers' `Trainer` with a budget and held-out text.

The budget is a number of steps or of minutes. Held-out windows are evaluated along the way. The best state is kept in
a file, and training stops when it gets worse. Interrupted, the loop goes on where its last checkpoint was made.
"""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from crepe_llm.training.work_folder import best_evaluation, keep_best, last_checkpoint

__all__ = [
    "DivergedError",
    "Loss",
    "OptimizerState",
    "Plan",
    "Trained",
    "check_seed",
    "train",
]

OptimizerState = Literal["fp32", "8bit", "4bit"]
Loss = Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]

# Checkpoints and evaluations are spread over a training so evenly; checkpoints take a twentieth of the time at most.
_CHECKPOINTS = 10
_SAVING_SHARE = 0.05
# A held-out loss counts as doubled if it is larger than that by so much, in nats.
_NOISE = 0.01
# A budget of minutes has no number of steps; transformers wants one.
_ENDLESS = 1_000_000
# An evaluation counts as worse than the best if its loss is larger by this share.
_WORSE = 0.01
# What a parameter's root mean square is taken for at least, where learning rates are relative to it: Adafactor's.
_LEAST_SIZE = 1e-3
_OPTIMIZERS = {"fp32": "adamw_torch_fused", "8bit": "adamw_torch_8bit", "4bit": "adamw_torch_4bit"}


class DivergedError(ValueError):
    """A loss that is no number, or a held-out loss that has doubled."""


@dataclass(frozen=True)
class Plan:
    """How a model trains.

    Attributes:
        learning_rate: of AdamW after the warm-up; it falls linearly to 0 at the end of the budget.
        relative: whether that is a share of each parameter's root mean square, zeros left out, which is taken for at
            least 1e-3: the relative step sizes of Adafactor (arXiv 1804.04235), for AdamW.
        batch: windows a step, of all processes together.
        micro_batch: windows at once in a process.
        steps: the budget; None where it is `minutes`.
        minutes: the budget, evaluations included.
        warmup: steps in which the learning rate rises.
        betas: of AdamW.
        bf16: whether products are taken in bf16, beside fp32 weights.
        state: precision of the optimiser's state; less than fp32 needs torchao.
        gradient_checkpointing: whether activations are computed again instead of kept.
        evaluations: of the held-out windows, spread over the budget, besides one at the start.
        patience: so many evaluations in a row that are clearly worse than the best end the training.
        seed: of the order of the windows.
    """

    learning_rate: float
    batch: int
    relative: bool = False
    micro_batch: int = 1
    steps: int | None = None
    minutes: float | None = None
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    bf16: bool = False
    state: OptimizerState = "fp32"
    gradient_checkpointing: bool = False
    evaluations: int = 10
    patience: int = 3
    seed: int = 0

    def share(self, step: int, seconds: float) -> float:
        """How much of the budget is spent after so many steps and seconds, 0 to 1."""
        spent = seconds / (60 * self.minutes) if self.steps is None and self.minutes else step / (self.steps or 1)
        return min(1.0, spent)

    def rate(self, step: int, seconds: float) -> float:
        """The learning rate of the step after `step`, as a share of the highest."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.steps is None:
            return 1 - self.share(step, seconds)
        return max(0.0, (self.steps - step) / max(1, self.steps - self.warmup))


@dataclass(frozen=True)
class Trained:
    """What a training did.

    Attributes:
        steps: of the optimiser.
        losses: the training loss of each step.
        held_out: step and held-out loss of each evaluation; empty without held-out windows.
        seconds: it took, interrupted runs included up to their last checkpoint.
        ended: why it ended, in words; empty where the budget was spent.
        best_step: after which the state was best.
    """

    steps: int
    losses: list[float]
    held_out: list[tuple[int, float]]
    seconds: float
    ended: str
    best_step: int


def train(
    model: Any,
    windows: torch.Tensor,
    held_out: torch.Tensor,
    loss: Loss,
    plan: Plan,
    work: Path,
    callbacks: list[TrainerCallback] | None = None,
) -> Trained:
    """Train the parameters of a model that want gradients.

    Args:
        model: a transformers causal language model.
        windows: token ids to train on, int64 [windows, length].
        held_out: token ids to evaluate, [windows, length]; none of them are [0, length].
        loss: of the (wrapped) model and a batch, which has `input_ids` [windows, length] and `index` [windows]; an
            index counts the windows, and after them those held out.
        plan: the budget and the optimiser.
        work: a folder for checkpoints and for the best state (:mod:`crepe_llm.training.work_folder`).
        callbacks: for the `Trainer`.

    Raises:
        DivergedError: after the best state was kept.
        KeyboardInterrupt: as it came; the same call goes on from the last checkpoint, to the same result.
    """
    work.mkdir(parents=True, exist_ok=True)
    trainer = _Loop(model, windows, held_out, loss, plan, work)
    trainer.remove_callback(PrinterCallback)
    progress = _Progress(trainer)
    for callback in [_Budget(trainer), progress, *(callbacks or [])]:
        trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(work))
    finally:
        progress.close()
    trainer.keep_last()
    history = trainer.state.log_history
    return Trained(
        steps=trainer.state.global_step,
        losses=[entry["loss"] for entry in history if "loss" in entry],
        held_out=trainer.known,
        seconds=trainer.seconds,
        ended=trainer.ended,
        best_step=trainer.best[0],
    )


def check_seed(seed: int) -> None:
    """Raise ValueError if transformers' `Trainer` does not take a seed."""
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed={seed} must be at least 0 and below 2^32")


class _Loop(Trainer):
    """transformers' `Trainer` with a loss, a schedule and an evaluation of ours."""

    def __init__(
        self, model: Any, windows: torch.Tensor, held_out: torch.Tensor, loss: Loss, plan: Plan, work: Path
    ) -> None:
        self.stream = _Stream(windows, plan)
        super().__init__(model=model, args=_arguments(plan, work), train_dataset=self.stream)
        self.model_accepts_loss_kwargs = False
        self.plan, self.loss, self.work = plan, loss, work
        self.held_out = held_out
        self.first_held_out = len(windows)
        self.ended = ""
        self.kept = self.agreed(best_evaluation(work) if len(held_out) else None)
        self._started = time.monotonic()
        self._seconds_before: float | None = None

    @property
    def seconds(self) -> float:
        """Spent so far, by process 0's clock; at a resumption from what the checkpoint says."""
        if self._seconds_before is None:
            history = self.state.log_history
            self._seconds_before = next((e["seconds"] for e in reversed(history) if "seconds" in e), 0.0)
        return self._seconds_before + self.agreed(time.monotonic() - self._started)

    @property
    def evaluation_seconds(self) -> float:
        """What the last evaluation took, that of an interrupted run included."""
        history = self.state.log_history
        return next((entry["eval_seconds"] for entry in reversed(history) if "eval_seconds" in entry), 0.0)

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """Step and held-out loss of each evaluation on the way to the state that trains."""
        return [(int(entry["step"]), entry["eval_loss"]) for entry in self.state.log_history if "eval_loss" in entry]

    @property
    def known(self) -> list[tuple[int, float]]:
        """All evaluations by step, with that of the best state that an interrupted run has kept: it may be of a step
        after the last checkpoint, and what is trained from there need not be the same, under a budget of minutes."""
        found = dict(self.evaluations)
        if self.kept is not None:
            step, loss = self.kept
            found[step] = min(loss, found.get(step, loss))
        return sorted(found.items())

    @property
    def best(self) -> tuple[int, float]:
        """Step and held-out loss of the best state; the last step where nothing is held out."""
        return min(self.known or [(self.state.global_step, math.nan)], key=lambda evaluation: evaluation[1])

    def agreed(self, value: Any) -> Any:
        """Process 0's value, in every process."""
        return broadcast_object_list([value])[0] if self.accelerator.num_processes > 1 else value

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return self.loss(model, inputs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write a checkpoint's weights under the names that they have in the model.

        Those of the hub, which transformers writes by default and which differ for experts, images and some heads, are
        not found when a checkpoint is loaded.
        """
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises ValueError if a checkpoint lacks a parameter that trains: it would start anew beside the others."""
        model: Any = self.model
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found = {id(parameter) for name, parameter in parameters.items() if name not in load_result.missing_keys}
        trained = (name for name, parameter in parameters.items() if parameter.requires_grad)
        lost = next((name for name in trained if id(parameters[name]) not in found), None)
        if lost is not None:
            checkpoint = last_checkpoint(self.work)
            raise ValueError(
                f"{checkpoint} of an interrupted recovery has no weights for {lost}, which trains: remove "
                f"{checkpoint}, and repeat the command"
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.stream)

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW, with a learning rate for each parameter where rates are relative to their sizes."""
        if self.optimizer is not None or not self.plan.relative:
            return super().create_optimizer(model)
        wrapped: Any = model or self.model
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, wrapped)
        groups = [{"params": [one], "lr": self.plan.learning_rate * _size(one)} for one in trained]
        self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: self.plan.rate(step, 0.0 if self.plan.steps else self.seconds)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Raises DivergedError for a loss or a gradient that is no number."""
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise DivergedError(self._diverged(f"the {name} of step {self.state.global_step} is {logs[name]}"))
        super().log(logs | {"seconds": self.seconds}, start_time)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean loss of the held-out windows; keeps the state if none was better.

        Raises DivergedError if it is no number, or has doubled since the best.
        """
        step = self.state.global_step
        if not len(self.held_out) or (self.evaluations and self.evaluations[-1][0] == step):
            return {}
        started, model = self.seconds, self.model_wrapped
        model.eval()
        total = 0.0
        for start in range(0, len(self.held_out), self.plan.micro_batch):
            ids = self.held_out[start : start + self.plan.micro_batch]
            index = torch.arange(start, start + len(ids)) + self.first_held_out
            total += self.loss(model, self._prepare_inputs({"input_ids": ids, "index": index})).item() * len(ids)
        model.train()
        loss = self.agreed(total / len(self.held_out))
        if not step and not math.isfinite(loss):
            raise DivergedError(
                f"the held-out loss is {loss} before any training: the model's or the teacher's predictions are no "
                "numbers"
            )
        before = min((loss for _, loss in self.evaluations), default=math.inf)
        if not math.isfinite(loss) or loss > 2 * before + _NOISE:
            raise DivergedError(
                self._diverged(f"the held-out loss was {before:.4f} and is {loss:.4f} after {step} steps")
            )
        is_best = bool(step) and loss < self.best[1]
        self.log({"eval_loss": loss, "eval_seconds": self.seconds - started})
        if is_best:
            self.keep(loss)
        worse, than = self._worse_in_a_row()
        if worse >= self.plan.patience and step:
            self.ended = f"{worse} evaluations in a row were worse than that of step {than}"
            self.control.should_training_stop = True
        return {"eval_loss": loss}

    def _worse_in_a_row(self) -> tuple[int, int]:
        """How many of the last evaluations were clearly worse than the best on the way, and the step of that: a rate
        that has not fallen yet moves the loss up and down by a little, and what it learns shows when it falls.
        """
        step, lowest = min(self.evaluations, key=lambda evaluation: evaluation[1])
        limit = (1 + _WORSE) * lowest
        worse = itertools.takewhile(lambda evaluation: evaluation[1] > limit, reversed(self.evaluations))
        return sum(1 for _ in worse), step

    def keep(self, loss: float | None = None) -> None:
        """Write the parameters that train, whole, into the file of the best state, with its held-out loss.

        Raises DivergedError if one holds NaN or infinity.
        """
        trained = {
            name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
            for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters()
            if parameter.requires_grad
        }
        broken = next((name for name, tensor in trained.items() if not bool(tensor.isfinite().all())), None)
        if broken is not None:
            raise DivergedError(self._diverged(f"{broken} holds NaN or infinity after {self.state.global_step} steps"))
        if self.is_world_process_zero():
            keep_best(self.work, self.state.global_step, trained, loss)

    def keep_last(self) -> None:
        """Keep the last state, where nothing is held out that could tell a better one."""
        if not len(self.held_out):
            self.keep()

    def _diverged(self, what: str) -> str:
        rate = f"a {'relative' if self.plan.relative else 'learning'} rate of {self.plan.learning_rate:g}"
        return f"{what}: training diverges at {rate}; take a lower one"


class _Stream(torch.utils.data.Dataset[dict[str, Any]]):
    """Windows in the order of a training: all of them, shuffled, then all again, whatever the number of processes."""

    def __init__(self, windows: torch.Tensor, plan: Plan) -> None:
        self.windows, self.seed = windows, plan.seed
        self.length = (plan.steps or _ENDLESS) * plan.batch
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> dict[str, Any]:
        epoch, inside = divmod(place, len(self.windows))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.windows), generator=generator)
        index = int(self.order[inside])
        return {"input_ids": self.windows[index], "index": index}


class _Budget(TrainerCallback):
    """Says after each step whether to evaluate, to save, or to stop."""

    def __init__(self, loop: _Loop) -> None:
        self.loop = loop
        self.last_save = (0.0, 0.0)  # when, and how long it took
        self.spent = 0.0  # share of the budget after the step before
        self.begun = self.ended = 0.0  # seconds when the last step did

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spent = self.loop.plan.share(state.global_step, self.loop.seconds)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = self.loop.seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        plan, seconds = self.loop.plan, self.loop.seconds
        spent = plan.share(state.global_step, seconds)
        last = spent >= 1
        if plan.steps is None and plan.minutes:
            # Another step and the evaluation at the end have to fit.
            last = seconds + (seconds - self.begun) + self.loop.evaluation_seconds >= 60 * plan.minutes
        control.should_training_stop |= last
        if last or _crosses(self.spent, spent, plan.evaluations):
            control.should_evaluate = True
        if not last and _crosses(self.spent, spent, _CHECKPOINTS):
            at, took = self.last_save
            control.should_save = took < 1 or took < _SAVING_SHARE * (seconds - at)
        self.spent, self.ended = spent, seconds

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = self.loop.seconds
        self.last_save = (seconds, seconds - self.ended)


class _Progress(TrainerCallback):
    """One bar over all steps with the losses; transformers' own prints a line a step."""

    def __init__(self, loop: _Loop) -> None:
        self.loop = loop
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(
            total=self.loop.plan.steps,
            initial=state.global_step,
            desc="recovering",
            unit=" steps",
            disable=not state.is_world_process_zero,
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        losses = [entry["loss"] for entry in state.log_history[-20:] if "loss" in entry]
        parts = [f"loss {losses[-1]:.3f}"] if losses else []
        if self.loop.evaluations:
            parts.append(f"held out {self.loop.evaluations[-1][1]:.4f}, best {self.loop.best[1]:.4f}")
        if self.loop.plan.steps is None and self.loop.plan.minutes:
            parts.append(f"{self.loop.seconds / 60:.1f} of {self.loop.plan.minutes:g} minutes")
        self.bar.set_postfix_str(", ".join(parts))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def close(self) -> None:
        """End the bar's line, so that what is printed next has one of its own."""
        if self.bar is not None:
            self.bar.close()


def _size(parameter: torch.Tensor) -> float:
    """The root mean square of what is not zero, at least _LEAST_SIZE."""
    value = parameter.detach()
    sums = [value.float().square().sum(), (value != 0).float().sum()]
    total, count = (float(one.full_tensor() if isinstance(one, DTensor) else one) for one in sums)
    return max(_LEAST_SIZE, (total / max(1.0, count)) ** 0.5)


def _crosses(before: float, after: float, parts: int) -> bool:
    """Whether a share has gone beyond one of the marks that cut the whole into parts."""
    return int(before * parts + 1e-9) < int(after * parts + 1e-9)


def _arguments(plan: Plan, work: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=plan.steps or _ENDLESS,
        per_device_train_batch_size=plan.micro_batch,
        learning_rate=plan.learning_rate,
        adam_beta1=plan.betas[0],
        adam_beta2=plan.betas[1],
        optim=_OPTIMIZERS[plan.state],
        bf16=plan.bf16,
        gradient_checkpointing=plan.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if plan.gradient_checkpointing else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        # A checkpoint has all evaluations up to its step; another one would count for the best state and for patience.
        eval_on_start=last_checkpoint(work) is None,
        save_strategy="no",
        save_total_limit=1,
        report_to=[],
        seed=plan.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=True,
    )
    arguments.gradient_accumulation_steps = max(1, plan.batch // (plan.micro_batch * arguments.world_size))
    return arguments
