# SPDX-License-Identifier: Apache-2.0
"""Units of work in processes of their own, and what stops them."""

from __future__ import annotations

import queue
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from prereg_kernels.demo.runs.workers import Interrupted, _follow, run_units


@dataclass
class Wait:
    """A unit that takes so long."""

    seconds: float

    @property
    def name(self) -> str:
        return f"{self.seconds} seconds"

    def directory(self, out: Path) -> Path:
        return out


def wait(unit: Wait, out: Path, report: Any, device: str) -> dict[str, Any]:
    time.sleep(unit.seconds)
    return {"mean_accuracy": 1.0}


class Finalized:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


class Interrupting(Console):
    """While it prints, a SIGINT comes in a finalizer, whose exceptions Python drops."""

    def print(self, *objects: Any, **options: Any) -> None:
        Finalized()
        super().print(*objects, **options)


@pytest.mark.parametrize("seconds", ((0, 3), (0,)), ids=("in the middle", "at the end"))
def test_a_signal_in_a_finalizer_stops_them(
    seconds: tuple[float, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"stopped; what was trained is in {tmp_path}"):
        run_units([Wait(x) for x in seconds], wait, tmp_path, ["cpu"], Interrupting())
    assert f"[1/{len(seconds)}] 0 seconds" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


class NoNews:
    def get(self, timeout: float) -> Any:
        raise queue.Empty


def test_a_signal_that_reaches_the_workers_first() -> None:
    """That they have stopped is then no failure of theirs."""
    stopped: Any = [SimpleNamespace(exitcode=130)]
    asked = iter((False, True, True))
    with pytest.raises(KeyboardInterrupt):
        _follow(NoNews(), stopped, 1, Console(), lambda: next(asked))
