"""The loss of chosen tokens of one document, and its slopes: derivatives in the long window's RoPE table.

cos and sin are smooth in every rescale factor and in the attention factor, so one backward pass has the derivatives in
all of them.

Choice: the forward pass is that of training (``attention.hf``), whose kernels have a backward pass at any length. The
weights get no gradients. With ``recompute`` a layer keeps its input alone, and the backward pass computes the layer
again. Cost: a forward and a backward pass are about three forward passes, four with ``recompute``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lr2train.attention import hf
from lr2train.model.rotary import RopeTable, WindowRotary
from lr2train.model.score import predicted, scored_positions
from lr2train.parallel.mesh import Mesh


@dataclass(frozen=True)
class Slopes:
    """Loss and slopes on one document.

    Attributes:
        nlls: negative log-likelihood of each span, summed over its tokens, nats.
        log_rescale: float64 [D], derivative of their sum in the logarithm of each rescale factor, nats.
        attention_factor: derivative of their sum in the attention factor, nats.
    """

    nlls: tuple[float, ...]
    log_rescale: np.ndarray
    attention_factor: float


class SlopeModel:
    """Computes slopes with a model that also scores: between calls the model is as it was.

    Args:
        model: a Hugging Face causal LM in eval mode whose rotary module is ``rotary``; its weights need no gradients
            from here on.
        rotary: holds the long window's table.
        recompute: whether the backward pass computes each layer again.

    Raises:
        UserError: the model's attention cannot be expressed by ours.
    """

    def __init__(self, model: Any, rotary: WindowRotary, recompute: bool = False):
        self._model, self._rotary, self._recompute = model.requires_grad_(False), rotary, recompute
        before = model.config.get_text_config()._attn_implementation
        self._attention = hf.install(model, Mesh(), "local")
        model.set_attn_implementation(before)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def __call__(self, tokens: np.ndarray, spans: Sequence[tuple[int, int]]) -> Slopes:
        """The slopes on a document under the long table in force.

        Args:
            tokens: ids [T].
            spans: half-open token ranges, in order; no span starts at 0, as the first token has no context.

        Raises:
            UserError: the spans hold no token.
        """
        device = next(self._model.parameters()).device
        positions = scored_positions(spans)
        ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))[: max(positions) + 2].to(device)
        rows = torch.tensor(positions, device=device)
        before = self._rotary.tables["long"]
        inv_freq = before.inv_freq.to(device).clone().requires_grad_()
        factor = torch.tensor(before.attention_factor, dtype=torch.float32, device=device, requires_grad=True)
        self._rotary.window, self._rotary.tables["long"] = "long", RopeTable(inv_freq, factor)
        try:
            with torch.enable_grad(), self._differentiable():
                segment = self._attention.segment(((0, len(ids) - 1),), len(ids) - 1)
                hidden = self._model.base_model(
                    input_ids=ids[None, :-1],
                    position_ids=segment.positions(device)[None],
                    segment_attention=segment,
                    use_cache=False,
                ).last_hidden_state[0]
                losses, _ = predicted(self._model, hidden[rows], ids[rows + 1])
                slope, factor_slope = torch.autograd.grad(losses.double().sum(), (inv_freq, factor))
        finally:
            self._rotary.tables["long"] = before
        ends = np.cumsum([stop - start for start, stop in spans])[:-1]
        parts = np.split(losses.detach().double().cpu().numpy(), ends)
        # d / d log(lambda) = -inv_freq d / d inv_freq, because inv_freq is proportional to 1 / lambda.
        return Slopes(
            tuple(math.fsum(part) for part in parts),
            -(inv_freq.detach().double() * slope.double()).cpu().numpy(),
            float(factor_slope),
        )

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        """Our attention inside. transformers recomputes layers in training mode; their parts stay in eval mode, so
        dropout stays off.
        """
        config = self._model.config.get_text_config()
        layers = self._model.base_model.layers if self._recompute else ()
        before, config._attn_implementation = config._attn_implementation, hf.NAME
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            config._attn_implementation = before
            for layer in layers:
                layer.training = False
