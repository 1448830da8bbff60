"""Time that training stands still for a checkpoint; time to load one with checksums, over the time without.

    python -m tools.bench.checkpoint [--rounds 5] [--hidden 768]

Two CPU ranks write a ZeRO-3 checkpoint of a Llama with random weights and AdamW moments. Each round times a save that
is waited for, and how long a save that goes on beside training holds the caller. Then each round times one load without
the comparison with the manifest and one load with it. Files are first in the page cache; then the cache is dropped
before each load, where the process may do so. The last lines read ``name: value``. Exits with 1 where a bound is
missed.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANKS, BOUND = 2, 1.1  # a checked load takes at most 10 % longer
STILL_BOUND = 0.5  # of the time of a save that is waited for: a check of the numbers, a copy in memory, messages


def engine_with_moments(hidden: int) -> Any:
    """An engine with a Llama of random weights, and the moments that AdamW creates at the first gradient."""
    import torch

    from lr2train.config import Config, EngineConfig, ModelConfig, OptimConfig
    from lr2train.model import load
    from lr2train.parallel.mesh import make_mesh
    from lr2train.rope.methods import METHODS
    from lr2train.rope.spectrum import Spectrum
    from lr2train.training.deepspeed.engine import Engine
    from lr2train.training.deepspeed.start import start_deepspeed

    start_deepspeed(torch.device("cpu"))
    architecture = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": hidden, "intermediate_size": 3 * hidden,
        "num_hidden_layers": 8, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64,
        "head_dim": 64, "max_position_embeddings": 512,
    }  # fmt: skip
    model = ModelConfig(architecture=architecture)
    config = Config(name="bench", model=model, optim=OptimConfig(), engine=EngineConfig())
    factors = METHODS["none"](Spectrum(64, 10000.0, 512), 512)
    engine = Engine(config, make_mesh(1), factors, load.config_of(model), torch.device("cpu"))
    zero = engine._engine.optimizer
    for shard in zero.fp32_partitioned_groups_flat:
        shard.grad = torch.zeros_like(shard)
    zero.optimizer.param_groups[0]["params"] = list(zero.fp32_partitioned_groups_flat)
    zero.optimizer.step()
    zero.optimizer.param_groups[0]["params"] = []
    return engine


def stalls(rank: int, world: int, folder: Path, rounds: int, hidden: int) -> list[tuple[float, float, float]]:
    """(seconds of a save that is waited for, seconds that the other save holds the caller, seconds until it is on the
    disk) by round. In the first round memory and files are new.
    """
    import torch.distributed as dist

    from lr2train.training.deepspeed import checkpoint

    engine, of, found = engine_with_moments(hidden), checkpoint.Checkpoints(folder), []
    for number in range(rounds + 1):
        times = []
        for wait in (True, False):
            dist.barrier()
            begin = time.monotonic()
            engine.save(of, 2 * number + 2 - wait, wait=wait)
            dist.barrier()
            times.append(time.monotonic() - begin)
        engine.finish_saving()
        found.append((times[0], times[1], time.monotonic() - begin))
    return found[1:]


def measured(rank: int, world: int, folder: Path, rounds: int, hidden: int, cold: bool) -> list[tuple[float, float]]:
    """(seconds of an unchecked load, seconds of a checked load) by round."""
    import torch.distributed as dist

    from lr2train import io
    from lr2train.training.deepspeed import checkpoint, shard_files

    engine = engine_with_moments(hidden)
    of = checkpoint.Checkpoints(folder)
    engine.save(of, 1)
    files, check = io.sealed(folder / "step_00000001" / checkpoint.MANIFEST)["files"], shard_files.read_checked

    def read(folder: Path, files: dict, _: str) -> dict:
        """The same reading without a hash."""
        return {
            name: shard_files.opened(folder / name, mmap=False)
            for name, about in files.items()
            if about["rank"] == rank
        }

    found = []
    for _ in range(rounds):
        times = []
        for reading in (read, check):
            shard_files.read_checked = reading
            if cold and rank == 0:
                Path("/proc/sys/vm/drop_caches").write_text("1")
            dist.barrier()
            begin = time.monotonic()
            engine.load(of)
            dist.barrier()
            times.append(time.monotonic() - begin)
        found.append((times[0], times[1]))
    if rank == 0:
        print(
            f"{sum(about['bytes'] for about in files.values()) / 2**20:.0f} MiB in {len(files)} files", file=sys.stderr
        )
    return found


def still(rounds: int, hidden: int) -> list[Any]:
    """The figures of saving."""
    from tests.ranks import run_ranks
    from tools.bench.figures import Figure

    with tempfile.TemporaryDirectory() as folder:
        by_round = run_ranks(stalls, RANKS, Path(folder) / "c", rounds, hidden, tmp_path=Path(folder), timeout_s=900)[0]
    waited, held, whole = (statistics.median(times) for times in zip(*by_round, strict=True))
    share = statistics.median(b / a for a, b, _ in by_round)
    return [
        Figure("save_waited_for_s", waited),
        Figure("save_beside_training_stands_still_s", held),
        Figure("save_beside_training_on_disk_s", whole),
        Figure("stands_still_over_waited_for", share, at_most=STILL_BOUND),
    ]


def main() -> int:
    """Measure with a warm cache, and with a cold one where permitted; the exit status."""
    from tests.ranks import run_ranks
    from tools.bench.figures import Figure, conclude

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=768)
    given = parser.parse_args()
    figures = still(given.rounds, given.hidden)
    for name, cold in (("warm", False), ("cold", True)):
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(PermissionError):
            rounds = run_ranks(
                measured,
                RANKS,
                Path(folder) / "c",
                given.rounds,
                given.hidden,
                cold,
                tmp_path=Path(folder),
                timeout_s=600,
            )[0]
            without, checked = (statistics.median(times) for times in zip(*rounds, strict=True))
            figures += [
                Figure(f"{name}_load_s", without),
                Figure(f"{name}_checked_load_s", checked),
                Figure(f"{name}_checked_over_unchecked", statistics.median(b / a for a, b in rounds), at_most=BOUND),
            ]
    return conclude(figures)


if __name__ == "__main__":
    sys.exit(main())
