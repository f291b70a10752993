"""Settings of every test: one thread, and the same generated examples on every run."""

from __future__ import annotations

import importlib.util

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
