# SPDX-License-Identifier: Apache-2.0
"""Every public name has an example, and prints what the example says.

An example has `torch`, the names of the package, `model`, a tiny LLaVA in training, and `batch`,
two sequences with an image each; its directory is empty.
"""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import prereg_kernels
from prereg_kernels import PRe, checkup, ops, trainers
from tests.docs.commands import chdir
from tests.tiny import make_batch, tiny_llava

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def documented() -> dict[str, Any]:
    """The package's classes and functions, its parts' and the checkup's, and the handle's methods.

    Not old names, nor the checkup's classes, which its functions return.
    """
    found = {
        name: getattr(module, name)
        for module in (prereg_kernels, trainers, ops)
        for name in getattr(module, "__all__", ())
    }
    functions = {**vars(PRe), **{name: getattr(checkup, name) for name in checkup.__all__}}
    found |= {name: value for name, value in functions.items() if inspect.isfunction(value)}
    return {
        name: value
        for name, value in found.items()
        if not name.startswith("_") and value.__name__ == name
    }


@pytest.mark.parametrize("name", documented())
def test_examples(name: str, tmp_path: Path) -> None:
    given = {name: getattr(prereg_kernels, name) for name in prereg_kernels.__all__}
    given |= {"torch": torch, "model": tiny_llava(), "batch": make_batch()}
    [test] = doctest.DocTestFinder(recurse=False).find(documented()[name], name, globs=given)
    assert test.examples, f"{name}: expected an example in its docstring, got none"
    said: list[str] = []
    with chdir(tmp_path):
        doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert not said, "".join(said)
