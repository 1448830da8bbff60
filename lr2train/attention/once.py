"""Facts that follow from an object, each computed at most once in the object's life.

Choice: what follows from a segment hangs on the segment's own objects, and no cache is global. So nothing outlives a
segment, and two segments never evict each other. Cost: two equal segments compute their facts twice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

T = TypeVar("T")


class Once:
    """An object that keeps the facts computed from it. The object's own fields must not change."""

    def once(self, make: Callable[..., T], *arguments: Hashable) -> T:
        """``make(self, *arguments)``: computed at the first call, the same result at every later one."""
        kept = self.__dict__.setdefault("_once", {})  # not a field, so that frozen dataclasses can keep facts too
        key = make, arguments
        if key not in kept:
            kept[key] = make(self, *arguments)
        return kept[key]
