# SPDX-License-Identifier: Apache-2.0
"""PRe on a Hugging Face model: what it hooks into, what it reads, what it adds to the loss."""
