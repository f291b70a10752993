# SPDX-License-Identifier: Apache-2.0
"""The gradients of a recorded step by the definition, in float64, on a model without PRe."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from prereg_kernels import eager_pre_loss
from tests.attached import seen
from tests.encoder_rows import SOURCES, encoder_rows, tower_rows
from tests.packages.run import Run

HEADS = "pre_heads."


def make_model(checkpoint: Path, run: Run, attention: str = "eager") -> nn.Module:
    """The checkpoint in float64, with the run's adapter where it had one; training, no dropout."""
    model: Any = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float64, attn_implementation=attention
    )
    if (run.recorded / "adapter_config.json").exists():
        from peft import PeftConfig, get_peft_model

        model = get_peft_model(model, PeftConfig.from_pretrained(str(run.recorded)))
    return model.train()


def split(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the model's own, those of the heads), the latter by "LAYER.NAME"."""
    own = {n: x for n, x in named.items() if HEADS not in n}
    return own, {n.split(HEADS)[1]: x for n, x in named.items() if HEADS in n}


def gradients(
    checkpoint: Path,
    run: Run,
    step: Mapping[str, Any],
    weight: float,
    *,
    autocast: torch.dtype | None = None,
    image_token: int = 4,
    anchor: str = "pre_llm",
    is_mean_of_means: bool = False,
    has_lm_loss: bool = True,
) -> dict[str, Tensor]:
    """{name: gradient} of L_LM + weight * L_PRe of a step's micro-batches: each mean is over all
    of the step's labels, or visual tokens. Names as in `step["gradients"]`.

    Args:
        autocast: in this, on the weights as they were recorded, with the attention that trainers
            take by default, which rounds in places of its own; else in float64.
        anchor: "pre_llm", or "pre_projector": rows of `tests/encoder_rows.py`.
        is_mean_of_means: of L_LM: the trainer takes it so, over the micro-batches' means.
        has_lm_loss: False for the gradients of weight * L_PRe alone, of batches without labels.
    """
    is_exact = autocast is None
    model = make_model(checkpoint, run, "eager" if is_exact else "sdpa")
    own, heads = split(step["weights"])
    own, heads = (
        {n: (x.double() if is_exact else x.clone()).requires_grad_(True) for n, x in each.items()}
        for each in (own, heads)
    )
    loaded = model.load_state_dict(own, strict=False, assign=True)
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.tie_weights()  # as they were before
    accepted = inspect.signature(inner.forward).parameters
    by_layer: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    sums, counts = [], []
    width = heads[max(n for n in heads if ".weight" in n)].shape[0]  # of the anchor
    for batch in step["batches"]:
        inputs = {n: x for n, x in batch.items() if n in accepted and n != "labels"}
        inputs = {
            n: x.double() if is_exact and isinstance(x, Tensor) and x.is_floating_point() else x
            for n, x in inputs.items()
        }
        with torch.autocast("cpu", autocast, enabled=not is_exact):
            rows_of = encoder_rows if inner.config.model_type in SOURCES else tower_rows
            rows = rows_of(inner, inputs, width) if anchor == "pre_projector" else None
            with seen(inner) as states:
                logits = model(**inputs).logits
        entered = states[0]
        if rows is not None:
            entered = rows.new_zeros(*entered.shape[:2], width)
            entered[batch["input_ids"] == image_token] = rows
        if has_lm_loss:
            labels = batch["labels"][:, 1:]
            sums.append(
                F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
            )
            counts.append(int((labels != -100).sum()))
        # One that nothing attends to is padding, as LLaMA-Factory adds to a batch of text alone.
        mask = (batch["input_ids"] == image_token) & batch["attention_mask"].bool()
        for layer in sorted({int(n.split(".")[0]) for n in heads}):
            hidden, anchors = by_layer.setdefault(layer, ([], []))
            hidden.append(states[layer][mask])
            anchors.append(entered[mask])
    terms = []
    for layer, (hidden, anchors) in by_layer.items():
        matrices = [heads[n] for n in sorted(heads) if n.startswith(f"{layer}.weight")]
        biases = [heads[n] for n in sorted(heads) if n.startswith(f"{layer}.bias")]
        rows, targets = torch.cat(hidden), torch.cat(anchors).detach()
        with torch.autocast("cpu", autocast, enabled=not is_exact):
            terms.append(eager_pre_loss(rows, targets, matrices, biases or None))
    lm_loss = sum(sums) / max(sum(counts), 1)
    if is_mean_of_means:
        lm_loss = sum(x / n for x, n in zip(sums, counts, strict=True)) / len(sums)
    (lm_loss + weight * torch.stack(terms).mean()).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    prefix = next(n for n in step["weights"] if HEADS in n).split(HEADS)[0] + HEADS
    return found | {prefix + n: x.grad for n, x in heads.items() if x.grad is not None}


def errors(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative error of "model" and of "heads": of all their numbers in one vector."""
    assert ours.keys() == expected.keys(), ours.keys() ^ expected.keys()
    found = {}
    for name, which in (("model", 0), ("heads", 1)):
        a, b = split(ours)[which], split(expected)[which]
        assert a, name
        difference = sum(((a[n].double() - b[n].double()) ** 2).sum() for n in a)
        total = sum((x.double() ** 2).sum() for x in b.values())
        assert total > 0, name
        found[name] = float((difference / total).sqrt())
    return found
