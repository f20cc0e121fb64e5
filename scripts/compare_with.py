"""Do the shipped recipes prune as they did at an earlier revision?

    python scripts/compare_with.py a2f28ac                                      # every recipe on every family
    python scripts/compare_with.py HEAD~3 --only crepe_2of4 --family llama opt
    python scripts/compare_with.py a2f28ac --smollm2                            # perplexities of a real model
    python scripts/compare_with.py a2f28ac --smollm2 --windows 4 --test-windows 4

Every recipe of the working tree prunes small random models (fp32, fixed seeds, calibration batches with padding) by the
working tree's package and by the revision's, each in processes of its own with one thread. The table has, for each
family and recipe, the largest difference of any value of the two state dicts, and how many mask bits differ: zeros of
one matrix that the other lacks. The last column, the share of zeros, shows that something was pruned at all. A recipe
that both refuse (ValueError) counts as equal; both messages are shown if they differ.

With --smollm2 the model is SmolLM2-135M-Instruct (fp32, windows of 512 tokens of the training articles), and the table
has both perplexities (windows of 512 tokens of the test articles).

Exit status 1 if anything differs, perplexities by more than 0.1 %.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from revisions import check_package, output_of, sources, start  # noqa: E402

WINDOWS, LENGTH, PADDED_TO, BATCH = 12, 16, 10, 4
# Fields that make a recipe fast enough here; both sides get them.
FASTER = {"PHOSearchModifier": {"candidates": 8}}
# Of SmolLM2: the length of windows, and how far perplexities may be apart, relatively.
REAL_LENGTH, TOLERANCE = 512, 1e-3


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


def prune_all(model: Path, recipes: Path, results: Path, texts: Path | None = None) -> None:
    """Prune a saved model by every recipe of a folder; save what came of it, or why a recipe was refused.

    That is the state dict; with a folder of texts (see `save_windows`), which are then what calibrates, the perplexity.
    """
    import torch
    from datasets import load_from_disk
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session
    from loguru import logger
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logger.remove()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    data = load_from_disk(texts / "calibration") if texts else calibration_data()
    options = {"num_calibration_samples": len(data), "shuffle_calibration_samples": False}
    options["batch_size"] = 1 if texts else BATCH
    for recipe in sorted(recipes.glob("*.yaml")):
        torch.manual_seed(0)
        reset_session()
        pruned = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        try:
            oneshot(model=pruned, recipe=recipe.read_text(), dataset=data, **options)
        except ValueError as error:
            write(results / f"{recipe.stem}.txt", (str(error).splitlines() or [""])[0])
        else:
            if texts:
                write(results / f"{recipe.stem}.json", json.dumps(perplexity(pruned, torch.load(texts / "test"))))
            else:
                torch.save(pruned.state_dict(), results / f"{recipe.stem}.pt")


def write(path: Path, text: str) -> None:
    """Write a file that is there with its whole text or not at all."""
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").replace(path)


def perplexity(model: Any, windows: Any) -> float:
    """Of windows of token ids [n, length]; by transformers alone."""
    import torch

    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    return math.exp(sum(losses) / len(losses))


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


def save_windows(folder: Path, options: argparse.Namespace) -> Path:
    """Fetch SmolLM2 and save what it is calibrated and tested on; gives the model's folder."""
    import torch
    from transformers import AutoTokenizer

    from crepe_llm import samples

    model, corpus = samples.smollm2(), samples.wikipedia()
    tokenizer = AutoTokenizer.from_pretrained(model)
    calibration = samples.calibration_windows(
        tokenizer, corpus.train, windows=options.windows, length=REAL_LENGTH, seed=0
    )
    calibration.save_to_disk(folder / "calibration")
    tokens = options.test_windows * REAL_LENGTH
    torch.save(samples.token_windows(tokenizer, corpus.test, REAL_LENGTH, tokens=tokens), folder / "test")
    return model


def said_of(recipe: str, folder: Path) -> str | float | None:
    """Of a recipe on SmolLM2 the perplexity, why it was refused, or None if that is not known yet."""
    found, refused = (folder / f"{recipe}{suffix}" for suffix in (".json", ".txt"))
    if found.exists():
        return float(json.loads(found.read_text()))
    return refused.read_text() if refused.exists() else None


def compare_smollm2(
    recipes: Path, sides: list[Path], scratch: Path, options: argparse.Namespace
) -> Iterator[tuple[str, bool]]:
    """The line of each recipe as soon as it is known, and whether both sides' perplexities agree."""
    model, started, folders = save_windows(scratch, options), [], []
    for number, source in enumerate(sides):
        folders.append(scratch / str(number))
        folders[-1].mkdir()
        worker = ["--worker", *map(str, (source, model, recipes, folders[-1], scratch))]
        started.append(start(Path(__file__), worker, source, folders[-1]))
    with ThreadPoolExecutor(len(started)) as pool:
        ends = [pool.submit(output_of, process) for process in started]
        for recipe in sorted(recipes.glob("*.yaml")):
            while None in (said := [said_of(recipe.stem, folder) for folder in folders]):
                for end, folder in zip(ends, folders, strict=True):
                    if end.done() and said_of(recipe.stem, folder) is None:
                        end.result()
                        raise RuntimeError(f"{folder.name}: ended without {recipe.stem}")
                time.sleep(1)
            ours, theirs = said
            if isinstance(ours, float) and isinstance(theirs, float):
                apart = ours / theirs - 1
                yield f"| {recipe.stem} | {ours:.4f} | {theirs:.4f} | {apart:+.3%} |", abs(apart) <= TOLERANCE
            else:
                yield f"| {recipe.stem} | {ours} | {theirs} | |", ours == theirs
        for end in ends:
            end.result()


def main() -> int:
    from transformers.utils.logging import disable_progress_bar

    from tiny_models import configs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="to compare the working tree with")
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="shipped recipes, by name")
    parser.add_argument("--family", nargs="+", choices=list(configs()), default=list(configs()))
    parser.add_argument("--smollm2", action="store_true", help="perplexities of SmolLM2, instead of small models")
    parser.add_argument("--windows", type=int, default=16, help="that calibrate SmolLM2 (%(default)s)")
    parser.add_argument("--test-windows", type=int, default=20, help="that it is tested on (%(default)s)")
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
        sides = [ROOT / "src", theirs]
        if options.smollm2:
            print("| recipe | perplexity here | there | apart |\n|---|---|---|---|")
            lines = compare_smollm2(recipes, sides, Path(folder), options)
        else:
            print("| family | recipe | largest difference | mask bits | zeros in matrices |\n|---|---|---|---|---|")
            families = (compare(family, recipes, sides, Path(folder)) for family in options.family)
            lines = itertools.chain.from_iterable(families)
        for line, same in lines:
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
