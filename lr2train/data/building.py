"""The steps of ``prepare``: tokenizer, stores for each source, marks of duplicates; each is skipped where its result lies there.

Choice: what lies there is reused when all that decided it (config, files, tokenizer) is the same, so a run that was killed goes on where it
was; documents of another tokenizer are refused. Text comes before needles, because needles hide in it. Cost: the steps know each other's
results by fingerprints alone.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from lr2train.config import DataConfig, SourceConfig, UserError, to_dict
from lr2train.data import integrity, store
from lr2train.data import tokenizer as tokenizers
from lr2train.data.corpus import FORMAT, SOURCE, TOKENIZER, reopen, source_folder, source_store, store_prefix
from lr2train.data.ingest import dedup, encoding, sources
from lr2train.data.ingest.finding import Listing, reasons_in_words
from lr2train.data.ingest.learning import Lesson, learn
from lr2train.data.ingest.sealing import Sealer
from lr2train.data.ingest.textsource import REJECTS, TextSource, counts, example, held_and_trained, without
from lr2train.data.ingest.tokenizing import Setup, Task, is_held_out
from lr2train.data.ingest.workers import Workers
from lr2train.data.needles import N_KEYS, NeedleMaker, between, check_needles
from lr2train.data.plan import compose, mix
from lr2train.data.store import HOLDOUT, TRAIN
from lr2train.data.text import Text
from lr2train.data.tokenizer import Tokenizer
from lr2train.io import fingerprint as fingerprint_of
from lr2train.io import read_json, seal, write_json, write_text
from lr2train.run import stream

__all__ = ["check", "ensure_stores", "ensure_tokenizer", "is_held_out", "list_sources", "say_unread", "settled", "unread"]
Log = Callable[[str], None]
Listed = dict[str, Listing]
"""What each source of text has."""
NEEDLES = "needles"


def check(data: DataConfig, original_window_tokens: int) -> None:
    """Refuse a config that cannot be prepared, before anything is read.

    Raises:
        UserError: no sources, bad names, no text among them, knobs out of their limits, or windows that do not fit each other.
    """
    names = [source.name for source in data.sources]
    if not names:
        raise UserError("data.sources is empty; add a source such as {name: stdlib, kind: stdlib}")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.sources has the name {name!r} {names.count(name)} times; give each source a name of its own")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(f"data.sources has the name {name!r}, which becomes a folder; make it of letters, digits, - and _")
    if all(source.kind == NEEDLES for source in data.sources):
        raise UserError("data.sources has needles only, and needles hide in the text of other sources; add a source of text")
    if data.segment_tokens < original_window_tokens:
        raise UserError(
            f"data.segment_tokens={data.segment_tokens} is below the original window of {original_window_tokens}; set data.segment_tokens "
            "to that or more"
        )
    check_needles(data.needles)
    for source in data.sources:
        if source.kind == NEEDLES:
            _check_needle_source(source, data)
        else:
            sources.check(source)
    for window, budget in mix.budgets(data).items():
        if budget and not any(window in source.windows for source in data.sources):
            raise UserError(
                f"data.{window}_tokens={budget}, and no source has {window} among its windows; add {window} to data.sources.<name>.windows, "
                f"or set data.{window}_tokens=0"
            )
    compose.check(data, original_window_tokens)


def _check_needle_source(source: SourceConfig, data: DataConfig) -> None:
    sources.check_windows(source)
    for key in ("path", "target", "max_documents", "max_bytes", "max_tokens"):
        if getattr(source, key) is not None:
            raise UserError(
                f"data.sources.{source.name}.{key} does nothing for kind={NEEDLES}; set options.count and options.lengths_tokens"
            )
    options, where = _needle_options(source, data), f"data.sources.{source.name}.options"
    for key in ("max_pairs", "questions"):
        between(f"{where}.{key}", options[key], 1, N_KEYS)
    if options["count"] < 1 or not options["lengths_tokens"]:
        raise UserError(f"{where}: count={options['count']}, lengths_tokens={options['lengths_tokens']} make no document; set both")


def _needle_options(source: SourceConfig, data: DataConfig) -> dict[str, Any]:
    return sources.take_options(
        source,
        lengths_tokens=[data.segment_tokens],
        count=100,
        max_pairs=data.needles.max_pairs,
        questions=data.needles.max_questions,
        answers_only=True,
    )


def settled(data: DataConfig) -> DataConfig:
    """The config with paths that say the same in every folder."""
    files = [os.path.abspath(file) for file in data.decontaminate.files]
    return replace(
        data,
        sources=[sources.settled(source) for source in data.sources],
        tokenizer=None if data.tokenizer is None else os.path.abspath(data.tokenizer),
        decontaminate=replace(data.decontaminate, files=files),
    )


def list_sources(data: DataConfig) -> Listed:
    """What every source of text has, its shards in order.

    Raises:
        UserError: a path that is not there, an unknown option, nothing to read, or too much that cannot be opened.
    """
    return {source.name: sources.listing(source, data.shard_bytes) for source in data.sources if source.kind != NEEDLES}


def unread(listed: Listed) -> dict[str, dict[str, Any]]:
    """What could not be opened of each source, and what is passed over, as JSON values; sources of which all is read are left out."""
    found = {name: one.found for name, one in listed.items()}
    return {
        name: {"unread": one.about_unread(), "passed_over": one.about_others()}
        for name, one in found.items()
        if one.unread or one.others or one.again
    }


def say_unread(about: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each thing that a source has and that is not read, of what :func:`unread` returned."""
    for name, one in about.items():
        lost, over = one["unread"], one["passed_over"]
        if lost["reasons"]:
            what = reasons_in_words(lost["reasons"], lost["examples"])
            yield f"{name}: about {lost['files']} files with {lost['bytes']} bytes of text cannot be read: {what}"
        if over["files"]:
            kinds = ", ".join(f"{kind['files']} {end}" for end, kind in over["kinds"].items())
            yield f"{name}: passing over {over['files']} files of other kinds with {over['bytes']} bytes ({kinds})"
        if over["links"]:
            yield f"{name}: passing over {over['links']} links to what is read under another name, or to a folder that they lie in"


def ensure_tokenizer(folder: Path, data: DataConfig, listed: Listed, log: Log) -> Tokenizer:
    """The corpus' tokenizer: copied from ``data.tokenizer``, or trained on the sources.

    Raises:
        UserError: documents were tokenised with another one.
    """
    texts = [source for source in data.sources if source.kind != NEEDLES]
    shards = {name: one.shards for name, one in listed.items()}
    recipes = [
        [without(source, "weight", "max_broken_share"), sources.identity(source, shards.get(source.name, []))] for source in data.sources
    ]
    learned_from = [data.vocab_size, data.tokenizer_train_bytes, data.needles.wording, recipes]
    fingerprint = fingerprint_of(tokenizers.load(data.tokenizer).fingerprint if data.tokenizer else learned_from)
    stamp = "" if data.tokenizer else fingerprint_of([sources.stamps(of_one) for of_one in shards.values()])
    target, note = folder / TOKENIZER, folder / f"{TOKENIZER}.manifest.json"
    noted = read_json(note) if note.exists() else {}
    begun = any(folder.glob(f"store/*/{TRAIN}-*.json"))
    if noted.get("fingerprint") == fingerprint and (target / "tokenizer.json").exists() and (begun or noted.get("stamp") == stamp):
        found = tokenizers.load(str(target))  # where documents are there, their sources find out whether the text is the same
        if found.fingerprint == noted["tokenizer"]:
            return found
    elif noted and noted["fingerprint"] != fingerprint and begun:
        what = f"data.tokenizer={data.tokenizer}" if data.tokenizer else "what the tokenizer is trained on"
        raise UserError(
            f"{folder} holds documents of another tokenizer, because {what} has changed since; choose another name=, put it back, or remove "
            f"{folder / 'store'} to tokenise again"
        )
    reopen(folder)
    note.unlink(missing_ok=True)
    started = time.monotonic()
    if data.tokenizer:
        tokenizers.load(data.tokenizer).save(target)
    else:
        share = data.tokenizer_train_bytes // len(texts)
        wording = data.needles.wording if len(texts) < len(data.sources) else None
        learn(Lesson([(source, shards[source.name]) for source in texts], share, wording, data.vocab_size), target)
    made = tokenizers.load(str(target))
    if not data.tokenizer:
        log(f"trained a tokenizer of {made.vocab_size} entries in {time.monotonic() - started:.1f} s")
    write_json(note, {"fingerprint": fingerprint, "stamp": stamp, "tokenizer": made.fingerprint})
    return made


def ensure_stores(
    folder: Path, data: DataConfig, listed: Listed, tokenizer: Tokenizer, original_window_tokens: int, seed: int, log: Log
) -> list[dict[str, Any]]:
    """Stores for every source, text before needles; returns what they hold in the order of ``data.sources``.

    Raises:
        UserError: a source gives nothing, or too many broken records; its settings have changed since it was begun; a store is damaged.
    """
    backend = encoding.choose(tokenizer, data.tokenizer_backend, log)
    strict = data.tokenizer_backend == encoding.GIGATOKEN
    setup = Setup(folder, folder / TOKENIZER, backend, strict, data.holdout, original_window_tokens, data.decontaminate)
    count = min(data.workers or os.cpu_count() or 1, max(len(one.shards) for one in listed.values()))
    workers = Workers[Task](setup, count, lambda task: f"shard {task.shard.name} of data.sources.{task.source.name}")
    with workers, Sealer() as sealer:
        texts = [
            TextSource(folder, source, setup, tokenizer, listed[source.name], sealer, log)
            for source in data.sources
            if source.kind != NEEDLES
        ]
        integrity.verify_stores(folder, [prefix for text in texts for prefix in text.prefixes])
        made = {text.name: text.ensure(workers) for text in texts}
    _tell_rejects(folder, list(made))
    for name, found in dedup.mark(folder, list(made), data.deduplicate).items():
        made[name]["duplicates"] = found
        log(f"{name}: {found['documents']} documents with {found['tokens']} tokens are left out as duplicates{example(found['examples'])}")
    given = [(name, one["fingerprint"], one["sha256"], one.get("duplicates")) for name, one in made.items()]
    for source in data.sources:
        if source.kind == NEEDLES:
            made[source.name] = _ensure_needles(folder, source, data, tokenizer, given, seed, log)
    return [_with_duplicates(made[source.name]) for source in data.sources]


def _with_duplicates(made: dict[str, Any]) -> dict[str, Any]:
    """Marks decide the plan as much as tokens do."""
    return {**made, "fingerprint": fingerprint_of([made["fingerprint"], made["duplicates"]])} if "duplicates" in made else made


def _tell_rejects(folder: Path, names: Sequence[str]) -> None:
    """Examples of all sources' broken records in one file."""
    files = [file for name in names if (file := source_folder(folder, name) / REJECTS).exists()]
    target = folder / REJECTS
    if files:
        write_text(target, "".join(file.read_text() for file in files))
    else:
        target.unlink(missing_ok=True)


def _ensure_needles(
    folder: Path, source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, texts: list[tuple[Any, ...]], seed: int, log: Log
) -> dict[str, Any]:
    """Synthetic documents in the training text of the other sources; none is held out.

    With ``answers_only`` the answers alone are learned: a number where it is hidden cannot be known, and learning it teaches not to copy.
    """
    knobs, options = data.needles, _needle_options(source, data)
    fingerprint = fingerprint_of([FORMAT, options, to_dict(knobs), texts, tokenizer.fingerprint, seed])
    found = _reused(folder, source, fingerprint, log)
    if found is not None:
        return found
    text = Text([source_store(folder, name) for name, *_ in texts], tokenizer.n_borders)
    maker, rng = (
        NeedleMaker(tokenizer.encode, knobs.wording, knobs.digits, tokenizer.bos, tokenizer.eos),
        stream(seed, "needles", source.name),
    )
    about = {"name": source.name, "kind": source.kind, "fingerprint": fingerprint, "tokenizer": tokenizer.fingerprint, "broken": 0}
    train, held = (
        store.StoreWriter(store_prefix(folder, source.name, split, 0), tokenizer.vocab_size, about) for split in (TRAIN, HOLDOUT)
    )
    started = time.monotonic()
    reopen(folder)
    with train, held:
        for number, length in enumerate(islice(cycle(options["lengths_tokens"]), options["count"])):
            n_pairs = int(rng.integers(1, options["max_pairs"], endpoint=True))
            depth = 0.0 if rng.random() < knobs.at_start else None
            made = maker.make(rng, text.draw(rng, 1, length)[0], length, depth, n_pairs, min(n_pairs, options["questions"]))
            learned = made.answer_spans if options["answers_only"] else None
            train.add(made.tokens, learned, origin=f"{source.name}:{number}")
    summary = _summary_of_needles(folder, source, fingerprint)
    assert summary is not None
    seal(source_folder(folder, source.name) / SOURCE, summary)
    log(f"{source.name}: {counts(summary)} in {time.monotonic() - started:.1f} s")
    return summary


def _reused(folder: Path, source: SourceConfig, fingerprint: str, log: Log) -> dict[str, Any] | None:
    """What finished stores of needle documents hold, compared with their checksums; None where they are to be made."""
    found = _summary_of_needles(folder, source, fingerprint)
    if found is None or not (source_folder(folder, source.name) / SOURCE).exists():
        return None
    integrity.verify_stores(folder, [store_prefix(folder, source.name, split, 0) for split in (TRAIN, HOLDOUT)])
    log(f"{source.name}: done before, {counts(found)}")
    return found


def _summary_of_needles(folder: Path, source: SourceConfig, fingerprint: str) -> dict[str, Any] | None:
    about = [store.finished(store_prefix(folder, source.name, split, 0), fingerprint) for split in (TRAIN, HOLDOUT)]
    train, held = about
    if train is None or held is None:
        return None
    named = {key: train[key] for key in ("name", "kind", "fingerprint", "tokenizer", "broken")}
    return {**named, "shards": 1, **held_and_trained([train], [held])}
