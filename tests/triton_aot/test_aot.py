# SPDX-License-Identifier: Apache-2.0
"""Every shipped kernel compiles for the GPUs it is meant for, on the oldest and the newest Triton.

Needs no GPU, but these Tritons, each in a folder of its own:

    pip install --no-deps --target .triton/3.4.0 triton==3.4.0

below the repository, or below PREREG_TRITON. A few cases stand for all. PREREG_AOT=versions
compiles them with those in between as well (`make test-triton`). PREREG_AOT=all compiles every
case with each, which takes an hour.

Instructions are counted in SASS, and a count may not rise above `instructions.json`. Where one has
to, or has fallen, `python -m tests.triton_aot.record` writes that file anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prereg_kernels.ops.backends import triton
from prereg_kernels.ops.backends.triton.config import THREAD
from tests.triton_aot.compile import TARGETS
from tests.triton_aot.inspection import instructions, narrow_strides

KERNEL = re.compile(r"^def (\w+_kernel)\(", re.MULTILINE)
REPOSITORY = Path(__file__).parents[2]
TRITONS = Path(os.environ.get("PREREG_TRITON", REPOSITORY / ".triton"))
AOT = os.environ.get("PREREG_AOT")
EVERYTHING = AOT == "all"
OLDEST, NEWEST = "3.4.0", "3.9.0"
# What torch 2.8, and 2.11 to 2.14, bring
VERSIONS = (OLDEST, "3.6.0", "3.7.0", "3.8.0", NEWEST) if AOT else (OLDEST, NEWEST)
# Of a program, in bytes
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
ELEMENTS = 16  # of a thread, in all kernels but that of losses in blocks, which has 8
RECORD = Path(__file__).with_name("instructions.json")
RECORDED = json.loads(RECORD.read_text())  # {version: {target: {name: instructions}}}
ROW_KERNELS = Path(triton.__file__).parent.glob("*.py")  # the folder of ours, not Triton itself
# Of SASS, an element; {case: {target: at most}}. Beyond, an H200 waits for them and not for memory.
INSTRUCTIONS = {
    "forward gelu 4096 torch.bfloat16": {"sm_80": 22.5, "sm_90": 22.5, "sm_100": 22.5},
    "backward gelu 3584 torch.bfloat16": {"sm_80": 26.4, "sm_90": 26.0, "sm_100": 26.0},
}
# Of the loss row, whose sums are exchanged between warps together: two rounds, and twice the anchor
LOSS_ROW, BARRIERS = "cosine 3584 torch.bfloat16", 10
# Loads of an index, of a coefficient and of a bias may be narrow
NARROW = 8


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("version", VERSIONS)
def test_compiles_well(version: str, target: str) -> None:
    kernels = compile_with(version, "compile", target)
    assert {kernel["case"] for kernel in kernels} >= {*INSTRUCTIONS, LOSS_ROW}
    problems = [problem for kernel in kernels for problem in problems_of(kernel, target)]
    if recorded := RECORDED.get(version, {}).get(target):
        problems += grown(kernels, recorded)
    assert not problems, "\n".join(problems)


def grown(kernels: list[dict[str, Any]], recorded: dict[str, int]) -> list[str]:
    """Kernels with more instructions than are recorded, or with none recorded, a line each."""
    found = []
    for kernel in kernels:
        name, count = name_of(kernel), kernel["instructions"]
        most = recorded.get(name, 0 if kernel["quick"] else count)
        if count > most:
            each = f"{count / ELEMENTS:.1f} an element, {most / ELEMENTS:.1f} before"
            found.append(f"{name}: {count} instructions, {count - most} more: {each}")
    return found


def name_of(kernel: dict[str, Any]) -> str:
    return f"{kernel['case']}: {kernel['kernel']}"


def test_one_instruction_more_an_element_is_found() -> None:
    kernel = {"case": "a", "kernel": "b_kernel", "instructions": 160, "quick": True}
    name = name_of(kernel)
    assert grown([kernel], {name: 160}) == grown([kernel], {name: 170}) == []
    line = f"{name}: 160 instructions, 16 more: 10.0 an element, 9.0 before"
    assert grown([kernel], {name: 144}) == [line]
    assert len(grown([kernel], {name: 159})) == len(grown([kernel], {})) == 1
    assert grown([kernel | {"quick": False}], {}) == []


def test_every_row_kernel_is_counted() -> None:
    shipped = {name for path in ROW_KERNELS for name in KERNEL.findall(path.read_text())}
    assert {"gather_kernel", "loss_row_kernel"} <= shipped
    for version, targets in RECORDED.items():
        for target, counts in targets.items():
            counted = {name.rsplit(" ", 1)[1] for name in counts}
            assert counted == shipped, f"{version}, {target}"


def test_narrow_strides() -> None:
    ttir = """tt.func public @k(%stride_z: i32, %stride_t: i64, %stride_dz: i32) {
    %0 = arith.extsi %stride_z : i32 to i64 loc(#loc1)
    %1 = arith.muli %row, %0 : i64 loc(#loc2)
    %2 = arith.muli %row, %stride_t : i64 loc("stride_z"(#loc3))
    %3 = arith.muli %row32, %stride_dz : i32 loc(#loc4)
    %4 = tt.splat %stride_dz : i32 -> tensor<4xi32> loc(#loc5)"""
    assert narrow_strides(ttir) == [
        "%3 = arith.muli %row32, %stride_dz : i32",
        "%4 = tt.splat %stride_dz : i32 -> tensor<4xi32>",
    ]


def test_instructions() -> None:
    straight = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   FADD R2, R2, R3 ;
        /*0020*/                   EXIT ;
        /*0030*/                   BRA 0x30 ;"""
    assert instructions(straight) == 2
    loops = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   FADD R2, R2, R3 ;
        /*0020*/              @P0 BRA `(.L_x_1) 0x10 ;
        /*0030*/                   FMUL R4, R4, R5 ;
        /*0040*/                   STG.E [R2.64], R4 ;
        /*0050*/              @!P1 BRA 0x30 ;
        /*0060*/                   EXIT ;"""
    assert instructions(loops) == 3


def compile_with(version: str, module: str, target: str) -> list[dict[str, Any]]:
    """What `compile.py`, or `matmuls.py`, prints, run with this Triton."""
    return run_with(version, module, "--target", target, *["--all"] * EVERYTHING)


def run_with(version: str, module: str, *arguments: str) -> Any:
    """What a program beside this file prints, run with this Triton."""
    folder = TRITONS / version
    assert (folder / "triton").is_dir(), f"no Triton {version} in {folder}: make test installs it"
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-m", f"tests.triton_aot.{module}", *arguments]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def problems_of(kernel: dict[str, Any], target: str) -> list[str]:
    """What is wrong with a compiled row kernel, a line each."""
    found = problems_of_any(kernel, target)
    if kernel["expects"]["wide"] and not kernel["wide_loads"]:
        found.append("no load of 16 bytes")
    if kernel["expects"]["wide"] and kernel["narrow_loads"] > NARROW:
        found.append(f"{kernel['narrow_loads']} loads of less than 16 bytes")
    if kernel["expects"]["tensor_cores"] and not kernel["tensor_cores"]:
        found.append("no tensor cores")
    most = INSTRUCTIONS.get(kernel["case"], {}).get(target)
    each = kernel.get("instructions", 0) / ELEMENTS
    if most is not None and "partials" not in kernel["kernel"] and not 0 < each <= most:
        found.append(f"{each:.1f} instructions an element, more than {most}")
    is_loss_row = kernel["kernel"] == "loss_row_kernel"
    if is_loss_row and kernel["case"] == LOSS_ROW and kernel.get("barriers", 0) > BARRIERS:
        found.append(f"{kernel['barriers']} barriers, more than {BARRIERS}")
    one_wave = is_loss_row and kernel["case"].startswith("cosine") and "barriers" in kernel
    if one_wave and kernel["registers"] > THREAD:
        found.append(f"more than {THREAD} registers: its programs do not run at once")
    if target == "gfx942" and kernel["num_warps"] > 16:
        found.append(f"{kernel['num_warps']} warps of 64 threads")
    name = f"{kernel['case']}: {kernel['kernel']} ({kernel['registers']} registers)"
    return [f"{name}: {problem}" for problem in found]


def problems_of_any(kernel: dict[str, Any], target: str) -> list[str]:
    """What no kernel may do."""
    found = []
    if kernel["stack"]:
        found.append(f"{kernel['stack']} bytes of stack")
    if kernel["shared"] > SHARED[target]:
        found.append(f"{kernel['shared']} bytes of shared memory")
    if kernel["narrow_strides"]:
        found.append(f"offsets of 32 bits: {kernel['narrow_strides']}")
    return found
