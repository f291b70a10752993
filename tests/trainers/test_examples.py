# SPDX-License-Identifier: Apache-2.0
"""The scripts in examples/ run, and L_PRe falls."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import prereg_kernels
from tests.releases import HERE

EXAMPLES = Path(__file__).parents[2] / "examples"
ELSEWHERE = {"sft_trainer": "tests/packages/test_trl.py"}  # with the trainer that it needs
EXAMPLE = ("photographs", "read_back")  # the beginning and the end of `make train-example`
LAYERS = ("megatron_layer", "torchtitan_layer")  # a class to add to a model of somebody else
LINES = 60


@pytest.mark.parametrize(
    "name",
    sorted(
        path.stem
        for path in EXAMPLES.glob("*.py")
        if not path.stem.startswith("tiny") and path.stem not in {*EXAMPLE, *ELSEWHERE}
    ),
)
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    check_fall(lines)
    if name == "pre_trainer":  # 4.57 goes on in another order of the rows, with PRe and without
        assert f"resumed, the same: {HERE >= (5, 0)}" in lines


@pytest.mark.parametrize(
    "name", sorted({p.stem for p in EXAMPLES.glob("*.py")} - {*EXAMPLE, *LAYERS})
)
def test_example_is_short_and_marks_its_lines(name: str) -> None:
    """Those to copy: what imports the package, and what attaches PRe. tiny*.py has neither."""
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    if name.startswith("tiny"):
        assert not any("prereg_kernels" in line for line in lines)
        return
    assert len(lines) < LINES
    of_pre = [x for x in lines if re.match(r"from prereg_kernels|.*(apply|with)_pre\(", x)]
    assert len(of_pre) in (2, 3) and all("# PRe" in line for line in of_pre)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ("accelerate_loop", "pre_trainer"))
def test_example_on_two_ranks(name: str, tmp_path: Path) -> None:
    """As its docstring advises: it trains, and ends, and all ranks use one folder.

    The process group's threads must not outlive what they need.
    """
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [*launch, str(Path(__file__).with_name("on_cpu_ranks.py")), str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, errors = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its ranks, too
        raise
    assert process.returncode == 0, errors[-2000:]
    lines = said.splitlines()
    check_fall(lines)
    if name == "pre_trainer":
        assert "resumed, the same: True" in lines
        (folder,) = {path.parent for path in temporary.glob("*/checkpoint-*")}
        assert {path.name for path in folder.iterdir()} >= {"checkpoint-10", "checkpoint-20"}


def test_accelerate_loop_counts_what_the_mean_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With level="global" images, not visual tokens, of which each has four."""
    handles: list[Any] = []
    images: list[int] = []

    def apply(model: Any, **settings: Any) -> Any:
        def see(module: Any, args: Any, kwargs: Any) -> None:
            images.append(kwargs["pixel_values"].shape[0])

        model.register_forward_pre_hook(see, with_kwargs=True)
        handles.append(original(model, level="global", **settings))
        return handles[0]

    original = prereg_kernels.apply_pre
    monkeypatch.setattr(prereg_kernels, "apply_pre", apply)
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / "accelerate_loop.py"), run_name="__main__")
    assert handles[0].denominator == sum(images[-2:])  # of the two micro-batches of a step
    assert capsys.readouterr().out


def check_fall(lines: list[str]) -> None:
    """The last line has L_PRe at the first and at the last step."""
    found = re.fullmatch(r"pre_loss (-?\d\.\d{3}) -> (-?\d\.\d{3})", lines[-1])
    assert found, lines[-1]
    first, last = map(float, found.groups())
    assert last < first - 0.3
