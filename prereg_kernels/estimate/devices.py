# SPDX-License-Identifier: Apache-2.0
"""What devices reach: every constant of the time model, with its source.

Nothing here was measured on a GPU. "Assumed" is what docs/performance.md assumes for its own
predictions; "sheet" is the maker's data sheet, from memory, of which other figures take the share
that the assumed matmuls take.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 0.8
"""Of a data sheet's figure that is reached: 790 of an H100's 989 TFLOP/s."""


@dataclass(frozen=True)
class Device:
    """A GPU in a machine of several.

    Attributes:
        memory: bytes.
        flops: {bytes of an element: operations a second of matrix products}.
        bandwidth: bytes a second, of its memory.
        link: bytes a second that it sends to others in its machine.
        network: bytes a second that it sends to other machines.
        call: seconds of the host for an operator.
        node: GPUs of a machine.
        overlaps: whether the host works beside it.
    """

    memory: float
    flops: dict[int, float]
    bandwidth: float
    link: float
    network: float
    call: float = 8e-6  # of eager PyTorch: 5 to 10 us on current hosts, a guess
    node: int = 8
    overlaps: bool = True


GIB = 2.0**30
DEVICES = {
    # 790 TFLOP/s and 3.0 TB/s assumed; float32 67 TFLOP/s, NVLink 450 GB/s: sheet; 400 Gb/s network
    "h100": Device(80 * GIB, {2: 790e12, 4: SHARE * 67e12}, 3.0e12, SHARE * 450e9, SHARE * 50e9),
    # the same with 141 GB; 4.3 TB/s assumed
    "h200": Device(141e9, {2: 790e12, 4: SHARE * 67e12}, 4.3e12, SHARE * 450e9, SHARE * 50e9),
    # 1550 TFLOP/s and 6.8 TB/s assumed; float32 80 TFLOP/s, NVLink 900 GB/s: sheet; 400 Gb/s
    "b200": Device(180e9, {2: 1550e12, 4: SHARE * 80e12}, 6.8e12, SHARE * 900e9, SHARE * 50e9),
    # 260 TFLOP/s and 1.65 TB/s assumed; float32 19.5 TFLOP/s, NVLink 300 GB/s: sheet; 200 Gb/s
    "a100": Device(80 * GIB, {2: 260e12, 4: SHARE * 19.5e12}, 1.65e12, SHARE * 300e9, SHARE * 25e9),
    # half of 1307 TFLOP/s, which nobody here has seen more of; 5.3 TB/s, 163 TFLOP/s of float32,
    # seven links of 64 GB/s: sheet; 400 Gb/s network
    "mi300x": Device(
        192 * GIB, {2: 0.5 * 1307e12, 4: 0.5 * 163e12}, SHARE * 5.3e12, SHARE * 448e9, SHARE * 50e9
    ),
}
