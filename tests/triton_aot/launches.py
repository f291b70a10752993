# SPDX-License-Identifier: Apache-2.0
"""Launches for a GPU that is not there: prints, as JSON, which kernel each of them ran.

A process of its own, with the Triton to test on PYTHONPATH:

    PYTHONPATH=.triton/3.4.0:. python -m tests.triton_aot.launches

Of each case the first launch is Triton's own, the second is the package's, where it takes the case;
then all are launched once more, and once by `kernel[grid]`. Triton compiles; nothing runs.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock


class NoGPU:
    """Triton's driver of an H100 whose current stream has a number."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def stubbed() -> Iterator[tuple[list[Any], list[Any]]]:
    """The arguments of every launch, and the kernels that went through Triton's own way to it."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launched: list[Any] = []
    through_triton: list[Any] = []
    run = JITFunction.run

    def load(kernel: Any) -> None:
        name = "_run" if isinstance(vars(CompiledKernel).get("run"), property) else "run"
        vars(kernel)[name] = lambda *arguments: launched.append(arguments)
        kernel.module, kernel.function = 0, kernel.hash

    def noted(self: Any, *arguments: Any, **options: Any) -> Any:
        through_triton.append(self)
        return run(self, *arguments, **options)

    driver.set_active(NoGPU())
    with (
        mock.patch.object(CompiledKernel, "_init_handles", load),
        mock.patch.object(CompiledKernel, "__del__", lambda kernel: None, create=True),
        mock.patch.object(JITFunction, "run", noted),
    ):
        yield launched, through_triton


def cases() -> dict[str, tuple[Any, ...]]:
    """(kernel, grid, variant, tensors, numbers) that Triton tells apart, and others."""
    import torch
    import triton.language as tl

    from prereg_kernels.ops.backends.triton.compiled import Variant
    from prereg_kernels.ops.backends.triton.gather import gather_kernel
    from prereg_kernels.ops.backends.triton.loss_blocks import loss_blocks_kernel
    from prereg_kernels.ops.backends.triton.loss_row import loss_row_kernel

    usual = Variant(4, BLOCK_M=4, BLOCK_N=32)

    def gather(
        source: Any, out: Any, index: Any = None, variant: Variant = usual
    ) -> tuple[Any, ...]:
        rows, columns = out.shape
        numbers = (rows, columns, len(source), *source.stride(), int(index is not None))
        return (
            gather_kernel, (2, 3, 1), variant, (source, index, out), (*numbers, out.stride(0))
        )  # fmt: skip

    def losses(kernel: Any) -> tuple[Any, ...]:
        tensors = (wide, None, wide, None, None, torch.zeros(12), None, None)
        numbers = (12, 12, 32, 32, 1, 0, 0, 0)
        return kernel, (12, 1, 1), of_losses, tensors, numbers

    of_losses = Variant(
        1, COLUMNS=32, EPS=1e-8, LOSS="mse", NORMALIZE="none", STAT=tl.float32, BLOCK_N=32
    )

    wide, narrow = torch.zeros(12, 32), torch.zeros(12, 32, dtype=torch.bfloat16)
    index = torch.arange(12)
    return {
        "float32": gather(wide, wide),
        "bfloat16": gather(narrow, narrow),
        "to bfloat16": gather(wide, narrow),
        "with an index": gather(wide, wide, index),
        "other rows": gather(wide[:5], wide[:5]),
        "as many rows as 16": gather(torch.zeros(16, 32), torch.zeros(16, 32)),
        "one row": gather(wide[:1], wide[:1]),
        "turned": gather(torch.zeros(32, 12).T, wide),
        "one column": gather(torch.zeros(12, 1), torch.zeros(12, 1)),
        "odd columns": gather(wide[:, :31], wide[:, :31]),
        "odd stride": gather(torch.zeros(12, 33)[:, :32], wide),
        "warps": gather(wide, wide, variant=Variant(8, BLOCK_M=4, BLOCK_N=32)),
        "block": gather(wide, wide, variant=Variant(4, BLOCK_M=4, BLOCK_N=64)),
        "another kernel": losses(loss_row_kernel),
        "of the same parameters": losses(loss_blocks_kernel),
        "off 16 bytes": gather(torch.zeros(12 * 32 + 1)[1:].view(12, 32), wide),
        "beyond 32 bits": gather(torch.zeros(1, 1).expand(2**31, 32), torch.zeros(12, 32)),
    }  # fmt: skip


def launches() -> dict[str, Any]:
    import triton

    from prereg_kernels.ops.backends.triton.compiled import launch_compiled
    from prereg_kernels.ops.backends.triton.launch import compiler_options, launch

    found: dict[str, Any] = {}
    with stubbed() as (launched, through_triton):

        def note(case: str, call: Callable[[], Any]) -> None:
            launched.clear()
            through_triton.clear()
            call()
            [arguments] = launched
            *grid, stream, kernel = arguments[:5]
            values = [x if isinstance(x, int) else None for x in map(value_of, arguments[9:])]
            found.setdefault(case, []).append(
                {
                    "grid": grid, "stream": stream, "kernel": kernel, "values": values,
                    "through_triton": bool(through_triton),
                }
            )  # fmt: skip

        def ours(case: str, part: tuple[Any, ...]) -> None:
            note(case, lambda: launch(*part))

        every = cases()
        for case, part in every.items():
            ours(case, part)
            ours(case, part)
        for case, part in [*every.items()][::-1]:
            ours(case, part)
            kernel, grid, variant, tensors, numbers = part
            options = compiler_options(None) | {"enable_fp_fusion": False}
            options |= variant.constants | {"num_warps": variant.num_warps}
            note(case, partial(kernel[grid], *tensors, *numbers, **options))
        with watched(triton.knobs.runtime):
            ours("with a hook", every["float32"])
        ours("with a hook", every["float32"])
        kernel, grid, variant, *given = every["float32"]
        found["on another device"] = [bool(launch_compiled(kernel, grid, 5, *given, variant))]
    return found


def value_of(argument: Any) -> Any:
    """A tensor's address, as a kernel gets it."""
    return argument.data_ptr() if hasattr(argument, "data_ptr") else argument


@contextmanager
def watched(runtime: Any) -> Iterator[None]:
    """A hook on launches: one in Triton 3.4, since then a chain of them."""

    def hook(*arguments: Any) -> None:
        pass

    if not hasattr(runtime.launch_enter_hook, "add"):
        with mock.patch.object(runtime, "launch_enter_hook", hook):
            yield
        return
    runtime.launch_enter_hook.add(hook)
    yield
    runtime.launch_enter_hook.remove(hook)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        print(json.dumps(launches()))
