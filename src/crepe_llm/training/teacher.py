"""The dense model that a pruned one learns from: what it predicts, what it writes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import GenerationConfig

from crepe_llm.training.targets import Predictions, TopK, Whole, find_head, keep_top

__all__ = ["Teacher", "count_windows", "keep_predictions", "sample_windows"]

_GENERATED_AT_ONCE = 32


class Teacher:
    """A model's predictions of the tokens of windows; those of held-out windows are made once.

    Args:
        model: a causal language model; it is put into evaluation mode.
        first_held_out: the index from which on windows are held out.
    """

    def __init__(self, model: Any, first_held_out: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.first_held_out = first_held_out
        device = model.get_input_embeddings().weight.device
        self.head = find_head(
            model, torch.arange(min(8, model.get_input_embeddings().weight.shape[0]))[None].to(device)
        )
        self._kept: dict[int, torch.Tensor] = {}

    def __call__(self, ids: torch.Tensor, index: torch.Tensor) -> Whole:
        """Predictions of all tokens but each window's first. ids: int64 [windows, length]; index: [windows]."""
        numbers = index.tolist()
        if all(number in self._kept for number in numbers):
            hidden = torch.stack([self._kept[number] for number in numbers])
        else:
            hidden = self._hidden(ids)
            if self.head is not None:
                self._kept |= {n: row for n, row in zip(numbers, hidden, strict=True) if n >= self.first_held_out}
        hidden = hidden.flatten(0, 1)
        if self.head is None:
            return Whole(hidden)
        return Whole(hidden, *self.head.matrix(hidden.dtype), self.head.cap)

    @torch.no_grad()
    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        if self.head is None:
            return self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        return self.model.base_model(input_ids=ids, use_cache=False)[0][:, :-1].to(self.model.dtype)


def keep_predictions(
    teacher: Teacher, windows: torch.Tensor, k: int, path: Path
) -> Callable[[torch.Tensor, torch.Tensor], Predictions]:
    """A teacher's k likeliest tokens for each token of all windows, in a file that is made once.

    Args:
        teacher: needed no more afterwards.
        windows: all that will be asked for, int64 [windows, length]; an index is a row.
        k: how many tokens; 6 bytes are kept for each.
        path: of the file.

    Returns:
        What takes the teacher's place.
    """
    if not path.is_file():
        parts = []
        device = teacher.model.get_input_embeddings().weight.device
        for index, window in enumerate(tqdm(windows, desc="teacher", unit=" windows")):
            parts.append(keep_top(teacher(window[None].to(device), torch.tensor([index])), k))
        tokens = torch.stack([part.tokens for part in parts])
        _save({"tokens": tokens, "log_p": torch.stack([part.log_p for part in parts])}, path)
    kept = load_file(path)

    def predictions(ids: torch.Tensor, index: torch.Tensor) -> TopK:
        rows = index.cpu()
        return TopK(*(kept[name][rows].flatten(0, 1).to(ids.device) for name in ("tokens", "log_p")))

    return predictions


def count_windows(tokens: int, length: int) -> int:
    """How many windows :func:`sample_windows` gives."""
    return max(1, tokens // length)


@torch.no_grad()
def sample_windows(teacher: Any, tokenizer: Any, tokens: int, length: int, seed: int, path: Path) -> torch.Tensor:
    """Text that a teacher writes, at temperature 1, in a file that is made once; an interrupted call's text is kept.

    Each window starts with the token that begins texts, or, where the tokenizer adds none, with a token drawn from the
    vocabulary. The end of a text is never drawn, and the teacher's own settings of generation do not count.

    Args:
        teacher: a causal language model.
        tokenizer: of it.
        tokens: about how many; rounded down to whole windows, at least one.
        length: of a window.
        seed: of the draws.
        path: of the file.

    Returns:
        int64 [windows, length].
    """
    if path.is_file():
        return load_file(path)["windows"].long()
    device = teacher.get_input_embeddings().weight.device
    count = count_windows(tokens, length)
    torch.manual_seed(seed)
    rows = teacher.get_input_embeddings().weight.shape[0]  # a tokenizer may know more tokens
    starts = torch.randint(min(len(tokenizer), rows), (count, 1))
    if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        starts.fill_(tokenizer.bos_token_id)
    parts = []
    bar = tqdm(total=count, desc="sampling from the teacher", unit=" windows")
    with _plain_sampling(teacher, tokenizer, length - 1), bar:
        for number, start in enumerate(starts.split(_GENERATED_AT_ONCE)):
            part = path.with_name(f"{path.stem}-{number}{path.suffix}")
            if not part.is_file():
                torch.manual_seed((seed << 20) + number)  # whatever was written before an interruption
                written = teacher.generate(
                    start.to(device),
                    attention_mask=torch.ones_like(start).to(device),
                    generation_config=teacher.generation_config,
                )
                _save({"windows": written.cpu().int()}, part)
            parts.append(part)
            bar.update(len(start))
    windows = torch.cat([load_file(part)["windows"] for part in parts])
    _save({"windows": windows}, path)
    for part in parts:
        part.unlink()
    return windows.long()


@contextmanager
def _plain_sampling(teacher: Any, tokenizer: Any, tokens: int) -> Iterator[None]:
    """Let a model write so many tokens by its predictions alone.

    Options of `generate` would not do: what they leave unsaid is taken from the model's own settings.
    """
    settings = teacher.generation_config
    known = settings.eos_token_id
    ends = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None}
    teacher.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )
    try:
        yield
    finally:
        teacher.generation_config = settings


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file that is complete or absent."""
    partial = path.with_name(f".{path.name}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(path)
