"""lr2train: extend the context window of a pretrained causal LM with LongRoPE2."""

__version__ = "0.1.0"
