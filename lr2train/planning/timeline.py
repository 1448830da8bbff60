"""Memory of a rehearsed rank over time, by kind, and which lines hold its peak.

Choice: kinds follow from who allocated a storage, in which phase, and in which phase it was freed. Nothing is guessed
from sizes. Cost: the kinds are known only when the rehearsal is over.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from lr2train.planning.accounting import BACKWARD, BEFORE, FORWARD, UPDATE, ZERO, Accounting, Allocation

STATES, BUCKETS, GATHERED = "weights and states", "reduction buckets", "gathered weights"
SAVED, RECOMPUTED, TEMPORARY = "saved activations", "recomputed activations", "temporaries"
HOST = "host memory"
KINDS: tuple[str, ...] = (STATES, BUCKETS, GATHERED, SAVED, RECOMPUTED, TEMPORARY)
_GATHERING = ("partition_parameters.py", "partitioned_param_coordinator.py", "parameter_offload.py")


@dataclass(frozen=True)
class Holder:
    """Storages that one line of code made, and that are alive at one time."""

    kind: str
    line: str
    module: str  # numbers of layers as *
    backward: bool
    bytes: int
    count: int


@dataclass(frozen=True)
class Moment:
    """The device memory at one time.

    Attributes:
        at: time, counted in births and deaths of storages.
        bytes: by kind.
    """

    at: int
    phase: str
    micro_batch: str
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.bytes.values())


class Timeline:
    """The memory of a rank, from the first forward pass to the end of the update.

    Args:
        accounting: of a rehearsed step.
        buckets: allocations of DeepSpeed's reduction buckets.
        host: allocations that lie in host memory.
    """

    def __init__(self, accounting: Accounting, buckets: Iterable[Allocation] = (), host: Iterable[Allocation] = ()):
        self._phases = accounting.phases
        self._starts = [at for at, _, _ in self._phases]
        named: dict[int, str] = {id(one): BUCKETS for one in buckets} | {id(one): HOST for one in host}
        named |= {id(one): HOST for one in accounting.allocations if one.on_host}
        begin = next(at for at, phase, _ in self._phases if phase != BEFORE)
        self.allocations = [one for one in accounting.allocations if one.died is None or one.died > begin]
        for one in self.allocations:
            one.kind = named.get(id(one)) or self._kind(one)
            if one.phase == UPDATE and one.died is None:
                one.kind, one.born = named.get(id(one)) or STATES, begin  # Adam's moments: there in every later step
        self.moments = list(self._moments(begin))
        self.peak = max(self.moments, key=lambda moment: moment.total)

    def _kind(self, one: Allocation) -> str:
        last = self._phase_at(one.died - 1) if one.died is not None else None
        if one.phase == BEFORE:
            return STATES
        if one.place.whose == ZERO:
            if any(name in one.place.line for name in _GATHERING):
                return GATHERED
            return BUCKETS if one.phase == BACKWARD and last is not None else STATES if last is None else TEMPORARY
        if one.phase == FORWARD:
            return SAVED if last is None or last != self._phase_at(one.born) else TEMPORARY
        if one.phase == BACKWARD and one.place.module and not one.place.backward:
            return RECOMPUTED
        return TEMPORARY

    def _phase_at(self, time: int) -> int:
        """Number of the phase."""
        return bisect_right(self._starts, time) - 1

    def _moments(self, begin: int) -> Iterable[Moment]:
        """The memory after each birth."""
        changes = [(one.born, one.bytes, one) for one in self.allocations if one.kind != HOST]
        changes += [
            (one.died, -one.bytes, one) for one in self.allocations if one.kind != HOST and one.died is not None
        ]
        now = dict.fromkeys(KINDS, 0)
        for time, size, one in sorted(changes, key=lambda change: change[0]):
            now[one.kind] += size
            if time > begin and size > 0:
                _, phase, micro_batch = self._phases[self._phase_at(time - 1)]
                yield Moment(time, phase, micro_batch, dict(now))

    def peak_of(self, phase: str, micro_batch: str) -> Moment | None:
        """The largest moment of a phase; None where nothing was allocated."""
        mine = [one for one in self.moments if (one.phase, one.micro_batch) == (phase, micro_batch)]
        return max(mine, key=lambda moment: moment.total, default=None)

    def born_at(self, moment: Moment) -> Allocation:
        """The allocation that made a moment."""
        return next(one for one in self.allocations if one.born == moment.at)

    def holders(self, moment: Moment, most: int = 12) -> list[Holder]:
        """The lines that hold most at a moment."""
        sizes: Counter[tuple[str, str, str, bool]] = Counter()
        counts: Counter[tuple[str, str, str, bool]] = Counter()
        for one in self.allocations:
            if one.kind != HOST and one.born <= moment.at and (one.died is None or one.died > moment.at):
                key = one.kind, one.place.line, any_layer(one.place.module), one.place.backward
                sizes[key] += one.bytes
                counts[key] += 1
        return [Holder(*key, size, counts[key]) for key, size in sizes.most_common(most)]

    def sampled(self, most: int = 400) -> list[Moment]:
        """Moments for a picture: of each stretch of time and phase the largest."""
        stretch = max(1, -(-len(self.moments) // most))
        kept: list[Moment] = []
        for moment in self.moments:
            same = kept and self._same_stretch(kept[-1], moment, stretch)
            if not same:
                kept.append(moment)
            elif moment.total > kept[-1].total:
                kept[-1] = moment
        return kept

    def _same_stretch(self, before: Moment, moment: Moment, stretch: int) -> bool:
        alike = (before.phase, before.micro_batch) == (moment.phase, moment.micro_batch)
        return alike and before.at // (2 * stretch) == moment.at // (2 * stretch)

    @property
    def host_bytes(self) -> int:
        """Bytes that lie in host memory, at most."""
        far = [one for one in self.allocations if one.kind == HOST]
        changes = [(one.born, one.bytes) for one in far]
        changes += [(one.died, -one.bytes) for one in far if one.died is not None]
        return max(accumulate((size for _, size in sorted(changes)), initial=0))

    def spans(self) -> list[tuple[int, int, str, str]]:
        """(begin, end, phase, micro-batch) of each phase."""
        ends = [*self._phases, (self.moments[-1].at + 1, UPDATE, "")]
        return [(at, after, phase, name) for (at, phase, name), (after, _, _) in pairwise(ends)]


def any_layer(module: str) -> str:
    """A module path with * in the place of numbers: lm.model.layers.*.mlp."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", module)


def phases_of(moments: Sequence[Moment]) -> list[tuple[str, str]]:
    """(phase, micro-batch), in order of time, each once."""
    return list(dict.fromkeys((one.phase, one.micro_batch) for one in moments))
