"""Time of a rehearsed step on a kind of GPU, by its roofline: each operator takes the longer of its arithmetic at the
peak and its bytes at the memory's speed; each exchange takes its bytes at the link's speed.

Choice: peaks as the makers publish them (dense, no sparsity), so the time is a lower bound, and says which part bounds
a step. Cost: real kernels reach 60 to 80 % of a peak; launches, latency and waiting are not in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lr2train.config.gpus import peak_tflops
from lr2train.planning.accounting import UPDATE, Accounting, Work


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, as its maker describes it.

    Attributes:
        tflops: dense peak in bfloat16, TFLOP/s.
        memory_gib: its memory.
        memory_gb_s: bandwidth of its memory, GB/s.
        node_gb_s: NVLink inside a node, one direction, GB/s.
        network_gb_s: network of a GPU between nodes, one direction, GB/s (a port for each GPU, as in DGX).
    """

    name: str
    tflops: float
    memory_gib: float
    memory_gb_s: float
    node_gb_s: float
    network_gb_s: float


def _peak(name: str) -> float:
    peak = peak_tflops(name)
    assert peak is not None
    return peak


ROOFLINES = (
    Gpu("A100 80GB", _peak("A100"), 80, 2039, 300, 25),
    Gpu("H100 SXM", _peak("H100"), 80, 3350, 450, 50),
    Gpu("H200", _peak("H200"), 141, 4800, 450, 50),
    Gpu("B200", _peak("B200"), 180, 8000, 900, 50),
)
_SLOWER = {torch.float32: 16.0, torch.float64: 32.0}  # of products without tensor cores, as a part of the bf16 peak
PRODUCTS, ATTENTION, OTHERS = "matrix products", "attention", "other operators"


@dataclass(frozen=True)
class Times:
    """Seconds of one micro-batch or of the update.

    Attributes:
        compute: by class of operators.
        memory_bound: the part of compute that the memory's speed decides.
        links: (who exchanges, whether inside a node) -> seconds.
    """

    compute: dict[str, float]
    memory_bound: float
    links: dict[tuple[str, bool], float]

    @property
    def shortest(self) -> float:
        """All exchanges run behind compute."""
        return max(sum(self.compute.values()), sum(self.links.values()))

    @property
    def longest(self) -> float:
        """No exchange runs behind compute."""
        return sum(self.compute.values()) + sum(self.links.values())


def times_of(accounting: Accounting, micro_batch: str, gpu: Gpu) -> Times:
    """Times of a micro-batch; of the update for an empty name."""
    compute: dict[str, float] = defaultdict(float)
    memory_bound = 0.0
    for work, n in _mine(accounting, micro_batch):
        arithmetic = work.flops * _SLOWER.get(work.dtype, 1.0) / (gpu.tflops * 1e12)
        moving = work.bytes / (gpu.memory_gb_s * 1e9)
        compute[class_of(work)] += n * max(arithmetic, moving)
        memory_bound += n * moving if moving > arithmetic else 0.0
    links: dict[tuple[str, bool], float] = defaultdict(float)
    for exchange, n_bytes in accounting.sent.items():
        if exchange.micro_batch == micro_batch and _counts(exchange.phase, micro_batch):
            speed = gpu.node_gb_s if exchange.inside_node else gpu.network_gb_s
            links[exchange.by, exchange.inside_node] += n_bytes / (speed * 1e9)
    return Times(dict(compute), memory_bound, dict(links))


def flops_of(accounting: Accounting, micro_batch: str) -> dict[str, float]:
    """FLOPs of a micro-batch by class of operators, recomputation included."""
    found: dict[str, float] = defaultdict(float)
    for work, n in _mine(accounting, micro_batch):
        if work.flops:
            found[class_of(work)] += n * work.flops
    return dict(found)


def class_of(work: Work) -> str:
    """PRODUCTS | ATTENTION | OTHERS."""
    if work.operator.startswith("attention "):
        return ATTENTION
    return PRODUCTS if work.flops else OTHERS


def _mine(accounting: Accounting, micro_batch: str) -> Iterable[tuple[Work, int]]:
    return (
        (work, n)
        for work, n in accounting.work.items()
        if work.micro_batch == micro_batch and _counts(work.phase, micro_batch)
    )


def _counts(phase: str, micro_batch: str) -> bool:
    return (phase == UPDATE) == (micro_batch == "")


ASSUMPTIONS = (
    "the time is a lower bound: products run at the dense bf16 peak, other operators at the full speed of the memory, "
    "and nothing waits or is launched; kernels reach 60 to 80 % of the peak",
    "an exchange has no latency; gathers and reductions of ZeRO run as rings, whose one link out of a node is shared "
    "by the node's GPUs",
    "links, one direction a GPU: NVLink 300 GB/s (A100), 450 (H100, H200), 900 (B200); network 25 GB/s (A100), else 50",
)
