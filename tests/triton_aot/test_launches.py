# SPDX-License-Identifier: Apache-2.0
"""Launches past Triton's own way run the kernels, with the arguments, that Triton would."""

from __future__ import annotations

from typing import Any

import pytest

from tests.triton_aot.test_aot import VERSIONS, run_with

# Left to Triton each time
LEFT = {"off 16 bytes", "beyond 32 bits"}
# Which Triton takes for the same as "float32": the rows are no reason for another kernel
SAME = {"other rows", "as many rows as 16", "one row"}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_kernel_is_tritons(version: str) -> None:
    found: dict[str, list[Any]] = run_with(version, "launches")
    assert found.pop("on another device") == [True]  # not launched, but for Triton to compile
    before, after = found.pop("with a hook")
    assert before["through_triton"] and not after["through_triton"]
    for case, (_, second, last, tritons) in found.items():
        for mine in (second, last):
            assert mine["through_triton"] == (case in LEFT), case
            for what in ("kernel", "grid", "stream", "values"):
                assert mine[what] == tritons[what], (case, what)
        assert tritons["through_triton"] and tritons["stream"] == 7
    kernels = {case: tritons["kernel"] for case, (*_, tritons) in found.items()}
    assert {case for case in found if kernels[case] == kernels["float32"]} == {"float32", *SAME}
    others = [kernel for case, kernel in kernels.items() if case not in SAME]
    assert len({*others}) == len(others) > 10
