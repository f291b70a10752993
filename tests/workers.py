# SPDX-License-Identifier: Apache-2.0
"""What pytest-xdist's workers share out: a module whose tests share a fixture goes to one of them.

Otherwise each worker sets such a fixture up for itself: models that train, 40 GiB on a GPU.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)  # where pytest-xdist is not, nobody asks
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "load":  # the default with -n
        return None
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, *_ = nodeid.split("::")
            return path if shares_a_fixture(config.rootpath / path) else nodeid

    return ByFixture(config, log)


@cache
def shares_a_fixture(module: Path) -> bool:
    """Whether the module has a fixture that lives as long as it."""
    return 'fixture(scope="module")' in module.read_text()
