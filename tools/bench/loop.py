"""The training loop's overhead over a bare DeepSpeed loop, on two CPU ranks under ZeRO-3.

    python -m tools.bench.loop [--quick] [--profile FOLDER]

Ours is ``training.loop.fit``: loader, prefetch, comparison of the ranks, the engine's step, figures, ``metrics.jsonl``.
The bare loop is ``deepspeed.initialize`` and, for each micro-batch, forward, backward and step of the same module, with
the same attention, on tensors that are ready beforehand. Its one extra is reading the loss. Both have the same model,
optimizer, DeepSpeed config and batches.

A bare step runs right before and right after each of ours, on the same micro-batches. A figure is the median over steps
of our time over the mean of the two, by wall-clock time of the slower rank and by CPU time of both ranks. Noise is the
same figure of the bare step: the distance of the median of after / before from 1, plus half the width of the 95 %
interval of ours (``attention_overhead``).

A busy machine makes that noise larger than the overhead. So a second figure is taken inside our steps: the share of a
step outside DeepSpeed's forward, backward and step, by the clock (waiting for the other rank included) and by CPU time
of the main thread; the median over steps, on rank 0. ``--profile`` writes cProfile's statistics of our steps on rank 0.
"""

from __future__ import annotations

import argparse
import cProfile
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.bench.attention_overhead import _half_width
from tools.bench.figures import Figure, conclude, on_ranks

RANKS, WINDOW_TOKENS, BOUND = 2, 256, 1.03
MEASURES = ("clock", "cpu")


class Size(NamedTuple):
    """Size of the model, of its segments and of the measurement."""

    segment_tokens: int
    hidden: int
    layers: int
    steps: int


WHOLE, QUICK = Size(1024, 192, 4, 12), Size(512, 128, 2, 8)
WARM_UP = 3  # steps: memory is allocated, kernels are chosen, the prefetch of parameters is recorded


def main() -> int:
    """Measure; the exit status is 1 where the bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model; the bound is meant for the full one")
    parser.add_argument("--profile", type=Path, help="folder for cProfile's statistics")
    asked = parser.parse_args()
    # shares: of each of our steps the part outside DeepSpeed, by MEASURES
    rows, shares = on_ranks(_rank, RANKS, QUICK if asked.quick else WHOLE, asked.profile)
    print(f"our step {statistics.median(own[0] for _, own, _ in rows):.3f} s, by the clock")
    figures = []
    for index, by in enumerate(MEASURES):
        ratios = [2 * own[index] / (before[index] + after[index]) for before, own, after in rows]
        drift = statistics.median(after[index] / before[index] for before, _, after in rows)
        noise = abs(drift - 1) + _half_width(ratios)
        figures.append(Figure(f"loop_noise_{by}", noise))
        figures.append(Figure(f"loop_over_bare_{by}", statistics.median(ratios), at_most=BOUND + noise))
        outside = statistics.median(share[index] for share in shares)
        figures.append(Figure(f"loop_outside_deepspeed_{by}", outside, at_most=BOUND - 1))
    return conclude(figures)


Seconds = tuple[float, ...]
"""Seconds of one step, by MEASURES."""


Rows = list[tuple[Seconds, Seconds, Seconds]]
"""For each step: (bare step before, ours, bare step after)."""


def _rank(rank: int, folder: Path, size: Size, profile: Path | None, queue: Any) -> None:
    import torch
    import torch.distributed as dist

    from lr2train.training.deepspeed.start import start_deepspeed
    from lr2train.training.loop import fit
    from lr2train.training.metrics import Jsonl

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    start_deepspeed(torch.device("cpu"))
    training = _training(folder, size)
    beside = _Beside(
        _BareLoop(training), _Inside(training.engine._engine), cProfile.Profile() if profile and rank == 0 else None
    )
    beside.begin()
    fit(training, 0, [*([Jsonl(folder / "metrics.jsonl", 0)] if rank == 0 else []), beside])
    if profile and beside.profiler:
        profile.mkdir(parents=True, exist_ok=True)
        beside.profiler.dump_stats(profile / "fit.prof")
    if rank == 0:
        queue.put((beside.rows[WARM_UP:], beside.shares[WARM_UP:]))
    dist.barrier()
    dist.destroy_process_group()


def _training(folder: Path, size: Size) -> Any:
    """A run as ``train`` builds it, over a corpus of random tokens."""
    import torch
    import torch.distributed as dist

    from lr2train.config import Config, DataConfig, EngineConfig, ModelConfig, OptimConfig
    from lr2train.data.corpus import Corpus
    from lr2train.data.feed.loader import make_loader
    from lr2train.model import load
    from lr2train.parallel.mesh import make_mesh
    from lr2train.rope.methods import METHODS
    from lr2train.rope.spectrum import Spectrum
    from lr2train.training.deepspeed.checkpoint import Checkpoints
    from lr2train.training.deepspeed.engine import Engine
    from lr2train.training.loop import Training
    from lr2train.training.settling import Settling
    from lr2train.training.steps import Steps
    from lr2train.training.validation import HeldOut
    from tools.bench import synthetic

    if dist.get_rank() == 0:
        (folder / "corpus").mkdir()
        synthetic.make(folder / "corpus", 200 * size.segment_tokens, size.segment_tokens, WINDOW_TOKENS)
    dist.barrier()
    corpus = Corpus.open(folder / "corpus")
    architecture = {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": size.hidden, "intermediate_size": 3 * size.hidden,
        "num_hidden_layers": size.layers, "num_attention_heads": size.hidden // 32, "head_dim": 32,
        "num_key_value_heads": size.hidden // 64, "max_position_embeddings": WINDOW_TOKENS,
    }  # fmt: skip
    steps = size.steps + WARM_UP
    config = Config(
        name="bench",
        model=ModelConfig(architecture=architecture),
        data=DataConfig(path=str(folder / "corpus"), segment_tokens=size.segment_tokens),
        optim=OptimConfig(segments_per_step=2 * RANKS, steps=steps),
        engine=EngineConfig(checkpoint_every_steps=10**6, validate_every_steps=0),
    )
    mesh = make_mesh(1)
    factors = METHODS["yarn"](Spectrum(32, 10000.0, WINDOW_TOKENS), size.segment_tokens)
    loader = make_loader(corpus, config.data, 0, mesh.dp_rank, mesh.dp_size, config.optim.segments_per_step,
                         original_window_tokens=WINDOW_TOKENS, target_window_tokens=size.segment_tokens)  # fmt: skip
    engine = Engine(config, mesh, factors, load.config_of(config.model), torch.device("cpu"))
    held_out = HeldOut(engine, (), 0)
    settled = Steps.settle(folder, config.data, mesh.dp_size, config.optim.segments_per_step)
    checkpoints, settling = Checkpoints(folder / "checkpoints"), Settling(config, steps)
    return Training(config, folder, engine, loader, settled, steps, checkpoints, held_out, settling)


class _BareLoop:
    """A DeepSpeed engine of its own over the same model, and steps without ours."""

    def __init__(self, training: Any):
        import deepspeed
        import torch

        from lr2train.attention.hf import install
        from lr2train.model import load, recompute
        from lr2train.model.window_lm import WindowLM
        from lr2train.training.deepspeed.engine import _parameter_groups
        from lr2train.training.deepspeed.start import deepspeed_config, gather_whole, gathered, quiet, zero_init

        ours, config = training.engine, training.config
        ds_config = deepspeed_config(config, ours.accumulation)
        weights = load.scratch_weights(ours.hf_config, config.seed)
        init = lambda: zero_init(ds_config, ours.accumulation * RANKS)  # noqa: E731
        lm = load.assembled(ours.hf_config, "float32", weights, init, gathered(0))
        self.attention = install(lm, ours.mesh, "auto")
        model = WindowLM(lm, _factors_of(ours), config.engine.loss_chunk_tokens).train()
        gather_whole(recompute.install(lm, config.engine))
        optim = config.optim
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, optim.weight_decay), lr=1e-5, betas=tuple(optim.betas), eps=optim.eps
        )
        with quiet():
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
            )
        self.loader, self.ready = training.loader, {}

    def prepare(self, step: int) -> None:
        """Make the tensors of a step, as a data loader's workers would."""
        import torch

        from lr2train.training.segment import shard_of

        made = []
        for batch in self.loader.batches(step):
            attention = self.attention.segment(batch.spans, len(batch.tokens))
            shard = shard_of(batch, attention.layout, torch.device("cpu"))
            made.append((shard, attention, batch.window, batch.n_target_tokens))
        self.ready = {step: made}

    def step(self, step: int) -> float:
        """Forward, backward and step over the micro-batches; the mean loss."""
        total = 0.0
        for shard, attention, window, n_targets in self.ready[step]:
            loss = self.engine(*shard, segment_attention=attention, window=window)[0] / n_targets
            self.engine.backward(loss)
            self.engine.step()
            total += loss.item()
        return total / len(self.ready[step])


def _factors_of(engine: Any) -> Any:
    from lr2train.rope.methods import METHODS
    from lr2train.rope.spectrum import Spectrum

    return METHODS["yarn"](Spectrum(32, 10000.0, WINDOW_TOKENS), engine.config.data.segment_tokens)


class _Inside:
    """Adds up the seconds inside a DeepSpeed engine's forward, backward and step."""

    def __init__(self, engine: Any):
        self.taken = [0.0, 0.0]  # by the clock, and by CPU time of the main thread
        for name in ("forward", "backward", "step"):
            setattr(engine, name, self._timed(getattr(engine, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            began = _main_thread()
            try:
                return call(*given, **named)
            finally:
                self.taken = [
                    sum_ + now - then for sum_, now, then in zip(self.taken, _main_thread(), began, strict=True)
                ]

        return timed


class _Beside:
    """A metric sink: at the end of each of our steps it runs a bare one, and another before the next."""

    def __init__(self, bare: _BareLoop, inside: _Inside, profiler: cProfile.Profile | None):
        self.bare, self.inside, self.profiler = bare, inside, profiler
        self.rows: Rows = []
        self.shares: list[Seconds] = []

    def begin(self) -> None:
        """Before our first step."""
        self._before(0)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """After our step number ``step`` (the first is 1)."""
        if self.profiler:
            self.profiler.disable()
        own, whole = _since(self.mark), [now - then for now, then in zip(_main_thread(), self.began, strict=True)]
        self.shares.append(tuple(1 - part / all_ for part, all_ in zip(self.inside.taken, whole, strict=True)))
        after = self._timed(step - 1)
        self.rows.append((self.before, own, after))
        self._before(step)

    def _before(self, step: int) -> None:
        import torch.distributed as dist

        self.bare.prepare(step)
        self.before = self._timed(step)
        dist.barrier()
        self.inside.taken = [0.0, 0.0]
        self.mark, self.began = _now(), _main_thread()
        if self.profiler and len(self.rows) >= WARM_UP:
            self.profiler.enable()

    def _timed(self, step: int) -> Seconds:
        import torch.distributed as dist

        dist.barrier()
        mark = _now()
        self.bare.step(step)
        return _since(mark)

    def close(self) -> None:
        """Nothing is open."""


def _main_thread() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(mark: Sequence[float]) -> Seconds:
    """(wall-clock seconds of the slower rank, CPU seconds of all ranks) since ``mark``."""
    import torch
    import torch.distributed as dist

    taken = torch.tensor([now - then for now, then in zip(_now(), mark, strict=True)], dtype=torch.float64)
    dist.all_reduce(taken[:1], dist.ReduceOp.MAX)
    dist.all_reduce(taken[1:])
    return tuple(taken.tolist())


if __name__ == "__main__":
    sys.exit(main())
