# SPDX-License-Identifier: Apache-2.0
"""The demo: a small LLaVA trained on scenes of digits, with and without PRe."""
