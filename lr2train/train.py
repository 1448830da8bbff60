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
from lr2train.cli.door import main
from lr2train.config import Config, ModelConfig, UserError
from lr2train.data.corpus import Corpus
from lr2train.data.feed.loader import make_loader
from lr2train.model import load
from lr2train.parallel import control, processes
from lr2train.parallel.failure import told_to_all
from lr2train.parallel.inputs import identities
from lr2train.parallel.mesh import make_mesh
from lr2train.rope import hf as rope_hf
from lr2train.rope.factors import Factors
from lr2train.rope.methods import build
from lr2train.training.deepspeed.checkpoint import Checkpoints
from lr2train.training.deepspeed.engine import Engine, start_deepspeed
from lr2train.training.deepspeed.keys import refuse_keys
from lr2train.training.loop import fit
from lr2train.training.metrics import bad_steps_in, read_jsonl, sinks
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
    device = processes.start(config)
    lock = control.on_rank_0(job.lock)
    found = identities(job, {"corpus": corpus.fingerprint, "factors": io.fingerprint(factors.to_json())}, _base(config))
    if (finished := _finished(job, config)) is not None:
        return finished
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
    job.claim(found)
    checkpoints = Checkpoints(
        job.folder / "checkpoints", control.from_rank_0(job.fingerprint if run.rank() == 0 else ""), config.engine.keep_checkpoints
    )
    done = engine.load(checkpoints, config.engine.resume_from, lambda done: _refuse_start(job, steps, done, total_steps))
    job.write_json(FILE, steps.to_json())
    _announce(job, config, engine, factors, total_steps, done)
    job.write_json("factors.json", factors.to_json())
    start = time.monotonic()
    outputs = sinks(config, job.folder, done)
    ended = fit(engine, loader, config, steps.skips, done, total_steps, outputs, checkpoints, bad_steps_in(outputs))
    for output in outputs:
        output.close()
    dist.barrier()  # a launcher kills the other ranks as soon as one leaves, and rank 0 may still close its dashboards
    if not ended:
        job.log("interrupted; the checkpoint is written, run the same command again to go on")
        sys.exit(130)
    _write_model(job, engine, factors, hf_config, corpus, config.model)
    result = _result(job, config, total_steps, time.monotonic() - start, mesh.world)
    job.write_json("train.json", result)
    dist.barrier()
    loss = "" if result["final_loss"] is None else f"loss {result['final_loss']:.4f} "
    job.log(f"done: {loss}after {total_steps} steps, model in {job.folder / 'model'}")
    processes.stop()
    if lock is not None:
        lock.close()
    return result


def _base(config: Config) -> dict[str, list[Path]]:
    """The files of the base model, if there is one."""
    return {} if config.model.path is None else {"model": load.files_of(load.folder_of(config.model))}


def _finished(job: run.Run, config: Config) -> dict[str, Any] | None:
    """The result of a run that is finished; None where there is something to do: more steps than before, or a model that is gone."""
    file = job.folder / "train.json"
    result = control.from_rank_0(_result_in(file) if run.rank() == 0 and (job.folder / "model" / "config.json").exists() else None)
    if result is None or config.optim.steps > result["steps"] or config.engine.resume_from is not None:
        return None
    job.log(f"already finished: {file}")
    return result


def _refuse_start(job: run.Run, steps: Steps, done: int, total_steps: int) -> None:
    """Refuse to go on from ``done`` steps where what is asked for does not follow from them.

    Raises:
        UserError: on every rank.
    """
    steps.refuse_other_past(done)
    if done > total_steps:
        raise UserError(f"optim.steps={total_steps} is below the {done} steps that the run has done; set optim.steps to {done} or more")
    finished = control.from_rank_0((job.folder / "train.json").exists() if run.rank() == 0 else False)
    if finished and not done:
        raise UserError(f"{job.folder} holds a finished run without its checkpoints, so no run can go on from it; choose another name=")


def _result_in(file: Path) -> dict[str, Any] | None:
    """What a finished run has written; None where a power cut left nothing of it, and the end is reached once more from the last checkpoint."""
    try:
        found = io.read_json(file)
    except UserError:
        return None
    return found if isinstance(found, dict) and "steps" in found else None


def inputs(config: Config) -> tuple[Any, Factors, Corpus]:
    """The model's config, the factors and the corpus, each checked against the others before any process group or weight exists."""
    refuse_keys(config.engine.deepspeed)
    if config.engine.zero_stage == 0 and config.model.dtype != "float32":
        raise UserError(f"engine.zero_stage=0 trains in float32 alone, and model.dtype={config.model.dtype}; set engine.zero_stage to 1")
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
    companions = [*load.generation_files_of(model), *sorted(corpus.tokenizer_folder.iterdir())]
    window = factors.target_window_tokens
    engine.write_model(job.folder / "model", config, lambda folder: load.copy_companions(companions, folder, window))


def _result(job: run.Run, config: Config, total_steps: int, seconds: float, world: int) -> dict[str, Any]:
    lines = read_jsonl(job.folder / "metrics.jsonl") if run.rank() == 0 else []
    last = lines[-1] if lines else {"loss": None, "tokens_seen": 0, "peak_gib": 0.0}
    return {
        "steps": total_steps,
        "final_loss": last["loss"],
        "bad_steps": last.get("bad_steps", 0),
        "tokens_seen": last["tokens_seen"],
        "seconds": seconds,
        "world": world,
        "peak_gib": last["peak_gib"],
        "model": os.path.abspath(job.folder / "model"),
        "base": job.values["model"]["path"],
        "corpus": job.values["data"]["path"],
    }


if __name__ == "__main__":
    main("train", train)
