"""A model for scoring whose weights are divided over all ranks (ZeRO-3): for a model that does not fit on one device.

Choice: DeepSpeed's parameter hooks gather a decoder layer when it is called and release it afterwards. There is no
optimizer and no gradient. Cost: every rank has to call the same layers in the same order, so ranks wait for the longest
document.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from lr2train.config import ModelConfig
from lr2train.model import load
from lr2train.training.deepspeed.start import dtype_sections, gathered, merged, quiet, start_deepspeed, zero_init


def load_sharded(
    model_config: ModelConfig, device: torch.device, deepspeed_config: Mapping[str, Any] | None = None
) -> Any:
    """Load a model for scoring with its weights divided over all ranks. Starts DeepSpeed. A collective.

    Every rank has to make the same calls in the same order. Documents and RoPE factors may differ by rank: the tables
    of a rotary module are no parameters. No rank holds more than its share, a few layers and ``load.GROUP_BYTES``.

    Args:
        model_config: ``path`` names a folder of safetensors.
        device: of this rank.
        deepspeed_config: ``engine.deepspeed``, merged over our own settings.

    Returns:
        A Hugging Face causal LM in eval mode, without gradients. The base model and the output embeddings are called as
            with ``load.load_whole``.

    Raises:
        UserError: the folder is missing, or does not hold the weights of this model.
    """
    start_deepspeed(device)
    hf_config = load.config_of(model_config)
    ds_config = scoring_config(model_config.dtype, deepspeed_config)
    weights, ranks = load.safetensors_of(load.folder_of(model_config)), dist.get_world_size()
    model = load.assembled(
        hf_config, model_config.dtype, weights, lambda: zero_init(ds_config, ranks), gathered(modifier_rank=0)
    )
    gather_in_forward(model.eval().requires_grad_(False), ds_config)
    return model


def scoring_config(dtype: str, over: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """DeepSpeed's config of a model for scoring; ``over`` is merged over it."""
    written = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "steps_per_print": 10**12,
        **dtype_sections(dtype)
    }  # fmt: skip
    return merged(written, dict(over or {}))


def gather_in_forward(model: Any, ds_config: dict[str, Any]) -> None:
    """Have DeepSpeed gather weights around forward calls. A decoder layer is one unit: gathered once, whatever parts
    are called inside.

    DeepSpeed counts passes by calls of the whole model. Scoring calls the base model and the head, so a pass begins
    with the base model.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, sorted({type(layer) for layer in model.base_model.layers}, key=repr))
    with quiet():
        engine: Any = deepspeed.initialize(model=model, config=ds_config, dist_init_required=False)[0]

    def begin_pass(*_: Any) -> None:
        # The closure also keeps the engine alive, and with it the hooks.
        engine.optimizer.get_param_coordinator().reset_step()

    model.base_model.register_forward_pre_hook(begin_pass, prepend=True)
