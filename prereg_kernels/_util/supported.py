# SPDX-License-Identifier: Apache-2.0
"""The releases of transformers that the package takes.

Its Trainer calls private methods that PReTrainer overrides. A release that calls others would leave
the heads out of checkpoints without a word, so an unknown major one is refused at install.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import traceback
import warnings
from functools import cache

TRANSFORMERS = (4, 57), (6, 0)
"""The first release taken, and the first that is not."""
TRAINING = (5, 6)
"""The first tested release whose Trainer has all that the one of `prereg train` overrides."""
TESTED = ("4.57.6", "5.6.0", "5.16.1", "5.17.0", "5.24.0")
"""The releases that the tests run on: the oldest, the newest, and what trainers pin."""


def is_supported(version: str) -> bool:
    """Whether a release of transformers is within the bounds; of a name that is none, False."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    first, end = TRANSFORMERS
    return numbers is not None and first <= (int(numbers[1]), int(numbers[2])) < end


@cache
def check_transformers() -> None:
    """Warn, once, if the transformers that is loaded is out of bounds: pip can be told to."""
    version = getattr(sys.modules.get("transformers"), "__version__", None)
    if version is not None and not is_supported(version):
        warnings.warn(
            f"transformers: expected {bounds()}, got {version}; PRe overrides private methods of "
            "its Trainer, and others may not call them",
            stacklevel=3,
        )


def is_before(major: int) -> bool:
    """Whether the transformers that is loaded is older than this major release."""
    version = getattr(sys.modules.get("transformers"), "__version__", "")
    numbers = re.match(r"(\d+)\.", version)
    return numbers is not None and int(numbers[1]) < major


def install_torchvision() -> str:
    """How to get the build for the torch that is here, and not another torch."""
    torch = importlib.metadata.version("torch")
    if "+" in torch:  # an index of PyTorch's own, and so is torchvision's build for it
        return f"install it from where torch {torch} came from: https://pytorch.org/get-started"
    return f"pip install torchvision 'torch=={torch}'"


def too_old_to_train() -> str | None:
    """What to tell a user of `prereg train` whose transformers is; None: it is not, or missing."""
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) >= TRAINING:
        return None
    first = ".".join(map(str, TRAINING))
    return (
        f"transformers: `prereg train`, `assemble` and `evaluate` need {first} or newer, got "
        f"{version}; with an older one, train by PReTrainer or by another trainer"
    )


def bounds() -> str:
    """The bounds as pip writes them."""
    (major, minor), (end, _) = TRANSFORMERS
    return f">={major}.{minor},<{end}"


def absent(error: ImportError) -> str:
    """What could not be imported, with what was raised first.

    transformers says "Could not import module" of its own, whatever another package's import has
    raised, as torchvision's does beside another torch.
    """
    first = _first(error)
    return str(error) if first is error else f"{error}: {first}"


def not_imported(error: ImportError, needs: str) -> str:
    """What to tell of a failed import: what is missing, and what brings it; or what is broken.

    Args:
        needs: what brings what is missing. It does not mend a package that is there.
    """
    first = _first(error)
    if isinstance(first, ModuleNotFoundError) and first.name is not None:
        return f"{absent(error)}; {needs}"
    package = _package_of(first)
    if package is None:
        return absent(error)
    broken = f"{package} is here, but could not be imported: {first}"
    if package == "torchvision":
        return f"{broken}; it has to be a build for your torch: {install_torchvision()}"
    return broken


def _first(error: BaseException) -> BaseException:
    """What was raised first, of errors that were raised from it."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _package_of(error: BaseException) -> str | None:
    """Whose module was being imported as this was raised; of one of ours, None."""
    names = [
        str(frame.f_globals.get("__name__")).partition(".")[0]
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
    return names[-1] if names and names[-1] not in ("prereg_kernels", "__main__") else None
