# SPDX-License-Identifier: Apache-2.0
"""What two processes do together with a bfloat16 model, whose heads are float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from prereg_kernels import PReHead, apply_pre
from prereg_kernels.attach.handle import PRe
from tests.tiny import tiny_llava
from tests.trainers import ranks
from tests.trainers.rows import WEIGHT, collate

BF16 = torch.bfloat16
SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    ", two layers": {"layers": (1, 3)},
    ", one head": {"layers": (1, 3), "share_head": True},
    ", whole images": {"level": "global"},
}
REDUCED = MixedPrecisionPolicy(BF16, torch.float32)


def make(dtype: torch.dtype = BF16, **settings: Any) -> tuple[Any, PRe]:
    model = tiny_llava().to(dtype)
    ranks.freeze_vision(model)
    return model, apply_pre(model, weight=WEIGHT, **settings)


def batch_of(rank: int, dtype: torch.dtype = BF16) -> dict[str, Tensor]:
    batch = collate(ranks.rows_of(rank, ranks.BOTH))
    return batch | {"pixel_values": batch["pixel_values"].to(dtype)}


def head_gradients(model: Any) -> dict[str, Tensor]:
    """Whole, by their names in the model."""
    named = ((n, p.grad) for n, p in model.named_parameters() if "pre_heads" in n)
    return {name: getattr(x, "full_tensor", x.clone)() for name, x in named}


def alone(dtype: torch.dtype = BF16, **settings: Any) -> dict[str, Tensor]:
    """The heads' gradients in one process: the mean over the ranks' batches."""
    sums: dict[str, Tensor] = {}
    for rank in range(ranks.RANKS):
        model, _ = make(dtype, **settings)
        model(**batch_of(rank, dtype)).loss.backward()
        for name, x in head_gradients(model).items():
            sums[name] = sums.get(name, torch.zeros_like(x)) + x / ranks.RANKS
    return sums


def ddp(rank: int, out: Path, **settings: Any) -> Any:
    model, _ = make(**settings)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    wrapped(**batch_of(rank)).loss.backward()
    return head_gradients(model)


def shard(model: Any, heads: Any, layers: bool, **options: Any) -> None:
    for unit in [*heads, *(model.get_decoder().layers if layers else ()), model]:
        fully_shard(unit, **options)


def fsdp(
    rank: int, out: Path, units: bool = True, mixed: bool = False, checkpointing: bool = False,
    **settings: Any,
) -> Any:  # fmt: skip
    model, pre = make(**settings)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    options = {"mp_policy": REDUCED} if mixed else {}
    shard(model, dict.fromkeys(pre.heads.values()), units, **options)
    model(**batch_of(rank)).loss.backward()
    return head_gradients(model)


def fsdp_of_one_dtype(rank: int, out: Path, lora: bool, **settings: Any) -> Any:
    """The heads among parameters of their dtype, in one unit; with LoRA its root is a wrapper."""
    model, pre = make(**settings)
    if lora:
        names = r".*language_model.*(q|v)_proj"
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))
        for head in pre.heads.values():
            head.requires_grad_(True)
    fully_shard(model)
    model(**batch_of(rank)).loss.backward()
    found = head_gradients(model)
    return {name[name.index("pre_heads") :]: x for name, x in found.items()}


def refusals(rank: int, out: Path) -> Any:
    """What each way says that puts float32 heads among trained bfloat16 parameters."""
    found = []
    for layers, options in ((False, {}), (True, {}), (True, {"mp_policy": REDUCED})):
        model, _ = make()
        try:
            shard(model, (), layers, **options)
            model(**batch_of(rank))
        except Exception as error:  # whatever a user would see
            found.append(f"{type(error).__name__}: {error}")
    return found


def wrapped(rank: int, out: Path, how: str) -> Any:
    """Heads in units that they share, or inside of what stands in their place in the model."""
    model, pre = make(layers=(1, 3))
    if how == "a list":
        fully_shard(list(pre.heads.values()))
    else:
        for name, head in pre.heads.items():
            model.pre_heads[str(name)] = checkpoint_wrapper(head, preserve_rng_state=False)
            fully_shard(model.pre_heads[str(name)])
    fully_shard(model)
    model(**batch_of(rank)).loss.backward()
    found = head_gradients(model)
    return {name.replace("_checkpoint_wrapped_module.", ""): x for name, x in found.items()}


def fsdp1(
    rank: int,
    out: Path,
    classes: tuple[type, ...],
    use_orig_params: bool,
    dtype: torch.dtype = BF16,
    mixed: bool = False,
) -> Any:
    """The heads' gradients, by a step of SGD with lr=1."""
    model, pre = make(dtype)
    before = {name: p.detach().clone() for name, p in pre.heads[2].named_parameters()}
    if not use_orig_params:
        model.requires_grad_(True)
    precision = MixedPrecision(BF16, torch.float32, BF16) if mixed else None
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy(set(classes)), device_id=torch.device("cpu"),
        use_orig_params=use_orig_params, mixed_precision=precision,
    )  # fmt: skip
    wrapped(**batch_of(rank, dtype)).loss.backward()
    torch.optim.SGD(wrapped.parameters(), lr=1.0).step()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        after = {n: p.clone() for n, p in wrapped.named_parameters() if "pre_heads" in n}
    steps = {name.rpartition(".")[2]: x for name, x in after.items()}
    return {f"pre_heads.2.{name}": x - steps[name] for name, x in before.items()}


def meta(rank: int, out: Path) -> Any:
    """Sharded on the meta device: the heads after `to_empty`, and after `assign=True`."""
    found = []
    for assign in (False, True):
        with torch.device("meta"):
            model = tiny_llava()
        pre = apply_pre(model, seed=4)
        plain = tiny_llava().state_dict()
        fully_shard(pre.heads[2])
        fully_shard(model)
        if not assign:
            model.to_empty(device="cpu")
        else:
            own = {name: p for name, p in model.named_parameters() if name in plain}
            plain = {
                name: dist.tensor.distribute_tensor(plain[name], p.device_mesh, p.placements)
                for name, p in own.items()
            }
            model.load_state_dict(plain, strict=False, assign=True)
        found.append([p.full_tensor() for p in pre.heads[2].parameters()])
    return found


HEADS_TOO = (LlamaDecoderLayer, PReHead)
CASES: dict[str, Callable[[int, Path], Any]] = {
    **{f"ddp{name}": partial(ddp, **settings) for name, settings in SETTINGS.items()},
    **{f"fsdp{name}": partial(fsdp, **settings) for name, settings in SETTINGS.items()},
    "fsdp, no layers": partial(fsdp, units=False),
    "fsdp, mixed": partial(fsdp, mixed=True),
    "fsdp, checkpointing": partial(fsdp, checkpointing=True),
    "fsdp, LoRA": partial(fsdp_of_one_dtype, lora=True),
    "fsdp, bfloat16": partial(fsdp_of_one_dtype, lora=False, head_dtype=BF16),
    "fsdp, refusals": refusals,
    "fsdp, a list": partial(wrapped, how="a list"),
    "fsdp, checkpoint": partial(wrapped, how="checkpoint"),
    "fsdp1": partial(fsdp1, classes=HEADS_TOO, use_orig_params=True),
    "fsdp1, flat": partial(fsdp1, classes=HEADS_TOO, use_orig_params=False),
    "fsdp1, float32": partial(
        fsdp1, classes=HEADS_TOO, use_orig_params=True, dtype=torch.float32
    ),
    "fsdp1, float32, root": partial(
        fsdp1, classes=(LlamaDecoderLayer,), use_orig_params=True, dtype=torch.float32
    ),
    "fsdp1, mixed": partial(
        fsdp1, classes=HEADS_TOO, use_orig_params=True, dtype=torch.float32, mixed=True
    ),
    "meta": meta,
}  # fmt: skip


def work(rank: int, port: int, out: Path) -> None:
    ranks.work(rank, port, out, CASES)
