# SPDX-License-Identifier: Apache-2.0
"""The notebook of examples/: its cells, and the digest that ties its outputs to its code."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[2] / "examples" / "effect.ipynb"
PARAMETERS = "parameters"
"""The tag of the cell whose numbers a test replaces."""

Notebook = Mapping[str, Any]


def read() -> Notebook:
    """The notebook as it lies there."""
    return json.loads(NOTEBOOK.read_text())


def code_cells(notebook: Notebook) -> list[Mapping[str, Any]]:
    """Its cells of code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text(lines: str | list[str]) -> str:
    """What nbformat keeps as one string or as lines."""
    return lines if isinstance(lines, str) else "".join(lines)


def digest(notebook: Notebook) -> str:
    """Of the code cells with their outputs, however their lines are kept."""
    whole = []
    for cell in code_cells(notebook):
        outputs = [
            {
                "text": text(output.get("text", "")),
                "data": {kind: text(data) for kind, data in output.get("data", {}).items()},
            }
            for output in cell["outputs"]
        ]
        whole.append((text(cell["source"]), outputs))
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def code_with(notebook: Notebook, parameters: Mapping[str, int]) -> list[str]:
    """The cells' code, other numbers in the cell of parameters: all that it sets, and no more."""
    codes = []
    for cell in code_cells(notebook):
        code = text(cell["source"])
        if PARAMETERS in cell["metadata"].get("tags", ()):
            names = [ast.unparse(node.targets[0]) for node in ast.parse(code).body]  # type: ignore[attr-defined]
            assert names == list(parameters), names
            code = "\n".join(f"{name} = {value}" for name, value in parameters.items())
        codes.append(code)
    return codes
