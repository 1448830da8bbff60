"""What a recomputed layer keeps, held in host memory between the forward and the backward pass.

A layer that is recomputed keeps its input, T/sp H numbers, and attention's result where that is kept. For 131072 tokens
of LLaMA3-8B on one GPU the inputs alone take 32 GiB. Here they are copied to pinned host memory as soon as a layer has
them, and back before the backward pass comes to the layer. As in ALST (Bekman et al., arXiv 2506.13996).

Choice: copies run on a stream of their own. In the forward pass at most two layers wait for their copies. In the
backward pass the layer below is fetched while a layer is computed. Layers that are still on the GPU at the end of the
forward pass are not fetched. The bits are the same. Cost: 2 T/sp H b bytes over PCIe for each layer and segment, hidden
where a layer takes longer than that; pinned memory, which torch rounds up to a power of two for each tensor. On a CPU a
copy is a plain copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

_NEAR = 2  # layers that are on the device at one time: one is computed with, one is on its way


in_host_memory: ContextVar[bool] = ContextVar("in_host_memory", default=False)
"""Whether the tensor that is being made would lie in host memory beside a GPU: a rehearsal, all on the CPU, asks."""


class Side(Protocol):
    """Work beside the current stream of a device."""

    def host(self, x: Tensor) -> Tensor:
        """Room for ``x`` in host memory."""
        ...

    def copy(self, to: Tensor, x: Tensor) -> Any:
        """Begin to copy ``x``, as it is after the work of the current stream; returns what ``wait`` takes. Both tensors
        must live until the current stream has waited.
        """
        ...

    def wait(self, copied: Any) -> None:
        """Let the current stream go on after the copy."""
        ...


class HostCopies:
    """The layers of one model, in the order in which they were computed."""

    def __init__(self, side_of: Callable[[torch.device], Side] | None = None) -> None:
        self.side_of = side_of or _side_of
        self.layers: list[weakref.ref[LayerCopies]] = []  # weak: a graph that is dropped takes its copies along
        self.side: Side | None = None

    def layer(self, device: torch.device) -> LayerCopies:
        """Begin the next layer of a forward pass on ``device``."""
        self.side = self.side or self.side_of(device)
        self.layers = [layer for layer in self.layers if layer() is not None]
        for layer in self.layers[: 1 - _NEAR]:  # with the new one _NEAR stay
            if (one := layer()) is not None:
                one.leave()
        made = LayerCopies(self, self.side)
        self.layers.append(weakref.ref(made))
        return made

    def before(self, layer: LayerCopies) -> LayerCopies | None:
        """The layer that was computed before ``layer``, whose turn in the backward pass comes next."""
        alive = [one for one in (found() for found in self.layers) if one is not None]
        place = alive.index(layer)
        return alive[place - 1] if place else None


class LayerCopies:
    """The tensors that one pass over a layer keeps."""

    def __init__(self, owner: HostCopies, side: Side) -> None:
        self.owner, self.side = owner, side
        self.kept: list[Kept] = []

    def keep(self, x: Tensor) -> Kept:
        """Begin to copy ``x`` to the host."""
        self.kept.append(Kept(x.detach(), self.side))
        return self.kept[-1]

    def take(self, kept: Kept) -> Tensor:
        """``x`` on its device, once. Begins to fetch what the layer before keeps."""
        self.fetch()
        if (before := self.owner.before(self)) is not None:
            before.fetch()
        self.kept.remove(kept)
        return kept.take()

    def leave(self) -> None:
        """Leave nothing on the device."""
        for one in self.kept:
            one.leave()

    def fetch(self) -> None:
        """Begin to bring everything back to the device."""
        for one in self.kept:
            one.fetch()


class Kept:
    """A tensor and its copy in host memory. At any time at least one of the two is complete or on its way."""

    def __init__(self, x: Tensor, side: Side) -> None:
        self.near: Tensor | None = x
        self.device, self.side = x.device, side
        self.far = side.host(x)
        self.copied = side.copy(self.far, x)

    def leave(self) -> None:
        """Free the device's memory, once the copy is made."""
        if self.near is not None:
            self.side.wait(self.copied)
            self.near = None

    def fetch(self) -> None:
        """Begin to bring the tensor back; nothing to do where it never left."""
        if self.near is None:
            self.near = torch.empty_like(self.far, device=self.device)
            self.copied = self.side.copy(self.near, self.far)

    def take(self) -> Tensor:
        """The tensor, for work on the current stream."""
        self.side.wait(self.copied)
        assert self.near is not None, "what a layer keeps is fetched before it is taken"
        return self.near


def _side_of(device: torch.device) -> Side:
    return _Stream(device) if device.type == "cuda" else _Plain()


class _Stream:
    """A second stream of a GPU, and pinned memory. Memory comes from the current stream and goes back to it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def host(self, x: Tensor) -> Tensor:
        return torch.empty_like(x, device="cpu", pin_memory=True)

    def copy(self, to: Tensor, x: Tensor) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # x is written, and the room of `to` is free
        with torch.cuda.stream(self.stream):
            to.copy_(x, non_blocking=True)
        return self.stream.record_event()

    def wait(self, copied: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(copied)


class _Plain:
    """A CPU: copies are made at once."""

    def host(self, x: Tensor) -> Tensor:
        token = in_host_memory.set(True)
        try:
            return torch.empty_like(x)
        finally:
            in_host_memory.reset(token)

    def copy(self, to: Tensor, x: Tensor) -> None:
        to.copy_(x)

    def wait(self, copied: None) -> None:
        pass
