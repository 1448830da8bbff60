"""Negative log-likelihood of chosen tokens of one document, under one window's RoPE table.

Choice: one document a call; hidden states are kept (``hidden.py``) and logits exist at the scored positions only, a chunk of them at a time,
so memory does not grow with the vocabulary times the window.
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

CHUNK = 4096  # positions whose logits exist at one time


@dataclass(frozen=True)
class Score:
    """What a model makes of the scored tokens."""

    nlls: tuple[float, ...]  # of each span, summed over its tokens, nats
    n_tokens: int
    exact: bool  # greedy decoding would say every one of them

    @property
    def nll(self) -> float:
        """Of all spans, nats."""
        return math.fsum(self.nlls)


@torch.inference_mode()
def score(
    model: Any, rotary: WindowRotary, window: str, tokens: np.ndarray, spans: Sequence[tuple[int, int]], chunk_tokens: int = 0
) -> Score:
    """Score the tokens at ``spans`` (half-open, no span may start at 0), each predicted from all before it.

    Args:
        model: a Hugging Face causal LM whose rotary module is ``rotary``.
        window: "short" | "long".
        tokens: ids [T].
        spans: which tokens count.
        chunk_tokens: of the forward pass, for windows whose activations do not fit; 0 is the whole document at once.

    Raises:
        UserError: the spans select no token, or the model cannot run in chunks.
    """
    positions = [t - 1 for start, stop in spans for t in range(start, stop)]
    if not positions:
        raise UserError("a document has no token to score (an empty answer mask would silently score ordinary text); check data.needles")
    assert min(positions) >= 0, "the first token of a document has nothing before it to be predicted from"
    rotary.window = window
    device = next(model.parameters()).device
    ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64)).to(device)
    rows = torch.tensor(positions, device=device)
    losses, right = _predict(model.get_output_embeddings(), hidden_rows(model, ids, rows, chunk_tokens), ids[rows + 1])
    ends = np.cumsum([stop - start for start, stop in spans])
    return Score(tuple(math.fsum(part) for part in np.split(losses, ends[:-1])), len(positions), right)


def _predict(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[np.ndarray, bool]:
    """Negative log-likelihoods (float64 [n]) of ``targets`` [n] after ``hidden`` [n, hidden], and whether each is the likeliest token.

    The head is called once, whatever the chunks: its weights may be divided over ranks that score unlike numbers of tokens, and are
    gathered at each call, by all ranks.
    """
    with forward_replaced(head, partial(_losses, head.forward, targets)):
        losses, right = head(hidden)
    return losses.double().cpu().numpy(), bool(right.all())


def _losses(head: Callable[[torch.Tensor], torch.Tensor], targets: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n] each: negative log-likelihoods of ``targets``, and which are the likeliest tokens; from the logits of ``CHUNK`` at one time."""
    losses, right = [], []
    for part, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        logits = head(part)
        losses.append(F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted, reduction="none"))
        right.append(logits.argmax(-1) == wanted)
    return torch.cat(losses), torch.cat(right)
