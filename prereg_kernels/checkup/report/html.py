# SPDX-License-Identifier: Apache-2.0
"""Pages of one file that need no network: light and dark, everything from outside escaped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from prereg_kernels._util.files import printable, write_whole
from prereg_kernels.checkup.report.style import THEMES


def write_html(path: Path, package: str, values: Mapping[str, Any]) -> None:
    """Fill in a package's template of the file's name, which extends `base.html` beside this."""
    packages = (package, __package__)
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, ".") for name in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(themes=THEMES, variables=_variables)
    write_whole(path, environment.get_template(path.name).render(values))


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())
