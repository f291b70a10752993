# SPDX-License-Identifier: Apache-2.0
"""Private names of torch and transformers are in one module, `prereg_kernels._util.private`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

import prereg_kernels
from prereg_kernels._util import private

PACKAGE = Path(prereg_kernels.__file__).parent
PRIVATE = Path(private.__file__)
DOCUMENTED = {"_asdict", "_exit", "_fields", "_replace"}  # of named tuples and of os
OWN_TEXTS = {"_prereg"}  # an attribute that the package sets by name
METHODS = (
    private.MODULE_METHODS | private.TRAINER_METHODS | private.RECIPE_METHODS | private.NEMO_METHODS
)
CLASSES = (torch.nn.Module, transformers.Trainer, transformers.PreTrainedModel)

Names = Iterator[tuple[int, str, str]]
"""(line, name, how it is used)."""


def is_private(name: str) -> bool:
    return (
        name.startswith("_") and not name.startswith("__") and name.isidentifier() and name != "_"
    )


def defined_in(tree: ast.AST) -> Iterator[str]:
    """The names that a source gives to something of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) == "self" else []


def used_in(tree: ast.AST) -> Names:
    """Attributes, imports from elsewhere, and texts that are no part of a longer one."""
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for string in strings for part in string.values}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr, ast.unparse(node.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in parts:
                yield node.lineno, node.value, "text"
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if not name.startswith("prereg_kernels."):
                yield from ((node.lineno, part, "import") for part in name.split("."))


def overridden_in(tree: ast.AST) -> Names:
    """What a class redefines of a class of torch or transformers."""
    for node in ast.walk(tree):
        for item in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(item, ast.FunctionDef) and any(hasattr(c, item.name) for c in CLASSES):
                yield item.lineno, item.name, f"class {node.name}"


def foreign_in(tree: ast.AST, own: set[str]) -> list[str]:
    """The private names of others that a source uses or redefines."""
    used = [
        (line, name, how)
        for line, name, how in used_in(tree)
        if name not in own and not (name in METHODS and how in ("super()", "text"))
    ]
    redefined = [x for x in overridden_in(tree) if x[1] not in METHODS]
    return [f"{line}: {name} ({how})" for line, name, how in used + redefined if is_private(name)]


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.AST]:
    return {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


@pytest.fixture(scope="module")
def own(trees: dict[Path, ast.AST]) -> set[str]:
    """The package's own private names, and not those that the one module has of others."""
    defined = {name for tree in trees.values() for name in defined_in(tree)}
    return defined - {name for _, name, _ in used_in(trees[PRIVATE])} | DOCUMENTED | OWN_TEXTS


def test_private_names_are_in_one_module(trees: dict[Path, ast.AST], own: set[str]) -> None:
    for path, tree in trees.items():
        if path != PRIVATE:
            assert not foreign_in(tree, own), path.relative_to(PACKAGE)


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._current_autograd_node()",
        "from torch.utils import _python_dispatch",
        "import torch._dynamo",
        "getattr(model, '_no_split_modules')",
        "x._version",
        "model._keys_to_ignore_on_save = set()",
        "peft_model._get_submodules(name)",
        "class My(Trainer):\n    def _save_optimizer_and_scheduler(self): pass",
        "class My(nn.Module):\n    def f(self): return self._buffers",
    ],
)
def test_others_are_found(line: str, own: set[str]) -> None:
    assert foreign_in(ast.parse(line), own)
