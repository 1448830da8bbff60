"""Generation across the window switch (paper, Section 3.3), of several texts together.

The original RoPE serves up to L0 tokens, prompt and generated tokens together; the rescaled RoPE serves longer texts.

Choice: when a row outgrows L0, its keys and values alone are computed anew under the long table, in place. Rotating the
cached keys anew would be cheaper and inexact: from the second layer on, keys and values depend on hidden states under
the old table (figures: docs/SERVING.md). Rows of both tables decode in one pass, because the rotary module takes a
table for each row; two passes, one a table, would read the weights twice a token and move the keys of a row that
switches. Every prompt is prefilled alone, in chunks, so it has no padding. Cost: one prefill of L0 tokens a row, for
which the other rows wait; a row that has ended is computed on until the last row has ended.

Under ZeRO-3 every rank has to make the same calls. ``Lockstep`` pads the calls of a rank that has fewer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lr2train.config import UserError
from lr2train.model.head import form_of
from lr2train.model.kv_cache import KeysAndValues
from lr2train.model.rotary import WindowRotary

CHUNK_TOKENS = 8192  # of a prefill: on the MLP of Llama-3-8B a chunk peaks at about 0.5 GiB
MASK_CELLS = 2**26  # query-key pairs of a chunk's mask: 512 tokens a chunk at the end of 128k, and at most 0.25 GiB

Window = Callable[[int], str]
"""Tokens of a text so far, prompt and new ones -> the table that serves it: "short" | "long"."""


def window_of(total_tokens: int, original_window_tokens: int, window: str = "auto") -> str:
    """The window for a text of ``total_tokens``, prompt and generated tokens together: "short" up to L0, "long"
    beyond.
    """
    if window != "auto":
        return window
    return "short" if total_tokens <= original_window_tokens else "long"


@dataclass(frozen=True)
class Lockstep:
    """How ranks that divide one model agree on their calls.

    Attributes:
        most: every rank's number -> the largest of all ranks. A collective.
    """

    most: Callable[[int], int]


ALONE = Lockstep(lambda mine: mine)


@dataclass(eq=False)
class Row:
    """One text: how it begins and goes on, and what has been generated so far.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: most new tokens.
        window: which table serves the row.
        stop_ids: ids that end the row.
        seed: of sampling; the row's tokens depend on no other row.
        tokens: new ids; a stop id at the end is left out.
        finish: why the row has ended: "end" (a stop id), "length" or "not finite" (logits); empty while it goes on.
            Whoever reads the tokens may end the row with a word of its own.
        table: "short" | "long", under which the newest token was computed.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    window: Window
    stop_ids: Collection[int] = ()
    seed: int = 0
    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    table: str = ""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt and new ones."""
        return len(self.prompt) + len(self.tokens)

    def draw(self) -> float:
        """The row's next random number, uniform in [0, 1)."""
        return self._random.random()

    def take(self, token: int, finite: bool) -> None:
        """Add the next token, or end the row."""
        if not finite:
            self.finish = "not finite"
        elif token in self.stop_ids:
            self.finish = "end"
        else:
            self.tokens.append(token)
            self.finish = "" if len(self.tokens) < self.max_new_tokens else "length"


@torch.inference_mode()
def decode(
    model: Any,
    rotary: WindowRotary,
    rows: Sequence[Row],
    temperature: float = 0.0,
    top_p: float = 1.0,
    chunk_tokens: int = 0,
    lockstep: Lockstep = ALONE,
) -> Iterator[int]:
    """Continue all rows; yields a row's number after each of its steps: the row has a new token, or has ended.

    Args:
        model: a Hugging Face causal LM whose rotary module is ``rotary``.
        rows: written to.
        temperature: of sampling; 0 is greedy.
        top_p: sample from the smallest set of the most likely tokens whose probabilities reach ``top_p``.
        chunk_tokens: of a prefill; 0: ``CHUNK_TOKENS``.
        lockstep: of the ranks that divide the model; each of them has to take all that is yielded.
    """
    batch, head = _Batch(model, rotary, rows, chunk_tokens or CHUNK_TOKENS), model.get_output_embeddings()
    form = form_of(model)
    while True:
        going = [number for number, row in enumerate(rows) if not row.finish]
        prefills = batch.prefills(going)
        calls = lockstep.most(len(prefills) + 1 if going else 0)
        if not calls:
            return
        for prefill in prefills:
            prefill()
        for _ in range(calls - 1 - len(prefills)):
            batch.idle()
        if not going:
            head(batch.idle())
            continue
        logits = form.logits(head(batch.step())[going].float())
        finite = torch.isfinite(logits.amax(-1)).tolist()  # nan where any logit is nan
        chosen = _choose(logits, [rows[number] for number in going], temperature, top_p)
        for number, token, is_finite in zip(going, chosen, finite, strict=True):
            rows[number].take(token, is_finite)
            yield number


def generate(
    model: Any,
    rotary: WindowRotary,
    prompt: Sequence[int],
    max_new_tokens: int,
    original_window_tokens: int,
    window: str = "auto",
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    seed: int = 0,
) -> Iterator[int]:
    """Yield the new token ids of one text one by one.

    Args:
        original_window_tokens: L0, where "auto" switches.
        window: "auto", or "short" | "long" for one table throughout.
        stop: token ids that end the text; they are not yielded.
        prompt, temperature, top_p, seed: as in ``Row`` and ``decode``.

    Raises:
        UserError: the prompt is empty, or a logit is not finite.
    """
    chosen = partial(window_of, original_window_tokens=original_window_tokens, window=window)
    row = Row(prompt, max_new_tokens, chosen, stop, seed)
    refuse_empty(row)
    for _ in decode(model, rotary, [row], temperature, top_p):
        refuse_not_finite(row, model.dtype)
        if row.finish != "end":
            yield row.tokens[-1]


def refuse_empty(row: Row) -> None:
    """Raises UserError where the prompt has no token."""
    if not row.prompt:
        raise UserError("the prompt is empty; set generate.prompt or generate.prompt_file to some text")


def refuse_not_finite(row: Row, dtype: torch.dtype) -> None:
    """Raises UserError where logits that are not finite have ended the row."""
    if row.finish == "not finite":
        remedy = (
            ""
            if dtype == torch.float32
            else "; set model.dtype=float32, as the model's own numbers may be too large for less"
        )
        raise UserError(f"the logits after {row.n_tokens} tokens are not finite, so no token can be chosen{remedy}")


class _Batch:
    """The rows' keys and values, and the passes of the model that fill them."""

    def __init__(self, model: Any, rotary: WindowRotary, rows: Sequence[Row], chunk_tokens: int):
        self._model, self._rotary, self._rows, self._chunk_tokens = model, rotary, rows, chunk_tokens
        self._device = next(model.parameters()).device
        self._held = KeysAndValues([len(row.prompt) for row in rows], max(row.max_new_tokens for row in rows))
        self._steps = 0

    def prefills(self, going: Sequence[int]) -> list[Callable[[], Any]]:
        """The passes before the next step: all tokens but the last, of each row whose keys belong to another table."""
        passes: list[Callable[[], Any]] = []
        for number in going:
            row = self._rows[number]
            if row.table != (table := row.window(row.n_tokens)):
                row.table = table
                ids, cache = torch.tensor([*row.prompt, *row.tokens]), self._held.of_text(number)
                passes += [
                    partial(self._hidden, table, ids[None, start:stop], start, cache)
                    for start, stop in _chunks(len(ids) - 1, self._chunk_tokens)
                ]
        return passes

    def step(self) -> Tensor:
        """Hidden states [B, H] of the last token of every row."""
        newest = [row.tokens[-1] if row.tokens else row.prompt[-1] for row in self._rows]
        # a row that has ended computes its last token again, at the next place
        at = [[len(row.prompt) - 1 + self._steps] for row in self._rows]
        tables, cache = [row.table for row in self._rows], self._held.of_all(self._steps)
        mask = self._held.mask(self._steps, self._device)
        self._steps += 1
        window = tables[0] if len(set(tables)) == 1 else tables
        return self._hidden(window, torch.tensor(newest)[:, None], torch.tensor(at), cache, mask)[:, -1]

    def idle(self) -> Tensor:
        """One token's pass, for its collectives: another rank still works."""
        return self._hidden("short", torch.zeros(1, 1, dtype=torch.int64), 0, None)[:, -1]

    def _hidden(
        self, window: str | list[str], ids: Tensor, at: int | Tensor, cache: Cache | None, mask: Tensor | None = None
    ) -> Tensor:
        """Last hidden states [B, T, H] of ids [B, T] at the positions from ``at`` on; the cache takes their keys."""
        self._rotary.window = window  # at every pass: another caller may use the model in between
        positions = torch.arange(ids.shape[1])[None] + at
        return self._model.base_model(
            input_ids=ids.to(self._device),
            position_ids=positions.to(self._device),
            past_key_values=cache,
            attention_mask=mask,
            use_cache=cache is not None,
        ).last_hidden_state


def _chunks(n_tokens: int, most: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of each chunk of a prefill; from the second chunk on, attention reads a mask."""
    start = 0
    while start < n_tokens:
        size = min(most, n_tokens - start)
        if start:
            size = min(size, max(1, MASK_CELLS // (start + size)))
        yield start, start + size
        start += size


def _choose(logits: Tensor, rows: Sequence[Row], temperature: float, top_p: float) -> list[int]:
    """The next token of every row from logits [B, V]: the most likely one, or a sample from the nucleus of ``top_p``.

    A row's random number is looked up in the summed probabilities, so other rows and the device change no sample.
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    scaled = (logits - logits.amax(-1, keepdim=True)).double() / temperature
    probabilities, order = torch.softmax(scaled, -1).sort(stable=True, dim=-1, descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= top_p  # the more likely tokens reach top_p already
    reached = probabilities.masked_fill(outside, 0.0).cumsum(-1)
    draws = torch.tensor([row.draw() for row in rows], dtype=torch.float64, device=logits.device)[:, None]
    place = (reached <= draws * reached[:, -1:]).sum(-1, keepdim=True)
    # A GPU adds in another order, so a draw near 1 may reach beyond the nucleus.
    place = torch.minimum(place, (~outside).sum(-1, keepdim=True) - 1)
    return order.gather(-1, place)[:, 0].tolist()
