"""The steps of ``prepare``: tokenizer, a store for each source, the plan, the manifest; each is skipped where its result lies there.

Choice: a step's result carries the fingerprint of all that decided it (config, files, tokenizer), and is reused when the fingerprint is the
same. So a run that was killed goes on at the source where it was, and a changed L0 plans again without tokenising again (but for sources of
one window, whose documents it decides). A store that is reused is read once against its checksum. Cost: that read; the sources' file times
and sizes are trusted.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.config import DataConfig, SourceConfig, UserError, to_dict
from lr2train.data import buckets, segmenting, sources, store
from lr2train.data import tokenizer as tokenizers
from lr2train.data.batch import WINDOWS
from lr2train.data.corpus import FORMAT, HOLDOUT, TOKENIZER, TRAIN, store_prefix
from lr2train.data.needles import N_KEYS, NeedleMaker, between, check_needles, sentences
from lr2train.data.text import Text
from lr2train.data.tokenizer import Tokenizer
from lr2train.run import fingerprint as fingerprint_of
from lr2train.run import read_json, stream, write_json

Log = Callable[[str], None]
NEEDLES = "needles"
_ENCODE_BYTES = 4_000_000  # of text handed to the tokenizer at one time: enough for all cores, little memory
_LOG_EVERY_S = 15.0


def check(data: DataConfig, original_window_tokens: int) -> None:
    """Refuse a config that cannot be prepared, before anything is read.

    Raises:
        UserError: no sources, bad names, no text among them, knobs out of their limits, or windows that do not fit each other.
    """
    names = [source.name for source in data.sources]
    if not names:
        raise UserError("data.sources is empty; add a source such as {name: stdlib, kind: stdlib}")
    for name in names:
        if names.count(name) > 1 or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(
                f"data.sources has the name {name!r} {names.count(name)} times; give each its own name of letters, digits, - and _"
            )
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
    for window, budget in segmenting.budgets(data).items():
        if budget and not any(window in source.windows for source in data.sources):
            raise UserError(
                f"data.{window}_tokens={budget}, and no source has {window} among its windows; add {window} to data.sources.<name>.windows, "
                f"or set data.{window}_tokens=0"
            )


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


def ensure_tokenizer(folder: Path, data: DataConfig, log: Log) -> Tokenizer:
    """The corpus' tokenizer: copied from ``data.tokenizer``, or trained on the sources."""
    texts = [source for source in data.sources if source.kind != NEEDLES]
    learned_from = [data.vocab_size, data.tokenizer_train_bytes, data.needles.wording, [_recipe(source) for source in data.sources]]
    fingerprint = fingerprint_of(tokenizers.load(data.tokenizer).fingerprint if data.tokenizer else learned_from)
    target, note = folder / TOKENIZER, folder / f"{TOKENIZER}.manifest.json"
    if note.exists() and read_json(note)["fingerprint"] == fingerprint:
        return tokenizers.load(str(target))
    note.unlink(missing_ok=True)
    if data.tokenizer:
        made = tokenizers.load(data.tokenizer)
    else:
        started = time.monotonic()
        share = data.tokenizer_train_bytes // len(texts)
        text = (document.text for source in texts for document in _beginning(source, share))
        asks = data.needles.wording if len(texts) < len(data.sources) else None
        made = tokenizers.train(chain(text, sentences(asks) if asks else ()), data.vocab_size)
        log(f"trained a tokenizer of {made.vocab_size} entries in {time.monotonic() - started:.1f} s")
    made.save(target)
    write_json(note, {"fingerprint": fingerprint})
    return tokenizers.load(str(target))


def _beginning(source: SourceConfig, size: int) -> Iterator[sources.Document]:
    """Documents of a source until they add up to ``size`` characters."""
    read = 0
    for document in sources.read(source, sources.Tally()):
        yield document
        read += len(document.text)
        if read >= size:
            return


def ensure_stores(
    folder: Path, data: DataConfig, tokenizer: Tokenizer, original_window_tokens: int, seed: int, log: Log
) -> list[dict[str, Any]]:
    """A store for every source, text before needles; returns their manifests in the order of ``data.sources``."""
    made = {
        source.name: _ensure_text(folder, source, tokenizer, original_window_tokens, data.holdout, log)
        for source in data.sources
        if source.kind != NEEDLES
    }
    texts = list(made)
    for source in data.sources:
        if source.kind == NEEDLES:
            made[source.name] = _ensure_needles(
                folder, source, data, tokenizer, [(name, made[name]["fingerprint"]) for name in texts], seed, log
            )
    return [made[source.name] for source in data.sources]


def _ensure_text(
    folder: Path, source: SourceConfig, tokenizer: Tokenizer, original_window_tokens: int, holdout: float, log: Log
) -> dict[str, Any]:
    border = None if set(source.windows) == set(WINDOWS) else original_window_tokens  # decides documents only where a window is left out
    fingerprint = fingerprint_of([FORMAT, _recipe(source), tokenizer.fingerprint, holdout, border])
    found = _reused(folder, source.name, fingerprint, log)
    if found is not None:
        return found
    about: dict[str, Any] = {"name": source.name, "kind": source.kind, "fingerprint": fingerprint}
    train, held = (store.StoreWriter(store_prefix(folder, source.name, split), tokenizer.vocab_size, about) for split in (TRAIN, HOLDOUT))
    tally, started = sources.Tally(), time.monotonic()
    with train, held:
        documents = _tokenised(_watched(sources.read(source, tally), source, tally, log), tokenizer)
        for name, tokens in _admitted(documents, source, original_window_tokens):
            (held if is_held_out(name, holdout) else train).add(tokens)
        about.update(asdict(tally))
    return _report(folder, source.name, fingerprint, started, log)


def _admitted(
    documents: Iterable[tuple[str, np.ndarray]], source: SourceConfig, original_window_tokens: int
) -> Iterator[tuple[str, np.ndarray]]:
    """The documents of the source's windows until its ``max_tokens`` are reached.

    Raises:
        UserError: there is none.
    """
    admitted = 0
    for name, tokens in documents:
        if buckets.window_of(len(tokens), original_window_tokens) in source.windows:
            yield name, tokens
            admitted += len(tokens)
            if source.max_tokens is not None and admitted >= source.max_tokens:
                return
    if not admitted:
        raise UserError(
            f"data.sources.{source.name} has no document for windows={list(source.windows)} (the border is the original window of "
            f"{original_window_tokens} tokens); raise its limits, or add the other window"
        )


def _ensure_needles(
    folder: Path, source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, texts: list[tuple[str, str]], seed: int, log: Log
) -> dict[str, Any]:
    """Synthetic documents in the training text of the other sources; none is held out.

    With ``answers_only`` the answers alone are learned: a number where it is hidden cannot be known, and learning it teaches not to copy.
    """
    knobs, options = data.needles, _needle_options(source, data)
    fingerprint = fingerprint_of([FORMAT, options, to_dict(knobs), texts, tokenizer.fingerprint, seed])
    found = _reused(folder, source.name, fingerprint, log)
    if found is not None:
        return found
    text = Text([store.Store(store_prefix(folder, name)) for name, _ in texts], tokenizer.n_borders)
    maker, rng = (
        NeedleMaker(tokenizer.encode, knobs.wording, knobs.digits, tokenizer.bos, tokenizer.eos),
        stream(seed, "needles", source.name),
    )
    about = {"name": source.name, "kind": source.kind, "fingerprint": fingerprint, "broken": 0}
    train, held = (store.StoreWriter(store_prefix(folder, source.name, split), tokenizer.vocab_size, about) for split in (TRAIN, HOLDOUT))
    started = time.monotonic()
    with train, held:
        for length in islice(cycle(options["lengths_tokens"]), options["count"]):
            n_pairs = int(rng.integers(1, options["max_pairs"], endpoint=True))
            depth = 0.0 if rng.random() < knobs.at_start else None
            made = maker.make(rng, text.draw(rng, 1, length)[0], length, depth, n_pairs, min(n_pairs, options["questions"]))
            train.add(made.tokens, made.answer_spans if options["answers_only"] else None)
    return _report(folder, source.name, fingerprint, started, log)


def is_held_out(document: str, share: float) -> bool:
    """Whether a document is kept out of training: by the hash of its id, so always the same ones, whoever reads them and however many."""
    whole = document.partition(sources.PART)[0]
    return int.from_bytes(hashlib.blake2b(whole.encode(), digest_size=8).digest(), "little") < share * 2**64


def _tokenised(documents: Iterable[sources.Document], tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """Ids of documents with their tokens, BOS and EOS included."""
    for group in _groups(documents):
        for document, ids in zip(group, tokenizer.encode_batch([one.text for one in group]), strict=True):
            yield document.id, tokenizer.bound(ids)


def _groups(documents: Iterable[sources.Document]) -> Iterator[list[sources.Document]]:
    """Some megabytes at a time, to be encoded on all cores."""
    group: list[sources.Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= _ENCODE_BYTES:
            yield group
            group, size = [], 0
    yield group


def _watched(documents: Iterable[sources.Document], source: SourceConfig, tally: sources.Tally, log: Log) -> Iterator[sources.Document]:
    """The documents, with a line now and then: how many a source has is not known before it was read."""
    started = last = time.monotonic()
    for document in documents:
        yield document
        now = time.monotonic()
        if now - last >= _LOG_EVERY_S:
            last = now
            limit = f" of at most {source.max_bytes / 1e6:.0f}" if source.max_bytes else ""
            log(
                f"{source.name}: {tally.documents} documents, {tally.text_bytes / 1e6:.0f}{limit} MB, "
                f"{tally.text_bytes / 1e6 / (now - started):.1f} MB/s"
            )


def _reused(folder: Path, source: str, fingerprint: str, log: Log) -> dict[str, Any] | None:
    """What a source's finished stores say, their tokens compared with their checksums; None where they are to be made."""
    found = _finished(folder, source, fingerprint)
    if found is not None:
        for split in (TRAIN, HOLDOUT):
            store.Store(store_prefix(folder, source, split)).verify()
        log(f"{source}: done before, {_counts(found)}")
    return found


def _finished(folder: Path, source: str, fingerprint: str) -> dict[str, Any] | None:
    """What a source's finished stores say."""
    about = [store.finished(store_prefix(folder, source, split), fingerprint) for split in (TRAIN, HOLDOUT)]
    train, held = about
    if train is None or held is None:
        return None
    return {**train, "holdout_documents": held["documents"], "holdout_tokens": held["tokens"], "holdout_sha256": held["sha256"]}


def _report(folder: Path, source: str, fingerprint: str, started: float, log: Log) -> dict[str, Any]:
    made = _finished(folder, source, fingerprint)
    assert made is not None
    log(f"{source}: {_counts(made)} in {time.monotonic() - started:.1f} s")
    return made


def _counts(manifest: dict[str, Any]) -> str:
    held = f", {manifest['holdout_documents']} documents with {manifest['holdout_tokens']} tokens held out"
    return f"{manifest['documents']} documents, {manifest['tokens']} tokens{held}, {manifest['broken']} broken records skipped"


def _recipe(source: SourceConfig) -> list[Any]:
    """What decides a source's documents: its config without the weight, which only plans, and its files."""
    config = {key: value for key, value in to_dict(source).items() if key != "weight"}
    return [config, sources.identity(source)]
