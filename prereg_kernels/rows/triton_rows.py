"""The row primitives in Triton, for NVIDIA and AMD GPUs."""

from __future__ import annotations

from prereg_kernels.rows.torch_rows import TorchRows


def unavailable(device_type: str) -> str | None:
    """Why the backend does not run on such devices here; None if it does."""
    return "not built"


class TritonRows(TorchRows):
    name = "triton"
