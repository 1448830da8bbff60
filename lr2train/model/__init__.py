"""Hugging Face causal LMs with two RoPE tables and a loss that never holds all logits."""
