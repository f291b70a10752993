# SPDX-License-Identifier: Apache-2.0
"""Examples in docstrings, as the parser of the API's pages names their section."""

from __future__ import annotations

from typing import Any

from griffe import Extension


class Examples(Extension):
    """`Example:` is read as `Examples:`, whose doctests are code."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """For each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
