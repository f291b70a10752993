# SPDX-License-Identifier: Apache-2.0
"""`prereg train`: a multimodal LLM trained with PRe on data of your own."""
