"""Run the notebook of the docs in an empty folder, and keep what its cells print and draw.

python scripts/notebook.py            runs docs/tutorial.ipynb and stores its outputs in it (minutes)
python scripts/notebook.py --check    fails if a code cell was changed after its outputs were made; runs nothing

Standard output and figures are stored. Standard error is not: libraries write progress bars and this machine's paths.
"""

import argparse
import base64
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"
_MADE_OF = "outputs_made_of"


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Run the code cells in their order, in the working folder, and put their outputs into the notebook.

    Args:
        notebook: as read from its JSON; changed in place.

    Returns:
        The names that the cells have defined.

    Raises:
        Whatever a cell raises.
    """
    from matplotlib import pyplot

    names: dict[str, Any] = {"__name__": "__main__"}
    pyplot.switch_backend("Agg")
    for number, cell in enumerate(_code_cells(notebook), start=1):
        printed, code = io.StringIO(), compile("".join(cell["source"]), f"code cell {number}", "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        outputs = [_drawn(pyplot.figure(each)) for each in pyplot.get_fignums()]
        pyplot.close("all")
        if printed.getvalue():
            text = printed.getvalue().splitlines(keepends=True)
            outputs.insert(0, {"name": "stdout", "output_type": "stream", "text": text})
        cell["execution_count"], cell["outputs"] = number, outputs
    notebook["metadata"][_MADE_OF] = digest(notebook)
    return names


def digest(notebook: dict[str, Any]) -> str:
    """A digest of the code cells, by which outputs are known to be theirs."""
    text = "\0".join("".join(cell["source"]) for cell in _code_cells(notebook))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_current(notebook: dict[str, Any]) -> bool:
    """Whether every code cell was run, as it stands, when the outputs were made."""
    was_run = all(cell["execution_count"] for cell in _code_cells(notebook))
    return was_run and notebook["metadata"].get(_MADE_OF) == digest(notebook)


def _code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _drawn(figure: Any) -> dict[str, Any]:
    """A figure as the output of a cell."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=80, bbox_inches="tight", metadata={"Software": None})
    data = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<Figure>"]}
    return {"data": data, "metadata": {}, "output_type": "display_data"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    if parser.parse_args().check:
        if not is_current(notebook):
            sys.exit(f"the outputs of docs/{NOTEBOOK.name} are stale: run python scripts/{Path(__file__).name}")
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["MPLBACKEND"] = "Agg"
        run(notebook)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
