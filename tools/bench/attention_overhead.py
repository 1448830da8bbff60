"""Step time of each strategy on two CPU ranks, beside DeepSpeed's own UlyssesSPAttentionHF.

A step is the forward and backward pass of one model, with the same weights and tokens on both sides. DeepSpeed's step
runs between any two of ours. A figure is the median over rounds of our time over the mean of DeepSpeed's steps right
before and right after, so other load on the machine affects both sides. Each figure is taken twice: by wall-clock time
of the slower rank, and by CPU time of both ranks. Other processes disturb CPU time less; waiting does not show in it.

Noise is the figure of DeepSpeed beside itself: the distance of the median from 1, plus half the width of its 95 %
interval (1.57 interquartile ranges / sqrt(n), McGill, Tukey and Larsen 1978). The bounds allow for noise.

DeepSpeed under sdpa knows no document spans and attends over the whole segment, so it has one step for all windows.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tools.bench.figures import Figure, on_ranks

RANKS = 2
WINDOWS = ("long", "short")
REFERENCE = "deepspeed"
MEASURES = ("clock", "cpu")


class StepSize(NamedTuple):
    """Size of the model, of its segment and of the measurement."""

    n_tokens: int
    layers: int
    rounds: int


WHOLE, QUICK = StepSize(1024, 2, 20), StepSize(512, 2, 8)
DOCUMENTS = (
    3,
    5,
    6,
    2,
)  # document lengths of a short segment, in 16ths of a sequence shard; the last ends at its border

Seconds = tuple[float, ...]
"""Seconds of one step, by MEASURES."""


def measure(quick: bool) -> Iterable[Figure]:
    """Ratios to DeepSpeed's step by strategy, window and measure, with noise and bounds."""
    # step -> for each round: (DeepSpeed before, the step itself, DeepSpeed after)
    taken: dict[str, list[tuple[Seconds, Seconds, Seconds]]] = on_ranks(_rank, RANKS, QUICK if quick else WHOLE)
    for index, by in enumerate(MEASURES):
        yield from _figures(
            {
                name: [(own[index], (before[index] + after[index]) / 2) for before, own, after in rows]
                for name, rows in taken.items()
            },
            by,
        )


def _figures(pairs: dict[str, list[tuple[float, float]]], by: str) -> Iterable[Figure]:
    """Figures of (seconds, DeepSpeed's seconds) by step; DeepSpeed itself is one of the steps."""
    ratios = {name: [own / other for own, other in rows] for name, rows in pairs.items()}
    medians = {name: statistics.median(rows) for name, rows in ratios.items()}
    print(f"{'step, by ' + by:<24} {'median ms':>10} {'of DeepSpeed':>13}")
    for name, rows in pairs.items():
        print(f"{name:<24} {1e3 * statistics.median(own for own, _ in rows):>10.1f} {medians[name]:>13.3f}")
    noise = abs(medians[REFERENCE] - 1) + _half_width(ratios[REFERENCE])
    yield Figure(f"noise_{by}", noise)
    for name, median in medians.items():
        if name != REFERENCE:
            yield Figure(
                f"{name.replace(', ', '_')}_over_deepspeed_{by}",
                median,
                at_most=1 + noise if name == "ulysses, long" else None,
            )
    cheapest = min(median for name, median in medians.items() if name.endswith(", short"))
    # a ratio of two noisy figures; on two ranks, communication is small beside the computation of such documents
    yield Figure(f"local_short_over_cheapest_{by}", medians["local, short"] / cheapest, at_most=1 + 2 * noise)


def _half_width(ratios: list[float]) -> float:
    low, _, high = statistics.quantiles(ratios, n=4)
    return 1.57 * (high - low) / math.sqrt(len(ratios))


def _rank(rank: int, folder: Path, size: StepSize, queue: Any) -> None:
    from lr2train.training.deepspeed.start import start_deepspeed

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    start_deepspeed(torch.device("cpu"))
    taken = _rounds(_steps(size), size.rounds)
    if rank == 0:
        queue.put(taken)
    dist.barrier()
    dist.destroy_process_group()


def _rounds(steps: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[tuple[Seconds, Seconds, Seconds]]]:
    taken: dict[str, list[tuple[Seconds, Seconds, Seconds]]] = {name: [] for name in steps}
    for step in steps.values():  # first calls are slower: memory is allocated, kernels are chosen
        step()
    before = _seconds(steps[REFERENCE])
    for _ in range(rounds):
        for name, step in steps.items():
            own, after = _seconds(step), _seconds(steps[REFERENCE])
            taken[name].append((before, own, after))
            before = after
    return taken


def _seconds(step: Callable[[], Any]) -> Seconds:
    """(wall-clock seconds of the slower rank, CPU seconds of all ranks)."""
    dist.barrier()
    clock, cpu = time.perf_counter(), time.process_time()
    step()
    taken = torch.tensor([time.perf_counter() - clock, time.process_time() - cpu], dtype=torch.float64)
    dist.all_reduce(taken[:1], dist.ReduceOp.MAX)
    dist.all_reduce(taken[1:])
    return tuple(taken.tolist())


def _steps(size: StepSize) -> dict[str, Callable[[], Tensor]]:
    """All steps by name; steps over the same documents must compute the same loss."""
    from lr2train.parallel.mesh import make_mesh

    plain = _model(size)
    steps = {REFERENCE: _deepspeed_step(copy.deepcopy(plain), size)}
    meshes = {ring: make_mesh(RANKS, None, ring) for ring in (1, RANKS)}
    for window in WINDOWS:
        for strategy in ("local", "ulysses", "ring", "gather", "ulysses_ring"):
            if (strategy, window) != ("local", "long"):
                mesh = meshes[RANKS if strategy == "ulysses_ring" else 1]
                steps[f"{strategy}, {window}"] = _our_step(
                    copy.deepcopy(plain), strategy, mesh, _spans(window, size), size
                )
    losses = {name: _total(step()) for name, step in steps.items()}
    for name, loss in losses.items():
        other = losses[REFERENCE if name.endswith("long") or name == REFERENCE else "local, short"]
        assert math.isclose(loss, other, rel_tol=1e-4), f"{name} computes {loss}, and not {other}"
    return steps


def _total(loss: Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item()


def _model(size: StepSize) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=size.layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=size.n_tokens, attn_implementation="sdpa",
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _spans(window: str, size: StepSize) -> tuple[tuple[int, int], ...]:
    if window == "long":
        return ((0, size.n_tokens),)
    borders = [0, *accumulate(part * size.n_tokens // RANKS // 16 for part in RANKS * DOCUMENTS)]
    return tuple(pairwise(borders))


def _inputs(spans: tuple[tuple[int, int], ...], n_tokens: int) -> tuple[Tensor, Tensor]:
    """(token ids, positions that restart in each document), [T] each."""
    ids = torch.randint(256, (n_tokens,), generator=torch.Generator().manual_seed(1))
    return ids, torch.cat([torch.arange(stop - start) for start, stop in spans])


def _our_step(
    model: Any, strategy: str, mesh: Any, spans: tuple[tuple[int, int], ...], size: StepSize
) -> Callable[[], Tensor]:
    from lr2train.attention.hf import install

    sequence_attention = install(model, mesh, strategy)
    layout = sequence_attention.segment(spans, size.n_tokens).layout
    ids, positions = (layout.shard(x, 0)[None] for x in _inputs(spans, size.n_tokens))

    def step() -> Tensor:  # as the engine does, the segment's attention is made anew for each step
        return _forward_backward(
            model, ids, positions, segment_attention=sequence_attention.segment(spans, size.n_tokens)
        )

    return step


def _deepspeed_step(model: Any, size: StepSize) -> Callable[[], Tensor]:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    UlyssesSPAttentionHF.register_with_transformers(
        model,
        "sdpa",
        sequence_parallel_size=RANKS,
        micro_batch_size=1,
        seq_length=size.n_tokens,
        seq_length_is_variable=False,
    )
    ids, positions = (x.chunk(RANKS)[dist.get_rank()][None] for x in _inputs(_spans("long", size), size.n_tokens))
    return lambda: _forward_backward(model, ids, positions)


def _forward_backward(model: Any, ids: Tensor, positions: Tensor, **options: Any) -> Tensor:
    """All layers without the head, whose time would hide theirs.

    The loss sums fourth powers of the last hidden states: the last norm fixes the sum of squares.
    """
    model.zero_grad()
    loss = (
        model.base_model(input_ids=ids, position_ids=positions, use_cache=False, **options)
        .last_hidden_state.pow(4)
        .sum()
    )
    loss.backward()
    return loss
