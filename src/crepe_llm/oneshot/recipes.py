"""Reading recipes, such that whatever is wrong with one is said in a line that names the place and the cure."""

import copy
import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, is_preset_scheme
from llmcompressor.modifiers import Modifier, ModifierFactory
from llmcompressor.recipe import Recipe
from llmcompressor.recipe.utils import filter_dict
from pydantic import ValidationError
from torch.utils._pytree import tree_leaves

from crepe_llm.modifiers.fields import unquoted
from crepe_llm.recipe_files import recipe_path

__all__ = ["read_recipe"]

# Fields of every modifier of llm-compressor that recipes do not set.
_OF_RUNS = ("index", "group", "start", "end", "update")
_PLACE = (
    "modifiers go under `NAME_stage:` and `NAME_modifiers:`, as in the recipe that `crepe recipes crepe_2of4` prints"
)


def read_recipe(recipe: Any, stage: str | None = None) -> Recipe:
    """A recipe as llm-compressor reads it, from a shipped recipe's name, too.

    Args:
        recipe: a shipped recipe's name, a file (YAML, JSON, or Markdown that begins with YAML between lines of `---`),
            YAML or JSON text, a dictionary of the same, a modifier, modifiers in order, or a recipe as llm-compressor
            reads it.
        stage: take only the stages whose names begin so.

    Raises:
        ValueError: it is none of these, or something in it is wrong.
    """
    if isinstance(recipe, dict):
        return _made(copy.deepcopy(recipe), "the recipe", stage)
    if not isinstance(recipe, str | Path):
        _check_kind(recipe)
        made = Recipe.create_instance(list(recipe) if isinstance(recipe, tuple) else recipe, target_stage=stage)
        _check_bits(made, "the recipe")
        return made
    text, source = str(recipe), "the recipe"
    if os.path.isfile(text) or not any(mark in text for mark in "\n:"):
        path = recipe_path(text)
        text, source = _text(path), str(path)
        if path.suffix.lower() == ".md":
            text = _front_matter(text, source)
    return _made(_parse(text, source), source, stage)


def _made(content: dict[str, Any], source: str, stage: str | None) -> Recipe:
    """The recipe of what a file or text holds."""
    _check(content, source)
    try:
        made = Recipe.from_dict(filter_dict(content, target_stage=stage))
    except ValidationError as error:
        raise ValueError(f"{source}: {_plain(error)}") from error
    except NotImplementedError as error:  # compressed-tensors', of a kind of number that it does not have
        raise ValueError(f"{source}: {error}") from error
    _check_bits(made, source)
    return made


def _check_bits(recipe: Recipe, source: str) -> None:
    """Raise ValueError if weights are to be quantized to a number of bits that no file holds: compressed-tensors takes
    any, and writes what no reader gives back."""
    for modifier in recipe.modifiers:
        groups = (getattr(modifier, "config_groups", None) or {}).values()
        for weights in filter(None, (group.weights for group in groups)):
            known, said = ((4, 8), "4 or 8") if weights.type == "float" else (range(1, 9), "a number from 1 to 8")
            if weights.num_bits not in known:
                raise ValueError(
                    f"{source}: {type(modifier).__name__}: weights of type {weights.type} have num_bits="
                    f"{weights.num_bits}: give {said}"
                )


def _check_kind(recipe: Any) -> None:
    """Raise ValueError if what is no text and no dictionary holds no modifiers either."""
    inside = tree_leaves(recipe) if isinstance(recipe, list | tuple) else [recipe]
    wrong = [each for each in inside if not isinstance(each, Modifier | Recipe)]
    if wrong or (isinstance(recipe, list | tuple) and any(isinstance(each, Recipe) for each in inside)):
        kind = wrong[0].__name__ if wrong and isinstance(wrong[0], type) else type((wrong or inside)[0]).__name__
        place = "the recipe is a list with" if isinstance(recipe, list | tuple) else "the recipe is"
        raise ValueError(
            f"{place} {kind}: give a shipped recipe's name, a YAML file or text, a dictionary, or modifiers in order, "
            "such as [CRePEModifier(mask_structure='2:4')]"
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is 0x{byte:02x}; save it as UTF-8") from error


def _front_matter(text: str, source: str) -> str:
    """The YAML between the first two lines of dashes (or plus signs) of a Markdown file; as many lines before it stay,
    so that errors name the right ones."""
    found = re.search(r"^(---|\+\+\+)[ \t]*\n(.*?)^(---|\+\+\+)[ \t]*$", text, re.S | re.M)
    if not found:
        raise ValueError(f"{source} has no YAML between two lines of `---`, where a Markdown file has its recipe")
    return "\n" * text.count("\n", 0, found.start(2)) + found.group(2)


class _DoubleKeyError(ValueError):
    """A key stands twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """YAML of plain values, in which each key stands once: of two, YAML would drop the first in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise _DoubleKeyError(
                    f"line {key.start_mark.line + 1}: {key.value} stands twice, and the last alone would count: leave "
                    "one out, or put a second modifier of its kind under another `NAME_modifiers:`"
                )
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


# llm-compressor saves the tuples of its own modifiers' fields so (SmoothQuantModifier's mappings).
_Loader.add_constructor("tag:yaml.org,2002:python/tuple", yaml.SafeLoader.construct_yaml_seq)  # type: ignore[type-var]


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        content = yaml.load(text, _Loader)
    except _DoubleKeyError as error:
        raise ValueError(f"{source}, {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{source}{place} is not YAML: {problem}; look at the indentation and the quotes") from error
    if content is None:
        raise ValueError(f"{source} is empty: {_PLACE}")
    if not isinstance(content, dict):
        raise ValueError(f"{source} is not a mapping but {type(content).__name__} {str(content)[:60]!r}: {_PLACE}")
    return content


def _check(content: dict[str, Any], source: str) -> None:
    """Raise ValueError if modifiers are missing or unknown; a modifier without fields gets none."""
    groups = [
        group
        for stage, inside in content.items()
        if str(stage).endswith("_stage") and isinstance(inside, dict)
        for name, group in inside.items()
        if str(name).endswith("_modifiers") and isinstance(group, dict)
    ]
    known = _known()
    unread = next(_unread(content, groups, known, ()), None)
    if unread is not None:
        place = f"under {' and '.join(unread[:-1])}" if unread[:-1] else "at the top"
        raise ValueError(f"{source}: nothing reads {unread[-1]} {place}: {_PLACE}")
    if not any(groups):
        raise ValueError(f"{source} names no modifiers: {_PLACE}")
    for group in groups:
        for name, fields in group.items():
            if name not in known:
                raise ValueError(f"{source}: {_why_unknown(str(name), group, known)}")
            if fields is None:
                group[name] = {}
            elif not isinstance(fields, dict):
                raise ValueError(f"{source}: {name} has {fields!r} where its fields go, such as `targets: [Linear]`")
            else:
                _check_patterns(name, fields, source)
                _check_scheme(name, fields, source)
                _check_quotes(name, fields, source)


def _check_quotes(modifier: str, fields: dict[str, Any], source: str) -> None:
    """Raise ValueError if a mask structure without quotation marks has become a number."""
    try:
        unquoted(fields.get("mask_structure", ""))
    except ValueError as error:
        raise ValueError(f"{source}: {modifier}: {error}") from None


def _check_scheme(modifier: str, fields: dict[str, Any], source: str) -> None:
    """Raise ValueError if a scheme of quantization is none that compressed-tensors knows by name."""
    scheme = fields.get("scheme")
    for name in scheme if isinstance(scheme, dict) else [scheme] * isinstance(scheme, str):
        if not is_preset_scheme(str(name)):
            raise ValueError(f"{source}: {modifier}: no scheme is called {name}{_nearest(str(name), PRESET_SCHEMES)}")


def _check_patterns(modifier: str, fields: dict[str, Any], source: str) -> None:
    """Raise ValueError if a pattern of layers is no regular expression."""
    for field in ("targets", "ignore"):
        patterns = fields.get(field)
        for pattern in [patterns] if isinstance(patterns, str) else patterns if isinstance(patterns, list) else []:
            try:
                re.compile(str(pattern).removeprefix("re:") if str(pattern).startswith("re:") else "")
            except re.error as error:
                raise ValueError(
                    f"{source}: {modifier}: {field} has {pattern!r}, which is not a regular expression: {error}"
                ) from error


def _unread(
    content: dict[str, Any], groups: list[dict[str, Any]], known: Any, path: tuple[str, ...]
) -> Iterator[tuple[str, ...]]:
    """The keys that lead to modifiers which stand in none of the groups that are read, such as in a stage whose name
    does not end in `_stage`."""
    for name, inside in content.items():
        if name in known:
            yield (*path, str(name))
        elif isinstance(inside, dict) and not any(inside is group for group in groups):
            yield from _unread(inside, groups, known, (*path, str(name)))


def _known() -> dict[str, Any]:
    if not ModifierFactory._loaded:
        ModifierFactory.refresh()
    return (
        ModifierFactory._main_registry | ModifierFactory._experimental_registry | ModifierFactory._registered_registry
    )


def _why_unknown(name: str, group: dict[str, Any], known: dict[str, Any]) -> str:
    for modifier in group:
        if modifier in known and name in known[modifier].model_fields:
            return f"{name} stands beside {modifier}, and is a field of it: indent it further than {modifier}"
    return f"no modifier is called {name}{_nearest(name, known)}"


def _nearest(name: str, known: Any) -> str:
    of_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), of_lower, n=1)
    return f": did you mean {of_lower[close[0]]}?" if close else f"; there are {', '.join(sorted(known))}"


def _fields(kind: type[Modifier]) -> list[str]:
    """A modifier's fields but those in which llm-compressor keeps how far a run is."""
    return [name for name in kind.model_fields if not name.endswith("_") and name not in _OF_RUNS]


def _plain(error: ValidationError) -> str:
    """What pydantic found, the first for each field."""
    said: dict[str, str] = {}
    for found in error.errors():
        field = str(found["loc"][0]) if found["loc"] else ""
        said.setdefault(field, _problem(error.title, field, found))
    return "; ".join(said.values())


def _problem(modifier: str, field: str, found: Any) -> str:
    message = found["msg"].removeprefix("Value error, ")
    if found["type"] == "extra_forbidden":
        kind = _known().get(modifier)
        return f"{modifier} has no field {field}{_nearest(field, _fields(kind) if kind else {})}"
    if found["type"] == "missing":
        return f"{modifier} needs the field {field}"
    return f"{modifier}: {field}={found['input']!r}: {message}" if field and field not in message else message
