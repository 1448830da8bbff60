"""Negative log-likelihood of chosen tokens of one document, under one window's RoPE table.

Choice: one document a call, whole in one forward pass; logits exist at the scored positions only, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lr2train.config import UserError
from lr2train.model.rotary import WindowRotary, long_inv_freq
from lr2train.rope.factors import Factors

CHUNK = 4096  # positions whose logits exist at one time


@dataclass(frozen=True)
class Score:
    """What a model makes of the scored tokens."""

    nll: float  # summed, nats
    n_tokens: int
    exact: bool  # greedy decoding would say every one of them


def use_factors(rotary: WindowRotary, factors: Factors) -> None:
    """Put other factors into a model's long table."""
    rotary.tables["long"] = (long_inv_freq(factors), factors.attention_factor)


@torch.inference_mode()
def score(model: Any, rotary: WindowRotary, window: str, tokens: np.ndarray, spans: Sequence[tuple[int, int]]) -> Score:
    """Score the tokens at ``spans`` (half-open, no span may start at 0), each predicted from all before it.

    Args:
        model: a Hugging Face causal LM whose rotary module is ``rotary``.
        window: "short" | "long".
        tokens: ids [T].
        spans: which tokens count.

    Raises:
        UserError: the spans select no token.
    """
    positions = [t - 1 for start, stop in spans for t in range(start, stop)]
    if not positions:
        raise UserError("a document has no token to score (an empty answer mask would silently score ordinary text); check data.needles")
    assert min(positions) >= 0, "the first token of a document has nothing before it to be predicted from"
    rotary.window = window
    device = next(model.parameters()).device
    ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64)).to(device)
    hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    nll, exact = 0.0, True
    for rows in torch.tensor(positions, device=device).split(CHUNK):
        logits = model.get_output_embeddings()(hidden[rows]).float()
        nll += F.cross_entropy(logits, ids[rows + 1], reduction="sum").item()
        exact = exact and bool((logits.argmax(-1) == ids[rows + 1]).all())
    return Score(nll, len(positions), exact)
