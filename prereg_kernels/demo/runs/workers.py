# SPDX-License-Identifier: Apache-2.0
"""Runs units of work in parallel processes, one thread each, and shows how they do."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import queue
import statistics
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from prereg_kernels.demo.config import TRAINED
from prereg_kernels.demo.loop import TrainingInterrupted
from prereg_kernels.demo.metrics import METRICS_FILE
from prereg_kernels.demo.runs.interrupts import deferred_signals, sigint_ignored
from prereg_kernels.demo.runs.runs import ERROR_FILE, Report


class Unit(Protocol):
    """One run with all that is measured on it, an experiment's or a sweep's."""

    @property
    def name(self) -> str:
        """For people."""

    def directory(self, out: Path) -> Path:
        """Where its files are."""


Run = Callable[[Any, Path, Report, str], dict[str, Any]]
"""Does a unit in a directory, reporting its phases, on a device, or reads what is finished there.
It is pickled."""

_INTERRUPTED = 130  # exit code of a worker that a signal stopped


class UnitError(RuntimeError):
    """A unit raised; the message has its name and its error, the log file the traceback."""


class Interrupted(Exception):  # noqa: N818 - not an error: the user asked for it
    """SIGINT or SIGTERM: every worker was asked to save and stop."""


def run_units(
    todo: Sequence[Unit],
    run: Run,
    out: Path,
    devices: Sequence[str],
    console: Console,
    *,
    finished: bool = False,
) -> None:
    """Run all units; those that are finished already are not run again.

    Args:
        devices: of each worker.
        finished: all of them are, so that their results are read here, and no worker is started.

    Raises:
        UnitError: one of them raised; the others were stopped and can be resumed.
        Interrupted: on a signal.
    """
    if finished:
        for number, unit in enumerate(todo, 1):
            result = run(unit, out, lambda *_: None, devices[0])
            _print_done(console, number, len(todo), unit, summary(result))
        return
    context = multiprocessing.get_context("spawn")
    work, news = context.Queue(), context.Queue()
    for unit in todo:
        work.put(unit)
    with _one_thread_each(), sigint_ignored():  # the parent decides, and sends SIGTERM
        processes = [
            context.Process(target=_worker, args=(run, out, device, work, news), daemon=True)
            for device in devices[: len(todo)]
        ]
        for process in processes:
            work.put(None)
            process.start()
    try:
        with deferred_signals() as interrupted:  # raised anywhere, it might get lost in a __del__
            _follow(news, processes, len(todo), console, interrupted)
    except BaseException as error:
        for process in processes:
            if process.is_alive():
                process.terminate()  # SIGTERM: a training loop saves first
        for process in processes:
            process.join(timeout=60)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(
                f"stopped; what was trained is in {out}; run again to resume"
            ) from None
        raise


def _follow(
    news: Any,
    processes: Sequence[BaseProcess],
    count: int,
    console: Console,
    interrupted: Callable[[], bool],
) -> None:
    """Show progress until all units are done.

    Raises:
        KeyboardInterrupt: `interrupted`, which is asked at least twice a second.
        UnitError: a unit raised, or a worker stopped early.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    done = 0
    with Progress(*columns, TextColumn("{task.fields[losses]}"), console=console) as progress:
        total = progress.add_task("runs", total=count, losses="")
        shown: dict[int, tuple[TaskID, Path]] = {}  # per worker: its bar and the run it is on
        while True:
            if interrupted():
                raise KeyboardInterrupt
            if done == count:
                return
            try:
                kind, worker, unit, *rest = news.get(timeout=0.5)
            except queue.Empty:
                for task, directory in shown.values():
                    step, losses = _last_step(directory)
                    progress.update(task, completed=step, losses=losses)
                codes = [process.exitcode for process in processes]
                early = any(codes) or None not in codes  # one failed, or all left work undone
                if early and not interrupted():  # a signal to the group reaches workers first
                    raise UnitError(
                        f"a worker stopped early (exit codes {codes}); run again to resume"
                    ) from None
                continue
            if worker in shown:
                progress.remove_task(shown.pop(worker)[0])
            if kind == "phase":
                phase, directory, steps = rest
                task = progress.add_task(f"{unit.name}: {phase}", total=steps or None, losses="")
                shown[worker] = task, directory
            elif kind == "failed":
                raise UnitError(f"{unit.name}: {rest[0]}")
            else:
                done += 1
                progress.update(total, completed=done)
                _print_done(progress.console, done, count, unit, rest[0])


def _print_done(console: Console, done: int, count: int, unit: Unit, text: str) -> None:
    console.print(f"[{done}/{count}] {unit.name}: {text}", highlight=False)


def _last_step(directory: Path) -> tuple[int, str]:
    """The last step in a run's metrics, and both losses there."""
    try:
        with (directory / METRICS_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
            line = file.read().decode().rsplit("\n", 2)[-2]
        values = json.loads(line)
    except (OSError, IndexError, ValueError):  # not there yet, or half a line
        return 0, ""
    losses = f"LM {values['lm_loss']:.3f}"
    return values["step"], losses + (
        f"  PRe {values['pre_loss']:+.3f}" if "pre_loss" in values else ""
    )


def _worker(run: Run, out: Path, device: str, work: Any, news: Any) -> None:
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    me = os.getpid()
    while (unit := work.get()) is not None:
        try:
            result = run(
                unit, out, lambda *phase, unit=unit: news.put(("phase", me, unit, *phase)), device
            )
        except TrainingInterrupted:
            sys.exit(_INTERRUPTED)
        except Exception as error:
            log = unit.directory(out) / ERROR_FILE
            with contextlib.suppress(OSError):  # the disk may be what failed
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_text(traceback.format_exc(), encoding="utf-8")
            news.put(("failed", me, unit, f"{type(error).__name__}: {error} (see {log})"))
            return
        news.put(("done", me, unit, summary(result)))


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers; the run is left as by a kill of its own."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(_INTERRUPTED)


def summary(result: dict[str, Any]) -> str:
    """A finished unit in a line."""
    learned = []
    for frozen, by_scenes in result.get("transfer", {}).items():
        for scenes, found in by_scenes.items():
            share = statistics.fmean(answers["accuracy"] for answers in found.values())
            count = f"from {scenes} scenes, " if len(by_scenes) > 1 else ""
            learned.append(f"{share:.1%} ({count}{TRAINED[frozen]})")
    new = f"; new ones {', '.join(learned)}" if learned else ""
    return f"questions {result['mean_accuracy']:.1%}{new}"


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started inside compute with one thread, and do not spin while they wait."""
    wanted = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MKL_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
