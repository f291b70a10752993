# SPDX-License-Identifier: Apache-2.0
"""Ranks that stand-ins of trainers start: whose package they import, and whose other modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import prereg_kernels

ROOT = Path(prereg_kernels.__file__).parents[1]
PREREG = "from prereg_kernels.cli import main\n\nmain()\n"  # as pip writes it
SAY = """
import multiprocessing
import prereg_kernels, rewards

def say(trainer, *arguments):
    has_pre = issubclass(trainer, prereg_kernels.PReTrainerMixin)
    print("RANK", prereg_kernels.__file__, rewards.MINE, has_pre, *arguments, flush=True)
    loader = multiprocessing.get_context("spawn").Process(target=say_package)
    loader.start()
    loader.join()

def say_package():
    print("SPAWNED", prereg_kernels.__file__, flush=True)
"""
TRL = {
    "trl/__init__.py": "from transformers import Trainer as SFTTrainer\n",
    "trl/cli/__init__.py": "",
    "trl/cli/accelerate_launcher.py": "",
    "trl/cli/main.py": """
from trl.cli import accelerate_launcher

def main(arguments):
    name, *rest = arguments
    flags = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
             "--dynamo_backend", "no", "--cpu"]
    accelerate_launcher.launch_training_script(name + ".py", flags, rest)
""",
    "trl/scripts/__init__.py": "",
    "trl/scripts/utils.py": """
class TrlParser:
    def set_defaults_with_config(self):
        pass
""",
    "trl/scripts/sft.py": """
import sys, trl
from say import say

say(trl.SFTTrainer, *sys.argv[1:])
""",
}
LLAMAFACTORY = {
    "llamafactory/__init__.py": "",
    "llamafactory/launcher.py": "",
    "llamafactory/cli.py": """
import subprocess, sys
from llamafactory import launcher

def main():
    line = "-m torch.distributed.run --standalone --nproc_per_node 1 {} {}"
    command = line.format(launcher.__file__, " ".join(sys.argv[2:])).split()
    sys.exit(subprocess.run([sys.executable, *command]).returncode)
""",
    "llamafactory/hparams.py": "import sys\n\ndef read_args():\n    return sys.argv[1:]\n",
    "llamafactory/train/__init__.py": "",
    "llamafactory/train/tuner.py": """
def run_exp(arguments):
    from say import say
    from llamafactory.train.sft import workflow
    say(workflow.CustomSeq2SeqTrainer, *arguments)
""",
    "llamafactory/train/sft/__init__.py": "",
    "llamafactory/train/sft/workflow.py": """
from transformers import Trainer as CustomSeq2SeqTrainer
""",
}


@pytest.mark.parametrize(
    "files, command",
    [
        (TRL, ["trl", "sft", "--max_steps", "4"]),
        (LLAMAFACTORY, ["llamafactory", "train", "--max_steps", "4"]),
    ],
    ids=("trl", "llamafactory"),
)
def test_another_package_in_the_working_directory(
    files: dict[str, str], command: list[str], tmp_path: Path
) -> None:
    """As where somebody who has installed it stands in a checkout, with modules of their own."""
    other = {"here/prereg_kernels/__init__.py": "raise ImportError('of the working directory')\n"}
    lines = start(tmp_path, {**files, **other}, command, ROOT)
    own = prereg_kernels.__file__
    assert lines == [f"RANK {own} mine True --max_steps 4", f"SPAWNED {own}"]


def test_a_path_with_a_space(tmp_path: Path) -> None:
    """LLaMA-Factory splits the line that starts its ranks."""
    place = tmp_path / "my packages"
    place.mkdir()
    (place / "prereg_kernels").symlink_to(ROOT / "prereg_kernels")
    command = ["llamafactory", "train", "--max_steps", "4"]
    lines = start(tmp_path, LLAMAFACTORY, command, place)
    assert lines[0] == f"RANK {place / 'prereg_kernels' / '__init__.py'} mine True --max_steps 4"


def start(folder: Path, files: dict[str, str], command: list[str], packages: Path) -> list[str]:
    """What the ranks of a command say that is started in `here`, with PRe of `packages`."""
    for name, text in {
        **{x if x.startswith("here/") else f"packages/{x}": text for x, text in files.items()},
        "packages/say.py": SAY,
        "bin/prereg.py": PREREG,
        "here/rewards.py": "MINE = 'mine'\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    paths = {"PYTHONPATH": f"{folder / 'packages'}:{packages}", "HF_HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, str(folder / "bin" / "prereg.py"), *command], cwd=folder / "here",
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | paths,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return [x for x in done.stdout.splitlines() if x.startswith(("RANK", "SPAWNED"))]
