"""Peak memory of a real training step on CPU ranks, by torch's own allocator, beside what a rehearsal says of it.

torch's profiler notes every allocation of the thread that trains, and every release. So scratch memory inside an
operator counts. Memory of gloo's own threads does not: no GPU has it.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lr2train.config import Config, DataConfig, EngineConfig, HardwareConfig, ModelConfig, OptimConfig, ParallelConfig
from lr2train.data.batch import LONG, SHORT
from lr2train.planning.workload import Workload, WorkloadPart

RANKS, L0 = 2, 256
ARCHITECTURE = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 384, 
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": L0,
    "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
BUCKET = 200_000  # parameters
STEPS = 2  # the first one makes the optimizer's moments and learns the order of modules

Phase = tuple[str, str]
"""("forward" | "backward" | "update", name of the micro-batch)"""


class Case(NamedTuple):
    """A setting whose memory is measured."""

    zero_stage: int = 3
    recompute: str = "keep_attention"
    sp: int = 1
    dtype: str = "float32"
    tile_mlp: int = 0
    segment_tokens: int = 1024
    layers: int = 4
    ranks: int = RANKS

    @property
    def title(self) -> str:
        """In words."""
        tiled = f", tiles of {self.tile_mlp}" if self.tile_mlp else ""
        return f"ZeRO-{self.zero_stage}, recompute {self.recompute}, sp {self.sp}, {self.dtype}{tiled}"

    def config(self) -> Config:
        """Small buckets and limits, so that they do not hide the rest."""
        zero = {
            "reduce_bucket_size": BUCKET,
            "stage3_max_live_parameters": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": 0,
        }
        return Config(
            name="measured",
            device="cpu",
            model=ModelConfig(architecture=ARCHITECTURE | {"num_hidden_layers": self.layers}, dtype=self.dtype),
            parallel=ParallelConfig(sp=self.sp),
            data=DataConfig(segment_tokens=self.segment_tokens),
            optim=OptimConfig(segments_per_step=3 * self.ranks // self.sp),
            hardware=HardwareConfig(gpus=self.ranks),
            engine=EngineConfig(
                zero_stage=self.zero_stage,
                recompute=self.recompute,
                tile_mlp=self.tile_mlp,
                loss_chunk_tokens=128,
                deepspeed={"zero_optimization": zero},
            ),
        )

    @property
    def workload(self) -> Workload:
        """A short micro-batch and a long one."""
        parts = WorkloadPart(SHORT, 1, L0), WorkloadPart(LONG, 1, self.segment_tokens)
        return Workload(parts, 1, "a test", ())


class Compared(NamedTuple):
    """Peak bytes of rank 0."""

    rehearsed: dict[Phase, int]
    measured: dict[Phase, int]
    planned: float

    @property
    def worst(self) -> float:
        """The ratio rehearsed / measured of the phase in which it is farthest from 1."""
        return max(
            (self.rehearsed[phase] / found for phase, found in self.measured.items()), key=lambda one: abs(one - 1)
        )

    @property
    def peaks(self) -> tuple[int, int]:
        """(rehearsed, measured) peak of the step."""
        return max(self.rehearsed.values()), max(self.measured.values())


def compared(cases: Sequence[Case], run: Callable[..., list[Any]]) -> list[Compared]:
    """Cases of the same number of ranks; ``run`` launches ranks, as ``run_ranks``."""
    found = run(measured, cases[0].ranks, cases)[0]
    return [Compared(rehearsed(case), one, planned(case)) for case, one in zip(cases, found, strict=True)]


def rehearsed(case: Case) -> dict[Phase, int]:
    """Peak bytes of each phase, as a rehearsal sees them."""
    from lr2train.planning.counts import hf_config_of
    from lr2train.planning.timeline import phases_of
    from lr2train.rehearse import rehearsed as rehearse

    config = case.config()
    timeline = rehearse(config, hf_config_of(config.model), case.workload, kernel_name="cpu_flash").timeline
    peaks = {phase: timeline.peak_of(*phase) for phase in phases_of(timeline.moments)}
    return {phase: peak.total for phase, peak in peaks.items() if peak}


def planned(case: Case) -> float:
    """Peak bytes, as ``plan`` estimates them."""
    from lr2train.planning.counts import counts_of, hf_config_of
    from lr2train.planning.memory import RUNTIME_BYTES, MemorySetting, gpu_bytes, training_items

    config = case.config()
    counts = counts_of(hf_config_of(config.model), config.model)
    return gpu_bytes(training_items(counts, MemorySetting.of(config))) - RUNTIME_BYTES


def measured(rank: int, world: int, cases: Sequence[Case]) -> list[dict[Phase, int]]:
    """Peak bytes of each phase of a step on this rank, for each case. The body of a launch of ``run_ranks``."""
    from lr2train.training.deepspeed.start import start_deepspeed

    start_deepspeed(torch.device("cpu"))
    found = []
    for case in cases:
        found.append(_measured(case))
        gc.collect()
    return found


def _measured(case: Case) -> dict[Phase, int]:
    """Of the last step. Its first micro-batch is that of the first step, with the optimizer's moments added: only
    there DeepSpeed learns the order of modules.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    from lr2train.model import load
    from lr2train.parallel.mesh import make_mesh
    from lr2train.rehearse import FIRST, segment_of
    from lr2train.rope.methods import METHODS
    from lr2train.training.deepspeed.engine import Engine
    from lr2train.training.deepspeed.rehearsed import Watched

    config, mesh = case.config(), make_mesh(case.sp)
    hf_config = load.config_of(config.model)
    short, long = (segment_of(config, part) for part in case.workload.parts)

    def enter(phase: str, name: str) -> None:
        with record_function(f"phase {phase} {name}"):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, _Settled():
        factors = METHODS["none"](load.spectrum_of(hf_config, config.model), L0)
        engine = Engine(config, mesh, factors, hf_config, torch.device("cpu"))
        own = engine._engine
        for _ in range(STEPS):
            engine._engine = Watched(own, [FIRST, SHORT, LONG], enter)
            engine.step([short, short, long], lr=1e-4)
        enter("after", "")
    peaks = list(_peaks(profiler.profiler.kineto_results.experimental_event_tree()))
    moments = _moment_bytes(own.optimizer)
    own.destroy()
    a_step = len(peaks) // STEPS
    first = {phase: peak + moments for phase, peak in peaks[:a_step] if phase[1] == FIRST}
    return first | {phase: peak for phase, peak in peaks[-a_step:] if phase[1] != FIRST}


def _moment_bytes(optimizer: Any) -> int:
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    return sum(x.nbytes for state in states for x in state.values() if isinstance(x, torch.Tensor))


class _Settled(TorchDispatchMode):
    """Ends every collective before the thread goes on, and waits until gloo's own thread has let go of its tensors.

    Else that thread may be the one that releases them, which the profiler does not see.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator."""
        if func.namespace != "c10d" or "send" in str(func) or "recv" in str(func):  # these have no thread of gloo's
            return func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        before = [x._use_count() for x in tensors]
        made = self._ended(func(*args, **(kwargs or {})))
        given = [id(x) for x in tree_leaves(made)]
        deadline = time.monotonic() + 10
        while any(x._use_count() > n + given.count(id(x)) for x, n in zip(tensors, before, strict=True)):
            os.sched_yield()
            assert time.monotonic() < deadline, func
        return made

    def _ended(self, made: Any) -> Any:
        """Of an operator, with the work that has ended in the place of gloo's."""
        ended = torch.futures.Future()
        ended.set_result(None)
        leaves, form = tree_flatten(made)
        for number, one in enumerate(leaves):
            if isinstance(one, torch.ScriptObject):
                dist.Work.unbox(one).wait()
                leaves[number] = _create_work_from_future(ended).boxed()
        return tree_unflatten(leaves, form)


def _peaks(events: list[Any]) -> Iterator[tuple[Phase, int]]:
    """The most that is allocated in each phase, in order of time; without gloo's own copies."""
    phase, peak, now = None, 0, 0
    alive: dict[int, int] = {}
    for event in sorted(_all(events), key=lambda one: one.start_time_ns):
        if event.name.startswith("phase "):
            if phase:
                yield phase, peak
            _, kind, name = event.name.split(" ")
            phase, peak = (kind, name), now
        elif event.tag.name == "Allocation" and event.extra_fields.alloc_size > 0 and not _of_gloo(event):
            assert event.extra_fields.ptr not in alive, event.extra_fields.ptr
            alive[event.extra_fields.ptr] = event.extra_fields.alloc_size
            now += event.extra_fields.alloc_size
            peak = max(peak, now)
        elif event.tag.name == "Allocation":
            now -= alive.pop(event.extra_fields.ptr, 0)


def _of_gloo(event: Any) -> bool:
    return event is not None and (event.name.startswith("c10d::") or _of_gloo(event.parent))


def _all(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _all(event.children)
