"""The demo's model: a tiny LLaVA, its vision tower, and its files."""
