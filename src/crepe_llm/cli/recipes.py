"""`crepe recipes`: the shipped recipes."""

import argparse
from typing import Any

from crepe_llm.recipe_files import recipe_path, shipped_recipes


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "recipes",
        help="list the shipped recipes",
        description="List the recipes that `crepe prune --recipe` takes by name; with a name, print that recipe.",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this recipe")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.name is not None:
        print(recipe_path(options.name).read_text(), end="")
        return
    shipped = shipped_recipes()
    width = max(map(len, shipped))
    for name, path in shipped.items():
        first = path.read_text().partition("\n")[0]
        print(f"{name:<{width}}  {first.removeprefix('#').strip()}")
