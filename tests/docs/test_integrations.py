# SPDX-License-Identifier: Apache-2.0
"""docs/integrations.md says what is tested: its tables are the parameters of the tests."""

from __future__ import annotations

import re

from prereg_kernels.attach.families import FAMILIES
from tests.attach.families.models import CASES
from tests.docs.pages import ROOT
from tests.docs.tables import BY_POPULARITY, COLUMNS, PAGE, written
from tests.models.places import TRAINED, UNMERGED
from tests.releases import HERE
from tests.zoo.refused import REFUSED

IN_WORDS = {11: "eleven", 12: "twelve", 13: "thirteen"}


def test_the_legend_of_families() -> None:
    """Each column's test is the one whose runs make its marks."""
    page = PAGE.read_text()
    legend = page.partition("| column | test |\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (.*) \| (.*) \|$", legend, re.M)
    named = {column: row for columns, row in rows for column in columns.split(", ")}
    assert named.keys() == COLUMNS.keys()
    for column, (test, _) in COLUMNS.items():
        assert f"`{test}`" in named[column].partition("elsewhere")[0], column


def test_the_families_with_an_encoders_row() -> None:
    """docs/anchors.md has each of them once, and no other."""
    page = (ROOT / "docs" / "anchors.md").read_text()
    table = page.partition("| a token is |")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines()[2:] for name in row.split("|")[3].split(",")]
    projected = [family.name for family in FAMILIES if family.projector is not None]
    assert sorted(name.strip() for name in named) == sorted(projected)
    states = (ROOT / "docs" / "status.md").read_text()
    assert f'`anchor="pre_projector"` ({len(projected)} families)' in states


def test_the_families_with_a_layout() -> None:
    """Whose image files the checkup measures: docs/checkup.md and docs/status.md have them all."""
    placed = sorted(family.name for family in FAMILIES if family.layout is not None)
    page = (ROOT / "docs" / "checkup.md").read_text()
    rows = re.findall(r"^\| ([^(|]*?) (?:\(.*?\) )?\| .* \| proven by test.* \|$", page, re.M)
    assert sorted(name for row in rows for name in row.split(", ")) == placed
    found = re.search(r"`prereg checkup` \((.*?); ", (ROOT / "docs" / "status.md").read_text())
    assert found and sorted(found[1].split(", ")) == placed


def test_the_tables() -> None:
    """`python -m tests.docs.tables` writes them anew."""
    assert written(PAGE.read_text()) == PAGE.read_text()
    assert sorted(BY_POPULARITY) == sorted(name for name in TRAINED if "+" not in name)


def test_the_numbers_of_types() -> None:
    """On all pages that have them."""
    served, refused = len(BY_POPULARITY), len(UNMERGED) + len(REFUSED)
    release = ".".join(map(str, HERE))
    said = {
        "docs/status.md": (
            f"on {served} image-text types of transformers {release}, ",
            f"on those of the {served} that the release has",
            f"on {refused} others an error",
        ),
        "README.md": (
            f"on {served} of the image-text model types in transformers {release}: ",
            f"On {refused} other types it raises an error",
        ),
        "docs/integrations.md": (f"For these {IN_WORDS[len(CASES)]} types there are more tests.",),
    }
    for name, sentences in said.items():
        page = " ".join((ROOT / name).read_text().split())
        for sentence in sentences:
            assert page.count(sentence) == 1, f"{name}: {sentence}"
