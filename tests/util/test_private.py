# SPDX-License-Identifier: Apache-2.0
"""Each private name of torch and transformers that we use is there, and does what we use it for."""

from __future__ import annotations

import copy
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from prereg_kernels._util import private
from tests.releases import HERE


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, requires_grad=True)


def test_current_autograd_node() -> None:
    seen = []

    def look(gradient: Tensor) -> None:
        seen.append(private.current_autograd_node())

    x = leaf(3.0)
    assert private.current_autograd_node() is None
    y = x * 2
    y.register_hook(look)
    y.exp().backward()
    assert [node.name() for node in seen] == ["MulBackward0"]
    assert seen[0] is y.grad_fn
    assert private.current_autograd_node() is None


def test_profiler_runs() -> None:
    assert not private.profiler_runs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert private.profiler_runs()
    assert not private.profiler_runs()


def test_compiles_frames() -> None:
    seen = []

    def look(gradient: Tensor) -> None:
        seen.append(private.compiles_frames())

    @torch.compile(backend="eager")
    def step(x: Tensor) -> None:
        torch._dynamo.graph_break()
        x.exp().backward()

    for function in (step, torch.compiler.disable(lambda x: x.exp().backward())):
        x = leaf(3.0)
        x.register_hook(look)
        function(x[0])
    assert seen == [True, False]
    assert not private.compiles_frames()


def test_numbers_of_nodes() -> None:
    x = leaf(3.0)
    before = private.next_autograd_node()
    y = x * 2
    assert private.node_number(y.grad_fn) == before
    assert private.next_autograd_node() == before + 1


def test_storage_of() -> None:
    x = torch.empty(4, device="meta")
    assert private.storage_of(x) == private.storage_of(x[1:]) != private.storage_of(x + 1)


def test_what_a_dispatch_mode_sees() -> None:
    seen = []

    class Mode(private.DispatchMode):  # type: ignore[misc, name-defined]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(1).to(torch.float64).item()
    assert private.TO_COPY in seen and private.ITEM in seen


def test_leaves() -> None:
    assert private.leaves_of([1, {"a": (2, [3])}]) == [1, 2, 3]
    assert private.with_leaves(lambda x: x + 1, [1, {"a": (2,)}]) == [2, {"a": (3,)}]


def test_grouped_products() -> None:
    rows, matrices = torch.ones(4, 16).bfloat16(), torch.ones(2, 16, 16).bfloat16()
    offsets = torch.tensor([1, 4], dtype=torch.int32)
    for function in private.GROUPED_PRODUCTS:
        assert function(rows, matrices, offs=offsets).tolist() == [[16.0] * 16] * 4
    assert private.GROUPED_PRODUCTS


def test_after_backward() -> None:
    """Also what a backward pass within it asks for waits for the end of the outer one."""
    x, seen = leaf(1.0), list[str]()
    y = x * 2
    y.register_hook(lambda gradient: private.after_backward(lambda: seen.append("end")))
    x.register_hook(lambda gradient: seen.append("x"))
    y.backward()
    assert seen == ["x", "end"]


@pytest.mark.parametrize(("reentrant", "name"), [(True, private.REENTRANT_NODE), (False, None)])
def test_the_node_of_a_checkpoint(reentrant: bool, name: str | None) -> None:
    seen = []

    def block(x: Tensor) -> Tensor:
        node = private.current_autograd_node()
        seen.append(node and node.name())
        return x.exp().sin()

    checkpoint.checkpoint(block, leaf(1.0), use_reentrant=reentrant).backward()
    assert seen[0] is None and len(seen) == 2
    assert seen[1] == name if reentrant else seen[1] not in (None, private.REENTRANT_NODE)


@pytest.mark.parametrize("retain", [True, False])
def test_keeps_graph(retain: bool) -> None:
    seen = []
    y = leaf(3.0) * 2
    y.register_hook(lambda gradient: seen.append(private.keeps_graph()))
    y.backward(retain_graph=retain)
    assert seen == [retain]


def test_is_functorch_active() -> None:
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(private.is_functorch_active())
        return x.sum()

    f(torch.ones(2))
    torch.func.grad(f)(torch.ones(2))
    torch.func.vmap(f)(torch.ones(2, 2))
    assert seen == [False, True, True]


def test_is_functorch_wrapped() -> None:
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(private.is_functorch_wrapped(x))
        return x.sum()

    f(torch.ones(2))
    torch.func.vmap(f)(torch.ones(2, 2))
    torch.func.grad(f)(torch.ones(2))
    assert seen == [False, True, True]


def test_is_in_forward_mode() -> None:
    assert not private.is_in_forward_mode()
    with forward_ad.dual_level():
        assert private.is_in_forward_mode()
    assert not private.is_in_forward_mode()
    seen = []
    torch.func.jvp(
        lambda x: seen.append(private.is_in_forward_mode()) or x, (torch.ones(1),), (torch.ones(1),)
    )
    assert seen == [True]


def test_version_of() -> None:
    x = torch.zeros(3)
    view = x[:2]
    assert private.version_of(x) == private.version_of(view) == 0
    view.add_(1)
    assert private.version_of(x) == private.version_of(view) == 1


def test_keep_address() -> None:
    """All that torch's own function does is to set what we set."""
    ours, theirs = torch.zeros(()), torch.zeros(())
    private.keep_address(ours)
    torch._dynamo.mark_static_address(theirs)
    assert vars(ours) == vars(theirs) != {}


def test_hooks_of_saved_tensors() -> None:
    assert private.top_saved_tensors_hooks() is None

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x

    def unpack(x: Tensor) -> Tensor:
        return x

    packed: list[Tensor] = []
    x = leaf(1.0)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        hooks = private.top_saved_tensors_hooks()
        assert hooks == (pack, unpack)
        private.pop_saved_tensors_hooks()
        x.exp()
        assert private.top_saved_tensors_hooks() is None and packed == []
        private.push_saved_tensors_hooks(*hooks)
        x.exp()
        assert len(packed) == 1
    assert private.top_saved_tensors_hooks() is None


def test_hooks_of_a_checkpoint() -> None:
    seen = []

    def block(x: Tensor) -> Tensor:
        hooks = private.top_saved_tensors_hooks()
        seen.append(hooks and hooks[0].__module__)
        return x.exp()

    checkpoint.checkpoint(block, leaf(1.0), use_reentrant=False).backward()
    checkpoint.checkpoint(block, leaf(1.0), use_reentrant=True).backward()
    assert seen == [private.CHECKPOINT, private.CHECKPOINT, None, None]


def test_modes_of_selective_checkpointing() -> None:
    seen = []

    def block(x: Tensor) -> Tensor:
        modes = private.dispatch_modes()
        seen.append([(type(mode).__name__, private.is_selection(mode)) for mode in modes])
        return x.exp().sin()

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.MUST_SAVE)

    checkpoint.checkpoint(block, leaf(1.0), use_reentrant=False, context_fn=contexts).backward()
    assert [[is_selection for _, is_selection in modes] for modes in seen] == [[True], [True]]
    assert seen[0] != seen[1]  # one of the first run, one of the second
    assert not private.is_selection(torch.utils._python_dispatch.TorchDispatchMode())


def test_dispatch_modes_are_a_stack() -> None:
    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    assert private.dispatch_modes() == [] and private.dispatch_depth() == 0
    with Count() as outer, Count() as inner:
        assert private.dispatch_modes() == [outer, inner] and private.dispatch_depth() == 2
        private.pop_dispatch_mode()
        assert private.dispatch_modes() == [outer]
        torch.ones(1)
        assert (outer.calls, inner.calls) == (1, 0)
        private.push_dispatch_mode(inner)
        assert private.dispatch_modes() == [outer, inner]


def flags() -> set[str]:
    """What Linux says of an x86; skips elsewhere."""
    info = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not info.is_file():
        pytest.skip("an x86's flags are read from /proc/cpuinfo")
    line = next(line for line in info.read_text().splitlines() if line.startswith("flags"))
    return set(line.split(":")[1].split())


def test_what_the_processor_has() -> None:
    has = flags()
    assert private.has_avx2() == ("avx2" in has)
    assert private.has_avx512_bf16() == ("avx512_bf16" in has)
    assert private.has_amx_tiles() == ({"amx_tile"} <= has)


def test_what_onednn_takes() -> None:
    has = flags()
    if {"avx512vl", "avx512bw", "avx512dq"} <= has:
        assert private.has_onednn_bf16()
    elif "avx2" not in has:
        assert not private.has_onednn_bf16()
    if "avx512_fp16" in has:
        assert private.has_onednn_fp16()
    elif not {"avx512_fp16", "avx_ne_convert", "amx_fp16"} & has:
        assert not private.has_onednn_fp16()


def test_extra_state() -> None:
    class Module(nn.Module):
        def get_extra_state(self) -> Tensor:
            return torch.tensor(7)

    assert nn.Sequential(Module()).state_dict() == {f"0.{private.EXTRA_STATE}": torch.tensor(7)}


def test_replicas_of_data_parallel() -> None:
    module = nn.Linear(2, 2)
    assert not hasattr(module, private.IS_REPLICA)
    replica = module._replicate_for_data_parallel()  # what nn.parallel.replicate calls
    assert getattr(replica, private.IS_REPLICA) is True


def test_flat_parameters(one_rank: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    sharded = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
    assert [name.split(".")[-1] for name, _ in sharded.named_parameters()] == [
        private.FLAT_PARAMETER
    ]


def test_submodules() -> None:
    shared = nn.Linear(2, 2)
    module = nn.ModuleDict({"a": shared, "b": shared})
    module.register_module("c", None)
    found = private.submodules(module)
    assert list(found) == ["a", "b", "c"]
    assert found["a"] is found["b"] is shared and found["c"] is None


def test_drop_pre_hooks() -> None:
    """Of a copy, whose hooks the handles of the original do not reach."""
    module, seen = nn.Linear(2, 2), []
    ours = module.register_forward_pre_hook(lambda *given: seen.append("ours"), with_kwargs=True)
    module.register_forward_pre_hook(lambda *given: seen.append("theirs"))
    clone = copy.deepcopy(module)
    ours.remove()
    private.drop_pre_hooks(clone, {ours.id})
    clone(torch.zeros(1, 2))
    assert seen == ["theirs"] and not clone._forward_pre_hooks_with_kwargs


def test_compiled_modules() -> None:
    """In place, or wrapped; what is inside, or around, is not."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].compile()
    wrapper = torch.compile(module[1])
    assert [private.is_compiled(x) for x in (*module, module, wrapper)] == [
        True, False, False, True,
    ]  # fmt: skip


def test_ddp(one_rank: None) -> None:
    seen = []

    class Module(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(private.active_ddp())
            return super().forward(x)

    module = Module(2, 2)
    module.bias.requires_grad_(False)
    ddp = nn.parallel.DistributedDataParallel(module)
    assert private.active_ddp() is None
    ddp(torch.ones(1, 2))
    assert seen == [ddp] and private.active_ddp() is None
    assert {id(p) for p in private.ddp_parameters(ddp)} >= {id(module.weight)}
    added = nn.Parameter(torch.ones(1))
    module.register_parameter("added", added)
    assert id(added) not in {id(p) for p in private.ddp_parameters(ddp)}


def test_methods_of_modules() -> None:
    calls = []

    class Module(nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            calls.append("_apply")
            return super()._apply(fn, recurse)

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
            assert isinstance(state_dict, dict) and prefix == "0." and len(args) == 5
            calls.append("_load_from_state_dict")
            super()._load_from_state_dict(state_dict, prefix, *args)

    model = nn.Sequential(Module(2, 2))
    for move in (
        lambda: model.to(torch.float64),
        model.float,
        lambda: model.to_empty(device="cpu"),
    ):
        move()
    assert calls == 3 * ["_apply"]
    model.load_state_dict(model.state_dict())
    assert set(calls) == private.MODULE_METHODS and calls[3:] == ["_load_from_state_dict"]


def test_what_fully_shard_sets(one_rank: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    set_to = []

    class Module(nn.Linear):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == private.FSDP_MANAGED:
                set_to.append((value, type(self.weight).__name__))

    fully_shard(Module(2, 2), mesh=init_device_mesh("cpu", (1,)))
    assert set_to == [(True, "DTensor")]  # after the parameters have been sharded


def test_the_mesh_of_a_model(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setenv("LOCAL_RANK", "0")

    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=8,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    assert getattr(model, private.DEVICE_MESH, None) is None  # 5.6 sets it when it distributes
    model.save_pretrained(tmp_path)
    split: Any
    if HERE >= (5, 24):  # whose `from_pretrained` leaves a model of one rank alone
        from transformers.distributed import DistributedConfig, utils

        names = ("pp", "dp_replicate", "fsdp", "tp")
        whole = init_device_mesh("cpu", (1, 1, 1, 1), mesh_dim_names=names)
        mesh = whole["pp", "fsdp", "tp"]
        split = LlamaForCausalLM.maybe_distribute_model(
            model, DistributedConfig(), utils.TransformersDeviceMesh(whole, whole)
        )
    else:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        options: dict[str, Any] = {"tp_plan": "auto", "tp_size": 1, "device_mesh": mesh}
        if HERE < (5, 0):  # which distributes over accelerators alone
            with pytest.raises(RuntimeError, match="Cannot access accelerator device"):
                LlamaForCausalLM.from_pretrained(tmp_path, **options)
            return
        split = LlamaForCausalLM.from_pretrained(tmp_path, **options)
    assert getattr(split, private.DEVICE_MESH) == mesh


def test_the_group_of_ulysses(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed is not in the environment: the name is that of its 0.18 and later."""
    groups = ModuleType("deepspeed.utils.groups")
    groups.__dict__["_get_sequence_parallel_group"] = lambda: "ranks"
    for module in (ModuleType("deepspeed"), ModuleType("deepspeed.utils"), groups):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert private.ulysses_group() == "ranks"


def test_copies_of_the_offline_flag() -> None:
    """transformers' own from before 5, which reads the hub's since."""
    copies = [name for _, name in private.copies_of_offline()]
    assert copies == (["_is_offline_mode"] if HERE < (5, 0) else [])
