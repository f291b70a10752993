# SPDX-License-Identifier: Apache-2.0
"""What the text names is there: files, headings, tests, options, modules, arguments, settings.

And no command is outside of backticks, where nothing would look at it.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from unittest import mock

import prereg_kernels
from prereg_kernels import PReConfig, apply_pre
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.handle import PRe
from tests.docs import test_commands, test_snippets
from tests.docs.commands import PROGRAMS, help_of
from tests.docs.pages import ROOT, Page, is_snippet, page_of, pages
from tests.tiny import tiny_llava
from tests.trainers.test_examples import ELSEWHERE

TOP = ("benchmarks", "configs", "csrc", "docs", "examples", "prereg_kernels", "tests")
PUBLIC = {name: getattr(prereg_kernels, name) for name in prereg_kernels.__all__}
PUBLIC["Family"] = Family
TAKE_SETTINGS = ("apply_pre", "with_pre", "PReCallback")
SETTINGS = inspect.signature(PReConfig).parameters.keys()


def spans() -> Iterator[tuple[Page, str]]:
    """Everything in backticks, and the page that it is on."""
    return ((page, span) for page in pages() for span in page.spans)


def test_files() -> None:
    """Paths from the top of the tree, and modules by the end of theirs."""
    found = [path.relative_to(ROOT) for top in TOP for path in (ROOT / top).rglob("*")]
    files = {str(path) for path in (*found, *map(Path, TOP))}
    modules = [f"/{file}" for file in files if file.endswith(".py")]
    for page, span in spans():
        path = span.partition("::")[0].rstrip("/")
        if re.fullmatch(rf"(?:{'|'.join(TOP)})/[\w./-]+", path):
            assert path in files, f"{page.name}: {span}"
        elif re.fullmatch(r"[\w/]+\.py", path):
            assert any(module.endswith(f"/{path}") for module in modules), f"{page.name}: {span}"


def test_links() -> None:
    """To other files, and to headings."""
    for page in pages():
        for link in page.links:
            target, _, heading = link.partition("#")
            if "://" in target:
                continue
            path = (ROOT / page.name).parent / target if target else ROOT / page.name
            assert path.exists(), f"{page.name}: {link}"
            if heading:
                to = page_of(str(path.resolve().relative_to(ROOT)))
                assert heading in to.headings, f"{page.name}: {link}"


def test_tests() -> None:
    """`tests/...py::test_x` of the text, and of the reasons for what is not run."""
    reasons = [*test_commands.NOT_RUN, *test_snippets.NOT_RUN.values()]
    text = "\n".join([*(span for _, span in spans()), *reasons])
    names = set(re.findall(r"tests/[\w/]+\.py::\w+", text))
    assert len(names) > 30
    for name in names:
        path, _, function = name.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, name


def test_options() -> None:
    """`--option` alone is one of a command that the page names, or, where it names none, of any."""
    commands = {page.name: {c for c, _ in test_commands.commands(page)} for page in pages()}
    helps = {command: help_of(command) for named in commands.values() for command in named}
    for page, span in spans():
        if span.startswith("--") and not page.name.startswith("docs/trainers/"):  # theirs
            known = "\n".join(map(helps.get, commands[page.name] or helps))
            for option in re.findall(r"--[\w-]+", span):
                assert re.search(rf"{option}\b", known), f"{page.name}: {span}"


@cache
def attached() -> PRe:
    return apply_pre(tiny_llava())


def test_code() -> None:
    """Modules and their functions, what hangs on `pre`, arguments of public functions, settings."""
    for page, span in spans():
        where = f"{page.name}: {span}"
        if re.fullmatch(r"(prereg_kernels|benchmarks)(\.\w+)+", span):
            resolve_name(span)
        try:
            tree = ast.parse(span)
        except SyntaxError:  # prose, formulas, commands
            continue
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(ast.Name("pre"), name) if page.name.endswith(".md"):
                    in_a_file = (
                        page.name == "docs/demo-loop.md"
                    )  # the key `pre` of a run's settings
                    assert in_a_file or hasattr(attached(), name), where
                case ast.Call(ast.Name(name), _, keywords) if name in PUBLIC:
                    known = inspect.signature(PUBLIC[name]).parameters.keys()
                    known |= SETTINGS if name in TAKE_SETTINGS else set()
                    assert {keyword.arg for keyword in keywords} <= known, where
                case ast.Assign([ast.Name(name)], value) if name in SETTINGS:
                    PReConfig(**{name: ast.literal_eval(value)})


def is_defined(name: str) -> bool:
    """Whether an import works; of a module beside a trainer that is not here, by its source."""
    try:
        return bool(resolve_name(name))
    except ModuleNotFoundError as error:
        module, _, member = name.partition(":")
        if not module.startswith("prereg_kernels.trainers.") or "prereg" in str(error.name):
            raise
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        named = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        named |= {a.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                  for a in node.names if a.asname}  # fmt: skip
        return member in named


def test_imports() -> None:
    """Of the text and of examples: of this package all, of others those that are installed."""
    texts = [(page.name, b.text) for page in pages() for b in page.blocks if is_snippet(b)]
    texts += [(page.name, span) for page, span in spans() if re.match(r"(from|import) \w", span)]
    texts += [(str(path), path.read_text()) for path in (ROOT / "examples").glob("*.py")]
    with mock.patch.object(sys, "path", [str(ROOT / "examples"), *sys.path]):
        for where, text in texts:
            for node in ast.walk(ast.parse(text)):
                match node:
                    case ast.ImportFrom(str(module), names):
                        wanted = [f"{module}:{name.name}" for name in names]
                    case ast.Import(names):
                        wanted = [name.name for name in names]
                    case _:
                        continue
                for name in wanted:
                    if find_spec(re.split(r"\W", name)[0]):
                        assert is_defined(name), f"{where}: {name}"


def test_examples_that_run_elsewhere() -> None:
    """tests/trainers/test_examples.py runs all others."""
    for name, file in ELSEWHERE.items():
        assert f'"{name}"' in (ROOT / file).read_text()


def test_no_command_is_outside_of_backticks() -> None:
    """Where there is nothing between a program's name and what it is told."""
    told = r"launch|-[mc]|train|sweep|checkup|doctor|--[\w-]+|[\w/-]+\.py"
    targets = "|".join(page.partition(" ")[2] for page in pages()[0].spans)
    command = re.compile(rf"\b(?:(?:{'|'.join(PROGRAMS)}) (?:{told})|make (?:{targets}))\b")
    for page in pages():
        found = command.search(page.prose)
        assert found is None, f"{page.name}: {found}"
