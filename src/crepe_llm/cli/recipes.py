"""`crepe recipes`: the shipped recipes."""

import argparse
from typing import Any

from crepe_llm.cli.common import HelpFormatter
from crepe_llm.cli.results import add_json, check_json, write_json
from crepe_llm.recipe_files import recipe_path, shipped_recipes


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "recipes",
        help="list the shipped recipes",
        description="List the recipes that `crepe prune --recipe` takes by name; with a name, print that recipe.",
        epilog=(
            "examples:\n"
            "  crepe recipes\n"
            "  crepe recipes crepe_2of4_best > my_recipe.yaml     to change it and give it to `crepe prune --recipe`\n"
        ),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this recipe")
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    check_json(options)
    if options.name is not None:
        text = recipe_path(options.name).read_text(encoding="utf-8")
        print(text, end="")
        write_json(options, {"name": options.name, "recipe": text})
        return
    shipped = {name: path.read_text(encoding="utf-8").partition("\n")[0] for name, path in shipped_recipes().items()}
    shipped = {name: first.removeprefix("#").strip() for name, first in shipped.items()}
    width = max(map(len, shipped))
    for name, first in shipped.items():
        print(f"{name:<{width}}  {first}")
    write_json(options, shipped)
