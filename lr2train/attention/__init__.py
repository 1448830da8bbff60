"""Attention of packed segments: kernels, the strategies that spread attention over ranks, and the door to transformers."""
