"""Write what docs/recipes.md says of every shipped recipe and of every modifier's fields, from their own files.

python scripts/recipe_reference.py            rewrites the generated parts of docs/recipes.md
python scripts/recipe_reference.py --check    fails if they are not what would be written
"""

import inspect
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from llmcompressor.modifiers import Modifier
from pydantic_core import PydanticUndefined

import crepe_llm.modifiers
from crepe_llm.recipe_files import shipped_recipes

GUIDE = Path(__file__).parent.parent / "docs" / "recipes.md"


def written(guide: str) -> str:
    """The guide with its generated parts made anew: what stands between `<!-- generated: NAME -->` and its end."""
    for name, make in (("recipes", recipes), ("reference", reference)):
        begin, end = f"<!-- generated: {name} -->", f"<!-- end of generated: {name} -->"
        before, opened, rest = guide.partition(begin)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise ValueError(f"{GUIDE.name} has no lines {begin} and {end}")
        guide = f"{before}{begin}\n\n{make()}\n{end}{after}"
    return guide


def recipes() -> str:
    """A table of the shipped recipes: each one's name and the comment at its top."""
    lines = ["| recipe | |", "|---|---|"]
    for name, path in shipped_recipes().items():
        comment = re.match(r"(?:#.*\n)+", path.read_text())
        text = " ".join(line.removeprefix("#").strip() for line in comment[0].splitlines()) if comment else ""
        lines.append(f"| `{name}` | {text} |")
    return "\n".join(lines) + "\n"


def reference() -> str:
    """A section for each modifier."""
    return "\n".join(_section(getattr(crepe_llm.modifiers, name)) for name in crepe_llm.modifiers.__all__)


def _section(modifier: Any) -> str:
    text = (inspect.getdoc(modifier) or "").partition("\n:param")[0]
    text, _, rest = text.partition("Lifecycle:")
    # What follows the lifecycle's list, indented or bulleted, is about the fields.
    fields_note = "\n".join(line for line in rest.splitlines() if not re.match(r"\s*-|\s{4,}", line)).strip()
    parts = [f"### {modifier.__name__}", text.replace("Sample yaml:\n\n", "").strip(), fields_note, _table(modifier)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(modifier: Any) -> str:
    described = _descriptions(modifier)
    parent = modifier.__mro__[1]
    if not parent.__module__.startswith("crepe_llm.") and parent is not Modifier:
        known = Modifier.model_fields.keys() | described.keys()
        described |= {name: f"as {parent.__name__}'s" for name in modifier.model_fields if name not in known}
    lines = ["| field | value | default | |", "|---|---|---|---|"]
    for name, text in described.items():
        field = modifier.model_fields[name]
        cells = (f"`{name}`", _kind(field.annotation), _default(field), text)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) if described else ""


def _descriptions(modifier: Any) -> dict[str, str]:
    found = {}
    for name, text in re.findall(r"^:param (\w+):((?:.|\n )*)", inspect.getdoc(modifier) or "", re.MULTILINE):
        found[name] = " ".join(text.split())
    return found


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
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


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    return "" if value is None else f"`{json.dumps(value, default=str)}`"


def main() -> None:
    guide = GUIDE.read_text()
    new = written(guide)
    if "--check" not in sys.argv[1:]:
        GUIDE.write_text(new)
    elif new != guide:
        sys.exit(f"docs/{GUIDE.name} is stale: run python scripts/{Path(__file__).name}")


if __name__ == "__main__":
    main()
