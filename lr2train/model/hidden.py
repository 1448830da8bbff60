"""Last hidden states at chosen positions of one document, without the work that only other positions need.

Choice: three savings, none of which changes a number beyond rounding. The document ends after the last chosen position,
because attention is causal. In the last layer only the chosen positions attend. With ``chunk_tokens`` every layer runs
over the document in chunks, so only the residual stream (written in place) and the keys and values of *one* layer grow
with the window. In Llama-3-8B's shape and bfloat16 this is 12 KiB a token; a whole pass peaks at about 100 KiB in its
MLP, and a key-value cache of all layers alone would hold 128 KiB. Cost: from the second chunk on, attention reads a
mask, of ``MASK_CELLS`` at a time (a byte each, and two to four more while a kernel runs). No flash kernel of CUDA takes
a mask, so a chunked pass runs there on the slower memory-efficient kernel.

transformers' attention interface is the door, as in ``attention.hf``: during a call the model's config names our
function, which calls transformers' own for all other cases. Decoder layers are found in ``base_model.layers``, where
every decoder of transformers has them. The hidden states go to ``score``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lr2train.config import UserError

NAME = "lr2train_rows"
# Query-key pairs of one mask; a GPU needs many queries at a time to be busy.
MASK_CELLS = {"cpu": 2**21, "cuda": 2**27}
# Only the wanted rows attend where at most one row in FEW is wanted. For more, all rows through the flash kernel are
# cheaper.
FEW = 4

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of transformers: (batch, head, query, key positions), which broadcast -> whether the query sees the key."""


def hidden_rows(model: Any, ids: Tensor, rows: Tensor, chunk_tokens: int = 0) -> Tensor:
    """Hidden states [n, H], after the final norm, at the positions ``rows`` of one document.

    A model whose attention implementation is not ``sdpa`` runs whole and unchanged.

    Args:
        model: a Hugging Face causal LM in eval mode; call in inference mode.
        ids: int64 [T], one document; positions count from 0.
        rows: int64 [n], in any order, at least one.
        chunk_tokens: length of a chunk of one layer's pass; 0: the whole document at once.

    Raises:
        UserError: the model cannot run in chunks.
    """
    ids = ids[: int(rows.max()) + 1]
    in_chunks = 0 < chunk_tokens < len(ids)
    if in_chunks:
        _refuse_chunks(model)
    elif model.config._attn_implementation != "sdpa":
        return model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, rows]
    wanted, of_row = rows.unique(return_inverse=True)
    with ExitStack() as stack:
        stack.enter_context(_our_attention(model.config))
        if in_chunks:
            stack.enter_context(_layers_in_chunks(model.base_model.layers, chunk_tokens, wanted))
        token = _wanted.set(_Rows(wanted, len(model.base_model.layers) - 1))
        stack.callback(_wanted.reset, token)
        hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    return hidden[of_row] if in_chunks else hidden[rows]


@dataclass(frozen=True)
class _Rows:
    """The positions that are wanted of one layer; the layers before it compute all positions."""

    positions: Tensor  # int64, ascending
    layer: int

    def inside(self, start: int, stop: int) -> Tensor:
        """The positions in [start, stop), counted from ``start``."""
        return self.positions[(self.positions >= start) & (self.positions < stop)] - start


# Of the call of ``hidden_rows`` in force. No keyword argument: some families' layers do not hand keyword arguments on.
_wanted: ContextVar[_Rows] = ContextVar("wanted")


# ---- attention ----


@contextmanager
def _our_attention(config: Any) -> Iterator[None]:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, _mask_function)
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _mask_function(
    mask_function: MaskFunction, kv_length: int, local_size: int | None = None, **_: Any
) -> MaskFunction | None:
    """Takes the place of a mask [T, T]: hands the mask function to ``_attention_forward``; None stands for causal."""
    from transformers.masking_utils import causal_mask_function

    plain = mask_function is causal_mask_function or (local_size is not None and kv_length <= local_size)
    return None if plain else mask_function


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskFunction | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention under transformers' interface, for the last q of n tokens; returns [1, q, Hq, D].

    In the last layer the result holds zeros where no row is wanted.

    Args:
        query: [1, Hq, q, D].
        key, value: [1, Hkv, n, D].

    Raises:
        UserError: the model makes a mask of its own.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if isinstance(attention_mask, Tensor):
        raise UserError(
            f"{type(module).__name__} makes an attention mask of its own, which is not computed here; set model.path "
            "to another model"
        )
    n_queries, n_keys = query.shape[2], key.shape[2]
    score_rows = _wanted.get()
    first = n_keys - n_queries  # position of the first query
    rows = score_rows.inside(first, n_keys) if getattr(module, "layer_idx", None) == score_rows.layer else None
    if rows is not None and len(rows) * FEW <= n_queries:
        out = value.new_zeros(1, n_queries, query.shape[1], value.shape[-1])
        if len(rows):
            part = query[:, :, rows]
            out[:, rows] = _attend_rows(part, key, value, rows + first, attention_mask, scaling, kwargs)
        return out, None
    if attention_mask is None and n_queries == n_keys:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)
    positions = torch.arange(first, n_keys, device=query.device)
    return _attend_rows(query, key, value, positions, attention_mask, scaling, kwargs), None


def _attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    mask_function: MaskFunction | None,
    scaling: float | None,
    options: dict[str, Any],
) -> Tensor:
    """Attention of the queries at ``positions`` over the keys of positions 0 … n - 1; returns [1, b, Hq, D].

    Query heads that share a key head are stacked as further queries of this key head, so no key is repeated.

    Args:
        query: [1, Hq, b, D].
        positions: int64 [b], ascending.
    """
    for option in _UNSUPPORTED:
        if options.get(option) is not None:
            refused = f"the model's attention wants {option}, which is not computed here"
            raise UserError(f"{refused}; set model.path to another model")
    groups = query.shape[1] // key.shape[1]
    size = max(1, MASK_CELLS.get(query.device.type, 2**21) // (groups * key.shape[2]))
    parts = []
    for part, at in zip(query.split(size, dim=2), positions.split(size), strict=True):
        stop = int(at[-1]) + 1
        mask = _mask(at, stop, mask_function).repeat(groups, 1)
        packed = part.reshape(1, key.shape[1], -1, part.shape[-1])  # [1, Hkv, groups * b, D]
        keys, values = key[:, :, :stop], value[:, :, :stop]
        out = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scaling)
        parts.append(out.reshape(1, query.shape[1], len(at), -1).transpose(1, 2))
    return torch.cat(parts, dim=1)


def _mask(positions: Tensor, n_keys: int, mask_function: MaskFunction | None) -> Tensor:
    """bool [b, n_keys]: the keys that each query at ``positions`` sees."""
    queries, keys = positions[:, None], torch.arange(n_keys, device=positions.device)[None]
    if mask_function is None:
        return keys <= queries
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=positions.device)
    return mask_function(zero, zero, queries[None, None], keys[None, None]).expand(1, 1, len(positions), n_keys)[0, 0]


# ---- chunks ----


def _refuse_chunks(model: Any) -> None:
    config = model.config
    remedy = "set search.chunk_tokens=0, or choose another model (model.path)"
    if config._attn_implementation != "sdpa":
        found = f"attention implementation {config._attn_implementation}"
        raise UserError(f"{found} does not run in chunks, sdpa does; {remedy}")
    others = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if others or not isinstance(getattr(model.base_model, "layers", None), nn.ModuleList):
        found = f"layers of type {', '.join(sorted(others))}" if others else "no list of decoder layers"
        raise UserError(f"{type(model).__name__} has {found} and does not run in chunks; {remedy}")


@contextmanager
def _layers_in_chunks(layers: nn.ModuleList, chunk_tokens: int, wanted: Tensor) -> Iterator[None]:
    """Run every layer in chunks; the last layer returns the wanted rows alone [1, n, H]."""
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            rows = _Rows(wanted, index) if index == len(layers) - 1 else None
            stack.enter_context(forward_replaced(layer, partial(_in_chunks, layer.forward, chunk_tokens, rows)))
        yield


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A call of ``module`` runs ``forward`` instead of its own, inside the same hooks.

    Under ZeRO-3 these hooks gather the module's weights.
    """
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _in_chunks(
    forward: Callable[..., Any],
    chunk_tokens: int,
    wanted: _Rows | None,
    hidden: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """One decoder layer over ``hidden`` [1, T, H]; its output replaces ``hidden`` chunk by chunk."""
    strange = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
    if strange:
        refused = f"a decoder layer takes {strange[0]}, which is not known to be cut in chunks"
        raise UserError(f"{refused}; set search.chunk_tokens=0")
    kwargs["past_key_values"] = _KeysAndValues(hidden.shape[1])
    kept = []
    for start in range(0, hidden.shape[1], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        angles = tuple(table[:, part] for table in position_embeddings)
        positions = None if position_ids is None else position_ids[:, part]
        out = forward(hidden[:, part], position_embeddings=angles, position_ids=positions, **kwargs)
        if not isinstance(out, Tensor):
            refused = f"a decoder layer returns {type(out).__name__} and not its hidden states"
            raise UserError(f"{refused}; set search.chunk_tokens=0")
        if wanted is None:
            hidden[:, part] = out
        else:
            kept.append(out[:, wanted.inside(start, start + chunk_tokens)])
    return hidden if wanted is None else torch.cat(kept, dim=1)


class _KeysAndValues:
    """Keys and values of one layer so far, in the place of transformers' cache.

    All T tokens are allocated at once: joining chunks would copy all earlier ones each time.
    """

    def __init__(self, n_tokens: int):
        self._n_tokens, self._done = n_tokens, 0
        self._held: tuple[Tensor, ...] = ()

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """Append key and value [1, Hkv, chunk, D]; returns all so far."""
        if not self._held:
            self._held = tuple(x.new_empty(*x.shape[:2], self._n_tokens, x.shape[3]) for x in (key, value))
        start, self._done = self._done, self._done + key.shape[2]
        for held, new in zip(self._held, (key, value), strict=True):
            held[:, :, start : self._done] = new
        return tuple(held[:, :, : self._done] for held in self._held)
