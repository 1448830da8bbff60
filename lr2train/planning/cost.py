"""FLOPs, speed and GPU hours of training and of the search.

Choice: model FLOPs utilisation (MFU) counts what the mathematics needs (``model.flops``). Recomputed activations are
shown apart, as overhead: hours are the same with and without activation checkpointing. Cost: a utilisation quoted with
recomputation inside (HFU) is too high for ``hardware.mfu``.

The default of ``hardware.mfu`` can be compared with the paper: 10B tokens on 64 A100 (312 TFLOP/s), 3B of them short.

    LLaMA3-8B    54 h    804 tokens/s/GPU    119 GFLOP a token    MFU 0.31
    Phi3-mini    39 h   1113 tokens/s/GPU                         MFU 0.27
"""

from __future__ import annotations

from lr2train.config import SearchConfig
from lr2train.model.flops import TRAINING, attention_flops, causal_pairs_per_token, linear_flops
from lr2train.planning.counts import ModelCounts


def attention_flops_per_token(counts: ModelCounts, span_tokens: float) -> float:
    """Causal attention of one token, forward: 2 * layers * Hq * Dh * span."""
    return attention_flops(counts.layers * counts.heads * causal_pairs_per_token(span_tokens), counts.head_dim)


def forward_flops_per_token(counts: ModelCounts, span_tokens: float) -> float:
    """One token, forward: 2 N' + attention. N' counts the parameters that a token is multiplied with."""
    return linear_flops(counts.multiplied_parameters, 1) + attention_flops_per_token(counts, span_tokens)


def training_flops_per_token(counts: ModelCounts, span_tokens: float) -> float:
    """One token, forward and backward: 3 * forward = 6 N' + 6 * layers * Hq * Dh * span."""
    return TRAINING * forward_flops_per_token(counts, span_tokens)


def recomputed_flops_per_token(
    counts: ModelCounts, span_tokens: float, recompute: str, n_layers: int | None = None
) -> float:
    """FLOPs that one token costs a second time, on a GPU, where the loss computes its gradients in the forward pass.

    ``recompute`` is ``engine.recompute``: layer computes the layers'
    forward pass again, keep_attention all of that but attention; both for ``n_layers`` layers (None: all).
    """
    if recompute == "none":
        return 0.0
    layers = linear_flops(counts.layers * counts.layer_parameters, 1)
    layers += attention_flops_per_token(counts, span_tokens) if recompute == "layer" else 0
    return layers * (counts.layers if n_layers is None else n_layers) / counts.layers


def scoring_flops(counts: ModelCounts, document_tokens: int) -> float:
    """One needle document in the search: t * (2 * body + attention).

    The head is left out: logits exist at the answer's tokens alone.
    """
    body = linear_flops(counts.body_parameters, 1)
    return document_tokens * (body + attention_flops_per_token(counts, document_tokens))


def search_forwards(search: SearchConfig) -> int:
    """Document-forwards that the ranks compute, at most: with recomputation a slope takes one more."""
    return sum(times * n * _computed(forwards, search) for times, n, forwards in search.rounds)


def search_depth(search: SearchConfig, ranks: int) -> int:
    """Document-forwards that follow each other, at most, where each rank evaluates one document at a time.

    A round of n evaluations takes ceil(n / ranks) of them one after another, and the next round waits for all.
    """
    return sum(times * -(-n // ranks) * _computed(forwards, search) for times, n, forwards in search.rounds)


def _computed(forwards: int, search: SearchConfig) -> int:
    return forwards + (forwards > 1 and search.chunk_tokens > 0)


def tokens_per_s(tflops: float, mfu: float, flops_per_token: float) -> float:
    """Tokens a second of one GPU: peak * MFU / FLOPs a token."""
    return tflops * 1e12 * mfu / flops_per_token


def gpu_hours(flops: float, tflops: float, mfu: float) -> float:
    """Hours of one GPU."""
    return flops / (tflops * 1e12 * mfu) / 3600.0
