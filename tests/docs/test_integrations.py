"""docs/integrations.md says what is tested: its table is the parameters of the tests."""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module

from tests.attach.families.models import CASES
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "integrations.md"
MODELS, ANCHORS = "tests/attach/families/test_models.py", "tests/attach/families/test_anchors.py"
INTEGRATIONS = "tests/integrations"
# The test that each column of the families' table stands for, and which of its scenes.
COLUMNS = {
    "images": (f"{MODELS}::test_gradients", "images"),
    "several": (f"{MODELS}::test_gradients", "several images"),
    "uneven": (f"{MODELS}::test_gradients", "uneven images"),
    "video": (f"{MODELS}::test_gradients", "video"),
    "text only": (f"{MODELS}::test_gradients", "text only"),
    "left padding": (f"{MODELS}::test_gradients", "left padding"),
    "layers": (f"{MODELS}::test_gradients_of_several_layers", None),
    "packed": (f"{ANCHORS}::test_gradients_of_packed_sequences", None),
    "pre_projector": (f"{ANCHORS}::test_gradients_with_what_the_encoder_saw", None),
    "global": (f"{ANCHORS}::test_gradients_of_whole_images", None),
    "fraction": (f"{ANCHORS}::test_gradients_of_a_fraction", None),
    "generate": (f"{MODELS}::test_generate", None),
    "saved": (f"{MODELS}::test_save_pretrained_writes_a_plain_model", None),
    "LoRA": (f"{INTEGRATIONS}/test_peft.py::test_gradients", None),
    "compile": (f"{INTEGRATIONS}/test_compile.py::test_images_break_the_graph_no_more_often", None),
}


@cache
def runs(test: str) -> set[tuple[str, str | None]]:
    """(family, scene) of each run of a test, as pytest makes them of its parameters."""
    path, _, function = test.partition("::")
    module = import_module(path.removesuffix(".py").replace("/", "."))
    found = set()
    for mark in getattr(module, function).pytestmark:
        names = mark.args[0].split(", ") if mark.name == "parametrize" else []
        for values in mark.args[1] if "name" in names else ():
            run = dict(zip(names, values if len(names) > 1 else [values], strict=True))
            found.add((run["name"], run.get("scene")))
    return found


def table() -> str:
    """A row for each family's model types, with a mark where the column's test runs on it."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in CASES:
        cells = []
        for test, scene in COLUMNS.values():
            scenes = {s for n, s in runs(test) if n == name}
            cells.append("✓" if (scenes if scene is None else scene in scenes) else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_of_families() -> None:
    """To write it anew, print `table()`."""
    page = PAGE.read_text()
    found = re.search(r"<!-- families -->\n(.*)\n<!-- /families -->", page, re.S)
    assert found and found[1] == table()
    legend = page.partition("| column | test |\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (.*) \| (.*) \|$", legend, re.M)
    named = {column: row for columns, row in rows for column in columns.split(", ")}
    assert named.keys() == COLUMNS.keys()
    for column, (test, _) in COLUMNS.items():
        assert f"`{test}`" in named[column].partition("elsewhere")[0], column
