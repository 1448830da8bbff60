"""Attention over the spans of a segment: kernels, the strategies that spread them over ranks, and the door to transformers."""
