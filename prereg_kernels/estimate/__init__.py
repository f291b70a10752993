# SPDX-License-Identifier: Apache-2.0
"""What a training step with PRe will cost: FLOPs, time, memory, communication. Nothing is run."""
