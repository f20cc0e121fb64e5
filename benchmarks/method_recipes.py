"""The methods that methods.py compares, as recipes, and the runs that options ask for."""

import argparse
from collections.abc import Callable
from typing import Any

import yaml

from crepe_llm import samples
from crepe_llm.modifiers.refitting import DEFAULT_SHARE
from crepe_llm.recipe_files import recipe_path
from proxy_study import measured

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
# Of PHO in stages, from the recipe's coefficients and from RIA's ("ria"), alone and under ADMM ("admm").
STAGED = STUDY.replace(".json", "-tried.json")
# The published methods' own comparison groups: magnitude and RIA one threshold per matrix, Wanda one per row.
WANDA = {"row": 1.0, "column": 0.0, "neighbourhood": 0.0, "activation_exponent": 1.0, "comparison_group": "row"}
RIA = {"row": 1.0, "column": 1.0, "neighbourhood": 0.0, "activation_exponent": 0.5, "comparison_group": "matrix"}

ALLOCATIONS = ("owl", "alphapruning", "dlp", "atp")

Modifiers = dict[str, dict[str, Any]]
Method = Callable[[str], Modifiers | None]


def crepe(structure: str) -> Modifiers:
    """The shipped recipe for a structure, as its modifiers."""
    fields, recipe = STRUCTURES[structure]
    (stage,) = yaml.safe_load(recipe_path(recipe).read_text()).values()
    return {"CRePEModifier": stage["pruning_modifiers"]["CRePEModifier"] | fields}


def searched(**fields: Any) -> Method:
    """The shipped recipe after PHO, which searches (or, with `study`, takes what it found for another model)."""
    return lambda structure: {"PHOSearchModifier": fields} | crepe(structure)


def from_ria(method: Method) -> Method:
    """A method whose CRePEModifier begins with RIA's coefficients: what the user of a new model has.

    A search knows nothing then that was found on the model: it starts from what was best on the other one.
    """
    coefficients = {name: value for name, value in RIA.items() if name != "comparison_group"} | {"kernel_size": 3}

    def modifiers(structure: str) -> Modifiers | None:
        found = method(structure)
        if found is None:
            return None
        searches = {name: fields | {"starts": "{starts}"} for name, fields in found.items() if name.startswith("PHO")}
        return found | searches | {"CRePEModifier": found["CRePEModifier"] | coefficients}

    return modifiers


def pruned_by(**fields: Any) -> Method:
    """A method that is the CRePEModifier with other fields."""
    return lambda structure: {"CRePEModifier": STRUCTURES[structure][0] | fields}


def sparsegpt(structure: str) -> Modifiers:
    """llm-compressor's own SparseGPT."""
    fields = {"sparsity": 0.5, **STRUCTURES[structure][0], "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    return {"SparseGPTModifier": fields}


def then(first: Method, modifier: str, /, **fields: Any) -> Method:
    """A method with a modifier after it."""

    def modifiers(structure: str) -> Modifiers | None:
        before = first(structure)
        return None if before is None else before | {modifier: fields}

    return modifiers


def corrected(method: Method, by: str, **fields: Any) -> Method:
    """A method with weight correction under its mask after it."""
    return then(method, "WeightCorrectionModifier", method=by, **fields)


# How the three methods below gather inputs: first their defaults, then with one more of them switched off each time.
HABITS: dict[str, Any] = {
    "asymmetric_calibration": DEFAULT_SHARE,
    "true_sequential": True,
    "token_weighting": "{weighting}",
}
REWEIGHTED = HABITS | {"token_weighting": "{other_weighting}"}
ALIKE = HABITS | {"token_weighting": "uniform"}
BY_BLOCK = ALIKE | {"true_sequential": False}
SYMMETRIC = BY_BLOCK | {"asymmetric_calibration": 0.0}

# The weighting that modifiers choose by themselves for a model's family, and the other one.
WEIGHTINGS = {
    "SmolLM2-135M-Instruct": {"weighting": "uniform", "other_weighting": "relative"},
    "Gemma-3-270M": {"weighting": "relative", "other_weighting": "uniform"},
}


def with_sparsegpt(method: Method, habits: dict[str, Any] = HABITS) -> Method:
    """A method with SparseGPT's update under its mask after it."""
    return corrected(method, "sparsegpt", **habits)


def with_pcg(method: Method, habits: dict[str, Any] = HABITS) -> Method:
    """A method with least-squares weights under its mask after it."""
    return corrected(method, "pcg", **habits)


def with_admm(method: Method, habits: dict[str, Any] = HABITS) -> Method:
    """A method whose layers ADMM prunes again, step by step."""
    return then(method, "ADMMModifier", **habits)


def permuted(method: Method) -> Method:
    """A method after channel permutation, from which only N:M masks profit."""
    return lambda structure: {"ChannelPermutationModifier": {}} | method(structure) if ":" in structure else None


def allocated(method: Method, by: str, *, gently: bool = False, measured: bool = False) -> Method:
    """A method after an allocation of sparsity to blocks; 2:4 has no freedom for one.

    `gently` takes an eighth of atp's largest spread: the best one measured where the remaining weights are refitted;
    `measured` has atp's spread measured on the model.
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
        spread: dict[str, Any] = {"spread": round(min(sparsity, 1 - sparsity) / 8, 6)} if gently else {}
        if measured:
            spread = {"spread": "measured"}
        return {"SparsityAllocationModifier": {"method": by, "sparsity": sparsity} | spread} | first

    return modifiers


METHODS: dict[str, Method | None] = {
    "dense": None,
    "magnitude": None,
    "Wanda": pruned_by(**WANDA),
    "RIA": pruned_by(**RIA),
    "RIA per row": pruned_by(**RIA | {"comparison_group": "row"}),
    "CVR": pruned_by(score="cvr"),
    "CRePE": crepe,
    "CRePE per row": lambda structure: {
        "CRePEModifier": crepe(structure)["CRePEModifier"] | {"comparison_group": "row"}
    },
    "CRePE + PHO": searched(record=STUDY, verify=True),
    "CRePE + the other model's PHO": searched(study=STUDY.replace("{model}", "{other}")),
    "CRePE + PHO, not verified": searched(record=BY_PROXY),
    "CRePE + the other model's PHO, not verified": searched(study=BY_PROXY.replace("{model}", "{other}")),
    "CRePE + PHO in stages": searched(record=STAGED),
    "RIA's coefficients + PHO in stages": from_ria(searched(record=STAGED.replace(".json", "-ria.json"))),
    "RIA's coefficients + PHO in stages, 90,000 tokens": from_ria(
        searched(record=STAGED.replace(".json", "-ria.json"), tokens=90_000)
    ),
    "RIA's coefficients + measured atp + PHO in stages": from_ria(
        allocated(searched(record=STAGED.replace(".json", "-ria-atp.json")), "atp", measured=True)
    ),
    "CRePE + the other model's PHO in stages": searched(
        study=STAGED.replace("{model}", "{other}"), record=STAGED.replace(".json", "-lent.json")
    ),
    "CRePE + PHO in stages + admm": with_admm(searched(record=STAGED.replace(".json", "-admm.json"))),
    "RIA's coefficients + PHO in stages + admm": with_admm(
        from_ria(searched(record=STAGED.replace(".json", "-ria-admm.json")))
    ),
    "RIA's coefficients + admm": with_admm(from_ria(crepe)),
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
    "RIA's coefficients + measured atp": from_ria(allocated(crepe, "atp", measured=True)),
    "CRePE + measured atp": allocated(crepe, "atp", measured=True),
    "CRePE + measured atp + pcg": allocated(with_pcg(crepe), "atp", measured=True),
    "CRePE + measured atp + admm": allocated(with_admm(crepe), "atp", measured=True),
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

# How measured spreads are judged. Rows without it: each half of the text judged what the other half pruned. (Likewise,
# rows of searches for unstructured masks without "comparison_groups" are of searches that kept the recipe's.)
JUDGING = "the recipe's own weights"

# PHO as it was until it judged on the whole model (a2f28ac): rows are on record, and only that revision makes new ones.
EARLIER = {name for name in METHODS if name.endswith((" PHO", "not verified"))}


def filled(modifiers: Modifiers, **values: Any) -> Modifiers:
    """The modifiers with {names} in their text fields replaced; a field that is "{starts}" becomes what that is."""

    def fill(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return values["starts"] if value == "{starts}" else value.format(**values)

    return {name: {key: fill(value) for key, value in fields.items()} for name, fields in modifiers.items()}


def starts_from(model: str, structure: str) -> list[dict[str, Any]]:
    """The four best of proxy_study.py's random configurations on a model, seed 0, for this kind of mask."""
    mask = "2:4" if ":" in structure else "0.6:matrix"
    rows = measured({"SmolLM2-135M-Instruct": "smollm2", "Gemma-3-270M": "gemma3"}[model], 0, mask)[2:]
    return [row["coefficients"] for row in sorted(rows, key=lambda row: row["perplexity"])[:4]]


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
                        chooses = "in stages" in method and ":" not in structure
                        name += "-groups" * chooses
                        names = {"model": model, "other": other, "structure": name, "seed": seed}
                        names["starts"] = starts_from(other, structure)
                        names["studies"] = "{studies}"  # a folder of this machine's, which is no part of the record
                        modifiers = filled(modifiers, **names, **WEIGHTINGS[model])
                        key |= {"recipe": {"methods_stage": {"pruning_modifiers": modifiers}}}
                        if "measured" in method:
                            key |= {"judging": JUDGING}
                        if chooses:
                            key |= {"comparison_groups": "searched"}
                    if key not in runs:
                        runs.append(key)
    return runs
