"""A search's run folder as the verb writes it, over a smooth fitness; each candidate has a number."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lr2train.io import write_json
from lr2train.rope.methods import METHODS
from lr2train.rope.spectrum import Spectrum

L0, L = 512, 4096
SPECTRUM = Spectrum(64, 10000.0, L0)  # d10 8, tcd 16


@dataclass(frozen=True)
class Scored:
    """A scored candidate; ``number`` identifies it, which no file does."""

    number: int
    perplexity: float
    critical_index: int
    attention_factor: float
    documents: int


def bowl(rng: np.random.Generator, number: int, spread: float, all_dims: bool) -> Scored:
    """Best at rcd 12 and an attention factor of 1.25, where it is 1.002; one in ten breaks the model."""
    index = int(np.clip(round(rng.normal(12, 4 * spread)), 8, 16))
    factor = float(round(np.clip(rng.normal(1.25, 0.1 * spread), 1, 1.4) / 0.005) * 0.005)
    loss = 0.002 * math.exp(0.5 * abs(index - 12) + 20 * abs(factor - 1.25) + abs(rng.normal()) * spread)
    return Scored(
        number, math.inf if rng.random() < 0.1 and number else math.exp(loss), 0 if all_dims else index, factor, 10
    )


def history(
    n_generations: int = 5,
    population: int = 24,
    top_k: int = 6,
    racing: bool = True,
    all_dims: bool = False,
    seed: int = 0,
):
    """A list of candidates per generation: complete ones best first, then dropped ones."""
    rng, made, parents, generations = np.random.default_rng(seed), 0, [], []
    for index in range(n_generations + 1):
        children = [bowl(rng, made + i, 1 / (1 + index), all_dims) for i in range(population - len(parents))]
        made += len(children)
        ranked = sorted([*parents, *children], key=lambda one: one.perplexity)
        worst = ranked[top_k - 1].perplexity
        raced = [
            Scored(one.number, one.perplexity, one.critical_index, one.attention_factor, 2)
            if racing and one.perplexity > worst and one.number % 2 and one in children
            else one
            for one in ranked
        ]
        whole = [one for one in raced if one.documents == 10]
        generations.append([*whole, *(one for one in raced if one.documents < 10)])
        parents = whole[:top_k]
    return generations


def line(index: int, ranked: list[Scored], racing: bool) -> dict:
    """A line of generations.jsonl."""
    lists = {
        "perplexities": [one.perplexity for one in ranked],
        "critical_indices": [one.critical_index for one in ranked],
        "attention_factors": [one.attention_factor for one in ranked],
    }
    raced = {"documents": [one.documents for one in ranked]} if racing else {}
    return {
        "generation": index,
        "best_perplexity": ranked[0].perplexity,
        **lists,
        **raced,
        "document_forwards": 200 * (index + 1),
    }


def write_jsonl(path: Path, lines: list[dict]) -> None:
    """One JSON object per line; infinity as Python's json writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))


def make_search(
    folder: Path, racing: bool = True, all_dims: bool = False, finished: bool = True, **settings
) -> list[list[Scored]]:
    """``folder`` of a finished or running search; returns its generations."""
    generations = history(racing=racing, all_dims=all_dims, **settings)
    write_jsonl(folder / "generations.jsonl", [line(index, ranked, racing) for index, ranked in enumerate(generations)])
    entries = [
        {
            "candidate": str(one.number),
            "document": d,
            "nll": 3 * math.log(one.perplexity) * (1 + d / 4),
            "seconds": 0.11,
            "rank": d % 2,
        }
        for one in generations[0]
        for d in range(one.documents)
    ]
    write_jsonl(folder / "journal.jsonl", entries)
    if finished:
        _finish(folder, generations[-1][0])
    return generations


def _finish(folder: Path, best: Scored) -> None:
    of_best = {
        "perplexity": best.perplexity,
        "critical_index": best.critical_index,
        "attention_factor": best.attention_factor,
    }
    recorded = {"population": 24, "top_k": 6, "objective": "needle"}
    sure = {"chance": 0.97, "words": "better than the runner-up with a chance of 97% (24 documents)"}
    found = {**of_best, "confidence": sure, "document_forwards": 1200, "seconds": 75.0, "settings": recorded}
    write_json(folder / "search.json", found)
    if best.critical_index:
        tail = [12.8 + i / 8 for i in range(32 - best.critical_index)]
        made = METHODS["longrope2"](
            SPECTRUM, L, critical_index=best.critical_index, tail=tail, attention_factor=best.attention_factor
        )
    else:
        made = METHODS["longrope"](SPECTRUM, L)
    write_json(folder / "factors.json", made.to_json())
