"""Which room of the package may import which, imports inside functions included."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "crepe_llm"

# Each room and those that it may import. A file right in the package (recipe_files.py) is open to all, and imports
# the first room at most; but __init__.py starts what is asked for, and __main__.py the command.
ROOMS = {
    "functional": set(),
    "models": {"functional"},
    "pruning": {"functional", "models"},
    "training": {"functional", "models", "pruning", "checkpoints"},
    "search": {"functional", "models", "pruning", "training"},
    "calibration": {"models"},
    "modifiers": {"functional", "models", "pruning", "training", "search", "checkpoints", "calibration"},
    "oneshot": {"models", "checkpoints", "calibration", "modifiers"},
    "kernels": {"functional"},
    "checkpoints": {"functional"},
    "vllm_plugin": {"functional", "models", "kernels", "checkpoints"},
    "samples": set(),
    "evaluation": {"functional", "models", "checkpoints", "samples"},
    "cli": {
        "functional",
        "models",
        "kernels",
        "training",
        "search",
        "modifiers",
        "oneshot",
        "checkpoints",
        "vllm_plugin",
        "samples",
        "evaluation",
    },
}
# Of the modifiers, only these files search.
SEARCHES = ("modifiers/pho.py", "modifiers/measured_spread.py", "modifiers/judging.py")
# The rooms that work without llm-compressor.
WITHOUT_LLM_COMPRESSOR = ("functional", "models", "pruning", "training", "search", "kernels", "vllm_plugin", "samples")


def imports(path):
    """The dotted names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_of(path):
    """The rooms that a file imports from."""
    parts = [name.split(".") for name in imports(path) if name.startswith("crepe_llm.")]
    return {part[1] for part in parts} & ROOMS.keys()


def test_every_room_has_rules():
    assert {folder.name for folder in PACKAGE.iterdir() if any(folder.glob("*.py"))} == ROOMS.keys()


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_those_they_may(room):
    for path in (PACKAGE / room).rglob("*.py"):
        allowed = {room} | ROOMS[room]
        if room == "modifiers" and path.relative_to(PACKAGE).as_posix() not in SEARCHES:
            allowed -= {"search"}
        assert rooms_of(path) <= allowed, path


def test_files_right_in_the_package_import_the_first_room_at_most():
    for path in PACKAGE.glob("*.py"):
        if path.stem not in ("__init__", "__main__"):
            assert rooms_of(path) <= {"functional"}, path


@pytest.mark.parametrize("room", WITHOUT_LLM_COMPRESSOR)
def test_rooms_without_llm_compressor(room):
    for path in (PACKAGE / room).rglob("*.py"):
        assert not any(name.split(".")[0] == "llmcompressor" for name in imports(path)), path
