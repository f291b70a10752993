# SPDX-License-Identifier: Apache-2.0
"""Compiles the cases for GPUs that need not be there, and prints as JSON what came out.

A process of its own, with the Triton to test on PYTHONPATH:

    PYTHONPATH=.triton/3.4.0:. python -m tests.triton_aot.compile --target sm_90 [--all]

Every case runs through the package's own launches and Triton's own specialisation of arguments; a
driver without a GPU makes them compile, and nothing more.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--all", action="store_true", help="every case, not only the quick ones")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # compile, whatever was compiled before
        # Triton 3.4 insists on a linker for AMD, whose work nobody here looks at
        os.environ.setdefault("TRITON_HIP_LLD_PATH", "/bin/true")
        print(json.dumps(compile_all(arguments.target, arguments.all)))


def compile_all(target: str, everything: bool) -> list[dict[str, Any]]:
    """What each kernel of each case came out as."""
    from prereg_kernels.ops.backends.triton.backend import TritonBackend
    from tests.triton_aot.cases import all_cases
    from tests.triton_aot.inspection import inspect

    compiled, seen = [], set()
    with compiling_for(target) as kernels:
        for case in all_cases():
            if not (case.quick or everything):
                continue
            kernels.clear()
            case.launch(TritonBackend())
            assert kernels, f"{case.name}: launches nothing"
            for kernel in kernels:
                if kernel.hash not in seen:
                    seen.add(kernel.hash)
                    flags = {"wide": case.wide, "tensor_cores": case.tensor_cores}
                    known = {"case": case.name, "quick": case.quick, "expects": flags}
                    compiled.append(known | inspect(kernel))
    return compiled


@contextmanager
def compiling_for(target: str) -> Iterator[list[Any]]:
    """Launches compile for the target and go into the list, instead of running."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NoGPU:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget(*TARGETS[target])

    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    amd = TARGETS[target][0] == "hip"
    capability = (9, 4) if amd else divmod(int(target.removeprefix("sm_")), 10)
    driver.set_active(NoGPU())
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(torch.version, "hip", "6.4" if amd else None),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: capability),
    ):
        yield kernels


if __name__ == "__main__":
    main()
