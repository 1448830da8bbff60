"""How ZeRO divides parameters and optimizer states over ranks, and how one number of ranks reads what another has written.

Choice: every rank copies what it is going to own straight out of the memory-mapped shard files, into the state that DeepSpeed would have
written for it. Nothing is converted on disk, gathered or rounded: all ranks together read a checkpoint once, and each needs the memory of its
own share. (DeepSpeed's universal checkpoint writes the state twice more, has every rank read all of it, and gives every parameter group the
options of the first, so that norms would decay.) Cost: the two layouts below are DeepSpeed 0.19.8's and are known here; sizes that do not come
out are refused before anything is changed.

A *group* is one of the optimizer's flat vectors; each rank owns a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from lr2train.config import UserError

ALIGNMENT = 2  # ZeRO-1 and 2: a rank's part of a group is a multiple of so many elements

Sizes = Sequence[Mapping[str, int]]
"""Elements of every parameter by name, for each group, in the order in which they lie there."""

Read = Callable[[int, int], torch.Tensor]
"""(rank, group) -> the rank's part of one kind of state, flat."""


@dataclass(frozen=True)
class Place:
    """Where a run of a parameter's elements lies."""

    group: int
    rank: int
    start: int  # of the run in the flattened parameter
    flat_start: int  # and in the rank's part of the group
    numel: int


@dataclass(frozen=True)
class Layout:
    """Who owns what."""

    places: Mapping[str, Sequence[Place]]  # by parameter, in order of rank; together they are the parameter
    part_numels: Sequence[int]  # by group: elements of every rank's part, padding included

    def of_rank(self, rank: int, group: int) -> list[tuple[str, Place]]:
        """The runs that a rank's part of a group is made of."""
        return [(name, place) for name, places in self.places.items() for place in places if (place.rank, place.group) == (rank, group)]


def by_parameter(sizes: Sizes, world: int) -> Layout:
    """ZeRO-3: every parameter is cut into ``world`` equal parts, the last of them padded; a rank's parts lie one behind the other."""
    places: dict[str, list[Place]] = {}
    part_numels = []
    for group, members in enumerate(sizes):
        flat_start = 0
        for name, numel in members.items():
            part = -(-numel // world)
            cuts = [(rank, rank * part, min(part, numel - rank * part)) for rank in range(world)]
            places[name] = [Place(group, rank, start, flat_start, length) for rank, start, length in cuts if length > 0]
            flat_start += part
        part_numels.append(flat_start)
    return Layout(places, part_numels)


def by_group(sizes: Sizes, world: int) -> Layout:
    """ZeRO-1 and 2: the parameters of a group lie one behind the other, and the whole, padded at its end, is cut into equal parts."""
    places: dict[str, list[Place]] = {}
    part_numels = []
    for group, members in enumerate(sizes):
        part = -(-sum(members.values()) // (ALIGNMENT * world)) * ALIGNMENT
        first = 0
        for name, numel in members.items():
            ranks = range(first // part, -(-(first + numel) // part))
            cuts = [(rank, max(first, rank * part), min(first + numel, (rank + 1) * part)) for rank in ranks]
            places[name] = [Place(group, rank, begin - first, begin - rank * part, end - begin) for rank, begin, end in cuts]
            first += numel
        part_numels.append(part)
    return Layout(places, part_numels)


@dataclass(frozen=True)
class Form:
    """The layout and the names of a ZeRO stage's state."""

    layout: Callable[[Sizes, int], Layout]
    weights: str  # list over groups: fp32 master weights
    optimizer: str  # state dict of torch's optimizer, its parameters being the groups


FORMS = {
    1: Form(by_group, "single_partition_of_fp32_groups", "base_optimizer_state"),
    2: Form(by_group, "single_partition_of_fp32_groups", "base_optimizer_state"),
    3: Form(by_parameter, "fp32_flat_groups", "optimizer_state_dict"),
}
_SCALARS = ("loss_scaler", "dynamic_loss_scale", "overflow")  # of fp16; the same on every rank


def repartitioned(
    shards: Callable[[int], dict[str, Any]],
    n_shards: int,
    written: Sizes,
    form: Form,
    live: Mapping[str, Any],
    sizes: Sizes,
    rank: int,
    world: int,
) -> dict[str, Any]:
    """The state of one rank out of ``world``, from shards that ``n_shards`` ranks have written.

    Args:
        shards: rank -> the optimizer's state in its file, opened when it is needed.
        n_shards: ranks that wrote.
        written: the sizes that they were written with.
        form: of the ZeRO stage, which is the same.
        live: the rank's present state; gives everything that is not in the shards. Not changed.
        sizes: of the present groups; they may be cut otherwise, the parameters are the same.
        rank, world: whose state is made.

    Returns:
        ``live`` with the shards' values: fp32 tensors in host memory, the rank's share of the checkpoint.

    Raises:
        UserError: the shards, or the present groups, are not laid out as this module knows it.
    """
    old, new = form.layout(written, n_shards), form.layout(sizes, world)
    _refuse_unknown(live, form, new)
    _refuse_unknown(shards(0), form, old)

    mine = [new.of_rank(rank, group) for group in range(len(sizes))]

    def part(group: int, read: Read) -> torch.Tensor:
        return _gathered(mine[group], new.part_numels[group], old, read)

    def moments(group: int) -> dict[str, Any]:  # a step count is copied: groups that were one before would count it up together
        before = next(old.places[name][0].group for name in sizes[group])
        found: dict[str, Any] = shards(0)[form.optimizer]["state"][before]
        return {
            key: part(group, lambda r, g, key=key: shards(r)[form.optimizer]["state"][g][key]) if _is_flat(value) else deepcopy(value)
            for key, value in found.items()
        }

    optimizer = {**live[form.optimizer], "state": {group: moments(group) for group in range(len(sizes))}}
    weights = [part(group, lambda r, g: shards(r)[form.weights][g]) for group in range(len(sizes))]
    scalars = {key: shards(0)[key] for key in _SCALARS if key in shards(0)}
    return {**live, **scalars, form.weights: weights, form.optimizer: optimizer}


def _is_flat(value: object) -> bool:
    """Whether an entry of the optimizer's state has an element for each of the group's; a step count has not."""
    return isinstance(value, torch.Tensor) and value.dim() == 1


def _gathered(mine: Sequence[tuple[str, Place]], numel: int, old: Layout, read: Read) -> torch.Tensor:
    """A part of a group, put together from the parts in which its parameters' elements were; zeros where it is padded."""
    out = torch.zeros(numel)
    for name, place in mine:
        for source in old.places[name]:
            begin = max(place.start, source.start)
            length = min(place.start + place.numel, source.start + source.numel) - begin
            if length > 0:
                found = read(source.rank, source.group).narrow(0, source.flat_start + begin - source.start, length)
                out.narrow(0, place.flat_start + begin - place.start, length).copy_(found)
    return out


def _refuse_unknown(state: Mapping[str, Any], form: Form, layout: Layout) -> None:
    """Refuse a state whose groups have not the sizes that the layout says."""
    found, expected = [weights.numel() for weights in state[form.weights]], list(layout.part_numels)
    cut_off = state.get("group_paddings", [0] * len(expected))  # ZeRO-1 and 2 may leave the padding at the end out of the weights
    fitting = len(found) == len(expected) and all(n - p <= f <= n for f, n, p in zip(found, expected, cut_off, strict=True))
    if not fitting or any(map(any, state.get("param_alignment_paddings", []))):
        raise UserError(
            f"the optimizer's groups have {found} elements a rank, and {expected} can be divided anew; go on with the number of ranks that wrote "
            "the checkpoint, or choose a new name= and leave out of engine.deepspeed what changes how ZeRO divides parameters"
        )
