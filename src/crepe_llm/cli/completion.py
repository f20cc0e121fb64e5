"""`crepe completion`: what a shell needs to complete commands and options."""

import argparse
from typing import Any

from crepe_llm.cli.common import HelpFormatter

_SHELLS = ("bash", "zsh", "tcsh")


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "completion",
        help="print the completion script of a shell",
        description="Print a script that makes a shell complete this command's subcommands and options.",
        epilog=(
            "examples:\n"
            "  crepe completion bash > ~/.local/share/bash-completion/completions/crepe\n"
            "  crepe completion zsh > ~/.zfunc/_crepe        (with ~/.zfunc in fpath)\n"
        ),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("shell", choices=_SHELLS, help="the shell")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    import shtab

    from crepe_llm.cli.main import parser

    print(shtab.complete(parser(), options.shell))
