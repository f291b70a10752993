# SPDX-License-Identifier: Apache-2.0
"""What each rank of somebody's trainer runs; then comes a name of `launch.COMMANDS`, and arguments.

It is started by its path, because `-m` looks for this package in the working directory first. In a
checkout's folder that would be the checkout's source, and not the package that started the ranks.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

PACKAGE, FOLDER = "prereg_kernels", os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def take_package() -> None:
    """Import the package that this file is of, wherever else there is one."""
    spec = PathFinder.find_spec(PACKAGE, [os.path.dirname(FOLDER)])
    assert spec is not None and spec.loader is not None
    package = sys.modules[PACKAGE] = module_from_spec(spec)
    spec.loader.exec_module(package)


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):  # new in Python 3.11
        # As with `-m`: users' own modules, such as rewards of TRL's, are there
        sys.path[0] = os.getcwd()
    take_package()
    from prereg_kernels.cli.launch import run_rank

    run_rank(*sys.argv[1:])
elif __name__ == "__mp_main__":  # in a process that a rank spawns, such as a loader of data
    take_package()
