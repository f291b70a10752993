# SPDX-License-Identifier: Apache-2.0
"""What two processes do together, one of them without an image; the tests read what they leave."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from prereg_kernels import apply_pre, find_pre
from prereg_kernels.trainers import PReCallback, PReTrainer
from tests.attach.misplaced import FAMILY, WORD
from tests.tiny import PATCHES, gradients, tiny_llava
from tests.trainers import processes
from tests.trainers.rows import (
    IMAGES,
    WEIGHT,
    Gradients,
    collate,
    make_rows,
    make_trainer,
    step_gradients,
)

RANKS = 2
CHECKPOINTING: dict[str, Any] = {  # 4.57's default is reentrant
    "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
}  # fmt: skip
BOTH = (1, 2, 1, 0, 2, 0, 3, 1)  # images, of which each rank has some


def rows_of(rank: int, images: Sequence[int] = IMAGES) -> list[Any]:
    """As Trainer deals them, in batches of two."""
    return [row for number, row in enumerate(make_rows(images)) if number // 2 % RANKS == rank]


def trainer_gradients(rank: int, out: Path, cls: type[Trainer], **arguments: Any) -> Any:
    """Of a step of two micro-batches of two rows on each rank."""
    model = tiny_llava()
    model.accepts_loss_kwargs = arguments.pop("accepts_loss_kwargs", True)
    if arguments.pop("frozen_tower", False):
        model.model.vision_tower.requires_grad_(False)
    apply_pre(model, weight=WEIGHT, **arguments.pop("settings", {}))
    arguments = {"ddp_find_unused_parameters": True} | arguments
    (step,) = step_gradients(model, out, 2, 2, cls=cls, **arguments)
    return step


def figures(rank: int, out: Path) -> Any:
    """What each rank logs of two steps of a micro-batch each."""
    model = tiny_llava()
    apply_pre(model, layers=(1, 3))
    trainer = make_trainer(
        model, out, per_device_train_batch_size=2, logging_steps=2, learning_rate=0.0
    )
    trainer.train()
    return trainer.state.log_history[0]


class OwnLoss(Trainer):
    """One with a loss of its own, of the same value, by the labels of all ranks."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return loss * self.accelerator.num_processes / num_items_in_batch


ALIKE = make_rows((1,) * 8, (5,) * 8)  # a share of labels is one of visual tokens


def tapped(rank: int, out: Path) -> Any:
    """Gradients of a step: PRe by a callback, and by hand, where it says what it cannot know."""
    callback = PReCallback(weight=WEIGHT, gradient="tap")
    keeper, model = Gradients(), tiny_llava()
    how: dict[str, Any] = {
        "cls": OwnLoss, "rows": ALIKE, "per_device_train_batch_size": 2, "optim": "sgd",
        "gradient_accumulation_steps": 2, "learning_rate": 0.0, "ddp_find_unused_parameters": True,
    }  # fmt: skip
    make_trainer(model, out, callbacks=[callback, keeper], **how).train()
    by_hand = Gradients()
    apply_pre(model := tiny_llava(), weight=WEIGHT, gradient="tap")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(model, out, callbacks=[by_hand], **how).train()
    said = [str(w.message) for w in caught if str(w.message).startswith("PRe")]
    return keeper.steps[0], by_hand.steps[0], said


class Uncounted(PReTrainer):
    """One that does not know the rows of a batch beforehand."""

    def count_rows(self, batch: Any) -> None:
        return None


def evaluated(rank: int, out: Path) -> Any:
    """The metrics of an evaluation, of four rows on each rank, one rank without an image."""
    model = tiny_llava()
    apply_pre(model, value_in_eval=True)
    trainer = make_trainer(model, out, eval_dataset=make_rows(), per_device_eval_batch_size=2)
    return trainer.evaluate()


def resumed(rank: int, out: Path) -> Any:
    """The weights after an uninterrupted run, and after one that goes on from its checkpoint."""
    states = []
    for seed, checkpoint in ((0, None), (5, str(out / "saved" / "checkpoint-2"))):
        model = tiny_llava(seed)
        apply_pre(model, seed=seed)
        trainer = make_trainer(
            model, out / "saved", per_device_train_batch_size=2, max_steps=4,
            save_strategy="steps", save_steps=2, train_sampling_strategy="random",
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        states.append({name: x.clone() for name, x in model.state_dict().items()})
    return states


def ddp_loop(rank: int, out: Path) -> Any:
    """DDP without a trainer: gradients are averaged, so the denominator is a rank's share."""
    model = tiny_llava()
    pre = apply_pre(model, weight=WEIGHT)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    batch = collate(rows_of(rank))
    pre.denominator = global_sum(pre.count(batch)) / RANKS
    labels = global_sum((batch["labels"][:, 1:] != -100).sum()) / RANKS
    wrapped(**batch, num_items_in_batch=labels).loss.backward()
    return gradients(model)


def fsdp_loop(
    rank: int,
    out: Path,
    *,
    reshard: bool = True,
    own_unit: bool = False,
    mixed: bool = False,
    checkpointing: bool = False,
    use_reentrant: bool = False,
    **settings: Any,
) -> Any:
    """FSDP2 on the decoder layers and the rest; the rank without images trains what it uses."""
    model = tiny_llava()
    freeze_vision(model)
    pre = apply_pre(model, weight=WEIGHT, **settings)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else None
    options = {"reshard_after_forward": reshard} | ({"mp_policy": policy} if policy else {})
    units = list(model.model.language_model.layers)
    for unit in units + (list(dict.fromkeys(pre.heads.values())) if own_unit else []):
        fully_shard(unit, **options)
    fully_shard(model, **options)
    batch = collate(rows_of(rank))
    pre.denominator = global_sum(pre.count(batch)) / RANKS
    labels = global_sum((batch["labels"][:, 1:] != -100).sum()) / RANKS
    model(**batch, num_items_in_batch=labels).loss.backward()
    sharded = all(isinstance(p, DTensor) for p in pre.heads[max(pre.heads)].parameters())
    grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    return sharded, grads, pre.metrics()


def refused(rank: int, out: Path) -> str:
    """What a shared head in a unit of its own says to reentrant checkpointing."""
    how: dict[str, Any] = {"own_unit": True, "checkpointing": True, "use_reentrant": True}
    try:
        fsdp_loop(rank, out, **how, share_head=True, layers=(1, 3))
    except ValueError as error:
        return str(error)
    return ""


def in_bfloat16() -> dict[str, Tensor]:
    """What `fsdp_loop` with mixed precision computes, in one process: each rank's share, summed."""
    sums: dict[str, Tensor] = {}
    batches = [collate(rows_of(rank)) for rank in range(RANKS)]
    tokens = sum(IMAGES) * PATCHES
    labels = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    for batch in batches:
        model = tiny_llava()
        freeze_vision(model)
        pre = apply_pre(model, weight=WEIGHT)
        for p in model.parameters():  # and no buffer, as FSDP
            p.data = p.data.bfloat16()
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].bfloat16()
        pre.denominator = tokens
        model(**batch, num_items_in_batch=labels).loss.backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                sums[name] = sums.get(name, torch.zeros(p.shape)) + p.grad.float()
    return sums


MIXED = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def checked(rank: int, out: Path, wrap: Callable[[Any], Any]) -> Any:
    """What the first steps say: to both ranks of the second step, and to rank 0 of the third.

    There a word of theirs is counted as visual. The last step is right again, on both. Units that
    are sharded wait for those of a rank that raised, so there the third step is the first again.
    """
    model = tiny_llava()
    freeze_vision(model)
    apply_pre(model, family=FAMILY)
    wrapped, said = wrap(model), []
    alone = rank == 0 and wrapped is not model
    for wrong, labels in ((False, True), (True, False), (alone, True), (False, True)):
        batch = collate(rows_of(rank, BOTH))
        batch["input_ids"][batch["input_ids"] == WORD] = WORD + 1
        if wrong:
            batch["input_ids"][:, -1], batch["attention_mask"][:, -1] = WORD, 1
        if not labels:
            del batch["labels"]
        if len(said) == 2:  # arguments that are new
            batch["use_cache"] = False
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="PRe")
            try:
                loss = wrapped(**batch).loss
                said.append("")
            except ValueError as error:
                said.append(str(error))
        dist.barrier()
        if len(said) in (1, 4):  # a backward that both ranks take part in
            loss.backward()
    return said


def in_ddp(model: Any) -> Any:
    return DistributedDataParallel(model, find_unused_parameters=True)


def sharded(model: Any, policy: MixedPrecisionPolicy, root: MixedPrecisionPolicy) -> Any:
    """The policy of units of layers and heads, and that of the rest with the embeddings."""
    heads = find_pre(model).heads.values()
    for unit in (*model.model.language_model.layers, *heads):
        fully_shard(unit, mp_policy=policy)
    fully_shard(model, mp_policy=root)
    return model


def fsdp_files(rank: int, out: Path) -> Any:
    """Heads before they are sharded, and what a sharded model of another seed makes of the files
    that `pre.save`, and `save_pretrained` with a whole state dict, write of them."""
    model = tiny_llava()
    heads = apply_pre(model, layers=(1, 3), seed=1).heads
    expected = [p.detach().clone() for layer in heads for p in heads[layer].parameters()]
    fully_shard(model)
    find_pre(model).save(out / "saved")
    whole = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    model.save_pretrained(out / "model", state_dict=whole, is_main_process=rank == 0)
    dist.barrier()
    found = []
    for name in ("saved", "model"):
        other = tiny_llava()
        pre = apply_pre(other, layers=(1, 3), seed=2)
        fully_shard(other)
        pre.load(out / name)
        parameters = [p for layer in pre.heads for p in pre.heads[layer].parameters()]
        found.append([p.full_tensor().clone() for p in parameters])
    return expected, found


def passes_of_states(rank: int, out: Path) -> Any:
    """The training passes that a sharded model, fresh each time, has after it read a state of one
    that has had 7: sharded, whole on one rank, of torch's files, read before it is sharded."""

    def sharded(passes: int) -> tuple[Any, Any]:
        model = tiny_llava()
        pre = apply_pre(model)
        pre.passes = passes
        fully_shard(model)
        return model, pre

    model, _ = sharded(7)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = get_model_state_dict(model, options=whole)  # on rank 0, and empty on the other
    dcp.save(get_model_state_dict(model), checkpoint_id=out)

    def read_files(fresh: Any) -> None:
        dcp.load(target := get_model_state_dict(fresh), checkpoint_id=out)
        set_model_state_dict(fresh, target)

    found = []
    for read in (
        lambda fresh: fresh.load_state_dict(model.state_dict()),
        lambda fresh: set_model_state_dict(fresh, state, options=spread),
        read_files,
    ):
        fresh, pre = sharded(0)
        read(fresh)
        found.append(pre.passes)

    # As Accelerate does with `cpu_ram_efficient_loading`: one rank has weights, before sharding.
    late = tiny_llava()
    pre = apply_pre(late)
    pre.passes = 7 if rank == 0 else 0
    plain = late.state_dict()
    fully_shard(late.to("meta"))
    main = SimpleNamespace(is_main_process=rank == 0)
    fsdp2_load_full_state_dict(main, late, plain)
    return [*found, pre.passes]


def freeze_vision(model: Any) -> None:
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)


def global_sum(count: Tensor) -> Tensor:
    count = count.float()
    dist.all_reduce(count)
    return count


CASES: dict[str, Callable[[int, Path], Any]] = {
    "trainer": lambda rank, out: trainer_gradients(rank, out, PReTrainer),
    "trainer, images on both": lambda rank, out: trainer_gradients(
        rank, out, PReTrainer, rows=make_rows(BOTH)
    ),
    "trainer, labels of each rank": lambda rank, out: trainer_gradients(
        rank, out, PReTrainer, average_tokens_across_devices=False
    ),
    "trainer, divided": lambda rank, out: trainer_gradients(
        rank, out, PReTrainer, accepts_loss_kwargs=False
    ),
    "trainer, checkpointing": lambda rank, out: trainer_gradients(
        rank, out, PReTrainer, **CHECKPOINTING
    ),
    "trainer, reentrant": lambda rank, out: trainer_gradients(
        rank,
        out,
        PReTrainer,
        gradient_checkpointing=True,
        rows=make_rows(BOTH),
        gradient_checkpointing_kwargs={"use_reentrant": True},
        ddp_find_unused_parameters=False,  # DDP's own need: with reentrant, it finds too many,
        frozen_tower=True,  # and parts of a tower's parameters are not used
    ),
    "trainer, label smoothing": lambda rank, out: trainer_gradients(
        rank, out, PReTrainer, label_smoothing_factor=0.1
    ),
    "trainer, whole images, one head": lambda rank, out: trainer_gradients(
        rank,
        out,
        PReTrainer,
        **CHECKPOINTING,
        settings={"level": "global", "layers": (1, 3), "share_head": True},
    ),
    "trainer, rows not counted": lambda rank, out: trainer_gradients(
        rank, out, Uncounted, rows=make_rows(BOTH), accepts_loss_kwargs=False
    ),
    "evaluated": evaluated,
    "plain trainer": lambda rank, out: trainer_gradients(rank, out, Trainer),
    "trainer with a loss of its own": tapped,
    "figures": figures,
    "resumed": resumed,
    "ddp loop": ddp_loop,
    "fsdp loop": fsdp_loop,
    "fsdp loop, whole images": lambda rank, out: fsdp_loop(rank, out, level="global"),
    "fsdp loop, kept": lambda rank, out: fsdp_loop(rank, out, reshard=False),
    "fsdp loop, head apart": lambda rank, out: fsdp_loop(rank, out, own_unit=True),
    "fsdp loop, checkpointing": lambda rank, out: fsdp_loop(rank, out, checkpointing=True),
    "fsdp loop, checkpointing, head apart": lambda rank, out: fsdp_loop(
        rank, out, own_unit=True, checkpointing=True
    ),
    "fsdp loop, one head apart": lambda rank, out: fsdp_loop(
        rank, out, own_unit=True, checkpointing=True, share_head=True, layers=(1, 3)
    ),
    "fsdp loop, one head apart, reentrant": refused,
    "fsdp loop, mixed": lambda rank, out: fsdp_loop(rank, out, own_unit=True, mixed=True),
    "checked, ddp": lambda rank, out: checked(rank, out, in_ddp),
    "checked, fsdp": lambda rank, out: checked(
        rank, out, lambda model: sharded(model, MixedPrecisionPolicy(), MixedPrecisionPolicy())
    ),
    "checked, fsdp, mixed": lambda rank, out: checked(
        rank, out, lambda model: sharded(model, MIXED, MIXED)
    ),
    "checked, fsdp, mixed layers": lambda rank, out: checked(
        rank, out, lambda model: sharded(model, MIXED, MixedPrecisionPolicy())
    ),
    "fsdp files": fsdp_files,
    "fsdp states": passes_of_states,
}


def work(
    rank: int, port: int, out: Path, cases: dict[str, Callable[[int, Path], Any]] = CASES
) -> None:
    """Go through the cases, and write what each returns."""
    processes.enter(rank, port, RANKS)
    # Where Trainer reads a rank's optimizer state to, and torch knows "cpu" alone.
    torch.serialization.register_package(
        1, lambda _: None, lambda storage, where: storage if where == "cpu:0" else None
    )
    dist.init_process_group("gloo")
    for name, case in cases.items():
        torch.save(case(rank, out / name), out / f"{name} {rank}.pt")
    processes.leave()


def run(out: Path, work: Callable[[int, int, Path], None] = work) -> None:
    """All cases on two processes."""
    processes.run(out, work, RANKS)


def vision(name: str) -> bool:
    """Whether a parameter is one that `freeze_vision` freezes."""
    return "vision_tower" in name or "multi_modal_projector" in name
