# SPDX-License-Identifier: Apache-2.0
"""The paired sweep over PRe's settings, and its report."""
