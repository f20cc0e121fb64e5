"""Proxies for perplexity: how well a score would prune a model, told from a sample of its layers and rows.

A :class:`LayerSample` keeps what of one layer no candidate changes: the sampled rows of the weight, each term of the
CRePE score on them, the Gram matrix of the layer's inputs. :func:`prune` scores and masks the samples for one set of
:class:`Coefficients`, and a :class:`Proxy` turns the outcome into a number. A candidate's cost is thus that of the
sample, whatever the depth of the model.
"""

import dataclasses
import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from crepe_llm.functional.gini import gini_index
from crepe_llm.functional.scores import magnitude_scores, window_mean
from crepe_llm.models.blocks import kind_of
from crepe_llm.search.space import Coefficients, Mask

__all__ = [
    "DEFAULT_PROXY",
    "PROXIES",
    "LayerSample",
    "Proxy",
    "PrunedSample",
    "evaluate",
    "fingerprint",
    "prune",
    "sample_layers",
]

# As in crepe_scores: sums of |W| below this count as zero.
_TINY = torch.finfo(torch.float32).tiny
# Fourth powers: a row that loses nearly all of its output weighs more than many that lose a little.
_ROW_POWER = 4


def sample_layers(names: Iterable[str], per_kind: int, seed: int) -> list[str]:
    """Choose layers for a sample: of each kind, `per_kind` spread over the depth.

    Layers with the same place in different blocks, or in different experts, are of one kind. The layers of a kind, in
    order, are cut into `per_kind` runs of equal length, and one is drawn from each.

    Args:
        names: layer names in the model's order.
        per_kind: layers of each kind, at least 1; kinds with fewer are taken whole.
        seed: of the draw.

    Returns:
        The chosen names, in the model's order.

    Raises:
        ValueError: per_kind is below 1.
    """
    if per_kind < 1:
        raise ValueError(f"per_kind={per_kind} must be at least 1")
    names = list(names)
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    chosen = set()
    for kind, members in kinds.items():
        runs = min(per_kind, len(members))
        generator = _generator(kind.replace("*", "#"), seed)  # "#" as in the first studies, which draw the same
        for run in range(runs):
            start, stop = run * len(members) // runs, (run + 1) * len(members) // runs
            chosen.add(members[start + int(torch.randint(stop - start, (), generator=generator))])
    return [name for name in names if name in chosen]


class LayerSample:
    """The part of one layer that a search looks at: some rows, and what about them no candidate changes.

    Row sums, column sums and window means are those of the whole layer, so that the scores of the sampled rows are
    exactly the layer's.

    Args:
        name: of the layer; with `seed`, decides the rows.
        weight: [d_out, d_in], any floating dtype.
        input_norm: [d_in], L2 norm of each input channel over the calibration tokens.
        gram: fp32 [d_in, d_in], the inputs' Gram matrix X^T X, or None where no proxy needs it. Kept, not copied.
        rows: how many rows to draw; all of them where there are fewer.
        kernel_sizes: the window sizes whose means are needed.
        seed: of the draw.

    Attributes:
        name: the layer's name.
        rows: int64 [n], the rows drawn, ascending.
        weight: fp32 [n, d_in].
        input_norm: fp32 [d_in].
        gram: as given.
        output_energy: fp32 [n], the sum over tokens of each row's squared output, or None without a Gram matrix.

    Raises:
        ValueError: if the shapes do not fit or rows is below 1.
    """

    def __init__(
        self,
        name: str,
        weight: torch.Tensor,
        input_norm: torch.Tensor,
        gram: torch.Tensor | None = None,
        *,
        rows: int,
        kernel_sizes: Sequence[int],
        seed: int,
    ) -> None:
        if rows < 1:
            raise ValueError(f"rows={rows} must be at least 1")
        d_out, d_in = weight.shape
        if input_norm.shape != (d_in,):
            raise ValueError(f"input_norm of {name} has the shape {list(input_norm.shape)}, expected [{d_in}]")
        if gram is not None and gram.shape != (d_in, d_in):
            raise ValueError(f"gram of {name} has the shape {list(gram.shape)}, expected [{d_in}, {d_in}]")
        self.name = name
        chosen = torch.randperm(d_out, generator=_generator(name, seed))[:rows].sort().values.to(weight.device)
        self.rows = chosen
        self.weight = weight.detach()[chosen].float()
        self.gram = gram
        magnitude = magnitude_scores(weight)
        sampled = magnitude[chosen]
        self._row_term = sampled / sampled.sum(dim=1, keepdim=True).clamp_min(_TINY)
        self._column_term = sampled / magnitude.sum(dim=0).clamp_min(_TINY)
        scale = 1 / math.sqrt(weight.numel())
        self._window_terms = {
            kernel_size: sampled.div(window_mean(magnitude, kernel_size)[chosen].clamp_min_(_TINY)).mul_(scale)
            for kernel_size in kernel_sizes
        }
        self.input_norm = input_norm.to(weight.device, torch.float32)
        self.output_energy = None if gram is None else _energy(self.weight, gram)

    def scores(self, coefficients: Coefficients) -> torch.Tensor:
        """The CRePE scores of the sampled rows, fp32 [n, d_in], as :func:`crepe_scores` gives them for the layer.

        Raises:
            ValueError: the kernel size is not one that the sample was made for.
        """
        c = coefficients
        scores = self._row_term * c.row
        if c.column > 0:
            scores.add_(self._column_term, alpha=c.column)
        if c.neighbourhood > 0:
            if c.kernel_size not in self._window_terms:
                raise ValueError(
                    f"kernel_size={c.kernel_size} is not among those that {self.name} was sampled for: "
                    f"{sorted(self._window_terms)}"
                )
            scores.add_(self._window_terms[c.kernel_size], alpha=c.neighbourhood)
        return scores.mul_(self.input_norm.pow(c.activation_exponent))


@dataclasses.dataclass(frozen=True)
class PrunedSample:
    """A layer's sample with one candidate's scores and mask.

    Attributes:
        layer: the sample.
        scores: fp32 [n, d_in].
        keep: bool [n, d_in], True where the weight is kept.
    """

    layer: LayerSample
    scores: torch.Tensor
    keep: torch.Tensor

    def squared_errors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared output error and squared dense output of each sampled row, summed over tokens, fp32 [n] each.

        Raises:
            ValueError: the sample has no Gram matrix.
        """
        if self.layer.gram is None or self.layer.output_energy is None:
            raise ValueError(f"{self.layer.name} was sampled without a Gram matrix, which output errors need")
        return _energy(self.layer.weight.masked_fill(self.keep, 0), self.layer.gram), self.layer.output_energy


def prune(samples: Iterable[LayerSample], coefficients: Coefficients, mask: Mask) -> list[PrunedSample]:
    """Score and mask every sample with one candidate's coefficients.

    N:M and per-row masks are exactly the layer's; where weights compete across the whole matrix, the sampled rows
    compete among themselves, an estimate of the layer's mask.
    """
    pruned = []
    for layer in samples:
        scores = layer.scores(coefficients)
        keep = mask.keep(scores, coefficients)
        pruned.append(PrunedSample(layer, scores, keep))
    return pruned


@dataclasses.dataclass(frozen=True)
class Proxy:
    """A named stand-in for perplexity.

    Attributes:
        name: as recipes name it.
        higher_is_better: the direction in which perplexity falls.
        needs_gram: whether samples must hold Gram matrices.
        of_layer: the proxy of one pruned sample; :func:`evaluate` takes the mean over samples.
    """

    name: str
    higher_is_better: bool
    needs_gram: bool
    of_layer: Callable[[PrunedSample], float]


def _gini_all(pruned: PrunedSample) -> float:
    return gini_index(pruned.scores)


def _gini_kept(pruned: PrunedSample) -> float:
    return gini_index(pruned.scores[pruned.keep])


def _gini_pruned(pruned: PrunedSample) -> float:
    return gini_index(pruned.scores[~pruned.keep])


def _reconstruction(pruned: PrunedSample) -> float:
    error, energy = pruned.squared_errors()
    return (error.sum() / energy.sum().clamp_min(_TINY)).item()


def _row_reconstruction(pruned: PrunedSample) -> float:
    error, energy = pruned.squared_errors()
    return (error / energy.clamp_min(_TINY)).pow(_ROW_POWER).mean().pow(1 / _ROW_POWER).item()


def _balanced_reconstruction(pruned: PrunedSample) -> float:
    error, energy = pruned.squared_errors()
    layer = error.sum() / energy.sum().clamp_min(_TINY)
    rows = (error / energy.clamp_min(_TINY)).square().mean().sqrt()
    return 0.5 * math.log(max((layer * rows).item(), _TINY))


PROXIES: Mapping[str, Proxy] = {
    proxy.name: proxy
    for proxy in (
        Proxy("gini", True, False, _gini_pruned),
        Proxy("gini_all", True, False, _gini_all),
        Proxy("gini_kept", True, False, _gini_kept),
        Proxy("reconstruction", False, True, _reconstruction),
        Proxy("row_reconstruction", False, True, _row_reconstruction),
        Proxy("balanced_reconstruction", False, True, _balanced_reconstruction),
    )
}
"""By name:

- ``gini``: Gini index of the pruned weights' scores; our guess at the paper's proxy;
- ``gini_all``, ``gini_kept``: of all scores, of the kept weights' scores;
- ``reconstruction``: ||(W - W~) X||^2 / ||W X||^2 of the layer;
- ``row_reconstruction``: the same of each row by itself, and the fourth-power mean over rows: it sees rows that starve;
- ``balanced_reconstruction``: half the logarithm of the layer's error times the root mean square of its rows' errors,
  so that the mean over layers is the logarithm of a geometric mean.

All but the choice of the Gini index are ours; docs/notes/proxies.md has the evidence.
"""

DEFAULT_PROXY = "balanced_reconstruction"


def evaluate(samples: Sequence[LayerSample], coefficients: Coefficients, mask: Mask, proxy: Proxy) -> float:
    """The proxy of one candidate: its mean over the samples.

    Raises:
        ValueError: no samples, a NaN, or samples without what the proxy needs.
    """
    if not samples:
        raise ValueError("there are no layer samples to evaluate the candidate on")
    pruned = prune(samples, coefficients, mask)
    values = [proxy.of_layer(sample) for sample in pruned]
    for sample, value in zip(pruned, values, strict=True):
        if not math.isfinite(value):
            raise ValueError(
                f"the proxy {proxy.name} of {sample.layer.name} is {value} for {coefficients}: "
                "check the weight and the calibration inputs of that layer"
            )
    return math.fsum(values) / len(values)


def _energy(rows: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of (rows X^T)^2, [n], through the Gram matrix; rounding cannot make it negative."""
    return (rows @ gram).mul_(rows).sum(dim=1).clamp_min_(0)


def _generator(name: str, seed: int) -> torch.Generator:
    # torch's CPU generator takes 32 bits of a seed, so name and seed are hashed into as many.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def fingerprint(samples: Sequence[LayerSample]) -> str:
    """Tells samples of other weights, rows or calibration data apart."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.name.encode())
        for tensor in (sample.rows, sample.weight, sample.input_norm):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
