# SPDX-License-Identifier: Apache-2.0
"""Kernels that Triton has compiled, launched past its own way there.

With every launch, `kernel[grid](...)` binds the arguments to names, writes the text by which it
finds what it has compiled, and asks for settings: most of a launch's time on the host. Here a
kernel is found by what Triton specialises it for, or by more.

The rest is left to Triton: pointers off 16 bytes, integers beyond 32 bits, hooks, ROCm, for whose
GPUs it looks at more, the interpreter, and releases that nobody has looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from itertools import repeat
from operator import or_
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

OLDEST, NEWEST = (3, 4), (3, 9)
ALIGNMENT = 16  # bytes of a pointer, and the factor of an integer, that Triton specialises for
MOST_INT = 2**31 - 1
MOST_KEPT = 1024  # a program has some tens

RUNTIME = triton.knobs.runtime

Key = tuple[Any, ...]
DTYPE, NOTHING = repeat("dtype"), repeat(None)


class Variant:
    """How a kernel is compiled, but for what Triton sees of its tensors and numbers.

    Variants are found by identity: make one for each way, not for each launch.

    Attributes:
        num_warps: of a program.
        constants: the kernel's last parameters, in their order.
        most_registers: of a thread, on NVIDIA's GPUs; None leaves it to the compiler, as AMD's do.
    """

    def __init__(
        self, num_warps: int, *, most_registers: int | None = None, **constants: Any
    ) -> None:
        self.num_warps, self.most_registers, self.constants = num_warps, most_registers, constants


class Compiled(NamedTuple):
    """What a launch takes of a compiled kernel, and that kernel, which has to live."""

    run: Any
    function: Any
    metadata: Any
    kernel: CompiledKernel


_compiled: dict[Key, Compiled] = {}


def is_known() -> bool:
    """Whether kernels of this Triton may be launched here."""
    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    nvidia = torch.version.hip is None and not RUNTIME.interpret
    return OLDEST <= version <= NEWEST and nvidia


IS_KNOWN = is_known()


def has_hooks(kernel: Any) -> bool:
    """Whether somebody watches launches, or changes how kernels are compiled."""
    enter, leave = RUNTIME.launch_enter_hook, RUNTIME.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)  # since 3.5 a chain, mostly empty; before, a hook or None
        or getattr(leave, "calls", leave)
        or kernel.pre_run_hooks
        or getattr(RUNTIME, "add_stages_inspection_hook", None) is not None
    )


@lru_cache(maxsize=MOST_KEPT)
def _kinds(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """What Triton specialises of each integer; () where one is beyond 32 bits."""
    if max(numbers) > MOST_INT:
        return ()
    return tuple(2 if x == 1 else x % ALIGNMENT == 0 for x in numbers)


def launch_compiled(
    kernel: Any,
    grid: tuple[int, int, int],
    device: int,
    tensors: Sequence[Tensor | None],
    numbers: tuple[int, ...],
    variant: Variant,
) -> Key | None:
    """Launch what Triton has compiled for such arguments, on the current stream of the device.

    Returns:
        None if it is launched. Otherwise Triton has to: the key to `keep` its kernel by, or (),
        where it has to each time.
    """
    if not IS_KNOWN or has_hooks(kernel):
        return ()
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    kinds = _kinds(numbers)
    if reduce(or_, filter(None, pointers), 0) % ALIGNMENT or not kinds:
        return ()
    key = (kernel.fn, device, variant, kinds, *map(getattr, tensors, DTYPE, NOTHING))
    found = _compiled.get(key)
    if found is None:
        return key
    stream = driver.active.get_current_stream(device)
    found.run(
        *grid, stream, found.function, found.metadata, None, None, None,
        *pointers, *numbers, *variant.constants.values(),
    )  # fmt: skip
    return None


def keep(key: Key, kernel: Any) -> None:
    """Launch this kernel the next time, if it is a compiled one."""
    if key and isinstance(kernel, CompiledKernel):
        if len(_compiled) >= MOST_KEPT:
            _compiled.clear()
        _compiled[key] = Compiled(kernel.run, kernel.function, kernel.packed_metadata, kernel)
