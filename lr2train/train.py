"""train: mid-train a model with mixed context windows, or a tiny base model from scratch.

    deepspeed --no_local_rank --module lr2train.train experiment=tiny_4k name=first

The same command resumes. Writes ``runs/<name>/``: metrics.jsonl, checkpoints/, factors.json, model/ (a Hugging Face folder), train.steps.json
(lr2train.training.steps), train.json.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lr2train import io, run
from lr2train.attention import hf as attention
from lr2train.config import Config, ModelConfig, UserError, main
from lr2train.data.corpus import Corpus
from lr2train.data.loader import make_loader
from lr2train.model import load
from lr2train.parallel import control, processes
from lr2train.parallel.failure import told_to_all
from lr2train.parallel.mesh import make_mesh
from lr2train.rope import hf as rope_hf
from lr2train.rope.factors import Factors
from lr2train.rope.methods import build
from lr2train.training.engine import Engine, start_deepspeed
from lr2train.training.loop import fit
from lr2train.training.metrics import read_jsonl, sinks
from lr2train.training.steps import FILE, Steps

GROUPS = ("name", "seed", "model", "rope", "data", "parallel", "optim", "engine")


@told_to_all()
def train(config: Config) -> dict[str, Any]:
    """Run the verb; returns what ``train.json`` holds.

    Raises:
        UserError: bad input, on every rank.
    """
    job = run.open_run(config, "train", GROUPS)
    hf_config, factors, corpus = inputs(config)
    fingerprints = _fingerprints(config, factors)
    job.refuse_other_inputs(fingerprints)
    if (job.folder / "train.json").exists():
        job.log(f"already finished: {job.folder / 'train.json'}")
        return io.read_json(job.folder / "train.json")
    device = processes.start(config)
    control.together(lambda: corpus.verify(full=config.data.verify and int(os.environ.get("LOCAL_RANK", 0)) == 0))  # once a machine
    start_deepspeed(device)
    ring = attention.ring_ranks(hf_config, config.parallel, processes.ranks_per_node())
    mesh = make_mesh(config.parallel.sp, config.parallel.timeout_s, ring)
    target = factors.target_window_tokens if config.data.kind == "segments" else None
    steps = Steps.settle(job.folder, config.data, mesh.dp_size, config.optim.segments_per_step)
    loader = make_loader(
        steps.applied(config.data),
        config.seed,
        mesh.dp_rank,
        mesh.dp_size,
        config.optim.segments_per_step,
        factors.spectrum.window_tokens,
        target,
    )
    engine = Engine(config, mesh, factors, hf_config, device)
    total_steps = config.optim.steps or loader.steps_per_epoch
    done = engine.load(job.folder / "checkpoints")
    steps.refuse_other_past(done)
    lock = job.claim(fingerprints)
    job.write_json(FILE, steps.to_json())
    _announce(job, config, engine, factors, total_steps, done)
    job.write_json("factors.json", factors.to_json())
    start = time.monotonic()
    outputs = sinks(config, job.folder, done)
    finished = fit(engine, loader, config, steps.skips, done, total_steps, outputs, job.folder)
    for output in outputs:
        output.close()
    if not finished:
        job.log("interrupted; the checkpoint is written, run the same command again to go on")
        sys.exit(130)
    _write_model(job, engine, factors, hf_config, corpus, config.model)
    result = _result(job, config, total_steps, time.monotonic() - start, mesh.world)
    job.write_json("train.json", result)
    dist.barrier()
    job.log(f"done: loss {result['final_loss']:.4f} after {total_steps} steps, model in {job.folder / 'model'}")
    processes.stop()
    if lock is not None:
        lock.close()
    return result


def _fingerprints(config: Config, factors: Factors) -> dict[str, str]:
    """What a resumed run has to find unchanged, whatever the paths say."""
    found = {
        "corpus": Corpus.open(config.data.path).fingerprint,
        "factors": io.fingerprint(factors.to_json()),
    }
    return found if config.model.path is None else {**found, "model": load.fingerprint(load.folder_of(config.model))}


def inputs(config: Config) -> tuple[Any, Factors, Corpus]:
    """The model's config, the factors and the corpus, each checked against the others before any process group or weight exists."""
    hf_config = load.config_of(config.model)
    if config.data.path is None:
        raise UserError("data.path is empty; set data.path to a folder that `python -m lr2train.prepare` wrote, such as runs/corpus")
    corpus = Corpus.open(Path(config.data.path))
    corpus.refuse_other_tokenizer(hf_config.vocab_size, load.folder_of(config.model) if config.model.path else None)
    longest = (
        config.data.segment_tokens if config.data.kind == "segments" else max((s.length_tokens for s in config.data.stages), default=0)
    )
    attention.refuse_config(hf_config, config.parallel, config.data.segment_tokens, longest, processes.ranks_per_node())
    factors = build(config.rope, load.spectrum_of(hf_config, config.model))
    if factors.target_window_tokens > factors.spectrum.window_tokens:
        rope_hf.write(load.plain_config(hf_config), factors)  # what could not be written afterwards is refused now
    return hf_config, factors, corpus


def _announce(job: run.Run, config: Config, engine: Engine, factors: Factors, total_steps: int, done: int) -> None:
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
    mesh = engine.mesh
    job.log(
        f"{parameters / 1e6:.2f}M parameters, window {factors.spectrum.window_tokens} -> {factors.target_window_tokens} by {factors.method}, "
        f"{mesh.world} ranks (dp {mesh.dp_size} x sp {mesh.sp_size}), ZeRO-{config.engine.zero_stage}, "
        f"{total_steps} steps of {config.optim.segments_per_step} segments" + (f", resuming after step {done}" if done else "")
    )


def _write_model(job: run.Run, engine: Engine, factors: Factors, hf_config: Any, corpus: Corpus, model: ModelConfig) -> None:
    config = load.plain_config(hf_config)
    if factors.target_window_tokens > factors.spectrum.window_tokens:
        config = rope_hf.write(config, factors)
    companions = [*load.talk_of(model), *sorted(corpus.tokenizer_folder.iterdir())]
    window = factors.target_window_tokens
    engine.write_model(job.folder / "model", config, lambda folder: load.copy_companions(companions, folder, window))


def _result(job: run.Run, config: Config, total_steps: int, seconds: float, world: int) -> dict[str, Any]:
    lines = read_jsonl(job.folder / "metrics.jsonl") if run.rank() == 0 else []
    last = lines[-1] if lines else {"loss": float("nan"), "tokens_seen": 0, "peak_gib": 0.0}
    return {
        "steps": total_steps,
        "final_loss": last["loss"],
        "tokens_seen": last["tokens_seen"],
        "seconds": seconds,
        "world": world,
        "peak_gib": last["peak_gib"],
        "model": str(job.folder / "model"),
        "base": config.model.path,
        "corpus": config.data.path,
    }


if __name__ == "__main__":
    main("train", train)
