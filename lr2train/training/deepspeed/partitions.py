"""How ZeRO divides weights and optimizer states into parameter shards, and how another number of ranks reads the
shards.

Choice: every rank copies its future shard straight out of the memory-mapped files, into the state that DeepSpeed would
have written for the rank. Nothing is converted on disk, gathered or rounded. All ranks together read a checkpoint once,
and each rank needs the memory of its own shard. DeepSpeed's universal checkpoint is not used: it writes the state twice
more, every rank reads all of the state, and every parameter group gets the options of the first group, so that norms
would decay. Cost: the two divisions below are those of DeepSpeed 0.19.8. Other sizes are refused before anything is
changed.

A *group* is one flat vector of the optimizer. A rank's *shard* of a group is a slice of the vector, padding included. A
*slice* is a stretch of consecutive elements of one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from lr2train.config import UserError

ALIGNMENT = 2  # elements; ZeRO-1 and 2 round a rank's shard of a group up to a multiple

Sizes = Sequence[Mapping[str, int]]
"""For each group: parameter name -> number of elements, in the order of the flat vector."""

Read = Callable[[int, int], torch.Tensor]
"""(rank, group) -> the rank's shard of the weights, or of one moment."""


@dataclass(frozen=True)
class Slice:
    """Where a slice of a parameter lies."""

    group: int
    rank: int
    start: int  # in the flattened parameter
    flat_start: int  # in the rank's shard of the group
    numel: int


@dataclass(frozen=True)
class ParameterShards:
    """Which rank owns which elements.

    Attributes:
        slices: by parameter, in order of rank; together the slices are the whole parameter.
        shard_numels: by group: elements of a rank's shard, padding included; the same for every rank.
    """

    slices: Mapping[str, Sequence[Slice]]
    shard_numels: Sequence[int]

    def of_rank(self, rank: int, group: int) -> list[tuple[str, Slice]]:
        """The slices in a rank's shard of a group."""
        return [
            (name, one)
            for name, slices in self.slices.items()
            for one in slices
            if (one.rank, one.group) == (rank, group)
        ]


def by_parameter(sizes: Sizes, world: int) -> ParameterShards:
    """ZeRO-3: each parameter is cut into ``world`` equal parts, the last one padded.

    A rank's parts lie one behind the other.
    """
    slices: dict[str, list[Slice]] = {}
    shard_numels = []
    for group, members in enumerate(sizes):
        flat_start = 0
        for name, numel in members.items():
            part = -(-numel // world)
            cuts = [(rank, rank * part, min(part, numel - rank * part)) for rank in range(world)]
            slices[name] = [Slice(group, rank, start, flat_start, length) for rank, start, length in cuts if length > 0]
            flat_start += part
        shard_numels.append(flat_start)
    return ParameterShards(slices, shard_numels)


def by_group(sizes: Sizes, world: int) -> ParameterShards:
    """ZeRO-1 and 2: the parameters of a group lie one behind the other.

    The whole vector is padded at its end and cut into equal parts.
    """
    slices: dict[str, list[Slice]] = {}
    shard_numels = []
    for group, members in enumerate(sizes):
        part = -(-sum(members.values()) // (ALIGNMENT * world)) * ALIGNMENT
        first = 0
        for name, numel in members.items():
            owners = range(first // part, -(-(first + numel) // part))
            cuts = [(rank, max(first, rank * part), min(first + numel, (rank + 1) * part)) for rank in owners]
            slices[name] = [
                Slice(group, rank, begin - first, begin - rank * part, end - begin) for rank, begin, end in cuts
            ]
            first += numel
        shard_numels.append(part)
    return ParameterShards(slices, shard_numels)


@dataclass(frozen=True)
class StageFormat:
    """How a ZeRO stage divides its state, and DeepSpeed's keys for it.

    Attributes:
        divide: (sizes, world) -> the shards.
        weights: key of the fp32 master weights, a list over groups.
        optimizer: key of the state dict of torch's optimizer, whose parameters are the groups.
    """

    divide: Callable[[Sizes, int], ParameterShards]
    weights: str
    optimizer: str


STAGES = {
    1: StageFormat(by_group, "single_partition_of_fp32_groups", "base_optimizer_state"),
    2: StageFormat(by_group, "single_partition_of_fp32_groups", "base_optimizer_state"),
    3: StageFormat(by_parameter, "fp32_flat_groups", "optimizer_state_dict"),
}
"""By ZeRO stage; stage 0 divides nothing."""

_SCALARS = ("loss_scaler", "dynamic_loss_scale", "overflow")  # of float16; the same on every rank


def repartitioned(
    saved: Callable[[int], dict[str, Any]],
    saved_world: int,
    saved_sizes: Sizes,
    form: StageFormat,
    live: Mapping[str, Any],
    sizes: Sizes,
    rank: int,
    world: int,
) -> dict[str, Any]:
    """The optimizer state of one rank out of ``world``, from the states of ``saved_world`` ranks.

    Args:
        saved: rank -> the optimizer state in the rank's file; called when the state is needed.
        saved_world: ranks that wrote the checkpoint.
        saved_sizes: of the groups then.
        form: of the ZeRO stage, then and now.
        live: the rank's present state. Gives every entry that the checkpoint does not hold; is not changed.
        sizes: of the groups now; the same parameters, perhaps in other groups.
        rank, world: the rank to make a state for, and the number of ranks now.

    Returns:
        ``live`` with the values of the checkpoint: fp32 tensors in host memory.

    Raises:
        UserError: the groups of the checkpoint, or the present groups, are divided in a way that this module does not
            know.
    """
    old, new = form.divide(saved_sizes, saved_world), form.divide(sizes, world)
    refuse_unknown(live, form, new)
    refuse_unknown(saved(0), form, old)

    mine = [new.of_rank(rank, group) for group in range(len(sizes))]

    def shard(group: int, read: Read) -> torch.Tensor:
        return _assembled(mine[group], new.shard_numels[group], old, read)

    def moments(group: int) -> dict[str, Any]:
        """The optimizer's state of one parameter group on this rank."""
        before = next(old.slices[name][0].group for name in sizes[group])
        found: dict[str, Any] = saved(0)[form.optimizer]["state"][before]
        # A step count is copied: two groups that were one before must not share the tensor, or AdamW would count twice.
        return {
            key: shard(group, lambda r, g, key=key: saved(r)[form.optimizer]["state"][g][key])
            if _is_flat(value)
            else deepcopy(value)
            for key, value in found.items()
        }

    optimizer = {**live[form.optimizer], "state": {group: moments(group) for group in range(len(sizes))}}
    weights = [shard(group, lambda r, g: saved(r)[form.weights][g]) for group in range(len(sizes))]
    scalars = {key: saved(0)[key] for key in _SCALARS if key in saved(0)}
    return {**live, **scalars, form.weights: weights, form.optimizer: optimizer}


def _is_flat(value: object) -> bool:
    """Whether an entry of the optimizer's state is a flat vector like its group, and not a step count."""
    return isinstance(value, torch.Tensor) and value.dim() == 1


def _assembled(mine: Sequence[tuple[str, Slice]], numel: int, old: ParameterShards, read: Read) -> torch.Tensor:
    """A new shard of ``numel`` elements, copied together from the old shards; zeros in the padding."""
    out = torch.zeros(numel)
    for name, target in mine:
        for source in old.slices[name]:
            begin = max(target.start, source.start)  # of the overlap, in the flattened parameter
            length = min(target.start + target.numel, source.start + source.numel) - begin
            if length > 0:
                found = read(source.rank, source.group).narrow(0, source.flat_start + begin - source.start, length)
                out.narrow(0, target.flat_start + begin - target.start, length).copy_(found)
    return out


def refuse_unknown(state: Mapping[str, Any], form: StageFormat, shards: ParameterShards) -> None:
    """Refuse a state whose weights do not have the sizes of ``shards``.

    Raises:
        UserError: the sizes differ; the text names both.
    """
    found, expected = [weights.numel() for weights in state[form.weights]], list(shards.shard_numels)
    # ZeRO-1 and 2 may leave the end's padding out of the weights.
    cut_off = state.get("group_paddings", [0] * len(expected))
    fitting = len(found) == len(expected) and all(
        n - p <= f <= n for f, n, p in zip(found, expected, cut_off, strict=True)
    )
    if not fitting or any(map(any, state.get("param_alignment_paddings", []))):
        raise UserError(
            f"the optimizer's groups have {found} elements per rank, and only {expected} can be divided anew; go on "
            "with "
            "the number of ranks that wrote the checkpoint, or choose a new name= without the keys of engine.deepspeed "
            "that change how ZeRO divides parameters"
        )
