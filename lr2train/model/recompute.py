"""What a layer keeps for its backward pass, and what the backward pass computes again.

Choice: transformers' own activation checkpointing of whole decoder layers, with attention's result kept on request
(``attention.recompute``). So model code stays untouched, and a family that transformers can checkpoint is served. Cost:
the granularity is a layer; nothing finer is kept but attention.
"""

from __future__ import annotations

from typing import Any

from lr2train.attention.recompute import contexts


def install(lm: Any, recompute: str) -> None:
    """Make the decoder layers of a transformers model be recomputed in the backward pass.

    Args:
        lm: the model.
        recompute: ``engine.recompute``. ``auto`` is for the caller to decide; here it acts as ``keep_attention``.
    """
    if recompute == "none":
        return
    kept = {} if recompute == "layer" else {"context_fn": contexts}
    lm.activation_checkpointing_enable({"use_reentrant": False, **kept})
