# SPDX-License-Identifier: Apache-2.0
"""What the programs share: options, results kept whole, failures that stay where they happen, and
an end that says what there is.
"""

from __future__ import annotations

import argparse
import gc
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.common.report import Json, write_json
from benchmarks.common.timing import Clock, OverBudgetError, describe_error, make_clock
from prereg_kernels._util.machine import describe_machine


def make_parser(documentation: str, seconds: float) -> argparse.ArgumentParser:
    """A parser with `--out`, `--size`, `--device`, `--seconds` and `--commit`."""
    parser = argparse.ArgumentParser(description=documentation.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--device", help="default: cuda; with --size tiny cpu")
    parser.add_argument("--seconds", type=float, default=seconds, help="after which to stop")
    parser.add_argument("--commit", help="of the source, where git cannot say; -dirty at the end")
    return parser


def parse_device(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """The options, with `device` filled in; ends the program where there is no such device."""
    options = parser.parse_args(arguments)
    if options.device is None:
        options.device = "cpu" if options.size == "tiny" else "cuda"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; --size tiny exercises the code on the CPU")
    return options


@dataclass
class Session:
    """What the parts of a run share: the device, the time that is left, and what went wrong."""

    clock: Clock
    deadline: float  # of time.monotonic
    patience: float = 1.0  # times what a peer's first call may take
    problems: list[str] = field(default_factory=list)
    ours_failed: bool = False
    checked: set[tuple[object, ...]] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        return self.clock.device

    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def failed(self, what: str, reason: str, ours: bool) -> None:
        self.problems.append(f"{what}: {reason}")
        self.ours_failed |= ours

    def attempt(self, what: str, action: Callable[[], None], ours: bool = True) -> None:
        """Record what fails, or does not fit into the time any more, and go on."""
        try:
            if self.remaining() <= 0:
                raise OverBudgetError("skipped, no time left")
            action()
        except OverBudgetError as error:
            self.failed(what, str(error), ours=False)
        except Exception as error:
            self.failed(what, describe_error(error), ours)
        finally:
            self.free()

    def free(self) -> None:
        """Give back what the last part held."""
        gc.collect()
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # after an illegal access every call raises
                torch.cuda.empty_cache()


class Program:
    """A run: its results so far, and the file they are kept in.

    Args:
        options: of `parse_device`.
        clock: what times the run.
        parts: the results' own entries, as they are before anything is measured.
    """

    def __init__(self, options: argparse.Namespace, clock: Clock, **parts: Any) -> None:
        self.options, self.began = options, time.monotonic()
        self.session = Session(clock, self.began + options.seconds)
        self.results: Json = {
            "machine": describe_machine(torch.device(options.device), options.commit),
            "options": {key: str(value) for key, value in vars(options).items()},
            "complete": False,
            **parts,
            "problems": self.session.problems,
        }

    def run(self) -> None:
        """Everything, the most important first."""
        raise NotImplementedError

    def conclusions(self) -> Json:
        """Entries that follow from the results so far."""
        return {}

    def save(self, complete: bool = False) -> None:
        """Write the file, whole."""
        self.results |= {"complete": complete, "seconds": time.monotonic() - self.began}
        self.results |= self.conclusions()
        write_json(self.results, self.options.out)

    def run_and_save(self) -> bool:
        """Whether `run` came to its end; SIGTERM, as from `timeout`, or an interrupt stops it."""

        def stop(signal_number: int, frame: FrameType | None) -> None:
            raise KeyboardInterrupt

        previous = signal.signal(signal.SIGTERM, stop)
        complete = False
        try:
            self.run()
            complete = True
        except KeyboardInterrupt:
            self.session.problems.append("stopped from outside")
        finally:
            signal.signal(signal.SIGTERM, previous)
        self.save(complete)
        return complete


def run_program(
    kind: Callable[[argparse.Namespace, Clock], Program],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    show: Callable[[Json], str] | None = None,
) -> int:
    """Run it with these options and print what it shows and its problems; the exit code."""
    options = parse_device(parser, arguments)
    program = kind(options, make_clock(torch.device(options.device)))
    complete = program.run_and_save()
    if show is not None:
        print(show(program.results))
    print("".join(f"problem: {problem}\n" for problem in program.session.problems), end="")
    return int(program.session.ours_failed or not complete)
