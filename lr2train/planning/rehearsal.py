"""The results of a rehearsed step as numbers: the content of ``rehearsal.json``."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from lr2train.config import HardwareConfig
from lr2train.planning import roofline
from lr2train.planning.accounting import BACKWARD, BEFORE, FORWARD, Accounting, Exchange
from lr2train.planning.memory import GIB, RESERVE, RUNTIME_BYTES
from lr2train.planning.roofline import ROOFLINES, Gpu, Times
from lr2train.planning.timeline import KINDS, Holder, Moment, Timeline, any_layer, phases_of


@dataclass(frozen=True)
class StepShape:
    """What a step of this rank is made of.

    Attributes:
        micro_batches: window name -> micro-batches of a step, also a part of one.
        useful_flops: of all ranks in a step, recomputation left out.
        tokens: of all ranks in a step.
        ranks: of the job.
    """

    micro_batches: dict[str, float]
    useful_flops: float
    tokens: int
    ranks: int


def memory_of(timeline: Timeline, hardware: HardwareConfig) -> dict[str, Any]:
    """Peak, its parts and lines, the peak of each phase, and a sampled timeline, GiB."""
    peak, born = timeline.peak, timeline.born_at(timeline.peak)
    total = (peak.total + RUNTIME_BYTES) / GIB
    limit = hardware.gpu_memory_gib
    return {
        "peak_gib": peak.total / GIB,
        "runtime_gib": RUNTIME_BYTES / GIB,
        "total_gib": total,
        "gpu_gib": limit,
        "fits": total <= (1 - RESERVE) * limit,
        "host_gib_per_node": timeline.host_bytes * min(hardware.gpus, hardware.gpus_per_node) / GIB,
        "at": {
            "phase": peak.phase,
            "micro_batch": peak.micro_batch,
            "module": any_layer(born.place.module),
            "line": born.place.line,
            "operator": born.operator,
            "gib": born.bytes / GIB,
        },
        "kinds": _kinds(peak),
        "holders": [_holder(one) for one in timeline.holders(peak)],
        "phases": [_phase(timeline, *phase) for phase in phases_of(timeline.moments)],
        "timeline": [
            {"at": one.at, "phase": one.phase, "micro_batch": one.micro_batch, **_kinds(one)}
            for one in timeline.sampled()
        ],
    }


def _kinds(moment: Moment) -> dict[str, float]:
    return {kind: moment.bytes[kind] / GIB for kind in KINDS}


def _holder(one: Holder) -> dict[str, Any]:
    line = f"backward of {one.line}" if one.backward else one.line
    return {"kind": one.kind, "line": line, "module": one.module, "gib": one.bytes / GIB, "tensors": one.count}


def _phase(timeline: Timeline, phase: str, micro_batch: str) -> dict[str, Any]:
    moment = timeline.peak_of(phase, micro_batch)
    assert moment is not None
    place = timeline.born_at(moment).place
    return {
        "phase": phase,
        "micro_batch": micro_batch,
        "gib": moment.total / GIB,
        "module": any_layer(place.module),
        "line": f"backward of {place.line}" if place.backward else place.line,
        **_kinds(moment),
    }


def traffic_of(accounting: Accounting) -> list[dict[str, Any]]:
    """Bytes that the rank sends, by micro-batch, who sends and link, GiB."""
    found: dict[tuple[str, str], Counter[bool]] = {}
    for exchange, n_bytes in accounting.sent.items():
        if exchange.phase != BEFORE and n_bytes > 0:
            found.setdefault((exchange.micro_batch, exchange.by), Counter())[exchange.inside_node] += n_bytes
    return [
        {
            "micro_batch": micro_batch,
            "by": by,
            "collectives": sorted(_collectives(accounting, micro_batch, by)),
            "inside_node_gib": links[True] / GIB,
            "between_nodes_gib": links[False] / GIB,
        }
        for (micro_batch, by), links in found.items()
    ]


def _collectives(accounting: Accounting, micro_batch: str, by: str) -> set[str]:
    mine: list[Exchange] = [one for one in accounting.sent if (one.micro_batch, one.by) == (micro_batch, by)]
    return {one.collective for one in mine if one.phase != BEFORE}


def work_of(accounting: Accounting, micro_batches: list[str]) -> list[dict[str, Any]]:
    """FLOPs by class and calls of the attention kernel of each micro-batch, recomputation included."""
    return [
        {
            "micro_batch": name,
            "flops": roofline.flops_of(accounting, name),
            "kernel_calls": {
                "forward": accounting.kernel_calls[name, FORWARD, "forward"],
                "forward again": accounting.kernel_calls[name, BACKWARD, "forward"],
                "backward": accounting.kernel_calls[name, BACKWARD, "backward"],
            },
        }
        for name in micro_batches
    ]


def looks_of(accounting: Accounting) -> list[dict[str, Any]]:
    """Places at which the host waits for the device, and how often."""
    found: Counter[tuple[str, str, str]] = Counter()
    for (micro_batch, phase, place), n in accounting.looks.items():
        if phase != BEFORE:
            found[phase, micro_batch, place.line] += n
    return [
        {"phase": phase, "micro_batch": micro_batch, "line": line, "times": n}
        for (phase, micro_batch, line), n in found.items()
    ]


def seconds_of(accounting: Accounting, in_a_step: dict[str, float], hardware: HardwareConfig) -> float:
    """Shortest time of a step of these micro-batches on the config's kind of GPU."""
    gpu, parts = gpu_like(hardware), {**in_a_step, "": 1}
    return sum(n * roofline.times_of(accounting, name, gpu).shortest for name, n in parts.items())


def time_of(accounting: Accounting, shape: StepShape, gpu: Gpu) -> dict[str, Any]:
    """Bounds of a step on a kind of GPU, and where its time goes, seconds."""
    parts = {name: (n, roofline.times_of(accounting, name, gpu)) for name, n in (*shape.micro_batches.items(), ("", 1))}
    shortest = sum(n * times.shortest for n, times in parts.values())
    longest = sum(n * times.longest for n, times in parts.values())
    ideal = shape.useful_flops / shape.ranks / (gpu.tflops * 1e12)
    return {
        "gpu": gpu.name,
        "step_s": shortest,
        "step_without_overlap_s": longest,
        "tokens_per_s_per_gpu": shape.tokens / shape.ranks / shortest,
        "mfu_at_most": ideal / shortest,
        "parts": [_part(name, n, times) for name, (n, times) in parts.items()],
    }


def _part(name: str, n: float, times: Times) -> dict[str, Any]:
    return {
        "micro_batch": name,
        "in_a_step": n,
        "seconds": times.shortest,
        "without_overlap_s": times.longest,
        "compute_s": times.compute,
        "memory_bound_s": times.memory_bound,
        "links": [
            {"by": by, "link": "inside the node" if inside else "between nodes", "seconds": seconds}
            for (by, inside), seconds in times.links.items()
        ],
    }


def gpu_like(hardware: HardwareConfig) -> Gpu:
    """The kind of GPU that stands for the config's.

    Of the kinds whose peak is nearest to ``hardware.gpu_bf16_tflops``: the one that ``hardware.gpu`` names, else the
    smallest that holds ``hardware.gpu_memory_gib``.
    """
    near = min(abs(one.tflops - hardware.gpu_bf16_tflops) for one in ROOFLINES)
    alike = [one for one in ROOFLINES if abs(one.tflops - hardware.gpu_bf16_tflops) == near]
    fitting = [one for one in alike if one.memory_gib >= hardware.gpu_memory_gib] or alike[-1:]
    return next((one for one in alike if _is_named(one, hardware)), fitting[0])


def assumptions_of(hardware: HardwareConfig) -> list[str]:
    """That another kind of GPU stands for the config's; nothing where the config's own does."""
    gpu = gpu_like(hardware)
    if _is_named(gpu, hardware) and gpu.tflops == hardware.gpu_bf16_tflops:
        return []
    return [
        f"{gpu.name} stands for a GPU of {hardware.gpu_bf16_tflops:g} TFLOP/s (hardware.gpu={hardware.gpu}): no kind "
        "above has a nearer peak"
    ]


def _is_named(gpu: Gpu, hardware: HardwareConfig) -> bool:
    return re.search(rf"\b{gpu.name.partition(' ')[0]}\b", hardware.gpu, re.IGNORECASE) is not None
