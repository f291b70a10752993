# SPDX-License-Identifier: Apache-2.0
"""The paired experiment: what PRe changes, over seeds, and its report."""
