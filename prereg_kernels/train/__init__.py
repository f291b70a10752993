"""`prereg train`: a multimodal LLM trained with PRe on data of your own."""
