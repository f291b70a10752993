# SPDX-License-Identifier: Apache-2.0
"""What a compiled kernel uses: registers, stack, memory, and the instructions that matter."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

LOAD_PTX = re.compile(r"\bld\.global\S*")
WIDE_PTX = re.compile(r"\.v[48]\.[a-z]32|\.v[24]\.[a-z]64")
BULK_PTX = re.compile(r"\bcp\.async\.bulk\.tensor\S*|\bcp\.async\.cg\S* [^;]*\], 0x10")
TENSOR_CORES_PTX = re.compile(r"\b(?:tcgen05\.mma|wgmma\.mma_async|mma\.sync)\b")
LOAD_GCN = re.compile(r"\b(?:global|buffer|flat)_load_\w+")
WIDE_GCN = re.compile(r"dwordx[24]")  # 64 lanes of 8 bytes, as 32 of 16
SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);")
TENSOR_CORES_GCN = re.compile(r"\bv_mfma_[a-z0-9]+")


def inspect(kernel: Any) -> dict[str, Any]:
    """JSON-able facts about a compiled kernel."""
    facts = {
        "kernel": kernel.metadata.name,
        "num_warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        "narrow_strides": narrow_strides(kernel.asm["ttir"]),
    }
    return facts | (_nvidia(kernel) if "cubin" in kernel.asm else _amd(kernel.asm["amdgcn"]))


def narrow_strides(ttir: str) -> list[str]:
    """Where a stride is used in 32 bits: before anything is done with it, it has to be extended.

    Triton 3.4 does not name arguments, so that nothing is found in its code.
    """
    body = ttir[ttir.index("tt.func public") :].splitlines()[1:]
    lines = [line.split(" loc(")[0].strip() for line in body]
    return [
        line
        for line in lines
        if re.search(r"%stride_\w+", line)
        and not re.search(r"arith\.extsi .*to i64$|: (?:tensor<[x\d]+x)?i64\b", line)
    ]


def _nvidia(kernel: Any) -> dict[str, Any]:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = (cuobjdump, "--dump-resource-usage", file.name)
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        listing = (cuobjdump, "--dump-sass", file.name)
        sass = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    loads = LOAD_PTX.findall(ptx)
    wide = sum(bool(WIDE_PTX.search(load)) for load in loads)
    return {
        "registers": used["REG"],
        "stack": used["STACK"] + used["LOCAL"],  # a spill is on the stack
        "wide_loads": wide + len(BULK_PTX.findall(ptx)),
        "narrow_loads": len(loads) - wide,
        "tensor_cores": sorted(set(TENSOR_CORES_PTX.findall(ptx))),
        "instructions": instructions(sass),
        "barriers": len(re.findall(r"\bBAR\.", sass)),
    }


def instructions(sass: str) -> int:
    """Of the longest loop, or where there is none, from the start to the first exit."""
    listed = [(int(address, 16), text) for address, text in SASS.findall(sass)]
    jumps = [(re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text), at) for at, text in listed]
    loops = [(int(jump[1], 16), at) for jump, at in jumps if jump and int(jump[1], 16) < at]
    if loops:
        return max(sum(first <= at <= last for at, _ in listed) for first, last in loops)
    return next(i for i, (_, text) in enumerate(listed) if text.startswith("EXIT"))


def _amd(gcn: str) -> dict[str, Any]:
    used = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", gcn, re.M)}
    loads = LOAD_GCN.findall(gcn)
    wide = sum(bool(WIDE_GCN.search(load)) for load in loads)
    return {
        "registers": used["vgpr_count"],
        "stack": used["private_segment_fixed_size"] + used["vgpr_spill_count"],
        "wide_loads": wide,
        "narrow_loads": len(loads) - wide,
        "tensor_cores": sorted(set(TENSOR_CORES_GCN.findall(gcn))),
    }
