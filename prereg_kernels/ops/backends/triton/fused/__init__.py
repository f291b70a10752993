# SPDX-License-Identifier: Apache-2.0
"""Stages of the algorithm as fused matmuls: off, until a GPU has shown that they are faster.

Nothing imports this folder but where PREREG_FUSED asks for it, and tests and benchmarks.
"""
