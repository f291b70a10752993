# SPDX-License-Identifier: Apache-2.0
"""Which part may import which, and where names of version 0.1 are found; what tests install."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from pathlib import Path

import pytest

import prereg_kernels
from prereg_kernels import checkup

PACKAGE = Path(prereg_kernels.__file__).parent
ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "_util": set(),
    "ops": {"_util"},
    "attach": {"ops", "_util"},
    "trainers": {"attach", "ops", "_util"},
    "checkup": {"attach", "ops", "_util"},
    "train": {"estimate", "trainers", "checkup", "attach", "ops", "_util"},
    "estimate": {"attach", "ops", "_util"},
    "demo": {"checkup", "attach", "ops", "_util"},
    "cli": {"estimate", "train", "demo", "checkup", "trainers", "attach", "ops", "_util"},
}
# What version 0.1 had in modules that users import
MOVED = {
    "trainer": "HEADS PRE_DIR PRe PreTrainer PreTrainerMixin find_pre heads_of logger",
    "families": "FAMILIES Family find_family",
    "handle": "ATTRIBUTE Family HEADS PRE_DIR PRe PReConfig PReHead Record Saved anchor_width "
    "check_images check_settings check_shapes count_images distributed find_pre get_pre heads_of "
    "llm_width load_heads save_heads",
    "diagnostics": "Batch ImageFacts Lens LensSums MassiveDimension MeanSums NoProbeError NormSums "
    "Norms PatchStructure Probe Similarity SimilaritySums Spectrum SpectrumSums StructureSums "
    "TokenGrid TopToken checkup linear_probe logit_lens patch_structure pool probe report "
    "similarity spectrum token_norms visual_features",
}


def imports_of(source: str) -> set[str]:
    """The parts of the package that a source imports, the version aside."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "prereg_kernels":
            modules |= {f"prereg_kernels.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            modules.add(node.module or "")
        elif isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
    parts = {module.split(".")[1] for module in modules if module.startswith("prereg_kernels.")}
    return parts - {"_version"}


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_what_it_stands_on_alone(part: str) -> None:
    sources = sorted((PACKAGE / part).rglob("*.py"))
    assert sources
    for source in sources:
        beyond = imports_of(source.read_text()) - MAY_IMPORT[part] - {part}
        assert not beyond, f"{source.relative_to(PACKAGE)} imports {beyond}"


def test_every_module_is_in_a_part() -> None:
    inside = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    assert inside == set(MAY_IMPORT)
    alone = {path.stem for path in PACKAGE.glob("*.py")}
    assert alone == {"__init__", "__main__", "_version", *MOVED}


@pytest.mark.parametrize("module", MOVED)
def test_an_old_module_warns_and_has_its_names(module: str) -> None:
    name = f"prereg_kernels.{module}"
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=f"{name} has moved"):
        old = importlib.import_module(name)
    assert set(old.__all__) == set(MOVED[module].split())
    for member in old.__all__:
        assert getattr(old, member) is not None


def test_a_public_function_is_not_replaced_by_a_module_of_its_name() -> None:
    """As the import of a module sets an attribute of the package that it is in."""
    importlib.import_module("prereg_kernels.checkup.report.page")
    for name in checkup.__all__:
        assert not inspect.ismodule(getattr(checkup, name)), name


def test_old_spellings_are_the_same_classes() -> None:
    from prereg_kernels import trainers

    assert trainers.PreTrainer is trainers.PReTrainer is prereg_kernels.PReTrainer
    assert trainers.PreTrainerMixin is trainers.PReTrainerMixin is prereg_kernels.PReTrainerMixin


def test_what_runs_twice_is_there() -> None:
    """`make test` names what runs on plain PyTorch, too: a name that is gone would be none."""
    text = (PACKAGE.parent / "Makefile").read_text()
    lines = [x for x in text.splitlines() if x.startswith(("ON_TORCH := ", "ONCE := "))]
    twice, once = ([PACKAGE.parent / "tests" / name for name in x.split()[2:]] for x in lines)
    assert [path for path in (*twice, *once) if not path.exists()] == []
    assert [path.name for path in twice] == [
        "ops", "loss", "test_gradients.py", "test_lifetimes.py", "test_import.py",
    ]  # fmt: skip
    assert [path.name for path in once] == ["backends", "test_gpu.py"]


@pytest.mark.parametrize(
    "file", sorted((ROOT / "tests" / "packages").glob("*.txt")), ids=lambda file: file.stem
)
def test_a_folder_of_packages_has_no_copy_of_the_environment(file: Path) -> None:
    """By `pip install --target --no-deps`: pickle does not find the classes of a second pyarrow."""
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert not [line for line in file.read_text().splitlines() if "==" in line and line in pinned]
