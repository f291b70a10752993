"""Settings of every test: one thread, and the same generated examples on every run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

if importlib.util.find_spec("hypothesis"):  # tests/gpu runs where only torch and pytest are
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "repeatable",
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("repeatable")


@pytest.fixture
def fill_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and every file gets half of its content, then an error."""
    write = Path.write_bytes

    def write_half(self: Path, content: bytes) -> int:
        write(self, content[: len(content) // 2])
        raise OSError("No space left on device")

    return lambda: monkeypatch.setattr(Path, "write_bytes", write_half)
