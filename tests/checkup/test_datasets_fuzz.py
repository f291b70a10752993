# SPDX-License-Identifier: Apache-2.0
"""Files of labels of any content: a table, or one line that names the file."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from prereg_kernels._util.files import printable
from prereg_kernels.checkup.images.datasets import read_labels
from tests.fuzzing import fuzz

plain = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r\n"), max_size=9)
pieces = st.sampled_from(
    [
        *(b"a.png", b"cat", b",", b"\n", b"\r\n", b'"', b'{"a": ', b"}", b"[", b": ", b" "),
        *(b"\0", b"\xff", b"\xef\xbb\xbf", b"NaN", b"null", b"\\ud800"),
        *(b"1" * 5000, b"x" * 140_000, b"[" * 5000),
    ]
)


def read(name: str, content: bytes) -> dict[str, str] | None:
    """The labels; None where the file is refused, in a line that names it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(content)
        try:
            return read_labels(path)
        except ValueError as error:
            assert str(error).startswith(str(path)) and len(str(error)) < 400
            return None


@fuzz(100)
@given(st.sampled_from(["a.csv", "a.json"]), st.lists(pieces | st.binary(max_size=4), max_size=12))
def test_any_bytes(name: str, parts: list[bytes]) -> None:
    found = read(name, b"".join(parts))
    if found is not None:
        assert found
        for label in found.values():
            assert type(label) is str and label.encode("utf-8").decode() == printable(label)


@fuzz(50)
@given(st.dictionaries(plain.map(str.strip), plain.filter(str.strip), min_size=1, max_size=5))
def test_tables_come_back(table: dict[str, str]) -> None:
    shown = {name: printable(label) for name, label in table.items()}
    assert read("a.json", json.dumps(table).encode()) == shown
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(table.items())
        stripped = {name: printable(label.strip()) for name, label in table.items()}
        assert read_labels(path) == stripped


values: Any = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(10**30), 10**30) | plain,
    lambda below: st.lists(below, max_size=2) | st.dictionaries(plain, below, max_size=2),
    max_leaves=4,
)


@fuzz(50)
@given(values)
def test_any_json(value: Any) -> None:
    found = read("a.json", json.dumps(value).encode())
    fits = isinstance(value, dict) and all(isinstance(v, (str, int)) for v in value.values())
    assert (found is not None) == bool(fits and value)
