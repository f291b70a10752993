# SPDX-License-Identifier: Apache-2.0
"""The states of the optimizer and of the random generators: taken, checked, put back."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

_ADAM = {"exp_avg", "exp_avg_sq"}
_SET_EVERY_STEP = {"params", "lr"}


def check_optimizer(
    state: Any,
    optimizer: torch.optim.Optimizer,
    steps: int | None = None,
    idle: Collection[torch.nn.Parameter] = (),
) -> None:
    """Raise ValueError unless `state` is one of this AdamW: its groups and settings, and for each
    parameter both moments in its shape and dtype. (Of other shapes, the fused step writes past
    their end.)

    Args:
        steps: that the optimizer had done; None: any.
        idle: parameters that may never have had a gradient.
    """
    own = optimizer.state_dict()["param_groups"]
    groups = state["param_groups"]
    if [group["params"] for group in groups] != [group["params"] for group in own]:
        raise ValueError(
            f"expected an optimizer of {[len(group['params']) for group in own]} parameters, got "
            f"one of {[len(group['params']) for group in groups]}"
        )
    for mine, theirs in zip(own, groups, strict=True):
        for name in (mine.keys() & theirs.keys()) - _SET_EVERY_STEP:
            if type(theirs[name]) is not type(mine[name]) or theirs[name] != mine[name]:
                raise ValueError(f"optimizer: {name} is {theirs[name]!r}, expected {mine[name]!r}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = state["state"]
    may_lack = {id(parameter) for parameter in idle}
    lacking = {i for i, p in enumerate(parameters) if id(p) not in may_lack} - states.keys()
    strange = states.keys() - set(range(len(parameters)))
    if lacking or strange:
        raise ValueError(f"optimizer: no state of parameters {lacking}, or of others {strange}")
    for number, found in states.items():
        parameter = parameters[number]
        least = 1 if steps is None or id(parameter) in may_lack else steps
        _check_moments(f"optimizer: parameter {number}", found, parameter, least, steps)


def _check_moments(
    at: str, found: Any, parameter: torch.Tensor, least: int, most: int | None
) -> None:
    if found.keys() != {"step", *_ADAM}:
        raise ValueError(f"{at}: expected step, exp_avg and exp_avg_sq, got {sorted(found)}")
    for name in _ADAM:
        x = found[name]
        shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
        if (shape, dtype) != (parameter.shape, parameter.dtype):
            raise ValueError(
                f"{at}: {name} is {shape}, {dtype}, expected {parameter.shape}, {parameter.dtype}"
            )
    step = found["step"]
    if not isinstance(step, torch.Tensor) or step.shape != () or step.dtype != torch.float32:
        raise ValueError(f"{at}: step is {step!r}, expected a float32 number")
    if not least <= float(step) <= (float("inf") if most is None else most):
        raise ValueError(f"{at}: step is {float(step)}, expected {least} to {most}")


def generators() -> dict[str, Any]:
    """The states of torch's, NumPy's and Python's generators, as tensors and plain values only."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # the legacy global generator
    version, internal, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            position,
            has_gauss,
            gauss,
        ],
        "python": [version, list(internal), gauss_next],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def check_generators(state: dict[str, Any]) -> None:
    """Raise an error that says so unless generators can take these states; none is changed."""
    torch.Generator().set_state(state["torch"])
    np.random.RandomState(0).set_state(_numpy_state(state))
    random.Random(0).setstate(_python_state(state))
    for x in state.get("cuda", ()):
        if not isinstance(x, torch.Tensor) or x.dtype != torch.uint8 or x.dim() != 1:
            raise ValueError("expected bytes as the state of a GPU's generator")


def set_generators(state: dict[str, Any]) -> None:
    """Put back what `generators` gave."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(_numpy_state(state))
    random.setstate(_python_state(state))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _numpy_state(state: dict[str, Any]) -> tuple[Any, ...]:
    name, keys, position, has_gauss, gauss = state["numpy"]
    words = 0 <= int(keys.min()) <= int(keys.max()) < 2**32
    if not words or type(position) is not int or not 0 <= position <= 624:  # NumPy does not look
        raise ValueError("expected words of 32 bits, and a position, of NumPy's generator")
    return name, keys.numpy().astype(np.uint32), position, has_gauss, gauss


def _python_state(state: dict[str, Any]) -> tuple[Any, ...]:
    version, internal, gauss_next = state["python"]
    return version, tuple(internal), gauss_next
