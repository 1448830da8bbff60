"""What a layer keeps for its backward pass, where it keeps it, and what the backward pass computes again.

Choice: transformers' own activation checkpointing of whole decoder layers, with attention's result kept on request
(``attention.recompute``), what is kept in host memory on request (``host_copies``), and the MLP in tiles on request
(``tiled_mlp``). So model code stays untouched, and a family that transformers can checkpoint is served. Cost: the
granularity is a layer; nothing finer is kept but attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lr2train.attention.recompute import contexts
from lr2train.config import EngineConfig
from lr2train.model import tiled_mlp
from lr2train.model.host_copies import HostCopies


def install(lm: Any, engine: EngineConfig) -> list[nn.Module]:
    """Make a transformers model keep of each decoder layer what ``engine.recompute``, ``engine.recompute_layers``,
    ``engine.offload_inputs`` and ``engine.tile_mlp`` say.

    ``engine.recompute=auto`` is for the caller to decide; here it acts as ``keep_attention``.

    Returns:
        The modules that need all their weights at once while they are called.

    Raises:
        UserError: the layers have no MLP that can be tiled.
    """
    if engine.recompute != "none":
        _recompute(lm, engine.recompute != "layer", engine.offload_inputs)
        layers = getattr(lm.base_model, "layers", ())
        for layer in layers[engine.recompute_layers or len(layers) :]:
            layer.gradient_checkpointing = False
    return tiled_mlp.install(lm, engine.tile_mlp) if engine.tile_mlp else []


def _recompute(lm: Any, attention: bool, offload: bool) -> None:
    kept = {"context_fn": contexts} if attention else {}
    lm.activation_checkpointing_enable({"use_reentrant": False, **kept})
    if offload:
        offloaded = _Offloaded(HostCopies(), attention)
        for module in lm.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = offloaded


@dataclass(frozen=True)
class _Offloaded:
    """As ``torch.utils.checkpoint``; what it keeps lies in host memory."""

    copies: HostCopies
    attention: bool  # whether attention's result is kept

    def __call__(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        """One pass over a layer, with its inputs."""
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        copies = self.copies.layer(tensors[0].device)
        kept: dict[str, Any] = {"context_fn": partial(contexts, copies)} if self.attention else {}
        with saved_tensors_hooks(copies.keep, copies.take):  # of the inputs alone: checkpoint has hooks of its own
            return checkpoint(layer, *inputs, use_reentrant=False, **kept)
