"""Write docs/reference.md from the modifiers' docstrings and fields and from the recipes' own comments.

python scripts/reference.py            rewrites docs/reference.md
python scripts/reference.py --check    fails if it is not what would be written
"""

import inspect
import json
import re
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import annotated_types
from llmcompressor.modifiers import Modifier
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import crepe_llm.modifiers
from crepe_llm.modifiers.order import markdown_table
from crepe_llm.recipe_files import shipped_recipes

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"

INTRODUCTION = """# Reference

`python scripts/reference.py` writes this page from the modifiers' docstrings and fields. Edit those, not this page.
[Write a recipe](recipes.md) shows the modifiers at work. [The results](results.md) say what they are worth."""

ORDER = """## Order of modifiers

A recipe's modifiers work in the order in which it names them. A recipe in a wrong order is refused before any time is
spent, and the message says what to do instead. llm-compressor's own SparseGPTModifier and WandaPruningModifier prune,
and its modifiers of quantization quantize. Its SmoothQuantModifier and AWQModifier have no role here. Put them before
the modifier that prunes. Its GPTQModifier, SpinQuantModifier and QuIPModifier are refused after it: of the zeros they
leave few."""

SHARED = """## Fields that several modifiers have

A pattern after `re:` is matched from the beginning of a layer's name."""

RECIPES = """## Shipped recipes

`crepe recipes` lists them, `crepe recipes NAME` prints one, and `crepe prune --recipe NAME` runs one."""


@dataclass(frozen=True)
class Docs:
    """A class's docstring in parts: text before its fields, the fields' descriptions, and text after them."""

    text: str
    fields: dict[str, str]
    notes: str


def page() -> str:
    """The whole page."""
    modifiers = [getattr(crepe_llm.modifiers, name) for name in crepe_llm.modifiers.__all__]
    for modifier in modifiers:
        check(modifier)
    parts = [INTRODUCTION, ORDER, markdown_table(), SHARED, *map(_base, _shared_bases(modifiers)), "## Modifiers"]
    return "\n\n".join([*parts, *map(_section, modifiers), RECIPES, _recipes()]) + "\n"


def check(modifier: Any) -> None:
    """Raise ValueError for a field that no docstring describes, or one that is redefined without a description."""
    for name in _own_fields(modifier):
        owner = next(kind for kind in modifier.__mro__ if name in getattr(kind, "__annotations__", {}))
        if name not in docs_of(owner).fields:
            raise ValueError(f"{owner.__name__} has a field `{name}`, and its docstring no `:param {name}:`")
    unknown = docs_of(modifier).fields.keys() - modifier.model_fields.keys()
    if unknown:
        raise ValueError(f"the docstring of {modifier.__name__} describes {sorted(unknown)}, which are no fields")


def docs_of(kind: Any) -> Docs:
    """A class's own docstring, without its lifecycle."""
    doc = inspect.cleandoc(kind.__doc__ or "")
    doc = re.sub(r"^Lifecycle:\n\n(?:(?:- |  ).*\n?)+\n?", "", doc, flags=re.MULTILINE)
    found = re.findall(r"^:param (\w+):((?:.*)(?:\n +.*)*)", doc, re.MULTILINE)
    text, _, rest = re.sub(r"^:param \w+:.*(?:\n +.*)*\n?", "\0", doc, flags=re.MULTILINE).partition("\0")
    text = re.sub(r":\w+:`(\w+)`", r"`\1`", text.replace("Sample yaml:\n\n", ""))
    return Docs(text.strip(), {name: " ".join(words.split()) for name, words in found}, rest.replace("\0", "").strip())


def _own_fields(modifier: Any) -> list[str]:
    """The fields that classes of this package define."""
    ours = [kind for kind in modifier.__mro__ if kind.__module__.startswith("crepe_llm.")]
    annotated = [name for kind in ours for name in kind.__annotations__]
    return [name for name in modifier.model_fields if name in annotated and name not in Modifier.model_fields]


def _bases(modifier: Any) -> list[Any]:
    """The classes of this package, the nearest first, that a modifier inherits described fields from."""
    bases = [kind for kind in modifier.__mro__[1:] if kind.__module__.startswith("crepe_llm.")]
    return [kind for kind in bases if docs_of(kind).fields and kind.__name__ not in crepe_llm.modifiers.__all__]


def _shared_bases(modifiers: list[Any]) -> list[Any]:
    bases = dict.fromkeys(base for modifier in modifiers for base in _bases(modifier))
    return sorted(bases, key=lambda base: len(base.__mro__))


def _base(base: Any) -> str:
    docs = docs_of(base)
    return "\n\n".join(filter(None, (f"### {base.__name__}", docs.text, _table(base, docs.fields), docs.notes)))


def _section(modifier: Any) -> str:
    docs = docs_of(modifier)
    parts = [f"### {modifier.__name__}", docs.text, _table(modifier, docs.fields), docs.notes]
    foreign = modifier.__mro__[1]
    if foreign is not Modifier and not foreign.__module__.startswith("crepe_llm."):
        others = [name for name in modifier.model_fields if name not in Modifier.model_fields.keys() | docs.fields]
        parts.append(_table(modifier, {name: f"as {foreign.__name__}'s" for name in others}))
    inherited = [_inherited(base, docs.fields) for base in _bases(modifier)]
    if any(inherited):
        parts.append(f"Further fields: {'; '.join(filter(None, inherited))}.")
    return "\n\n".join(filter(None, parts))


def _inherited(base: Any, described: dict[str, str]) -> str:
    names = ", ".join(f"`{name}`" for name in docs_of(base).fields if name not in described)
    return names and f"{names} ([{base.__name__}](#{base.__name__.lower()}))"


def _table(modifier: Any, described: dict[str, str]) -> str:
    lines = ["| field | value | default | |", "|---|---|---|---|"]
    for name, text in described.items():
        field = modifier.model_fields[name]
        cells = (f"`{name}`", _value(field), _default(field), text)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) if described else ""


def _value(field: FieldInfo) -> str:
    return _kind(field.annotation) + _range(field.metadata)


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        limits = [limit for one in arguments[1:] for limit in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return _kind(arguments[0]) + _range(limits)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(filter(None, (_kind(one) for one in arguments if one is not type(None))))
    if origin is list:
        return f"list of {_kind(arguments[0])}s"
    if origin is dict:
        value = "" if arguments[1] is Any else _kind(arguments[1])
        return f"mapping from {_kind(arguments[0])}{f' to {value}' * bool(value)}"
    names = {float: "number", int: "integer", str: "text", bool: "`true` or `false`"}
    return names.get(annotation, "")


def _range(limits: list[Any]) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    classes = (annotated_types.Ge, annotated_types.Gt, annotated_types.Le, annotated_types.Lt)
    found = [
        f"{words[name]} {getattr(limit, name)}"
        for limit in limits
        if isinstance(limit, classes)
        for name in words
        if hasattr(limit, name)
    ]
    return "".join(f", {one}" for one in found)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    return "" if value is None else f"`{json.dumps(value, default=str)}`"


def _recipes() -> str:
    lines = ["| recipe | |", "|---|---|"]
    for name, path in shipped_recipes().items():
        comment = re.match(r"(?:#.*\n)+", path.read_text())
        text = " ".join(line.removeprefix("#").strip() for line in comment[0].splitlines()) if comment else ""
        lines.append(f"| `{name}` | {text} |")
    return "\n".join(lines)


def main() -> None:
    new = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(new)
    elif not PAGE.is_file() or PAGE.read_text() != new:
        sys.exit(f"docs/{PAGE.name} is stale: run python scripts/{Path(__file__).name}")


if __name__ == "__main__":
    main()
