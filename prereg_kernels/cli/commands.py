# SPDX-License-Identifier: Apache-2.0
"""The command line: `prereg train`, `demo`, `sweep`, `checkup`, `estimate`, `doctor`, `build`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from prereg_kernels._util.flags import settings_apart
from prereg_kernels._util.supported import not_imported, too_old_to_train
from prereg_kernels.cli import estimate
from prereg_kernels.cli.ending import fail, reader_left, warn_in_a_line
from prereg_kernels.cli.launch import COMMANDS, SWIFT_PLUGIN, prepare
from prereg_kernels.cli.parser import OLD_NAME, make_parser

_TRAINING_NEEDS = "training needs: pip install 'prereg-kernels[train]'"


def main() -> None:
    """Run the command; errors are one line on standard error, exit code 2 (130: stopped)."""
    parser = make_parser()
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        _launch(sys.argv[1], sys.argv[2:])
        return
    if sys.argv[1:2] == ["train"] and "--preset" in sys.argv:  # as in version 0.1
        parser.error("--preset: the digits are another command: prereg demo --preset scenes")
    own, settings = sys.argv[1:], list[str]()
    if own[:1] == ["train"]:
        own, settings = settings_apart(own)
    arguments, flags = parser.parse_known_args(own or ["--help"])
    flags = settings + flags
    if flags and arguments.command not in ("train", "demo", "sweep"):
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    if arguments.command == "doctor":
        _doctor(arguments)
        return
    if arguments.command == "build":
        _build()
        return
    if arguments.command == "swift-plugin":
        print(SWIFT_PLUGIN)
        return
    if arguments.command in ("checkup", OLD_NAME):
        _checkup(arguments)
        return
    if arguments.command == "estimate":
        _guarded(lambda: estimate.run(arguments), "stopped")
        return
    if arguments.command in ("train", "assemble", "evaluate"):
        _train(arguments, flags)
        return
    try:
        from rich.console import Console

        from prereg_kernels.cli.demo import demo, sweep
        from prereg_kernels.demo.checkpoints.checkpoint import CheckpointError
        from prereg_kernels.demo.loop import TrainingInterrupted
        from prereg_kernels.demo.runs.workers import Interrupted, UnitError
    except ModuleNotFoundError as error:
        fail(not_imported(error, _TRAINING_NEEDS))

    warnings.showwarning = warn_in_a_line(warnings.showwarning)
    try:
        console = Console()
        command = {"demo": demo, "sweep": sweep}[arguments.command]
        command(arguments, flags, console if console.is_terminal else Console(width=120))
        sys.stdout.flush()
    except BrokenPipeError:
        reader_left("" if arguments.settings else "stopped, as nobody reads what it prints")
    except (Interrupted, TrainingInterrupted, KeyboardInterrupt) as stop:
        fail(str(stop) or "stopped", 130)
    except (ValueError, TypeError, OSError, CheckpointError, UnitError) as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        fail(f"out of memory: {error}")


def _train(arguments: argparse.Namespace, flags: list[str]) -> None:
    if reason := too_old_to_train():
        fail(reason)
    try:
        from prereg_kernels.cli.train import STOPPED, run
    except ModuleNotFoundError as error:
        fail(not_imported(error, _TRAINING_NEEDS))
    warnings.showwarning = warn_in_a_line(warnings.showwarning)
    try:
        run(arguments, flags)
        sys.stdout.flush()
    except BrokenPipeError:
        is_list = getattr(arguments, "dry_run", False)
        reader_left("" if is_list else "stopped, as nobody reads what it prints")
    except (KeyboardInterrupt, *STOPPED) as stop:
        fail(str(stop) or "stopped; run again to go on from the last checkpoint", 130)
    except (ValueError, TypeError, OSError, ImportError) as error:  # of what a setting asks for
        fail(" ".join(str(error).split()) if isinstance(error, ImportError) else str(error))


def _launch(name: str, arguments: Sequence[str]) -> None:
    try:
        start = prepare(name, arguments)
    except ValueError as error:
        fail(str(error))
    start()  # with errors of its own


def _checkup(arguments: argparse.Namespace) -> None:
    try:
        from rich.console import Console

        from prereg_kernels.cli.checkup import run
    except ModuleNotFoundError as error:
        fail(not_imported(error, "checkup needs: pip install 'prereg-kernels[checkup]'"))
    try:
        # what is printed has names from outside in it: no markup, no emoji by their names
        width = None if Console().is_terminal else 120
        run(arguments, Console(width=width, markup=False, emoji=False))
    except KeyboardInterrupt:
        fail(f"stopped; what was measured is in {arguments.out}; run again to go on", 130)
    except (ValueError, OSError) as error:
        fail(str(error))


def _doctor(arguments: argparse.Namespace) -> None:
    from prereg_kernels.cli.doctor import doctor

    if arguments.model is None:
        _guarded(lambda: doctor(arguments.json), "stopped")
        return
    try:
        from prereg_kernels.cli.doctor_model import doctor_model
    except ModuleNotFoundError as error:
        fail(not_imported(error, "a model needs: pip install 'prereg-kernels[checkup]'"))
    works = _guarded(lambda: doctor_model(arguments.model, arguments.json), "stopped")
    sys.exit(works is False)


def _build() -> None:
    from prereg_kernels.cli.build import build_libraries

    _guarded(lambda: print(build_libraries()), "stopped; run again to go on")


def _guarded(action: Callable[[], Any], stopped: str) -> Any:
    """What the action returns; None where nobody reads to the end what it prints."""
    try:
        result = action()
        sys.stdout.flush()
        return result
    except BrokenPipeError:
        reader_left()
    except KeyboardInterrupt:
        fail(stopped, 130)
    except (ValueError, OSError) as error:
        fail(str(error))
