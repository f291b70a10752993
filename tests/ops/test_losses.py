# SPDX-License-Identifier: Apache-2.0
"""Losses and activations of one's own: registered by name, and right wherever the built-in are."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prereg_kernels import PReConfig, PReHead, apply_pre, eager_pre_loss, fused_pre_loss, remove_pre
from prereg_kernels.ops import Activation, Loss, register_activation, register_loss
from prereg_kernels.ops.activations import ACTIVATIONS, ActivationName
from prereg_kernels.ops.backends import registry
from prereg_kernels.ops.backends.registry import choose_backend
from prereg_kernels.ops.formulas import Formula
from prereg_kernels.ops.losses import LOSSES, LossName
from prereg_kernels.ops.spec import Spec
from tests.helpers import (
    Problem,
    check,
    check_tap,
    forget_backends,
    make_problem,
    relative_error,
    residual_like,
    run,
    run_tap,
    run_truth,
)
from tests.tiny import gradients, make_batch, tiny_llava

CPU = torch.device("cpu")


def log_cosh(p: Tensor, q: Tensor, scale: float) -> Tensor:
    return torch.cosh((p - q) / scale).log().mean(dim=-1) * scale


def softsign(u: Tensor, steep: float) -> Tensor:
    return u / (1 + steep * u.abs())


@pytest.fixture(autouse=True)
def own() -> Iterator[None]:
    """Backends are chosen anew for the next test's losses."""
    yield
    forget_backends()


@pytest.fixture
def log_cosh_loss() -> Loss:
    return register_loss(Loss("log_cosh", log_cosh, parameters={"scale": 2}))


@pytest.fixture
def softsign_activation() -> Activation:
    return register_activation(Activation("softsign", softsign, parameters={"steep": 0.5}))


BY_HAND = {  # of 1 and of -2, by tables of the normal distribution and of tanh
    "gelu": (0.8413447, -0.0455003),
    "gelu_tanh": (0.8411920, -0.0454023),
    "silu": (0.7310586, -0.2384058),
    "relu": (1.0, 0.0),
}


@pytest.mark.parametrize("name", get_args(ActivationName))
def test_activations_by_hand(name: str) -> None:
    found = ACTIVATIONS.find(name).formula(torch.tensor([1.0, -2.0]))
    assert found.tolist() == pytest.approx(BY_HAND[name], abs=1e-6)


OWN = {"loss": "log_cosh", "activation": "softsign"}
MASK = torch.tensor([True, False, True, True, False, True, True] * 2).view(2, 7)


def test_built_in_names_are_the_types() -> None:
    """So that a checker knows them; those of others are given as objects."""
    assert LOSSES.names == get_args(LossName)
    assert ACTIVATIONS.names == get_args(ActivationName)
    assert get_args(registry.BackendName) == registry.BACKENDS


@pytest.mark.usefixtures("log_cosh_loss", "softsign_activation")
class TestEverywhere:
    """The rule of the built-in losses, for a loss and an activation that no kernel knows."""

    @pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
    @pytest.mark.parametrize("backend", ("auto", "torch"))
    @pytest.mark.parametrize("normalize", ("none", "l2", "layer"))
    def test_rule(self, dtype: torch.dtype, backend: Any, normalize: str) -> None:
        problem = make_problem(dtype=dtype, visual_mask=MASK, normalize=normalize, **OWN)
        check(problem, backend=backend, chunk_rows=4)
        check_tap(problem, residual=residual_like(problem.hidden), backend=backend)

    @pytest.mark.parametrize("widths", ((9,), (12, 9), (12, 10, 9), (12, 10, 8, 9)), ids=str)
    @pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
    def test_depths_and_reductions(self, widths: tuple[int, ...], reduction: str) -> None:
        for recompute in (False, True):
            check(make_problem(widths=widths, reduction=reduction, **OWN), recompute=recompute)

    def test_gradcheck_of_the_definition_and_of_what_is_fused(self) -> None:
        leaves = make_problem((5,), (6, 5, 4), dtype=torch.float64).leaves()
        anchor = make_problem((5,), (6, 5, 4), seed=1, dtype=torch.float64).anchor
        for function in (eager_pre_loss, fused_pre_loss):

            def of_leaves(h: Tensor, w0: Tensor, w1: Tensor, b0: Tensor, b1: Tensor) -> Tensor:
                return function(h, anchor, [w0, w1], [b0, b1], normalize="layer", **OWN)  # noqa: B023

            assert torch.autograd.gradcheck(of_leaves, tuple(leaves.values()))

    def test_compile(self) -> None:
        problem = make_problem(visual_index=torch.tensor([3, 1, 8]), **OWN)
        compiled = torch.compile(fused_pre_loss, fullgraph=True, backend="aot_eager")
        ours, eager = run(compiled, problem), run(fused_pre_loss, problem)
        assert all(torch.equal(ours[name], eager[name]) for name in eager)

    def test_compile_of_objects(self) -> None:
        problem, loss = make_problem(), LOSSES.find("log_cosh").with_parameters(scale=3.0)
        problem = problem.with_options(loss=loss, activation=ACTIVATIONS.find("softsign"))
        compiled = torch.compile(fused_pre_loss, fullgraph=True, backend="aot_eager")
        ours, eager = run(compiled, problem), run(fused_pre_loss, problem)
        assert all(torch.equal(ours[name], eager[name]) for name in eager)

    @pytest.mark.parametrize("hooks", ("checkpoint", "save_on_cpu"))
    def test_saved_tensor_hooks(self, hooks: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """They see nothing of the formula's derivative, which would be computed again for them."""
        problem, calls, packed = make_problem(**OWN), [], []

        def counted(p: Tensor, q: Tensor, scale: float) -> Tensor:
            calls.append(p)
            return log_cosh(p, q, scale)

        monkeypatch.setitem(vars(LOSSES.find("log_cosh")), "formula", counted)
        eager = run(fused_pre_loss, problem)
        assert len(calls) == 1

        def within(*arguments: Any, **options: Any) -> Tensor:
            def call(*tensors: Any) -> Tensor:
                return fused_pre_loss(*tensors, **options) * 1.0

            if hooks == "checkpoint":
                return checkpoint(call, *arguments, use_reentrant=False)
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x: packed.append(x.shape) or x, lambda x: x
            ):
                return call(*arguments)

        ours = run(within, problem)
        assert all(torch.equal(ours[name], eager[name]) for name in eager)
        assert len(calls) == (3 if hooks == "checkpoint" else 2)
        # hidden, two weights, two biases and the gradient of each, and the factor's
        assert hooks == "checkpoint" or len(packed) <= 11

    def test_inference_tensors(self) -> None:
        problem = make_problem(**OWN)
        with torch.inference_mode():
            loss = fused_pre_loss(*problem.arguments(problem.leaves()), **problem.options)
            anchor = problem.anchor.clone()
        assert relative_error(loss, run_truth(problem)["loss"]) < 1e-6
        same = Problem(problem.hidden, anchor, problem.weights, problem.biases, problem.options)
        assert torch.equal(run(fused_pre_loss, same)["dW0"], run(fused_pre_loss, problem)["dW0"])

    def test_auto_falls_back_and_says_so_once(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(registry, "FASTEST_FIRST", ("cpp", "torch"))  # whatever --backend is
        forget_backends()
        with caplog.at_level(logging.DEBUG, logger="prereg_kernels"):
            for eps in (1e-8, 1e-7):
                loss = LOSSES.find("log_cosh").text
                spec = Spec("gelu", loss, "none", eps, torch.float32)
                assert choose_backend("auto", CPU, spec).name == "torch"
        assert registry.unavailable("cpp", "cpu") is None
        said = [r.message for r in caplog.records if "cpp" in r.message]
        assert said == [
            "backend cpp is passed over: it has no kernel for loss='log_cosh(scale=2.0)'"
        ]

    @pytest.mark.parametrize(
        "options, refused",
        (
            ({"loss": "log_cosh"}, r"loss='log_cosh\(scale=2.0\)'"),
            ({"activation": "softsign"}, r"activation='softsign\(steep=0.5\)'"),
        ),
    )
    def test_a_forced_backend_refuses(self, options: dict[str, str], refused: str) -> None:
        with pytest.raises(ValueError, match=f"backend='cpp': has no kernel for {refused}"):
            run(fused_pre_loss, make_problem(**options), backend="cpp")
        with pytest.raises(ValueError, match=f"backend='cpp': has no kernel for {refused}"):
            run_tap(make_problem(**options), backend="cpp")


def test_objects_need_no_registration() -> None:
    loss = Loss("log_cosh", log_cosh, parameters={"scale": 2.0})
    by_object = run(fused_pre_loss, make_problem(), loss=loss)
    assert torch.equal(by_object["dW0"], run(fused_pre_loss, make_problem(loss="log_cosh"))["dW0"])
    truth = run_truth(make_problem(loss=loss.with_parameters(scale=0.5)))
    other = run(fused_pre_loss, make_problem(), loss="log_cosh(scale=0.5)")
    assert relative_error(other["dW0"], truth["dW0"]) < 1e-6
    assert relative_error(by_object["dW0"], truth["dW0"]) > 0.1, "the parameter matters"


def test_parameters() -> None:
    huber = LOSSES.find("huber")
    assert LOSSES.text_of("huber") == huber.text == "huber(delta=0.5)"
    assert LOSSES.find("huber(delta=0.25)").parameters == {"delta": 0.25}
    assert huber.with_parameters(delta=0.25).text == "huber(delta=0.25)"
    p, q = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.huber_loss(p, q, delta=0.25, reduction="none").mean(1)
    assert torch.equal(LOSSES.find("huber(delta=0.25)")(p, q), expected)


def defined(formula: str) -> Callable[..., Tensor]:
    """The function of this source, compiled anew, as when a cell of a notebook runs."""
    names: dict[str, Any] = {"torch": torch}
    exec(f"\n\ndef power(p, q):\n    return (lambda d: {formula})(p - q).mean(dim=-1)", names)
    return names["power"]


@pytest.mark.parametrize(
    "make",
    (
        lambda power: defined(f"d**{power}"),
        lambda power: functools.partial(log_cosh, scale=float(power)),
        lambda power: lambda p, q: (p - q).abs().pow(power).mean(dim=-1),
    ),
    ids=("source", "partial", "closure"),
)
def test_the_same_again_is_no_error_but_another_is(make: Callable[[int], Any]) -> None:
    register_loss(Loss("power", make(4)))
    register_loss(Loss("power", make(4)))
    with pytest.raises(ValueError, match="loss: 'power' is registered already, with another form"):
        register_loss(Loss("power", make(2)))
    with pytest.raises(ValueError, match="loss: 'power' is registered already"):
        fused_pre_loss(torch.zeros(2, 3), torch.zeros(2, 3), loss=Loss("power", make(2)))
    with pytest.raises(ValueError, match="registered already"):
        register_loss(Loss("power", make(4), normalizations=("none",)))
    with pytest.raises(ValueError, match="registered already"):
        register_loss(LOSSES.find("huber").with_parameters(delta=3))
    assert LOSSES.find("huber").text == "huber(delta=0.5)"


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a mean over the rows": (
        lambda: register_loss(Loss("bad", lambda p, q: (p - q).square().mean())),
        ValueError, r"loss: 'bad' has to return shape \(3,\) for rows of shape \(3, 4\), got \(\)",
    ),
    "rows that know each other": (
        lambda: register_loss(Loss("bad", lambda p, q: ((p - q).square() / p.std()).mean(dim=-1))),
        ValueError, "loss: 'bad' has to treat each row by itself",
    ),
    "no dtype of its own": (
        lambda: register_loss(Loss("bad", lambda p, q: (p - q).float().abs().mean(dim=-1))),
        ValueError, "loss: 'bad' has to treat each row by itself and keep the dtype",
    ),
    "an activation that sums": (
        lambda: register_activation(Activation("bad", lambda u: u.sum(dim=-1))),
        ValueError, r"activation: 'bad' has to return shape \(3, 4\)",
    ),
    "name": (lambda: Loss("a b", log_cosh), ValueError, "name: expected a Python identifier"),
    "formula": (lambda: Loss("bad", "mse"), TypeError, "formula: expected a function, got str"),
    "parameter": (
        lambda: Loss("bad", log_cosh, parameters={"scale": "1"}), TypeError,
        "scale: expected a number, got str",
    ),
    "infinite parameter": (
        lambda: Loss("bad", log_cosh, parameters={"scale": float("inf")}), ValueError,
        "scale: expected a finite number, got inf",
    ),
    "two normalisations": (
        lambda: Loss("bad", log_cosh, own_normalization="l2"), ValueError,
        r"normalizations: expected \('none',\) with own_normalization='l2'",
    ),
    "half by hand": (
        lambda: Activation("bad", torch.tanh, into=lambda u, g: None), ValueError,
        "into and backward_into: expected both or neither",
    ),
    "another kind": (
        lambda: register_loss(ACTIVATIONS.find("relu")), TypeError,
        "loss: expected a Loss, got Activation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_loss_raises(name: str) -> None:
    make, exception, message = WRONG[name]
    with pytest.raises(exception, match=message):
        make()
    assert "bad" not in LOSSES.names and "bad" not in ACTIVATIONS.names


def test_a_formula_that_takes_no_normalisation() -> None:
    register_loss(Loss("raw", lambda p, q: (p - q).abs().amax(dim=-1), normalizations=("none",)))
    with pytest.raises(ValueError, match="normalize: loss='raw' takes none; got 'l2'"):
        run(fused_pre_loss, make_problem(loss="raw", normalize="l2"))


class TestConfig:
    def test_round_trip(self, log_cosh_loss: Loss, softsign_activation: Activation) -> None:
        config = PReConfig(loss=log_cosh_loss, activation=softsign_activation)
        saved = config.to_json([2])
        assert saved["loss"] == "log_cosh(scale=2.0)"
        assert saved["activation"] == "softsign(steep=0.5)"
        assert PReConfig.from_json(saved, {}, 4) == config.replace(layers=(2,))
        assert (
            PReConfig.from_json(saved, {"activation": softsign_activation}, 4).loss == config.loss
        )

    def test_built_in_names_stay_plain(self) -> None:
        saved = PReConfig().to_json([2])
        assert (saved["loss"], saved["activation"]) == ("cosine", "gelu")

    @pytest.mark.parametrize("name", ("loss", "activation"))
    def test_unknown_names_say_what_to_register(self, name: str) -> None:
        saved = PReConfig().to_json([2]) | {name: "mine"}
        expected = rf"{name}: .* got 'mine'.*prereg_kernels\.ops\.register_{name}\(\.\.\.\)"
        with pytest.raises(ValueError, match=expected):
            PReConfig.from_json(saved, {}, 4)

    def test_attached_and_saved(
        self, log_cosh_loss: Loss, softsign_activation: Activation, tmp_path: Path
    ) -> None:
        """A step of a model with a head and a loss of one's own; then again from files."""

        def step(model: torch.nn.Module) -> list[Tensor]:
            model(**make_batch()).loss.backward()
            return list(gradients(model).values())

        model = tiny_llava()
        pre = apply_pre(model, layers=1, loss=log_cosh_loss, activation=softsign_activation)
        first = step(model)
        pre.save(tmp_path)
        remove_pre(model)
        model.zero_grad()
        other = apply_pre(model, layers=1, loss="mse", activation=softsign_activation, seed=3)
        assert not all(map(torch.equal, step(model), first))
        loaded = tiny_llava()
        again = apply_pre(loaded, layers=1, loss=log_cosh_loss, activation=softsign_activation)
        again.load(tmp_path)
        assert again.config == pre.config != other.config
        assert all(map(torch.equal, step(loaded), first))


def test_heads_take_activations(softsign_activation: Activation) -> None:
    head = PReHead(6, 5, activation=softsign_activation, seed=0)
    assert head.activation == "softsign(steep=0.5)"
    hidden, anchor = torch.randn(2, 4, 6), torch.randn(2, 4, 5)
    expected = eager_pre_loss(
        hidden, anchor, head.weights, head.biases, activation=softsign_activation
    )
    assert relative_error(head(hidden, anchor), expected.detach()) < 1e-6


def test_formulas_are_called_with_their_parameters() -> None:
    formula = Formula("scaled", lambda x, by: x * by, parameters={"by": 3})
    assert formula.text == "scaled(by=3.0)" and formula(torch.ones(2)).tolist() == [3, 3]
