"""Attention's result, kept while a layer is recomputed.

Activation checkpointing runs the forward pass of a layer again, in the backward pass. In a long segment attention is
most of that work. Its backward needs q, k, v, out and lse: q, k and v come from cheap products, out and lse from the
kernel. So ``out`` and ``lse`` of the first pass are kept, and the second pass takes them. No kernel runs again, and
no exchange of a ring or of ``gather``. Gradients are those of whole recomputation, bit for bit.

Choice: autograd functions of attention ask ``kept`` for their result. ``contexts`` tells them which pass runs. It is
the ``context_fn`` of ``torch.utils.checkpoint``, so nothing here knows models. Results are taken in the order in
which they were put. Cost: T/sp Hq (D b + 4) bytes for each layer, with b bytes an element. The all-to-alls of
``ulysses`` run again. Their results, q, k and v of this rank's heads and the output by tokens, would take 2 + 2 Hkv /
Hq times as much more. The library ring-flash-attn has autograd functions of its own, which are recomputed whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any, Protocol

from torch import Tensor

Result = tuple[Tensor, Tensor]
"""out and lse of one attention layer."""


class Store(Protocol):
    """Where the kept tensors of one layer are: whatever ``keep`` returns is given to ``take``, once."""

    def keep(self, x: Tensor) -> Any: ...

    def take(self, kept: Any) -> Tensor: ...


def contexts(store: Store | None = None) -> tuple[_Pass, _Pass]:
    """Contexts of the first pass and of the second pass over one layer, for ``torch.utils.checkpoint``.

    Args:
        store: where results are kept; None leaves them where they are.
    """
    results: deque[tuple[Any, Any]] = deque()
    return _Pass(results, store or _Here(), again=False), _Pass(results, store or _Here(), again=True)


def kept(compute: Callable[[], Result]) -> Result:
    """``compute()``, or in the second pass over a layer its result of the first pass.

    Called inside the forward of an autograd function, so the results carry no graph.
    """
    current = _current.get()
    if current is None:
        return compute()
    if current.again and current.results:
        out, lse = current.results.popleft()
        return current.store.take(out), current.store.take(lse)
    out, lse = compute()
    if not current.again:
        current.results.append((current.store.keep(out), current.store.keep(lse)))
    return out, lse


class _Here:
    """The device's own memory."""

    def keep(self, x: Tensor) -> Tensor:
        return x.detach()  # autograd gives x itself a graph, which would live as long

    def take(self, kept: Tensor) -> Tensor:
        return kept


class _Pass:
    """A pass over a layer; may be entered again, on any thread."""

    def __init__(self, results: deque[tuple[Any, Any]], store: Store, again: bool) -> None:
        self.results, self.store, self.again = results, store, again
        self.tokens: list[Token[_Pass | None]] = []

    def __enter__(self) -> None:
        self.tokens.append(_current.set(self))

    def __exit__(self, *_: Any) -> None:
        _current.reset(self.tokens.pop())


_current: ContextVar[_Pass | None] = ContextVar("current", default=None)
