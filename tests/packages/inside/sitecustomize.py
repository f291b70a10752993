# SPDX-License-Identifier: Apache-2.0
"""In every process of a trainer: its steps are written down (`recorder`), in RECORDED's folder.

Python imports this by itself, as its folder is on PYTHONPATH. What trainers start by torchrun, by
accelerate or by themselves has it as well.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType


class _AfterTrainer(importlib.abc.MetaPathFinder):
    """Calls `recorder.install` when transformers' module of Trainer has run."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != "transformers.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_install(module: ModuleType) -> None:
            run(module)
            import recorder

            recorder.install(module)

        spec.loader.exec_module = run_and_install
        return spec


if "RECORDED" in os.environ:
    sys.meta_path.insert(0, _AfterTrainer())
