# SPDX-License-Identifier: Apache-2.0
"""A model's config at reduced size: fewer layers, fewer experts, narrower MLPs.

Widths, heads and vocabularies stay, and so do all kinds of layers. A list with an entry for each
layer keeps those of the layers that stay, and a list of the numbers of layers counts anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

TEXT_LAYERS, OTHER_LAYERS, EXPERTS, MLP = 4, 2, 8, 256
DEPTHS = (
    "num_hidden_layers", "depth", "layers", "num_layers", "n_layers", "encoder_layers",
    "decoder_layers", "num_decoder_layers", "num_encoder_layers",
)  # fmt: skip
NUMBERS = re.compile(r"(index|indexes|indices|idxs|layers)$")  # what lists of layers are called
WIDTHS = re.compile(r"^(moe_|shared_expert_|dense_)?intermediate_size(_mlp)?$|ffn_dim$|^d_ff$")
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# How many of the experts a token goes to. `top_k` alone is generation's, 50 in any config of 4.57.
CHOSEN = re.compile(r"^(?!top_k$).*top_?k|per_tok(en)?$|^moe_k$")
# Layers that end the decoder and take keys and values of layers before; without them it is whole.
NONE_OF = ("num_kv_shared_layers", "num_nextn_predict_layers")
OUTSIDE = re.compile(r"vision_feature_layers?$|deepstack_layer_map$|spatial_target_layers$")


def reduced(config: Any) -> Any:
    """A config of the same class, smaller.

    Args:
        config: of transformers.
    """
    values = config.to_dict()
    text = config.get_text_config(decoder=True).to_dict().get("model_type")
    at_least = max((_depth_for(value) for value in _outside(values)), default=0)
    return type(config).from_dict(_part(values, values.get("model_type"), text, at_least))


def _part(values: dict[str, Any], kind: Any, text: Any, at_least: int) -> dict[str, Any]:
    """A config's values, those of its parts too.

    Args:
        kind: its model_type. text: that of the decoder's. at_least: so many layers.
    """
    fewer = {
        name: _part(value, value.get("model_type", kind), text, at_least)
        if isinstance(value, dict) and "model_type" in value
        else value
        for name, value in values.items()
    }
    for name in DEPTHS:
        depth = fewer.get(name)
        if isinstance(depth, int):
            kept = _kept(fewer, depth, max(TEXT_LAYERS if kind == text else OTHER_LAYERS, at_least))
            fewer = {n: _at(kept, depth, n, value) for n, value in fewer.items()}
            fewer[name] = len(kept)
    for name in NONE_OF:
        if fewer.get(name):
            fewer[name] = 0
    chosen = [v for n, v in fewer.items() if CHOSEN.search(n) and isinstance(v, int)]
    for name in COUNTS:
        if fewer.get(name):
            fewer[name] = _at_most(fewer[name], max(EXPERTS, *chosen, 0))
            fewer |= {n: 1 for n in ("n_group", "topk_group") if fewer.get(n)}
    return fewer | {n: _at_most(v, MLP) for n, v in fewer.items() if WIDTHS.search(n)}


def _kept(values: dict[str, Any], depth: int, count: int) -> list[int]:
    """The layers that stay: one of each kind, those that are named, and the first ones."""
    per_layer = [v for v in values.values() if isinstance(v, list) and len(v) == depth]
    kinds: dict[str, int] = {}  # the first layer of each
    for layer in range(depth):
        kinds.setdefault(repr([value[layer] for value in per_layer]), layer)
    named = {i % depth for n, v in values.items() if _are_numbers(n, v, depth) for i in v}
    kept = named | set(list(kinds.values())[:count])
    others = [layer for layer in range(depth) if layer not in kept]
    return sorted(kept | set(others[: max(0, count - len(kept))]))


def _at(kept: list[int], depth: int, name: str, value: Any) -> Any:
    """Of a value that has to do with layers, what is left of it."""
    if isinstance(value, list) and len(value) == depth:
        return [value[layer] for layer in kept]
    if _are_numbers(name, value, depth):
        return [kept.index(layer % depth) for layer in value]
    if isinstance(value, dict) and value and all(str(key).isdecimal() for key in value):
        return {kept.index(int(key)): x for key, x in value.items() if int(key) in kept}
    return value


def _are_numbers(name: str, value: Any, depth: int) -> bool:
    """Whether it is a list of the numbers of some layers."""
    return (
        isinstance(value, list)
        and bool(NUMBERS.search(name))
        and 0 < len(value) < depth
        and all(type(x) is int and -depth <= x < depth for x in value)
    )


def _outside(values: dict[str, Any]) -> Iterator[Any]:
    """What a config says of the layers of its parts."""
    return (value for name, value in values.items() if OUTSIDE.search(name) and value)


def _depth_for(numbers: Any) -> int:
    """How many layers there have to be so that all of these are there."""
    if isinstance(numbers, (list, tuple)):
        return max(map(_depth_for, numbers), default=0)
    return max(-numbers, numbers + 1) if isinstance(numbers, int) else 0


def _at_most(value: Any, bound: int) -> Any:
    if isinstance(value, list):
        return [_at_most(x, bound) for x in value]
    return min(value, bound) if isinstance(value, int) else value
