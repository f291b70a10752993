# SPDX-License-Identifier: Apache-2.0
"""Backends of the algorithm: a file or folder each, and the registry that chooses among them."""
