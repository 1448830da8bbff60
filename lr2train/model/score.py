"""Negative log-likelihood of chosen tokens of one document, under the RoPE table of one window.

Choice: one long document a call, or several short texts. Hidden states come from ``hidden.py``; logits are computed at
the scored positions only, a chunk of them at a time. So memory does not grow with vocabulary x window. Cost: short
texts of different lengths are computed as long as the longest of their call.
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

from lr2train.config import UserError
from lr2train.model.head import LogitForm, form_of
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
        right: tokens of each span that are the most likely ones after the true tokens before them.
    """

    nlls: tuple[float, ...]
    n_tokens: int
    exact: bool
    right: tuple[int, ...] = ()

    @property
    def nll(self) -> float:
        """Sum over all spans, nats."""
        return math.fsum(self.nlls)


@torch.no_grad()  # not inference_mode: weights that ZeRO-3 gathers inside could not enter a backward pass later
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
    rotary.window = window
    device = next(model.parameters()).device
    ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64)).to(device)
    rows = torch.tensor(scored_positions(spans), device=device)
    losses, right = _predict(model, hidden_rows(model, ids, rows, chunk_tokens), ids[rows + 1])
    return _score(spans, losses, right)


@torch.inference_mode()
def score_together(
    model: Any, rotary: WindowRotary, window: str, texts: Sequence[tuple[np.ndarray, Sequence[tuple[int, int]]]]
) -> list[Score]:
    """Score several short texts in one forward pass; texts that differ in their last token alone share a row.

    Attention is causal, so tokens that fill a row on its right change nothing to their left, and no mask is needed.

    Args:
        model, rotary, window: as in ``score``.
        texts: (ids [T], spans) each, as in ``score``.
    """
    rotary.window = window
    device = next(model.parameters()).device
    bodies = list(dict.fromkeys(np.asarray(tokens[:-1], dtype=np.int64).tobytes() for tokens, _ in texts))
    ids = torch.zeros(len(bodies), max(map(len, bodies)) // 8, dtype=torch.int64)
    for row, body in enumerate(bodies):
        ids[row, : len(body) // 8] = torch.frombuffer(bytearray(body), dtype=torch.int64)
    hidden = model.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state
    row_of = {body: row for row, body in enumerate(bodies)}
    parts, targets = [], []
    for tokens, spans in texts:
        tokens = np.asarray(tokens, dtype=np.int64)
        positions = np.array(scored_positions(spans))
        parts.append(hidden[row_of[tokens[:-1].tobytes()], torch.from_numpy(positions).to(device)])
        targets.append(tokens[positions + 1])
    losses, right = _predict(model, torch.cat(parts), torch.from_numpy(np.concatenate(targets)).to(device))
    ends = np.cumsum([len(one) for one in targets])[:-1]
    pieces = zip(texts, np.split(losses, ends), np.split(right, ends), strict=True)
    return [_score(spans, nlls, hits) for (_, spans), nlls, hits in pieces]


def scored_positions(spans: Sequence[tuple[int, int]]) -> list[int]:
    """The positions that predict the tokens of the spans: each token is predicted by the one before it.

    Raises:
        UserError: the spans hold no token.
    """
    positions = [t - 1 for start, stop in spans for t in range(start, stop)]
    if not positions:
        raise UserError(
            "a document has no token to score (an empty answer mask would silently score ordinary text); check "
            "data.needles"
        )
    assert min(positions) >= 0, "the first token of a document has nothing before it to be predicted from"
    return positions


def _score(spans: Sequence[tuple[int, int]], losses: np.ndarray, right: np.ndarray) -> Score:
    """The score of one text from the losses and hits of its scored tokens, in the order of the spans."""
    ends = np.cumsum([stop - start for start, stop in spans])[:-1]  # borders of the spans in ``losses``
    nlls = tuple(math.fsum(part) for part in np.split(losses, ends))
    return Score(nlls, len(losses), bool(right.all()), tuple(int(part.sum()) for part in np.split(right, ends)))


def _predict(model: Any, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """``predicted`` as numpy arrays; the losses in float64."""
    losses, right = predicted(model, hidden, targets)
    return losses.double().cpu().numpy(), right.cpu().numpy()


def predicted(model: Any, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihoods (fp32 at least, [n]) of ``targets`` [n] given ``hidden`` [n, H], and which of them are
    the most likely tokens (bool [n]).

    The head is called once, whatever the chunks. Under ZeRO-3 each call gathers the head's weights on all ranks, and
    ranks may score different numbers of tokens.
    """
    head = model.get_output_embeddings()
    with forward_replaced(head, partial(_losses, head.forward, form_of(model), targets)):
        return head(hidden)


def _losses(
    head: Callable[[torch.Tensor], torch.Tensor], form: LogitForm, targets: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihoods of ``targets`` [n], and which are the most likely tokens [n]; logits of ``CHUNK``
    positions at a time.
    """
    losses, right = [], []
    for part, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        products = head(part)
        logits = form.logits(products.to(torch.promote_types(products.dtype, torch.float32)))
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        right.append(logits.argmax(-1) == wanted)
    return torch.cat(losses), torch.cat(right)
