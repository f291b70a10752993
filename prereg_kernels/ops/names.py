# SPDX-License-Identifier: Apache-2.0
"""The names that arguments take: for a type checker as `Literal`, and for the checks as tuples."""

from typing import Literal, get_args

NormalizationName = Literal["none", "l2", "layer"]
ReductionName = Literal["mean", "sum", "none"]
LayoutName = Literal["bsh", "sbh"]

NORMALIZATIONS: tuple[NormalizationName, ...] = get_args(NormalizationName)
REDUCTIONS: tuple[ReductionName, ...] = get_args(ReductionName)
LAYOUTS: tuple[LayoutName, ...] = get_args(LayoutName)
