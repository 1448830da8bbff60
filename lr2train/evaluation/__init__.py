"""Evaluation of a model: needle retrieval and perplexity by length."""
