# SPDX-License-Identifier: Apache-2.0
"""What DDP, FSDP and DeepSpeed need of a stage: settings, and a whole model at its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.training_args import ParallelMode

from prereg_kernels._util import private
from prereg_kernels.ops.head import PReHead

WHOLE = "FULL_STATE_DICT"
"""FSDP's name of a state dict with whole tensors, on the first rank."""

_DEVICE = "ACCELERATE_TORCH_DEVICE"


def is_sharded(trainer: Any) -> bool:
    """Whether an engine has the weights, or the optimizer's, in parts."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


@contextmanager
def device_of_cpus(is_cpu: bool) -> Iterator[None]:
    """Meanwhile Accelerate's device is "cpu" where it is one.

    Of several ranks it says "cpu:0" (1.15), to which no checkpoint can be loaded.
    """
    before = os.environ.get(_DEVICE)
    if is_cpu:
        os.environ[_DEVICE] = "cpu"
    try:
        yield
    finally:
        if is_cpu and before is None:
            del os.environ[_DEVICE]
        elif before is not None:
            os.environ[_DEVICE] = before


def check_launcher() -> None:
    """Raise ValueError where ranks that torchrun starts again would wait for those before.

    It keeps one store for all its starts, in which they find the addresses of the first (torch
    2.13).
    """
    has_restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if has_restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "--max-restarts: expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's "
            "environment, without which ranks that start again wait for those before"
        )


def check_processes(arguments: Any, model_arguments: Mapping[str, Any]) -> None:
    """Raise ValueError where transformers would split each batch over the GPUs of one process.

    Of that, torch's DataParallel, PRe knows nothing. A `device_map` may spread the model instead:
    `check_spread` sees whether it has.
    """
    if arguments.n_gpu > 1 and model_arguments.get("device_map") is None:
        _refuse(arguments.n_gpu)


def check_spread(arguments: Any, model: nn.Module) -> None:
    """The same, of a model that is loaded.

    One over several devices, or on another than the first, Trainer counts as on one GPU (5.17). It
    does so here already, as a step's samples go by it.
    """
    if arguments.n_gpu <= 1:
        return
    there = {*(getattr(model, "hf_device_map", None) or {}).values()} - {"cpu", "disk"}
    if len(there) > 1 or any(torch.device(device) != arguments.device for device in there):
        setattr(arguments, private.GPUS, 1)
    else:
        _refuse(arguments.n_gpu)


def _refuse(gpus: int) -> NoReturn:
    raise ValueError(
        f"expected a process for each of {gpus} GPUs: torchrun --nproc-per-node {gpus} -m "
        "prereg_kernels train RECIPE; or one GPU, by CUDA_VISIBLE_DEVICES=0; got one process"
    )


def prepare(trainer: Any) -> None:
    """Before training: what Accelerate does not do by itself.

    Raises:
        ValueError: an engine was asked for that Accelerate does not take up here, or a class of
            FSDP's units is not in the model.
    """
    for name, is_there in (
        ("fsdp", trainer.is_fsdp_enabled), ("deepspeed", trainer.is_deepspeed_enabled)
    ):  # fmt: skip
        flag = os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true"
        if (flag or getattr(trainer.args, name)) and not is_there:
            raise ValueError(
                f"trainer.{name}: Accelerate takes it up on accelerators alone, in processes that "
                "torchrun or accelerate launch has started; got "
                f"{trainer.args.world_size} on {trainer.args.device.type}"
            )
    state = trainer.accelerator.state
    if trainer.is_fsdp_enabled:
        state.fsdp_plugin.transformer_cls_names_to_wrap = _units(
            trainer.model, state.fsdp_plugin.transformer_cls_names_to_wrap
        )
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        # So that there is a whole model at the end
        config = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        config["stage3_gather_16bit_weights_on_model_save"] = True
        trainer.add_callback(_FreshGradients(trainer))


def check_ddp(trainer: Any, *, leaves_out: bool) -> None:
    """Raise ValueError where DDP would wait for gradients that a step does not have.

    It has to look for them in the step's graph, and a reentrant checkpoint is not in it.

    Args:
        leaves_out: whether a step may have no gradient for some parameters.
    """
    arguments = trainer.args
    is_ddp = arguments.parallel_mode == ParallelMode.DISTRIBUTED and not is_sharded(trainer)
    if not is_ddp or not leaves_out:
        return
    options = arguments.gradient_checkpointing_kwargs or {}
    if arguments.gradient_checkpointing and options.get("use_reentrant"):
        setting, got = "gradient_checkpointing_kwargs: expected use_reentrant: false", "true"
    elif not arguments.ddp_find_unused_parameters:
        setting, got = "ddp_find_unused_parameters: expected true", "false"
    else:
        return
    raise ValueError(
        f"trainer.{setting} on several ranks, as steps of text alone leave parameters without a "
        f"gradient; got {got}"
    )


def _units(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    """The classes of FSDP's units; by default those that the model names, and has.

    A stage without PRe has no head, and many a model's list names layers of other models' towers.
    """
    there = {type(module).__name__ for module in model.modules()}
    head = PReHead.__name__
    if names is None:
        names = [n for n in getattr(model, private.UNSPLIT_MODULES, None) or () if n in there]
    if missing := [name for name in names if name not in there and name != head]:
        raise ValueError(
            "fsdp_config.transformer_layer_cls_to_wrap: expected classes of "
            f"{type(model).__name__}'s modules, got {', '.join(missing)}"
        )
    return [*(name for name in names if name != head), *([head] if head in there else [])]


class _FreshGradients(TrainerCallback):
    """ZeRO-3 keeps a gradient until a backward pass writes another one over it (DeepSpeed 0.19).

    A step of text alone has none for the projector, which would move by that of the step before.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        from deepspeed.utils import safe_set_local_grad

        optimizer = self._trainer.model_wrapped.optimizer
        optimizer.grad_partitions_flat_buffer.zero_()
        if optimizer.offload_optimizer:  # has them a second time
            for parameter in self._trainer.model.parameters():
                if parameter.requires_grad:
                    safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))


def save_whole(trainer: Any, folder: Path, load: Callable[[], nn.Module]) -> None:
    """A plain model with its processor, and `pre/`, whatever the engine; on all ranks at once.

    An adapter is merged, but for one of quantized weights.

    Args:
        folder: is made.
        load: the model that the stage began with.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_merged = hasattr(model, "merge_and_unload") and not getattr(model, "is_quantized", False)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type(WHOLE)
    if is_merged and not is_sharded(trainer):
        trainer.model = trainer.model_wrapped = model.merge_and_unload()
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
    if is_merged and is_sharded(trainer) and trainer.args.should_save:
        _merge(folder, load)
    trainer.accelerator.wait_for_everyone()


def _merge(folder: Path, load: Callable[[], nn.Module]) -> None:
    """In place of the adapter in a folder, the model that it makes of another."""
    from peft import PeftModel

    unset_hf_deepspeed_config()  # by which transformers would shard what this rank loads alone
    merged: Any = PeftModel.from_pretrained(load(), str(folder)).merge_and_unload()
    merged.save_pretrained(folder)
    for path in (*folder.glob("adapter_*"), folder / "README.md"):
        path.unlink(missing_ok=True)
