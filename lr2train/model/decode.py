"""Generation across the window switch (paper, Section 3.3).

The original RoPE serves up to L0 tokens, prompt and generated tokens together; the rescaled RoPE serves longer texts.

Choice: at the switch the key-value cache is dropped, and the whole text is prefilled under the long table. Rotating the
cached keys anew would be cheaper and wrong: from the second layer on, keys and values depend on hidden states under the
old table. Cost: one prefill of L0 tokens, once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from lr2train.config import UserError
from lr2train.model.rotary import WindowRotary


@torch.inference_mode()
def generate(
    model: Any,
    rotary: WindowRotary,
    prompt: list[int],
    max_new_tokens: int,
    original_window_tokens: int,
    window: str = "auto",
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    seed: int = 0,
) -> Iterator[int]:
    """Yield new token ids one by one.

    Args:
        model: a Hugging Face causal LM whose rotary module is ``rotary``.
        prompt: token ids, at least one.
        original_window_tokens: L0, where "auto" switches.
        window: "auto", or "short" | "long" for one table throughout.
        temperature: of sampling; 0 is greedy.
        top_p: sample from the smallest set of the most likely tokens whose probabilities reach ``top_p``.
        stop: token ids that end the text; the last one is yielded too.
        seed: of sampling.

    Raises:
        UserError: the prompt is empty, or a logit is not finite.
    """
    if not prompt:
        raise UserError("the prompt is empty; set generate.prompt or generate.prompt_file to some text")
    generator = torch.Generator().manual_seed(seed)
    tokens, cache, cached_under = list(prompt), None, ""
    for _ in range(max_new_tokens):
        # set at every token: another caller may use the model in between
        rotary.window = window_of(len(tokens), original_window_tokens, window)
        if rotary.window != cached_under:  # the cached keys belong to the other table
            cache, cached_under = None, rotary.window
        logits, cache = _forward(model, tokens, cache)
        _refuse_not_finite(logits, len(tokens), model.dtype)
        token = _pick(logits, temperature, top_p, generator)
        tokens.append(token)
        yield token
        if token in stop:
            return


def _refuse_not_finite(logits: torch.Tensor, n_tokens: int, dtype: torch.dtype) -> None:
    if not torch.isfinite(logits.max()):  # max returns nan where any logit is nan
        remedy = (
            ""
            if dtype == torch.float32
            else "; set model.dtype=float32, as the model's own numbers may be too large for less"
        )
        raise UserError(f"the logits after {n_tokens} tokens are not finite, so no token can be chosen{remedy}")


def window_of(total_tokens: int, original_window_tokens: int, window: str = "auto") -> str:
    """The window for a text of ``total_tokens``, prompt and generated tokens together: "short" up to L0, "long"
    beyond.
    """
    if window != "auto":
        return window
    return "short" if total_tokens <= original_window_tokens else "long"


def _forward(model: Any, tokens: list[int], cache: Any) -> tuple[torch.Tensor, Any]:
    """Logits [V] after the last token, and the cache. With a cache only the last token is computed, without one the
    whole text.
    """
    device = next(model.parameters()).device
    first = 0 if cache is None else len(tokens) - 1  # position of the first token to compute
    ids = torch.tensor([tokens[first:]], device=device)
    positions = torch.arange(first, len(tokens), device=device)[None]
    out = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[0, -1].float().cpu(), out.past_key_values


def _pick(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """The next token: the most likely one, or a sample from the nucleus of ``top_p``."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= top_p  # the more likely tokens reach top_p already
    probabilities[outside] = 0.0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
