"""The recipes that ship with the package, by name."""

from pathlib import Path

_FOLDER = Path(__file__).parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Return the shipped recipes: name (the file's name without ``.yaml``) to file, in alphabetical order."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def recipe_path(name: str) -> Path:
    """Return the file of a recipe, given a shipped recipe's name or the path of a YAML file.

    Raises:
        ValueError: `name` is neither.
    """
    shipped = shipped_recipes()
    if not name:
        raise ValueError(f"the recipe's name is empty: give a file, or one of the shipped {', '.join(shipped)}")
    if name.removesuffix(".yaml") in shipped and not Path(name).is_file():
        return shipped[name.removesuffix(".yaml")]
    if Path(name).is_file():
        return Path(name)
    if Path(name).is_dir():
        raise ValueError(f"the recipe {name} is a folder: name a YAML file in it")
    raise ValueError(f"no recipe {name!r}: it is neither a file nor one of the shipped {', '.join(shipped)}")
