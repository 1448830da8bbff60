"""search: find RoPE factors by needle-driven evolutionary search (paper, Section 3.2).

    deepspeed --no_local_rank --module lr2train.search experiment=tiny_4k name=factors        (or plain python, or torchrun)

Killed or interrupted, the same command goes on from its journal. Writes ``runs/<name>/``: journal.jsonl (every evaluation),
generations.jsonl, factors.json and search.json.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lr2train import run
from lr2train.config import Config, UserError, main
from lr2train.data.corpus import Corpus
from lr2train.data.needles import NeedleDocument, needle_set
from lr2train.evolution.fitness import NeedleFitness
from lr2train.evolution.genome import Space
from lr2train.evolution.loop import Generation, evolve
from lr2train.model import load, rotary
from lr2train.parallel import processes
from lr2train.rope.methods import METHODS

GROUPS = ("name", "seed", "model", "rope", "data", "search")


def search(config: Config) -> dict[str, Any]:
    """Run the verb; returns what ``search.json`` holds.

    Raises:
        UserError: bad input, on every rank.
    """
    job = run.open_run(config, "search", GROUPS)
    if (job.folder / "search.json").exists():
        job.log(f"already finished: {job.folder / 'search.json'}")
        return run.read_json(job.folder / "search.json")
    space, documents = inputs(config)
    job.refuse_other_inputs(_fingerprints(config))
    device = processes.start(config)
    model = load.load_whole(load.folder_of(config.model), config.model.dtype, str(device), config.model.overrides)
    table = rotary.install(model, METHODS["none"](space.spectrum, space.target_tokens))
    lock = job.claim(_fingerprints(config))
    fitness = NeedleFitness(model, table, space, documents, job.folder / "journal.jsonl")
    _announce(job, config, space, fitness)
    start = time.monotonic()
    best = _run_generations(config, space, fitness, job)
    result = _result(config, best, fitness, time.monotonic() - start)
    job.write_json("factors.json", space.factors(best.best.candidate).to_json())
    job.write_json("search.json", result)
    job.log(
        f"done: needle perplexity {best.best.perplexity:.4f} at rcd {result['critical_index']}, attention factor "
        f"{result['attention_factor']:g}, "
        f"{fitness.document_forwards} document-forwards; factors in {job.folder / 'factors.json'}"
    )
    processes.stop()
    if lock is not None:
        lock.close()
    return result


def inputs(config: Config) -> tuple[Space, list[NeedleDocument]]:
    """The search space and the needle documents, before any process group or weight exists."""
    hf_config = load.config_of(config.model)
    if config.model.path is None:
        raise UserError("model.path is empty; set model.path to the pretrained model whose factors are searched")
    if config.data.path is None:
        raise UserError("data.path is empty; set data.path to a folder that `python -m lr2train.prepare` wrote, such as runs/corpus")
    spectrum = load.spectrum_of(hf_config, config.model)
    target = config.rope.target_window_tokens
    if target <= spectrum.window_tokens:
        raise UserError(
            f"rope.target_window_tokens={target} does not exceed the model's window of {spectrum.window_tokens}; set a longer target"
        )
    space = Space(spectrum, target, config.search, config.rope.attention_factor or 1.0)
    corpus, knobs = Corpus.open(Path(config.data.path)), config.search
    corpus.refuse_other_tokenizer(hf_config.vocab_size, load.folder_of(config.model))
    rng = run.stream(knobs.seed, "search", "needles")
    return space, needle_set(corpus, config.data.needles, knobs.documents, target, [knobs.depth], rng)


def _fingerprints(config: Config) -> dict[str, str]:
    """A journal tells nothing of other documents or another model, even under the same path."""
    return {"corpus": Corpus.open(config.data.path).fingerprint, "model": load.fingerprint(load.folder_of(config.model))}


def _announce(job: run.Run, config: Config, space: Space, fitness: NeedleFitness) -> None:
    knobs, (low, high), indices = config.search, space.bounds, space.critical_indices
    job.log(
        f"window {space.spectrum.window_tokens} -> {space.target_tokens}, rcd in {indices[0]} … {indices[-1]}, tail in [{low:g}, "
        f"{high:g}], {knobs.population} candidates x {knobs.generations} generations x {knobs.documents} documents"
        + (f"; {fitness.recovered} evaluations found in the journal" if fitness.recovered else "")
    )


def _run_generations(config: Config, space: Space, fitness: NeedleFitness, job: run.Run) -> Generation:
    lines = job.folder / "generations.jsonl"
    if run.rank() == 0:
        lines.unlink(missing_ok=True)  # replayed from the journal
    total, last = config.search.generations + 1, None
    for last in run.progress(evolve(space, fitness, config.search.seed), total, "search"):
        best = last.best
        if run.rank() == 0:
            with lines.open("a") as file:
                file.write(json.dumps(_line(last, fitness)) + "\n")
        job.log(
            f"generation {last.index}/{config.search.generations}: needle perplexity {best.perplexity:.4f}, rcd "
            f"{best.candidate.critical_index}, "
            f"tail {best.candidate.tail[0]:g} … {best.candidate.tail[-1]:g}, attention factor {best.candidate.attention_factor:g}, "
            f"{fitness.document_forwards} document-forwards"
        )
    assert last is not None
    return last


def _line(generation: Generation, fitness: NeedleFitness) -> dict[str, Any]:
    return {
        "generation": generation.index,
        "best_perplexity": generation.best.perplexity,
        "perplexities": [one.perplexity for one in generation.population],
        "critical_indices": [one.candidate.critical_index for one in generation.population],
        "attention_factors": [one.candidate.attention_factor for one in generation.population],
        "document_forwards": fitness.document_forwards,
    }


def _result(config: Config, last: Generation, fitness: NeedleFitness, seconds: float) -> dict[str, Any]:
    best = last.best
    return {
        "perplexity": best.perplexity,
        "critical_index": best.candidate.critical_index,
        "attention_factor": best.candidate.attention_factor,
        "tail": list(best.candidate.tail),
        "candidates": last.evaluated,
        "document_forwards": fitness.document_forwards,
        "seconds": seconds,
        "model": config.model.path,
        "corpus": config.data.path,
        "settings": asdict(config.search),
    }


if __name__ == "__main__":
    main("search", search)
