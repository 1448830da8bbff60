"""Floating-point operations of training and of the search, and the hours they take.

Choice: model FLOPs utilisation (MFU) counts what the mathematics needs, 6 N + causal attention a token, and not what checkpointing
recomputes; so the same hours follow whether activations are recomputed or not, and recomputation is shown apart as overhead. Cost: an MFU
quoted elsewhere with recomputation inside (HFU) must not be put into ``hardware.mfu``.

The paper's 10B tokens in 54 h on 64 A100 (312 TFLOP/s) are 804 tokens/s/GPU. With its 3B short and 7B long tokens, LLaMA3-8B needs 119
GFLOP a token, so that is an MFU of 0.31; Phi3-mini's 39 h are 1113 tokens/s/GPU and an MFU of 0.27.
"""

from __future__ import annotations

from lr2train.planning.counts import ModelCounts


def attention_flops_per_token(counts: ModelCounts, span_tokens: float) -> float:
    """Causal attention of one token, forward: 2 * layers * Hq * Dh * span.

    A token attends to span / 2 others on average; q k^T and p v are two FLOPs each for every one of them and every dimension.
    """
    return 2.0 * counts.layers * counts.heads * counts.head_dim * span_tokens


def forward_flops_per_token(counts: ModelCounts, span_tokens: float) -> float:
    """One token, forward: 2 N' + attention, with N' the parameters that it is multiplied with."""
    return 2.0 * counts.multiplied_parameters + attention_flops_per_token(counts, span_tokens)


def training_flops_per_token(counts: ModelCounts, span_tokens: float) -> float:
    """One token, forward and backward: 3 * forward = 6 N' + 6 * layers * Hq * Dh * span."""
    return 3.0 * forward_flops_per_token(counts, span_tokens)


def recomputed_flops_per_token(counts: ModelCounts, span_tokens: float, checkpointing: bool) -> float:
    """What is computed twice: the head's logits always (chunked loss), the layers' forward under activation checkpointing."""
    head = 2.0 * counts.vocabulary * counts.hidden
    return head + (2.0 * counts.layers * counts.layer_parameters + attention_flops_per_token(counts, span_tokens) if checkpointing else 0.0)


def scoring_flops(counts: ModelCounts, document_tokens: int) -> float:
    """One needle document in the search: t * (2 * body + attention); logits exist at the answer alone, so the head costs nothing."""
    return document_tokens * (2.0 * counts.body_parameters + attention_flops_per_token(counts, document_tokens))


def tokens_per_s(tflops: float, mfu: float, flops_per_token: float) -> float:
    """Tokens a second of one GPU: peak * MFU / FLOPs a token."""
    return tflops * 1e12 * mfu / flops_per_token


def mfu(tokens_per_s_per_gpu: float, flops_per_token: float, tflops: float) -> float:
    """The share of the peak that a measured speed reaches: the inverse of ``tokens_per_s``."""
    return tokens_per_s_per_gpu * flops_per_token / (tflops * 1e12)


def gpu_hours(flops: float, tflops: float, mfu: float) -> float:
    """Hours of one GPU."""
    return flops / (tflops * 1e12 * mfu) / 3600.0
