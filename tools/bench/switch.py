"""The switch of RoPE tables while a text is generated: its seconds, and how wrong cheaper switches would be.

    python -m tools.bench.switch --model FOLDER [--corpus FOLDER] [--target-tokens 16384] [--threads 1]

FOLDER is a model with two tables, as `train` or `export` writes it. A model with one table is extended to
``--target-tokens`` by YaRN: its times are those of any factors.

Times: a text begins a few tokens below L0 and is decoded across it, as `lr2train generate` does. The switch is the
token that is generated right after L0, less a usual token. The step of a cache that is allocated once is compared with
transformers' ``DynamicCache`` over as many tokens; there both hold random numbers.

Quality, with ``--corpus``: perplexity of the tokens after the switch, in held-out documents that are longer, and the
share of these tokens after which another token is the most likely one than when the switch recomputes. They are read
under the long table; what differs are the keys and values of the first L0 tokens:

- recomputed: computed anew under the long table, as lr2train does
- kept: as the short table left them
- re-rotated: the keys of every layer are turned from the short table's angles to the long table's, and multiplied by
  the ratio of the attention factors; values stay. In the first layer this is exact, which is checked.
- short throughout: no switch at all

Runs in float32 on the CPU. Seconds are CPU seconds of all threads, which other work on the machine disturbs less. The
last lines read ``name: value``. Exits with 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from lr2train import progress
from lr2train.config import ModelConfig
from lr2train.data.corpus import HOLDOUT, Corpus
from lr2train.model import decode, load, rotary
from lr2train.model.kv_cache import KeysAndValues
from lr2train.rope import METHODS, Factors
from lr2train.rope import hf as rope_hf
from tools.bench.figures import Figure, conclude

AROUND = 16  # tokens that are timed on each side of the switch
FIRST_LAYER_ERROR = 1e-4  # of the largest key, float32: two rotations instead of one
WAYS = ("recomputed", "re-rotated", "kept", "short throughout")  # the first is what the others are compared with
SPANS = (1, 16, 64, 256, 1024)  # borders of the distances after the switch


def times(model: Any, table: rotary.WindowRotary, original: int) -> Iterator[Figure]:
    """Seconds of a prefill of L0 tokens, of a token on each side of the switch, and of the switch."""
    prompt = torch.randint(3, model.config.vocab_size, (original - AROUND,), generator=_seeded()).tolist()
    row = decode.Row(prompt, 2 * AROUND + 1, partial(decode.window_of, original_window_tokens=original))
    at = [time.process_time()]
    for _ in decode.decode(model, table, [row]):
        at.append(time.process_time())
    seconds = np.diff(at)
    # tokens 1 … AROUND + 1 follow at most L0 tokens; the first of them has the prompt's prefill before it
    before = statistics.median(seconds[1 : AROUND + 1])
    after = statistics.median(seconds[AROUND + 2 :])
    switch = seconds[AROUND + 1] - after
    yield Figure("original_window_tokens", original)
    yield Figure("prefill_s", seconds[0] - before)
    yield Figure("token_s_short", before)
    yield Figure("token_s_long", after)
    yield Figure("switch_s", switch)
    yield Figure("switch_in_tokens", switch / after)


@torch.inference_mode()
def caches(model: Any, original: int, rounds: int = 40) -> Iterator[Figure]:
    """Seconds of a step over L0 cached tokens: buffers that are allocated once, and transformers' ``DynamicCache``.

    The two take turns, so other work on the machine slows both.
    """
    ours, theirs = KeysAndValues([original + 1], rounds), DynamicCache()
    _fill(model, ours.of_text(0), original)
    _fill(model, theirs, original)
    seconds: dict[str, list[float]] = {"allocated_once": [], "dynamic": []}
    for number in range(rounds):
        for name, cache in (("allocated_once", ours.of_all(number)), ("dynamic", theirs)):
            start = time.process_time()
            _read(model, torch.tensor([[5]]), original + number, cache)
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, median in medians.items():
        yield Figure(f"token_s_{name}", median)
    yield Figure("allocated_once_over_dynamic", medians["allocated_once"] / medians["dynamic"], at_most=1.1)


def _fill(model: Any, cache: Cache, n_tokens: int) -> None:
    """Put random keys and values into every layer."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        keys = torch.randn(1, config.num_key_value_heads, n_tokens, head_dim, generator=_seeded())
        cache.update(keys, keys.clone(), layer)


@torch.inference_mode()
def quality(model: Any, table: rotary.WindowRotary, original: int, documents: list[Tensor]) -> Iterator[Figure]:
    """Perplexity of the tokens after the switch, for each way to switch."""
    losses: dict[str, list[Tensor]] = {name: [] for name in WAYS}
    other: dict[str, list[Tensor]] = {name: [] for name in WAYS}
    worst = 0.0
    for ids in progress.track(documents, len(documents), "documents"):
        best: Any = None
        for name in WAYS:
            logits = _logits(model, table, original, ids, name)
            losses[name].append(F.cross_entropy(logits, ids[0, original + 1 :], reduction="none"))
            best = logits.argmax(-1) if best is None else best
            other[name].append((logits.argmax(-1) != best).float())
        worst = max(worst, _first_layer_error(model, table, ids[:, :original]))
    n_tokens = len(losses["recomputed"][0])
    borders = [*(border for border in SPANS if border < n_tokens), n_tokens + 1]
    print(f"{'tokens after the switch':<24}" + "".join(f"{name:>18}" for name in losses))
    for first, stop in itertools.pairwise(borders):
        row = [_perplexity(torch.cat([one[first - 1 : stop - 1] for one in each])) for each in losses.values()]
        print(f"{f'{first} to {stop - 1}':<24}" + "".join(f"{value:>18.3f}" for value in row))
    yield Figure("documents", len(documents))
    yield Figure("tokens_after_the_switch", n_tokens)
    yield Figure("first_layer_error", worst, at_most=FIRST_LAYER_ERROR)
    for name in WAYS:
        key = name.replace(" ", "_").replace("-", "_")
        yield Figure(f"perplexity_{key}", _perplexity(torch.cat(losses[name])))
        yield Figure(f"other_most_likely_token_{key}", float(torch.cat(other[name]).mean()))


def _logits(model: Any, table: rotary.WindowRotary, original: int, ids: Tensor, way: str) -> Tensor:
    """Logits of the tokens after the switch [n, V].

    The first L0 tokens predict the next one under the short table, so the first token that the switch touches is the
    one after that.
    """
    table.window, cache = "long" if way == "recomputed" else "short", DynamicCache()
    _read(model, ids[:, :original], 0, cache)
    if way == "re-rotated":
        _rotate(table, cache)
    table.window = "short" if way == "short throughout" else "long"
    return model.get_output_embeddings()(_read(model, ids[:, original:-1], original, cache)[0])


def _read(model: Any, ids: Tensor, first: int, cache: Cache) -> Tensor:
    positions = torch.arange(first, first + ids.shape[1])[None]
    return model.base_model(
        input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state


def _rotate(table: rotary.WindowRotary, cache: DynamicCache) -> None:
    """Turn the cached keys [1, Hkv, T, D] of all layers from the short to the long table, in place."""
    short, long = table.tables["short"], table.tables["long"]
    turned = long.inv_freq.double() - short.inv_freq.double()
    scale = long.attention_factor / short.attention_factor
    n_pairs = len(turned)
    layers: Any = cache.layers
    for keys in (layer.keys for layer in layers):
        angles = torch.arange(keys.shape[2], dtype=torch.float64)[:, None] * turned
        cos, sin = (scale * angles.cos()).float(), (scale * angles.sin()).float()
        first, second = keys[..., :n_pairs].clone(), keys[..., n_pairs : 2 * n_pairs].clone()
        keys[..., :n_pairs] = first * cos - second * sin
        keys[..., n_pairs : 2 * n_pairs] = second * cos + first * sin


def _first_layer_error(model: Any, table: rotary.WindowRotary, ids: Tensor) -> float:
    """Largest difference of re-rotated and recomputed keys of the first layer, over the largest key."""
    cached = {}
    for window in ("short", "long"):
        table.window, cached[window] = window, DynamicCache()
        _read(model, ids, 0, cached[window])
    _rotate(table, cached["short"])
    layers: list[Any] = [cached[window].layers[0] for window in ("short", "long")]
    turned, wanted = (layer.keys for layer in layers)
    return float((turned - wanted).abs().max() / wanted.abs().max())


def _perplexity(losses: Tensor) -> float:
    return math.exp(losses.double().mean())


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _documents(corpus: Corpus, n_tokens: int, most: int) -> list[Tensor]:
    """The first ``n_tokens`` of held-out documents that have as many."""
    found = corpus.documents(HOLDOUT)
    long = [index for index in range(len(found)) if found.lengths[index] >= n_tokens][:most]
    return [torch.from_numpy(found[index][:n_tokens].astype(np.int64))[None] for index in long]


def _factors(folder: Path, target_tokens: int | None) -> Factors:
    """Of the model's own two tables; YaRN's for a model with one."""
    values = load.plain_config(load.config_of(ModelConfig(path=str(folder))))
    if (own := rope_hf.factors_of(values)) is not None:
        return own
    spectrum = rope_hf.spectrum_of(values)
    return METHODS["yarn"](spectrum, target_tokens or 2 * spectrum.window_tokens)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, help="a corpus of `lr2train prepare` with held-out documents")
    parser.add_argument("--target-tokens", type=int, help="of a model with one table; default twice its window")
    parser.add_argument("--after-tokens", type=int, default=1024, help="read after the switch")
    parser.add_argument("--documents", type=int, default=64, help="most held-out documents")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    factors = _factors(given.model, given.target_tokens)
    model, original = load.load_whole(given.model), factors.spectrum.window_tokens
    table = rotary.install(model, factors)
    figures = [*times(model, table, original), *caches(model, original)]
    if given.corpus:
        documents = _documents(Corpus.open(given.corpus), original + given.after_tokens + 1, given.documents)
        figures += quality(model, table, original, documents)
    return conclude(figures)


if __name__ == "__main__":
    sys.exit(main())
