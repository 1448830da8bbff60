"""search: find RoPE rescale factors by the perplexity of needles (paper, Section 3.2).

    deepspeed --no_local_rank --module lr2train search experiment=tiny_4k name=factors

Plain python and torchrun start it too.

The same command resumes a killed or interrupted search from its journal. Writes ``runs/<name>/``: journal.jsonl (every
evaluation), generations.jsonl, factors.json (with its provenance), search.json and pictures/.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from lr2train import io, progress, ranks, run
from lr2train.cli.door import main
from lr2train.config import Algorithm, Config, UserError
from lr2train.data.corpus import Corpus
from lr2train.evolution.descent import descend
from lr2train.evolution.documents import SearchDocument, digest, draw_documents
from lr2train.evolution.final import CandidateScorer, Confidence, Scored
from lr2train.evolution.fitness import Fitness
from lr2train.evolution.genome import Space
from lr2train.evolution.history import History, described
from lr2train.evolution.loop import evolve
from lr2train.model import load, rotary
from lr2train.parallel import control, processes
from lr2train.parallel.failure import told_to_all
from lr2train.parallel.inputs import identities
from lr2train.reporting.pictures import write_search_pictures
from lr2train.rope.factors import NOTES
from lr2train.rope.methods import METHODS
from lr2train.training.metrics import Dashboard, closing, dashboards, read_jsonl

# The config groups that decide the result. Threads are among them: sums by another number of threads differ in the last
# bits.
GROUPS = ("name", "seed", "device", "threads", "model", "rope", "data", "search")
PICTURES = ("factors.png", "fitness.png", "temperature.png", "documents.png")
ALGORITHMS: dict[str, Any] = {"gradient": descend, "evolution": evolve}


@told_to_all()
def search(config: Config) -> dict[str, Any]:
    """Run the verb; returns the contents of ``search.json``.

    Raises:
        UserError: bad input, or a folder that another job uses; raised on every rank.
    """
    job = run.open_run(config, "search", GROUPS)
    space, scored_on, corpus = inputs(config)
    device = processes.start(config)
    lock = control.on_rank_0(job.lock)
    known = {"corpus": corpus.fingerprint, "documents": digest(scored_on)}
    found = identities(job, known, {"model": load.files_of(load.folder_of(config.model))})
    if control.from_rank_0((job.folder / "search.json").exists() if ranks.rank() == 0 else False):
        return _finished(job)
    # once a machine
    control.together(lambda: corpus.verify(full=config.data.verify and int(os.environ.get("LOCAL_RANK", 0)) == 0))
    if device.type == "cpu" and not config.threads:
        torch.set_num_threads(1)  # the default depends on the number of ranks, and so would the last bits of the losses
    model, settings = _model(config, device), config.search
    table = rotary.install(model, METHODS["none"](space.spectrum, space.target_tokens))
    job.claim(found)
    journal = job.folder / "journal.jsonl"
    fitness = Fitness(
        model, table, space, scored_on, journal, chunk_tokens=settings.chunk_tokens, lockstep=settings.shard
    )
    history = History(settings, fitness, job.folder / "generations.jsonl")
    boards = control.on_rank_0(lambda: _dashboards(config, history)) or []
    _announce(job, space, fitness)
    start = time.monotonic()
    with closing(boards):
        finalists, confidence = _run(job, space, history, boards)
        result = {**history.result(finalists, confidence), "seconds": time.monotonic() - start, **_input_paths(job)}
        contents = {name: run.content_of(one) for name, one in found.items()}
        origin = {"inputs": contents, **run.provenance(), "history": history.brief()}
        _write(job, space, finalists[0], confidence, result, origin)
        _show(job, result, boards)
    processes.stop()
    if lock is not None:
        lock.close()
    return result


def _input_paths(job: run.Run) -> dict[str, Any]:
    return {"model": job.values["model"]["path"], "corpus": job.values["data"]["path"]}


def _finished(job: run.Run) -> dict[str, Any]:
    job.log(f"already finished: {job.folder / 'search.json'}")
    # A kill came after search.json and before the pictures.
    if ranks.rank() == 0 and not all((job.folder / "pictures" / name).exists() for name in PICTURES):
        write_search_pictures(job.folder)
    return io.read_json(job.folder / "search.json")


def inputs(config: Config) -> tuple[Space, list[SearchDocument], Corpus]:
    """The search space, the documents (of the generations, then of the final) and their corpus; no weight is read.

    Raises:
        UserError: a path is empty, the target window is not longer than the original window, or a setting of the search
            is out of its limits.
    """
    hf_config = load.config_of(config.model)
    if config.model.path is None:
        raise UserError("model.path is empty; set model.path to the pretrained model whose factors are searched")
    if config.data.path is None:
        raise UserError(
            "data.path is empty; set data.path to a folder that `lr2train prepare` wrote, such as runs/corpus"
        )
    spectrum = load.spectrum_of(hf_config, config.model)
    target = config.rope.target_window_tokens
    if target <= spectrum.window_tokens:
        raise UserError(
            f"rope.target_window_tokens={target} does not exceed the model's window of {spectrum.window_tokens} "
            "tokens; "
            "set rope.target_window_tokens to a longer window"
        )
    space = Space(spectrum, target, config.search, config.rope.start_from)
    corpus = Corpus.open(Path(config.data.path))
    corpus.refuse_other_tokenizer(hf_config.vocab_size, load.folder_of(config.model))
    return space, draw_documents(config, corpus), corpus


def _model(config: Config, device: torch.device) -> Any:
    if config.search.shard:
        from lr2train.training.deepspeed.scoring import load_sharded  # here: DeepSpeed takes seconds to import

        return load_sharded(config.model, device)
    return load.load_whole(load.folder_of(config.model), config.model.dtype, str(device), config.model.overrides)


def _announce(job: run.Run, space: Space, fitness: Fitness) -> None:
    settings, (low, high), indices = space.settings, space.bounds, space.critical_indices
    what = "all factors" if space.all_dims else f"rcd in {indices[0]} … {indices[-1]}, tail"
    asked = (
        f" with {settings.questions} of {settings.questions + settings.distractors} needles asked for"
        if settings.objective == "needle"
        else ""
    )
    own = " on top of the model's own table" if space.start.own_rescale else ""
    job.log(
        f"window {space.spectrum.window_tokens} -> {space.target_tokens}, {what} in [{low:g}, {high:g}]{own}, "
        f"{settings.most_forwards} document-forwards at most ({settings.algorithm}), {settings.documents} documents"
        f"{asked} and {settings.final_documents} for the final"
        + (f"; {fitness.recovered} evaluations found in the journal" if fitness.recovered else "")
        + (f"; damaged lines taken out of it: {fitness.damaged}" if fitness.damaged else "")
    )
    if settings.algorithm == Algorithm.gradient:
        job.log(
            "each generation of the descent reads other documents, so its perplexity rises and falls with them; the "
            "final scores the finalists on documents of their own"
        )


def _dashboards(config: Config, history: History) -> list[Dashboard]:
    """A search starts again from generation 0 and replays: the generations of earlier starts are shown already."""
    return dashboards(config, history.file.parent, "search", written_steps=len(read_jsonl(history.file)) - 1)


def _show(job: run.Run, result: dict[str, Any], boards: list[Dashboard]) -> None:
    """The finalists and the pictures on the dashboards."""
    head = ("perplexity", "documents", "critical_index", "attention_factor")
    rows = [[one[key] for key in head] for one in result["finalists"]]
    for board in boards:
        board.table("search/finalists", head, rows)
        for file in sorted((job.folder / "pictures").glob("*.png")):
            board.picture(f"search/{file.stem}", file)


def _run(
    job: run.Run, space: Space, history: History, boards: list[Dashboard]
) -> tuple[list[Scored], Confidence | None]:
    """Run all generations and the final; returns the finalists, best first, and how sure the winner is."""
    settings, fitness, finalists = space.settings, history.fitness, []
    scorer = CandidateScorer(space, fitness)
    with progress.meter("search, document-forwards", fitness.recovered) as tick:
        fitness.tell = lambda: tick(fitness.computed, history.expected_evaluations, history.note)
        for generation in ALGORITHMS[settings.algorithm](space, scorer, settings.seed):
            finalists = list(generation.population[: settings.top_k])
            fitness.refuse_broken_model()
            job.log(history.add(generation))
            for board in boards:
                board.write(generation.index, history.figures)
        return scorer.final(finalists)


def _write(
    job: run.Run,
    space: Space,
    best: Scored,
    confidence: Confidence | None,
    result: dict[str, Any],
    origin: dict[str, Any],
) -> None:
    kept = {
        key: result[key]
        for key in ("model", "corpus", "settings", "perplexity", "scored_documents", "confidence", "document_forwards")
    }
    job.write_json("factors.json", {**space.factors(best.candidate).to_json(), NOTES: {**kept, **origin}})
    job.write_json("search.json", result)
    if ranks.rank() == 0:
        write_search_pictures(job.folder)
    job.log(
        f"done: {space.settings.objective} perplexity {best.perplexity:.4f} on {best.documents} documents, "
        f"{described(best.candidate)}, {confidence or 'no comparison with a runner-up'}, "
        f"{result['document_forwards']} document-forwards; factors in {job.folder / 'factors.json'}, pictures beside"
    )


if __name__ == "__main__":
    main("search", search)
