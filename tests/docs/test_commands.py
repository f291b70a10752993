# SPDX-License-Identifier: Apache-2.0
"""The commands of the text run as it says, or are listed here with the reason why they do not."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.docs.commands import BEGINNING, Command, check, help_of, is_name, read_shell, run
from tests.docs.pages import ROOT, Block, Page, page_of, pages
from tests.docs.places import PLACES

TABLE = "gqa,mmmu_val,ai2d,mmstar,textvqa_val,ocrbench,realworldqa,mmvp"
# Why a command is not run. Before a fenced block the page says the same: see tests/docs/pages.py.
NOT_RUN = {
    "takes minutes or hours": (
        "make demo",
        "prereg demo",
        "prereg demo --preset scenes",
        "prereg demo --preset scenes --seeds 5",
        "prereg demo --preset scenes --weight 5 --out runs/weight-5",
        "prereg demo --preset scenes-gpu",
        "prereg demo --preset scenes --run.pre.weight 0.5 --run.stages.1.steps 100 "
        "--transfer.steps 30 --out runs/short",
        "prereg demo --preset scenes --run.stages.1.trainable llm --run.families.count 2",
        "prereg sweep --preset scenes --weights 0.5 1 2 --experiment.run.micro_batch 16 "
        "--out runs/sweep",
        "prereg sweep --preset scenes",
        "prereg sweep --preset scenes-gpu",
        "make bench",
        "make bench-compare",
        "make bench-compare BASE=main",
        "make bench-compare BASE=REV",
        "make bench-host",
        "python -m benchmarks.host BASE",
        "make bench-host BASE=main",
        "make bench-host BASE=REV",
        "python -m benchmarks.compare BASE",
        "python -m tests.release.same_results",
        "make test-gpu-first",
        "python -m benchmarks.first first --out DIR --size tiny",
        "python -m benchmarks.loss.gpu --size tiny --no-compile --out build/peers.json",
        "python -m benchmarks.step.gpu --size tiny --out build/step.json",
        "python -m benchmarks.studies.fp8_accuracy",
        "python -m benchmarks.studies.token_fraction",
        "python -m benchmarks.studies.head_dtype",
        "python -m benchmarks.studies.depth --workers 2",
        "python -m benchmarks.studies.photographs --workers 2",
        "python -m benchmarks.studies.claims --workers 2",
        "python -m benchmarks.studies.adapters --workers 2",
        "python -m benchmarks.studies.merging --workers 2",
        "python -m benchmarks.studies.deepstack --workers 2",
        "python -m benchmarks.studies.tuning --workers 2",
        "python -m benchmarks.studies.many_samples",
        "python -m benchmarks.step.cpu",
        "python -m benchmarks.step.structures",
        "python -m benchmarks.studies.input_pipeline",
        "python -m benchmarks.studies.watched_gradients",
        "make fuzz",
        "make notebook",
        "make train-example",
    ),
    "needs a GPU": (
        "prereg demo --preset scenes-gpu --workers 4",
        "prereg demo --preset scenes-gpu-text --workers 4",
        "prereg sweep --preset scenes-gpu --workers 4",
        "make gpu-first",
        "make gpu-second",
        "python -m benchmarks.first first --out DIR",
        "python -m benchmarks.first second --out DIR --what qwen",
        "python -m benchmarks.first.ceilings --out FILE",
        "python -m benchmarks.first.tap_profile --out FILE --trace FILE",
        "python -m benchmarks.first.forms --out FILE",
        "python -m benchmarks.first.chunks --out FILE",
        "make gpu-check",
        "make gpu-step",
        "make gpu-step MODEL=qwen",
        "make gpu-sanitize",
        "python3 -m benchmarks.step.gpu --model llava --seconds 240 --out out/gpu_step_llava.json",
        "python3 -m benchmarks.step.gpu --model qwen --seconds 240 --out out/gpu_step_qwen.json",
        "python3 -m benchmarks.loss.accuracy --out out/gpu_accuracy.json",
        "python3 -m benchmarks.studies.curves --seconds 400 --out out/gpu_curves.json",
        "python3 -m benchmarks.studies.curves --out out/gpu_curves.json",
        "python -m benchmarks.loss.gpu --out FILE --quick",
        "python -m benchmarks.loss.accuracy --out FILE",
        "python -m benchmarks.studies.curves --out FILE",
        "python -m benchmarks.step.gpu --out FILE",
    ),
    "runs these tests": (
        "make test",
        "make test-models",
        "make test-estimate",
        "make test-compile",
        "make test-torch",
        "make test-triton",
        "make test-transformers",
        "make test-ranks",
        "make test-deepspeed",
        "make test-docs",
        "make test-pages",
        "make test-oldest",
        "make test-oldest-torch",
        "make test-versions",
    ),
    "make train-example runs both": (
        "python examples/photographs.py photos",
        "prereg assemble --vision photos/clip --llm photos/llama --out photos/llava",
    ),
    "installs what builds the site": ("make docs",),
    "builds both files of a release, and installs them": ("make release-check",),
    "needs several machines": (
        "torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
        "-m prereg_kernels train recipe.yaml",
    ),
    "tests/train/test_fsdp.py::test_accelerate_s_file starts it": (
        "accelerate launch --config_file examples/accelerate/fsdp2.yaml -m prereg_kernels train "
        "recipe.yaml",
    ),
    "runs a trainer that lies beside the environment": (
        "make test-llamafactory",
        "make test-swift",
        "make test-trl",
        "make test-axolotl",
        "prereg llamafactory",
        "make test-nemo",
        "make test-liger",
        "make test-lmms-eval",
        "prereg trl sft",
        "prereg trl grpo",
        "prereg trl sft --config x.yaml",
        "prereg trl sft --config sft.yaml --pre.weight 0.3",
        "prereg trl dpo --config dpo.yaml --num_processes 8",
        "prereg trl",
        "prereg llamafactory train sft.yaml pre.weight=0.3",
        "prereg llamafactory train try.yaml",
        "prereg llamafactory train try.yaml resume_from_checkpoint=photos/out/checkpoint-6",
        "prereg llamafactory train sft.yaml",
        "torchrun --nproc-per-node 8 -m nemo_automodel.cli.app config.yaml",
    ),
    "tests/train/test_command.py::test_two_ranks_are_one starts it on two ranks": (
        "torchrun --nproc-per-node 8 -m prereg_kernels train recipe.yaml",
    ),
    "stands for the file on the page of training, whose commands run": (
        "prereg train CONFIG.yaml",
        "prereg train CONFIG.yaml --data.0.format captions --dry-run",
    ),
    "tests/trainers/test_examples.py::test_example_on_two_ranks starts the example": (
        "torchrun --nproc-per-node 8 pre_trainer.py",
        "accelerate launch accelerate_loop.py",
    ),
    "tests/trainers/test_accelerate_configs.py starts each of the files": (
        "accelerate launch --config_file FILE pre_trainer.py",
    ),
    "needs GPUs, and models and data of the real size": (
        "prereg assemble --vision openai/clip-vit-large-patch14-336 --llm "
        "lmsys/vicuna-7b-v1.5 --out runs/assembled/clip-vicuna-7b",
        "prereg assemble --vision google/siglip2-so400m-patch14-384 --llm "
        "Qwen/Qwen2.5-7B-Instruct --out runs/assembled/siglip2-qwen2.5-7b",
        "prereg train configs/clip-vicuna-7b-frozen.yaml --dry-run",
        "torchrun --nproc-per-node 8 -m prereg_kernels train configs/clip-vicuna-7b-frozen.yaml",
        "torchrun --nproc-per-node 8 -m prereg_kernels train "
        "configs/clip-vicuna-7b-frozen.yaml --pre null --out runs/clip-vicuna-7b-frozen-baseline",
        f"prereg evaluate runs/clip-vicuna-7b-frozen --tasks {TABLE} --dtype bfloat16",
        f"prereg evaluate runs/clip-vicuna-7b-frozen-baseline --tasks {TABLE} --dtype bfloat16",
        "prereg train configs/siglip2-qwen2.5-7b-frozen.yaml --dry-run",
        "torchrun --nproc-per-node 8 -m prereg_kernels train "
        "configs/siglip2-qwen2.5-7b-frozen.yaml",
        "torchrun --nproc-per-node 8 -m prereg_kernels train "
        "configs/siglip2-qwen2.5-7b-frozen.yaml --pre null "
        "--out runs/siglip2-qwen2.5-7b-frozen-baseline",
        f"prereg evaluate runs/siglip2-qwen2.5-7b-frozen --tasks {TABLE} --dtype bfloat16",
        f"prereg evaluate runs/siglip2-qwen2.5-7b-frozen-baseline --tasks {TABLE} --dtype bfloat16",
    ),
    "tests/packages/test_lmms_eval.py::test_answers_are_those_of_one_question_at_a_time runs it, "
    "on a task of local files": (f"prereg evaluate runs/mine --tasks {TABLE}",),
    "stands for the one on the page of the checkup, whose commands run": (
        "prereg checkup runs/baseline --compare runs/mine --names baseline PRe --images photos "
        "--out checkup",
    ),
    "installs packages": (
        "pip install torch",
        "pip install torch==2.13.0 torchvision torchaudio",
        "pip install llamafactory==0.9.5 torch==2.13.0",
        "pip install scikit-image '.[train]'",
        "pip install .",
        "pip install '.[train,checkup]'",
        "pip install git+URL",
        "pip install FILE.tar.gz",
        "pip install -e .",
        "pip install torch 'setuptools>=77' wheel ninja",
        "pip install --no-build-isolation .",
        "pip install --no-build-isolation -e '.[dev]'",
        "pip wheel .",
        "pip install '.[checkup]'",
        "pip install torchvision torch==2.13.0",
        "pip install pillow",
        "pip install peft",
        "pip install pre-commit",
        "pip install lmms-eval",
        "pip install --no-deps .",
    ),
    "tests/cli/test_build.py::test_compiles_and_says_what_runs runs it": ("prereg build",),
    "a check of every change, beside these tests": ("make lint",),
    "compiles for minutes, and runs tests of tests/ops/backends": ("make sanitize",),
    "tests/cli/test_demo.py::test_experiment_writes_its_report runs it": (
        "prereg demo --preset mine.yaml",
    ),
}
# What stands for something in a command, and what does at a tiny size.
INSTEAD = {
    "--images 174 --columns 4096": "--images 3 --columns 32",
    "NAME N D DTYPE": "fused 512 32 float32",
    "evaluate runs/mine": "evaluate MODEL",
    "--scenes": "--scenes --limit 24 --splits 2",
}


SUBCOMMANDS = re.findall(r"^    (\w+) ", help_of(("prereg",)), re.M)


def commands(page: Page) -> list[tuple[Command, Block | None]]:
    """Those of a page, and the fenced block that each is in."""
    found: list[tuple[Command, Block | None]] = []
    for block in page.blocks:
        if block.language == "sh":
            found += [(command, block) for command in read_shell(block.text)]
        elif not block.language and BEGINNING.match(block.text):
            found += [(command, None) for command in read_shell(block.text)]
    spans = [span for span in page.spans if BEGINNING.match(span)]
    return found + [(command, None) for span in spans for command in read_shell(span)]


def documented() -> dict[str, list[tuple[str, Block | None]]]:
    """{command: the page and fenced block of each time that it is named}."""
    found: dict[str, list[tuple[str, Block | None]]] = {}
    for page in pages():
        for command, block in commands(page):
            if not is_name(command):
                found.setdefault(shlex.join(command), []).append((page.name, block))
    for name in SUBCOMMANDS:
        for line in map(str.strip, help_of(("prereg", name)).splitlines()):
            for command in read_shell(line) if BEGINNING.match(line) else ():
                found.setdefault(shlex.join(command), []).append((f"prereg {name} --help", None))
    return found


DOCUMENTED = documented()
REASONS = {command: reason for reason, several in NOT_RUN.items() for command in several}


@pytest.fixture(autouse=True, scope="module")
def results_stay() -> Iterator[None]:
    """No command here measures: one that goes on with a study belongs to those that do not run."""

    def stored() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in (ROOT / "benchmarks" / "results").rglob("*.json")}

    before = stored()
    yield
    assert [path for path, x in stored().items() if x != before.get(path)] == []


def test_what_is_not_run_is_listed_here() -> None:
    """With the reasons of the markers, which stand for what is there."""
    assert REASONS.keys() <= DOCUMENTED.keys()
    for command, places in DOCUMENTED.items():
        for page, block in places:
            if block is not None:
                assert block.why_not(command) == REASONS.get(command), f"{page}: {command}"
    for page, block in {(name, b) for several in DOCUMENTED.values() for name, b in several if b}:
        for text in block.markers:
            assert any(text in shlex.join(c) for c in read_shell(block.text)), f"{page}: {text}"


@pytest.mark.parametrize("command", REASONS)
def test_what_is_not_run_is_accepted(command: str) -> None:
    """By the parser of the program that it names."""
    check(tuple(shlex.split(command)))


@pytest.mark.parametrize("command", [c for c in DOCUMENTED if c not in REASONS])
def test_the_rest_runs(command: str, place: Path) -> None:
    page = DOCUMENTED[command][0][0]
    prepare = PLACES.get(page) or PLACES.get(page.partition("/")[0])
    if prepare:
        prepare(place)
    at_a_tiny_size = command
    for text, instead in INSTEAD.items():
        at_a_tiny_size = at_a_tiny_size.replace(text, instead)
    output = run(tuple(shlex.split(at_a_tiny_size)), place)
    for text, check_outcome in OUTCOMES.items():
        if text in command:
            check_outcome(place, output)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where a command runs. `make clean` has no environment to remove there."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    yield tmp_path
    torch.set_num_threads(1)


# What the text says of a command's outcome.


def curves(place: Path) -> list[set[str]]:
    """The names of each model's."""
    numbers = json.loads((place / "checkup" / "checkup.json").read_text())
    assert (place / "checkup" / "checkup.html").is_file()
    return [set(model["curves"]) for model in numbers["models"]]


def has_no_probe(place: Path, output: str) -> None:
    for names in curves(place):
        assert {"median norm", "CKA with input", "silenced tokens"} <= names
        assert not any("image:" in name or "object:" in name for name in names)


def has_an_image_probe(place: Path, output: str) -> None:
    assert "image: class" in curves(place)[0]


def has_objects(place: Path, output: str) -> None:
    [names] = curves(place)
    assert "contrast" in names and any("object: " in name for name in names)


def has_structure(place: Path, output: str) -> None:
    assert "contrast" in curves(place)[0]


def has_two_models(place: Path, output: str) -> None:
    assert len(curves(place)) == 2


def is_supported(place: Path, output: str) -> None:
    assert re.search(r"^  supported +yes$", output, re.M)


def is_a_run(place: Path, output: str) -> None:
    there = {path.name for path in (place / "runs" / "mine").iterdir()}
    named = {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "checkups.jsonl"}
    assert named <= there and named <= {
        name.strip("/") for name in page_of("docs/demo-loop.md").spans
    }


def lists_the_targets(place: Path, output: str) -> None:
    listed = {line.split()[0] for line in output.splitlines()}
    assert {f"make {target}" for target in listed} == set(page_of("Makefile").spans)


def leaves_the_pages(place: Path, output: str) -> None:
    """The figures on the pages are those of benchmarks/results, but for the new demo's commit."""
    names = ("anchors", "demo", "fidelity", "pays", "performance")
    for name in ("README.md", *(f"docs/{name}.md" for name in names)):
        before, after = (
            re.sub(r"Commit \w+", "", (root / name).read_text()) for root in (ROOT, place)
        )
        assert before == after, name


OUTCOMES = {
    "doctor MODEL": is_supported,
    "MODEL --images photos": has_no_probe,
    "--images imagenet-val": has_an_image_probe,
    "instances_val2017.json": has_objects,
    "stuffthingmaps": has_structure,
    "--scenes": has_objects,
    "--compare": has_two_models,
    "--config run.yaml": is_a_run,
    "make help": lists_the_targets,
    "benchmarks.readme": leaves_the_pages,
}
