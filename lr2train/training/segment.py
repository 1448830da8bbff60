"""A batch's tokens and labels as tensors on the device that trains.

Choice: the whole segment travels to the device as it is stored, on every rank of a sequence-parallel group. Labels are
made there, and each rank then takes its sequence shard. Two bytes a token travel where three arrays of eight would.
Cost: 16 bytes a token of device memory until the shard is taken. Positions follow from the documents alone:
``SegmentAttention.positions``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lr2train.data.batch import Batch


class SegmentTensors(NamedTuple):
    """``Batch.tokens`` and ``Batch.labels`` on a device: int64 [T] each."""

    tokens: Tensor
    labels: Tensor


def tensors_of(batch: Batch, device: torch.device) -> SegmentTensors:
    """The whole segment on ``device``."""
    tokens = _ids(batch.tokens, device)
    places, values = torch.from_numpy(batch.breaks).to(device)
    labels = tokens.roll(-1)  # a label is the next token, except at breaks
    labels[places] = values
    return SegmentTensors(tokens, labels)


def _ids(tokens: np.ndarray, device: torch.device) -> Tensor:
    if tokens.dtype != np.uint16:
        return torch.from_numpy(tokens).to(device).to(torch.int64)
    signed = torch.from_numpy(tokens.view(np.int16)).to(device)  # torch has few operations on uint16
    return signed.to(torch.int64) & 0xFFFF
