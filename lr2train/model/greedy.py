"""Greedy continuation of several prompts together, under the RoPE table of one window.

Choice: every prompt is prefilled alone, in chunks, and all rows decode together. So a prefill has no padding and needs
no mask where the prompt is one chunk, and a decoding step reads the weights once for all rows. The keys and values of
the rows lie right-aligned in one buffer that is allocated once: joining tensors would copy a cache of 16 GiB
(Llama-3-8B at 128k) for every token. Cost: a row that has ended is computed on until the last row has ended.

Under ZeRO-3 every rank has to make the same calls. ``Lockstep`` pads the calls of a rank that has fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lr2train.model.rotary import WindowRotary

CHUNK_TOKENS = 8192  # of a prefill: on the MLP of Llama-3-8B a chunk peaks at about 0.5 GiB


@dataclass(frozen=True)
class Lockstep:
    """How ranks that divide one model agree on their calls.

    Attributes:
        most: every rank's number -> the largest of all ranks. A collective.
    """

    most: Callable[[int], int]


ALONE = Lockstep(lambda mine: mine)


@dataclass(frozen=True)
class Continuation:
    """What was generated for one prompt.

    Attributes:
        tokens: new ids; a stop id at the end is left out.
        finite: whether all logits were finite; the first that were not end the row.
    """

    tokens: list[int]
    finite: bool = True


@torch.inference_mode()
def continue_prompts(
    model: Any,
    rotary: WindowRotary,
    window: str,
    prompts: Sequence[Tensor],
    max_new_tokens: Sequence[int],
    stop_ids: Collection[int] = (),
    ended: Callable[[int, list[int]], bool] = lambda row, tokens: False,
    chunk_tokens: int = 0,
    lockstep: Lockstep = ALONE,
) -> list[Continuation]:
    """The most likely tokens after each prompt.

    Args:
        model: a Hugging Face causal LM whose rotary module is ``rotary``.
        window: "short" | "long", for all rows and throughout.
        prompts: int64 [n_i] each, at least one token.
        max_new_tokens: most new tokens of each row.
        stop_ids: ids that end a row.
        ended: (row, new ids) -> whether the row ends here.
        chunk_tokens: of a prefill; 0: ``CHUNK_TOKENS``.
        lockstep: of the ranks that divide the model.
    """
    rotary.window = window
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    held = _KeysAndValues(lengths, max(max_new_tokens))
    steps = [part for row, prompt in enumerate(prompts) for part in _chunks(row, prompt, chunk_tokens or CHUNK_TOKENS)]
    last: dict[int, Tensor] = {}
    for number in range(lockstep.most(len(steps))):
        if number >= len(steps):
            _idle(model, prompts[0])
            continue
        row, start, ids = steps[number]
        positions = torch.arange(start, start + len(ids), device=device)[None]
        last[row] = _hidden(model, ids.to(device)[None], positions, held.of_row(row))[0, -1]
    head = model.get_output_embeddings()
    rows = _Rows(lengths, max_new_tokens, stop_ids, ended)
    rows.take(head(torch.stack([last[row] for row in range(len(prompts))])))
    while lockstep.most(int(rows.going)):
        if not rows.going:
            head(_idle(model, prompts[0]))
            continue
        positions = torch.tensor([[length + rows.n_steps - 1] for length in lengths], device=device)
        mask = held.mask(rows.n_steps, device)
        rows.take(head(_hidden(model, rows.newest(device), positions, held.of_all(rows.n_steps), mask)[:, -1]))
    return rows.results()


def _chunks(row: int, prompt: Tensor, size: int) -> list[tuple[int, int, Tensor]]:
    """(row, first position, ids) of each chunk of a prompt."""
    return [(row, start, prompt[start : start + size]) for start in range(0, len(prompt), size)]


def _hidden(model: Any, ids: Tensor, positions: Tensor, cache: Cache | None, mask: Tensor | None = None) -> Tensor:
    """Last hidden states [B, T, H] of ids [B, T]; the cache takes their keys and values."""
    return model.base_model(
        input_ids=ids,
        position_ids=positions,
        past_key_values=cache,
        attention_mask=mask,
        use_cache=cache is not None,
    ).last_hidden_state


def _idle(model: Any, prompt: Tensor) -> Tensor:
    """One token's pass, for its collectives: another rank still works."""
    device = next(model.parameters()).device
    return _hidden(model, prompt[:1].to(device)[None], torch.zeros(1, 1, dtype=torch.int64, device=device), None)


class _Rows:
    """The new tokens of all rows, and which rows go on."""

    def __init__(
        self,
        lengths: Sequence[int],
        most: Sequence[int],
        stop_ids: Collection[int],
        ended: Callable[[int, list[int]], bool],
    ):
        self._most, self._stop_ids, self._ended = most, set(stop_ids), ended
        self._tokens: list[list[int]] = [[] for _ in lengths]
        self._finite, self._open = [True] * len(lengths), [True] * len(lengths)
        self._newest = [0] * len(lengths)
        self.n_steps = 0

    @property
    def going(self) -> bool:
        """Whether a row wants another token."""
        return any(self._open)

    def newest(self, device: torch.device) -> Tensor:
        """int64 [B, 1]: the last token of each row."""
        return torch.tensor(self._newest, device=device)[:, None]

    def take(self, logits: Tensor) -> None:
        """Choose the next token of every row from logits [B, V]."""
        best, chosen = logits.max(-1)
        finite = torch.isfinite(best).tolist()  # max returns nan where any logit is nan
        self._newest = chosen.tolist()
        self.n_steps += 1
        for row, token in enumerate(self._newest):
            if self._open[row]:
                self._take(row, token, finite[row])

    def _take(self, row: int, token: int, finite: bool) -> None:
        if not finite:
            self._finite[row] = self._open[row] = False
        elif token in self._stop_ids:
            self._open[row] = False
        else:
            tokens = self._tokens[row]
            tokens.append(token)
            self._open[row] = len(tokens) < self._most[row] and not self._ended(row, tokens)

    def results(self) -> list[Continuation]:
        return [Continuation(tokens, finite) for tokens, finite in zip(self._tokens, self._finite, strict=True)]


class _KeysAndValues:
    """Keys and values of all rows and layers, right-aligned: prompts end at the same column, new tokens follow.

    Args:
        lengths: tokens of each prompt.
        n_new: room for new tokens.
    """

    def __init__(self, lengths: Sequence[int], n_new: int):
        self._lengths, self._prompt, self._width = lengths, max(lengths), max(lengths) + n_new
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._of_row: dict[int, _Cache] = {}
        self._of_all: _Cache | None = None

    def of_row(self, row: int) -> _Cache:
        """The cache in which one prompt is prefilled."""
        if row not in self._of_row:
            first = self._prompt - self._lengths[row]
            self._of_row[row] = _Cache(lambda layer, key: self._part(layer, key, row, first))
        return self._of_row[row]

    def of_all(self, step: int) -> _Cache:
        """The cache of all rows; ``step`` new tokens of each are known, and the last of these is computed next."""
        if self._of_all is None:
            self._of_all = _Cache(lambda layer, key: self._layers[layer], [self._prompt] * len(self._layers))
            for layer, (keys, values) in enumerate(self._layers):
                self._of_all.layers[layer].hold(keys, values)  # type: ignore[attr-defined]
        return self._of_all.until(self._prompt + step - 1)

    def mask(self, step: int, device: torch.device) -> Tensor | None:
        """bool [B, columns]: columns that hold a token of the row; None where no row is shorter than another."""
        if len(set(self._lengths)) == 1:
            return None
        columns = torch.arange(self._prompt + step, device=device)
        first = torch.tensor([self._prompt - length for length in self._lengths], device=device)
        return columns[None] >= first[:, None]

    def _part(self, layer: int, key: Tensor, row: int, first: int) -> tuple[Tensor, Tensor]:
        """The room of one row in a layer; the layer's buffers are allocated when the first row needs them."""
        if layer == len(self._layers):
            shape = (len(self._lengths), key.shape[1], self._width, key.shape[3])
            self._layers.append((key.new_zeros(shape), key.new_zeros(shape)))
        keys, values = self._layers[layer]
        return keys[row : row + 1, :, first:], values[row : row + 1, :, first:]


class _Layer(DynamicLayer):
    """Keys and values of one layer in buffers that others allocated."""

    def __init__(self, buffers: Callable[[Tensor], tuple[Tensor, Tensor]]):
        super().__init__()
        self._buffers, self._n_tokens = buffers, 0
        self._held: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._held = self._buffers(key_states)
        self.is_initialized = True

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Take buffers that hold tokens already; ``until`` says how many."""
        self.dtype, self.device = keys.dtype, keys.device
        self._held = keys, values
        self.is_initialized = True

    def until(self, n_tokens: int) -> None:
        """The first ``n_tokens`` columns hold tokens."""
        assert self._held is not None
        self._n_tokens = n_tokens
        self.keys, self.values = (held[:, :, :n_tokens] for held in self._held)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append [B, Hkv, t, D]; returns all so far."""
        if self._held is None:
            self.lazy_initialization(key_states, value_states)
        assert self._held is not None
        stop = self._n_tokens + key_states.shape[2]
        for held, new in zip(self._held, (key_states, value_states), strict=True):
            held[:, :, self._n_tokens : stop] = new
        self.until(stop)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._n_tokens


class _Cache(Cache):
    """transformers' cache over our buffers: layers are made when a model first updates them."""

    def __init__(self, buffers: Callable[[int, Tensor], tuple[Tensor, Tensor]], known: Sequence[int] = ()):
        super().__init__(layers=[])
        self._buffers = buffers
        for _ in known:
            self._add()

    def _add(self) -> None:
        layer = len(self.layers)
        self.layers.append(_Layer(lambda key: self._buffers(layer, key)))

    def until(self, n_tokens: int) -> _Cache:
        """Every layer holds ``n_tokens`` columns."""
        for layer in self.layers:
            layer.until(n_tokens)  # type: ignore[attr-defined]
        return self

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        while len(self.layers) <= layer_idx:
            self._add()
        return self.layers[layer_idx].update(key_states, value_states)  # type: ignore[union-attr]
