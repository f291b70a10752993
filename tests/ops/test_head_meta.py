# SPDX-License-Identifier: Apache-2.0
"""Heads that leave the meta device, or that `to_empty` leaves without values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prereg_kernels import PReHead, apply_pre
from tests.tiny import make_batch, tiny_llava


def values(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(map(torch.equal, a, b))


def on_meta(seed: int | None = 3) -> PReHead:
    return PReHead(8, 6, 10, seed=seed, device="meta")


def poison(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Memory that nobody wrote to, as bad as it can be."""

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = fn(*args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else -1)

    return poisoned


@pytest.fixture(autouse=True)
def garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def test_the_numbers_of_a_seed() -> None:
    """Those that torch's generator has, which stays where it was; again after a reset."""
    torch.manual_seed(3)
    expected = values(PReHead(8, 6, 10))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    head = PReHead(8, 6, 10, seed=3)
    assert same(values(head), expected)
    nn.init.zeros_(head.weight_0)
    head.reset_parameters()
    assert same(values(head), expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", (-1, 1.0, True, "3"))
def test_a_seed_that_is_none(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed: expected None or an integer of at least 0, got"):
        PReHead(8, 6, seed=seed)


@pytest.mark.parametrize("around", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_leaving_the_meta_device(dtype: torch.dtype, around: bool) -> None:
    before = torch.get_rng_state()
    head = on_meta().to(dtype)
    module = nn.Sequential(head) if around else head
    module.to_empty(device="cpu")
    assert same(values(head), values(PReHead(8, 6, 10, seed=3).to(dtype)))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed() -> None:
    """As a head that is made on the CPU: by torch's generator, in its own dtype."""
    head = on_meta(None)
    torch.manual_seed(1)
    head.to_empty(device="cpu")
    torch.manual_seed(1)
    assert same(values(head), values(PReHead(8, 6, 10)))
    skipped = nn.utils.skip_init(PReHead, 8, 6, 10)
    assert all(x.isfinite().all() for x in values(skipped))


def test_a_copy_and_a_way_there_and_back() -> None:
    head = copy.deepcopy(on_meta()).to_empty(device="cpu")
    expected = values(PReHead(8, 6, 10, seed=3))
    assert same(values(head), expected)
    with torch.no_grad():
        head.weight_0.add_(1)
    assert same(values(head.to("meta").to_empty(device="cpu")), expected)


def test_to_empty_where_there_were_values() -> None:
    """It leaves none, anywhere: so the head starts anew."""
    head = PReHead(8, 6, 10, seed=3)
    expected = values(head)
    with torch.no_grad():
        head.weight_0.add_(1)
    for _ in range(3):
        nn.Sequential(head).to_empty(device="cpu")
        assert same(values(head), expected)


@pytest.mark.parametrize(
    "convert",
    (
        lambda head: head.to("cpu"),
        lambda head: head.share_memory(),
        lambda head: head.bfloat16().float(),
        lambda head: head.half(),
        lambda head: head.double(),
    ),
)
def test_what_keeps_values_keeps_them(convert: Callable[[PReHead], PReHead]) -> None:
    head, plain = PReHead(8, 6, 10, seed=3), nn.Linear(8, 6)
    with torch.no_grad():
        head.weight_0.fill_(1.5)
        plain.weight.fill_(1.5)
    convert(head)
    assert torch.equal(head.weight_0, convert(plain).weight[:1, :1].expand(10, 8))  # type: ignore


def test_where_tensors_have_no_values() -> None:
    head = PReHead(8, 6, 10, seed=3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        head.to("cpu")
    assert same(values(head), values(PReHead(8, 6, 10, seed=3)))


def test_a_state_dict_comes_after() -> None:
    trained = PReHead(8, 6, 10, seed=9)
    head = on_meta().to_empty(device="cpu")
    head.load_state_dict(trained.state_dict())
    assert same(values(head), values(trained))
    head = on_meta()
    head.load_state_dict(trained.state_dict(), assign=True)
    assert same(values(head), values(trained))


def model_on_meta() -> Any:
    with torch.device("meta"):
        return tiny_llava()


def materialise(model: Any, assign: bool, device: str = "cpu") -> None:
    """As trainers do, with the checkpoint of a plain model."""
    plain = tiny_llava().state_dict()
    if not assign:
        model.to_empty(device=device)
    model.load_state_dict(plain, strict=False, assign=assign)
    with torch.no_grad():  # buffers that no checkpoint has
        for name, buffer in tiny_llava().named_buffers():
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent).register_buffer(last, buffer, persistent=False)


@pytest.mark.parametrize("assign", (False, True))
@pytest.mark.parametrize("settings", ({}, {"layers": (1, 3), "share_head": True}, {"depth": 0}))
def test_models_that_leave_it(assign: bool, settings: dict[str, Any]) -> None:
    """The heads and the loss of a model that never was there."""
    plain = tiny_llava()
    expected, batch = apply_pre(plain, seed=4, **settings), make_batch()
    plain(**batch).loss.backward()
    model = model_on_meta()
    before = torch.get_rng_state()
    pre = apply_pre(model, seed=4, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    copied = copy.deepcopy(model)
    for one in (model, copied):
        materialise(one, assign)
        for name, p in plain.pre_heads.named_parameters():
            assert torch.equal(one.pre_heads.get_parameter(name), p)
        one(**batch).loss.backward()
    assert pre.metrics() == pytest.approx(expected.metrics())


def test_made_in_the_context_of_the_meta_device() -> None:
    """apply_pre too, as accelerate's init_empty_weights has it."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = tiny_llava()
        pre = apply_pre(model, seed=4)
    assert all(p.is_meta for p in pre.heads[2].parameters())
    model.to_empty(device="cpu")
    expected = apply_pre(tiny_llava(), seed=4)
    assert same(values(pre.heads[2]), values(expected.heads[2]))
    with torch.device("meta"):
        pre = apply_pre(model := tiny_llava().to_empty(device="cpu"), seed=4)
    assert same(values(pre.heads[2]), values(expected.heads[2]))


@pytest.mark.parametrize("how", ("from_pretrained", "load"))
@pytest.mark.parametrize("assign", (False, True))
def test_files_that_are_read_while_it_is_there(tmp_path: Path, how: str, assign: bool) -> None:
    old = apply_pre(tiny_llava(), seed=9)
    old.passes = 7
    old.save(tmp_path)
    model = model_on_meta()
    pre = apply_pre(model, from_pretrained=tmp_path if how == "from_pretrained" else None)
    if how == "load":
        pre.load(tmp_path)
    materialise(model, assign)
    assert pre.passes == 7
    assert same(values(pre.heads[2]), values(old.heads[2]))


def test_heads_that_are_left_there() -> None:
    model = tiny_llava()
    apply_pre(model).heads[2].to("meta")
    message = r"head: its parameters are on the meta device .*call to_empty\(device='cpu'\)"
    with pytest.raises(ValueError, match=message):
        model(**make_batch())


def test_there_is_nothing_to_save_there(tmp_path: Path) -> None:
    pre = apply_pre(model_on_meta())
    with pytest.raises(ValueError, match="heads: expected parameters with values, got them on the"):
        pre.save(tmp_path)
    assert not list(tmp_path.iterdir())
