"""A hill climb on CRePE's coefficients: the kind of search on real perplexity that the proxy replaces."""

import numpy as np

from crepe_llm.search.optimisers import Optimiser
from crepe_llm.search.space import RIA, SearchSpace


def hill_climb(space: SearchSpace, seed: int) -> Optimiser:
    """Yield one candidate at a time, each a step from the best so far along one axis; end when no step helps.

    Starts at RIA's place in the space. Each round tries every axis in random order, both ways, and keeps a step as soon
    as it lowers the loss; a round without such a step halves the step, from a quarter of the axis down to 1/32. On real
    perplexity this is the kind of search that the proxy replaces.

    Args:
        space: where to search.
        seed: of the order of the axes.

    Source: the paper (arXiv 2606.01544) says only that perplexity was hill-climbed; this procedure is ours.
    """
    generator = np.random.default_rng(seed)
    best = space.point(RIA)
    sizes = len(space.kernel_sizes)
    [best_loss] = yield [space.coefficients(best)]
    step = 0.25
    while step >= 1 / 32:
        improved = False
        for axis in generator.permutation(space.varying()).tolist():
            for direction in (1.0, -1.0):
                trial = list(best)
                length = max(step, 1 / (sizes - 1)) if axis == 3 else step
                trial[axis] = min(1.0, max(0.0, trial[axis] + direction * length))
                candidate = space.coefficients(trial)
                if candidate == space.coefficients(best):
                    continue
                [loss] = yield [candidate]
                if loss < best_loss:
                    best, best_loss, improved = trial, loss, True
                    break
        if not improved:
            step /= 2
