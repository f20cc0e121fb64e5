"""Measuring finalists of a search on the model itself, pruned as each of them says."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from compressed_tensors.utils import align_module_device

from crepe_llm.functional.masks import keep_mask
from crepe_llm.functional.scores import crepe_scores
from crepe_llm.pruning.layer import set_weight_matrix, weight_matrix
from crepe_llm.search.space import Coefficients, Mask
from crepe_llm.search.study import Finalist, Study

__all__ = ["pruned", "verify"]

Losses = tuple[tuple[float, ...], tuple[int, ...]]


def verify(
    study: Study, shortlist: Iterable[Coefficients], losses: Callable[[Coefficients], Losses], path: Path
) -> Iterator[Finalist]:
    """Measure those of a shortlist that the study does not hold yet; yields each as it is measured.

    The study is saved with every one, in the order of the shortlist.

    Args:
        study: changed in place.
        shortlist: the coefficients to compare.
        losses: of coefficients, the summed loss of each sequence and how many tokens of it were predicted.
        path: where the study is saved.
    """
    measured = {finalist.coefficients: finalist for finalist in study.finalists}
    study.finalists = []
    for coefficients in shortlist:
        finalist = measured.get(coefficients)
        if finalist is None:
            started = time.perf_counter()
            finalist = Finalist(coefficients, *losses(coefficients), time.perf_counter() - started)
            yield finalist
        study.finalists.append(finalist)
        study.save(path)


@contextmanager
def pruned(norms: Mapping[torch.nn.Module, torch.Tensor], coefficients: Coefficients, mask: Mask) -> Iterator[None]:
    """Prune layers meanwhile, by the dense model's input statistics, and restore them.

    Args:
        norms: by linear layer the norms of its input channels, fp32 [d_in].
        coefficients: of CRePE's score.
        mask: the structure and sparsity of the masks.
    """
    originals = {}
    try:
        for module, norm in norms.items():
            with torch.no_grad(), align_module_device(module):
                weight = weight_matrix(module)
                scores = crepe_scores(weight, norm, **dataclasses.asdict(coefficients))
                keep = keep_mask(scores, mask.sparsity, mask.mask_structure, mask.comparison_group)
                originals[module] = weight.detach().clone()
                set_weight_matrix(module, weight.masked_fill(~keep, 0))
        yield
    finally:
        for module, weight in originals.items():
            with torch.no_grad(), align_module_device(module):
                set_weight_matrix(module, weight)
