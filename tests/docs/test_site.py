# SPDX-License-Identifier: Apache-2.0
"""The documentation's site: its links, what is on it, and that nothing of it is elsewhere."""

from __future__ import annotations

import re
import runpy
from html.parser import HTMLParser
from pathlib import Path

import pytest

import prereg_kernels
from tests.docs.pages import ROOT
from tests.docs.test_commands import SUBCOMMANDS

HOOKS = runpy.run_path(str(ROOT / "docs" / "site" / "hooks.py"))
SITE = ROOT / "build" / "site"
# {tag: the attributes by which a browser loads something}
LOADS = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "image": ("href",),
    "img": ("src", "srcset"),
    "link": ("href",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "use": ("href",),
    "video": ("src", "poster"),
}


def test_every_page_is_in_the_table_of_contents() -> None:
    """Once. Those of commands and of the API are put there by the hooks."""
    listed = re.findall(r"^ +- (?:\w+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    docs = ROOT / "docs"
    pages = {str(path.relative_to(docs)) for path in docs.rglob("*.md")}
    assert sorted(listed) == sorted(pages | set(HOOKS["TOP"].values()))
    assert set(HOOKS["TOP"]) == {path.name for path in ROOT.glob("*.md")}


@pytest.mark.parametrize(
    ("file", "link", "expected"),
    (
        ("README.md", "docs/gpu.md", "gpu.md"),
        ("README.md", "docs/images/probes.png", "images/probes.png"),
        ("README.md", "LICENSE", "{}/LICENSE"),
        ("CONTRIBUTING.md", "docs/trainers/trl.md#why", "trainers/trl.md#why"),
        ("docs/demo.md", "../README.md#what-the-demo-shows", "index.md#what-the-demo-shows"),
        ("docs/anchors.md", "../examples/tiny.py", "{}/examples/tiny.py"),
        ("docs/trainers/trl.md", "../integrations.md", "../integrations.md"),
        ("docs/trainers/trl.md", "../../README.md", "../index.md"),
        ("docs/trainers/trl.md", "../../csrc/rows.h", "{}/csrc/rows.h"),
        ("docs/trainers/trl.md", "https://arxiv.org/abs/2603.20808", None),
        ("docs/trainers/trl.md", "#here", None),
    ),
)
def test_links(file: str, link: str, expected: str | None) -> None:
    """Of a page to a page; of a page to what is none, in the repository. Nothing within code."""
    blob = f"{HOOKS['REPOSITORY']}/blob/main"
    wanted = link if expected is None else expected.format(blob)
    text = "A [link]({}), `[code]({})`\n```\n[code]({})\n```\n"
    assert HOOKS["relink"](file, text.format(link, link, link)) == text.format(wanted, link, link)


def test_each_command_has_a_page() -> None:
    """With its options; two commands are other people's, and have theirs."""
    pages = HOOKS["command_pages"]()
    theirs = set(HOOKS["COMMANDS"])
    assert {name for name in SUBCOMMANDS if name not in theirs} <= {
        page.removeprefix("commands/").removesuffix(".md") for page in pages
    }
    for page, text in pages.items():
        assert "usage: prereg" in text and "--help" in text, page


def test_each_public_name_has_an_entry() -> None:
    text = "\n".join(HOOKS["api_pages"]().values())
    entries = set(re.findall(r"^::: [\w.]*\.(\w+)$", text, re.M))
    assert set(prereg_kernels.__all__) - {"__version__"} <= entries
    assert {"register_loss", "linear_probe", "with_pre"} <= entries
    assert "PreTrainer" not in entries  # an old spelling


class Loads(HTMLParser):
    """What a browser loads for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("rel") not in ("canonical", "prev", "next"):
            self.found += [given[name] or "" for name in LOADS.get(tag, ()) if given.get(name)]
        self.found += re.findall(r"url\(['\"]?([^)'\"]+)", given.get("style") or "")


def loads_of(path: Path) -> list[str]:
    """What a file of HTML or CSS loads, by its source."""
    text = path.read_text()
    if path.suffix == ".css":
        return re.findall(r"(?:url\(|@import )['\"]?([^)'\";]+)", text)
    loads = Loads()
    loads.feed(text)
    return loads.found + re.findall(r"@import ['\"]?([^'\";]+)", text)


@pytest.mark.site
def test_nothing_is_loaded_from_elsewhere() -> None:
    """Scripts, styles, fonts and images are the site's own files, and are there."""
    files = [path for path in SITE.rglob("*") if path.suffix in (".html", ".css")]
    assert len(files) > 40
    for path in files:
        for target in loads_of(path):
            where = f"{path.relative_to(SITE)}: {target}"
            if target.startswith(("data:", "#")):
                continue
            assert not re.match(r"\w+:|//", target), where
            base = SITE if target.startswith("/") else path.parent
            assert (base / target.partition("?")[0].lstrip("/")).exists(), where


@pytest.mark.site
def test_what_is_built_is_all_there() -> None:
    """Docstrings' examples are code, and names are their headings."""
    page = (SITE / "reference" / "models.html").read_text()
    assert 'id="prereg_kernels.attach.regularizer.apply_pre"' in page
    assert "&gt;&gt;&gt; " in page and "<blockquote>" not in page
    assert "usage: prereg doctor" in (SITE / "commands" / "doctor.html").read_text()
    assert 'src="images/flows.svg"' in (SITE / "architecture.html").read_text()
