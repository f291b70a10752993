# SPDX-License-Identifier: Apache-2.0
"""A training step without PRe, with `apply_pre`, and with each peer on hooks, on one model.

A variant is attached before its step and detached after it, so that the others are as if it had
never been there. All of them get the same head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.loss.peers import Loss, Where, peers
from benchmarks.step.models import Batch
from prereg_kernels import PReHead, apply_pre, eager_pre_loss, remove_pre
from tests.helpers import relative_error

WEIGHT = 0.5  # of L_PRe
FACTOR, SLACK = 2.0, 1e-3

StepLoss = Callable[[Batch], Tensor]
Terms = Callable[[Batch], tuple[Tensor, Tensor]]
Attach = Callable[[Any, "Regularizer"], "Attached"]


class WrongGradientError(Exception):
    """A variant computes other gradients than the definition."""


@dataclass
class Attached:
    """What a step needs: the loss, and the head's parameters beside the model's."""

    loss: StepLoss
    head: PReHead | None
    detach: Callable[[], None]


@dataclass(frozen=True)
class Regularizer:
    """What the variants share.

    Attributes:
        layer: the decoder layer whose output predicts, counted from 1.
        state: the head's parameters, on the CPU.
        weight: of L_PRe.
    """

    layer: int
    state: Mapping[str, Tensor]
    weight: float = WEIGHT

    @classmethod
    def of(cls, model: Any, weight: float = WEIGHT) -> Regularizer:
        """With the layer and the head that `apply_pre` chooses."""
        ((layer, head),) = apply_pre(model).heads.items()
        remove_pre(model)
        return cls(layer, {name: x.cpu() for name, x in head.state_dict().items()}, weight)

    def make_head(self, model: Any) -> PReHead:
        """The head, like the model in device and dtype, by itself."""
        like = model.lm_head.weight
        features = like.shape[1]
        head = PReHead(features, features, device=like.device, dtype=like.dtype)
        head.load_state_dict(self.state)
        return head


def without(model: Any, regularizer: Regularizer) -> Attached:
    """The model's own step."""
    return Attached(lambda batch: model(**batch).loss, None, lambda: None)


def naive(model: Any, regularizer: Regularizer) -> Attached:
    """As one would write it first: all hidden states, rows by a mask, `F.cosine_similarity`."""
    head = regularizer.make_head(model)

    def loss(batch: Batch) -> Tensor:
        output = model(**batch, output_hidden_states=True)
        visual = batch["input_ids"] == model.config.image_token_id
        h = output.hidden_states[regularizer.layer][visual]
        t = output.hidden_states[0].detach()[visual]
        (w1, w2), (b1, b2) = head.weights, head.biases
        z = F.linear(F.gelu(F.linear(h, w1, b1)), w2, b2)
        pre = -F.cosine_similarity(z.float(), t.float(), dim=-1).mean()
        return output.loss + regularizer.weight * pre

    return Attached(loss, head, lambda: None)


def hooked(
    model: Any, regularizer: Regularizer, make: Callable[[], Loss] = lambda: eager_pre_loss
) -> Attached:
    """PRe by a peer, with hooks that keep the one layer's output and the anchor."""
    head = regularizer.make_head(model)
    terms, detach = hooked_terms(model, regularizer.layer, head, make())

    def loss(batch: Batch) -> Tensor:
        lm_loss, pre_loss = terms(batch)
        return lm_loss + regularizer.weight * pre_loss

    return Attached(loss, head, detach)


def hooked_terms(
    model: Any, layer: int, head: PReHead, peer_loss: Loss = eager_pre_loss
) -> tuple[Terms, Callable[[], None]]:
    """A function from a batch to (L_LM, L_PRe), and one that ends its hooks."""
    kept: dict[str, Tensor] = {}
    language_model = model.model.language_model

    def keep_anchor(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        kept["anchor"] = kwargs["inputs_embeds"].detach()

    def keep_hidden(module: nn.Module, args: Any, output: Any) -> None:
        kept["hidden"] = output[0] if isinstance(output, tuple) else output

    handles = [
        language_model.register_forward_pre_hook(keep_anchor, with_kwargs=True),
        language_model.layers[layer - 1].register_forward_hook(keep_hidden),
    ]

    def terms(batch: Batch) -> tuple[Tensor, Tensor]:
        visual = batch["input_ids"] == model.config.image_token_id
        index = visual.flatten().nonzero().squeeze(1)  # waits for the device, so before the model
        lm_loss = model(**batch).loss
        h, t = kept.pop("hidden").flatten(0, 1), kept.pop("anchor").flatten(0, 1)
        return lm_loss, peer_loss(h, t, head.weights, head.biases, visual_index=index)

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return terms, detach


def applied(model: Any, regularizer: Regularizer) -> Attached:
    """`apply_pre`: PRe inside of the backward pass. Its head would be float32 by default."""
    with torch.device(model.device):  # the host would take longer for the head than the others do
        pre = apply_pre(
            model, layers=regularizer.layer, weight=regularizer.weight, head_dtype=model.dtype
        )
    head = pre.heads[regularizer.layer]
    head.load_state_dict(regularizer.state)
    return Attached(lambda batch: model(**batch).loss, head, lambda: remove_pre(model))


WITHOUT, OURS = "without PRe", "apply_pre"
VARIANTS: dict[str, Attach] = {
    WITHOUT: without,
    "naive": naive,
    **{f"{peer.name}, hook": partial(hooked, make=cache(peer.loss)) for peer in peers(Where.STEP)},
    OURS: applied,
}


@contextmanager
def attached(model: Any, attach: Attach, regularizer: Regularizer) -> Iterator[Attached]:
    """Attached inside of the block alone."""
    variant = attach(model, regularizer)
    try:
        yield variant
    finally:
        variant.detach()


def gradients(
    model: Any, attach: Attach, regularizer: Regularizer, batch: Batch
) -> dict[str, Tensor]:
    """Of the head's parameters and of those of the layer, of one step."""
    with attached(model, attach, regularizer) as variant:
        variant.loss(batch).backward()
        layer = model.model.language_model.layers[regularizer.layer - 1]
        parts = [("layer", layer)] + ([] if variant.head is None else [("head", variant.head)])
        found = {
            f"{part}.{name}": parameter.grad.clone()
            for part, module in parts
            for name, parameter in module.named_parameters()
            if parameter.grad is not None
        }
    model.zero_grad(set_to_none=True)
    return found


def check_gradients(
    model: Any, batch: Batch, variants: Mapping[str, Attach] = VARIANTS, weight: float = 4.0
) -> dict[str, dict[str, float]]:
    """The largest errors of every variant's gradients against the naive one's in float64.

    The head has none but PRe's gradient; the layer has the text loss's too, which is why L_PRe has
    a larger weight here. (transformers computes norms in float32 in any model: truth is good to
    about 1e-7, far below the rounding that is allowed.)

    Args:
        model: a small one, in bfloat16.

    Returns:
        {variant: {"head", "layer": the largest relative Frobenius error of a parameter's gradient}}

    Raises:
        WrongGradientError: a gradient is missing, or its error is above twice the naive variant's
            for the same parameter, plus 1e-3.
    """
    regularizer = Regularizer.of(model, weight)
    truth_batch = {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}
    truth = gradients(copy.deepcopy(model).double(), naive, regularizer, truth_batch)
    eager = gradients(model, naive, regularizer, batch)
    bounds = {name: relative_error(eager[name], true) for name, true in truth.items()}
    report, wrong = {}, []
    for variant, attach in variants.items():
        if variant == WITHOUT:
            continue
        try:
            found = gradients(model, attach, regularizer, batch)
        except ImportError:  # a peer that is not installed, as each setting will say
            continue
        errors = {
            name: relative_error(found[name], true) if name in found else float("inf")
            for name, true in truth.items()
        }
        wrong += [
            f"{variant}: gradient of {name}: error {error:.1e}, the naive one's {bounds[name]:.1e}"
            for name, error in errors.items()
            if not error <= FACTOR * bounds[name] + SLACK
        ]
        report[variant] = {
            part: max(error for name, error in errors.items() if name.startswith(part))
            for part in ("head", "layer")
        }
    if wrong:
        raise WrongGradientError("; ".join(wrong))
    return report
