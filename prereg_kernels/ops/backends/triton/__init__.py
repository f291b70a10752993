# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one file each. Importing any but `config` imports triton."""
