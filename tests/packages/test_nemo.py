# SPDX-License-Identifier: Apache-2.0
"""PRe in NeMo AutoModel 0.7's own recipe for multimodal models, which runs here on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForImageTextToText

from prereg_kernels import apply_pre, eager_pre_loss
from tests.attached import seen
from tests.encoder_rows import tower_rows
from tests.helpers import relative_error
from tests.packages.checkpoint import make_llava
from tests.packages.nemo_run import IMAGE
from tests.packages.run import QUIET, ROOT, folder_of

pytestmark = pytest.mark.packages
WEIGHT, LAYERS = 0.7, [1, 3]
LORA = {
    "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
    "target_modules": ["*language_model*_proj"], "dim": 4, "alpha": 8, "use_triton": False,
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Of a run: its first step, the weights at the end, the lines of its log, its checkpoints."""

    start: dict[str, Any]
    end: dict[str, Tensor]
    logs: list[dict[str, float]]
    checkpoints: Path
    text: str = ""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("model"))


def config_of(model: Path, out: Path, **changes: Any) -> dict[str, Any]:
    policy = dict.fromkeys(("param_dtype", "reduce_dtype", "output_dtype"), "float32")
    here = "tests.packages.nemo_run"
    return {
        "recipe": "prereg_kernels.trainers.nemo.PReFinetuneRecipeForVLM",
        "pre": {"weight": WEIGHT, "layers": LAYERS, "anchor": "pre_projector"},
        "seed": 0,
        "step_scheduler": {
            "global_batch_size": 4, "local_batch_size": 2, "ckpt_every_steps": 2,
            "val_every_steps": 100, "num_epochs": 1, "max_steps": 4,
        },
        "dist_env": {"backend": "gloo", "timeout_minutes": 1},
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForImageTextToText.from_pretrained",
            "pretrained_model_name_or_path": str(model), "attn_implementation": "sdpa",
            "torch_dtype": "float32", "use_liger_kernel": False,
        },
        "checkpoint": {
            "enabled": True, "checkpoint_dir": str(out), "model_save_format": "safetensors",
            "save_consolidated": "every",
        },
        "distributed": {"strategy": "fsdp2", "mp_policy": policy},
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
        "dataset": {"_target_": f"{here}.make_rows", "split": "train"},
        "dataloader": {
            "_target_": "torchdata.stateful_dataloader.StatefulDataLoader", "num_workers": 0,
            "collate_fn": {"_target_": f"{here}.collate"},
        },
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1.0e-3, "weight_decay": 0.0},
        "clip_grad_norm": {"max_norm": 1.0e9},
        **changes,
    }  # fmt: skip


def start(model: Path, out: Path, ranks: int, program: list[str], **changes: Any) -> Any:
    """A program of Python's that gets the settings' file last, on so many ranks."""
    out.mkdir(parents=True, exist_ok=True)
    config = out / "config.yaml"
    config.write_text(yaml.safe_dump(config_of(model, out / "checkpoints", **changes)))
    if ranks > 1:
        ranked = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        program = [*ranked, *program]
    return subprocess.run(
        [sys.executable, *program, str(config)], cwd=out, text=True, timeout=300,
        env={**os.environ, **QUIET, "PYTHONPATH": f"{out}:{folder_of('nemo')}:{ROOT}"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def train(model: Path, out: Path, ranks: int = 1, fails: bool = False, **changes: Any) -> Result:
    done = start(model, out, ranks, ["-m", "tests.packages.nemo_run", str(out)], **changes)
    assert (done.returncode != 0) == fails, done.stdout[-5000:]
    if fails:
        return Result({}, {}, [], out, done.stdout)
    return Result(
        torch.load(out / "start.pt"), torch.load(out / "end.pt"), read_log(out),
        out / "checkpoints", done.stdout,
    )  # fmt: skip


def read_log(out: Path) -> list[dict[str, float]]:
    return list(map(json.loads, (out / "checkpoints" / "training.jsonl").read_text().splitlines()))


def expected(model_path: Path, step: dict[str, Any]) -> tuple[dict[str, Tensor], float, float]:
    """The gradients of the step's objective in float64, L_LM and L_PRe, by the definition."""
    model: Any = AutoModelForImageTextToText.from_pretrained(
        model_path, dtype=torch.float64, attn_implementation="eager"
    ).train()
    weights = {name: x.double().requires_grad_() for name, x in step["weights"].items()}
    heads = {n: x for n, x in weights.items() if "pre_heads" in n}
    adapted = {n: x for n, x in weights.items() if "lora_" in n}
    plain = {n: x for n, x in weights.items() if n not in heads | adapted}
    for name, x in adapted.items():
        if ".lora_A." in name:  # in the matrix that it adapts
            matrix = name.replace(".lora_A.", ".")
            product = weights[name.replace("lora_A", "lora_B")] @ x
            plain[matrix] = plain[matrix] + product * LORA["alpha"] / LORA["dim"]
    losses: list[Tensor] = []
    hidden: dict[int, list[Tensor]] = {layer: [] for layer in LAYERS}
    anchors: list[Tensor] = []
    labels = sum(int((batch["labels"] != -100).sum()) for batch in step["batches"])
    for batch in step["batches"]:
        inputs = {n: x for n, x in batch.items() if n != "labels"}
        inputs["pixel_values"] = inputs["pixel_values"].double()
        with seen(model) as states:
            logits = torch.func.functional_call(model, plain, (), inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        losses.append(loss)
        mask = batch["input_ids"] == IMAGE
        anchors.append(tower_rows(model, inputs))
        for layer in LAYERS:
            hidden[layer].append(states[layer][mask])
    terms = [
        eager_pre_loss(
            torch.cat(hidden[layer]), torch.cat(anchors),
            [weights[f"pre_heads.{layer}.weight_{i}"] for i in range(2)],
            [weights[f"pre_heads.{layer}.bias_{i}"] for i in range(2)],
        )
        for layer in LAYERS
    ]  # fmt: skip
    lm, term = torch.stack(losses).sum() / labels, torch.stack(terms).mean()
    (lm + WEIGHT * term).backward()
    named = {n: x.grad for n, x in weights.items() if n in step["gradients"]}
    return named, lm.item(), term.item()


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    place = tmp_path_factory.mktemp("runs")
    return {
        "full": train(model, place / "full"),
        "lora": train(model, place / "lora", peft=LORA),
    }


@pytest.mark.parametrize("name", ("full", "lora"))
def test_gradients_of_a_step(model: Path, runs: dict[str, Result], name: str) -> None:
    """Two micro-batches of other counts of labels and of visual tokens."""
    run = runs[name]
    counts = [(batch["input_ids"] == IMAGE).sum() for batch in run.start["batches"]]
    assert len(counts) == 2
    truth, lm, term = expected(model, run.start)
    ours = run.start["gradients"]
    assert sum("pre_heads" in n for n in ours) == 8
    assert any("lora_A" in n for n in ours) == (name == "lora")
    for parameter, x in truth.items():
        if x is not None and x.norm() > 1e-6:
            assert relative_error(ours[parameter], x) < 1e-5, parameter
    assert run.logs[0]["loss"] == pytest.approx(lm, rel=1e-5)
    assert run.logs[0]["pre_loss"] == pytest.approx(term, rel=1e-5)


@pytest.mark.parametrize("name", ("full", "lora"))
def test_the_frozen_projector_is_told_of(runs: dict[str, Result], name: str) -> None:
    """NeMo's LoRA always freezes it."""
    assert runs[name].text.count("is frozen beside the LoRA adapter") == (name == "lora")


@pytest.mark.parametrize("name", ("full", "lora"))
def test_the_heads_train(runs: dict[str, Result], name: str) -> None:
    run = runs[name]
    for parameter, x in run.end.items():
        if "pre_heads" in parameter:
            assert (x - run.start["weights"][parameter]).abs().max() > 1e-3
    assert run.logs[-1]["pre_loss"] < run.logs[0]["pre_loss"]


def assert_same_gradients(ours: Result, expected: Result) -> None:
    """In the first step."""
    found, wanted = ours.start["gradients"], expected.start["gradients"]
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-6)


def test_two_ranks_are_one_process(model: Path, runs: dict[str, Result], tmp_path: Path) -> None:
    """FSDP2 over two ranks, whose model is made on the meta device."""
    run = train(model, tmp_path / "ranks", ranks=2)
    for ours, one in zip(run.logs, runs["full"].logs, strict=True):
        assert ours["pre_loss"] == pytest.approx(one["pre_loss"], rel=1e-4, abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert_same_gradients(run, runs["full"])


@pytest.mark.parametrize(
    "program",
    (
        ["-m", "nemo_automodel.cli.app"],  # as the page says
        [str(ROOT / "prereg_kernels" / "trainers" / "nemo.py"), "-c"],  # as `automodel` itself does
    ),
    ids=("torchrun", "automodel"),
)
def test_started_on_several_gpus(
    model: Path, runs: dict[str, Result], tmp_path: Path, program: list[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nfrom tests.packages.nemo_run import show_cpu\n"
        "if 'LOCAL_RANK' in os.environ:\n    show_cpu()\n"
    )
    done = start(model, tmp_path, 2, program)
    assert done.returncode == 0, done.stdout[-5000:]
    for ours, one in zip(read_log(tmp_path), runs["full"].logs, strict=True):
        assert ours["pre_loss"] == pytest.approx(one["pre_loss"], rel=1e-4, abs=1e-6)


def test_four_are_two_twice(model: Path, runs: dict[str, Result], tmp_path: Path) -> None:
    changes = {"step_scheduler": config_of(model, tmp_path)["step_scheduler"]}
    changes["step_scheduler"] |= {"local_batch_size": 4, "max_steps": 1}
    run = train(model, tmp_path / "once", **changes)
    assert len(run.start["batches"]) == 1
    assert_same_gradients(run, runs["full"])


@pytest.mark.parametrize("name", ("full", "lora"))
def test_resumed_is_uninterrupted(
    model: Path, runs: dict[str, Result], tmp_path: Path, name: str
) -> None:
    changes: dict[str, Any] = {"peft": LORA} if name == "lora" else {}
    settings = config_of(model, tmp_path)["step_scheduler"]
    out = tmp_path / "resumed"
    train(model, out, step_scheduler=settings | {"max_steps": 2}, **changes)
    again = train(model, out, step_scheduler=settings, **changes)
    assert [line["step"] for line in again.logs] == [0, 1, 2, 3]
    for parameter, x in runs[name].end.items():
        assert torch.equal(again.end[parameter], x), parameter


def test_a_checkpoint_is_a_plain_model_and_the_heads(model: Path, runs: dict[str, Result]) -> None:
    checkpoint = runs["full"].checkpoints / "epoch_0_step_3"
    for path in (checkpoint / "model").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert not any("pre_heads" in name for name in file.keys())  # noqa: SIM118
    plain, loaded = AutoModelForImageTextToText.from_pretrained(
        checkpoint / "model" / "consolidated", output_loading_info=True
    )
    assert not loaded["unexpected_keys"] and not loaded["missing_keys"]
    pre = apply_pre(plain, from_pretrained=checkpoint / "pre")
    assert list(pre.heads) == LAYERS and pre.config.weight == WEIGHT
    end = runs["full"].end
    for name, x in plain.named_parameters():
        assert torch.equal(x, end[name]), name


@pytest.mark.parametrize(
    ("name", "value", "usual"),
    (("head_learning_rate", 0.01, None), ("weight_schedule", "cosine", "constant")),
)
def test_what_the_recipe_would_not_follow_is_an_error(
    model: Path, tmp_path: Path, name: str, value: Any, usual: Any
) -> None:
    pre = {"weight": WEIGHT, "layers": LAYERS, name: value}
    run = train(model, tmp_path / "refused", fails=True, pre=pre)
    assert f"ValueError: {name}: expected {usual!r} in NeMo AutoModel" in run.text


def test_parallelism_that_splits_a_sequence_is_an_error(model: Path, tmp_path: Path) -> None:
    distributed = config_of(model, tmp_path)["distributed"] | {"tp_size": 2}
    run = train(model, tmp_path / "tp", ranks=2, fails=True, distributed=distributed)
    assert "ValueError: distributed: expected each rank to run the whole model" in run.text
    assert "got tp_size=2" in run.text
