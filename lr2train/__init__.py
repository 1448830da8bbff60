"""lr2train: extend the context window of a pretrained causal LM with LongRoPE2.

The version stands here alone: pyproject.toml and ``lr2train --version`` read it.
"""

__version__ = "0.1.0"
