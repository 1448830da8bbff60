"""The source kind ``needles``: numbers hidden in the text of other sources, and asked for at the end.

Choice: the documents are made after the stores of text, from their training documents, and none is held out. With the
source's option ``answers_only`` (default: true) the loss covers the answers alone: a hidden number cannot be predicted
where it is hidden, and learning it there teaches not to copy. Cost: other text makes other needle documents.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from lr2train.config import DataConfig, SourceConfig, UserError, to_dict
from lr2train.data import integrity, store
from lr2train.data.corpus import FORMAT, SOURCE, reopen, source_folder, source_store, store_prefix
from lr2train.data.ingest import sources
from lr2train.data.ingest.source_kinds import take_options
from lr2train.data.ingest.text_source import store_totals, summary_line
from lr2train.data.needles import N_KEYS, NeedleMaker, between
from lr2train.data.store import HOLDOUT, TRAIN
from lr2train.data.text import Text
from lr2train.data.tokenizer import Tokenizer
from lr2train.io import fingerprint as fingerprint_of
from lr2train.io import seal
from lr2train.run import stream

Log = Callable[[str], None]


class TextStores(NamedTuple):
    """Sources of text that needles hide in.

    Attributes:
        names: of the sources.
        fingerprints: of their tokens and of their marks of duplicates, as JSON values.
    """

    names: list[str]
    fingerprints: list[Any]


def check_needle_source(source: SourceConfig, data: DataConfig) -> None:
    """Refuse a source of needles that cannot be made, before anything is read.

    Raises:
        UserError: a key that does nothing for needles, or an option outside its limits.
    """
    sources.check_windows(source)
    source_key = f"data.sources.{source.name}"
    for key in ("path", "target", "max_documents", "max_bytes", "max_tokens"):
        if getattr(source, key) is not None:
            full_key = f"{source_key}.{key}"
            raise UserError(f"{full_key} does nothing for kind={sources.NEEDLES}; set {full_key} to null")
    options, where = _options(source, data), f"{source_key}.options"
    for key in ("max_pairs", "questions"):
        between(f"{where}.{key}", options[key], 1, N_KEYS)
    if options["count"] < 1 or not options["lengths_tokens"]:
        count, lengths = options["count"], options["lengths_tokens"]
        raise UserError(f"{where}: count={count}, lengths_tokens={lengths} make no document; set both")


def _options(source: SourceConfig, data: DataConfig) -> dict[str, Any]:
    return take_options(
        source,
        lengths_tokens=[data.segment_tokens],
        count=100,
        max_pairs=data.needles.max_pairs,
        questions=data.needles.max_questions,
        chains=0,
        answers_only=True,
    )


def ensure_needles(
    folder: Path, source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, texts: TextStores, seed: int, log: Log
) -> dict[str, Any]:
    """Make the documents of a source of needles, unless they are there; returns what its stores hold.

    Raises:
        UserError: a store is damaged, or the text is too short for the needles.
    """
    config, options = data.needles, _options(source, data)
    fingerprint = fingerprint_of([FORMAT, options, to_dict(config), texts.fingerprints, tokenizer.fingerprint, seed])
    found = _verified_summary(folder, source, fingerprint)
    if found is not None:
        log(f"{source.name}: done before, {summary_line(found)}")
        return found
    text = Text([source_store(folder, name) for name in texts.names], tokenizer.n_borders)
    maker = NeedleMaker(tokenizer.encode, config.wording, config.digits, tokenizer.bos, tokenizer.eos)
    rng = stream(seed, "needles", source.name)
    about = {
        "name": source.name,
        "kind": source.kind,
        "fingerprint": fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "broken": 0,
    }
    train, held = (store.StoreWriter(prefix, tokenizer.vocab_size, about) for prefix in _prefixes(folder, source))
    started = time.monotonic()
    reopen(folder)
    with train, held:
        for number, length in enumerate(islice(cycle(options["lengths_tokens"]), options["count"])):
            n_pairs = int(rng.integers(1, options["max_pairs"], endpoint=True))
            depth = 0.0 if rng.random() < config.at_start else None  # None: anywhere
            n_questions = min(n_pairs, options["questions"])
            n_chains = int(rng.integers(0, options["chains"], endpoint=True)) if options["chains"] else 0
            filler = text.draw(rng, 1, length)[0]
            document = maker.make(rng, filler, length, depth, n_pairs, n_questions, n_chains=n_chains, hops=config.hops)
            targets = document.answer_spans if options["answers_only"] else None
            train.add(document.tokens, targets, origin=f"{source.name}:{number}")
    summary = _summary(folder, source, fingerprint)
    assert summary is not None
    seal(source_folder(folder, source.name) / SOURCE, summary)
    log(f"{source.name}: {summary_line(summary)} in {time.monotonic() - started:.1f} s")
    return summary


def _verified_summary(folder: Path, source: SourceConfig, fingerprint: str) -> dict[str, Any] | None:
    """The counts of finished stores, after a comparison with their checksums; None where they are to be made."""
    found = _summary(folder, source, fingerprint)
    if found is None or not (source_folder(folder, source.name) / SOURCE).exists():
        return None
    integrity.verify_stores(folder, _prefixes(folder, source))
    return found


def _summary(folder: Path, source: SourceConfig, fingerprint: str) -> dict[str, Any] | None:
    train, held = (store.finished(prefix, fingerprint) for prefix in _prefixes(folder, source))
    if train is None or held is None:
        return None
    named = {key: train[key] for key in ("name", "kind", "fingerprint", "tokenizer", "broken")}
    return {**named, "shards": 1, **store_totals([train], [held])}


def _prefixes(folder: Path, source: SourceConfig) -> Sequence[Path]:
    """Path prefixes of the two stores, training and held-out; the held-out store is empty."""
    return [store_prefix(folder, source.name, split, 0) for split in (TRAIN, HOLDOUT)]
