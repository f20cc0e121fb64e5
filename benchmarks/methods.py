"""Perplexity and time of pruning methods and of what stacks with them, over calibration seeds.

    python benchmarks/methods.py                                            # everything; many hours on two cores
    python benchmarks/methods.py --structures 2:4 --models Gemma-3-270M     # a part of it
    python benchmarks/methods.py --split valid --seeds 0 --methods CRePE    # what choices may be made on
    python benchmarks/methods.py --report --plot docs/methods.png           # the table of what has been measured

Every run is one `oneshot` of a fresh model with a recipe. Runs are appended to --results as they finish, and not
repeated.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from loguru import logger
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from crepe_llm import samples
from crepe_llm.evaluation.perplexity import perplexity
from crepe_llm.functional.masks import keep_mask
from crepe_llm.functional.scores import magnitude_scores
from crepe_llm.modifiers.refitting import DEFAULT_SHARE
from crepe_llm.recipe_files import recipe_path
from records import RESULTS, Row, append, is_done, newest, read, read_old
from studies import studies_folder

# Raised by every change of a default or of how something is measured. 1: rows without provenance. 2: a mask is what was
# chosen, not what is not zero, so that weights that are zero in the dense model may be kept and refitted.
PROTOCOL = 2

MODELS = {"SmolLM2-135M-Instruct": samples.smollm2, "Gemma-3-270M": samples.gemma3}
STRUCTURES = {
    "2:4": ({"mask_structure": "2:4"}, "crepe_2of4"),
    "4:8": ({"mask_structure": "4:8"}, "crepe_4of8"),
    **{
        f"{percent}%": ({"mask_structure": "0:0", "sparsity": percent / 100}, "crepe_unstructured_50")
        for percent in (50, 60, 70, 80)
    },
}
# Where PHO's searches are kept, by model, structure and calibration seed (see `filled` and `studies.py`).
STUDY = "{studies}/methods/{model}-{structure}-seed{seed}.json"
BY_PROXY = STUDY.replace(".json", "-proxy.json")
# The published methods' own comparison groups: magnitude and RIA one threshold per matrix, Wanda one per row.
WANDA = {"row": 1.0, "column": 0.0, "neighbourhood": 0.0, "activation_exponent": 1.0, "comparison_group": "row"}
RIA = {"row": 1.0, "column": 1.0, "neighbourhood": 0.0, "activation_exponent": 0.5, "comparison_group": "matrix"}

ALLOCATIONS = ("owl", "alphapruning", "dlp", "atp")

# Of perplexities, in the plot.
LARGEST_DRAWN = 2000

Modifiers = dict[str, dict[str, Any]]
Method = Callable[[str], Modifiers | None]


def crepe(structure: str) -> Modifiers:
    """The shipped recipe for a structure, as its modifiers."""
    fields, recipe = STRUCTURES[structure]
    (stage,) = yaml.safe_load(recipe_path(recipe).read_text()).values()
    return {"CRePEModifier": stage["pruning_modifiers"]["CRePEModifier"] | fields}


def searched(**fields: Any) -> Method:
    """The shipped recipe behind PHO, which searches (or, with `study`, takes what it found for another model)."""
    return lambda structure: {"PHOSearchModifier": fields} | crepe(structure)


def pruned_by(**fields: Any) -> Method:
    """A method that is the CRePEModifier with other fields."""
    return lambda structure: {"CRePEModifier": STRUCTURES[structure][0] | fields}


def sparsegpt(structure: str) -> Modifiers:
    """llm-compressor's own SparseGPT."""
    fields = {"sparsity": 0.5, **STRUCTURES[structure][0], "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    return {"SparseGPTModifier": fields}


def then(first: Method, modifier: str, /, **fields: Any) -> Method:
    """A method with a modifier behind it."""

    def modifiers(structure: str) -> Modifiers | None:
        before = first(structure)
        return None if before is None else before | {modifier: fields}

    return modifiers


def corrected(method: Method, by: str, **fields: Any) -> Method:
    """A method with weight correction under its mask behind it."""
    return then(method, "WeightCorrectionModifier", method=by, **fields)


# How the three below gather inputs: as they do where the recipe does not say, and with ever less of that.
HABITS: dict[str, Any] = {
    "asymmetric_calibration": DEFAULT_SHARE,
    "true_sequential": True,
    "token_weighting": "{weighting}",
}
REWEIGHTED = HABITS | {"token_weighting": "{other_weighting}"}
ALIKE = HABITS | {"token_weighting": "uniform"}
BY_BLOCK = ALIKE | {"true_sequential": False}
SYMMETRIC = BY_BLOCK | {"asymmetric_calibration": 0.0}

# What modifiers do of themselves in a model's family, and the other way.
WEIGHTINGS = {
    "SmolLM2-135M-Instruct": {"weighting": "uniform", "other_weighting": "relative"},
    "Gemma-3-270M": {"weighting": "relative", "other_weighting": "uniform"},
}


def with_sparsegpt(method: Method, habits: dict[str, Any] = HABITS) -> Method:
    """A method with SparseGPT's update under its mask behind it."""
    return corrected(method, "sparsegpt", **habits)


def with_pcg(method: Method, habits: dict[str, Any] = HABITS) -> Method:
    """A method with least-squares weights behind it."""
    return corrected(method, "pcg", **habits)


def with_admm(method: Method, habits: dict[str, Any] = HABITS) -> Method:
    """A method whose layers ADMM prunes again, step by step."""
    return then(method, "ADMMModifier", **habits)


def permuted(method: Method) -> Method:
    """A method behind channel permutation, which only N:M masks profit from."""
    return lambda structure: {"ChannelPermutationModifier": {}} | method(structure) if ":" in structure else None


def allocated(method: Method, by: str, *, gently: bool = False) -> Method:
    """A method behind an allocation of sparsity to blocks; 2:4 has no freedom for one.

    Gently is with an eighth of atp's largest spread, which is best where weights make up for what goes.
    """

    def modifiers(structure: str) -> Modifiers | None:
        first = method(structure)
        if first is None or structure == "2:4":
            return None
        sparsity = STRUCTURES[structure][0].get("sparsity", 0.5)
        # The modifier that prunes waits for what the allocation finds.
        first = {
            name: fields | {"sparsity": None} if name in ("CRePEModifier", "SparseGPTModifier") else fields
            for name, fields in first.items()
        }
        spread = {"spread": round(min(sparsity, 1 - sparsity) / 8, 6)} if gently else {}
        return {"SparsityAllocationModifier": {"method": by, "sparsity": sparsity} | spread} | first

    return modifiers


METHODS: dict[str, Method | None] = {
    "dense": None,
    "magnitude": None,
    "Wanda": pruned_by(**WANDA),
    "RIA": pruned_by(**RIA),
    "CVR": pruned_by(score="cvr"),
    "CRePE": crepe,
    "CRePE + PHO": searched(record=STUDY, verify=True),
    "CRePE + the other model's PHO": searched(study=STUDY.replace("{model}", "{other}")),
    "CRePE + PHO, not verified": searched(record=BY_PROXY),
    "CRePE + the other model's PHO, not verified": searched(study=BY_PROXY.replace("{model}", "{other}")),
    "SparseGPT": sparsegpt,
    "CVR + energy": corrected(pruned_by(score="cvr"), "energy"),
    "CRePE + energy": corrected(crepe, "energy"),
    "CRePE + mean": corrected(crepe, "mean"),
    "CRePE + DSnoT": then(crepe, "DSnoTModifier"),
    "CRePE + DSnoT by CRePE": then(crepe, "DSnoTModifier", score="crepe"),
    "CRePE + DSnoT, attention": then(crepe, "DSnoTModifier", targets=["re:.*self_attn.*_proj$"]),
    "CRePE + permutation": permuted(crepe),
    "CRePE + permutation + energy": corrected(permuted(crepe), "energy"),
    "CRePE + permutation + mean": corrected(permuted(crepe), "mean"),
    "CRePE + permutation + DSnoT + energy": corrected(then(permuted(crepe), "DSnoTModifier"), "energy"),
    "CRePE + sparsegpt": with_sparsegpt(crepe),
    "CRePE + pcg": with_pcg(crepe),
    "CRePE + permutation + pcg": with_pcg(permuted(crepe)),
    "SparseGPT + pcg": with_pcg(sparsegpt, SYMMETRIC),
    "CRePE + admm": with_admm(crepe),
    "CRePE + permutation + admm": with_admm(permuted(crepe)),
    **{f"CRePE + {by}": allocated(crepe, by) for by in ALLOCATIONS},
    **{f"CRePE + {by} + pcg": allocated(with_pcg(crepe), by) for by in ALLOCATIONS},
    **{f"CRePE + {by} + admm": allocated(with_admm(crepe), by, gently=by == "atp") for by in ALLOCATIONS},
    "SparseGPT + atp + pcg": allocated(with_pcg(sparsegpt, SYMMETRIC), "atp"),
    # What weights of tokens, asymmetric calibration and calibrating layer after layer are worth.
    "CRePE + sparsegpt, other weighting": with_sparsegpt(crepe, REWEIGHTED),
    "CRePE + pcg, other weighting": with_pcg(crepe, REWEIGHTED),
    "CRePE + pcg, by block": with_pcg(crepe, BY_BLOCK),
    "CRePE + pcg, symmetric": with_pcg(crepe, SYMMETRIC),
    "CRePE + permutation + pcg, symmetric": with_pcg(permuted(crepe), SYMMETRIC),
    "CRePE + admm, other weighting": with_admm(crepe, REWEIGHTED),
    "CRePE + admm, by block": with_admm(crepe, BY_BLOCK),
    "CRePE + admm, symmetric": with_admm(crepe, SYMMETRIC),
    "CRePE + permutation + admm, other weighting": with_admm(permuted(crepe), REWEIGHTED),
    "CRePE + permutation + admm, by block": with_admm(permuted(crepe), BY_BLOCK),
    "CRePE + permutation + admm, symmetric": with_admm(permuted(crepe), SYMMETRIC),
    "CRePE + atp + pcg, symmetric": allocated(with_pcg(crepe, SYMMETRIC), "atp"),
    "CRePE + atp + admm, other weighting": allocated(with_admm(crepe, REWEIGHTED), "atp", gently=True),
    "CRePE + steep atp + admm": allocated(with_admm(crepe, ALIKE), "atp"),
    "CRePE + steep atp + admm, by block": allocated(with_admm(crepe, BY_BLOCK), "atp"),
    "CRePE + steep atp + admm, symmetric": allocated(with_admm(crepe, SYMMETRIC), "atp"),
}


def prune_by_magnitude(model: torch.nn.Module, structure: str) -> None:
    """Prune in place, without data."""
    head, fields = model.get_output_embeddings(), STRUCTURES[structure][0]
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            scores = magnitude_scores(layer.weight)
            layer.weight.data *= keep_mask(scores, fields.get("sparsity", 0.5), fields["mask_structure"], "matrix")


def filled(modifiers: Modifiers, **values: Any) -> Modifiers:
    """The modifiers with {names} in their text fields replaced."""
    return {
        name: {key: value.format(**values) if isinstance(value, str) else value for key, value in fields.items()}
        for name, fields in modifiers.items()
    }


def runs_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The conditions of every run that the options ask for, one model after the other."""
    common = {name: getattr(options, name) for name in ("split", "windows", "length", "tokens", "dtype")}
    runs = []
    for model in options.models:
        for structure in options.structures:
            for seed in options.seeds:
                for method in options.methods:
                    key = {"model": model, "method": method, "structure": structure, "seed": seed} | common
                    recipe_of = METHODS[method]
                    modifiers = recipe_of(structure) if recipe_of else None
                    if method == "dense":
                        key |= {"structure": "", "seed": None}
                    elif recipe_of is None:
                        key |= {"seed": None}
                    elif modifiers is None:
                        continue
                    else:
                        (other,) = set(MODELS) - {model}
                        name = structure.replace(":", "of").replace("%", "")
                        names = {"model": model, "other": other, "structure": name, "seed": seed}
                        names["studies"] = "{studies}"  # a folder of this machine's, which is no part of the record
                        modifiers = filled(modifiers, **names, **WEIGHTINGS[model])
                        key |= {"recipe": {"methods_stage": {"pruning_modifiers": modifiers}}}
                    if key not in runs:
                        runs.append(key)
    return runs


def prune(key: dict[str, Any]) -> tuple[Any, Any, float, float]:
    """The pruned model, its tokenizer, the seconds that pruning took, and the fraction of zeros."""
    folder = MODELS[key["model"]]()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, key["dtype"]))
    reset_session()
    started = time.perf_counter()
    if "recipe" in key:
        data = samples.calibration_windows(
            tokenizer, samples.wikipedia().train, windows=key["windows"], length=key["length"], seed=key["seed"]
        )
        oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=yaml.safe_dump(key["recipe"], sort_keys=False).replace("{studies}", str(studies_folder())),
            dataset=data,
            num_calibration_samples=key["windows"],
            shuffle_calibration_samples=False,
        )
    elif key["structure"]:
        prune_by_magnitude(model, key["structure"])
    seconds = time.perf_counter() - started
    head = model.get_output_embeddings()
    layers = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
    zeros = sum(int((weight == 0).sum()) for weight in layers) / sum(weight.numel() for weight in layers)
    if key["structure"] and abs(zeros - STRUCTURES[key["structure"]][0].get("sparsity", 0.5)) > 0.03:
        raise RuntimeError(f"{zeros:.2%} of the weights are zero after {key}")
    return model, tokenizer, seconds, zeros


def run(key: dict[str, Any]) -> dict[str, Any]:
    """Prune and measure once."""
    model, tokenizer, seconds, zeros = prune(key)
    corpus = samples.wikipedia()
    test = samples.token_windows(tokenizer, getattr(corpus, key["split"]), key["length"], tokens=key["tokens"])
    result = perplexity(model, test, corpus=corpus.name, progress=False)
    return key | {
        "perplexity": result.perplexity,
        "predicted": result.tokens,
        "seconds": round(seconds, 1),
        "zeros": round(zeros, 6),
    }


def cells(records: list[dict[str, Any]], model: str, method: str, structure: str) -> list[float]:
    """The perplexities of one cell of the table, one per seed."""
    return [
        record["perplexity"]
        for record in records
        if (record["model"], record["method"]) == (model, method) and record["structure"] in ("", structure)
    ]


def unproven(records: list[Row], model: str, method: str, structure: str) -> bool:
    """Whether a row of the cell has no provenance."""
    return any(
        "provenance" not in record
        for record in records
        if (record["model"], record["method"]) == (model, method) and record["structure"] in ("", structure)
    )


def table(records: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Markdown: mean over seeds, and half the range between the best and the worst seed."""
    lines = []
    for model in options.models:
        lines += [f"\n{model}:\n", f"| | {' | '.join(options.structures)} | seconds |"]
        lines.append("|---" * (len(options.structures) + 2) + "|")
        for method in options.methods:
            row = []
            for structure in options.structures:
                found = cells(records, model, method, structure)
                digits = 2 if found and statistics.mean(found) < 1000 else 0
                cell = f"{statistics.mean(found):.{digits}f}" if found else ""
                cell += "†" * bool(found and unproven(records, model, method, structure))
                if len(found) > 1:
                    cell += f" ± {(max(found) - min(found)) / 2:.{digits}f}"
                row.append(cell + f" ({len(found)})" * (1 < len(found) < len(options.seeds)))
            if any(row):
                seconds = [r["seconds"] for r in records if (r["model"], r["method"]) == (model, method)]
                lines.append(f"| {method} | {' | '.join(row)} | {statistics.median(seconds):.0f} |")
    predicted = sorted({record["predicted"] for record in records})
    lines.append(
        f"\nPerplexity on Wikipedia {options.split} articles: {'/'.join(map(str, predicted))} tokens predicted in "
        f"windows of {options.length}, {options.dtype}. Calibrated on {options.windows} windows of {options.length} "
        f"tokens of other articles, seeds {', '.join(map(str, options.seeds))}: mean ± half the range. Seconds: median "
        "over structures and seeds, pruning and calibration. † from before records had a commit, a host and a date."
    )
    return "\n".join(lines)


def draw(records: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """A dot for each run: perplexity by method, a colour for each structure, a panel for each model.

    What is beyond LARGEST_DRAWN, where no text is of any use, is drawn as an arrow at the edge.
    """
    from matplotlib.figure import Figure

    methods = [m for m in options.methods if any(r["method"] == m for r in records) and m != "dense"]
    figure = Figure(figsize=(6 * len(options.models), 1 + 0.3 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(options.models), squeeze=False, sharey=True)[0]
    for axes, model in zip(panels, options.models, strict=True):
        for structure in options.structures:
            points = [(value, method) for method in methods for value in cells(records, model, method, structure)]
            near = [(value, methods.index(method)) for value, method in points if value <= LARGEST_DRAWN]
            far = [(LARGEST_DRAWN, methods.index(method)) for value, method in points if value > LARGEST_DRAWN]
            (dots,) = axes.plot(*zip(*near, strict=True), "o", alpha=0.7, label=structure) if near else (None,)
            if far:
                same = {"color": dots.get_color()} if dots else {"label": structure}
                axes.plot(*zip(*far, strict=True), ">", alpha=0.7, **same)
        axes.set(title=model, xscale="log", xlabel="perplexity", yticks=range(len(methods)), yticklabels=methods)
        axes.grid(axis="y", alpha=0.3)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(options.structures))
    figure.savefig(options.plot, dpi=100)
    print(f"\nplot: {options.plot}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    # Those that tell about PHO only (docs/pho.md) are measured where they are named.
    named = [method for method in METHODS if not method.endswith(("the other model's PHO", "not verified"))]
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=named, metavar="METHOD", help="of: %(choices)s"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the calibration windows")
    parser.add_argument("--split", choices=["test", "valid"], default="test", help="articles to measure on")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of every window (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the model")
    parser.add_argument("--tokens", type=int, default=8192, help="measured on (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "methods.jsonl")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--plot", type=Path, help="draw the table there")
    options = parser.parse_args()
    logger.remove()

    runs, records = runs_of(options), read(options.results)
    if not options.report:
        missing = [key for key in runs if not is_done(key, records, PROTOCOL)]
        for key in (bar := tqdm(missing, unit=" runs")):
            bar.set_description(f"{key['model']}, {key['structure']}, {key['method']}, seed {key['seed']}")
            records.append(append(options.results, PROTOCOL, run(key)))
    wanted = newest(runs, records, read_old(options.results), PROTOCOL)
    if not wanted:
        raise SystemExit(f"{options.results} holds no run that these options ask for")
    print(table(wanted, options))
    if options.plot is not None:
        draw(wanted, options)


if __name__ == "__main__":
    main()
