# SPDX-License-Identifier: Apache-2.0
"""The training-step benchmark's own code, where there is no GPU: sums, checks, a tiny run."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.program import Session
from benchmarks.common.report import summarize_variant
from benchmarks.common.timing import CpuClock, Effort
from benchmarks.step import gpu
from benchmarks.step.flops import count_flops
from benchmarks.step.measure import Trainer, add_differences, head_bytes, run_setting
from benchmarks.step.models import (
    FULL,
    TINY,
    build_model,
    make_batch,
    set_checkpointing,
    tower_of,
)
from benchmarks.step.report import step_bars, step_table
from benchmarks.step.variants import (
    OURS,
    VARIANTS,
    WITHOUT,
    Attached,
    Regularizer,
    WrongGradientError,
    attached,
    check_gradients,
    hooked,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, dict[str, Tensor]]]:
    made = {}
    for name, recipe in TINY.items():
        config = recipe.config()
        made[name] = build_model(config, CPU), make_batch(recipe, config, 2, CPU)
    return made


@pytest.fixture(scope="module", params=tuple(TINY))
def results(request: pytest.FixtureRequest, tmp_path_factory: Any) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("step") / "step.json"
    arguments = ["--out", str(out), "--size", "tiny", "--model", request.param]
    assert gpu.main(arguments) == 0
    return json.loads(out.read_text())


def test_file_has_what_it_promises(results: dict[str, Any]) -> None:
    assert results["complete"] is True
    assert results["problems"] == []
    assert {"device", "torch", "transformers", "commit", "dirty"} <= results["machine"].keys()
    checked = {name for name in VARIANTS if name != WITHOUT}
    assert [errors.keys() for errors in results["check"].values()] == [checked, checked]
    assert [setting["checkpointing"] for setting in results["settings"]] == [False, True]
    for setting in results["settings"]:
        assert setting["variants"].keys() == VARIANTS.keys()
        for variant in setting["variants"].values():
            assert variant["status"] == "ok"
            assert len(variant["samples_ms"]) == 2
            assert variant["peak_bytes"] is None
        assert setting["tower_ms"] > 0
    # 64 -> 64 -> 64 with biases, bfloat16
    expected = 2 * (2 * 64 * 64 + 2 * 64)
    assert results["head_bytes"] == {"parameters": expected, "gradients": expected, "optimizer": 0}


def test_table_ends_with_the_bars(results: dict[str, Any]) -> None:
    lines = step_table(results).splitlines()
    assert "memory: not measured, there is no GPU" in lines
    assert [line.split(":")[0] for line in lines[-4:]] == [
        f"checkpointing {state}, {OURS}" for state in ("off", "off", "on", "on")
    ]
    assert lines[-1].endswith("not measured")
    assert lines[-2].endswith(("met", "MISSED"))


@pytest.mark.parametrize("name", tuple(TINY))
def test_the_bytes_of_every_head_are_those_that_are_subtracted(models: Any, name: str) -> None:
    model, _ = models[name]
    regularizer = Regularizer.of(model)
    for variant in VARIANTS.keys() - {WITHOUT}:
        with attached(model, VARIANTS[variant], regularizer) as step:
            assert step.head is not None
            taken = sum(x.nbytes for x in step.head.parameters())
        assert taken == head_bytes(regularizer, model)["parameters"], variant


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("name", tuple(TINY))
def test_flops_are_those_that_torch_counts(models: Any, name: str, checkpointing: bool) -> None:
    model, batch = models[name]
    set_checkpointing(model, checkpointing)
    regularizer = Regularizer.of(model)
    flops = count_flops(TINY[name], model.config, 2, checkpointing)

    def counted(variant: str) -> int:
        with attached(model, VARIANTS[variant], regularizer) as step:
            counter = FlopCounterMode(display=False)
            with counter:
                step.loss(batch).backward()
        model.zero_grad()
        counts = counter.get_flop_counts()["Global"]
        return sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))

    base = counted(WITHOUT)
    vision = model.config.vision_config
    if name == "llava":
        tokens = 2 * 17  # CLIP's attention, and its embedding, which is a convolution
        other = 2 * tokens * 4 * 17 * 32 + 2 * (2 * 16 * 3 * 64 * 32)
    else:
        patches = 2 * 64  # a layer sees all, a layer windows of 16
        other = patches * 4 * 32 * (64 + 16) + 2 * patches * 3 * 2 * 16 * 32
    assert vision.hidden_size == 32
    assert base == flops.without_head - flops.attention - other
    assert counted("naive") - base == counted("eager, hook") - base == flops.head
    # what a custom op does inside is not seen, and nothing else is computed, or computed again
    assert counted(OURS) == base
    set_checkpointing(model, False)


def test_flops_of_the_real_models() -> None:
    """By hand: six matmuls a token in the head, against six a weight and token in the LLM."""
    llava, qwen = (
        count_flops(FULL[name], FULL[name].config(), FULL[name].batch, False)
        for name in ("llava", "qwen")
    )
    assert llava.head == 6 * 16 * 576 * 2 * 4096**2
    assert llava.decoder == 6 * 16 * 768 * 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    assert qwen.head == 6 * 8 * 1152 * 2 * 3584**2
    assert llava.head_percent == pytest.approx(0.37, abs=0.005)
    assert qwen.head_percent == pytest.approx(0.287, abs=0.005)


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("name", tuple(TINY))
def test_variants_have_the_same_gradients(models: Any, name: str, checkpointing: bool) -> None:
    model, batch = models[name]
    set_checkpointing(model, checkpointing)
    report = check_gradients(model, batch)
    assert report.keys() == {name for name in VARIANTS if name != WITHOUT}
    for errors in report.values():
        assert 0 < errors["head"] < 0.05
        assert 0 < errors["layer"] < 0.1
    set_checkpointing(model, False)


def scaled(factor: float, model: Any, regularizer: Regularizer) -> Attached:
    return hooked(model, Regularizer(regularizer.layer, regularizer.state, factor * 4.0))


def wrong_layer(model: Any, regularizer: Regularizer) -> Attached:
    return hooked(model, Regularizer(regularizer.layer + 1, regularizer.state, 4.0))


def detached(model: Any, regularizer: Regularizer) -> Attached:
    """Trains the head alone."""
    variant = hooked(model, regularizer)
    layer = model.model.language_model.layers[regularizer.layer - 1]
    handle = layer.register_forward_hook(lambda module, args, output: output.detach())
    inner = variant.detach

    def detach() -> None:
        handle.remove()
        inner()

    return Attached(variant.loss, variant.head, detach)


@pytest.mark.parametrize("broken", (partial(scaled, 1.1), wrong_layer, detached))
def test_a_wrong_variant_is_caught(models: Any, broken: Any) -> None:
    model, batch = models["llava"]
    with pytest.raises(WrongGradientError, match="gradient of"):
        check_gradients(model, batch, {"broken": broken})
    model.zero_grad()


def test_variants_leave_no_trace(models: Any) -> None:
    model, _ = models["llava"]
    regularizer = Regularizer.of(model)
    names = list(model.state_dict())
    layer = model.model.language_model.layers[regularizer.layer - 1]
    hooks = len(layer._forward_hooks)
    for attach in VARIANTS.values():
        with attached(model, attach, regularizer):
            pass
    assert list(model.state_dict()) == names
    assert len(layer._forward_hooks) == hooks


def test_the_tower_is_frozen_and_the_projector_trains(models: Any) -> None:
    for name, (model, batch) in models.items():
        model(**batch).loss.backward()
        trained = {n for n, p in model.named_parameters() if p.grad is not None}
        frozen = {n for n, p in tower_of(model).named_parameters() if p.grad is None}
        assert len(frozen) > 10
        assert any("merger" in n or "projector" in n for n in trained), name
        assert any("embed_tokens" in n for n in trained)
        model.zero_grad()


def test_wrong_gradients_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(model: Any, batch: Any) -> None:
        raise WrongGradientError("gradient of head.weight_0")

    monkeypatch.setattr(gpu, "check_gradients", wrong)
    out = tmp_path / "step.json"
    assert gpu.main(["--out", str(out), "--size", "tiny"]) == 1
    assert json.loads(out.read_text())["settings"] == []
    assert "gradient of head.weight_0" in capsys.readouterr().out


def test_the_batch_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(TINY["llava"], batch=4)
    model = build_model(recipe.config(), CPU)
    session = Session(CpuClock(), time.monotonic() + 600)
    trainer = Trainer(session, recipe, model, Regularizer.of(model))
    stepper = Trainer.stepper

    def limited(self: Trainer, variant: Attached, batch: dict[str, Tensor]) -> Any:
        peer = variant.head is not None and not hasattr(model, "pre_heads")
        if len(batch["input_ids"]) > (1 if peer else 2):
            raise torch.OutOfMemoryError("too large")
        return stepper(self, variant, batch)

    monkeypatch.setattr(Trainer, "stepper", limited)
    record: dict[str, Any] = {}
    run_setting(trainer, False, Effort(2, 2, 0.0), record)
    assert record["batch"] == 2
    assert record["backed_off"] == [{"batch": 4, "reason": "out of memory"}]
    status = {name: variant["status"] for name, variant in record["variants"].items()}
    assert status == {WITHOUT: "ok", "naive": "failed", "eager, hook": "failed", OURS: "ok"}
    assert not session.ours_failed  # a peer that does not fit is a result
    assert all(p.grad is None for p in model.parameters())


def test_differences() -> None:
    def variant(samples: list[float], peak: int | None) -> dict[str, Any]:
        return summarize_variant(samples) | {"peak_bytes": peak}

    variants = {
        WITHOUT: variant([100.0, 102.0, 104.0], 1000),
        OURS: variant([101.0, 103.02, 104.0], 1030),
        "naive": variant([110.0, 120.0, 130.0], None),
        "eager, hook": {"status": "failed", "reason": "out of memory"},
    }
    variants["naive"]["peak_bytes"] = 1500
    head = {"parameters": 10, "gradients": 10, "optimizer": 0}
    add_differences(variants, head, tower_ms=51.0)
    ours = variants[OURS]
    assert ours["added_ms"] == pytest.approx(1.02)
    assert ours["added_percent"] == pytest.approx(1.0)
    assert ours["added_percent_llm"] == pytest.approx(2.0)  # of 51 ms
    assert ours["added_percent_paired"] == pytest.approx(1.0)
    assert ours["added_percent_quartiles"] == pytest.approx([0.0, 1.0])
    assert (ours["added_bytes"], ours["beyond_bytes"]) == (30, 10)
    assert ours["beyond_percent"] == pytest.approx(1.0)
    assert variants["naive"]["beyond_bytes"] == 480
    setting = {"name": "off", "variants": variants, "flops": {"head_percent": 0.4}}
    time, memory = step_bars({"settings": [setting]})
    assert (time["bar"], time["aim"], time["met"], time["aim_met"]) == (1.0, 0.4, True, False)
    assert (memory["bar"], memory["aim"], memory["met"]) == (1.0, 0.0, True)


def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.parse(["--out", str(tmp_path / "x.json")])
    assert "no GPU here" in capsys.readouterr().err
