"""A batch's tokens, labels and positions as tensors on the device that trains.

Choice: the whole segment travels as it is stored and everything else is made of it there, on every rank of a sequence-parallel group, which then
takes its part. Two bytes a token travel where three arrays of eight would. Cost: 24 bytes a token of device memory until the part is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lr2train.data.batch import Batch


class Segment(NamedTuple):
    """int64 [T] each; what ``Batch`` says of them."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor


def segment_of(batch: Batch, device: torch.device) -> Segment:
    """The whole segment."""
    tokens = _ids(batch.tokens, device)
    places, values = torch.from_numpy(batch.breaks).to(device)
    labels = tokens.roll(-1)
    labels[places] = values
    return Segment(tokens, labels, _positions(batch.spans, len(tokens), device))


def _ids(tokens: np.ndarray, device: torch.device) -> Tensor:
    if tokens.dtype != np.uint16:
        return torch.from_numpy(tokens).to(device).to(torch.int64)
    signed = torch.from_numpy(tokens.view(np.int16)).to(device)  # torch can do little with uint16
    return signed.to(torch.int64) & 0xFFFF


def _positions(spans: tuple[tuple[int, int], ...], n_tokens: int, device: torch.device) -> Tensor:
    """0, 1, 2 … in every span, 0 between them."""
    borders = torch.tensor([0, *(border for span in spans for border in span), n_tokens])
    lengths = borders.diff()  # of a gap, a span, a gap … a gap
    begins, inside = borders[:-1], torch.arange(len(lengths)) % 2
    begins, inside, lengths = (one.to(device) for one in (begins, inside, lengths))
    firsts, inside = (torch.repeat_interleave(one, lengths, output_size=n_tokens) for one in (begins, inside))
    return (torch.arange(n_tokens, device=device) - firsts) * inside
