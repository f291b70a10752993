# SPDX-License-Identifier: Apache-2.0
"""Runs parts one after the other within a budget of time; what fails or hangs takes no other along.

Each part is a process of its own, with an end of its own on the clock: the sum of the shares so
far. So a part that ends early leaves its time to the next, and one that hangs takes none from
those after it. After every part the run's own file and its log are written, whole.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common.report import Json, write_json
from prereg_kernels._util.files import write_whole

ROOT = Path(__file__).parents[2]
GRACE = 8.0  # seconds to end in, after an interrupt
LEAST = 2.0  # seconds: with less, a part does not start
LARGEST_FILE = 16 * 2**20
TAIL = 256 * 1024  # bytes of a part's output in the log


@dataclass(frozen=True)
class Part:
    """A process, and where its results go.

    Attributes:
        seconds: its share of the budget.
        command: gives Python's arguments, from the file to write and the seconds there are.
        kept: the name of its file, which the command writes whole; None: the file is JSON, and
            joins the run's own.
        renamed: the command writes its file bit by bit; it gets its name when the part has ended.
        environment: variables beside those of this process.
    """

    name: str
    seconds: float
    command: Callable[[Path, float], Sequence[str]]
    kept: str | None = None
    renamed: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """The parts of a run so far, and its files in `out`: NAME.json, NAME.log and the parts'."""

    name: str
    out: Path
    budget: float
    began: float = field(default_factory=time.monotonic)
    log: str = ""
    results: Json = field(default_factory=dict)

    def parts(self, parts: Sequence[Part]) -> bool:
        """Run all of them; whether every one was well."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.results = {"budget_s": self.budget, "complete": False, "parts": [], "results": {}}
        scale = (self.budget - GRACE) / sum(part.seconds for part in parts)
        end = self.began
        with tempfile.TemporaryDirectory() as scratch:
            for part in parts:
                end += scale * part.seconds
                self.part(part, end, Path(scratch))
                self.save()
        self.save(complete=True)
        return all(record["status"] == "ok" for record in self.results["parts"])

    def part(self, part: Part, end: float, scratch: Path) -> None:
        """One part, until `end` of time.monotonic at most."""
        began = time.monotonic()
        limit = end - began
        file = scratch / f"{part.name}.json"
        if part.kept is not None:
            folder = scratch if part.renamed else self.out
            file = folder / part.kept
        record: Json = {"name": part.name, "limit_s": round(limit, 1)}
        if limit < LEAST:
            status, output = "skipped: no time left", b""
        else:
            command = [sys.executable, *part.command(file, limit)]
            status, output = run_process(command, part.environment, limit)
        record |= {"status": status, "seconds": round(time.monotonic() - began, 1)}
        if part.kept is None:
            with suppress(OSError, ValueError):  # it has written nothing
                self.results["results"][part.name] = json.loads(file.read_text())
        elif part.renamed and file.is_file():
            write_whole(self.out / part.kept, file.read_bytes())
        if part.kept is not None:
            record["file"] = self.keep(self.out / part.kept)
        self.results["parts"].append(record)
        line = f"{part.name}: {status}, {record['seconds']} s of {record['limit_s']}"
        print(f"{self.name}: {line}", flush=True)
        text = output[-TAIL:].decode(errors="replace")
        self.log += f"== {line}\n{text}\n"
        if status != "ok":
            print("\n".join(text.splitlines()[-15:]), flush=True)

    def keep(self, path: Path) -> str:
        """What became of a part's file."""
        if not path.is_file():
            return "was not written"
        size = path.stat().st_size
        if size > LARGEST_FILE:
            path.unlink()
            return f"left out: {size} bytes"
        return path.name

    def save(self, complete: bool = False) -> None:
        """The run's own two files."""
        seconds = round(time.monotonic() - self.began, 1)
        self.results |= {"complete": complete, "seconds": seconds}
        write_json(self.results, self.out / f"{self.name}.json")
        write_whole(self.out / f"{self.name}.log", self.log)


def run_process(
    command: Sequence[str], environment: Mapping[str, str], limit: float
) -> tuple[str, bytes]:
    """How it ended, and what it printed: "ok", "failed: exit code 1" or "stopped after 3 s"."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths, **environment}, start_new_session=True,
            # in the background of a shell an interrupt would be ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            code = process.wait(limit)
            status = "ok" if code == 0 else f"failed: exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
            _signal(process, signal.SIGINT)  # pytest and our programs write their files then
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            _signal(process, signal.SIGKILL)  # and what it started
            process.wait()
        output.seek(0)
        return status, output.read()


def _signal(process: subprocess.Popen[bytes], what: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, what)
