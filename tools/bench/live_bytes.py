"""The most bytes of tensors that are alive at one time, by torch's own storages; for CPU, which has no such counter."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """A context that follows every tensor made inside it, in the backward pass too.

    Attributes:
        now: bytes that are alive.
        peak: the most bytes that were alive at one time.
    """

    def __init__(self, others: Iterable[Tensor] = ()) -> None:
        """``others`` are tensors whose memory does not count."""
        super().__init__()
        self.sizes = {x.untyped_storage()._cdata: 0 for x in others}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator, and follow its results until their storages are freed."""
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_iter(out) if isinstance(x, Tensor)):
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
