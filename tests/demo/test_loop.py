# SPDX-License-Identifier: Apache-2.0
"""The loop: exact accumulation, and a killed run that ends where an unbroken one does."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from prereg_kernels.attach.regularizer import apply_pre
from prereg_kernels.demo.checkpoints.checkpoint import latest_checkpoint
from prereg_kernels.demo.config import CONTROLS, PReSettings, StageConfig, save_config
from prereg_kernels.demo.data.packing import IGNORE, Packer, TrainStream, build_tokenizer
from prereg_kernels.demo.data.questions import COMMON_FAMILIES
from prereg_kernels.demo.data.scenes import SceneConfig, Scenes
from prereg_kernels.demo.loop import (
    PRE_DIR,
    Stepper,
    TrainingInterrupted,
    _attach_pre,
    load_model,
    train,
)
from prereg_kernels.demo.metrics import read_metrics
from prereg_kernels.demo.model.llava import (
    build_model,
    image_features,
    other_scene_anchor,
    set_trainable,
)
from prereg_kernels.demo.model.tower import new_model
from prereg_kernels.demo.schedule import cosine_with_warmup
from prereg_kernels.demo.stages import accumulate_gradients, train_stage
from prereg_kernels.ops.reference import eager_pre_loss
from tests.demo.tiny import MODEL, signal_in_step, tiny_run

MIX = dict.fromkeys(COMMON_FAMILIES, 1.0)


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    heads = checkpoint / PRE_DIR / "pre_heads.safetensors"
    weights = load_file(checkpoint / "model.safetensors")
    return {**weights, **{f"heads.{name}": x for name, x in load_file(heads).items()}}


def _assert_same_run(one: Path, other: Path) -> None:
    """Bitwise equal weights, heads and metrics (but for the time that steps took)."""
    name = "step-00000008"
    a, b = (_weights(run / "checkpoints" / name) for run in (one, other))
    assert a.keys() == b.keys() and len(a) > 20
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    lines = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run)]
        for run in (one, other)
    ]
    assert [line["step"] for line in lines[1]] == list(range(1, 9))
    assert lines[0] == lines[1]
    assert ["pre_loss" in line for line in lines[0]] == [False] * 3 + [True] * 5


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tower for all runs here."""
    return tmp_path_factory.mktemp("towers")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    train(tiny_run(), out, cache_dir=cache_dir, progress=False, tensorboard=True)
    return out


@pytest.mark.parametrize("with_pre", [False, True])
def test_one_by_eight_is_four_by_two(with_pre: bool) -> None:
    """With answers spread unevenly over the micro-batches, which naive averaging gets wrong."""
    packer = Packer(build_tokenizer(SceneConfig()), 36)
    [whole] = TrainStream(Scenes("train", 0), packer, MIX, 4, 8).micro_batches(0)
    for b, dropped in enumerate((0, 3, 3, 2, 0, 0, 1, 2)):
        answers = torch.nonzero(whole["labels"][b] != IGNORE).flatten()
        whole["labels"][b, answers[:dropped]] = IGNORE
    parts = [{name: x[i : i + 2] for name, x in whole.items()} for i in (0, 2, 4, 6)]
    results = []
    for batches in ([whole], parts):
        model = build_model(MODEL, SceneConfig(), packer.tokenizer, seed=1).double().train()
        pre = apply_pre(model, layers=[1], weight=2.0) if with_pre else None
        doubled = [{**b, "pixel_values": b["pixel_values"].double()} for b in batches]
        values = accumulate_gradients(model, doubled, pre)
        results.append((values, {n: p.grad for n, p in model.named_parameters()}))
    (values, grads), (values_split, grads_split) = results
    assert values.keys() == ({"lm_loss", "pre_loss"} if with_pre else {"lm_loss"})
    for name, value in values.items():
        assert abs(value - values_split[name]) < 1e-6, name  # the loss itself is fp32
    compared = [name for name, grad in grads.items() if grad is not None and grad.norm() > 0]
    assert len(compared) > 30 and any("pre_heads" in name for name in compared) == with_pre
    for name in compared:
        torch.testing.assert_close(grads[name], grads_split[name], rtol=1e-5, atol=1e-9)


# Forks runs from one process, as importing takes longer than a run, and kills each at a random
# moment after its first step; one that ends before that is complete, and a new one begins.
KILLER = """
import os, random, signal, sys, time
import torch; torch.set_num_threads(1)
from prereg_kernels.demo import loop, stages
from prereg_kernels._util.settings_file import load_config
from prereg_kernels.demo.config import RunConfig

config, runs, cache_dir, seed, wanted = sys.argv[1:]
moments = random.Random(int(seed))
step = stages._step

def child(out, started):
    def slow(*args):
        os.write(started, b".")
        time.sleep(0.04)
        return step(*args)
    stages._step = slow
    loop.train(load_config(config, RunConfig), out, cache_dir=cache_dir, progress=False,
               tensorboard=False)

kills = run = 0
while kills < int(wanted):
    started, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child(os.path.join(runs, str(run)), write_end)
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    if os.read(started, 1):
        time.sleep(moments.uniform(0, 0.4))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(started)
    if os.WIFSIGNALED(status):
        kills += 1
    elif status:
        sys.exit(f"run {run} failed after {kills} kills")
    else:
        run += 1
"""


def test_killed_and_resumed_is_bitwise_unbroken(
    unbroken: Path, tmp_path: Path, cache_dir: Path
) -> None:
    """Killed anywhere: in a step, between two, in the middle of a checkpoint, and again."""
    config, runs = tmp_path / "run.yaml", tmp_path / "runs"
    save_config(tiny_run(), config)
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the kills: {seed}")  # pytest shows it where this fails
    command = [sys.executable, "-c", KILLER, str(config), str(runs), str(cache_dir), str(seed), "5"]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=120)
    broken = sorted(runs.iterdir())
    assert broken
    for out in broken:
        train(tiny_run(), out, cache_dir=cache_dir, progress=False, tensorboard=False)
        _assert_same_run(unbroken, out)


@pytest.mark.parametrize("after_step", [2, 3, 5, 8])
def test_a_signal_ends_the_step_and_saves(
    unbroken: Path,
    tmp_path: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    after_step: int,
) -> None:
    """In the first stage, at the border between the stages, in the second, and at the end."""

    signal_in_step(monkeypatch, after_step)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted, match=f"stopped after step {after_step}; saved"):
        train(tiny_run(), tmp_path, cache_dir=cache_dir, progress=False, tensorboard=False)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert len(read_metrics(tmp_path)) == after_step
    monkeypatch.undo()
    train(tiny_run(), tmp_path, cache_dir=cache_dir, progress=False, tensorboard=False)
    _assert_same_run(unbroken, tmp_path)


def test_lines_after_the_last_checkpoint_are_dropped(
    unbroken: Path, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between checkpoints leaves metrics, a torn line among them, that are done again."""
    from prereg_kernels.demo import stages

    original, calls = stages._step, []

    def crashing(*args):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("crash")
        return original(*args)

    monkeypatch.setattr(stages, "_step", crashing)
    with pytest.raises(RuntimeError, match="crash"):
        train(tiny_run(), tmp_path, cache_dir=cache_dir, progress=False, tensorboard=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lm_l')
    monkeypatch.undo()
    train(tiny_run(), tmp_path, cache_dir=cache_dir, progress=False, tensorboard=False)
    _assert_same_run(unbroken, tmp_path)


def test_a_finished_run_has_nothing_left_to_do(unbroken: Path, cache_dir: Path) -> None:
    before = (unbroken / "metrics.jsonl").read_bytes()
    result = train(tiny_run(), unbroken, cache_dir=cache_dir, progress=False, tensorboard=False)
    assert result.seconds == 0.0
    assert (unbroken / "metrics.jsonl").read_bytes() == before
    assert result.checkpoint.name == "step-00000008"


def test_starting_anew_forgets_the_run_before(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the new run dies before its first checkpoint."""
    from prereg_kernels.demo import stages

    first = tiny_run(seed=1)
    train(first, tmp_path, cache_dir=cache_dir, progress=False, tensorboard=False)

    def crashing(*args: object) -> None:
        raise RuntimeError("crash")

    monkeypatch.setattr(stages, "_step", crashing)
    with pytest.raises(RuntimeError, match="crash"):
        train(first, tmp_path, False, cache_dir=cache_dir, progress=False, tensorboard=False)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) is None and read_metrics(tmp_path) == []


def test_another_config_does_not_resume(unbroken: Path, cache_dir: Path) -> None:
    config = tiny_run(pre=PReSettings(layer=1, weight=0.5, token_fraction=0.5))
    with pytest.raises(ValueError, match=r"pre\.weight: cannot resume .*2\.0.*asks for 0\.5"):
        train(config, unbroken, cache_dir=cache_dir, progress=False, tensorboard=False)


def test_a_checkpoint_is_a_plain_hugging_face_directory(unbroken: Path) -> None:
    path = unbroken / "checkpoints" / "step-00000008"
    model, info = LlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    saved = load_model(path).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_each_stage_has_its_own_schedule(unbroken: Path) -> None:
    lines = read_metrics(unbroken)
    assert [line["stage"] for line in lines] == [0] * 3 + [1] * 5
    expected = [cosine_with_warmup(i, 3, 1) for i in range(3)]
    expected += [cosine_with_warmup(i, 5, 1) for i in range(5)]
    assert [line["lr"] for line in lines] == pytest.approx([2e-3 * x for x in expected])


def test_tensorboard_has_the_steps(unbroken: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(unbroken / "tensorboard")).Reload()
    lines = read_metrics(unbroken)
    logged = [(event.step, event.value) for event in board.Scalars("lm_loss")]
    assert [step for step, _ in logged] == list(range(1, 9))
    for (_, value), line in zip(logged, lines, strict=True):
        assert abs(value - line["lm_loss"]) < 1e-5


def test_frozen_parts_stay_bitwise_what_they_were(unbroken: Path, tmp_path: Path) -> None:
    """The transfer test's setting: projector and the lower half of the decoder frozen."""
    source = unbroken / "checkpoints" / "step-00000008"
    stage = StageConfig("transfer", steps=2, warmup=1, trainable=("llm",), frozen_layers=1)
    config = tiny_run(stages=(stage,), init_from=str(source), families={"tilt": 1.0})
    result = train(config, tmp_path, progress=False, tensorboard=False)
    before, after = load_model(source).state_dict(), result.model.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        parts = ("vision_tower", "projector", "embed_tokens", "language_model.layers.0.")
        frozen = any(part in name for part in parts)
        assert torch.equal(before[name], after[name]) == frozen, name


def test_control_anchor_is_the_next_scene() -> None:
    packer = Packer(build_tokenizer(SceneConfig()), 36)
    [batch] = TrainStream(Scenes("train", 0), packer, MIX, 2, 3).micro_batches(0)
    model = build_model(MODEL, SceneConfig(), packer.tokenizer, seed=0).eval()
    with torch.no_grad():
        out = model(**batch).image_hidden_states
        states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True)
        seen = states.hidden_states[model.config.vision_feature_layer][:, 1:]
        for before, own in ((False, out.reshape(3, 36, -1)), (True, seen)):
            anchor = other_scene_anchor(model, before_projector=before)(batch).view(3, 36, -1)
            for scene in range(3):
                torch.testing.assert_close(anchor[scene], own[(scene - 1) % 3])
                assert not torch.allclose(anchor[scene], own[scene])
    assert image_features(model, batch["pixel_values"]).shape == anchor.flatten(0, 1).shape
    assert not torch.allclose(out.reshape(3, 36, -1), seen)


@pytest.mark.parametrize("anchor", CONTROLS.values())
def test_control_run_differs_from_pre(
    tmp_path: Path, cache_dir: Path, unbroken: Path, anchor: str
) -> None:
    config = tiny_run(pre=PReSettings(layer=1, anchor=anchor))
    train(config, tmp_path, cache_dir=cache_dir, progress=False, tensorboard=False)
    control, pre = read_metrics(tmp_path), read_metrics(unbroken)
    assert [line["lm_loss"] for line in control[:4]] == [line["lm_loss"] for line in pre[:4]]
    assert control[3]["pre_loss"] != pre[3]["pre_loss"]


def test_the_towers_output_can_be_the_target(
    tmp_path: Path, cache_dir: Path, unbroken: Path
) -> None:
    """Of an untrained model the value is that of the head against what the tower gives."""
    config = tiny_run(pre=PReSettings(layer=1, anchor="pre_projector"))
    train(config, tmp_path, cache_dir=cache_dir, progress=False, tensorboard=False)
    lines, others = read_metrics(tmp_path), read_metrics(unbroken)
    assert [line["lm_loss"] for line in lines[:4]] == [line["lm_loss"] for line in others[:4]]
    assert lines[3]["pre_loss"] != others[3]["pre_loss"]
    packer = Packer(build_tokenizer(SceneConfig()), 36)
    [batch] = TrainStream(Scenes("train", 0), packer, MIX, 2, 3).micro_batches(0)
    model = build_model(MODEL, SceneConfig(), packer.tokenizer, seed=0).train()
    pre = _attach_pre(model, config, config.stages[1], None)
    assert pre is not None
    accumulate_gradients(model, [batch], pre)
    found = pre.metrics()["pre_loss"]
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[1][:, :36].flatten(0, 1)
        tower = model.model.vision_tower(batch["pixel_values"]).last_hidden_state[:, 1:]
        expected = eager_pre_loss(
            hidden, tower.flatten(0, 1), pre.heads[1].weights, pre.heads[1].biases
        )
    assert found == pytest.approx(float(expected), abs=1e-5)


def test_bf16_trains(tmp_path: Path, cache_dir: Path) -> None:
    config = tiny_run(precision="bf16")
    result = train(config, tmp_path, cache_dir=cache_dir, progress=False, tensorboard=False)
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    assert all(line["lm_loss"] < 10 for line in read_metrics(tmp_path))


def test_training_off_the_main_thread_works(tmp_path: Path, cache_dir: Path) -> None:
    done = []
    config = replace(tiny_run(), stages=(StageConfig("short", steps=1),))
    worker = threading.Thread(
        target=lambda: done.append(
            train(config, tmp_path, cache_dir=cache_dir, progress=False, tensorboard=False)
        )
    )
    worker.start()
    worker.join()
    assert done[0].checkpoint.exists()


def test_stages_in_memory_are_those_of_a_run(
    unbroken: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Bit for bit, with PRe attached by hand where the run attaches it."""
    run = tiny_run()
    model = new_model(run, cache_dir)
    lines = train_stage(model, run, 0)
    pre = apply_pre(
        model,
        layers=run.pre.layer,
        weight=run.pre.weight,
        anchor=run.pre.anchor,
        token_fraction=run.pre.token_fraction,
    )
    lines += train_stage(model, run, 1, pre)
    stored = [
        {k: v for k, v in line.items() if k not in ("step", "seconds")}
        for line in read_metrics(unbroken)
    ]
    assert lines == stored
    model.save_pretrained(tmp_path)
    ours, theirs = _weights(tmp_path), _weights(unbroken / "checkpoints" / "step-00000008")
    assert ours.keys() == theirs.keys()
    assert [name for name, x in ours.items() if not torch.equal(x, theirs[name])] == []


def test_stepper_times_steps(cache_dir: Path) -> None:
    stage = StageConfig("all", steps=5, pre=True)
    stepper = Stepper(tiny_run(stages=(stage,)), cache_dir)
    assert all(0 < stepper.timed_step(i) < 5 for i in range(2))


def test_set_trainable_names_what_is_wrong() -> None:
    model = build_model(MODEL, SceneConfig(), build_tokenizer(SceneConfig()), seed=0)
    with pytest.raises(ValueError, match="trainable: unknown \\['head'\\]"):
        set_trainable(model, ("head",))
    with pytest.raises(ValueError, match="frozen_layers: expected 0 to 2"):
        set_trainable(model, ("llm",), 3)
