# SPDX-License-Identifier: Apache-2.0
"""The files of examples/accelerate, each as `accelerate launch` starts it on two CPU ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prereg_kernels import apply_pre, remove_pre
from tests.attached import compare
from tests.tiny import PATCHES, tiny_llava
from tests.trainers import ranks
from tests.trainers.rows import eager_gradients, make_rows

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate"
ON_CPUS = "# On CPUs: "


def for_cpus(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The file with what it says itself is to be changed, and the variables that it says to set.

    The launcher of several processes does not hand `use_cpu` on.
    """
    text = (CONFIGS / f"{name}.yaml").read_text()
    [line] = [line for line in text.splitlines() if line.startswith(ON_CPUS)]
    said, _, variable = line.removeprefix(ON_CPUS).partition(", and ")
    config, changes = yaml.safe_load(text), yaml.safe_load(said)
    assert changes == {"mixed_precision": "no", "num_processes": 2}
    return config | changes, dict([variable.split("=")]) if variable else {}


def launch(name: str, out: Path, case: str = "plain") -> list[Any]:
    """What each rank left."""
    config, variables = for_cpus(name)
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    script = Path(__file__).with_name("accelerate_step.py")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [*command, "--config_file", str(out / "config.yaml"), str(script), str(out), case],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"{case} {rank}.pt") for rank in range(ranks.RANKS)]


def expected() -> dict[str, Any]:
    """Gradients by the definitions, of one process."""
    pre = apply_pre(model := tiny_llava())
    remove_pre(model)
    found = eager_gradients(pre.heads, make_rows(ranks.BOTH))
    return {name: x for name, x in found.items() if not ranks.vision(name)}


def check(name: str, out: Path, told: str, kind: str, case: str = "plain") -> list[Any]:
    found = launch(name, out, case)
    for said, was, _, gradients, metrics in found:
        assert (said, was) == (f"DistributedType.{told}", f"DistributedType.{kind}")
        compare(gradients, expected())
        assert metrics["visual_tokens"] == sum(ranks.BOTH) * PATCHES
    return found


def test_there_is_a_test_of_each_file() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} == {"ddp", "fsdp2", "zero2", "zero3"}


@pytest.mark.ranks
def test_ddp(tmp_path: Path) -> None:
    check("ddp", tmp_path, "MULTI_CPU", "MULTI_CPU")


@pytest.mark.parametrize(
    "case", ("no values", pytest.param("values of another seed", marks=pytest.mark.ranks))
)
def test_fsdp2(tmp_path: Path, case: str) -> None:
    """On CPUs Accelerate says that it is DDP, whatever the file says; so FSDP is put in by hand.

    The file's `cpu_ram_efficient_loading`: ranks after the first have no weights, the heads of a
    model without any are on the meta device, and all take the first rank's.
    """
    found = check("fsdp2", tmp_path, "MULTI_CPU", "FSDP", case)
    on = [set(heads.values()) for _, _, heads, _, _ in found]
    assert on == [{"cpu"}, {"meta" if case == "no values" else "cpu"}]


@pytest.mark.packages
@pytest.mark.parametrize("stage", (2, 3))
def test_zero(tmp_path: Path, stage: int) -> None:
    """On CPUs Accelerate has no backend for DeepSpeed; here it has gloo."""
    check(f"zero{stage}", tmp_path, "DEEPSPEED", "DEEPSPEED")
