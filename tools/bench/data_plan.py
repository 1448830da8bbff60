"""The segment table at full size: the paper's mix of 10B tokens from five million synthetic document lengths.

Prints the mix, then seconds, peak memory, error of the mix by source and bucket, and padding of short segments by
sequence-parallel size. Padding is measured for three sets of documents: the paper's sources; the released example's
short mix, half of it documents of 4k to 8k tokens; and documents of the upper half of the window alone, which leave
gaps that no document fills. Lengths are lognormal mixtures: web pages around 1k tokens, papers 14k, books 110k.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.figures import Figure

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = {  # source: (share of all documents, ((share of its documents, median tokens, sigma), …))
    "redpajama_v1": (0.28, ((0.80, 700, 1.1), (0.15, 14_000, 0.8), (0.05, 110_000, 0.6))),
    "redpajama_v2": (0.24, ((0.97, 900, 1.2), (0.03, 40_000, 0.9))),
    "starcoder": (0.08, ((0.90, 800, 1.5), (0.10, 30_000, 1.0))),
    "fineweb_edu": (0.40, ((1.0, 700, 0.9),)),
}
SIZES = (1, 2, 4, 8, 16)  # sp 16: sequence shards of 8192 tokens, the longest short document
OTHER = ((2048, 16), (2048, 64), (4096, 32))  # (L0, sp) of further models, all at 128k
SECONDS, GIB, ERROR, PADDING = 60.0, 4.0, 0.005, 0.01


def lengths_of(n_documents: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Synthetic lengths by source, int32."""
    rng, made = np.random.default_rng(seed), {}
    for name, (share, parts) in SHAPES.items():
        n = round(share * n_documents)
        drawn = [rng.lognormal(np.log(median), sigma, round(n * part)) for part, median, sigma in parts]
        made[name] = rng.permutation(np.concatenate(drawn).clip(16, 2_000_000).astype(np.int32))
    return made


def measure(quick: bool) -> Iterator[Figure]:
    """Figures of a segment table of 10B tokens (quick: 500M)."""
    result = _in_a_process("whole", quick)
    print(result["table"], flush=True)
    yield Figure("planned_tokens", result["planned_tokens"])
    yield Figure("documents", result["documents"])
    yield Figure("pieces", result["pieces"])
    yield Figure("plan_mib", result["plan_mib"])
    yield Figure("plan_seconds", result["seconds"], at_most=SECONDS)
    yield Figure("plan_peak_gib", result["peak_gib"], at_most=GIB)
    for what in ("source", "bucket", "window"):
        for one in result[f"by_{what}"]:
            yield Figure(f"mix_error_{what}_{one[what]}", abs(one["error"]), at_most=ERROR)
    yield Figure("most_repeats", result["most_repeats"], at_most=4.0)
    for name, share in _in_a_process("padding", quick=False)[
        "padding"
    ].items():  # with fewer documents, the last segment would dominate
        yield Figure(name, share, at_most=None if "upper_half" in name else PADDING)


def _in_a_process(what: str, quick: bool) -> dict[str, Any]:
    """Run this module in a process, whose peak memory is then the module's own."""
    command = [sys.executable, "-m", "tools.bench.data_plan", what, "quick" if quick else "full"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    return json.loads(done.stdout)


def _whole(n_documents: int, share: float) -> dict[str, Any]:
    from lr2train.cli.composition import compose
    from lr2train.data.plan.compose import compose_segments
    from lr2train.data.plan.report import as_text, report_of

    config = compose("prepare", ["experiment=llama3_8b_128k", "name=bench"])
    data = config.data
    data.short_tokens, data.long_tokens = round(data.short_tokens * share), round(data.long_tokens * share)
    lengths = list(lengths_of(n_documents).values())
    assert [source.name for source in data.sources] == list(SHAPES)
    nothing_masked = [None] * len(lengths)
    started = time.perf_counter()
    plan = compose_segments(data, lengths, nothing_masked, 8192, 0)
    report = report_of(data, lengths, nothing_masked, plan)
    seconds = time.perf_counter() - started
    n_pieces = sum(len(one.segment) for one in plan.tables.values())
    return {
        "seconds": seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "documents": sum(map(len, lengths)),
        "pieces": n_pieces,
        "plan_mib": n_pieces * 24 / 2**20,
        "planned_tokens": sum(one.tokens for one in plan.tables.values()),
        "most_repeats": max(row["repeats"] for row in report["cells"]),
        "table": as_text(report),
        **{key: report[key] for key in ("by_source", "by_bucket", "by_window")},
    }


def _padding(n_documents: int) -> dict[str, Any]:
    """Padding of short segments of 131072 tokens, from a tenth of the documents."""
    made = lengths_of(n_documents // 10, seed=1)
    everything = np.concatenate(list(made.values()))
    shares = {f"padding_l0_{window}_sp_{sp}": _padding_of(everything[everything <= window], sp) for window, sp in OTHER}
    for sp in SIZES:
        shares[f"padding_sp_{sp}"] = _padding_of(everything[everything <= 8192], sp)
        shares[f"padding_released_mix_sp_{sp}"] = _padding_of(_released_mix(made["fineweb_edu"]), sp)
        shares[f"padding_upper_half_sp_{sp}"] = _padding_of(everything[(everything > 4096) & (everything <= 8192)], sp)
    return {"padding": shares}


def _released_mix(lengths: np.ndarray) -> np.ndarray:
    """Documents of 64-2k, 2k-4k and 4k-9k tokens (cut at 8192), their tokens as 1 : 1 : 2."""
    rng, parts = np.random.default_rng(2), []
    middle = [
        lengths[(lengths > low) & (lengths <= high)].clip(0, 8192)
        for low, high in ((63, 2048), (2048, 4096), (4096, 9216))
    ]
    budget = min(part.sum() / weight for part, weight in zip(middle, (1, 1, 2), strict=True))
    for part, weight in zip(middle, (1, 1, 2), strict=True):
        shuffled = rng.permutation(part)
        parts.append(shuffled[np.cumsum(shuffled) <= budget * weight])
    return np.concatenate(parts)


def _padding_of(length: np.ndarray, sp: int) -> float:
    from lr2train.data.plan import packing

    documents = packing.whole_documents(np.zeros(len(length)), np.arange(len(length)), length)
    return packing.pack_short(documents, 131072, sp, np.random.default_rng(0)).padding_share


if __name__ == "__main__":
    n_documents, share = (250_000, 0.05) if sys.argv[2] == "quick" else (5_000_000, 1.0)
    print(json.dumps(_whole(n_documents, share) if sys.argv[1] == "whole" else _padding(n_documents)))
