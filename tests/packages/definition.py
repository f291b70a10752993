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
from tests.packages.run import Run

HEADS = "pre_heads."


def make_model(checkpoint: Path, run: Run) -> nn.Module:
    """The checkpoint in float64, with the run's adapter where it had one; training, no dropout."""
    model: Any = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float64, attn_implementation="eager"
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
    checkpoint: Path, run: Run, step: Mapping[str, Any], weight: float, *, image_token: int = 4
) -> dict[str, Tensor]:
    """{name: gradient} of L_LM + weight * L_PRe of a step's micro-batches: each mean is over all
    of the step's labels, or visual tokens. Names as in `step["gradients"]`.
    """
    model = make_model(checkpoint, run)
    own, heads = split(step["weights"])
    loaded = model.load_state_dict({n: x.double() for n, x in own.items()}, strict=False)
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    heads = {n: x.double().requires_grad_(True) for n, x in heads.items()}
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    accepted = inspect.signature(inner.forward).parameters
    by_layer: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    lm_loss, labels_seen = torch.zeros((), dtype=torch.float64), 0
    for batch in step["batches"]:
        inputs = {n: x for n, x in batch.items() if n in accepted and n != "labels"}
        inputs = {
            n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for n, x in inputs.items()
        }
        with seen(inner) as states:
            logits = model(**inputs).logits
        labels = batch["labels"][:, 1:]
        lm_loss = lm_loss + F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"
        )
        labels_seen += int((labels != -100).sum())
        mask = batch["input_ids"] == image_token
        for layer in sorted({int(n.split(".")[0]) for n in heads}):
            hidden, anchors = by_layer.setdefault(layer, ([], []))
            hidden.append(states[layer][mask])
            anchors.append(states[0][mask])
    terms = []
    for layer, (hidden, anchors) in by_layer.items():
        matrices = [heads[n] for n in sorted(heads) if n.startswith(f"{layer}.weight")]
        biases = [heads[n] for n in sorted(heads) if n.startswith(f"{layer}.bias")]
        rows, targets = torch.cat(hidden), torch.cat(anchors).detach()
        terms.append(eager_pre_loss(rows, targets, matrices, biases or None))
    (lm_loss / labels_seen + weight * torch.stack(terms).mean()).backward()
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
