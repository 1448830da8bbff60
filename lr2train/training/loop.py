"""The training loop: batches in, steps done, figures out, checkpoints kept; safe to kill and to interrupt.

Choice: the loader is a pure function of the step, so the whole resume state is one number. A signal (Ctrl-C, a cluster's SIGTERM) ends the loop after the
step in hand, on all ranks together, with a checkpoint.
"""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch

from lr2train import io, run
from lr2train.config import Config
from lr2train.data.batch import Loader
from lr2train.data.feed.prefetch import prefetched
from lr2train.model.flops import training_flops
from lr2train.training.bad_steps import BadSteps
from lr2train.training.deepspeed.checkpoint import Checkpoints
from lr2train.training.deepspeed.engine import Engine, StepStats
from lr2train.training.metrics import Sink
from lr2train.training.schedule import learning_rate
from lr2train.training.steps import Skips


class Interrupt:
    """Remembers that the job was asked to stop."""

    asked = False


@contextmanager
def listen_for_interrupt() -> Iterator[Interrupt]:
    """Turn SIGINT, SIGTERM and SIGHUP into a flag for the time of the loop.

    A second Ctrl-C acts as usual. A second SIGTERM does not: schedulers repeat it, and it would strike in the middle of the checkpoint. SIGHUP
    stays ignored where ``nohup`` has it ignored.
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


def fit(
    engine: Engine,
    loader: Loader,
    config: Config,
    skips: Skips,
    done: int,
    total_steps: int,
    sinks: Sequence[Sink],
    checkpoints: Checkpoints,
    bad_before: int = 0,
) -> bool:
    """Train from step ``done`` to ``total_steps``, but for ``skips``; returns whether the end was reached (False: interrupted, checkpoint written).

    Raises:
        UserError: ``engine.max_bad_steps`` steps in a row, or the last one, have a loss or a gradient norm that is not finite.
    """
    bad = BadSteps(config.engine.max_bad_steps, bad_before)
    tokens_seen = (done - skips.until(done).count) * config.optim.segments_per_step * config.data.segment_tokens
    parameters = _multiplied_parameters(engine)
    steps, saved = skips.remaining(done, total_steps), done
    ahead = prefetched(loader.batches, steps, config.data.prefetch_steps, config.data.loader_threads)
    with listen_for_interrupt() as interrupt, closing(ahead) as batches:
        for step in run.progress(steps, total_steps, "train", total_steps - len(steps)):
            start = time.perf_counter()
            micro_batches = next(batches)
            waited = time.perf_counter() - start
            lr = learning_rate(step, total_steps, config.optim)
            stats = engine.step(micro_batches, lr, lambda: interrupt.asked)
            tokens_seen += stats.n_tokens
            seconds = time.perf_counter() - start
            flops = step_flops(stats, parameters, engine.hf_config)
            figures = _figures(stats, lr, tokens_seen, seconds, waited, flops, engine, config)
            for sink in sinks:
                sink.write(step + 1, {**figures, "bad_steps": bad.total + (not stats.finite)})
            bad.look(step, stats, loader)
            last = step == steps[-1]
            if last and bad.in_a_row:
                bad.give_up(step)
            due = _due(saved, step + 1, config.engine.checkpoint_every_steps)
            if (last or stats.interrupted or due) and not bad.in_a_row:
                engine.save(checkpoints, step + 1)
                saved = step + 1
            if stats.interrupted and not last:
                return False
    return True


def _due(saved: int, done: int, every: int) -> bool:
    """Whether a multiple of ``every`` was reached since the last checkpoint; the multiple itself may have been skipped."""
    return done // every > saved // every


def _multiplied_parameters(engine: Engine) -> int:
    """Parameters that every token is multiplied with: all but an embedding table of its own."""
    total = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
    c = engine.hf_config
    return total if getattr(c, "tie_word_embeddings", False) else total - c.vocab_size * c.hidden_size


def step_flops(stats: StepStats, parameters: int, hf_config: Any) -> float:
    """Forward and backward FLOPs of a step: 6 a parameter and token, and 12 a query-key pair, head dimension, head and layer (causal pairs only).

    Recomputation is overhead and not counted.
    """
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    pairs = stats.n_pairs * hf_config.num_hidden_layers * hf_config.num_attention_heads
    return training_flops(parameters, stats.n_tokens, pairs, head_dim)


def _figures(
    stats: StepStats, lr: float, tokens_seen: int, seconds: float, waited: float, flops: float, engine: Engine, config: Config
) -> dict[str, Any]:
    per_second = stats.n_tokens / seconds
    peak = config.hardware.gpu_bf16_tflops * 1e12 * engine.mesh.world
    return {
        **io.finite({"loss": stats.loss, "loss_short": stats.loss_short, "loss_long": stats.loss_long}),
        "n_target_tokens": stats.n_target_tokens,
        "tokens_seen": tokens_seen,
        "grad_norm": stats.grad_norm,
        "lr": lr,
        "tokens_per_s": per_second,
        "mfu": flops / seconds / peak if engine.device.type == "cuda" else None,
        "window_mix": stats.window_mix,
        "peak_gib": peak_gib(engine.device),
        "data_wait_s": waited,
        "step_s": seconds,
    }


def peak_gib(device: torch.device) -> float:
    """The most memory this process has held: the device's on CUDA, resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
