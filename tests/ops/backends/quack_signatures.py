# SPDX-License-Identifier: Apache-2.0
"""What quack-kernels 0.6.5 takes, as its sources have it, without types; and computes, on CPUs.

gemm_act and gemm_dact are in quack/gemm_interface.py, dact_dbias_mod in quack/epilogue/library.py,
what it returns is called as EpiMod.__call__ in quack/epilogue/frontend.py.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

VERSION = "0.6.5"
ACTIVATIONS = (  # act_fn_map and dact_fn_map of quack/activation.py
    None, "silu", "silu-tanh", "relu", "relu_sq", "gelu_tanh_approx", "gelu_erf", "quick_gelu",
    "tanh",
)  # fmt: skip


def gemm_act(
    A, B, C=None, bias=None, activation=None, alpha=1.0, preact_out=None, postact_out=None,
    out_dtype=None, postact_dtype=None, cu_seqlens_m=None, A_idx=None, store_preact=True,
    dynamic_scheduler=False, tuned=True, config=None, concat_layout=None, split_k=1,
    split_k_mode=0,
):  # fmt: skip
    """preact = A B + bias, postact = act(preact), each rounded once."""
    assert not tuned and activation in ACTIVATIONS and (preact_out is not None or not store_preact)
    preact = A.double() @ B.double() + (0 if bias is None else bias.double())
    if store_preact:
        preact_out.copy_(preact)
    postact_out.copy_(_act(preact, activation))
    return preact_out, postact_out


def gemm_dact(
    A, B, PreAct, activation=None, dx_out=None, postact_out=None, out_dtype=None,
    postact_dtype=None, colvec_scale=None, colvec_reduce=False, cu_seqlens_m=None, A_idx=None,
    dynamic_scheduler=True, tuned=True, config=None, split_k=1, split_k_mode=0,
):  # fmt: skip
    """dx = (A B) act'(PreAct), and act(PreAct), which it always writes."""
    assert not tuned and activation in ACTIVATIONS
    dx_out.copy_(_dact(A, B, PreAct, activation))
    return dx_out, _act(PreAct.double(), activation).to(PreAct.dtype)


def dact_dbias_mod(activation):
    assert activation in ACTIVATIONS

    def call(
        A, B, C=None, *, out=None, out_dtype=None, store_d=True, config=None, tuned=True,
        dynamic_scheduler=False, cu_seqlens_m=None, A_idx=None, SFA=None, SFB=None,
        bs_format_a=None, bs_format_b=None, rounding_mode=0, epi_key_overrides=None,
        concat_layout=None, transform_a=None, transform_sf=None, transform_operands=None,
        add_to_output=False, **operands,
    ):  # fmt: skip
        """As gemm_dact, and the sums of its columns in float32; `out` has it as "D"."""
        assert not tuned and not operands and set(out) == {"D"}
        dx = _dact(A, B, C, activation)
        out["D"].copy_(dx)
        return {"D": out["D"], "dwb": dx.sum(-2).float()}

    return call


def _act(u: Tensor, activation: str) -> Tensor:
    assert activation == "gelu_erf"
    return torch.nn.functional.gelu(u)


def _dact(A: Tensor, B: Tensor, u: Tensor, activation: str) -> Tensor:
    assert activation == "gelu_erf"
    slope = torch.ops.aten.gelu_backward(torch.ones_like(u, dtype=torch.float64), u.double())
    return A.double() @ B.double() * slope


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have it be imported; the list gets the names of what is called."""
    called: list[str] = []

    def noted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(function.__name__)
            return function(*args, **kwargs)

        return call

    places = {"gemm_interface": (gemm_act, gemm_dact), "epilogue.library": (dact_dbias_mod,)}
    for name in ("quack", "quack.epilogue"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, functions in places.items():
        module = ModuleType(f"quack.{name}")
        for function in functions:
            setattr(module, function.__name__, noted(function))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return called
