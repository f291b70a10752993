# SPDX-License-Identifier: Apache-2.0
"""The files for SLURM and Kubernetes: the script's body on two ranks, the JobSet's fields."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.packages.run import ROOT
from tests.train.launching import environment
from tests.train.places import make_place, metrics, settings, write

EXAMPLES = ROOT / "examples"
SRUN = """#!/usr/bin/env bash
# Tasks as srun starts them, each with its number; where one fails, the others are ended.
[ "$1" = --kill-on-bad-exit=1 ] || exit 64
shift
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$task SLURM_LOCALID=$task setsid "$@" &
    tasks="$tasks $!"
done
echo "$tasks" > tasks
left=$SLURM_NTASKS
while [ "$left" -gt 0 ]; do
    wait -n
    code=$?
    left=$((left - 1))
    [ "$code" -eq 0 ] && continue
    for task in $tasks; do kill -9 -- -"$task" 2> /dev/null; done
    exit "$code"
done
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> scontrol.log
[ "$1 $2" != "show hostnames" ] || printf '127.0.0.1\\nother\\n'
"""


def sbatch(place: Path, folder: Path, **changes: Any) -> subprocess.Popen[str]:
    """The script's body, with the variables that SLURM sets."""
    folder.mkdir(exist_ok=True)
    path = write(folder / "recipe.yaml", settings(
        place, folder / "out", trainer__per_device_train_batch_size=2, stages__0__max_steps=1,
        **changes,
    ))  # fmt: skip
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]"}
    variables = environment(**slurm)
    variables["PATH"] = f"{folder}:{variables['PATH']}"
    return subprocess.Popen(
        ["bash", str(EXAMPLES / "slurm" / "train.sbatch"), str(path)], cwd=folder, env=variables,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def asked(folder: Path) -> list[str]:
    """What scontrol was asked for."""
    return (folder / "scontrol.log").read_text().splitlines()


@pytest.mark.ranks
def test_slurm(tmp_path: Path) -> None:
    """Two ranks of one run. Where its time ends before it does, the job is queued again."""
    place = make_place(tmp_path / "place")
    job = sbatch(place, tmp_path, stages__1__max_steps=5000)
    out = tmp_path / "out"
    while not ((out / "metrics.jsonl").exists() and len(metrics(out, "tune")) > 3):
        assert job.poll() is None
        time.sleep(0.2)
    for task in (tmp_path / "tasks").read_text().split():
        os.killpg(int(task), signal.SIGTERM)  # SLURM's is for all processes of a task
    _, said = job.communicate(timeout=60)
    assert job.returncode == 0 and said.count("prereg: stopped at step ") == 2, said[-4000:]
    assert asked(tmp_path) == ["show hostnames node[1-2]", "requeue 4711"]
    checkpoints = list((out / "stages/tune").glob("checkpoint-*"))
    assert checkpoints and all((x / "rng_state_1.pth").is_file() for x in checkpoints)


@pytest.mark.ranks
def test_slurm_where_ranks_fail(tmp_path: Path) -> None:
    """They end, with the reason, and the job is not put back."""
    place = make_place(tmp_path / "place")
    job = sbatch(place, tmp_path, data__0__path=str(tmp_path / "absent.json"))
    _, said = job.communicate(timeout=200)
    assert job.returncode != 0 and "absent.json: expected a file or a folder" in said
    assert asked(tmp_path) == ["show hostnames node[1-2]"]


# What the fields of our file are in JobSet's v1alpha2 and in Kubernetes' Job and Pod: no looser
# than in the schema of JobSet's CRD (0.13, kubernetes-sigs/jobset at 08dfbdf). Each: its type, or
# the fields of an object, with "!" behind those that have to be there.
POD = {
    "restartPolicy": {"Never", "OnFailure"},
    "terminationGracePeriodSeconds": int,
    "containers!": [{
        "name!": str, "image": str, "command": [str], "ports": [{"containerPort!": int}],
        "resources": {"limits": {"nvidia.com/gpu": int}},
        "volumeMounts": [{"name!": str, "mountPath!": str}],
    }],
    "volumes": [{
        "name!": str, "persistentVolumeClaim": {"claimName!": str},
        "emptyDir": {"medium": str, "sizeLimit": str},
    }],
}  # fmt: skip
JOB = {
    "parallelism": int, "completions": int, "completionMode": {"Indexed", "NonIndexed"},
    "backoffLimit": int, "template!": {"spec!": POD},
}  # fmt: skip
JOB_SET = {
    "apiVersion!": {"jobset.x-k8s.io/v1alpha2"}, "kind!": {"JobSet"}, "metadata!": {"name!": str},
    "spec!": {
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [{"name!": str, "replicas": int, "template!": {"spec!": JOB}}],
    },
}  # fmt: skip


def wrong(value: Any, kind: Any, at: str = "") -> Iterator[str]:
    """Where a value is not of its kind."""
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            yield f"{at}: {value!r}"
            return
        known = {name.rstrip("!"): inner for name, inner in kind.items()}
        yield from (f"{at}.{name}: unknown" for name in value.keys() - known.keys())
        missing = {n[:-1] for n in kind if n.endswith("!")} - value.keys()
        yield from (f"{at}.{name}: missing" for name in missing)
        for name in value.keys() & known.keys():
            yield from wrong(value[name], known[name], f"{at}.{name}")
    elif isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{at}: {value!r}"
            return
        for number, item in enumerate(value):
            yield from wrong(item, kind[0], f"{at}[{number}]")
    elif isinstance(kind, set):
        yield from [] if value in kind else [f"{at}: {value!r}"]
    elif type(value) is not kind:
        yield f"{at}: {value!r}"


def test_jobset() -> None:
    text = (EXAMPLES / "kubernetes" / "jobset.yaml").read_text()
    found = yaml.safe_load(text)
    assert not list(wrong(found, JOB_SET))
    [job] = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    options = dict(x.removeprefix("--").split("=") for x in container["command"] if "=" in x)
    assert spec["parallelism"] == spec["completions"] == int(options["nnodes"])
    assert int(options["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    # <jobset>-<replicated job>-<job's number>-<pod's number>.<jobset>
    name = found["metadata"]["name"]
    port = container["ports"][0]["containerPort"]
    assert options["rdzv-endpoint"] == f"{name}-{job['name']}-0-0.{name}:{port}"
    grace = spec["template"]["spec"]["terminationGracePeriodSeconds"]
    assert 0 < int(options["shutdown-timeout"]) < grace
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


@pytest.mark.parametrize(
    ("before", "after", "where"),
    [
        ("maxRestarts: 10", 'maxRestarts: "10"', ".spec.failurePolicy.maxRestarts: '10'"),
        ("restartPolicy:", "restartPolice:", "template.spec.restartPolice: unknown"),
        ("completionMode: Indexed", "completionMode: indexed", "completionMode: 'indexed'"),
        ("name: node", "names: node", "replicatedJobs[0].name: missing"),
    ],
)
def test_what_is_wrong_in_a_jobset_is_seen(before: str, after: str, where: str) -> None:
    text = (EXAMPLES / "kubernetes" / "jobset.yaml").read_text()
    assert before in text
    found = list(wrong(yaml.safe_load(text.replace(before, after)), JOB_SET))
    assert any(line.endswith(where) for line in found), found
