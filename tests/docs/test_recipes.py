# SPDX-License-Identifier: Apache-2.0
"""The code of CONTRIBUTING's recipes works where the recipe puts it.

tests/train/test_recipe.py has the source of training data.
"""

from __future__ import annotations

import ast
import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.loss import peers
from prereg_kernels.attach import families
from prereg_kernels.checkup.measures import table
from prereg_kernels.checkup.measures.measure import Tokens
from prereg_kernels.ops import activations, losses
from prereg_kernels.ops.backends import registry
from prereg_kernels.ops.spec import Spec
from tests.docs.pages import page_of
from tests.helpers import forget_backends


def block(text: str) -> str:
    """The one block of Python with that text in it."""
    [found] = [b.text for b in page_of("CONTRIBUTING.md").blocks if text in b.text]
    return found


def run_in(module: ModuleType, text: str, **names: Any) -> dict[str, Any]:
    """What a file's names are once the text stands at its end; the file itself stays as it is."""
    namespace = {**vars(module), **names}
    exec(text, namespace)
    return namespace


def test_a_loss() -> None:
    """0.5 of a difference of 1, 0.8 of one of 2."""
    registered: list[losses.Loss] = []
    run_in(losses, block("_geman_mcclure"), register_loss=registered.append)
    [loss] = registered
    assert loss.name == "geman_mcclure"
    p = torch.tensor([[1.0, 2.0], [1.0, 1.0]])
    assert loss.formula(p, torch.zeros(2, 2)).tolist() == pytest.approx([0.65, 0.5])


def test_an_activation() -> None:
    registered: list[activations.Activation] = []
    run_in(activations, block('"mish"'), register_activation=registered.append)
    [mish] = registered
    assert mish.name == "mish"
    by_hand = math.tanh(math.log(1 + math.e)), -2 * math.tanh(math.log(1 + math.exp(-2)))
    found = mish.formula(torch.tensor([1.0, -2.0]))
    assert found.tolist() == pytest.approx(by_hand, abs=1e-6)


def test_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the recipe lists it, "auto" takes it for what it does not refuse, on CPUs alone."""
    module = ModuleType("slow")
    exec(block("class SlowBackend"), vars(module))
    monkeypatch.setitem(sys.modules, "prereg_kernels.ops.backends.slow", module)
    classes = {"slow": ("slow", "SlowBackend"), "torch": registry.CLASSES["torch"]}
    monkeypatch.setattr(registry, "CLASSES", classes)
    monkeypatch.setattr(registry, "FASTEST_FIRST", tuple(classes))
    monkeypatch.setattr(registry, "BACKENDS", ("auto", *classes))
    forget_backends()
    try:
        cpu = torch.device("cpu")
        for loss, expected in (("mse", "slow"), ("l1", "torch")):
            spec = Spec("gelu", loss, "none", 1e-8, torch.float32)
            assert registry.choose_backend("auto", cpu, spec).name == expected
        with pytest.raises(ValueError, match="backend='slow': has no kernel for loss='l1'"):
            registry.choose_backend("slow", cpu, spec)
        with pytest.raises(ValueError, match="does not run on cuda:0 here: it is for CPUs only"):
            registry.choose_backend("slow", torch.device("cuda", 0))
    finally:
        forget_backends()


def test_a_family() -> None:
    """It is the entry that is there."""
    family = eval(block('"Qwen3.5"'), dict(vars(families)))
    assert family == families.family_of_type("qwen3_5") == families.family_of_type("qwen3_5_moe")


def test_measures() -> None:
    """Of two tokens, which have grown threefold and to a half."""
    x = torch.tensor([[3.0, 6.0], [0.5, 0.5]])
    inputs, image = torch.tensor([[1.0, 2.0], [1.0, 1.0]]), torch.zeros(2, dtype=torch.int64)
    read = Tokens(x, inputs, image, 1, image - 1)
    simple = eval(block('"largest value"'), dict(vars(table)))
    calls = [x.value for x in ast.parse(block('panel="growth"')).body if isinstance(x, ast.Expr)]
    panel, measure = (eval(ast.unparse(call), dict(vars(table))) for call in calls)
    assert (panel.bottom, measure.panel) == (0, "growth") and "growth" not in table.PANELS
    for found, expected in ((simple, (6 + 0.5) / 2), (measure, (3 + 0.5) / 2)):
        assert float(found.value(found.source.of(read))) == pytest.approx(expected)


def test_a_peer() -> None:
    peer = eval(block("Peer("), dict(vars(peers)))
    assert peer.first_call_seconds == 50 and peer.name not in {p.name for p in peers.PEERS}
