# SPDX-License-Identifier: Apache-2.0
"""The models whose structure is known beforehand, by `python -m benchmarks.step.structures`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prereg_kernels.estimate.structure import PARTS, Structure

FOLDER = Path(__file__).parent / "models"
TRAINS = (("projector", "llm"), ("llm",), ("projector",), PARTS)
"""What may train: a structure for each."""


def names() -> list[str]:
    """Of all of them."""
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def config_of(name: str) -> dict[str, Any]:
    """The model's config.json."""
    content: dict[str, Any] = json.loads((FOLDER / name / "config.json").read_text())
    return content


def structure_of(name: str, trains: Sequence[str]) -> Structure:
    """Raises ValueError where another set of parts trains."""
    content = json.loads((FOLDER / name / "structure.json").read_text())
    key = "+".join(part for part in PARTS if part in trains)
    if key not in content:
        raise ValueError(f"train: expected one of {', '.join(content)}; got {key}")
    return Structure.from_json(content[key])


def file_of(structures: Sequence[Structure]) -> str:
    """The text of a structure.json."""
    entries = {"+".join(x.trains): x.to_json() for x in structures}
    lines = []
    for key, entry in entries.items():
        blocks = ",\n  ".join(json.dumps(block) for block in entry["blocks"])
        head = json.dumps({name: x for name, x in entry.items() if name != "blocks"})
        lines.append(f' "{key}": {head[:-1]}, "blocks": [\n  {blocks}]}}')
    return "{\n" + ",\n".join(lines) + "\n}\n"
