"""Negative log-likelihood of chosen tokens of one document, under the RoPE table of one window.

Choice: one document a call. Hidden states come from ``hidden.py``; logits are computed at the scored positions only, a
chunk of them at a time. So memory does not grow with vocabulary x window. Cost: documents are not batched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lr2train.config import UserError
from lr2train.model.hidden import forward_replaced, hidden_rows
from lr2train.model.rotary import WindowRotary

CHUNK = 4096  # positions whose logits exist at a time


@dataclass(frozen=True)
class Score:
    """The scores of one document.

    Attributes:
        nlls: negative log-likelihood of each span, summed over its tokens, nats.
        n_tokens: number of scored tokens.
        exact: every scored token is the most likely one after the true tokens before it, so greedy decoding produces
            it.
    """

    nlls: tuple[float, ...]
    n_tokens: int
    exact: bool

    @property
    def nll(self) -> float:
        """Sum over all spans, nats."""
        return math.fsum(self.nlls)


@torch.inference_mode()
def score(
    model: Any,
    rotary: WindowRotary,
    window: str,
    tokens: np.ndarray,
    spans: Sequence[tuple[int, int]],
    chunk_tokens: int = 0,
) -> Score:
    """Score the tokens of ``spans``, each predicted from all tokens before it.

    Args:
        model: a Hugging Face causal LM whose rotary module is ``rotary``.
        window: "short" | "long".
        tokens: ids [T].
        spans: half-open token ranges; no span starts at 0, as the first token has no context.
        chunk_tokens: length of a chunk of the forward pass, where the activations of a whole window do not fit; 0: the
            whole document at once.

    Raises:
        UserError: the spans hold no token, or the model cannot run in chunks.
    """
    positions = [t - 1 for start, stop in spans for t in range(start, stop)]  # the token before predicts each token
    if not positions:
        raise UserError(
            "a document has no token to score (an empty answer mask would silently score ordinary text); check "
            "data.needles"
        )
    assert min(positions) >= 0, "the first token of a document has nothing before it to be predicted from"
    rotary.window = window
    device = next(model.parameters()).device
    ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64)).to(device)
    rows = torch.tensor(positions, device=device)
    losses, right = _predict(model.get_output_embeddings(), hidden_rows(model, ids, rows, chunk_tokens), ids[rows + 1])
    ends = np.cumsum([stop - start for start, stop in spans])  # borders of the spans in ``losses``
    return Score(tuple(math.fsum(part) for part in np.split(losses, ends[:-1])), len(positions), right)


def _predict(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[np.ndarray, bool]:
    """Negative log-likelihoods (float64 [n]) of ``targets`` [n] given ``hidden`` [n, H], and whether all are the most
    likely tokens.

    The head is called once, whatever the chunks. Under ZeRO-3 each call gathers the head's weights on all ranks, and
    ranks may score different numbers of tokens.
    """
    with forward_replaced(head, partial(_losses, head.forward, targets)):
        losses, right = head(hidden)
    return losses.double().cpu().numpy(), bool(right.all())


def _losses(
    head: Callable[[torch.Tensor], torch.Tensor], targets: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihoods of ``targets`` [n], and which are the most likely tokens [n]; logits of ``CHUNK``
    positions at a time.
    """
    losses, right = [], []
    for part, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        logits = head(part)
        losses.append(
            F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted, reduction="none")
        )
        right.append(logits.argmax(-1) == wanted)
    return torch.cat(losses), torch.cat(right)
