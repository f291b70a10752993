# SPDX-License-Identifier: Apache-2.0
"""What is sent, counted by hand."""

from __future__ import annotations

import pytest

from prereg_kernels.estimate import shipped
from prereg_kernels.estimate.communication import sent
from prereg_kernels.estimate.devices import DEVICES
from prereg_kernels.estimate.head import head_of
from prereg_kernels.estimate.settings import Settings

WEIGHTS, TRAINED = 7_063_427_072, 7_063_427_072 - 303_507_456  # of LLaVA; CLIP is frozen
HEAD = 2 * (4096**2 + 4096)


def found(**settings: object) -> dict[str, tuple[float, float, int]]:
    asked = Settings(**settings)  # type: ignore[arg-type]
    structure = shipped.structure_of("llava-1.5-7b", ("projector", "llm"))
    head = head_of(structure, asked, 576, 80e9)
    return {x.kind: (x.bytes, x.pre, x.group) for x in sent(structure, asked, 576, head)}


def test_one_gpu() -> None:
    assert found() == {}


def test_ddp() -> None:
    [(bytes_, pre, group)] = found(gpus=64).values()
    assert (bytes_, pre, group) == pytest.approx(
        (2 * 63 / 64 * 2 * TRAINED, 2 * 63 / 64 * 4 * HEAD, 64)
    )


@pytest.mark.parametrize(("parallel", "times"), [("fsdp", 2), ("zero3", 2), ("zero2", 1)])
def test_shares(parallel: str, times: int) -> None:
    seen = found(gpus=8, parallel=parallel)
    assert seen["reduce-scatter"] == pytest.approx((7 / 8 * 2 * TRAINED, 7 / 8 * 4 * HEAD, 8))
    gathered = times * 7 / 8
    assert seen["all-gather"] == pytest.approx((gathered * 2 * WEIGHTS, gathered * 4 * HEAD, 8))


def test_split_layers() -> None:
    """Two sums a pass over a layer, of 32 samples of 768 positions, in machines of 8."""
    seen = {(x[2]): x for x in found(gpus=16, parallel="tp", images_per_step=64).values()}
    assert seen[8][:2] == pytest.approx((32 * 4 * 2 * 7 / 8 * 32 * 768 * 4096 * 2, 0))
    assert set(seen) == {8, 2} or set(seen) == {8}


def test_the_slower_way_decides() -> None:
    structure = shipped.structure_of("llava-1.5-7b", ("projector", "llm"))
    device = DEVICES["h100"]
    for gpus, rate in ((8, device.link), (16, device.network)):
        [one] = sent(structure, Settings(gpus=gpus), 576, None)
        assert one.seconds(device) == pytest.approx(one.bytes / rate)
