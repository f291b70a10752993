# SPDX-License-Identifier: Apache-2.0
"""Parameter groups for an optimizer, in which the heads have their own rate and decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from prereg_kernels.attach.config import PReConfig
from prereg_kernels.attach.state import State


def parameter_groups(
    state: State, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The groups that `PRe.parameter_groups` returns."""
    from transformers import Trainer

    # A method of Trainer that asks the trainer for nothing
    decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), state.model))
    named = [(name, p) for name, p in state.model.named_parameters() if p.requires_grad]
    of_model: list[dict[str, Any]] = [
        {
            "params": [p for name, p in named if (name in decayed) == is_decayed],
            "lr": learning_rate,
            "weight_decay": weight_decay if is_decayed else 0.0,
        }
        for is_decayed in (True, False)
    ]
    of_heads = take_heads(of_model, state)
    return [group for group in of_model + of_heads if group["params"]]


def take_heads(groups: Iterable[dict[str, Any]], state: State) -> list[dict[str, Any]]:
    """Take the heads out of the groups. Return groups for them with otherwise the same options.

    A bias has no decay of its own.
    """
    taken, config = [], state.config
    for group in groups:
        inside = _heads_in(group, state)
        group["params"] = [p for p in group["params"] if id(p) not in inside]
        for is_bias in (False, True):
            params = [p for p, name in inside.values() if ("bias" in name) == is_bias]
            if params:
                taken.append({**group, **_own(config, is_bias), "params": params})
    return taken


def has_own(config: PReConfig) -> bool:
    """Whether the heads have a learning rate or a decay of their own."""
    return bool(_own(config, is_bias=False))


def are_as_set(groups: Iterable[dict[str, Any]], state: State) -> bool:
    """Whether groups that somebody made have the rate and decay that the heads are to have."""
    for group in groups:
        for _, name in _heads_in(group, state).values():
            for key, value in _own(state.config, "bias" in name).items():
                # A schedule, which has changed the rate, keeps what it began with
                if group.get("initial_lr" if key == "lr" else key, group.get(key)) != value:
                    return False
    return True


def _heads_in(group: dict[str, Any], state: State) -> dict[int, tuple[Any, str]]:
    """{id: (parameter, name)}"""
    names = {id(p): name for name, p in state.parameters().items()}
    return {id(p): (p, names[id(p)]) for p in group["params"] if id(p) in names}


def _own(config: PReConfig, is_bias: bool) -> dict[str, float]:
    own = {}
    if config.head_learning_rate is not None:
        own["lr"] = config.head_learning_rate
    if config.head_weight_decay is not None:
        own["weight_decay"] = 0.0 if is_bias else config.head_weight_decay
    return own
