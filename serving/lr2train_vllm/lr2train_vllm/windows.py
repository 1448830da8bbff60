"""Pure parts: which folder has two tables, which table a request gets, how its prefix-cache salt is written.

Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SCHEDULER = "lr2train_vllm.scheduler.TwoTablesScheduler"
EXTENSION = "lr2train_vllm.workers.NeedsPlugin"
_SHORT, _LONG = "lr2train:short:", "lr2train:long:"


def original_window(rope: Any) -> int | None:
    """L0 in tokens of a folder with two tables; None for every other model.

    Two tables: type ``longrope``, with the attention factors of both windows written out. Published ``longrope`` models
    without these keys stay as vLLM serves them.

    Args:
        rope: ``rope_parameters`` of a config, as vLLM reads them.
    """
    keys = ("short_factor", "long_factor", "short_mscale", "long_mscale", "original_max_position_embeddings")
    if not isinstance(rope, Mapping) or rope.get("rope_type") != "longrope" or any(not rope.get(key) for key in keys):
        return None
    same = rope["short_factor"] == rope["long_factor"] and rope["short_mscale"] == rope["long_mscale"]
    return None if same else int(rope["original_max_position_embeddings"])


def short_frequencies(rope: Any) -> Sequence[float] | None:
    """The frequencies of the short table, where the folder writes them out: D numbers, radians per token.

    A base that was extended already has a table of its own, which no ``short_factor`` gives bit for bit.

    Args:
        rope: as in ``original_window``.
    """
    return rope.get("short_inv_freq") if original_window(rope) is not None else None


def original_window_of(config: Any) -> int | None:
    """``original_window`` of the model that a VllmConfig serves."""
    model = getattr(config, "model_config", None)
    return None if model is None else original_window(getattr(model.hf_text_config, "rope_parameters", None))


def switching_layer_type(config: Any) -> str | None:
    """The layer type with two tables, of a model with a RoPE for each layer type and a window beyond L0; else None.

    Args:
        config: a complete VllmConfig.
    """
    model = getattr(config, "model_config", None)
    rope = None if model is None else getattr(model.hf_text_config, "rope_parameters", None)
    for name, own in (rope or {}).items():
        original = original_window(own)
        if model is not None and original is not None and model.max_model_len > original:
            return name
    return None


def longest_of(config: Any) -> int:
    """The tokens for which vLLM makes RoPE tables."""
    return int(config.model_config.hf_text_config.max_position_embeddings)


def switch_of(config: Any) -> int | None:
    """L0 where a server crosses it: its folder has two tables, and its window is longer; else None.

    Args:
        config: a VllmConfig.
    """
    original = original_window_of(config)
    return original if original is not None and config.model_config.max_model_len > original else None


def row_offsets(lengths: Sequence[int], n_scheduled: np.ndarray, original: int) -> np.ndarray:
    """The offset into [short rows | long rows] of each token of a step: int64 [sum of n_scheduled].

    Args:
        lengths: all tokens of each request that are known, whatever part of them this step computes.
        n_scheduled: tokens of each request in this step.
        original: L0.
    """
    offsets = np.where(np.asarray(lengths, dtype=np.int64) > original, original, 0)
    return np.repeat(offsets.astype(np.int64), n_scheduled)


def salted(salt: str | None, long: bool) -> str:
    """The prefix-cache salt of a request under one table; ``salt`` is the user's own, or one that this made.

    Both tables have a prefix, so that no salt of a user reads as one of ours.
    """
    return f"{_LONG if long else _SHORT}{salt or ''}"


def lengthened(salt: str) -> str:
    """The salt of the long table for a request whose salt is that of the short one."""
    return salted(salt.removeprefix(_SHORT), long=True)


def is_long(salt: str | None) -> bool:
    """Whether a salt of ``salted`` is that of the long table."""
    return (salt or "").startswith(_LONG)
