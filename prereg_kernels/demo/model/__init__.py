# SPDX-License-Identifier: Apache-2.0
"""The demo's model: a tiny LLaVA, its vision tower, and its files."""
