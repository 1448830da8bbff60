"""train: continue pretraining on mixed context windows, or train a tiny base model from scratch.

    deepspeed --no_local_rank --module lr2train train experiment=tiny_4k name=first

Repeated, it resumes. Writes ``runs/<name>/``: metrics.jsonl, checkpoints/, factors.json, model/ (a Hugging Face
folder), train.steps.json (see lr2train.training.steps), train.json.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lr2train import io, ranks, run
from lr2train.attention import hf as attention
from lr2train.cli.door import main
from lr2train.config import Config, LongPositions, UserError
from lr2train.data.corpus import Corpus
from lr2train.data.feed.loader import make_loader
from lr2train.model import load, tiled_mlp
from lr2train.parallel import control, processes
from lr2train.parallel.failure import told_to_all
from lr2train.parallel.inputs import identities
from lr2train.parallel.mesh import Mesh, make_mesh
from lr2train.planning.counts import counts_of
from lr2train.planning.memory import GIB, MemorySetting, choose_recompute
from lr2train.rope.factors import Factors
from lr2train.rope.methods import build
from lr2train.training import model_folder
from lr2train.training.deepspeed.checkpoint import Checkpoints
from lr2train.training.deepspeed.engine import Engine
from lr2train.training.deepspeed.keys import refuse_keys
from lr2train.training.deepspeed.saving import finished_at_the_end
from lr2train.training.deepspeed.start import start_deepspeed
from lr2train.training.loop import Training, fit
from lr2train.training.metrics import read_jsonl, sinks
from lr2train.training.profiling import KEY as PROFILE_STEPS
from lr2train.training.settling import Settling
from lr2train.training.steps import FILE, StepRanges, Steps
from lr2train.training.validation import HeldOut

GROUPS = ("name", "seed", "model", "rope", "data", "parallel", "optim", "engine")


@told_to_all()
def train(config: Config) -> dict[str, Any]:
    """Run the verb; returns the content of ``train.json``.

    Raises:
        UserError: the input is wrong; on every rank.
        Interrupted: the job was asked to stop, and its checkpoint is written; on every rank.
    """
    job = run.open_run(config, "train", GROUPS)
    inputs = checked_inputs(config)
    device = processes.start(config)
    attention.refuse_device(inputs.hf_config, getattr(torch, config.model.dtype), device)
    # An error is told first, then the checkpoint in hand is finished, then the folder is free.
    with control.on_rank_0(job.lock) or contextlib.nullcontext(), finished_at_the_end(), told_to_all():
        contents = _contents(job, config, inputs)
        if (finished := _finished(job, config)) is not None:
            return finished
        _verify(inputs.corpus, config)
        training = _build(job, config, inputs, contents, device)
        done = _resume(job, training, inputs.factors)
        training = replace(training, settling=Settling.resume(config, training.total_steps, training.folder, done))
        started = time.monotonic()
        _fit(job, training, done)
        _write_model(job, training, inputs)
        result = _write_result(job, training, time.monotonic() - started)
        processes.stop()
    return result


# ---- check ----


class TrainInputs(NamedTuple):
    """The inputs of a training run, each checked against the others."""

    hf_config: Any  # transformers'
    factors: Factors
    corpus: Corpus


def checked_inputs(config: Config) -> TrainInputs:
    """Read the inputs and refuse a wrong one before any process group or weight exists.

    Raises:
        UserError: a key is wrong, or model, factors and corpus do not fit each other.
    """
    refuse_keys(config.engine.deepspeed)
    StepRanges.parse(config.logger.profile_steps, PROFILE_STEPS)
    hf_config = load.config_of(config.model)
    if config.data.path is None:
        raise UserError(
            "data.path is empty; set data.path to a folder that `lr2train prepare` wrote, such as runs/corpus"
        )
    corpus = Corpus.open(Path(config.data.path))
    corpus.refuse_other_tokenizer(hf_config.vocab_size, load.folder_of(config.model) if config.model.path else None)
    length, longest = config.data.segment_tokens, _longest_span_tokens(config)
    attention.refuse_config(hf_config, config.parallel, length, longest, processes.ranks_per_node())
    attention.tell_windows(hf_config, longest)
    tiled_mlp.refuse_config(hf_config, config.engine.tile_mlp)
    factors = build(config.rope, load.spectrum_of(hf_config, config.model))
    if config.data.long_positions == LongPositions.skip:
        attention.refuse_jumps(hf_config, factors.target_window_tokens)
    model_folder.config_values(hf_config, factors)  # factors without a form in config.json are refused now
    return TrainInputs(hf_config, factors, corpus)


def _longest_span_tokens(config: Config) -> int:
    if config.data.kind == "segments":
        return config.data.segment_tokens
    return max((stage.length_tokens for stage in config.data.stages), default=0)


def _contents(job: run.Run, config: Config, inputs: TrainInputs) -> dict[str, Any]:
    """Fingerprints of the inputs' contents. A collective.

    Raises:
        UserError: an input has other contents than at the first start; on every rank.
    """
    base = {} if config.model.path is None else {"model": load.files_of(load.folder_of(config.model))}
    return identities(
        job, {"corpus": inputs.corpus.fingerprint, "factors": io.fingerprint(inputs.factors.to_json())}, base
    )


def _finished(job: run.Run, config: Config) -> dict[str, Any] | None:
    """The result of a finished run; None where work is left.

    Work is left if more steps are asked for and the run had not settled, if the run goes back to a step, or if the
    model folder is gone.
    """
    file = job.folder / "train.json"
    result = control.from_rank_0(
        _result_in(file) if ranks.rank() == 0 and (job.folder / "model" / "config.json").exists() else None
    )
    more = result is not None and config.optim.steps > result["steps"] and not result.get("settled")
    if result is None or more or config.engine.resume_from is not None:
        return None
    job.log(f"already finished: {file}")
    return result


def _result_in(file: Path) -> dict[str, Any] | None:
    """The result in ``train.json``; None where a power cut damaged the file.

    The run is then finished once more from its last checkpoint.
    """
    try:
        found = io.read_json(file)
    except UserError:
        return None
    return found if isinstance(found, dict) and "steps" in found else None


def _verify(corpus: Corpus, config: Config) -> None:
    first_of_machine = int(os.environ.get("LOCAL_RANK", 0)) == 0  # the full reading once a machine
    control.together(lambda: corpus.verify(full=config.data.verify and first_of_machine))


# ---- build ----


def _build(
    job: run.Run, config: Config, inputs: TrainInputs, contents: dict[str, Any], device: torch.device
) -> Training:
    """Build the parts of a run and claim its folder; no checkpoint is read. A collective.

    Raises:
        UserError: the parts do not fit the ranks or each other; on every rank, and the folder is not claimed.
    """
    hf_config, factors, _ = inputs
    if config.engine.deterministic:
        processes.add_in_a_fixed_order()
    start_deepspeed(device)
    ring = attention.ring_ranks(hf_config, config.parallel, processes.ranks_per_node())
    mesh = make_mesh(config.parallel.sp, config.parallel.timeout_s, ring)
    steps = Steps.settle(job.folder, config.data, mesh.dp_size, config.optim.segments_per_step)
    loader = make_loader(
        inputs.corpus,
        steps.applied(config.data),
        config.seed,
        mesh.dp_rank,
        mesh.dp_size,
        config.optim.segments_per_step,
        original_window_tokens=factors.spectrum.window_tokens,
        target_window_tokens=factors.target_window_tokens if config.data.kind == "segments" else None,
    )
    engine = Engine(_with_recompute(job, config, hf_config, mesh, device), mesh, factors, hf_config, device)
    total_steps = config.optim.steps or loader.steps_per_epoch
    held_out = HeldOut.prepare(config, inputs.corpus, engine, factors)
    settling = Settling(config, total_steps)  # knows its measurements when the checkpoint is read
    if config.optim.settle_validations and settling.measured not in held_out.names:
        raise UserError(
            f"optim.settle_validations={config.optim.settle_validations} looks at the held-out loss of the long "
            "window, which is not measured here; set optim.settle_validations to 0"
        )
    job.claim(contents)
    fingerprint = control.from_rank_0(job.fingerprint if ranks.rank() == 0 else "")
    checkpoints = Checkpoints(job.folder / "checkpoints", fingerprint, config.engine.keep_checkpoints)
    return Training(config, job.folder, engine, loader, steps, total_steps, checkpoints, held_out, settling)


def _with_recompute(job: run.Run, config: Config, hf_config: Any, mesh: Mesh, device: torch.device) -> Config:
    """The config with what ``engine.recompute=auto`` stands for, the same on every rank. A collective."""
    if config.engine.recompute != "auto":
        return config
    if device.type == "cuda":
        setting = replace(MemorySetting.of(config), world=mesh.world, gpus_per_node=processes.ranks_per_node())
        gpu_gib = torch.cuda.get_device_properties(device).total_memory / GIB
        chosen, why = control.from_rank_0(choose_recompute(counts_of(hf_config, config.model), setting, gpu_gib))
    else:
        chosen, why = "keep_attention", "a CPU has memory to spare"
    job.log(f"engine.recompute=auto takes {chosen}: {why}")
    return replace(config, engine=replace(config.engine, recompute=chosen))


def _resume(job: run.Run, training: Training, factors: Factors) -> int:
    """Read the checkpoint, if there is one, and write what the run goes on with; returns the steps done. A collective.

    Raises:
        UserError: the checkpoint cannot be used, or the config does not follow from the steps done; on every rank.
    """
    resume_from = training.config.engine.resume_from
    done = training.engine.load(training.checkpoints, resume_from, lambda done: _refuse_start(job, training, done))
    job.write_json(FILE, training.steps.to_json())
    _announce(job, training, factors, done)
    job.write_json("factors.json", factors.to_json())
    return done


def _refuse_start(job: run.Run, training: Training, done: int) -> None:
    """Refuse to go on from ``done`` steps where the config does not follow from them.

    Raises:
        UserError: other steps were skipped, more steps are done than asked for, or a finished run has lost its
            checkpoints; on every rank.
    """
    training.steps.refuse_other_past(done)
    if done > training.total_steps:
        raise UserError(
            f"optim.steps={training.total_steps} is below the {done} steps that the run has done; set optim.steps to "
            f"{done} or more"
        )
    finished = control.from_rank_0((job.folder / "train.json").exists() if ranks.rank() == 0 else False)
    if finished and not done:
        raise UserError(
            f"{job.folder} holds a finished run without its checkpoints, so no run can go on from it; choose another "
            "name="
        )


def _announce(job: run.Run, training: Training, factors: Factors, done: int) -> None:
    engine, config = training.engine, training.config
    # ds_numel: the whole one under ZeRO-3.
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
    mesh = engine.mesh
    job.log(
        f"{parameters / 1e6:.2f}M parameters, window {factors.spectrum.window_tokens} -> "
        f"{factors.target_window_tokens} by {factors.method}, "
        f"{mesh.world} rank{'s' * (mesh.world > 1)} (dp {mesh.dp_size} x sp {mesh.sp_size}), "
        f"ZeRO-{config.engine.zero_stage}, "
        f"{training.total_steps} steps of {config.optim.segments_per_step} segments"
        + (f", resuming after step {done}" if done else "")
    )


# ---- fit ----


def _fit(job: run.Run, training: Training, done: int) -> None:
    """Train to the last step. A collective.

    Raises:
        Interrupted: the job was asked to stop, and its checkpoint is written; on every rank.
        UserError: too many steps in a row are not finite; on every rank.
    """
    outputs = sinks(training.config, job.folder, done)
    ended = fit(training, done, outputs)
    if not ended:
        run.note_interrupt()
    for output in outputs:
        output.close()
    processes.wait_for_all(training.config.parallel.timeout_s)  # rank 0 may still close its dashboards
    if not ended:
        job.log("interrupted; the checkpoint is written, run the same command again to go on")
        raise run.Interrupted


# ---- write ----


def _write_model(job: run.Run, training: Training, inputs: TrainInputs) -> None:
    """Write ``model/``: weights, config.json with the factors, tokenizer. A collective."""
    hf_config, factors, corpus = inputs
    model = training.config.model
    training.engine.write_model(
        job.folder / "model",
        model_folder.config_values(hf_config, factors),
        lambda folder: model_folder.write_companions(model, corpus.tokenizer_folder, factors, folder),
    )


def _write_result(job: run.Run, training: Training, seconds: float) -> dict[str, Any]:
    """Write ``train.json``, which marks the run as finished; returns its content. A collective."""
    lines = read_jsonl(job.folder / "metrics.jsonl") if ranks.rank() == 0 else []
    last = {"loss": None, "tokens_seen": 0, "peak_gib": 0.0} | (lines[-1] if lines else {})
    settling = training.settling
    result = {
        "steps": settling.end,
        "settled": None if settling.step is None else f"after step {settling.step}: {settling.reason}",
        "final_loss": last["loss"],
        "bad_steps": last.get("bad_steps", 0),
        "tokens_seen": last["tokens_seen"],
        "seconds": seconds,
        "world": training.engine.mesh.world,
        "peak_gib": last["peak_gib"],
        "model": os.path.abspath(job.folder / "model"),
        "base": job.values["model"]["path"],
        "corpus": job.values["data"]["path"],
    }
    job.write_json("train.json", result)
    dist.barrier()  # no rank leaves before the result is written
    loss = "" if result["final_loss"] is None else f"loss {result['final_loss']:.4f} "
    job.log(f"done: {loss}after {settling.end} steps, model in {job.folder / 'model'}")
    return result


if __name__ == "__main__":
    main("train", train)
