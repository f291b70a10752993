# SPDX-License-Identifier: Apache-2.0
"""Bad arguments: the right exception, whose message has the name, what came, what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import PReConfig, PReHead, eager_pre_loss, fused_pre_loss, pre_tap
from prereg_kernels.ops.backends.registry import BACKENDS
from tests.helpers import ACTIVATION_NAMES, LOSS_NAMES


class DTensor(Tensor):
    """Looks like the distributed one to who asks for its name."""


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


def arguments() -> dict[str, Any]:
    """Good ones: six positions, D = 4, M = 6, A = 5."""
    return {
        "hidden": zeros(2, 3, 4),
        "anchor": zeros(2, 3, 5),
        "weights": [zeros(6, 4), zeros(5, 6)],
        "biases": [zeros(6), None],
    }


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


MASK = torch.tensor([[True, False, True], [False, False, True]])

# argument(s), exception, and what the message says
COMMON: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "hidden list": ({"hidden": [1.0]}, TypeError, "hidden: expected a Tensor, got list"),
    "hidden int": (
        {"hidden": zeros(2, 3, 4, dtype=torch.int64)},
        TypeError, "hidden: expected float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "hidden 0-dim": (
        {"hidden": zeros(())},
        ValueError, r"hidden and anchor: expected shapes .* got \(\) and \(2, 3, 5\)",
    ),
    "hidden without features": (
        {"hidden": zeros(2, 3, 0)},
        ValueError, r"hidden and anchor: expected at least one feature, got shapes \(2, 3, 0\)",
    ),
    "hidden DTensor": (
        {"hidden": zeros(2, 3, 4).as_subclass(DTensor)},
        ValueError, r"hidden: got a DTensor; pass the local tensor",
    ),
    "anchor None": ({"anchor": None}, TypeError, "anchor: expected a Tensor, got NoneType"),
    "anchor int": (
        {"anchor": zeros(2, 3, 5, dtype=torch.int32)},
        TypeError, "anchor: expected float16, .* got torch.int32",
    ),
    "anchor device": (
        {"anchor": zeros(2, 3, 5, device="meta")},
        ValueError, "anchor: is on meta, but hidden is on cpu",
    ),
    "anchor leading shape": (
        {"anchor": zeros(3, 2, 5)},
        ValueError, r"anchor: expected the leading shape of hidden, \(2, 3\), got \(3, 2, 5\)",
    ),
    "anchor rows without selection": (
        {"anchor": zeros(6, 5)},
        ValueError, r"anchor: expected the leading shape of hidden, \(2, 3\), got \(6, 5\)",
    ),
    "anchor rows of an index": (
        {"anchor": zeros(3, 5), "visual_index": index(0, 1)},
        ValueError, r"anchor: .*one row for each of the 2 visual tokens, got \(3, 5\)",
    ),
    "anchor rows of a mask": (
        {"anchor": zeros(2, 5), "visual_mask": MASK},
        ValueError, r"anchor: .*one row for each of the 3 visual tokens[,;] got \(2, 5\)",
    ),
    "anchor width": (
        {"anchor": zeros(2, 3, 7)},
        ValueError, r"anchor: weights\[1\] gives 5 features, but anchor has 7: expected the same",
    ),
    "anchor width without head": (
        {"weights": (), "biases": None},
        ValueError, r"anchor: hidden \(no head\) has 4 features, but anchor has 5",
    ),
    "weights Tensor": (
        {"weights": zeros(5, 4)},
        TypeError, "weights: expected a sequence of Tensors, got Tensor",
    ),
    "weights None": ({"weights": None}, TypeError, "weights: expected a sequence .* got NoneType"),
    "weight None": (
        {"weights": [zeros(6, 4), None]},
        TypeError, r"weights\[1\]: expected a Tensor, got NoneType",
    ),
    "weight vector": (
        {"weights": [zeros(6), zeros(5, 6)]},
        ValueError, r"weights\[0\]: expected shape \(out_features, 4\), got \(6,\)",
    ),
    "weight transposed": (
        {"weights": [zeros(6, 4), zeros(6, 5)]},
        ValueError, r"weights\[1\]: expected shape \(out_features, 6\), got \(6, 5\)",
    ),
    "weight int": (
        {"weights": [zeros(6, 4, dtype=torch.int8), zeros(5, 6)]},
        TypeError, r"weights\[0\]: expected float16, .* got torch.int8",
    ),
    "weight device": (
        {"weights": [zeros(6, 4), zeros(5, 6, device="meta")]},
        ValueError, r"weights\[1\]: is on meta, but hidden is on cpu",
    ),
    "weight DTensor": (
        {"weights": [zeros(6, 4).as_subclass(DTensor), zeros(5, 6)]},
        ValueError, r"weights\[0\]: got a DTensor; .*\.full_tensor\(\) or \.to_local\(\)",
    ),
    "biases Tensor": ({"biases": zeros(5)}, TypeError, "biases: expected None or a sequence, got"),
    "biases count": (
        {"biases": [zeros(6)]},
        ValueError, r"biases: expected one entry .* for each of the 2 weights, got 1",
    ),
    "bias number": (
        {"biases": [None, 3.0]},
        TypeError, r"biases\[1\]: expected a Tensor, got float",
    ),
    "bias shape": (
        {"biases": [zeros(6), zeros(6)]},
        ValueError, r"biases\[1\]: expected shape \(5,\), got \(6,\)",
    ),
    "bias device": (
        {"biases": [zeros(6, device="meta"), None]},
        ValueError, r"biases\[0\]: is on meta",
    ),
    "both selectors": (
        {"visual_mask": MASK, "visual_index": index(0)},
        ValueError, "visual_mask and visual_index: expected at most one of them, got both",
    ),
    "mask list": (
        {"visual_mask": [True] * 6}, TypeError, "visual_mask: expected a Tensor, got list",
    ),
    "mask dtype": (
        {"visual_mask": MASK.long()},
        TypeError, "visual_mask: expected dtype torch.bool, got torch.int64",
    ),
    "mask shape": (
        {"visual_mask": MASK.flatten()},
        ValueError, r"visual_mask: expected the leading shape of hidden, \(2, 3\), got \(6,\)",
    ),
    "mask device": (
        {"visual_mask": MASK.to("meta")},
        ValueError, "visual_mask: is on meta, but hidden is on cpu",
    ),
    "index dtype": (
        {"visual_index": index(0).int()},
        TypeError, "visual_index: expected dtype torch.int64, got torch.int32",
    ),
    "index list": ({"visual_index": [0]}, TypeError, "visual_index: expected a Tensor, got list"),
    "index shape": (
        {"visual_index": index(0, 1).view(1, 2)},
        ValueError, r"visual_index: expected shape \(N,\), got \(1, 2\)",
    ),
    "index high": (
        {"visual_index": index(0, 6)},
        IndexError, r"visual_index: expected values in \[0, 6\), got values from 0 to 6",
    ),
    "index negative": (
        {"visual_index": index(-1, 2)},
        IndexError, r"visual_index: expected values in \[0, 6\), got values from -1 to 2",
    ),
    "index twice": (
        {"visual_index": index(3, 1, 3)},
        ValueError, "visual_index: expected unique values, got duplicates",
    ),
    "token weight list": (
        {"token_weight": [1.0] * 6}, TypeError, "token_weight: expected a Tensor, got list",
    ),
    "token weight int": (
        {"token_weight": torch.ones(6, dtype=torch.int64)},
        TypeError, "token_weight: expected float16, .* got torch.int64",
    ),
    "token weight shape": (
        {"token_weight": zeros(5)},
        ValueError, r"token_weight: expected .*\(2, 3\), or \(6,\), .* got \(5,\)",
    ),
    "token weight of a mask": (
        {"token_weight": zeros(6), "visual_mask": MASK},
        ValueError, r"token_weight: expected .*\(2, 3\), or \(3,\), .* got \(6,\)",
    ),
    "token weight of an index": (
        {"token_weight": zeros(3), "visual_index": index(0, 1)},
        ValueError, r"token_weight: expected .* or \(2,\), .* got \(3,\)",
    ),
    "token weight negative": (
        {"token_weight": torch.tensor([1, 1, -0.5, 1, 1, 1])},
        ValueError, "token_weight: expected non-negative values, got a minimum of -0.5",
    ),
    "token weight NaN": (
        {"token_weight": torch.full((6,), float("nan"))},
        ValueError, "token_weight: expected non-negative values, got a minimum of nan",
    ),
    "token_weight infinite": (
        {"token_weight": torch.tensor([1, 1, float("inf"), 1, 1, 1])},
        ValueError, "token_weight: expected .* a finite sum in torch.float32, got a maximum of inf",
    ),
    "token_weight with a sum beyond float32": (
        {"token_weight": torch.full((6,), 1e38)},
        ValueError, "token_weight: expected .* a finite sum .* got a maximum of 9.99",
    ),
    "token_weight beyond float32": (
        {"token_weight": torch.full((6,), 1e60, dtype=torch.float64)},
        ValueError, r"token_weight: expected .* a finite sum .* got a maximum of 1e\+60",
    ),
    "token weight device": (
        {"token_weight": zeros(6, device="meta")},
        ValueError, "token_weight: is on meta",
    ),
    "activation": (
        {"activation": "nope"},
        ValueError, f"activation: expected one of {', '.join(ACTIVATION_NAMES)}; got 'nope'",
    ),
    "activation None": ({"activation": None}, ValueError, "activation: .* got None"),
    "loss": (
        {"loss": "cosin"},
        ValueError, f"loss: expected one of {', '.join(LOSS_NAMES)}; got 'cosin'",
    ),
    "loss None": ({"loss": None}, ValueError, "loss: .* got None"),
    "parameter of a loss": (
        {"loss": "huber(beta=1.0)"}, ValueError, "huber: its parameters are: delta; got 'beta'",
    ),
    "parameter that is no number": (
        {"loss": "huber(delta=x)"}, ValueError, r"loss: expected parameters as in 'name\(delta=0.5",
    ),
    "normalize": (
        {"loss": "mse", "normalize": "batch"},
        ValueError, "normalize: expected one of none, l2, layer; got 'batch'",
    ),
    "normalize of cosine": (
        {"normalize": "l2"},
        ValueError, "normalize: loss='cosine', which normalises by itself, takes none; got 'l2'",
    ),
    "denominator zero": (
        {"denominator": 0},
        ValueError, "denominator: expected a positive finite number, got 0",
    ),
    "denominator zero Tensor": (
        {"denominator": torch.tensor(0)},
        ValueError, "denominator: got 0 for a batch of 6 visual tokens; expected a positive number",
    ),
    "denominator zero Tensor of a mask": (
        {"denominator": torch.tensor(0.0), "visual_mask": MASK},
        ValueError, "denominator: got 0 for a batch of 3 visual tokens",
    ),
    "denominator zero Tensor of an index": (
        {"denominator": torch.tensor(0.0), "visual_index": index(4, 1)},
        ValueError, "denominator: got 0 for a batch of 2 visual tokens",
    ),
    "denominator zero Tensor of weights": (
        {
            "denominator": torch.tensor(0.0), "visual_mask": MASK,
            "token_weight": torch.tensor([0.5, 0.0, 0.0]),
        },
        ValueError, "denominator: got 0 for a batch of 1 visual tokens",
    ),
    "denominator infinite": (
        {"denominator": float("inf")},
        ValueError, "denominator: expected a positive finite number, got inf",
    ),
    "denominator string": (
        {"denominator": "4"},
        TypeError, "denominator: expected a number or a 0-dim Tensor, got str",
    ),
    "denominator bool": ({"denominator": True}, TypeError, "denominator: .* got bool"),
    "denominator vector": (
        {"denominator": torch.ones(1)},
        ValueError, r"denominator: expected a number or a 0-dim Tensor, got shape \(1,\)",
    ),
    "denominator negative Tensor": (
        {"denominator": torch.tensor(-2)},
        ValueError, "denominator: expected a .*finite number, got -2",
    ),
    "denominator NaN Tensor": (
        {"denominator": torch.tensor(float("nan"))},
        ValueError, "denominator: expected a .*finite number, got nan",
    ),
    "denominator infinite Tensor": (
        {"denominator": torch.tensor(float("inf"))},
        ValueError, "denominator: expected a .*finite number, got inf",
    ),
    "denominator bool Tensor": (
        {"denominator": torch.tensor(True)},
        TypeError, r"denominator: expected a real number, got torch\.bool",
    ),
    "denominator device": (
        {"denominator": torch.tensor(3.0, device="meta")},
        ValueError, "denominator: is on meta, but hidden is on cpu",
    ),
    "eps zero": ({"eps": 0.0}, ValueError, "eps: expected a positive finite number, got 0.0"),
    "eps subnormal": ({"eps": 1e-40}, ValueError, r"eps: expected at least 1.2e-38, .* got 1e-40"),
    "eps NaN": ({"eps": float("nan")}, ValueError, "eps: expected a positive .* got nan"),
    "eps string": ({"eps": "small"}, TypeError, "eps: expected a positive number, got str"),
}  # fmt: skip

FUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "chunk_rows zero": (
        {"chunk_rows": 0},
        ValueError, "chunk_rows: expected None or a positive integer, got 0",
    ),
    "chunk_rows float": (
        {"chunk_rows": 2.0},
        TypeError, "chunk_rows: expected None or a positive integer, got float",
    ),
    "chunk_rows bool": ({"chunk_rows": True}, TypeError, "chunk_rows: .* got bool"),
    "backend": (
        {"backend": "cuda"},
        ValueError, f"backend: expected one of {', '.join(BACKENDS)}; got 'cuda'",
    ),
}  # fmt: skip

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "fused": fused_pre_loss, "eager": eager_pre_loss, "tap": pre_tap,
}  # fmt: skip


def test_the_good_arguments_are_good() -> None:
    for function in FUNCTIONS.values():
        function(**arguments())
        function(**arguments(), visual_mask=MASK, token_weight=torch.ones(3))
        function(**arguments() | {"anchor": zeros(2, 5)}, visual_index=index(5, 0))
        function(**arguments(), denominator=torch.tensor(3))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("case", COMMON.values(), ids=COMMON)
def test_bad_arguments(function: Callable[..., Any], case: Any) -> None:
    overrides, exception, message = case
    with pytest.raises(exception, match=message):
        function(**arguments() | overrides)


@pytest.mark.parametrize("function", (fused_pre_loss, pre_tap))
@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)
def test_bad_arguments_of_the_fused_functions(function: Callable[..., Any], case: Any) -> None:
    overrides, exception, message = case
    with pytest.raises(exception, match=message):
        function(**arguments() | overrides)


@pytest.mark.parametrize("function", (fused_pre_loss, eager_pre_loss))
def test_bad_reduction(function: Callable[..., Any]) -> None:
    with pytest.raises(
        ValueError, match="reduction: expected one of mean, sum, none; got 'average'"
    ):
        function(**arguments(), reduction="average")


@pytest.mark.parametrize("function", (fused_pre_loss, eager_pre_loss))
@pytest.mark.parametrize("reduction", ("sum", "none"))
@pytest.mark.parametrize("denominator", (3, torch.tensor(3.0)), ids=("number", "Tensor"))
def test_a_denominator_without_a_mean(
    function: Callable[..., Any], reduction: str, denominator: Any
) -> None:
    with pytest.raises(ValueError, match=f"denominator: .*'mean', got reduction='{reduction}'"):
        function(**arguments(), reduction=reduction, denominator=denominator)


@pytest.mark.parametrize("upcast", ("float64", torch.int64, torch.bool, float), ids=str)
def test_bad_upcast(upcast: Any) -> None:
    with pytest.raises(TypeError, match=r"upcast: expected None or .* got"):
        eager_pre_loss(**arguments(), upcast=upcast)


@pytest.mark.parametrize(
    "overrides, message",
    (
        ({"in_features": 0}, "in_features: expected an integer of at least 1, got 0"),
        ({"out_features": 2.0}, "out_features: expected an integer of at least 1, got 2.0"),
        ({"hidden_features": -3}, "hidden_features: expected an integer of at least 1, got -3"),
        ({"depth": -1}, "depth: expected an integer of at least 0, got -1"),
        ({"depth": True}, "depth: expected an integer of at least 0, got True"),
        ({"depth": 0}, "depth: 0 needs in_features == out_features, got 4 and 5"),
        ({"activation": "nope"}, "activation: expected one of gelu, .* got 'nope'"),
    ),
)
def test_bad_head(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PReHead(**{"in_features": 4, "out_features": 5} | overrides)


@pytest.mark.parametrize(
    "overrides, message",
    (
        ({"weight": -0.1}, "weight: expected a non-negative finite number, got -0.1"),
        ({"weight": float("nan")}, "weight: .* got nan"),
        ({"weight": "0.5"}, "weight: .* got '0.5'"),
        ({"weight": True}, "weight: .* got True"),
        ({"activation": "nope"}, "activation: expected one of gelu, .* got 'nope'"),
        ({"loss": "cosin"}, "loss: expected one of cosine, .* got 'cosin'"),
        ({"normalize": "batch"}, "normalize: expected one of none, .* got 'batch'"),
        ({"loss": "cosine", "normalize": "l2"}, "normalize"),
        ({"anchor": "dino"}, "anchor: expected one of pre_llm, .* got 'dino'"),
        ({"anchor": len}, "anchor_features: expected .*width A.* got None"),
        ({"anchor_features": 8}, "anchor_features: expected None with anchor='pre_llm', .* got 8"),
        ({"depth": -1}, "depth: .* got -1"),
        ({"head_features": 0}, "(head|hidden)_features: .* got 0"),
    ),
)
def test_bad_config(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PReConfig(**overrides)


def test_config_replace_names_unknown_settings() -> None:
    with pytest.raises(TypeError, match="lamda: not a setting of PRe; expected one of layers, we"):
        PReConfig().replace(lamda=0.5)
    assert PReConfig().replace(weight=2) == PReConfig(weight=2)


@pytest.mark.parametrize(
    "layers, exception, message",
    (
        (0, ValueError, "layers: the decoder has 6 layers, numbered 1 to 6; got 0"),
        ((2, 7), ValueError, "layers: the decoder has 6 layers, numbered 1 to 6; got 7"),
        ((), ValueError, r"layers: expected one or more different layers, got \(\)"),
        ((2, 2), ValueError, r"layers: expected one or more different layers, got \(2, 2\)"),
        ((2, 2.5), TypeError, r"layers: expected an int or several, got \(2, 2.5\)"),
        (True, TypeError, "layers: expected an int or several, got True"),
        ("ab", TypeError, "layers: expected an int or several, got 'ab'"),
        (2.5, TypeError, "layers: expected an int or several, got 2.5"),
    ),
)
def test_bad_layers(layers: Any, exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=message):
        PReConfig(layers=layers).resolve_layers(6)


def test_layers() -> None:
    assert PReConfig().resolve_layers(32) == (16,)
    assert PReConfig().resolve_layers(1) == (1,)
    assert PReConfig(layers=14).resolve_layers(28) == (14,)
    assert PReConfig(layers=[3, 1]).resolve_layers(4) == (3, 1)
