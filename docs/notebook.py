"""Runs docs/notebook.ipynb and stores its outputs: python docs/notebook.py.

The cells are plain Python, so they need neither Jupyter nor its kernel: each is executed here, and the value of its last line
is what a notebook shows. Only its text is stored; a notebook also shows the report of an erasure.
"""

import ast
import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).with_name("notebook.ipynb")


def read() -> dict[str, Any]:
    """The notebook in format 4."""
    return json.loads(NOTEBOOK.read_text())


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """Executes all cells and replaces their outputs; returns the variables."""
    known: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, NOTEBOOK.name, "exec"), known)  # noqa: S102
        shown = eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), known) if last else None  # noqa: S307
        cell["execution_count"] = number
        cell["outputs"] = [] if shown is None else [_output(repr(shown), number)]
    return known


def _output(text: str, number: int) -> dict[str, Any]:
    return {"output_type": "execute_result", "execution_count": number, "data": {"text/plain": [text]}, "metadata": {}}


def page() -> str:
    """The notebook as a page of the site."""
    parts = []
    for cell in read()["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += ["```text\n" + "".join(each["data"]["text/plain"]) + "\n```" for each in cell.get("outputs", ())]
    return "\n\n".join([*parts, f"[This page as a notebook]({NOTEBOOK.name})", ""])


if __name__ == "__main__":
    found = read()
    executed(found)
    NOTEBOOK.write_text(json.dumps(found, indent=1) + "\n")
