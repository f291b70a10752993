# SPDX-License-Identifier: Apache-2.0
"""Fixed calls of the loss, the tap and the attachment, and a hash of the bits that each returns.

`python -m tests.ops.bitwise` prints them as JSON. With PORTABLE in the environment the bits are the
same on every x86-64 CPU: no instructions beyond SSE, MKL's reproducible mode, one thread.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from prereg_kernels import PReHead, apply_pre, fused_pre_loss, pre_tap
from prereg_kernels.ops import dtypes
from prereg_kernels.ops.backends import registry
from tests.helpers import make_problem
from tests.tiny import gradients, make_batch, tiny_llava

PORTABLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
BACKENDS = ("torch", "cpp")
FORMULAS = [
    {"loss": "cosine"},
    *(
        {"loss": x, "normalize": n}
        for x in ("mse", "smooth_l1", "l1")
        for n in ("none", "l2", "layer")
    ),
]


def digest(tensors: Iterable[Tensor | None]) -> str:
    content = hashlib.sha256()
    for x in tensors:
        if x is not None:
            x = x.detach().contiguous()
            content.update(f"{x.dtype}{tuple(x.shape)}".encode())
            content.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:16]


def losses() -> Iterator[tuple[str, Iterable[Tensor | None]]]:
    """Every formula, activation, depth, dtype and selection, though not every combination."""
    selections = ("all", "mask", "index")
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for backend, formula, dtype in itertools.product(BACKENDS, FORMULAS, dtypes):
        for selection in selections:
            options = dict(formula, backend=backend)
            name = f"{backend} {' '.join(formula.values())} {dtype} {selection}"
            yield name, loss_and_grads((3, 19), (24, 20, 17), dtype, selection, options)
    for backend, activation in itertools.product(BACKENDS, ("gelu", "gelu_tanh", "silu", "relu")):
        for widths in ((16, 16), (16, 12), (16, 20, 12), (16, 20, 18, 12)):
            widths = widths[:1] if widths == (16, 16) else widths
            for variation in (
                {"reduction": "sum"},
                {"reduction": "none"},
                {"recompute": True},
                {"denominator": 37.0},
                {"chunk_rows": 16},
            ):
                options = dict(variation, activation=activation, backend=backend)
                key = " ".join(f"{k}={v}" for k, v in options.items())
                result = loss_and_grads((2, 23), widths, torch.float32, "mask", options)
                yield f"{key} {widths}", result


def loss_and_grads(
    leading: tuple[int, ...],
    widths: tuple[int, ...],
    dtype: torch.dtype,
    selection: str,
    options: dict[str, Any],
) -> list[Tensor | None]:
    problem = make_problem(leading, widths, dtype=dtype, seed=3)
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(leading, generator=generator) < 0.6
    if selection == "mask":
        options = dict(options, visual_mask=mask)
    elif selection == "index":
        options = dict(options, visual_index=mask.flatten().nonzero().squeeze(1).flip(0))
    leaves = problem.leaves()
    loss = fused_pre_loss(*problem.arguments(leaves), **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    loss.backward(upstream)
    return [loss, *(leaf.grad for leaf in leaves.values())]


def taps() -> Iterator[tuple[str, Iterable[Tensor | None]]]:
    for backend, dtype in itertools.product(BACKENDS, (torch.float32, torch.bfloat16)):
        problem = make_problem((3, 19), (24, 20, 17), dtype=dtype, seed=5)
        leaves = problem.leaves()
        generator = torch.Generator().manual_seed(6)
        mask = torch.rand((3, 19), generator=generator) < 0.6
        out, loss = pre_tap(
            *problem.arguments(leaves), visual_mask=mask, compute_value=True, backend=backend
        )
        (out.square().sum() + 0.37 * loss).backward()
        yield f"tap {backend} {dtype}", [out, loss, *(x.grad for x in leaves.values())]
    for dtype in (torch.float32, torch.bfloat16):
        head = PReHead(12, 9, seed=7, dtype=dtype)
        yield f"head {dtype}", head.parameters()


def attachments() -> Iterator[tuple[str, Iterable[Tensor | None]]]:
    """A step of a tiny LLaVA in each way that a setting decides."""
    for setting in (
        {},
        {"layers": (1, 2), "loss": "mse", "normalize": "layer"},
        {"anchor": "pre_projector", "gradient": "loss"},
        {"token_fraction": 0.5, "seed": 9},
    ):
        model = tiny_llava()
        pre = apply_pre(model, **{"layers": 1, **setting})
        output = model(**make_batch())
        output.loss.backward()
        metrics = torch.tensor(list(pre.metrics().values()))
        yield f"attached {setting}", [output.loss, metrics, *gradients(model).values()]


def all_digests() -> dict[str, str]:
    torch.set_num_threads(1)
    if os.environ.get("PORTABLE"):
        dtypes._native_on_cpu = lambda dtype: False
    unavailable = registry.unavailable("cpp", "cpu")
    assert unavailable is None, unavailable
    calls = itertools.chain(losses(), taps(), attachments())
    return {name: digest(tensors) for name, tensors in calls}


if __name__ == "__main__":
    print(json.dumps(all_digests(), indent=1))
