"""One source of text on its way into stores: what was done before is reused or refused, the rest is tokenised and watched.

Choice: a shard's stores carry the fingerprint of all that decided them (config, files, tokenizer). Where one of these has changed since the
source was begun, it is refused with what changed: tokens of two kinds are never mixed, and hours of work are not thrown away for a typo.
Cost: the files' times and sizes are trusted.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lr2train.config import SourceConfig, UserError, to_dict
from lr2train.data import decontaminate, integrity, sources, store
from lr2train.data.batch import WINDOWS
from lr2train.data.corpus import FORMAT, SOURCE, reopen, source_folder, store_prefix
from lr2train.data.formats import BROKEN_OFF, Shard
from lr2train.data.sources import Limits
from lr2train.data.store import HOLDOUT, TRAIN
from lr2train.data.tokenizer import Tokenizer
from lr2train.data.tokenizing import Ledger, Setup, Task, finished
from lr2train.data.workers import Workers
from lr2train.io import fingerprint as fingerprint_of
from lr2train.run import Tick, meter

Log = Callable[[str], None]
RECIPE, REJECTS = "recipe.json", "rejects.jsonl"
_EARLY_RECORDS = 1000  # after which a source with too many broken ones is stopped before its end
_NO_MATTER = ("weight", "max_documents", "max_bytes", "max_tokens", "max_broken_share")  # keys of a source that decide no shard's tokens


def without(source: SourceConfig, *keys: str) -> dict[str, Any]:
    """A source's config but for some keys."""
    return {key: value for key, value in to_dict(source).items() if key not in keys}


class TextSource:
    """One source of text.

    Args:
        folder: the run folder.
        source: its config.
        setup: what decides its tokens besides.
        tokenizer: the corpus'.
        listed: its shards, in order.
        log: takes lines.
    """

    def __init__(self, folder: Path, source: SourceConfig, setup: Setup, tokenizer: Tokenizer, listed: list[Shard], log: Log) -> None:
        self._folder, self._source, self._listed, self._log = folder, source, listed, log
        self._home = source_folder(folder, source.name)
        self._recipe = self._make_recipe(setup, tokenizer)
        of_all, limits = fingerprint_of(self._recipe), Limits.of(source)
        self._tasks = [Task(source, shard, number, fingerprint_of([of_all, shard]), limits) for number, shard in enumerate(listed)]

    def _make_recipe(self, setup: Setup, tokenizer: Tokenizer) -> dict[str, Any]:
        """What decides the tokens of a shard."""
        config = without(self._source, *_NO_MATTER)
        border = None if set(config["windows"]) == set(WINDOWS) else setup.original_window_tokens  # only where a window is left out
        return {
            **{f"data.sources.{self._source.name}.{key}": value for key, value in config.items()},
            "the source's files": sources.identity(self._source, self._listed),
            "data.shard_bytes": fingerprint_of(self._listed),
            "the tokenizer": tokenizer.fingerprint,
            "data.holdout": setup.holdout,
            "model.original_window_tokens": border,
            "data.decontaminate": decontaminate.recipe(setup.decontaminate),
            "the format": FORMAT,
        }

    def ensure(self, workers: Workers[Task]) -> dict[str, Any]:
        """What the source's stores hold, once they are all there."""
        self._refuse_another_recipe()
        found = {task.number: made for task in self._tasks if (made := finished(self._folder, task)) is not None}
        numbers = [store_prefix(self._folder, self._source.name, split, number) for number in found for split in (TRAIN, HOLDOUT)]
        integrity.verify_stores(self._folder, numbers)
        ledger, started = Ledger(self._tasks, found), time.monotonic()
        if ledger.closed:
            self._stop_if_broken(ledger, ended=True)
            made = self._summary(ledger)
            self._log(f"{self._source.name}: done before, {counts(made)}")
        else:
            if found:
                self._log(f"{self._source.name}: going on after {len(found)} of {len(self._tasks)} shards")
            self._tokenise(ledger, workers)
            made = self._summary(ledger)
            self._log(f"{self._source.name}: {counts(made)} in {time.monotonic() - started:.1f} s{example(made['contaminated_examples'])}")
        if not (self._home / SOURCE).exists() or store.sealed(self._home / SOURCE) != made:
            reopen(self._folder)
            store.seal(self._home / SOURCE, made)
        return made

    def _refuse_another_recipe(self) -> None:
        """Note the recipe, or compare with the one that was noted.

        Raises:
            UserError: shards were made by another.
        """
        note, shards = self._home / RECIPE, len(list(self._home.glob(f"{TRAIN}-*.json")))
        before = store.sealed(note) if note.exists() else {}
        changed = [key for key in self._recipe if before.get(key) != self._recipe[key]]
        if shards and changed:
            kept = "data.shard_bytes" if changed == ["data.shard_bytes"] else ", ".join(key for key in changed if key != "data.shard_bytes")
            raise UserError(
                f"data.sources.{self._source.name}: {shards} shards in {self._home} are from before a change of {kept}; choose another name=, "
                f"put it back, or remove {self._home} to tokenise this source again"
            )
        for leftover in [*self._home.glob(f"*{store.PARTIAL}"), *self._home.glob(".*.tmp")]:  # what a kill has left
            leftover.unlink(missing_ok=True)
        if changed:
            store.seal(note, self._recipe)

    def _tokenise(self, ledger: Ledger, workers: Workers[Task]) -> None:
        reopen(self._folder)
        (self._home / SOURCE).unlink(missing_ok=True)
        fallbacks = set[str]()
        with meter(f"tokenise {self._source.name}") as tick:
            watch = _Watch(ledger, self._tasks, tick)
            for task, made in workers.run(ledger.draw, watch.report):
                ledger.put(task, made)
                watch.done(task, made)
                if made["fallback"] not in {"", *fallbacks}:
                    fallbacks.add(made["fallback"])
                    self._log(f"{self._source.name}: Hugging Face's tokenizers from {task.shard.name} on, because {made['fallback']}")
                self._stop_if_broken(ledger, ended=False)
        assert ledger.closed
        self._stop_if_broken(ledger, ended=True)  # what was done beyond the limits stays, and serves when they are raised

    def _stop_if_broken(self, ledger: Ledger, ended: bool) -> None:
        """Stop where too much of the source is broken; the examples are written for a look.

        Raises:
            UserError: it is, or there is no document.
        """
        reasons = sum((Counter(made["reasons"]) for made in ledger.settled), Counter[str]())
        broken, records = reasons.total(), sum(made["read_documents"] for made in ledger.settled) + reasons.total()
        too_many = broken > self._source.max_broken_share * records and (ended or records >= _EARLY_RECORDS)
        if ended or too_many:
            _write_rejects(self._home / REJECTS, self._source.name, ledger.settled)
        if too_many and broken < records:
            what = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            raise UserError(
                f"data.sources.{self._source.name}: {broken} of {records} records are broken ({what}), more than its max_broken_share of "
                f"{self._source.max_broken_share:g}; see {self._home / REJECTS}, mend them, or raise data.sources.{self._source.name}.max_broken_share"
            )
        if ended and broken == records:
            raise sources.nothing(self._source, reasons)
        if ended:
            self._refuse_broken_files(ledger)
        if ended and not any(made["documents"] + made["holdout"]["documents"] for made in ledger.settled):
            raise UserError(
                f"data.sources.{self._source.name} has no document for windows={list(self._source.windows)} (the border is the original window "
                f"of {self._recipe['model.original_window_tokens']} tokens); raise its limits, or add the other window"
            )

    def _refuse_broken_files(self, ledger: Ledger) -> None:
        """A file that breaks off is one record, however much it held: so its bytes count too."""
        lost = sum(made.get("broken_off_bytes", 0) for made in ledger.settled)
        whole = sum(task.shard.size_bytes for task in self._tasks[: len(ledger.settled)])
        if lost > self._source.max_broken_share * whole:
            names = dict.fromkeys(one["origin"] for made in ledger.settled for one in made["rejects"] if one["reason"] == BROKEN_OFF)
            raise UserError(
                f"data.sources.{self._source.name}: files of {lost} of {whole} bytes break off ({', '.join(names)}), more than its max_broken_share "
                f"of {self._source.max_broken_share:g}; copy them again, or raise data.sources.{self._source.name}.max_broken_share"
            )

    def _summary(self, ledger: Ledger) -> dict[str, Any]:
        """What the source's stores hold, all together."""
        made, held = ledger.settled, [one["holdout"] for one in ledger.settled]
        reasons = sum((Counter(one["reasons"]) for one in made), Counter[str]())
        return {
            "name": self._source.name,
            "kind": self._source.kind,
            "fingerprint": fingerprint_of([task.fingerprint for task in self._tasks[: len(made)]]),
            "tokenizer": self._recipe["the tokenizer"],
            "shards": len(made),
            **held_and_trained(made, held),
            "text_bytes": sum(one["text_bytes"] for one in made),
            "broken": reasons.total(),
            "broken_by_reason": dict(reasons),
            "contaminated": sum(one["contaminated"] for one in made),
            "contaminated_examples": list(islice(chain.from_iterable(one["contaminated_examples"] for one in made), 5)),
        }


def held_and_trained(made: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts and checksums over stores."""
    totals = {key: sum(one[key] for one in made) for key in ("documents", "tokens", "targets")}
    totals |= {f"holdout_{key}": sum(one[key] for one in held) for key in ("documents", "tokens")}
    return {
        **totals,
        "sha256": fingerprint_of([one["files"] for one in made]),
        "holdout_sha256": fingerprint_of([one["files"] for one in held]),
    }


class _Watch:
    """How far a source is, for the progress bar: the share of its input or of its limits, whichever is farther."""

    def __init__(self, ledger: Ledger, tasks: Sequence[Task], tick: Tick) -> None:
        self._ledger, self._tick = ledger, tick
        self._weights = [max(task.shard.size_bytes, 1) for task in tasks]
        self._limits = tasks[0].limits
        self._parts: dict[int, float] = {}  # of each shard, how much of it is read
        self._bytes: dict[int, float] = {}
        for number in range(len(ledger.settled)):
            self._parts[number] = 1.0
        self._started = time.monotonic()

    def report(self, task: Task, text_bytes: float) -> None:
        """A shard goes on."""
        self._bytes[task.number] = text_bytes
        self._parts[task.number] = min(text_bytes / self._weights[task.number], 0.95)  # what a compressed one holds is not known
        self._show()

    def done(self, task: Task, made: dict[str, Any]) -> None:
        """A shard is there."""
        self._bytes[task.number], self._parts[task.number] = made["text_bytes"], 1.0
        self._show()

    def _show(self) -> None:
        read = sum(self._parts[number] * self._weights[number] for number in self._parts)
        shares = [read / sum(self._weights), *self._shares_of_limits()]
        speed = sum(self._bytes.values()) / 1e6 / max(time.monotonic() - self._started, 1e-9)
        self._tick(float(min(max(shares), 1.0)), 1.0, f"{speed:.1f} MB/s")

    def _shares_of_limits(self) -> Iterator[float]:
        settled = self._ledger.settled
        for limit, key in (
            (self._limits.documents, "read_documents"),
            (self._limits.text_bytes, "text_bytes"),
            (self._limits.tokens, "read_tokens"),
        ):
            if limit is not None:
                yield sum(made[key] for made in settled) / limit


def _write_rejects(path: Path, source: str, made: Sequence[dict[str, Any]]) -> None:
    rejects = [{"source": source, "shard": one["shard"], **reject} for one in made for reject in one["rejects"]]
    if not rejects:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # another folder may share the file by a hard link
    path.write_text("".join(f"{json.dumps(reject)}\n" for reject in rejects))


def example(examples: Sequence[dict[str, str]]) -> str:
    """The first one, to end a message with."""
    return f", such as {' '.join(f'{key} {value}' for key, value in examples[0].items())}" if examples else ""


def counts(manifest: dict[str, Any]) -> str:
    """What a source holds, for the log."""
    held = f", {manifest['holdout_documents']} documents with {manifest['holdout_tokens']} tokens held out"
    reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.get("broken_by_reason", {}).items())
    broken = f", {manifest['broken']} broken records skipped{f' ({reasons})' if reasons else ''}"
    contaminated = manifest.get("contaminated", 0)
    shared = f", {contaminated} documents left out that share text with the evaluation sets" if contaminated else ""
    return f"{manifest['documents']} documents, {manifest['tokens']} tokens{held}{broken}{shared}"
