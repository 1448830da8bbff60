"""Changes of a config that lower the memory of a GPU, and those under which a training fits.

Choice: every change is estimated by the formulas of ``memory`` before a verb names the change. Single changes come
first. Only where none is enough, changes are joined, as few as possible. Cost: some thousand estimates, about a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations, permutations
from typing import Any

from lr2train.config import Config, UserError, as_typed, refuse_together
from lr2train.planning import memory
from lr2train.planning.counts import ModelCounts
from lr2train.planning.memory import GIB, MemorySetting
from lr2train.planning.workload import refuse_mesh, refuse_training, workload_of
from lr2train.training.deepspeed.start import accumulation_of

_TILE_TOKENS = 4096
_BUCKET, _SMALL_BUCKET = "engine.deepspeed.zero_optimization.reduce_bucket_size", 50_000_000  # parameters
_MOST_DOUBLINGS = 3  # of sp and of GPUs


@dataclass(frozen=True)
class Change:
    """Other values of config keys.

    Attributes:
        keys: dotted key -> value.
        text: as the command line takes it.
    """

    keys: dict[str, Any]
    text: str

    def of(self, config: Config) -> Config:
        """The config with these values."""
        for key, value in self.keys.items():
            config = _with(config, key.split("."), value)
        return config


@dataclass(frozen=True)
class Remedy:
    """Changes with the GPU memory that a training then takes.

    Attributes:
        settings: as the command line takes them.
        total_gib: of one GPU, without the reserve.
        host_gib_per_node: host memory for what is offloaded.
    """

    settings: str
    total_gib: float
    host_gib_per_node: float


def settings(config: Config) -> list[Change]:
    """Single settings that trade memory for time, or time for memory: what ``rehearse`` compares."""
    engine, sp = config.engine, config.parallel.sp
    gpus, length = config.hardware.gpus, config.data.segment_tokens
    sizes = [size for size in (sp // 2, 2 * sp) if size and gpus % size == 0 and length % size == 0]
    tile = min(_TILE_TOKENS, length // sp // 4)
    ways = ("keep_attention", "layer") if engine.offload_inputs else ("none", "keep_attention", "layer")
    return [
        *(_change("parallel.sp", size) for size in sizes),
        *(_change("engine.recompute", way) for way in ways if way != engine.recompute),
        _change("engine.loss_chunk_tokens", max(1, engine.loss_chunk_tokens // 4)),
        *([_change("engine.tile_mlp", 0 if engine.tile_mlp else tile)] if engine.tile_mlp or tile else []),
        *([_change("engine.reduce_dtype", "bfloat16")] if engine.reduce_dtype != "bfloat16" else []),
        *([_change(_BUCKET, _SMALL_BUCKET)] if MemorySetting.of(config).bucket_parameters > _SMALL_BUCKET else []),
    ]


def remedies(config: Config, counts: ModelCounts, hf_config: Any) -> tuple[list[Remedy], Remedy | None]:
    """What makes a training fit its GPU.

    Args:
        config: as given; ``engine.recompute=auto`` is chosen anew under each change.
        counts: of the model.
        hf_config: the transformers config.

    Returns:
        The smallest sets of changes that fit: single ones, else pairs, and so on, in the order of the changes. And,
        where nothing fits, the set that comes closest; else None.
    """
    changes = _lowering(config)
    limit, closest = (1 - memory.RESERVE) * config.hardware.gpu_memory_gib, None
    for size in range(1, len(changes) + 1):
        fitting: dict[frozenset[str], Remedy] = {}  # by key: the first value that fits is the smallest
        for one in filter(_apart, combinations(changes, size)):
            keys = frozenset(key for change in one for key in change.keys)
            if keys in fitting:
                continue
            changed = reduce(lambda so_far, change: change.of(so_far), one, config)
            found = Remedy(" ".join(change.text for change in one), *_sizes_gib(changed, counts))
            if found.total_gib > limit and closest is not None and found.total_gib >= closest.total_gib:
                continue
            if not _accepted(changed, counts, hf_config):
                continue
            if found.total_gib <= limit:
                fitting[keys] = found
            else:
                closest = found
        if fitting:
            return list(fitting.values()), None
    return [], closest


def _lowering(config: Config) -> list[Change]:
    """Changes that can lower memory: settings first, which cost time, then ranks of a segment, then GPUs."""
    engine, sp, gpus = config.engine, config.parallel.sp, config.hardware.gpus
    doubled = [2**n for n in range(1, _MOST_DOUBLINGS + 1)]
    offloads = MemorySetting.of(config).offload_optimizer
    return [
        *(one for one in settings(config) if "parallel.sp" not in one.keys and one.text != "engine.tile_mlp=0"),
        *([] if engine.offload_inputs else [_change("engine.offload_inputs", True)]),
        *(_change("engine.zero_stage", stage) for stage in range(engine.zero_stage + 1, 4)),
        *([] if offloads else [_change("engine.deepspeed.zero_optimization.offload_optimizer.device", "cpu")]),
        *(_change("parallel.sp", sp * times) for times in doubled),
        *(_change("hardware.gpus", gpus * times) for times in doubled),
    ]


def _apart(changes: Sequence[Change]) -> bool:
    """Whether no two changes write the same key, or one a part of what another writes."""
    keys = [key for change in changes for key in change.keys]
    return not any(f"{one}.".startswith(f"{other}.") for one, other in permutations(keys, 2))


def _accepted(config: Config, counts: ModelCounts, hf_config: Any) -> bool:
    """Whether training takes these values together."""
    try:
        refuse_together(config, "plan")
        refuse_mesh(config)
        dp_size = config.hardware.gpus // config.parallel.sp
        accumulation_of(config, dp_size)
        refuse_training(config, hf_config, workload_of(config, counts.window_tokens, dp_size))
    except UserError:
        return False
    return True


def _sizes_gib(config: Config, counts: ModelCounts) -> tuple[float, float]:
    """(of one GPU, of the host memory of a node)."""
    setting = MemorySetting.of(config)
    if setting.recompute == "auto":
        chosen, _ = memory.choose_recompute(counts, setting, config.hardware.gpu_memory_gib)
        setting = replace(setting, recompute=chosen)
    items = memory.training_items(counts, setting)
    return memory.gpu_bytes(items) / GIB, memory.host_gib_per_node(items, config.hardware)


def _change(key: str, value: Any) -> Change:
    return Change({key: value}, f"{key}={as_typed(value)}")


def _with(node: Any, path: list[str], value: Any) -> Any:
    """A dataclass or dictionary with another value at a path of names."""
    name, *below = path
    inside = node.get(name, {}) if isinstance(node, dict) else getattr(node, name)
    value = _with(inside, below, value) if below else value
    return {**node, name: value} if isinstance(node, dict) else replace(node, **{name: value})
