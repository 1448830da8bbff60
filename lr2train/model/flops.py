"""Floating-point operations (FLOPs) of a decoder-only transformer, for MFU, cost estimates and kernel benchmarks.

A matrix product costs 2 FLOPs a weight and token. Attention costs 4 D FLOPs a (query, key) pair and head: 2 D for
q k^T and 2 D for p v. Only pairs that the causal mask and the document mask leave are counted. The backward pass of
both costs twice the forward pass (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).

Choice: the count is what the mathematics needs. Recomputed activations are time and no work, as in model FLOPs
utilisation (PaLM, arXiv 2204.02311, appendix B). Cost: norms, RoPE, softmax and the optimizer are left out.

N' parameters that a token is multiplied with, Hq query heads, D head size.
"""

from __future__ import annotations

FORWARD, BACKWARD, TRAINING = 1.0, 2.0, 3.0  # multiples of the forward pass
FLASH_BACKWARD = 2.5  # the attention kernel computes q k^T again: five products for two (arXiv 2307.08691, section 4.1)


def linear_flops(parameters: float, n_tokens: float, passes: float = FORWARD) -> float:
    """``n_tokens`` through matrices of ``parameters`` weights: 2 N' a token, times ``passes``."""
    return 2.0 * passes * parameters * n_tokens


def attention_flops(n_pairs: float, head_size: int, passes: float = FORWARD) -> float:
    """``n_pairs`` (query, key) pairs, summed over query heads and layers: 4 D a pair, times ``passes``."""
    return 4.0 * passes * n_pairs * head_size


def training_flops(parameters: float, n_tokens: float, n_pairs: float, head_size: int) -> float:
    """Forward and backward pass of a whole model: 6 N' a token and 12 D a pair, pairs as in ``attention_flops``."""
    return linear_flops(parameters, n_tokens, TRAINING) + attention_flops(n_pairs, head_size, TRAINING)


def causal_pairs_per_token(span_tokens: float) -> float:
    """Keys that a token of a document of ``span_tokens`` sees on average: half of the document."""
    return span_tokens / 2
