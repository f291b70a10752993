# SPDX-License-Identifier: Apache-2.0
"""Each source file says its licence on its first line."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MARKS = {".py": "#", ".cpp": "//", ".h": "//", ".cu": "//"}
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "prereg_kernels", "tests")
SOURCES = [
    path
    for path in (*ROOT.glob("*"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*")))
    if path.suffix in MARKS
]


@pytest.mark.parametrize("folder", (".", *FOLDERS))
def test_first_line(folder: str) -> None:
    inside = [p for p in SOURCES if (p.relative_to(ROOT).parts[:-1] or (".",))[0] == folder]
    assert inside
    for path in inside:
        first = path.read_text().partition("\n")[0]
        expected = f"{MARKS[path.suffix]} SPDX-License-Identifier: Apache-2.0"
        assert first == expected, f"{path.relative_to(ROOT)}: {first}"
