# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run that are whole or not there."""
