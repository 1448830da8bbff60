"""Step time with short-window distillation beside without, on two CPU ranks that share segments.

    python -m tools.bench.distill

Two engines of one job (gloo, ZeRO-3) make steps in turn. The medians of CPU time and of wall time are compared; a long
segment is not distilled, so its ratio is the noise of the machine. Takes a minute on an idle machine. The last lines
read ``name: value``.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # tests import their helpers from there

from ranks import run_ranks

STEPS, WARM_UP = 8, 2
TOKENS, VOCAB, L0, WEIGHT = 1024, 4096, 512, 0.5
ARCHITECTURE = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": L0,
    "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
Times = dict[tuple[float, str], tuple[float, float]]
"""(weight, window) -> median seconds of a step: CPU time of a rank, wall time."""


def timed(rank: int, world: int, base: Path) -> Times:
    """The times of both weights and windows on this rank."""
    import torch
    import torch.distributed as dist

    from lr2train.training.deepspeed.start import start_deepspeed

    start_deepspeed(torch.device("cpu"))
    engines = {weight: _engine(base, world, weight) for weight in (0.0, WEIGHT)}
    found: dict[tuple[float, str], list[tuple[float, float]]] = {}
    for _ in range(STEPS):
        for window in ("short", "long"):
            for weight, engine in engines.items():
                dist.barrier()
                cpu, wall = time.process_time(), time.perf_counter()
                engine.step([_segment(window)], lr=1e-4)
                seconds = time.process_time() - cpu, time.perf_counter() - wall
                found.setdefault((weight, window), []).append(seconds)
    medians = {
        key: [statistics.median(kind) for kind in zip(*all_[WARM_UP:], strict=True)] for key, all_ in found.items()
    }
    return {key: (cpu, wall) for key, (cpu, wall) in medians.items()}


def _engine(base: Path, world: int, weight: float):
    import torch

    from lr2train.config import Config, EngineConfig, ModelConfig, OptimConfig, ParallelConfig
    from lr2train.model import load
    from lr2train.parallel.mesh import make_mesh
    from lr2train.rope import METHODS, Spectrum
    from lr2train.training.deepspeed.engine import Engine

    config = Config(
        name="bench",
        model=ModelConfig(path=str(base)),
        parallel=ParallelConfig(sp=world),
        optim=OptimConfig(segments_per_step=1, distill_short=weight),
        engine=EngineConfig(loss_chunk_tokens=512),
    )
    factors = METHODS["longrope2"](Spectrum(64, 10000.0, L0), TOKENS, critical_index=12, tail=[2.0])
    return Engine(config, make_mesh(world), factors, load.config_of(config.model), torch.device("cpu"))


def _segment(window: str):
    import numpy as np
    from batches import batch_of_labels

    spans = ((0, TOKENS),) if window == "long" else tuple((at, at + L0) for at in range(0, TOKENS, L0))
    tokens = np.random.default_rng(0).integers(0, VOCAB, TOKENS).astype(np.int32)
    labels = np.append(tokens[1:], -100)
    labels[[stop - 1 for _, stop in spans]] = -100
    return batch_of_labels(tokens, labels, spans, window)


def main() -> int:
    """Run and print; the exit status."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURE)).save_pretrained(base)
        times: Times = run_ranks(timed, 2, base, tmp_path=Path(folder), timeout_s=600)[0]
    for window in ("short", "long"):
        for number, kind in enumerate(("cpu", "wall")):
            with_it, without = times[WEIGHT, window][number], times[0.0, window][number]
            print(f"{window}_{kind}_s: {without:.3f} -> {with_it:.3f}\n{window}_{kind}_ratio: {with_it / without:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
