"""A hook of mkdocs: the notebook becomes a page of the site, with its outputs."""

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

NOTEBOOK, PAGE = "tutorial.ipynb", "notebook.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the page; mkdocs calls this before it looks for the pages of the navigation."""
    notebook = json.loads(Path(config.docs_dir, NOTEBOOK).read_text(encoding="utf-8"))
    files.append(File.generated(config, PAGE, content=markdown(notebook)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Have links to the notebook lead to its page."""
    return markdown.replace(f"({NOTEBOOK})", f"({PAGE})")


def markdown(notebook: dict[str, Any]) -> str:
    """A notebook's cells and outputs as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            else:
                parts.append(f"![what the cell draws](data:image/png;base64,{output['data']['image/png']})")
    parts.append(f'<a href="{NOTEBOOK}" download>The notebook as a file</a>')
    return "\n\n".join(parts) + "\n"
