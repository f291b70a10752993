"""The names that arguments take: for a type checker as `Literal`, and for the checks as tuples."""

from typing import Literal, get_args

ActivationName = Literal["gelu", "gelu_tanh", "silu", "relu"]
LossName = Literal["cosine", "mse", "smooth_l1"]
NormalizationName = Literal["none", "l2", "layer"]
ReductionName = Literal["mean", "sum", "none"]
BackendName = Literal["auto", "torch", "cpp", "triton"]

ACTIVATIONS: tuple[ActivationName, ...] = get_args(ActivationName)
LOSSES: tuple[LossName, ...] = get_args(LossName)
NORMALIZATIONS: tuple[NormalizationName, ...] = get_args(NormalizationName)
REDUCTIONS: tuple[ReductionName, ...] = get_args(ReductionName)
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
