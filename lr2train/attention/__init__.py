"""Attention of packed segments: kernels, strategies that spread attention over ranks, the door to transformers."""
