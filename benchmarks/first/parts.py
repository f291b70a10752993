# SPDX-License-Identifier: Apache-2.0
"""The parts of the two runs, in the order of what answers most, each with its seconds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.first.runner import Part

FIRST_SECONDS, SECOND_SECONDS = 540.0, 185.0  # without the start of Python
START = 12.0  # seconds that a program's imports may take, and its end
WORKERS = 8
# Variants of a step ask for blocks of other sizes: a cache in pieces would be freed within a step.
SEGMENTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}

Command = Callable[[Path, float], Sequence[str]]


def first(size: str, out: Path) -> tuple[Part, ...]:
    """The run of nine minutes: with `out`, where the profile's trace goes."""
    return (
        Part("ceilings", 25, program("benchmarks.first.ceilings", size)),
        Part("tests", 60, tests("first", size), "first_tests.xml", renamed=True),
        Part(
            "profile",
            35,
            program("benchmarks.first.tap_profile", size, "--trace", f"{out}/first_trace.json.gz"),
        ),
        Part("forms", 30, program("benchmarks.first.forms", size)),
        Part("chunks", 40, program("benchmarks.first.chunks", size)),
        Part("loss", 105, program("benchmarks.loss.gpu", size, "--no-compile"), "gpu.json"),
        Part("accuracy", 50, program("benchmarks.loss.accuracy", size), "gpu_accuracy.json"),
        step("llava", size, 155),
        Part("more tests", 40, tests("not first", size), "first_more_tests.xml", renamed=True),
    )


def second(size: str, what: str) -> tuple[Part, ...]:
    """The run of three minutes: the compiled peers, or the step of the other model."""
    if what == "qwen":
        return (step("qwen", size, SECOND_SECONDS),)
    command = program("benchmarks.loss.gpu", size, "--only-compile")
    return (Part("compiled peers", SECOND_SECONDS, command, "gpu_compiled.json"),)


def step(model: str, size: str, seconds: float) -> Part:
    """A 7B training step."""
    command = program("benchmarks.step.gpu", size, "--model", model)
    return Part(f"step {model}", seconds, command, f"gpu_step_{model}.json", environment=SEGMENTS)


def program(module: str, size: str, *more: str) -> Command:
    """A program of ours, which stops by itself before its time is over."""

    def command(file: Path, seconds: float) -> Sequence[str]:
        own = max(1.0, seconds - min(START, seconds / 2))
        options = ["--out", str(file), "--size", size, "--seconds", f"{own:.0f}"]
        return ["-m", module, *options, *more]

    return command


def tests(marked: str, size: str) -> Command:
    """The tests of tests/gpu with this mark: on several workers, where pytest can."""
    several = size == "full" and importlib.util.find_spec("xdist") is not None

    def command(file: Path, seconds: float) -> Sequence[str]:
        workers = ["-n", str(WORKERS)] if several else []
        return ["-m", "pytest", "tests/gpu", "-m", marked, "--junitxml", str(file), *workers]

    return command
