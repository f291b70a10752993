# SPDX-License-Identifier: Apache-2.0
"""Compiles every configuration of the fused matmuls, and prints as JSON what came out.

A process of its own, with the Triton to test on PYTHONPATH, as `compile.py`:

    PYTHONPATH=.triton/3.4.0:. python -m tests.triton_aot.matmuls --target sm_90 [--all]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from prereg_kernels.ops.backends.base import LossChunk
from prereg_kernels.ops.backends.triton.fused.matmul_config import STAGES, MatmulConfig, candidates
from prereg_kernels.ops.spec import Spec
from tests.helpers import KERNEL_ACTIVATIONS
from tests.triton_aot.cases import meta
from tests.triton_aot.compile import TARGETS, compiling_for
from tests.triton_aot.inspection import inspect

ROWS, POSITIONS, WIDTH = 6144, 2**20, 4096  # of a chunk, of the whole batch, of every layer
MULTIPROCESSORS = 132
Launch = Callable[[MatmulConfig], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--all", action="store_true", help="every variant, not only the heaviest")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # compile, whatever was compiled before
        print(json.dumps(compile_all(arguments.target, arguments.all)))


def compile_all(target: str, everything: bool) -> list[dict[str, Any]]:
    compiled = []
    with compiling_for(target) as kernels:
        for stage in STAGES:
            for config in candidates(stage, torch.cuda.get_device_capability()):
                for name, launch in variants(stage, everything):
                    kernels.clear()
                    launch(config)
                    facts = inspect(kernels[0]) | _bulk_copies(kernels[0].asm["ptx"])
                    compiled.append({"case": f"{name} {config}", "stage": stage} | facts)
    return compiled


def _bulk_copies(ptx: str) -> dict[str, int]:
    """TMA's instructions, to and from shared memory."""
    copies = re.findall(r"cp\.async\.bulk\.tensor\S*?\.(global|shared)", ptx)
    return {"bulk_loads": copies.count("shared"), "bulk_stores": copies.count("global")}


def variants(stage: str, everything: bool) -> Iterator[tuple[str, Launch]]:
    """The launches of a stage that differ, the heaviest first."""
    for dtype in (torch.bfloat16, torch.float16):
        if stage == "activate":
            for activation in KERNEL_ACTIVATIONS:
                yield f"{activation} {dtype}", _activate(dtype, activation)
                yield f"{activation} {dtype}, g alone", _activate(dtype, activation, store_u=False)
                if not everything:
                    return
        elif stage == "losses":
            for loss in ("cosine", "mse", "smooth_l1", "l1"):
                yield f"{loss} {dtype}", _losses(dtype, loss)
                if not everything:
                    return
                yield f"{loss} {dtype}, anchor in float32", _losses(dtype, loss, torch.float32)
        elif stage == "backward_activation":
            for activation in KERNEL_ACTIVATIONS:
                yield f"{activation} {dtype}", _backward_activation(dtype, activation)
                if not everything:
                    return
        else:
            for into in (dtype, torch.float32):
                for accumulate in (True, False):
                    name = f"into {into} of {dtype}, {accumulate=}"
                    yield name, _backward_scatter(dtype, into, accumulate)
                    if not everything:
                        return


def _activate(dtype: torch.dtype, activation: str, store_u: bool = True) -> Launch:
    def launch(config: MatmulConfig) -> None:
        from prereg_kernels.ops.backends.triton.fused.matmul_launch import linear_activate

        x, weight, g = _chunk(dtype), _weight(dtype), _chunk(dtype)
        u, bias = _chunk(dtype) if store_u else g, meta(WIDTH, dtype=dtype)
        linear_activate(x, weight, bias, activation, u, g, config, MULTIPROCESSORS)

    return launch


def _losses(dtype: torch.dtype, loss: str, anchor_dtype: torch.dtype | None = None) -> Launch:
    def launch(config: MatmulConfig) -> None:
        from prereg_kernels.ops.backends.triton.fused.matmul_launch import linear_losses

        anchor = meta(POSITIONS, WIDTH, dtype=anchor_dtype or dtype)
        spec = Spec("gelu", loss, "none", 1e-8, dtype)
        chunk = LossChunk(_chunk(dtype), None, anchor, _index(), meta(ROWS))
        linear_losses(
            _chunk(dtype), _weight(dtype), meta(WIDTH, dtype=dtype), chunk, spec, config,
            MULTIPROCESSORS,
        )  # fmt: skip

    return launch


def _backward_activation(dtype: torch.dtype, activation: str) -> Launch:
    def launch(config: MatmulConfig) -> None:
        from prereg_kernels.ops.backends.triton.fused.matmul_launch import (
            linear_backward_activation,
        )

        linear_backward_activation(
            _chunk(dtype), _weight(dtype), _chunk(dtype), activation, _chunk(dtype),
            meta(WIDTH), config, MULTIPROCESSORS,
        )  # fmt: skip

    return launch


def _backward_scatter(dtype: torch.dtype, into_dtype: torch.dtype, accumulate: bool) -> Launch:
    def launch(config: MatmulConfig) -> None:
        from prereg_kernels.ops.backends.triton.fused.matmul_launch import linear_backward_scatter

        into = meta(POSITIONS, WIDTH, dtype=into_dtype)
        residual = torch.empty_like(into) if accumulate else None
        linear_backward_scatter(
            _chunk(dtype), _weight(dtype), into, _index(), meta(), residual, config,
            MULTIPROCESSORS,
        )  # fmt: skip

    return launch


def _chunk(dtype: torch.dtype) -> Tensor:
    return meta(ROWS, WIDTH, dtype=dtype)


def _weight(dtype: torch.dtype) -> Tensor:
    return meta(WIDTH, WIDTH, dtype=dtype)


def _index() -> Tensor:
    return meta(ROWS, dtype=torch.int64)


if __name__ == "__main__":
    main()
