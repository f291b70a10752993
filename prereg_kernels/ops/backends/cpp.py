"""The compiled row primitives (csrc/) for CPUs, in the variant for this CPU's instructions."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prereg_kernels._util.files import content_digest
from prereg_kernels.ops.backends.base import Backend, LossChunk
from prereg_kernels.ops.spec import Spec

PACKAGE = Path(__file__).parents[2]
SOURCES = PACKAGE.parent / "csrc"  # in a checkout
# By what torch has found out for its own kernels, which are compiled with the same flags
RUNNABLE = {"AVX512": ("avx512", "avx2", "base"), "AVX2": ("avx2", "base")}


def unavailable(device_type: str) -> str | None:
    """Why the backend does not run on such devices here, in one line; None if it does."""
    if device_type != "cpu":
        return "it is for CPUs only"
    return _choose_variant()[1]


def describe() -> dict[str, Any]:
    """The variant in use, those built, why others were not, and what built them."""
    build = _read_build()
    return {
        "variant": _choose_variant()[0],
        "built": build.get("variants", []),
        "not built": build.get("failed", {}),
        "compiler": build.get("compiler"),
        "torch": build.get("torch"),
    }


def runnable_variants() -> list[str]:
    """The variants that are built and that this CPU can run, the fastest first."""
    runnable = RUNNABLE.get(torch.backends.cpu.get_cpu_capability(), ("base",))
    if "avx512" in runnable and torch.cpu._is_avx512_bf16_supported():
        runnable = ("avx512_bf16", *runnable)
    return [variant for variant in runnable if variant in _read_build().get("variants", [])]


class CppBackend(Backend):
    """Args: variant: as `runnable_variants` names them; None: the fastest that this CPU can run.

    Raises:
        ValueError: it does not run here, and why.
    """

    name = "cpp"
    unavailable = staticmethod(unavailable)

    def __init__(self, variant: str | None = None) -> None:
        chosen, reason = _choose_variant()
        if chosen is None:
            raise ValueError(f"the compiled row primitives: {reason}")
        self.variant = variant or chosen
        if self.variant not in runnable_variants():
            raise ValueError(
                f"variant: expected one of {', '.join(runnable_variants())}; got {variant!r}"
            )
        _load(self.variant)
        self._ops = getattr(torch.ops, f"prereg_rows_{self.variant}")
        self._losses, self._activations = self._ops.losses(), self._ops.activations()

    def refuses(self, spec: Spec) -> str | None:
        if spec.loss not in self._losses:
            return f"loss={spec.loss!r}"
        if spec.activation not in self._activations:
            return f"activation={spec.activation!r}"
        return None

    def gather_rows(self, source: Tensor, index: Tensor | None, out: Tensor) -> None:
        self._ops.gather_rows(source, index, out)

    def activate(self, u: Tensor, bias: Tensor | None, activation: str, g: Tensor) -> None:
        self._ops.activate(u, bias, activation, g)

    def activation_backward(
        self, dg: Tensor, u: Tensor, bias: Tensor | None, activation: str, sums: Tensor | None
    ) -> None:
        self._ops.activation_backward(dg, u, bias, activation, sums)

    def token_losses(self, chunk: LossChunk, spec: Spec) -> None:
        z, bias, anchor, index, losses, coefficient, dz, sums = chunk
        formula = spec.loss, spec.normalize, spec.eps
        if dz is None:
            self._ops.token_losses(z, bias, anchor, index, *formula, losses)
        else:
            self._ops.token_losses_and_grad(
                z, bias, anchor, index, coefficient, *formula, losses, dz, sums
            )

    def scatter_rows(
        self,
        values: Tensor,
        into: Tensor,
        index: Tensor | None,
        scale: Tensor | None,
        accumulate: bool,
    ) -> None:
        self._ops.scatter_rows(values, into, index, scale, accumulate)

    def add_product(
        self, total: Tensor | None, a: Tensor, b: Tensor, wide: torch.dtype | None
    ) -> Tensor:
        if wide != torch.float32 or not self.has_wide_products(a.device, a.dtype):
            return super().add_product(total, a, b, wide)
        out = a.new_empty(a.shape[0], b.shape[1], dtype=wide) if total is None else total
        self._ops.wide_product(a.T, b, out, total is not None)
        return out

    def has_wide_products(self, device: torch.device, dtype: torch.dtype) -> bool:
        """MKL has such products of bfloat16. They are only known to be fast with tile registers."""
        tiles = bool(torch.cpu._is_amx_tile_supported())
        return tiles and dtype == torch.bfloat16 and bool(self._ops.has_wide_product())


@cache
def _choose_variant() -> tuple[str | None, str | None]:
    """The variant for this CPU, or None and why there is none."""
    build = _read_build()
    if not build:
        return None, "not built: the package was installed without its build step"
    runnable = runnable_variants()
    if not runnable:
        reasons = dict.fromkeys(build["failed"].values())
        return None, f"not built: {'; '.join(reasons)}"
    if _release(build["torch"]) != _release(torch.__version__):
        return None, (
            f"built against torch {build['torch']}, this is {torch.__version__}: "
            "install the package again with --no-build-isolation"
        )
    sources = [*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]
    if SOURCES.is_dir() and content_digest(sources) != build["sources"]:
        return None, "built from other sources than csrc/: install the package again"
    try:
        _load(runnable[0])
    except OSError as error:
        return None, f"its library does not load: {error.__cause__ or error}"
    return runnable[0], None


@cache
def _load(variant: str) -> None:
    torch.ops.load_library(str(PACKAGE / f"_rows_{variant}.so"))


@cache
def _read_build() -> dict[str, Any]:
    """What setup.py has written about its build; empty if it has not run."""
    try:
        build: dict[str, Any] = json.loads((PACKAGE / "_rows_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return build


def _release(version: str) -> str:
    """Without the local part: "2.13.0+cpu" and "2.13.0+cu130" have the same CPU interface."""
    return version.partition("+")[0]
