# SPDX-License-Identifier: Apache-2.0
"""The host's time of a call: whose launches do nothing, and what its table says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import host
from benchmarks.compare import BASE, ROOT, THIS, Program, Worker, ratio_of, started

TRITON = ROOT / ".triton" / "3.9.0"
PARTS = {"arguments", "op", "chunks", "launches", "autograd"}


def test_a_worker_times_a_call_and_its_parts() -> None:
    """In thread time, which is above nothing; the parts are those that the table names."""
    assert TRITON.is_dir(), f"no Triton in {TRITON}: make test installs it"
    worker = Worker(ROOT, Program(host.WORKER, (TRITON,)))
    try:
        worker.check()
        one, two = (host.HostCell("tap", chunks, 576, 4, "float32") for chunks in (1, 2))
        for cell in (one, two):
            times = worker.batch(cell, 20)
            assert len(times) == 20 and min(times) > 0
        question = '{"parts": ["tap", %d, 576, 4, "float32"], "calls": 50}'
        of_one, of_two = (worker.ask(question % cell.chunks) for cell in (one, two))
    finally:
        worker.end()
    assert of_one.keys() == of_two.keys() == PARTS and min(of_one.values()) > 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no CPU can be chosen here")
def test_workers_share_a_cpu() -> None:
    """As two CPUs may have neighbours that are not equally busy."""
    with started({THIS: ROOT, BASE: ROOT}) as workers:
        cpus = [os.sched_getaffinity(worker.process.pid) for worker in workers.values()]
    assert cpus[0] == cpus[1] and len(cpus[0]) == 1


def test_a_heap_keeps_its_pages() -> None:
    """Or a call's time is that of the pages that the one before has given back."""
    with started({THIS: ROOT}) as workers:
        environment = Path(f"/proc/{workers[THIS].process.pid}/environ").read_bytes()
    assert b"MALLOC_TRIM_THRESHOLD_=4294967296" in environment.split(b"\0")


def test_the_fastest_call_of_a_batch_counts() -> None:
    turns = [{THIS: [900, 500, 700], BASE: [1000, 1900]}]
    assert host.fastest([turns]) == [[{THIS: [500], BASE: [1000]}]]
    assert ratio_of(host.fastest([turns])[0]) == 0.5


def test_options_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--pairs", "1"], "--pairs 1: an interval takes 2 at least"),
        ([], "Triton: expected on PYTHONPATH"),
    ):
        with pytest.raises(SystemExit):
            host.parse([str(tmp_path), *arguments])
        assert message in capsys.readouterr().err
