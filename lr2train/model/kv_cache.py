"""Keys and values of several texts that decode together, in buffers that are allocated once.

Choice: the texts lie right-aligned: their prompts end at the same column, and each new token of all texts has one
column. So a step writes one slice a layer. Joining tensors instead, as transformers' ``DynamicCache`` does, copies the
whole cache for every token: 16 GiB for one text of 128k tokens of Llama-3-8B. Cost: the room for ``max_new_tokens`` is
taken at the start, and each text has the room of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

Buffers = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, new keys, new values) -> buffers of the layer, each [B, Hkv, columns, D]."""


class KeysAndValues:
    """The buffers of all texts and layers.

    The last token of a prompt is computed with the first step, so ``max(lengths) - 1`` columns hold prompts.

    Args:
        lengths: tokens of each prompt.
        n_new: most new tokens of a text.
    """

    def __init__(self, lengths: Sequence[int], n_new: int):
        self.first = [max(lengths) - length for length in lengths]  # column of each text's first token
        self._before = max(lengths) - 1
        self._width = max(lengths) - 1 + n_new
        self._layers: list[tuple[Tensor, Tensor]] = []

    def of_text(self, text: int) -> Cache:
        """An empty cache of one text, for its prefill; what the buffers held of the text is written over."""
        first = self.first[text]

        def part(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            of_all = self._buffers(layer, keys, values)
            return of_all[0][text : text + 1, :, first:], of_all[1][text : text + 1, :, first:]

        return _Cache(part)

    def of_all(self, step: int) -> Cache:
        """The cache of all texts before their tokens of step 0, 1, … are computed."""
        return _Cache(self._buffers, len(self._layers), self._before + step)

    def mask(self, step: int, device: torch.device) -> Tensor | None:
        """bool [B, columns]: columns that hold a token of the text; None where all texts are equally long."""
        if len(set(self.first)) == 1:
            return None
        columns = torch.arange(self._before + step + 1, device=device)
        return columns[None] >= torch.tensor(self.first, device=device)[:, None]

    def _buffers(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a layer; allocated at its first use, and zero: a masked nan would still be a nan."""
        if layer == len(self._layers):
            room = [new.new_zeros(len(self.first), new.shape[1], self._width, new.shape[3]) for new in (keys, values)]
            self._layers.append((room[0], room[1]))
        return self._layers[layer]


class _Cache(Cache):
    """transformers' cache over our buffers: a layer is made when the model first updates it.

    Args:
        buffers: of a layer.
        known: layers that hold tokens already.
        n_tokens: columns that each of these layers holds.
    """

    def __init__(self, buffers: Buffers, known: int = 0, n_tokens: int = 0):
        super().__init__(layers=[_Layer(n_tokens) for _ in range(known)])
        self._buffers = buffers

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Append [B, Hkv, t, D] to a layer; returns all keys and values so far."""
        while len(self.layers) <= layer_idx:
            self.layers.append(_Layer(0))
        layer: Any = self.layers[layer_idx]
        return layer.append(self._buffers(layer_idx, key_states, value_states), key_states, value_states)


class _Layer(DynamicLayer):
    """The number of columns of one layer that hold tokens."""

    def __init__(self, n_tokens: int):
        super().__init__()
        self._n_tokens = n_tokens

    def append(self, buffers: tuple[Tensor, Tensor], *new: Tensor) -> tuple[Tensor, Tensor]:
        start, self._n_tokens = self._n_tokens, self._n_tokens + new[0].shape[2]
        for held, added in zip(buffers, new, strict=True):
            held[:, :, start : self._n_tokens] = added
        return buffers[0][:, :, : self._n_tokens], buffers[1][:, :, : self._n_tokens]

    def get_seq_length(self) -> int:
        return self._n_tokens
