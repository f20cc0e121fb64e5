"""Is it worth searching more than one set of coefficients: a set for each kind of layer, a sparsity for each block?

    python benchmarks/search_space.py --models smollm2 --structures 2:4 60%
    python benchmarks/search_space.py --report

From the recipe's coefficients, every change is one step: column and neighbourhood three times or a third of what they
are, the exponent 0.2 more or less, for all layers or for one kind of layer alone; unstructured, ATP's line of
sparsities over the blocks, and moves of sparsity between a group of blocks and all others, as EvoPress makes them. Each
change is judged as the first stage of the search judges: by the divergence from the dense model. In each family of
changes the best change of each part is taken, if its gain is above its standard error. What is taken together is pruned
as the recipe prunes, judged as the last stage judges, and on test text. What one half of the windows would take is
judged on the other half, which it was not chosen on.

Rows are appended to --results as they are measured, and not measured again.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from crepe_llm import samples
from crepe_llm.evaluation.perplexity import perplexity
from crepe_llm.functional.allocation import atp
from crepe_llm.functional.masks import keep_mask
from crepe_llm.functional.scores import crepe_scores
from crepe_llm.models.blocks import block_of, find_blocks
from crepe_llm.pruning.block_pass import Calibration, Wanted
from crepe_llm.pruning.steps import Mask as MaskStep
from crepe_llm.search.rehearsal import Pruning, calls_of, rehearsed
from crepe_llm.search.space import RIA, Coefficients
from crepe_llm.search.trials import Trial
from crepe_llm.search.whole_model import WholeModel
from method_recipes import crepe
from pho_common import MODELS, WINDOW
from records import RESULTS, Row, append, is_done, read

# Raised by every change of a default or of how something is measured. 1: each half of the text pruned what the other
# judged.
PROTOCOL = 2
STRUCTURES = ("2:4", "50%", "60%", "70%")
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The steps: factors of column and neighbourhood, differences of the exponent.
FACTORS, EXPONENTS = (3.0, 1 / 3), (0.2, -0.2)
# Half of the range of ATP's line; below 0 earlier blocks are pruned more.
SPREADS = (-0.05, 0.05, 0.1, 0.15, 0.2)
# Blocks are cut into so many groups; a group is pruned by so much less or more, the other blocks by as much together.
GROUPS, MOVED = 6, 0.1
TEST_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class Setting:
    """What prunes a model: coefficients by kind of layer, in the order of KINDS, and a sparsity for each block."""

    coefficients: tuple[Coefficients, ...]
    sparsities: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Change:
    """One step away from a setting.

    Attributes:
        family: what may be searched.
        part: of the family; one change of a part is taken at most.
        name: the step.
        kinds: of layers whose coefficients change.
        factor: of their column and neighbourhood.
        exponent: what is added to theirs.
        offsets: what is added to the sparsity of each block; none where they stay.
    """

    family: str
    part: str
    name: str
    kinds: tuple[str, ...] = ()
    factor: float = 1.0
    exponent: float = 0.0
    offsets: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        """Tells it from all others."""
        return f"{self.family}, {self.part}: {self.name}"

    def __call__(self, setting: Setting) -> Setting:
        coefficients = tuple(
            self._changed(own) if kind in self.kinds else own
            for kind, own in zip(KINDS, setting.coefficients, strict=True)
        )
        offsets = self.offsets or (0.0,) * len(setting.sparsities)
        sparsities = tuple(own + offset for own, offset in zip(setting.sparsities, offsets, strict=True))
        return Setting(coefficients, sparsities)

    def _changed(self, own: Coefficients) -> Coefficients:
        return dataclasses.replace(
            own,
            column=own.column * self.factor,
            neighbourhood=own.neighbourhood * self.factor,
            activation_exponent=own.activation_exponent + self.exponent,
        )


def coefficient_changes() -> list[Change]:
    """One step each way of the balance of the terms and of the exponent, for all layers and for each kind alone."""
    changes = []
    for family, groups in (("all layers", {"all": KINDS}), ("each kind", {kind: (kind,) for kind in KINDS})):
        for part, kinds in groups.items():
            for factor in FACTORS:
                name = f"column and neighbourhood x {factor:.3g}"
                changes.append(Change(family, f"{part}, balance", name, kinds, factor=factor))
            for exponent in EXPONENTS:
                changes.append(Change(family, f"{part}, exponent", f"{exponent:+.1f}", kinds, exponent=exponent))
    return changes


def allocation_changes(blocks: int, sparsity: float) -> list[Change]:
    """ATP's line, and moves of sparsity between a group of blocks and all others; the mean stays."""
    changes = []
    for spread in SPREADS:
        line = atp(blocks, sparsity, spread=abs(spread))
        offsets = tuple((each - sparsity) * (1 if spread > 0 else -1) for each in line)
        changes.append(Change("ATP's line", "line", f"spread {spread:+.2f}", offsets=offsets))
    for group in range(GROUPS):
        inside = range(group * blocks // GROUPS, (group + 1) * blocks // GROUPS)
        others = MOVED * len(inside) / (blocks - len(inside))
        for sign in (-1, 1):
            offsets = tuple(sign * (MOVED if block in inside else -others) for block in range(blocks))
            part = f"blocks {inside[0]} to {inside[-1]}"
            changes.append(Change("moves between blocks", part, f"{sign * MOVED:+.2f}", offsets=offsets))
    return changes


def chosen(
    changes: Sequence[Change], trials: dict[str, Trial], base: Trial, windows: Sequence[int] | None = None
) -> list[Change]:
    """Of each part the change that gains most on some windows, or on all, if that is above its standard error."""
    on = range(len(base.losses)) if windows is None else windows
    best: dict[str, tuple[float, Change]] = {}
    for change in changes:
        gain, error = trials[change.label].on(on).gain_over(base.on(on))
        if gain > error and gain > best.get(change.part, (0.0, change))[0]:
            best[change.part] = (gain, change)
    return [change for _, change in best.values()]


class Bench:
    """A model with the text of a search, pruned by settings; what was measured is read from the results.

    Args:
        key: model, structure, seed and calibration windows: the conditions of all rows.
        path: of the results.
    """

    def __init__(self, key: Row, path: Path) -> None:
        self._key, self._path, self._rows = key, path, read(path)
        folder = MODELS[key["model"]]()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        corpus = samples.wikipedia()
        data = samples.calibration_windows(
            self._tokenizer, corpus.train, windows=key["windows"], length=WINDOW, seed=key["seed"]
        )
        self._sequences = [torch.tensor(ids) for ids in data["input_ids"]]
        self._blocks = {name: place for place, name in enumerate(find_blocks(self._model))}
        self._layers = {
            module: name
            for name, module in self._model.named_modules()
            if isinstance(module, torch.nn.Linear) and block_of(name) in self._blocks
        }
        self._fields = crepe(key["structure"])["CRePEModifier"]
        self.sparsity = None if ":" in key["structure"] else self._fields["sparsity"]
        names = list(RIA.of_score)
        own = Coefficients(**{name: self._fields[name] for name in names})
        flat = () if self.sparsity is None else (self.sparsity,) * len(self._blocks)
        self.base = Setting((own,) * len(KINDS), flat)
        self._whole = WholeModel(self._model, self._sequences, self.base, self._pruning)
        self._quick, self._last = self._whole.measures()

    @property
    def blocks(self) -> int:
        """How many decoder blocks there are."""
        return len(self._blocks)

    def first(self, change: Change | None) -> Trial:
        """A change from the base, None for the base itself, pruned and judged as in the first stage."""
        setting = self.base if change is None else change(self.base)
        key = {"stage": "first", "taken": [] if change is None else [change.label]}
        return self._judged(key, self._quick, setting, range(len(self._quick.tokens)))

    def last(self, taken: Sequence[Change], half: int | None = None) -> Trial:
        """Some changes together, pruned as the recipe prunes, judged on all windows or on those of one half."""
        key = {"stage": "last", "taken": [change.label for change in taken], "half": None}
        windows = range(len(self._last.tokens))
        if half is not None:
            whole = self._known(self._key | key)
            if whole is not None:
                return trial_of(whole).on(windows[half::2])
            key["half"], windows = half, windows[half::2]
        return self._judged(key, self._last, self._together(taken), windows)

    def test(self, taken: Sequence[Change]) -> float:
        """Perplexity of test text with some changes together, pruned as the recipe prunes, by all of the text."""
        key = {**self._key, "stage": "test", "taken": [change.label for change in taken], "test_tokens": TEST_TOKENS}
        row = self._known(key)
        if row is None:
            corpus, started = samples.wikipedia(), time.perf_counter()
            windows = samples.token_windows(self._tokenizer, corpus.test, WINDOW, tokens=TEST_TOKENS)
            with rehearsed(calls_of(self._model, self._sequences), self._pruning(self._together(taken), False)):
                found = perplexity(self._model, windows, corpus=corpus.name, progress=False).perplexity
            row = self._append(key | {"perplexity": found, "seconds": round(time.perf_counter() - started, 1)})
        return row["perplexity"]

    def _judged(self, stage: Row, measure: Any, setting: Setting, windows: range) -> Trial:
        key = {**self._key, **stage}
        row = self._known(key)
        if row is None:
            started = time.perf_counter()
            losses = measure.losses(setting, windows)
            row = {
                "losses": [round(loss, 4) for loss in losses],
                "tokens": [measure.tokens[window] for window in windows],
                "seconds": round(time.perf_counter() - started, 1),
            }
            row = self._append(key | row)
        return trial_of(row)

    def _known(self, key: Row) -> Row | None:
        return next((row for row in self._rows if is_done(key, [row], PROTOCOL)), None)

    def _append(self, row: Row) -> Row:
        self._rows.append(append(self._path, PROTOCOL, row))
        what = "; ".join(row["taken"]) or "the recipe's"
        print(f"{row['model']}, {row['structure']}, {row['stage']}: {what}: {row['seconds']} s", flush=True)
        return self._rows[-1]

    def _together(self, taken: Sequence[Change]) -> Setting:
        setting = self.base
        for change in taken:
            setting = change(setting)
        return setting

    def _pruning(self, setting: Setting, masks_alone: bool) -> Pruning:
        """CRePE's mask alone, by what a setting has for a layer's kind and block."""
        by_kind = dict(zip(KINDS, setting.coefficients, strict=True))

        def scores(name: str, weight: torch.Tensor, statistics: Any) -> torch.Tensor:
            coefficients = by_kind[name.rpartition(".")[2]]
            return crepe_scores(weight, statistics.norm, **coefficients.of_score)

        def mask(name: str, found: torch.Tensor) -> torch.Tensor:
            sparsity = setting.sparsities[self._blocks[block_of(name)]] if setting.sparsities else 0.5
            group = self._fields.get("comparison_group", "row")
            return keep_mask(found, sparsity, self._fields["mask_structure"], group)

        wanted = {module: Wanted(name) for module, name in self._layers.items()}
        return Pruning(wanted, Calibration(), MaskStep(scores, mask))


def trial_of(row: Row) -> Trial:
    """A row's losses; which setting lost them stands in the row."""
    return Trial(None, tuple(row["losses"]), tuple(row["tokens"]), row["seconds"])  # type: ignore[arg-type]


def measure(bench: Bench) -> None:
    """All of one model and structure that is not on record."""
    changes = coefficient_changes()
    if bench.sparsity is not None:
        changes += allocation_changes(bench.blocks, bench.sparsity)
    base = bench.first(None)
    trials = {change.label: bench.first(change) for change in changes}
    bench.last([])
    bench.test([])
    for family in dict.fromkeys(change.family for change in changes):
        of_family = [change for change in changes if change.family == family]
        taken = chosen(of_family, trials, base)
        bench.last(taken)
        bench.test(taken)
        for half in (0, 1):
            bench.last(chosen(of_family, trials, base, windows=range(half, len(base.losses), 2)), half=1 - half)


def report(rows: Sequence[Row]) -> None:
    """Tables of each model, structure and seed that is there as a whole."""
    rows = [row for row in rows if row["protocol"] == PROTOCOL]
    cells = dict.fromkeys((row["model"], row["structure"], row["seed"]) for row in rows)
    for cell in cells:
        mine = [row for row in rows if (row["model"], row["structure"], row["seed"]) == cell]
        firsts = {tuple(row["taken"]): trial_of(row) for row in mine if row["stage"] == "first"}
        print(f"\n{cell[0]}, {cell[1]}, seed {cell[2]}: {len(mine)} rows\n")
        base = firsts.pop((), None)
        if base is None:
            continue
        first_table({label: trial.gain_over(base) for (label,), trial in firsts.items()})
        family_table(mine, {label: trial for (label,), trial in firsts.items()}, base)


def first_table(gains: dict[str, tuple[float, float]]) -> None:
    """Every change by itself: its gain over the recipe's coefficients, in nats a token, with its standard error."""
    print("| change | gain, first stage |\n|---|---|")
    for label, (gain, error) in gains.items():
        print(f"| {label} | {gain:+.4f} ± {error:.4f} |")


def family_table(rows: Sequence[Row], trials: dict[str, Trial], base: Trial) -> None:
    """What each family's changes give together."""
    lasts = {(tuple(row["taken"]), row["half"]): trial_of(row) for row in rows if row["stage"] == "last"}
    tests = {tuple(row["taken"]): row["perplexity"] for row in rows if row["stage"] == "test"}
    incumbent = lasts.get(((), None))
    if incumbent is None:
        return
    print("\n| family | taken | chosen on one half, judged on the other | gain, all windows | test perplexity |")
    print("|---|---|---|---|---|")
    print(f"| the recipe's coefficients | | | 0 | {_number(tests.get(()))} |")
    measured = changes_by_label(trials)
    for family in dict.fromkeys(change.family for change in measured):
        changes = [change for change in measured if change.family == family]
        taken = tuple(change.label for change in chosen(changes, trials, base))
        together = lasts.get((taken, None))
        cells = [
            family,
            f"{len(taken)} of {len({change.part for change in changes})}",
            _pair(crossed(changes, trials, base, lasts, incumbent)),
            _pair(together and together.gain_over(incumbent)),
            _number(tests.get(taken)),
        ]
        print(f"| {' | '.join(cells)} |")


def changes_by_label(labels: Iterable[str]) -> list[Change]:
    """Changes that were measured, as far as their labels tell of them."""
    found = []
    for label in labels:
        where, _, name = label.partition(": ")
        family, _, part = where.partition(", ")
        found.append(Change(family, part, name))
    return found


def crossed(
    changes: Sequence[Change],
    trials: dict[str, Trial],
    base: Trial,
    lasts: dict[tuple[tuple[str, ...], int | None], Trial],
    incumbent: Trial,
) -> tuple[float, float] | None:
    """The gain of what each half of the windows takes, judged on the other half, and its standard error."""
    losses = list(incumbent.losses)
    for half in (0, 1):
        windows = range(half, len(base.losses), 2)
        taken = tuple(change.label for change in chosen(changes, trials, base, windows))
        if (taken, None) in lasts:
            losses[1 - half :: 2] = lasts[taken, None].losses[1 - half :: 2]
        elif (taken, 1 - half) in lasts:
            losses[1 - half :: 2] = lasts[taken, 1 - half].losses
        else:
            return None
    return dataclasses.replace(incumbent, losses=tuple(losses)).gain_over(incumbent)


def _pair(gain: tuple[float, float] | None) -> str:
    return "" if gain is None else f"{gain[0]:+.4f} ± {gain[1]:.4f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration windows")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 512 tokens (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "search_space.jsonl")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.report:
        for model in options.models:
            for structure in options.structures:
                for seed in options.seeds:
                    key = {"model": model, "structure": structure, "seed": seed, "windows": options.windows}
                    measure(Bench(key, options.results))
    report(read(options.results))


if __name__ == "__main__":
    main()
