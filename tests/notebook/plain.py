# SPDX-License-Identifier: Apache-2.0
"""Run the notebook's cells in plain Python with few steps, for a test: `python -m
tests.notebook.plain DIRECTORY`.

As Jupyter does, it shows what a cell ends in, here as DIRECTORY/NUMBER.png. DIRECTORY/facts.json
gets what came out.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import torch

from prereg_kernels.attach.handle import get_pre
from tests.notebook.cells import code_with, read

FEW = {"TOWER_STEPS": 3, "PROJECTOR_STEPS": 2, "STEPS": 10, "LESSON_STEPS": 2, "SCENES": 24}


def run_cell(code: str, names: dict[str, Any]) -> Any:
    """Run a cell in these names; returns what it ends in."""
    *before, last = ast.parse(code).body
    if not isinstance(last, ast.Expr):
        before.append(last)
    exec(compile(ast.Module(before, []), "cell", "exec"), names)
    return eval(ast.unparse(last), names) if isinstance(last, ast.Expr) else None


def main(directory: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    attached = {}
    for number, code in enumerate(code_with(read(), FEW)):
        shown = run_cell(code, names)
        if shown is not None:
            (directory / f"{number}.png").write_bytes(shown._repr_png_())
        if "pre = apply_pre(" in code:
            models = {name: names[name] for name in ("baseline", "regularized")}
            attached = {name: get_pre(model) is not None for name, model in models.items()}
            alike = same(models["baseline"], models["regularized"])
    facts = {
        "attached": attached,
        "left": [get_pre(model) is not None for model in names["models"].values()],
        "alike before": alike,
        "alike after": same(names["baseline"], names["regularized"]),
        "pre_loss": {
            name: [step["pre_loss"] for step in names[name] if "pre_loss" in step]
            for name in ("without", "with_pre")
        },
        "results": names["results"],
        "words": names["picture"].words,
    }
    (directory / "facts.json").write_text(json.dumps(facts))


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether the weights that both have are equal."""
    ours, theirs = first.state_dict(), second.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours.keys() & theirs.keys())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
