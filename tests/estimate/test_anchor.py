# SPDX-License-Identifier: Apache-2.0
"""The anchor "pre_projector" in an estimate: a wider head, and rows that only PRe keeps."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.step.models import TINY, build_model, make_batch
from prereg_kernels import apply_pre
from prereg_kernels.estimate import shipped
from prereg_kernels.estimate.estimate import estimate
from prereg_kernels.estimate.head import head_of
from prereg_kernels.estimate.report import describe
from prereg_kernels.estimate.settings import Settings
from prereg_kernels.estimate.structure import Structure
from prereg_kernels.estimate.walk import walk
from prereg_kernels.train.parts import parts_of
from tests.zoo import sample

# Of the vision encoder: LLaVA's are rows of it, the others' mergers join four
WIDTHS = {
    "llava-1.5-7b": 1024,
    "qwen2.5-vl-7b": 4 * 1280,
    "qwen2.5-vl-72b": 4 * 1280,
    "qwen3-vl-235b-a22b": 4 * 1152,
}


def walked(name: str) -> tuple[Any, Structure]:
    """A tiny model of this type, and its structure."""
    case = sample(name)
    twin = copy.deepcopy(case.model).to("meta")
    twin.tie_weights()
    batch = case.batches["images"].inputs
    lengths = [batch["input_ids"].shape[1] + more for more in (0, 64, 128)]
    return case.model, walk(twin, [batch], name, parts_of(case.model), lengths=lengths)


@pytest.mark.parametrize("name", ("llava", "qwen2_5_vl", "qwen3_vl"))
@pytest.mark.parametrize("anchor", ("pre_llm", "pre_projector"))
def test_the_head_is_the_one_that_trains(name: str, anchor: Any) -> None:
    model, structure = walked(name)
    head = head_of(structure, Settings(anchor=anchor), structure.visual_tokens, None)
    [real] = apply_pre(model, anchor=anchor).heads.values()
    shapes = [tuple(p.shape) for p in real.parameters() if p.dim() == 2]
    assert list(head.shapes) == shapes
    assert head.parameters == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("name", WIDTHS)
def test_shipped_widths(name: str) -> None:
    for trains in shipped.TRAINS:
        assert shipped.structure_of(name, trains).encoder_width == WIDTHS[name]


def test_a_family_without_it() -> None:
    _, structure = walked("lfm2_vl")
    with pytest.raises(ValueError, match=r"--anchor: expected pre_llm, .* lfm2_vl; got pre_proj"):
        head_of(structure, Settings(anchor="pre_projector"), 16, None)


@pytest.mark.parametrize("anchor", ("encoder", "pre-projector"))
def test_unknown_anchors(anchor: str) -> None:
    with pytest.raises(ValueError, match=f"--anchor: expected one of pre_llm, .* got '?{anchor}"):
        Settings(anchor=anchor)


def test_no_head_needs_equal_widths() -> None:
    structure = shipped.structure_of("llava-1.5-7b", ("llm",))
    with pytest.raises(ValueError, match=r"--depth: expected at least 1 .* 1024 .* 4096; got 0"):
        head_of(structure, Settings(anchor="pre_projector", depth=0), 576, None)


def test_what_is_kept() -> None:
    """From the head's call until backward: LLaVA's rows, all of an image but one."""
    recipe = TINY["llava"]
    config = recipe.config()
    cpu, meta = torch.device("cpu"), torch.device("meta")
    model = build_model(config, cpu, torch.float32)
    batch, one = (make_batch(recipe, config, n, cpu, torch.float32) for n in (3, 1))
    pre = apply_pre(model, anchor="pre_projector")
    storages: list[torch.UntypedStorage] = []
    [head] = pre.heads.values()
    head.register_forward_pre_hook(lambda head, args: storages.append(args[1].untyped_storage()))
    loss = model(**batch).loss
    size, kept = storages[0].nbytes(), StorageWeakRef(storages.pop())
    gc.collect()
    assert not kept.expired()
    loss.backward()
    assert kept.expired()
    on_meta = build_model(config, meta, torch.float32)
    lengths = [one["input_ids"].shape[1] + more for more in (0, 32, 96)]
    structure = walk(on_meta, [one], "tiny", parts_of(on_meta), lengths=lengths)
    settings = Settings(images_per_step=3, anchor="pre_projector")
    assert head_of(structure, settings, structure.visual_tokens, None).kept == size


def test_the_memory_and_the_page() -> None:
    """The rows are held from the loss to PRe's place, and no longer."""
    structure = shipped.structure_of("llava-1.5-7b", ("llm",))
    rows = 16 * 576 * 1024 * 2
    found = {
        anchor: estimate(structure, Settings(train=("llm",), anchor=anchor, optimizer="sgd"))
        for anchor in ("pre_llm", "pre_projector")
    }
    weights = {anchor: 4 * x.head.parameters for anchor, x in found.items()}
    for phase, extra, times in (("loss", rows, 1), ("update", 0, 2)):
        own = {
            anchor: next(m for m in x.moments["fused"] if m.phase == phase).bytes["pre"]
            for anchor, x in found.items()
        }
        more = own["pre_projector"] - own["pre_llm"]
        assert more == extra + times * (weights["pre_projector"] - weights["pre_llm"])
    assert found["pre_projector"].head_flops == 6 * 16 * 576 * 4096 * (4096 + 1024)
    assert "layer 16 of 32, anchor pre_projector" in describe(found["pre_projector"])
