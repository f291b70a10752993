"""What the GPU benchmarks' command lines share: options, and an end that says what there is."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import torch


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


def run_until_stopped(run: Callable[[], None], problems: list[str]) -> bool:
    """Whether `run` came to its end; SIGTERM, as from `timeout`, or an interrupt stops it."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        run()
        return True
    except KeyboardInterrupt:
        problems.append("stopped from outside")
        return False
    finally:
        signal.signal(signal.SIGTERM, previous)
