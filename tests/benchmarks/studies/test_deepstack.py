# SPDX-License-Identifier: Apache-2.0
"""The study of an encoder that feeds the decoder's layers: what is added where, and a tiny run."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.studies import merging
from benchmarks.studies.deepstack import SEEDS, TAKEN, deepstack_model
from benchmarks.studies.merging import FAMILY, VARIANTS, format_table, train_and_ask
from prereg_kernels import apply_pre, remove_pre
from prereg_kernels.demo.data.packing import Packer, build_tokenizer
from prereg_kernels.demo.model.llava import set_trainable
from tests.benchmarks.studies.test_merging import merging_transfer
from tests.benchmarks.studies.test_merging import tiny as merging_tiny


def tiny(variant: str, seed: int, steps: int | None) -> Any:
    """The merging study's, with a third layer in the tower where it has two."""
    run = merging_tiny(variant, seed, steps)
    return replace(run, model=replace(run.model, tower_layers=max(TAKEN) + 1))


def batch_of(run: Any, images: int = 2) -> Any:
    scenes = run.scenes.open("test", 1).batch(range(images))
    packer = Packer(build_tokenizer(run.scenes), run.scenes.patches)
    return packer.pack(scenes.images, [[] for _ in range(images)])


def states(model: Any, batch: Any) -> list[Tensor]:
    """What leaves each of the decoder's layers, with all that is hooked to them."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        for layer in model.model.language_model.layers
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return [x[0] if isinstance(x, tuple) else x for x in seen]


def test_the_rows_are_those_of_their_patches(tmp_path: Any) -> None:
    """What is fed differs from what is not by the merger's rows of the four patches, in place."""
    run = tiny("baseline", 1, None)
    model = deepstack_model(run, str(tmp_path)).eval()
    batch = batch_of(run)
    fed = states(model, batch)
    first = model.model.language_model.layers[0]
    hook = next(k for k, f in first._forward_hooks.items() if f.__name__ == "add")
    del first._forward_hooks[hook]
    plain = states(model, batch)

    tower = model.model.vision_tower
    with torch.no_grad():
        patches = tower(batch["pixel_values"], output_hidden_states=True).hidden_states[TAKEN[0]]
        side = round((patches.shape[1] - 1) ** 0.5)
        grid = patches[:, 1:].unflatten(1, (side, side))
        corners = [grid[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        joined = torch.cat(corners, dim=-1).flatten(0, 2)
        merger = model.model.multi_modal_projector[2][0].merger
        rows = merger.mlp(merger.norm(joined))
    visual = batch["input_ids"] == model.config.image_token_id
    torch.testing.assert_close((fed[0] - plain[0])[visual], rows, rtol=1e-4, atol=1e-5)
    assert rows.norm() > 1 and torch.equal(fed[0][~visual], plain[0][~visual])


def test_text_alone_is_fed_nothing(tmp_path: Any) -> None:
    model = deepstack_model(tiny("baseline", 1, None), str(tmp_path)).eval()
    ids = torch.tensor([[4, 5, 6, 7]])
    before = states(model, {"input_ids": ids})
    states(model, batch_of(tiny("baseline", 1, None)))  # nothing is left of a call with images
    after = states(model, {"input_ids": ids})
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_copy_feeds_by_its_own_mergers(tmp_path: Any) -> None:
    run = tiny("baseline", 1, None)
    model = deepstack_model(run, str(tmp_path)).eval()
    learner = copy.deepcopy(model)
    batch = batch_of(run)
    assert torch.equal(states(learner, batch)[0], states(model, batch)[0])
    with torch.no_grad():
        for feed in learner.model.multi_modal_projector[2]:
            feed.merger.mlp[2].weight.zero_()
            feed.merger.mlp[2].bias.zero_()
    before, after = states(model, batch), states(learner, batch)
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_the_mergers_freeze_with_the_projector(tmp_path: Any) -> None:
    model = deepstack_model(tiny("baseline", 1, None), str(tmp_path))
    mergers = list(model.model.multi_modal_projector[2].parameters())
    assert len(mergers) == 6 * len(TAKEN)
    for parts, trains in ((("llm",), False), (("projector", "llm"), True)):
        set_trainable(model, parts)
        assert all(p.requires_grad == trains for p in mergers)


def test_pre_is_of_the_last_layer_and_reaches_every_merger(tmp_path: Any) -> None:
    """The anchor is what the first merger gets; a loss of PRe alone moves the others, too."""
    run = tiny("pre_projector", 1, None)
    model = deepstack_model(run, str(tmp_path))
    batch = batch_of(run)
    del batch["labels"]  # a loss of ours: backward adds PRe's
    taken: list[Tensor] = []
    merger = model.model.multi_modal_projector[1]
    merger.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    values = []
    for anchor, settings in (
        ("pre_projector", {}),
        (lambda inputs: joined_rows(taken[-1]), {"anchor_features": 4 * run.model.width}),
    ):
        pre = apply_pre(model, family=FAMILY, anchor=anchor, layers=2, seed=3, **settings)
        model.zero_grad()
        (0 * model(**batch).logits.sum()).backward()
        values.append(pre.metrics()["pre_loss"])
        remove_pre(model)
        for feed in model.model.multi_modal_projector[2]:
            assert feed.merger.mlp[2].weight.grad.norm() > 0
    assert values[0] == pytest.approx(values[1], rel=1e-6) and values[0] != 0


def joined_rows(patches: Tensor) -> Tensor:
    return patches.unflatten(1, (-1, 4)).flatten(2).flatten(0, 1)


def test_a_tiny_study(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "run_config", tiny)
    monkeypatch.setattr(merging, "TEST", 8)
    transfer = merging_transfer(monkeypatch)
    trained: list[Any] = []

    def new(run: Any, cache: str) -> Any:
        trained.append((deepstack_model(run, cache), deepstack_model(run, cache)))
        return trained[-1][0]

    rows = [
        train_and_ask(name, seed, None, str(tmp_path), new)
        for name in VARIANTS
        for seed in SEEDS[:2]
    ]
    assert all(row["transfer"]["projector"].keys() == set(transfer.families) for row in rows)
    for pair in trained:
        # The tiny decoder's second layer is its last: no answer depends on what is fed behind it
        after, before = (x.model.multi_modal_projector[2][0] for x in pair)
        for moved, kept in zip(after.parameters(), before.parameters(), strict=True):
            assert not torch.equal(moved, kept)
    assert "2 paired seeds" in format_table({"runs": rows})
