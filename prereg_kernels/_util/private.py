# SPDX-License-Identifier: Apache-2.0
"""Every private name of torch and transformers that the package uses, and what it stands for.

No public name does the same. Such a name may change with any release, so each has a test of its own
(tests/util/test_private.py), which fails there by name. What runs in each call of the op is bound
once, and costs what torch's own name costs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, profiler
from torch.utils import _python_dispatch, _pytree, checkpoint

# Autograd.

current_autograd_node = torch._C._current_autograd_node
"""The node whose backward runs; None outside of backward."""

next_autograd_node: Any = torch._C._autograd._get_sequence_nr
"""The number of the next node of autograd's graph that this thread makes."""


def node_number(node: Any) -> int:
    """Of one that was made."""
    return int(node._sequence_nr())


keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
"""Within backward: whether its graph stays for another one (`retain_graph=True`)."""

is_functorch_active = torch._C._are_functorch_transforms_active
"""Whether one of torch.func's transforms runs this code."""

is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
"""Whether a tensor is one that such a transform sees."""


def after_backward(function: Any) -> None:
    """Within backward: call this at its end."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def is_in_forward_mode() -> bool:
    """Whether forward-mode differentiation is on: without it, no tensor carries a tangent."""
    return forward_ad._current_level >= 0


version_of: Callable[[Tensor], int] = attrgetter("_version")
"""The number that every write in place to a tensor counts up."""


def compiles_frames() -> bool:
    """Whether torch.compile looks at each Python function that is called here, as a caller's
    backward pass within a compiled function has it."""
    return callable(torch._C._dynamo.eval_frame.get_eval_frame_callback())


def profiler_runs() -> bool:
    """Whether a profiler of torch's records, `torch.profiler.profile` or `emit_nvtx`."""
    return profiler._is_profiler_enabled


def keep_address(x: Tensor) -> None:
    """As `torch._dynamo.mark_static_address`, which would load the compiler."""
    x._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]


def storage_of(x: Tensor) -> int:
    """Which memory a tensor has, on the meta device too, where none has an address."""
    return int(x.untyped_storage()._cdata)


# Operators, as a mode sees them.

DispatchMode = _python_dispatch.TorchDispatchMode
"""The class of the modes that see each op."""
leaves_of = _pytree.tree_leaves
"""What is in lists, tuples and dicts within each other."""
with_leaves = _pytree.tree_map
"""The same with a function of each."""

TO_COPY = torch.ops.aten._to_copy.default
"""Behind `x.to(...)`."""
ITEM = torch.ops.aten._local_scalar_dense.default
"""Behind `x.item()`, `bool(x)` and `int(x)`."""
GROUPED_PRODUCTS = tuple(
    getattr(holder, name)
    for holder, name in ((torch, "_grouped_mm"), (nn.functional, "grouped_mm"))
    if hasattr(holder, name)
)
"""Rows, each times the matrix of its group: of a mixture of experts."""


# Checkpointing: the hooks of saved tensors, and the modes that see each op.

CHECKPOINT = "torch.utils.checkpoint"
"""The module of the hooks that a non-reentrant checkpoint has on saved tensors."""
REENTRANT_NODE = "CheckpointFunctionBackward"
"""The node whose backward runs a reentrant checkpoint again."""


def top_saved_tensors_hooks() -> tuple[Any, Any] | None:
    """The innermost pair of hooks; None where there are none."""
    hooks: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks


def pop_saved_tensors_hooks() -> None:
    """Take the innermost pair off, whoever put it on."""
    torch._C._autograd._pop_saved_tensors_default_hooks()


def push_saved_tensors_hooks(pack: Any, unpack: Any) -> None:
    """Put a pair on."""
    torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


dispatch_depth = torch._C._len_torch_dispatch_stack
"""How many modes see each op."""


def dispatch_modes() -> list[Any]:
    """The modes that see each op, the innermost last."""
    return list(_python_dispatch._get_current_dispatch_mode_stack())


def is_selection(mode: Any) -> bool:
    """Whether a mode is one of selective checkpointing, of its first run or its second."""
    kinds = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
    return isinstance(mode, kinds)


def pop_dispatch_mode() -> None:
    """Take the innermost mode off."""
    _python_dispatch._pop_mode()


def push_dispatch_mode(mode: Any) -> None:
    """Put a mode on."""
    _python_dispatch._push_mode(mode)


# Processors: which products of low precision they have.


def has_avx2() -> bool:
    """Whether this is an x86 with AVX2."""
    return bool(torch.cpu._is_avx2_supported())


def has_avx512_bf16() -> bool:
    """Whether it has AVX-512's products of bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def has_amx_tiles() -> bool:
    """Whether it has tile registers, and the system lets us use them."""
    return bool(torch.cpu._is_amx_tile_supported())


def has_onednn_bf16() -> bool:
    """Whether oneDNN takes bfloat16 here: on x86, with any AVX-512."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_onednn_fp16() -> bool:
    """Whether oneDNN takes float16 here."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


# Modules, and what wraps them.

EXTRA_STATE = "_extra_state"
"""The entry of a state dict that `get_extra_state` fills."""
IS_REPLICA = "_is_replica"
"""What `nn.DataParallel` sets on the copies that its threads run."""
FLAT_PARAMETER = "_flat_param"
"""How FullyShardedDataParallel names the parameter that it packs others into."""


def submodules(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own, by name: a wrapper passes on attributes of what it wraps, but not these."""
    return module._modules


def drop_pre_hooks(module: nn.Module, ids: set[int]) -> None:
    """Those with one of these `RemovableHandle.id`s, which are unique in a process."""
    for hook in ids & module._forward_pre_hooks.keys():
        del module._forward_pre_hooks[hook]
        module._forward_pre_hooks_with_kwargs.pop(hook, None)


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of it is a graph of torch.compile, by `compile()` or as what wraps another."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def active_ddp() -> Any:
    """The DistributedDataParallel whose forward runs, or None."""
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


def ddp_parameters(ddp: Any) -> Sequence[nn.Parameter]:
    """Those whose gradients it averages over ranks."""
    parameters: Sequence[nn.Parameter] = ddp._module_parameters
    return parameters


FSDP_MANAGED = "_is_fsdp_managed_module"
"""What FSDP sets on each module that it takes charge of; `fully_shard` does so at its end."""

# transformers' models and configs.

IGNORED_ON_SAVE = "_keys_to_ignore_on_save"
"""A model's attribute: the names that `save_pretrained` leaves out."""
UNSPLIT_MODULES = "_no_split_modules"
"""A model's attribute: the classes that Accelerate gives an FSDP unit of their own."""
GPUS = "_n_gpu"
"""An attribute of TrainingArguments: what its `n_gpu` says."""
SAVED_FILES = "_data_files"
"""The entry of state.json, of a data set that `datasets` has saved, that names its files."""
NAME_OR_PATH = "_name_or_path"
"""The entry of `config.to_dict()` that says where a config came from."""
ATTENTION = "_attn_implementation"
"""A config's attribute: which code computes attention."""
EXPERTS = "_experts_implementation"
"""A config's attribute: which code computes experts."""
RECORDED_OUTPUTS = "_can_record_outputs"
"""A model's attribute: the classes of the modules whose outputs transformers records, by kind."""
DEVICE_MESH = "_device_mesh"
"""A model's attribute: the mesh by which transformers has distributed it, or None."""
IMPLEMENTATIONS = (
    ATTENTION,
    "_attn_implementation_internal",
    EXPERTS,
    "_experts_implementation_internal",
)
"""Keys under which a config.json can name code to run."""

# DeepSpeed's.


def ulysses_group() -> Any:
    """The process group of the ranks that share each sequence."""
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    return groups._get_sequence_parallel_group()


# What classes of the package define, and torch or transformers call.

MODULE_METHODS = frozenset({"_apply", "_load_from_state_dict"})
"""Of nn.Module: what `to` and its like call, and what `load_state_dict` does, a module each."""
TRAINER_METHODS = frozenset(
    {
        "_save",
        "_load_from_checkpoint",
        "_load_best_model",
        "_issue_warnings_after_load",
        "_push_from_checkpoint",
    }
)
"""Of transformers.Trainer: what it calls to write, read and push checkpoints."""
RECIPE_METHODS = frozenset(
    {"_save_checkpoint", "_get_output_dir", "_get_train_sampler", "_get_grad_norm"}
)
"""Of it, too: where a checkpoint goes, and the order of the samples; `prereg train` has its own."""

# NeMo AutoModel: see tests/packages/test_nemo.py.

NEMO_MODELS = "nemo_automodel._transformers.auto_model"
"""The module whose `apply_model_infrastructure` a model goes through that NeMo has made."""
NEMO_METHODS = frozenset({"_dp_allreduce", "_get_dp_group_size"})
"""Of its recipes: a sum over the data-parallel ranks, and their number."""


def copies_of_offline() -> list[tuple[Any, str]]:
    """(module, name) of what transformers before 5 copies of the hub's offline flag when imported,
    and asks from then on."""
    hub = importlib.import_module("transformers.utils.hub")
    return [(hub, name) for name in ("_is_offline_mode",) if hasattr(hub, name)]
