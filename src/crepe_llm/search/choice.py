"""One of a few candidates, by what the whole model loses when it is pruned with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

from tqdm import tqdm

from crepe_llm import processes
from crepe_llm.search.stages import DEFAULT_ROUNDS, Candidate
from crepe_llm.search.trials import gain_over, is_clear
from crepe_llm.search.whole_model import WholeModel

__all__ = ["Choice", "choose"]

# As many tokens judge all candidates as in a search; the whole text judges so many of them beside the first.
_FIRST_TOKENS, _FINALISTS = DEFAULT_ROUNDS[0][1], 2


@dataclass(frozen=True)
class Choice(Generic[Candidate]):
    """What was chosen, and what is known of the candidates.

    Attributes:
        chosen: the first candidate, or another that is clearly better.
        first: by candidate, by how many nats a token it is better than the first one when masks alone are made, and
            the standard error.
        last: the same of those that were pruned as the recipe prunes.
    """

    chosen: Candidate
    first: dict[Candidate, tuple[float, float]]
    last: dict[Candidate, tuple[float, float]]


def choose(pruned: WholeModel[Candidate], candidates: Sequence[Candidate]) -> Choice[Candidate]:
    """Judge candidates by masks alone, and the best two of them as the recipe prunes, beside the first one.

    All processes call it together, and share the candidates out.

    Args:
        pruned: the model and the text.
        candidates: two at least, the first of which the others must beat.
    """
    quick, real = pruned.measures()
    few = next((n for n in range(1, len(quick.tokens)) if sum(quick.tokens[:n]) >= _FIRST_TOKENS), len(quick.tokens))
    quick.prepare()
    first = _gains("Masks alone", candidates, quick.tokens[:few], lambda one: quick.losses(one, range(few)))
    ranked = sorted(candidates[1:], key=lambda one: -first[one][0])
    finalists = [candidates[0], *ranked[:_FINALISTS]]
    whole = range(len(real.tokens))
    last = _gains("As the recipe prunes", finalists, real.tokens, lambda one: real.losses(one, whole))
    clear = [one for one in finalists[1:] if is_clear(*last[one], len(real.tokens))]
    chosen = max(clear, key=lambda one: last[one][0], default=candidates[0])
    return processes.from_first(Choice(chosen, first, last))


def _gains(
    said: str, candidates: Sequence[Candidate], tokens: tuple[int, ...], losses: Callable[[Candidate], list[float]]
) -> dict[Candidate, tuple[float, float]]:
    """By candidate the gain over the first one, and its standard error; a bar shows what this process has done."""
    with tqdm(total=-(-len(candidates) // processes.count()), desc=said, unit=" candidates") as bar:

        def counted(one: Candidate) -> list[float]:
            found = losses(one)
            bar.update()
            return found

        found = processes.spread(candidates, counted)
    return {one: gain_over(own, found[0], tokens) for one, own in zip(candidates, found, strict=True)}
