# SPDX-License-Identifier: Apache-2.0
"""The libraries of the C++ kernels: where they are, whether they run here, and why not."""

from __future__ import annotations

import os
import platform
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from prereg_kernels._util import private
from prereg_kernels.ops.backends.cpp_build import (
    BuildError,
    digest,
    find_compiler,
    library,
    read_record,
)

PACKAGE = Path(__file__).parents[2]
# A checkout has the sources beside the package, which ships them otherwise
IS_CHECKOUT = not (PACKAGE / "csrc").is_dir()
CSRC = PACKAGE.parent / "csrc" if IS_CHECKOUT else PACKAGE / "csrc"
# By what torch has found out for its own kernels, which are compiled with the same flags
RUNNABLE = {"AVX512": ("avx512", "avx2", "base"), "AVX2": ("avx2", "base")}


@dataclass(frozen=True)
class Libraries:
    """The libraries that a build has left in a directory, and whether they run here.

    variants: those that this CPU can run, the fastest first. reason: why none runs, in one line;
    None: the first does. is_stale: `prereg build` would make others.
    """

    folder: Path
    record: dict[str, Any]
    variants: list[str]
    reason: str | None = None
    is_stale: bool = False


@cache
def find_libraries() -> Libraries:
    """The installation's libraries if they run here, otherwise those of `prereg build`."""
    installed = _look_into(PACKAGE)
    if installed.reason is None:
        return installed
    cached = _look_into(_cache_folder())
    return cached if cached.record else installed


@cache
def load(folder: Path, variant: str) -> None:
    """Register the variant's ops, as `torch.ops.prereg_rows_<variant>`."""
    torch.ops.load_library(str(folder / library(variant)))


def describe() -> dict[str, Any]:
    """The variant in use, those built, why others were not, what built them, and where they are."""
    libraries = find_libraries()
    record = libraries.record
    return {
        "variant": libraries.variants[0] if libraries.reason is None else None,
        "built": record.get("variants", []),
        "not built": record.get("failed", {}),
        "compiler": record.get("compiler"),
        "torch": record.get("torch"),
        "from": str(libraries.folder) if record else None,
    }


def runnable_variants() -> list[str]:
    """The variants that are built and that this CPU can run, the fastest first."""
    return find_libraries().variants


def build_folders() -> tuple[Path, Path]:
    """Where `prereg build` puts the libraries, and ninja's directory.

    In a checkout they are setup.py's own. Installed files are left alone: there the libraries go to
    the cache, into torch's directory of extensions.
    """
    if IS_CHECKOUT and os.access(PACKAGE, os.W_OK):
        return PACKAGE, PACKAGE.parent / "build" / "rows"
    folder = _cache_folder()
    return folder, folder / "build"


def warn_if_not_built() -> None:
    """Warn if these kernels do not run, but could be built."""
    libraries = find_libraries()
    if not libraries.is_stale:
        return
    try:
        find_compiler()
    except BuildError:
        return
    warnings.warn(
        f"PRe runs without its C++ kernels on this CPU, and is slower: {libraries.reason}",
        stacklevel=2,
    )


def _look_into(folder: Path) -> Libraries:
    record = read_record(folder)
    variants = [name for name in _runnable() if name in record.get("variants", [])]
    failed = "; ".join(dict.fromkeys(record.get("failed", {}).values()))
    reason = None
    is_stale = True
    if "torch" not in record:
        reason = f"not built: {failed}" if failed else "not built"
    elif _release(record["torch"]) != _release(torch.__version__):
        reason = f"built against torch {record['torch']}, this is {torch.__version__}"
    elif CSRC.is_dir() and digest(CSRC) != record["sources"]:
        reason = "built from other sources than csrc/"
    elif not variants:
        reason, is_stale = f"not built: {failed}", False
    else:
        try:
            load(folder, variants[0])
        except OSError as error:
            reason = f"its library does not load: {error.__cause__ or error}"
    if reason is None:
        return Libraries(folder, record, variants)
    remedy = ": run `prereg build`" if is_stale else ""
    return Libraries(folder, record, variants, f"{reason}{remedy}", is_stale)


def _runnable() -> tuple[str, ...]:
    """The variants for this CPU, the fastest first."""
    runnable = RUNNABLE.get(torch.backends.cpu.get_cpu_capability(), ("base",))
    if "avx512" in runnable and private.has_avx512_bf16():
        return ("avx512_bf16", *runnable)
    return runnable


def _cache_folder() -> Path:
    """A directory for each of what the libraries depend on."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR") or f"{cache_home}/torch_extensions"
    built_for = (digest(CSRC)[:16], f"torch-{_release(torch.__version__)}", platform.machine())
    return Path(extensions, "prereg_kernels", "-".join(built_for))


def _release(version: str) -> str:
    """The version without its local part: +cpu and +cu130 builds have the same CPU interface."""
    return version.partition("+")[0]
