"""The training loop: read batches, make steps, record figures, write checkpoints. A kill or an interrupt at any point
loses no written step.

Choice: the loader is a pure function of the step, so the number of steps done is the whole resume state. A signal
(Ctrl-C, a cluster's SIGTERM) ends the loop after the step in hand, on all ranks together, with a checkpoint. A
checkpoint is written while the next steps run; only the last one, and the one of an interrupt, are waited for.
"""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lr2train import io, progress
from lr2train.config import Config
from lr2train.config.gpus import peak_tflops
from lr2train.data.batch import Loader
from lr2train.data.feed.prefetch import prefetched
from lr2train.model.flops import training_flops
from lr2train.training.bad_steps import BadSteps
from lr2train.training.deepspeed.checkpoint import Checkpoints
from lr2train.training.deepspeed.engine import Engine, StepStats
from lr2train.training.metrics import Brief, Sink, bad_steps_in
from lr2train.training.profiling import KEY, StepProfiler
from lr2train.training.settling import Settling
from lr2train.training.steps import StepRanges, Steps
from lr2train.training.validation import HeldOut


@dataclass(frozen=True)
class Training:
    """The parts of a run.

    Attributes:
        folder: of the run.
        total_steps: the step to train to, skipped steps included.
        settling: ends the run earlier.
    """

    config: Config
    folder: Path
    engine: Engine
    loader: Loader
    steps: Steps
    total_steps: int
    checkpoints: Checkpoints
    held_out: HeldOut
    settling: Settling


class Interrupt:
    """Remembers that the job was asked to stop."""

    asked = False


@contextmanager
def listen_for_interrupt() -> Iterator[Interrupt]:
    """Turn SIGINT, SIGTERM and SIGHUP into a flag while the loop runs.

    A second Ctrl-C acts as usual. A second SIGTERM does not: schedulers repeat the signal, which would strike in the
    middle of the checkpoint. SIGHUP stays ignored under ``nohup``.
    """
    interrupt, old = Interrupt(), {}

    def note(number: int, _: Any) -> None:
        interrupt.asked = True
        if number == signal.SIGINT:
            signal.signal(number, old[number])

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            old[number] = signal.signal(number, note)
    try:
        yield interrupt
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def fit(training: Training, done: int, sinks: Sequence[Sink]) -> bool:
    """Train from step ``done`` to the last one, skipped steps left out; a run that settles ends earlier.

    Returns:
        Whether the end was reached; False: interrupted, and the checkpoint is written.

    Raises:
        UserError: ``engine.max_bad_steps`` steps in a row, or the last step, have a loss or a gradient norm that is not
            finite; on every rank.
    """
    config, engine, loader, total_steps = training.config, training.engine, training.loader, training.total_steps
    skips = training.steps.skips
    bad = BadSteps(config.engine.max_bad_steps, bad_steps_in(sinks))
    tokens_seen = (done - skips.until(done).count) * config.optim.segments_per_step * config.data.segment_tokens
    parameters = _multiplied_parameters(engine)
    _say_missing_peak(engine.device)
    held_out, settling = training.held_out, training.settling
    steps, saved, before = skips.remaining(done, settling.end), done, done
    sinks = [*sinks, brief := Brief()]
    if not done and steps and held_out.measures:
        measured = held_out.measure(0)
        settling.note(0, measured)
        _write(sinks, 0, {"tokens_seen": 0, **measured})
    ahead = prefetched(loader.batches, steps, config.data.prefetch_steps, config.data.loader_threads)
    chosen = StepRanges.parse(config.logger.profile_steps, KEY)
    profiler = StepProfiler(chosen, steps, training.folder / "profile", engine.device)
    with listen_for_interrupt() as interrupt, closing(ahead) as batches, profiler:
        # Steps count from 0, files from 1.
        for step in progress.track(steps, total_steps, "train", total_steps - len(steps), brief.note):
            lr = settling.learning_rate(step)
            with profiler.step(step):
                start = time.perf_counter()
                micro_batches = next(batches)
                waited = time.perf_counter() - start
                stats = engine.step(micro_batches, lr, lambda: interrupt.asked)
                seconds = time.perf_counter() - start
            tokens_seen += stats.n_tokens
            flops = step_flops(stats, parameters, engine.hf_config)
            figures = _figures(stats, lr, tokens_seen, seconds, waited, flops, engine)
            figures["bad_steps"] = bad.total + (not stats.finite)
            if held_out.due(before, step + 1, settling.is_last(step, steps)):
                figures |= held_out.measure(step + 1)
                settling.note(step + 1, figures)
            last = settling.is_last(step, steps)
            before = step + 1
            _write(sinks, step + 1, figures)
            engine.check_saving()
            bad.look(step, stats, loader)
            if last and bad.in_a_row:
                bad.give_up(step)
            due = _due(saved, step + 1, config.engine.checkpoint_every_steps)
            if (last or stats.interrupted or due) and not bad.in_a_row:
                engine.save(training.checkpoints, step + 1, wait=last or stats.interrupted)
                saved = step + 1
            if stats.interrupted and not last:
                engine.finish_saving()
                return False
            if last:
                break
    return True


def _write(sinks: Sequence[Sink], step: int, figures: dict[str, Any]) -> None:
    for sink in sinks:
        sink.write(step, figures)


def _due(saved: int, done: int, every: int) -> bool:
    """Whether a multiple of ``every`` was reached since the last checkpoint; that step itself may be a skipped one."""
    return done // every > saved // every


def _multiplied_parameters(engine: Engine) -> int:
    """The parameters that every token is multiplied with: all but an untied embedding table, which is looked up."""
    total = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
    c = engine.hf_config
    return total if getattr(c, "tie_word_embeddings", False) else total - c.vocab_size * c.hidden_size


def step_flops(stats: StepStats, parameters: int, hf_config: Any) -> float:
    """Forward and backward FLOPs of a step: 6 per parameter and token, and 12 per query-key pair, head dimension, head
    and layer.

    Pairs are causal. Recomputation (activation checkpointing) is overhead and not counted.
    """
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    pairs = stats.n_pairs * hf_config.num_hidden_layers * hf_config.num_attention_heads
    return training_flops(parameters, stats.n_tokens, pairs, head_dim)


def _figures(
    stats: StepStats,
    lr: float,
    tokens_seen: int,
    seconds: float,
    waited: float,
    flops: float,
    engine: Engine,
) -> dict[str, Any]:
    per_second = stats.n_tokens / seconds
    peak = peak_of(engine.device)
    return {
        **io.finite({"loss": stats.loss, "loss_short": stats.loss_short, "loss_long": stats.loss_long}),
        **({} if stats.router_loss is None else io.finite({"router_loss": stats.router_loss})),
        **({} if stats.distill_loss is None else io.finite({"distill_loss": stats.distill_loss})),
        "n_target_tokens": stats.n_target_tokens,
        "tokens_seen": tokens_seen,
        "grad_norm": stats.grad_norm,
        "lr": lr,
        "tokens_per_s": per_second,
        "mfu": None if peak is None else flops / seconds / (peak * 1e12 * engine.mesh.world),
        "window_mix": stats.window_mix,
        "peak_gib": peak_gib(engine.device),
        "data_wait_s": waited,
        "step_s": seconds,
    }


def peak_of(device: torch.device) -> float | None:
    """Dense bf16 peak of the GPU that this rank runs on, TFLOP/s; None on a CPU, and for a GPU of unknown peak."""
    return peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _say_missing_peak(device: torch.device) -> None:
    if device.type == "cuda" and peak_of(device) is None:
        name = torch.cuda.get_device_name(device)
        progress.say("train", f"mfu is not reported, because the bf16 peak of {name} is unknown")


def peak_gib(device: torch.device) -> float:
    """The most memory that this process has held: device memory on CUDA, resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # ru_maxrss is in KiB
