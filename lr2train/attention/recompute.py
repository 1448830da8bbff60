"""Attention's result, kept while a layer is recomputed.

Activation checkpointing runs the forward pass of a layer a second time, in the backward pass. Attention is most of that
work in a long segment. Its backward needs q, k, v, out and lse. q, k and v come from cheap products; out and lse come
from the kernel. So ``out`` and ``lse`` of the first pass are kept, and the second pass takes them: no kernel runs again,
and no exchange of a ring or of ``gather``. Gradients are those of whole recomputation, bit for bit. After Korthikanti et
al., arXiv 2205.05198, who recompute attention and keep the rest: at 128k tokens the opposite is cheap.

Choice: autograd functions of attention ask ``kept`` for their result, and ``contexts`` tells them which pass runs. It is
the ``context_fn`` of ``torch.utils.checkpoint``, so it needs no knowledge of models. Results are taken in the order in
which they were put. Cost: T/sp Hq (D b + 4) bytes for each layer, with b bytes an element. The all-to-alls of ``ulysses``
run again, because q, k and v of other ranks' tokens would take 1 + 2 Hkv / Hq times as much again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

from torch import Tensor

Result = tuple[Tensor, Tensor]
"""out and lse of one attention layer."""


def contexts() -> tuple[_Pass, _Pass]:
    """Contexts of the first pass and of the second pass of one layer, for ``torch.utils.checkpoint``."""
    results: deque[Result] = deque()
    return _Pass(results, again=False), _Pass(results, again=True)


def kept(compute: Callable[[], Result]) -> Result:
    """``compute()``, or in the second pass over a layer its result of the first pass.

    Called inside the forward of an autograd function, so the results carry no graph.
    """
    current = _current.get()
    if current is None:
        return compute()
    if current.again and current.results:
        return current.results.popleft()
    out, lse = compute()
    if not current.again:
        current.results.append((out.detach(), lse.detach()))  # autograd gives out itself a graph
    return out, lse


class _Pass:
    """A pass over a layer; may be entered again, on any thread."""

    def __init__(self, results: deque[Result], again: bool) -> None:
        self.results, self.again = results, again
        self.tokens: list[Token[_Pass | None]] = []

    def __enter__(self) -> None:
        self.tokens.append(_current.set(self))

    def __exit__(self, *_: Any) -> None:
        _current.reset(self.tokens.pop())


_current: ContextVar[_Pass | None] = ContextVar("current", default=None)
