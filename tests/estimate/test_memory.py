# SPDX-License-Identifier: Apache-2.0
"""What is held in a step, against what autograd holds in a real one."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from accelerate import DistributedDataParallelKwargs
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

from benchmarks.step.models import TINY, build_model, make_batch, set_checkpointing
from prereg_kernels import apply_pre, eager_pre_loss
from prereg_kernels.estimate import shipped
from prereg_kernels.estimate.head import Head, head_of
from prereg_kernels.estimate.memory import Moment, peak, timeline
from prereg_kernels.estimate.settings import Settings
from prereg_kernels.estimate.walk import walk
from prereg_kernels.train.parts import parts_of

CPU = torch.device("cpu")
DTYPES = {2: torch.bfloat16, 4: torch.float32}


class Kept:
    """Bytes of what autograd keeps, each storage once, parameters aside."""

    def __init__(self, parameters: Any = ()) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self.storages: dict[int, Any] = {}

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        self.storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    @property
    def bytes(self) -> int:
        return sum(s.nbytes() for p, s in self.storages.items() if p not in self.parameters)


@pytest.mark.parametrize("itemsize", DTYPES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("with_pre", [False, True])
def test_held_before_backward(itemsize: int, checkpointing: bool, with_pre: bool) -> None:
    recipe = TINY["llava"]
    config = recipe.config()
    model = build_model(config, CPU, DTYPES[itemsize])
    batch = make_batch(recipe, config, 3, CPU, DTYPES[itemsize])
    one = make_batch(recipe, config, 1, CPU, DTYPES[itemsize])
    on_meta = build_model(config, torch.device("meta"), DTYPES[itemsize])
    lengths = [one["input_ids"].shape[1] + more for more in (0, 32, 96)]
    structure = walk(on_meta, [one], "tiny", parts_of(on_meta), lengths=lengths)
    settings = Settings(
        images_per_step=3, tokens=recipe.text_tokens, checkpointing=checkpointing, gpu="cpu",
        weights="bfloat16" if itemsize == 2 else "float32",
    )  # fmt: skip
    visual = structure.visual_tokens
    head = head_of(structure, settings, visual, None) if with_pre else None
    moments = timeline(structure, settings, visual, head, "fused" if with_pre else "none")
    [at_loss] = [m for m in moments if m.phase == "loss"]
    held = at_loss.bytes["activations"]
    if head is not None:  # but for its weights and their state
        held += at_loss.bytes["pre"] - 3 * head.parameters * head.weight_itemsize
    set_checkpointing(model, checkpointing)
    if with_pre:
        apply_pre(model)
    kept = Kept(model.parameters())
    with saved_tensors_hooks(kept.pack, lambda x: x):
        loss = model(**batch).loss
    assert loss.requires_grad
    # Labels, ids, masks and rotations, of which a tiny model has many for its width
    assert abs(held / kept.bytes - 1) < 0.05


@pytest.mark.parametrize("itemsize", DTYPES)
def test_eager_pre_keeps(itemsize: int) -> None:
    rows, width = 640, 64
    head = Head(1, rows, width, ((96, width), (width, 96)), itemsize, itemsize, rows)
    dtype = DTYPES[itemsize]
    hidden = torch.randn(rows + 100, width, dtype=dtype, requires_grad=True)
    anchor = torch.randn(rows + 100, width, dtype=dtype)
    weights = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in head.shapes]
    kept = Kept([hidden, *weights])
    index = torch.arange(rows)
    with saved_tensors_hooks(kept.pack, lambda x: x):
        loss = eager_pre_loss(hidden, anchor, weights, visual_index=index)
    assert loss.requires_grad
    assert abs(head.eager_saved / (kept.bytes - index.nbytes) - 1) < 0.03


def at(moments: list[Moment], place: str) -> Moment:
    return next(m for m in moments if m.place == place)


def test_a_step_by_hand() -> None:
    """LLaVA on one GPU: the bytes of docs/gpu.md, before backward and in the middle of it."""
    structure = shipped.structure_of("llava-1.5-7b", ("projector", "llm"))
    settings = Settings(optimizer="sgd")
    head = head_of(structure, settings, 576, 80e9)
    moments = timeline(structure, settings, 576, head, "fused")
    tokens = 16 * 768
    highest = peak(moments)
    assert highest.phase == "loss"
    assert highest.bytes["weights"] == 2 * 7_063_427_072
    # 12 bytes a token and word are at the loss; 16 D + 8 D + 8 I a token in each layer, and q and
    # k before their rotation and the like, which take 5% more
    per_layer = 24 * 4096 + 8 * 11_008
    words = 12 * tokens * 32_064
    held = highest.bytes["activations"] + highest.bytes["scratch"] - words
    assert 1.0 < held / (32 * per_layer * tokens) < 1.08
    tap = at(moments, "PRe")
    assert tap.layer == 16
    assert 0.45 < tap.bytes["activations"] / highest.bytes["activations"] < 0.55
    own = 4 * head.parameters
    row = 2 * tokens * 4096
    assert tap.bytes["pre"] == 2 * own + head.scratch + 2 * row  # held since forward, and a result


def test_nothing_is_left() -> None:
    """After backward there are weights, gradients, state, and nothing else."""
    structure = shipped.structure_of("llava-1.5-7b", ("projector", "llm"))
    for checkpointing in (False, True):
        settings = Settings(checkpointing=checkpointing)
        head = head_of(structure, settings, 576, 80e9)
        last = timeline(structure, settings, 576, head, "fused")[-1]
        trained = structure.parameters(("projector", "llm"))
        words = 16 * (768 * 8 + 300)  # the embedding's indices
        assert last.bytes["gradients"] == pytest.approx(2 * trained)
        assert last.bytes["optimizer"] == 4 * trained
        assert abs(last.bytes["activations"]) < words
        own = head.parameters * head.weight_itemsize
        assert last.bytes["pre"] == pytest.approx(4 * own)  # with its gradient and two numbers


@pytest.mark.parametrize(
    ("parallel", "weights", "optimizer", "gradients"),
    [
        ("ddp", 1.0, 1.0, 2.0), ("fsdp", 1 / 64, 1 / 64, 1 / 64), ("zero2", 1.0, 3 / 64, 1 / 64),
        ("zero3", 1 / 64, 3 / 64, 1 / 64), ("tp", 1 / 8, 1 / 8, 2 / 8),
    ],
)  # fmt: skip
def test_shares(parallel: str, weights: float, optimizer: float, gradients: float) -> None:
    """ZeRO keeps three float32 numbers, 12 bytes, where the others keep two of bfloat16, 4. DDP has
    the gradients in its buckets, too."""
    structure = shipped.structure_of("llava-1.5-7b", ("projector", "llm"))
    settings = Settings(gpus=64, parallel=parallel)
    last = timeline(structure, settings, 576, None, "none")[-1]
    trained = structure.parameters(("projector", "llm"))
    assert last.bytes["weights"] == pytest.approx(2 * structure.parameters() * weights)
    assert last.bytes["optimizer"] == pytest.approx(4 * trained * optimizer)
    assert last.bytes["gradients"] == pytest.approx(2 * trained * gradients)


def test_ddp_has_gradients_beside_its_buckets() -> None:
    """By default, in torch and as accelerate makes it for Trainer."""
    for maker in (DistributedDataParallel, DistributedDataParallelKwargs):
        assert signature(maker).parameters["gradient_as_bucket_view"].default is False


def test_buckets_are_there_all_the_time() -> None:
    """Before backward the gradients are there once, with the head's, and twice at its end."""
    structure = shipped.structure_of("llava-1.5-7b", ("projector", "llm"))
    settings = Settings(gpus=8)
    head = head_of(structure, settings, 576, 80e9)
    moments = timeline(structure, settings, 576, head, "fused")
    gradients = 2 * structure.parameters(("projector", "llm"))
    assert moments[0].bytes["gradients"] == pytest.approx(gradients)
    assert moments[-1].bytes["gradients"] == pytest.approx(2 * gradients)
    own = head.parameters * head.weight_itemsize
    assert moments[0].bytes["pre"] == pytest.approx(4 * own)  # two of the state's
    assert moments[-1].bytes["pre"] == pytest.approx(5 * own)
