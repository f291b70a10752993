# SPDX-License-Identifier: Apache-2.0
"""What the site has beside docs/: pages from the top of the tree, of commands and of the API.

Links are written for a checkout and for GitHub. Those that lead out of the site's pages go to the
repository, which SITE_REPOSITORY names.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
import sys
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

from prereg_kernels.cli.commands import main
from prereg_kernels.cli.launch import COMMANDS

ROOT = Path(__file__).parents[2]
REPOSITORY = os.environ.get("SITE_REPOSITORY", "https://github.com/OWNER/prereg_kernels")
# {file: page}; the other pages are those of docs/, under the same names
TOP = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
# {page: its title, the modules whose public names it has, the part that these names are of}
API = {
    "loss": ("The loss", ("prereg_kernels", "prereg_kernels.ops"), "ops"),
    "models": ("On a model", ("prereg_kernels",), "attach"),
    "trainers": ("In a trainer", ("prereg_kernels.trainers",), "trainers"),
    "checkup": ("The checkup", ("prereg_kernels.checkup",), "checkup"),
}
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)


def page_of(file: str) -> str | None:
    """The page that a file of the repository becomes, from the top of the site; None: none."""
    if file in TOP:
        return TOP[file]
    inside = file.removeprefix("docs/")
    is_page = inside != file and (file.endswith(".md") or inside.startswith("images/"))
    return inside if is_page else None


def link_from(file: str, link: str) -> str:
    """A link of a file, as its page has it."""
    target, mark, heading = link.partition("#")
    if "://" in target or not target:
        return link
    path = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
    here, page = page_of(file), page_of(path)
    assert here is not None, file
    if page is None:
        return f"{REPOSITORY}/blob/main/{path}{mark}{heading}"
    return posixpath.relpath(page, posixpath.dirname(here) or ".") + mark + heading


def relink(file: str, text: str) -> str:
    """A file's text with the links of its page. What is in code is no link."""
    parts = CODE.split(text)
    for at in range(0, len(parts), 2):
        parts[at] = LINK.sub(lambda m: m[1] + link_from(file, m[2]) + m[3], parts[at])
    return "".join(parts)


def help_of(*arguments: str) -> str:
    """What `prereg ... --help` prints."""
    output = io.StringIO()
    with (
        redirect_stdout(output),
        suppress(SystemExit),
        mock.patch.object(sys, "argv", ["prereg", *arguments, "--help"]),
        mock.patch.dict(os.environ, {"COLUMNS": "82", "NO_COLOR": "1"}),
    ):
        main()
    return output.getvalue()


def command_pages() -> dict[str, str]:
    """{page: its text}. Those of COMMANDS have options of somebody else's."""
    listed = help_of()
    names = re.findall(r"^    ([a-z-]+) ", listed, re.M)
    helps = {name: help_of(name) for name in names if name not in COMMANDS}
    texts = {name: f"# prereg {name}\n\n```text\n{text}```\n" for name, text in helps.items()}
    every = f"# The commands\n\n```text\n{listed}```\n"
    return {f"commands/{name}.md": text for name, text in {"index": every, **texts}.items()}


def names_of(modules: tuple[str, ...], part: str) -> list[str]:
    """The public names of modules that a part defines, old spellings aside, and where each is."""
    found = {}
    for module in map(import_module, modules):
        for name in module.__all__:
            value = getattr(module, name)
            home = getattr(value, "__module__", "")
            if home.startswith(f"prereg_kernels.{part}.") and value.__name__ == name:
                found[name] = f"{home}.{name}"
    return list(found.values())


def api_pages() -> dict[str, str]:
    """{page: its text}."""
    found = {}
    for page, (title, modules, part) in API.items():
        entries = "\n".join(f"::: {name}\n" for name in names_of(modules, part))
        found[f"reference/{page}.md"] = f"# {title}\n\n{entries}"
    return found


def on_config(config: Any) -> None:
    """Add the pages to the table of contents."""
    commands, api = list(command_pages()), list(api_pages())
    config.nav[-1:-1] = [{"Commands": commands}, {"API": api}]


def on_files(files: Any, config: Any) -> None:
    """Add the pages."""
    from mkdocs.structure.files import File

    texts = {page: relink(file, (ROOT / file).read_text()) for file, page in TOP.items()}
    for page, text in {**texts, **command_pages(), **api_pages()}.items():
        files.append(File.generated(config, page, content=text))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str | None:
    """The links of the pages that lie in docs/."""
    is_generated = page.file.generated_by is not None
    return None if is_generated else relink(f"docs/{page.file.src_uri}", markdown)
