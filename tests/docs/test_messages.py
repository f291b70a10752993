# SPDX-License-Identifier: Apache-2.0
"""The page of symptoms quotes what the package says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"\*\*It says\*\* `([^`]+)`", PAGE)


def texts() -> Iterator[str]:
    """The strings of the package; ... stands for what is put into them."""
    for path in (ROOT / "prereg_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                parts = (x.value if isinstance(x, ast.Constant) else "..." for x in node.values)
                yield "".join(map(str, parts))


SAID = list(texts())


def test_all_are_found() -> None:
    assert len(QUOTED) == PAGE.count("**It says**") > 10


@pytest.mark.parametrize("quoted", QUOTED)
def test_the_package_says_so(quoted: str) -> None:
    """In one string, piece by piece in this order."""
    pieces = [re.escape(piece.strip()) for piece in quoted.split("...")]
    pattern = re.compile(".*".join(pieces), re.S)
    assert any(pattern.search(text) for text in SAID)
