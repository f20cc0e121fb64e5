"""Are coefficients of their own for each kind of layer worth searching for?

By the proxy: how much lower its mean over the sampled layers is when each kind of layer takes the best of the same
candidates for itself, instead of all kinds the one that is best for all. On the model: the divergence from the dense
model when one group of layers takes other coefficients than the shipped recipe's, which the rest keep. Masks are by
the statistics of one half of the calibration windows in the model that RIA's coefficients prune block by block, and are
judged on the other half, so that no coefficients are at home. A row for each model and mask goes to
results/layer_kinds.jsonl.

    python benchmarks/layer_kinds.py --mask 2:4
    python benchmarks/layer_kinds.py --mask 0.6:matrix
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crepe_llm.functional.masks import keep_mask
from crepe_llm.functional.scores import crepe_scores
from crepe_llm.pruning.block_pass import Calibration, Wanted
from crepe_llm.pruning.steps import Mask as MaskStep
from crepe_llm.search.divergence import Divergence
from crepe_llm.search.fitness import DEFAULT_PROXY, PROXIES, prune
from crepe_llm.search.known import known_points
from crepe_llm.search.rehearsal import Pruning, mask_step, pruned, rehearsed, remembering
from crepe_llm.search.space import RIA, WANDA, Coefficients, Mask
from crepe_llm.search.trials import Trial
from pho_common import MODELS, Bench, parse_mask
from proxy_study import configurations
from records import RESULTS, append

PROTOCOL = 1
GROUPS = {"q and k": ("q_proj", "k_proj"), "v and o": ("v_proj", "o_proj"), "gate and up": ("gate_proj", "up_proj")}
GROUPS["down"] = ("down_proj",)
GROUPS["all"] = tuple(kind for kinds in GROUPS.values() for kind in kinds)


def by_proxy(bench: Bench, mask: Mask, count: int) -> dict[str, Any]:
    """The proxy's mean over layers with one choice for all kinds, and with one for each."""
    proxy = PROXIES[DEFAULT_PROXY]
    candidates = list(dict.fromkeys([*known_points(mask), *configurations(count)]))
    kinds = [sample.name.rpartition(".")[2] for sample in bench.samples]
    values = np.array([[proxy.of_layer(layer) for layer in prune(bench.samples, c, mask)] for c in candidates])
    own = {}
    for kind in dict.fromkeys(kinds):
        columns = [place for place, other in enumerate(kinds) if other == kind]
        best = int(values[:, columns].mean(axis=1).argmin())
        own[kind] = (dataclasses.asdict(candidates[best]), values[best, columns].mean(), len(columns))
    together = float(values.mean(axis=1).min())
    apart = float(sum(value * layers for _, value, layers in own.values()) / len(kinds))
    shipped = float(values[0].mean())
    print(f"{proxy.name}: shipped {shipped:.4f}, best for all {together:.4f}, best for each kind {apart:.4f}")
    return {"shipped": shipped, "together": together, "apart": apart, "own": {kind: own[kind][0] for kind in own}}


def step_of(chosen: Mapping[str, Coefficients], rest: Coefficients, mask: Mask) -> MaskStep:
    """CRePE's masks, by kind of layer with other coefficients than the rest."""

    def scores(name: str, weight: torch.Tensor, statistics: Any) -> torch.Tensor:
        coefficients = chosen.get(name.rpartition(".")[2], rest)
        return crepe_scores(weight, statistics.norm, **dataclasses.asdict(coefficients))

    return MaskStep(scores, lambda name, s: keep_mask(s, mask.sparsity, mask.mask_structure, mask.comparison_group))


def on_the_model(bench: Bench, mask: Mask) -> dict[str, Any]:
    """Losses with the shipped coefficients, and with others for one group of layers or for all."""
    shipped, *others = (*known_points(mask)[:1], RIA, WANDA)
    judged, calibrating = bench.calibration[::2], bench.calibration[1::2].unbind()
    divergence = Divergence(bench.model, list(judged))
    wanted = {module: Wanted(layer) for layer, module in bench.layers.items()}
    statistics: dict[Any, Any] = {}
    with rehearsed(
        bench.model, calibrating, remembering(Pruning(wanted, Calibration(), mask_step(RIA, mask)), statistics)
    ):
        pass

    def trial(chosen: Mapping[str, Coefficients]) -> Trial:
        with pruned(statistics, Pruning(wanted, Calibration(), step_of(chosen, shipped, mask))):
            losses = [divergence(window) for window in range(len(judged))]
        return Trial(shipped, tuple(losses), divergence.tokens, 0.0)

    first, found = trial({}), {}
    for other, name in zip(others, ("RIA", "Wanda"), strict=True):
        for group, kinds in GROUPS.items():
            gain, error = trial(dict.fromkeys(kinds, other)).gain_over(first)
            found[f"{name}, {group}"] = (gain, error)
            print(f"{name}'s for {group}: {gain:+.4f} nats a token, standard error {error:.4f}", flush=True)
    return {"loss": first.loss, "gains": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--mask", default="2:4", help='such as "2:4" or "0.6:matrix"')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--candidates", type=int, default=100, help="that the proxy compares")
    parser.add_argument("--results", type=Path, default=RESULTS / "layer_kinds.jsonl")
    options = parser.parse_args()
    bench, mask = Bench(options.model, options.seed), parse_mask(options.mask)
    row = {name: getattr(options, name) for name in ("model", "mask", "seed", "candidates")}
    row |= {"proxy": by_proxy(bench, mask, options.candidates), "divergence": on_the_model(bench, mask)}
    append(options.results, PROTOCOL, row)


if __name__ == "__main__":
    main()
