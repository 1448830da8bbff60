"""A batch's tokens and labels as tensors on the device that trains.

Choice: the whole segment travels to the device as it is stored, on every rank of a sequence-parallel group. Labels are
made there, and each rank then takes its sequence shard. Two bytes a token travel where three arrays of eight would.
Cost: 16 bytes a token of device memory until the shard is taken. Positions follow from the documents alone:
``SegmentAttention.positions``.

The places of targets are found on the host, which knows ``Batch.breaks``: looking for them on the device would make the
host wait for it. Cost: 8 bytes a token of the shard travel too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lr2train.data.batch import IGNORE, Batch
from lr2train.parallel.comm import to_device
from lr2train.parallel.layout import Layout


class SegmentTensors(NamedTuple):
    """``Batch.tokens`` and ``Batch.labels`` on a device: int64 [T] each."""

    tokens: Tensor
    labels: Tensor


class ShardTensors(NamedTuple):
    """One rank's sequence shard of n tokens on a device, in the order of its layout.

    Attributes:
        tokens: int64 [n].
        labels: int64 [n].
        targets: int64 [m], the places of the shard whose label is not ``IGNORE``, in ascending order.
    """

    tokens: Tensor
    labels: Tensor
    targets: Tensor


def shard_of(batch: Batch, layout: Layout, device: torch.device) -> ShardTensors:
    """The sequence shard of ``layout`` on ``device``. The host does not wait for the device."""
    # Cloned: a view would keep the whole segment in memory.
    tokens, labels = (layout.shard(whole, 0).clone() for whole in tensors_of(batch, device))
    return ShardTensors(tokens, labels, to_device(torch.from_numpy(target_places(batch, layout)), device))


def target_places(batch: Batch, layout: Layout) -> np.ndarray:
    """int64 [m]: the places of the layout's shard whose label is not ``IGNORE``, in ascending order."""
    is_target = np.ones(len(batch.tokens), bool)
    is_target[batch.breaks[0, batch.breaks[1] == IGNORE]] = False
    return np.flatnonzero(np.concatenate([is_target[start:stop] for start, stop in layout.blocks]))


def tensors_of(batch: Batch, device: torch.device) -> SegmentTensors:
    """The whole segment on ``device``."""
    tokens = _ids(batch.tokens, device)
    places, values = to_device(torch.from_numpy(batch.breaks), device)
    labels = tokens.roll(-1)  # a label is the next token, except at breaks
    labels[places] = values
    return SegmentTensors(tokens, labels)


def _ids(tokens: np.ndarray, device: torch.device) -> Tensor:
    if tokens.dtype != np.uint16:
        return to_device(torch.from_numpy(tokens), device).to(torch.int64)
    signed = to_device(torch.from_numpy(tokens.view(np.int16)), device)  # torch has few operations on uint16
    return signed.to(torch.int64) & 0xFFFF
