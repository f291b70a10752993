# SPDX-License-Identifier: Apache-2.0
"""The taps that examples/ puts into layers of torchtitan's and Megatron's models."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from prereg_kernels import PReHead, eager_pre_loss
from tests.helpers import relative_error
from tests.models.code_bases import Recomputed

EXAMPLES = Path(__file__).parents[2] / "examples"
WEIGHT = 3.0


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield {
        n: importlib.import_module(n) for n in ("torchtitan_layer", "megatron_layer", "tiny_own")
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in named}  # type: ignore[misc]


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        assert relative_error(ours[name], x) < 1e-5, name
    assert sum("pre_head" in name for name in expected) == 4


@pytest.mark.parametrize("checkpointing", (False, True))
def test_torchtitan(modules: dict[str, ModuleType], checkpointing: bool) -> None:
    """Two micro-batches of a step, against the definition; as torchtitan checkpoints layers."""
    example, tiny = modules["torchtitan_layer"], modules["tiny_own"]
    batches = [tiny.make_batch(seed) for seed in range(2)]
    counts = [int((batch["tokens"] == tiny.IMAGE).sum()) for batch in batches]
    assert counts[0] != counts[1]
    torch.manual_seed(0)
    model = tiny.TitanModel()
    plain = copy.deepcopy(model)
    pre = example.TapInLayer(model, "1", tiny.WIDTH, WEIGHT)
    if checkpointing:
        for name, layer in model.layers.items():
            model.layers[name] = checkpoint_wrapper(layer)
    pre.denominator = torch.tensor(sum(counts))
    values = []
    for batch in batches:
        loss_of(model, batch, tiny).backward()
        values.append(pre.value.item())
    plain.layers["1"].pre_head = PReHead(tiny.WIDTH, tiny.WIDTH, seed=0)
    total, states = 0.0, see(plain.layers["0"], plain.layers["1"])
    for batch in batches:
        lm = loss_of(plain, batch, tiny)
        head = plain.layers["1"].pre_head
        term = eager_pre_loss(
            states["second"], states["first"], head.weights, head.biases,
            visual_mask=batch["tokens"] == tiny.IMAGE, reduction="sum",
        ) / sum(counts)  # fmt: skip
        (lm + WEIGHT * term).backward()
        total += term.item()
    assert_equal(gradients(model), gradients(plain))
    assert sum(values) == pytest.approx(total, rel=1e-5)


def see(first: nn.Module, second: nn.Module) -> dict[str, Tensor]:
    """Filled in by each pass: what enters the first layer, and what the second returns."""
    states: dict[str, Tensor] = {}
    first.register_forward_pre_hook(lambda _, args: states.update(first=args[0]))
    second.register_forward_hook(lambda _, args, output: states.update(second=output))
    return states


def loss_of(model: nn.Module, batch: dict[str, Tensor], tiny: ModuleType) -> Tensor:
    logits = model(
        batch["tokens"], pixel_values=batch["pixel_values"],
        special_tokens={"image_id": tiny.IMAGE},
    )  # fmt: skip
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum") / 40


class Recomputing(nn.Module):
    """A layer as Megatron calls it with full recomputation."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = layer

    def forward(self, x: Tensor) -> Tensor:
        return Recomputed.apply(self._checkpoint_wrapped_module, x)


@pytest.mark.parametrize("recomputes", (False, True))
@pytest.mark.parametrize("ranks", (1, 2))
def test_megatron(modules: dict[str, ModuleType], ranks: int, recomputes: bool) -> None:
    """Each rank of a sequence-parallel group has its positions; the sums are one process's."""
    example, tiny = modules["megatron_layer"], modules["tiny_own"]
    batch = tiny.make_batch(0)
    labels = batch["labels"].T
    mask = batch["tokens"] == tiny.IMAGE
    torch.manual_seed(0)
    plain = tiny.MegatronModel()
    found: list[dict[str, Tensor]] = []
    value = 0.0
    for rank in range(ranks):
        model = copy.deepcopy(plain)
        model.rank, model.ranks = rank, ranks
        first, layer = model.layers[0], model.layers[1]
        pre = example.TapInLayer(model, first, layer, tiny.WIDTH, tiny.IMAGE, WEIGHT, rank, ranks)
        assert all(p.sequence_parallel == (ranks > 1) for p in pre.head.parameters())
        if recomputes:
            model.layers = nn.ModuleList(map(Recomputing, model.layers))
        logits = model(input_ids=batch["tokens"], pixel_values=batch["pixel_values"])
        own = labels.chunk(ranks, dim=0)[rank].flatten()
        (F.cross_entropy(logits.flatten(0, 1), own, reduction="sum") / 40).backward()
        found.append(gradients(model))
        value += pre.value.item()
    ours = {name: torch.stack([x[name] for x in found]).sum(dim=0) for name in found[0]}
    states = see(plain.layers[0], plain.layers[1])
    plain.layers[1].pre_head = head = PReHead(tiny.WIDTH, tiny.WIDTH, seed=0)
    logits = plain(input_ids=batch["tokens"], pixel_values=batch["pixel_values"])
    lm = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 40
    term = eager_pre_loss(
        states["second"].transpose(0, 1), states["first"].transpose(0, 1), head.weights,
        head.biases, visual_mask=mask,
    )  # fmt: skip
    (lm + WEIGHT * term).backward()
    assert_equal(ours, gradients(plain))
    assert value == pytest.approx(term.item(), rel=1e-5)
