# SPDX-License-Identifier: Apache-2.0
"""Tests of prereg_kernels.train."""
