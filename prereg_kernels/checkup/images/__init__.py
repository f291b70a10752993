# SPDX-License-Identifier: Apache-2.0
"""What the checkup reads: image sets on disk, and how a model lays out an image's tokens."""
