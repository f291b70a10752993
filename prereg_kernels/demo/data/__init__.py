# SPDX-License-Identifier: Apache-2.0
"""The digit scenes: drawn, asked about, packed into batches."""
