# SPDX-License-Identifier: Apache-2.0
"""The workflow files start what the Makefile has, and leave nothing of it out."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())


def triggers(workflow: dict[Any, Any]) -> dict[str, Any]:
    return workflow[True]  # YAML 1.1 takes `on` for that


def commands(job: dict[str, Any]) -> list[str]:
    """What a job runs, once for each row of its matrix."""
    lines = [step["run"] for step in job["steps"] if "run" in step]
    return [
        re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda name, row=row: str(row[name[1]]), line)
        for row in rows_of(job)
        for line in lines
    ]


def rows_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a job's matrix, {name: value}; one without names where it has no matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    if "include" in matrix:
        return matrix["include"]
    return [{name: x} for name, values in matrix.items() for x in values] or [{}]


@pytest.mark.parametrize("name", ("ci.yml", "weekly.yml"))
def test_each_job_starts_from_a_checkout(name: str) -> None:
    for job in read(name)["jobs"].values():
        used = [step["uses"] for step in job["steps"] if "uses" in step]
        assert [each.partition("@")[0] for each in used] == [
            "actions/checkout", "actions/setup-python",
        ]  # fmt: skip
        assert job["timeout-minutes"] > 0
        for command in commands(job):
            program, target, *_ = command.split()
            assert "${{" not in command
            assert target in TARGETS if program == "make" else (ROOT / target).exists(), command


def test_each_change_runs_all_that_it_has_to_pass() -> None:
    workflow = read("ci.yml")
    assert triggers(workflow).keys() == {"push", "pull_request"}
    assert commands(workflow["jobs"]["ci"]) == ["bash .ci/run"]


def test_each_week_runs_every_other_target_and_release() -> None:
    workflow = read("weekly.yml")
    [schedule] = triggers(workflow)["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", schedule["cron"])
    assert "workflow_dispatch" in triggers(workflow)
    alone = {"test-transformers", "test-versions"}
    tests = {x for x in TARGETS if x.startswith("test-")} - alone
    assert commands(workflow["jobs"]["target"]) == [f"make {x}" for x in sorted(tests)]
    assert commands(workflow["jobs"]["release"]) == ["make release-check"]
    assert commands(workflow["jobs"]["notebook"]) == ["make notebook"]
    [releases] = re.findall(r"^TRANSFORMERS := (.*)$", MAKEFILE, re.M)
    assert commands(workflow["jobs"]["transformers"]) == [
        f"make test-transformers TRANSFORMERS={x}" for x in releases.split()
    ]


def test_each_pair_of_oldest_and_newest_is_run() -> None:
    """Of Python, torch and transformers: the lowest that pyproject.toml allows, and the newest."""
    job, project = read("weekly.yml")["jobs"]["versions"], (ROOT / "pyproject.toml").read_text()
    rows = [(row["python"], *row["releases"].split()) for row in rows_of(job)]
    assert commands(job) == [f'make test-versions RELEASES="{" ".join(row[1:])}"' for row in rows]
    oldest, newest = ("3.10", "torch==2.8.0", "transformers==4.57.6"), ("torch", "transformers")
    for text in ('requires-python = ">=3.10"', '"torch>=2.8"', '"transformers>=4.57,<6"'):
        assert text in project
    for first, second in combinations(range(3), 2):
        assert len({(row[first], row[second]) for row in rows}) == len(rows) == 4
    for place, release in enumerate(oldest):
        assert sum(row[place] == release for row in rows) == 2
    assert {x for row in rows for x in row[1:]} == {*oldest[1:], *newest}
    steps = [step.get("with", {}).get("python-version") for step in job["steps"]]
    assert "${{ matrix.python }}" in steps


def test_the_oldest_of_all_is_what_the_package_takes() -> None:
    """Of each package that `make test-oldest` has in its lowest version. Of numpy 1.26 the last
    release, as scipy takes no other."""
    project = (ROOT / "pyproject.toml").read_text()
    claimed = dict(re.findall(r'"([a-z]+)>=([\d.]+)', project))
    [oldest] = re.findall(r"^OLDEST := (.*)$", MAKEFILE, re.M)
    [need] = re.findall(rf"^TRANSFORMERS_NEED_{oldest} := ((?:.*\\\n)*.*)$", MAKEFILE, re.M)
    tried = dict(re.findall(r"([a-z]+)==([\d.]+)", need)) | {"transformers": oldest}
    for name in ("transformers", "accelerate", "datasets", "safetensors", "peft"):
        assert tried[name].split(".") == f"{claimed[name]}.0.0".split(".")[:3], name
    assert claimed["numpy"] == "1.26" and tried["numpy"].startswith("1.26.")


def test_a_gpu_is_somebodys_own() -> None:
    job = read("gpu.yml")["jobs"]["gpu"]
    assert job["runs-on"] == ["self-hosted", "gpu"] and commands(job) == ["make gpu-check"]
    assert triggers(read("gpu.yml")).keys() == {"workflow_dispatch"}  # no stranger's change runs


def test_a_commit_meets_what_lint_checks() -> None:
    """Each hook runs a program of the environment."""
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    entries = [hook["entry"].replace(" --force-exclude", "") for hook in repository["hooks"]]
    [lint] = re.findall(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    checks = [
        line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .").removesuffix(" --check")
        for line in lint.splitlines()
    ]
    assert entries == checks
