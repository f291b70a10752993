"""docs/integrations.md says what is tested: its tests exist, and its table is their parameters."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from prereg_kernels.families import FAMILIES
from tests.families.batches import SCENES, has
from tests.families.models import CASES
from tests.families.test_anchors import PROJECTED, TELLING

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "integrations.md"
TWO = ("llava", "qwen2_5_vl")  # the families of tests/integrations
COLUMNS = {
    "images": "images",
    "several": "several images",
    "uneven": "uneven images",
    "video": "video",
    "text only": "text only",
    "left padding": "left padding",
    "layers": None,
    "packed": None,
    "pre_projector": PROJECTED,
    "global": TELLING,
    "fraction": None,
    "generate": None,
    "saved": None,
    "LoRA": TWO,
    "compile": TWO,
}


def table() -> str:
    """A row for each family's model types; a scene that a family has, or the families listed."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for family in FAMILIES:
        for name in family.model_types:
            cells = []
            for source in COLUMNS.values():
                if isinstance(source, str):
                    tested = has(name, source)
                else:
                    tested = source is None or name in source
                cells.append("✓" if tested else "")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_of_families() -> None:
    """To write it anew: python -c 'from tests.test_docs import table; print(table())'."""
    found = re.search(r"<!-- families -->\n(.*)\n<!-- /families -->", PAGE.read_text(), re.S)
    assert found and found[1] == table()
    assert {name for family in FAMILIES for name in family.model_types} == CASES.keys()
    assert {source for source in COLUMNS.values() if isinstance(source, str)} < SCENES.keys()


def test_every_named_test_and_example_exists() -> None:
    page = PAGE.read_text()
    names = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(names) > 30
    for path, name in names:
        tree = ast.parse((ROOT / path).read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in defined, f"{path}::{name}"
    examples = re.findall(r"`(examples/[\w.]+)`", page)
    assert len(examples) > 5 and all((ROOT / path).is_file() for path in examples)


def test_the_families_of_the_integrations() -> None:
    for file in ("test_peft.py", "test_compile.py"):
        text = (ROOT / "tests" / "integrations" / file).read_text()
        assert f'parametrize("name", {TWO!r})'.replace("'", '"') in text
