# SPDX-License-Identifier: Apache-2.0
"""What two processes do together under DeepSpeed; the tests read what they leave."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prereg_kernels import apply_pre
from tests.tiny import tiny_llava
from tests.trainers import low_precision_ranks, processes, ranks
from tests.trainers.rows import WEIGHT, collate, make_rows, make_trainer

EXAMPLES = Path(__file__).parents[2] / "examples"
STAGES = (2, 3)


def loop(rank: int, stage: int) -> Any:
    """A step of DeepSpeed's own engine: the gradients, the weights after it, the figures."""
    import deepspeed

    model = tiny_llava()
    ranks.freeze_vision(model)
    pre = apply_pre(model, weight=WEIGHT)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, config=config, optimizer=torch.optim.SGD(trained, lr=0.1)
    )
    batch = collate(ranks.rows_of(rank, ranks.BOTH))
    pre.denominator = ranks.global_sum(pre.count(batch)) / ranks.RANKS
    labels = ranks.global_sum((batch["labels"][:, 1:] != -100).sum()) / ranks.RANKS
    engine.backward(engine(**batch, num_items_in_batch=labels).loss)
    grads = whole_gradients(model)
    head = pre.heads[2].weight_1
    sharded = stage < 3 or head.numel() < 24 * 24
    engine.step()
    with deepspeed.zero.GatheredParameters([head], enabled=stage == 3):
        after = head.detach().clone()
    return grads, after, sharded, pre.metrics()


def low_precision(rank: int, stage: int, made_by_zero: bool) -> Any:
    """A step of a bfloat16 model: the heads' gradients, and their float32 copies around it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
    if made_by_zero:  # as from_pretrained does where Trainer's arguments came first
        with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.bfloat16):
            model = tiny_llava()
        plain = tiny_llava().bfloat16().state_dict()
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            model.load_state_dict(plain)  # the weights are drawn differently in there
    else:
        model = tiny_llava().bfloat16()
    ranks.freeze_vision(model)
    pre = apply_pre(model, weight=WEIGHT)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, config=config, optimizer=torch.optim.SGD(trained, lr=1e-4)
    )
    engine.backward(engine(**low_precision_ranks.batch_of(rank)).loss)
    named = dict(pre.heads[2].named_parameters())
    grads = {f"pre_heads.2.{name}": safe_get_full_grad(p).float() for name, p in named.items()}
    before = [safe_get_full_fp32_param(p).clone() for p in named.values()]
    engine.step()
    after = [safe_get_full_fp32_param(p).clone() for p in named.values()]
    return grads, before, after


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_grad

    found = {n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad}
    return {name: x.float().clone() for name, x in found.items() if x is not None}


def trainer(rank: int, out: Path, stage: int) -> Any:
    """PReTrainer with the example's config, uninterrupted and from its checkpoint: head and logs.

    Two micro-batches of two rows on each rank, at each step. With ZeRO-3 the models are partitioned
    from the start, as `from_pretrained` makes them.
    """
    import deepspeed

    config = json.loads((EXAMPLES / f"deepspeed_zero{stage}.json").read_text())
    config["zero_allow_untested_optimizer"] = True
    results = []
    for seed, checkpoint in ((0, None), (5, str(out / "checkpoint-1"))):
        model = tiny_llava(seed)
        ranks.freeze_vision(model)
        pre = apply_pre(model, weight=WEIGHT, seed=seed)
        made = make_trainer(
            model, out, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2,
            save_strategy="steps", save_steps=1, rows=make_rows(ranks.BOTH), deepspeed=config,
            optim="sgd",
        )  # fmt: skip
        made.train(resume_from_checkpoint=checkpoint)
        with deepspeed.zero.GatheredParameters(list(pre.heads[2].parameters()), enabled=stage == 3):
            head = [p.detach().clone() for p in pre.heads[2].parameters()]
        results.append((head, made.state.log_history))
    return results


def work(rank: int, port: int, out: Path) -> None:
    """Go through the stages, and write what each leaves."""
    processes.enter(rank, port, ranks.RANKS)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed("gloo")
    for stage in STAGES:  # before Trainer's settings, by which transformers makes models in ZeRO-3
        made = (False, True) if stage == 3 else (False,)
        found = [low_precision(rank, stage, by_zero) for by_zero in made]
        torch.save(found, out / f"low precision {stage} {rank}.pt")
    for stage in STAGES:
        torch.save(loop(rank, stage), out / f"loop {stage} {rank}.pt")
        torch.save(
            trainer(rank, out / f"trainer {stage}", stage), out / f"trainer {stage} {rank}.pt"
        )
    processes.leave()
