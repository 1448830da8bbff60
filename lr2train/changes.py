"""Which config keys may change between two starts of a run, and which keys differ between two configs.

Choice: this file lists the keys that may change, and a change of any other key is refused. A key that the saved config
lacks is passed over, because a later release has added the key. Cost: the list has to be kept by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# Prefixes of ``key: old -> new``. A prefix that ends with ":" stands for one key, a prefix that ends with "." for all
# keys below, any other prefix for every key that begins so.
MAY_CHANGE = (
    # the number of ranks
    "parallel.",
    # paths: the contents of the inputs are compared instead
    "model.path:", "model.revision:", "model.allow_download:", "data.path:", "rope.factors:",
    # read by prepare alone: the contents of the corpus are compared instead
    *(f"data.{key}{end}" for end in ":." for key in (
        "sources", "tokenizer", "tokenizer_train_bytes", "tokenizer_backend", "vocab_size", "shard_bytes",
        "deduplicate", "decontaminate", "short_tokens", "long_tokens", "buckets", "weights_of", "max_repeats",
        "keep_below", "keep_below_tokens", "over_long", "holdout", "align_sp", "workers",
    )),
    # how data are read; lr2train.training.steps has its own rule for skipped steps and groups
    "data.verify:", "data.prefetch_steps:", "data.loader_threads:", "data.skip_steps:", "data.group_segments:",
    # when checkpoints are written and read
    "engine.checkpoint_every_steps:", "engine.keep_checkpoints:", "engine.max_bad_steps:", "engine.resume_from:",
    # which held-out loss is measured, and when
    "engine.validate_every_steps:", "engine.validate_segments:",
    # memory against time
    "engine.recompute:", "engine.activation_checkpointing:", "engine.recompute_layers:", "engine.tile_mlp:",
    "engine.offload_inputs:", "engine.fused:", "engine.deterministic:",
    "engine.loss_chunk_tokens:", "search.chunk_tokens:", "search.shard:",
    *(f"engine.deepspeed.zero_optimization.{key}" for key in (
        "offload_", "stage3_", "allgather_", "reduce_bucket_size", "sub_group_size", "overlap_comm",
        "contiguous_gradients", "round_robin_gradients", "zero_hpz_partition_size",
    )),
    # logging
    *(f"engine.deepspeed.{key}" for key in ("wall_clock_breakdown", "steps_per_print", "comms_logger", "flops_profiler",
    "memory_breakdown")),
)  # fmt: skip
# Dictionaries with free keys: there, a missing key is a value that was not set.
_OPEN = re.compile(
    r"model\.(architecture|overrides)\.|rope\.options\.|engine\.deepspeed\.|data\.keep_below\.|.*\.(options|sources)\.$"
)


def may_change(line: str) -> bool:
    """Whether a run may go on with this difference, a line of ``differences``."""
    if line.startswith(MAY_CHANGE):
        return True
    key, _, change = line.partition(": ")
    old, _, new = change.partition(" -> ")
    return (
        key == "optim.steps" and old.isdigit() and new.isdigit() and 0 < int(old) < int(new)
    )  # more steps than before; 0 stands for an epoch


_BEFORE = {"search.head": "ntk"}  # key -> what releases without the key did, where its default is another


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield ``key: old -> new`` for every leaf that differs between two plain configs.

    A field that the old config lacks was added by a later release. It is passed over, unless earlier releases did
    something else than its present default. In a dictionary with free keys a missing key counts.
    """
    for key in sorted(old.keys() | new.keys()):
        if key not in old and not _OPEN.match(prefix):
            before = _BEFORE.get(f"{prefix}{key}", new[key])
            if before != new[key]:
                yield f"{prefix}{key}: {before!r} -> {new[key]!r}"
            continue
        a, b = (
            values.get(key, {} if isinstance(other.get(key), dict) else _UNSET)
            for values, other in ((old, new), (new, old))
        )
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif _names(a) and _names(a) == _names(b):
            for one, other in zip(a, b, strict=True):
                yield from differences(one, other, f"{prefix}{key}.{one['name']}.")
        elif a != b:
            yield f"{prefix}{key}: {a!r} -> {b!r}"


class _Unset:
    def __repr__(self) -> str:
        return "not set"


_UNSET = _Unset()


def _names(value: Any) -> list[str]:
    """The names in a list of named entries, such as data.sources; empty for any other value."""
    named = isinstance(value, list) and all(isinstance(one, dict) and "name" in one for one in value)
    return [one["name"] for one in value] if named else []


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(full.key, value)`` for every leaf of a plain config."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
