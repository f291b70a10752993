# SPDX-License-Identifier: Apache-2.0
"""What the project's text holds: fenced blocks, and code in backticks, by page.

A page is a Markdown file, a notebook's text, the docstrings of a Python file, or the Makefile's
help. Docstrings are read as Markdown too: what is indented by four after an empty line is a block.

Before a fenced block a comment says what is not run and why: `<!-- not run: REASON -->` for all of
it, `<!-- not run where TEXT: REASON -->` for its commands with that text.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

import prereg_kernels

ROOT = Path(__file__).parents[2]
MARKER = re.compile(r"<!-- not run(?: where (?P<where>.+?))?: (?P<reason>.+?) -->", re.S)


@dataclass(frozen=True)
class Block:
    """A fenced or indented block: its language, or "" where it has none; its first line in a file
    of Markdown; {text: reason} of what is not run of it."""

    language: str
    text: str
    line: int
    markers: dict[str, str] = field(default_factory=dict, hash=False)

    def why_not(self, command: str = "") -> str | None:
        """The reason why it, or this command of it, is not run; None: it is."""
        return next((why for text, why in self.markers.items() if text in command), None)


@dataclass(frozen=True)
class Page:
    """`spans`: the code in backticks. `prose`: the text outside of code. `links`: their targets.
    `headings`: as links name them."""

    name: str
    blocks: tuple[Block, ...]
    spans: tuple[str, ...]
    prose: str
    links: tuple[str, ...]
    headings: tuple[str, ...] = ()


def read_page(name: str, text: str) -> Page:
    """Take a page of Markdown apart."""
    blocks: list[Block] = []
    inline: list[Token] = []
    markers: dict[str, str] = {}
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for token in tokens:
        if token.type == "html_block" and (found := MARKER.fullmatch(token.content.strip())):
            markers[found["where"] or ""] = " ".join(found["reason"].split())
            continue
        if token.type in ("fence", "code_block"):
            line = token.map[0] + 1 if token.map else 0
            blocks.append(Block(token.info.strip(), token.content, line, markers))
        assert not markers or token.type == "fence", f"{name}: a marker without a block: {markers}"
        markers = {}
        inline += token.children or []
    titles = [after.content for before, after in pairwise(tokens) if before.type == "heading_open"]
    return Page(
        name,
        tuple(blocks),
        tuple(" ".join(token.content.split()) for token in inline if token.type == "code_inline"),
        " ".join(token.content for token in inline if token.type in ("text", "html_inline")),
        tuple(str(token.attrs[a]) for token in inline for a in ("href", "src") if a in token.attrs),
        tuple(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles),
    )


def docstrings(path: Path) -> str:
    """Those of a Python file, one after the other."""
    tree = ast.parse(path.read_text())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if text)


def text_cells(path: Path) -> str:
    """Those of a notebook, one after the other."""
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(x["source"]) for x in cells if x["cell_type"] == "markdown")


@cache
def pages() -> tuple[Page, ...]:
    """All of them."""
    readme = ROOT / "README.md"
    others = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
    markdown = dict.fromkeys((readme, *others))
    folders = (ROOT / name for name in ("prereg_kernels", "examples", "benchmarks"))
    python = sorted(path for folder in folders for path in folder.rglob("*.py"))
    texts = {path: path.read_text() for path in markdown}
    texts |= {path: docstrings(path) for path in python}
    texts |= {path: text_cells(path) for path in sorted((ROOT / "examples").glob("*.ipynb"))}
    targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    makefile = Page("Makefile", (), tuple(f"make {target}" for target in targets), "", ())
    named = {str(path.relative_to(ROOT)): text for path, text in texts.items()}
    return (makefile, *(read_page(name, text) for name, text in named.items()))


def page_of(name: str) -> Page:
    """The one of that name."""
    [found] = [page for page in pages() if page.name == name]
    return found


def is_snippet(block: Block) -> bool:
    """Whether a block is Python: of a docstring's, which name no language, what parses and calls
    the package."""
    if block.language:
        return block.language == "python"
    try:
        tree = ast.parse(block.text)
    except SyntaxError:
        return False
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return bool(names & set(prereg_kernels.__all__))
