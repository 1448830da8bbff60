"""A model for forward passes alone whose weights are divided over all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from lr2train.config import ModelConfig
from lr2train.model import load
from lr2train.training.deepspeed.start import dtype_sections, gathered, merged, quiet, start_deepspeed, zero_init


def load_sharded(model_config: ModelConfig, device: torch.device, deepspeed_config: Mapping[str, Any] | None = None) -> Any:
    """A model for scoring whose weights are divided over all ranks (ZeRO-3); for one that does not fit a device.

    Returns a Hugging Face causal LM in eval mode, without gradients. Its base model and its output embeddings are called as those of
    ``load.load_whole``; a decoder layer's weights are gathered when it is called and let go after it. Every rank has to make the same
    calls in the same order, each with a document and factors of its own: the tables of a rotary module are no parameters. No rank ever
    holds more than its share, some layers and ``load.GROUP_BYTES``. A collective; starts DeepSpeed.

    Args:
        model_config: ``path`` names a folder of safetensors.
        device: of this rank.
        deepspeed_config: merged over ours; ``engine.deepspeed``.

    Raises:
        UserError: the folder is missing, or does not hold this model's weights.
    """
    start_deepspeed(device)
    hf_config = load.config_of(model_config)
    written = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "steps_per_print": 10**12, **dtype_sections(model_config.dtype)
    }  # fmt: skip
    ds_config = merged(written, dict(deepspeed_config or {}))
    weights, ranks = load.safetensors_of(load.folder_of(model_config)), dist.get_world_size()
    model = load.assembled(hf_config, model_config.dtype, weights, lambda: zero_init(ds_config, ranks), gathered(modifier_rank=0))
    _gather_in_forward(model.eval().requires_grad_(False), ds_config)
    return model


def _gather_in_forward(model: Any, ds_config: dict[str, Any]) -> None:
    """Have DeepSpeed gather weights around forward calls: those of a decoder layer together, once, however often its parts are called.

    DeepSpeed counts its passes by calls of the whole model; ours call the base model and the head, so a pass begins with the base model.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, sorted({type(layer) for layer in model.base_model.layers}, key=repr))
    with quiet():
        engine: Any = deepspeed.initialize(model=model, config=ds_config, dist_init_required=False)[0]

    def begin_pass(*_: Any) -> None:
        engine.optimizer.get_param_coordinator().reset_step()  # this function also keeps the engine, whose end would take the hooks away

    model.base_model.register_forward_pre_hook(begin_pass, prepend=True)
