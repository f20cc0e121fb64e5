"""Do the shipped recipes prune as they did at an earlier revision?

    python scripts/compare_with.py a2f28ac                                      # every recipe on every family
    python scripts/compare_with.py HEAD~3 --only crepe_2of4 --family llama opt

Every recipe of the working tree prunes small random models (fp32, fixed seeds, calibration batches with padding) by the
working tree's package and by the revision's, each in processes of its own with one thread. The table has, for each
family and recipe, the largest difference of any value of the two state dicts, and how many mask bits differ: zeros of
one matrix that the other lacks. The last column, the share of zeros, shows that something was pruned at all. A recipe
that both refuse (ValueError) counts as equal; both messages are shown if they differ.

Exit status 1 if anything differs.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from revisions import check_package, output_of, sources, start  # noqa: E402

WINDOWS, LENGTH, PADDED_TO, BATCH = 12, 16, 10, 4
# Fields that make a recipe fast enough here; both sides get them.
FASTER = {"PHOSearchModifier": {"candidates": 8, "finalists": 3}}


def recipe_text(path: Path) -> str:
    """A recipe with the fields of FASTER, as YAML."""
    import yaml

    stages = yaml.safe_load(path.read_text())
    for stage in stages.values():
        for modifiers in stage.values():
            for name, fields in modifiers.items():
                fields |= FASTER.get(name, {})
    return yaml.safe_dump(stages, sort_keys=False)


# What each side's process does. It uses nothing of crepe_llm but that it is there: modules move between revisions.


def calibration_data() -> Any:
    """Windows of random tokens; every third is padded on the right."""
    import torch
    from datasets import Dataset

    from tiny_models import VOCABULARY

    ids = torch.randint(3, VOCABULARY - 1, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::3, PADDED_TO:] = 0
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})


def prune_all(model: Path, recipes: Path, results: Path) -> None:
    """Prune a saved model by every recipe of a folder; save the state dicts, or why a recipe was refused."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session
    from loguru import logger
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logger.remove()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = {"num_calibration_samples": WINDOWS, "shuffle_calibration_samples": False, "batch_size": BATCH}
    for recipe in sorted(recipes.glob("*.yaml")):
        torch.manual_seed(0)
        reset_session()
        pruned = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        try:
            oneshot(model=pruned, recipe=recipe.read_text(), dataset=calibration_data(), **options)
        except ValueError as error:
            (results / f"{recipe.stem}.txt").write_text((str(error).splitlines() or [""])[0])
        else:
            torch.save(pruned.state_dict(), results / f"{recipe.stem}.pt")


# What is made of their results.


def zeros(state: dict[str, Any]) -> float:
    """The share of zeros in all matrices of a state dict."""
    matrices = [tensor for tensor in state.values() if tensor.ndim > 1]
    return sum(int((matrix == 0).sum()) for matrix in matrices) / sum(matrix.numel() for matrix in matrices)


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, int, set[str]]:
    """The largest absolute difference of two state dicts, the mask bits that differ, and names that do not match."""
    import torch

    largest, bits = 0.0, 0
    odd = set(ours) ^ set(theirs)
    for name in set(ours) & set(theirs):
        one, other = ours[name], theirs[name]
        if one.shape != other.shape:
            odd.add(name)
            continue
        one, other = one.double(), other.double()
        apart = torch.where((one == other) | (one.isnan() & other.isnan()), 0.0, (one - other).abs())
        largest = max(largest, apart.nan_to_num(nan=float("inf")).max().item() if apart.numel() else 0.0)
        if one.ndim > 1:
            bits += int(((one == 0) != (other == 0)).sum())
    return largest, bits, odd


def row(ours: Path, theirs: Path, recipe: str) -> tuple[str, bool]:
    """What a recipe's line of the table says, and whether both sides agree."""
    import torch

    said = [path.read_text() if path.exists() else None for path in (ours / f"{recipe}.txt", theirs / f"{recipe}.txt")]
    if said == [None, None]:
        states = [torch.load(folder / f"{recipe}.pt") for folder in (ours, theirs)]
        largest, bits, odd = difference(*states)
        names = f", {len(odd)} tensors of one side only or of another shape: {', '.join(sorted(odd)[:3])}" * bool(odd)
        return f"{largest:.3g} | {bits}{names} | {zeros(states[0]):.1%}", not (largest or bits or odd)
    if None in said:
        return f"refused by one | | here: {said[0] or 'pruned'}; there: {said[1] or 'pruned'}", False
    return f"refused | | {said[0]}" + f"; there: {said[1]}" * (said[0] != said[1]), True


def compare(family: str, recipes: Path, sides: list[Path], scratch: Path) -> Iterator[tuple[str, bool]]:
    """The lines of one family, and whether both sides agree in each."""
    from tiny_models import configs, save_model

    model = scratch / family / "model"
    save_model(configs(hidden_size=64, intermediate_size=256)[family](), model)
    started, folders = [], []
    for number, source in enumerate(sides):
        folders.append(scratch / family / str(number))
        folders[-1].mkdir()
        worker = ["--worker", *map(str, (source, model, recipes, folders[-1]))]
        started.append(start(Path(__file__), worker, source, folders[-1]))
    for process in started:
        output_of(process)
    for recipe in sorted(recipes.glob("*.yaml")):
        line, same = row(*folders, recipe.stem)
        yield f"| {family} | {recipe.stem} | {line} |", same


def main() -> int:
    from transformers.utils.logging import disable_progress_bar

    from tiny_models import configs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="to compare the working tree with")
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="shipped recipes, by name")
    parser.add_argument("--family", nargs="+", choices=list(configs()), default=list(configs()))
    options = parser.parse_args()
    disable_progress_bar()

    alike = True
    with sources(options.revision) as theirs, tempfile.TemporaryDirectory() as folder:
        recipes = Path(folder) / "recipes"
        recipes.mkdir()
        for path in sorted((ROOT / "recipes").glob("*.yaml")):
            if options.only and path.stem not in options.only:
                continue
            if not (theirs.parent / "recipes" / path.name).exists():
                print(f"{options.revision} has no {path.stem}: left out")
                continue
            (recipes / path.name).write_text(recipe_text(path))
        print("| family | recipe | largest difference | mask bits | zeros in matrices |\n|---|---|---|---|---|")
        for family in options.family:
            for line, same in compare(family, recipes, [ROOT / "src", theirs], Path(folder)):
                print(line + " <- differs" * (not same), flush=True)
                alike &= same
    return 0 if alike else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        source, *paths = map(Path, sys.argv[2:])
        check_package(source)
        prune_all(*paths)
    else:
        sys.exit(main())
