"""One source of text on its way into stores: what was done before is reused or refused, the rest is tokenised and watched.

Choice: a shard's stores carry the fingerprint of all that decided them (config, names and sizes of files, tokenizer), and a digest of the
documents that they were made of. Where a setting has changed since the source was begun, it is refused with what changed: tokens of two kinds
are never mixed, and hours of work are not thrown away for a typo. Where a file's time or place is another one, its documents are read again
and compared, and not tokenised. Cost: a file that changed and kept its size, place and time is taken for the same.
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
from lr2train.data import store
from lr2train.data.batch import WINDOWS
from lr2train.data.corpus import FORMAT, SOURCE, reopen, source_folder, store_prefix
from lr2train.data.ingest import broken_share, decontaminate, sources
from lr2train.data.ingest.broken_share import BrokenShare
from lr2train.data.ingest.find_files import Listing
from lr2train.data.ingest.manifest_writer import ManifestWriter
from lr2train.data.ingest.sources import Limits
from lr2train.data.ingest.tokenize_split import SplitScheduler, SplitTask, TokenizeSettings, finished
from lr2train.data.ingest.workers import WorkerPool
from lr2train.data.store import HOLDOUT, TRAIN
from lr2train.data.tokenizer import Tokenizer
from lr2train.io import fingerprint as fingerprint_of
from lr2train.io import read_json, write_json, write_text
from lr2train.run import Tick, meter

Log = Callable[[str], None]
RECIPE, REJECTS, SEEN = "recipe.json", "rejects.jsonl", "seen.json"
_NO_MATTER = ("weight", "max_documents", "max_bytes", "max_tokens", "max_broken_share")  # keys of a source that decide no shard's tokens


def without(source: SourceConfig, *keys: str) -> dict[str, Any]:
    """A source's config but for some keys, and for the path of files that are known by their contents."""
    unnamed = {*keys, "path"} if sources.is_local(source) else set(keys)
    return {key: value for key, value in to_dict(source).items() if key not in unnamed}


class TextSource:
    """One source of text.

    Args:
        folder: the run folder.
        source: its config.
        setup: what decides its tokens besides.
        tokenizer: the corpus'.
        listed: what it has.
        sealer: writes its manifests.
        log: takes lines.

    Raises:
        UserError: its settings have changed since it was begun.
    """

    def __init__(
        self,
        folder: Path,
        source: SourceConfig,
        setup: TokenizeSettings,
        tokenizer: Tokenizer,
        listed: Listing,
        sealer: ManifestWriter,
        log: Log,
    ) -> None:
        self._folder, self._source, self._listed, self._sealer, self._log = folder, source, listed, sealer, log
        self._home = source_folder(folder, source.name)
        self._recipe = self._make_recipe(setup, tokenizer)
        of_all, limits = fingerprint_of(self._recipe), Limits.of(source)
        self._tasks = [
            SplitTask(source, shard, number, fingerprint_of([of_all, sources.shape(shard)]), limits, stamp)
            for number, (shard, stamp) in enumerate(zip(listed.shards, sources.stamps(listed.shards), strict=True))
        ]
        self._refuse_another_recipe()
        self._found = {task.number: made for task in self._tasks if (made := finished(folder, task)) is not None}

    @property
    def name(self) -> str:
        """The source's."""
        return self._source.name

    @property
    def prefixes(self) -> list[Path]:
        """Of the stores that were finished before."""
        return [store_prefix(self._folder, self._source.name, split, number) for number in self._found for split in (TRAIN, HOLDOUT)]

    def _make_recipe(self, setup: TokenizeSettings, tokenizer: Tokenizer) -> dict[str, Any]:
        """What decides the tokens of a shard."""
        config = without(self._source, *_NO_MATTER)
        border = None if set(config["windows"]) == set(WINDOWS) else setup.original_window_tokens  # only where a window is left out
        return {
            **{f"data.sources.{self._source.name}.{key}": value for key, value in config.items()},
            "the source's files": sources.identity(self._source, self._listed.shards),
            "data.shard_bytes": fingerprint_of([sources.shape(shard) for shard in self._listed.shards]),
            "the tokenizer": tokenizer.fingerprint,
            "data.holdout": setup.holdout,
            "model.original_window_tokens": border,
            "data.decontaminate": decontaminate.recipe(setup.decontaminate),
            "the format": FORMAT,
        }

    def ensure(self, workers: WorkerPool[SplitTask]) -> dict[str, Any]:
        """What the source's stores hold, once they are all there."""
        self._refuse_other_contents(workers)
        ledger, started = SplitScheduler(self._tasks, self._found), time.monotonic()
        if ledger.closed:
            self._stop_if_broken(ledger, ended=True)
            made = self._summary(ledger)
            self._log(f"{self._source.name}: done before, {counts(made)}")
        else:
            if self._found:
                self._log(f"{self._source.name}: going on after {len(self._found)} of {len(self._tasks)} shards")
            self._tokenise(ledger, workers)
            made = self._summary(ledger)
            self._log(f"{self._source.name}: {counts(made)} in {time.monotonic() - started:.1f} s{example(made['contaminated_examples'])}")
        if not (self._home / SOURCE).exists() or store.sealed(self._home / SOURCE) != json.loads(json.dumps(made)):
            reopen(self._folder)
            self._sealer.add(self._home / SOURCE, made)
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
        if changed:
            self._home.mkdir(parents=True, exist_ok=True)
            self._sealer.add(note, self._recipe)

    def _refuse_other_contents(self, workers: WorkerPool[SplitTask]) -> None:
        """Read what has another time or place than when it was tokenised, and compare.

        Raises:
            UserError: there are other documents now.
        """
        seen = self._seen()
        touched = [task for task in self._tasks if task.number in self._found and not self._known(task, seen)]
        if not touched:
            return
        self._log(
            f"{self._source.name}: {len(touched)} shards have files of another time or place; their text is compared with what was read"
        )
        waiting = iter([task._replace(made_before=self._found[task.number]) for task in touched])
        done, total = 0, sum(max(task.shard.size_bytes, 1) for task in touched)
        with meter(f"compare {self._source.name}") as tick:
            for task, found in workers.run(lambda: next(waiting, None), lambda *_: None):
                if not found["same"]:
                    raise UserError(
                        f"data.sources.{self._source.name}: the text of {task.shard.name} has changed since its shard in {self._home} was made; "
                        f"choose another name=, put it back, or remove {self._home} to tokenise this source again"
                    )
                done += max(task.shard.size_bytes, 1)
                tick(done / total, 1.0, "")
        write_json(self._home / SEEN, {**seen, **{str(task.number): self._compared(task) for task in touched}})

    def _known(self, task: SplitTask, seen: dict[str, list[str]]) -> bool:
        """Whether a shard's files are, at a glance, those that it was made of, or that were compared with them."""
        return task.stamp == self._found[task.number]["stamp"] or seen.get(str(task.number)) == self._compared(task)

    def _compared(self, task: SplitTask) -> list[str]:
        return [task.stamp, self._found[task.number]["contents"]]

    def _seen(self) -> dict[str, list[str]]:
        """Stamps of files whose text was compared since, and with which; only a memory."""
        try:
            return dict(read_json(self._home / SEEN)) if (self._home / SEEN).exists() else {}
        except (UserError, TypeError, ValueError):
            return {}

    def _tokenise(self, ledger: SplitScheduler, workers: WorkerPool[SplitTask]) -> None:
        reopen(self._folder)
        (self._home / SOURCE).unlink(missing_ok=True)
        fallbacks = set[str]()
        with meter(f"tokenise {self._source.name}") as tick:
            watch = _Watch(ledger, self._tasks, tick)
            for task, made in workers.run(lambda: self._drawn(ledger), watch.report):
                self._seal(task, made)
                ledger.put(task, made)
                watch.done(task, made)
                if made["fallback"] not in {"", *fallbacks}:
                    fallbacks.add(made["fallback"])
                    self._log(f"{self._source.name}: Hugging Face's tokenizers from {task.shard.name} on, because {made['fallback']}")
                self._stop_if_broken(ledger, ended=False)
        assert ledger.closed
        self._stop_if_broken(ledger, ended=True)  # what was done beyond the limits stays, and serves when they are raised

    def _drawn(self, ledger: SplitScheduler) -> SplitTask | None:
        task = ledger.draw()
        if task is not None:
            for split in (HOLDOUT, TRAIN):
                self._sealer.forget(self._manifest(split, task.number))
        return task

    def _seal(self, task: SplitTask, made: dict[str, Any]) -> None:
        """Have a shard's manifests written; that of the training documents' store comes last, so it stands for both."""
        train = {key: value for key, value in made.items() if key != "holdout"}
        for split, about in ((HOLDOUT, made["holdout"]), (TRAIN, train)):
            prefix = store_prefix(self._folder, self._source.name, split, task.number)
            self._sealer.add(self._manifest(split, task.number), about, [store.suffixed(prefix, suffix) for suffix in about["files"]])

    def _manifest(self, split: str, number: int) -> Path:
        return store.suffixed(store_prefix(self._folder, self._source.name, split, number), ".json")

    def _stop_if_broken(self, ledger: SplitScheduler, ended: bool) -> None:
        """Stop where too much of the source is broken; the examples are written for a look.

        Raises:
            UserError: it is, or there is no document.
        """
        lost = BrokenShare(self._source, ledger.settled, self._listed)
        too_many = lost.beyond(ended)
        if ended or too_many:
            _write_rejects(self._home / REJECTS, self._source.name, ledger.settled)
        if ended and lost.records.lost == lost.records.whole:
            raise broken_share.nothing(self._source, lost.reasons, lost.columns)
        if too_many is not None:
            raise lost.refusal(too_many, ended, self._home / REJECTS)
        if ended and not any(made["documents"] + made["holdout"]["documents"] for made in ledger.settled):
            raise UserError(
                f"data.sources.{self._source.name} has no document for windows={list(self._source.windows)} (the border is the original window "
                f"of {self._recipe['model.original_window_tokens']} tokens); raise its limits, or add the other window"
            )

    def _summary(self, ledger: SplitScheduler) -> dict[str, Any]:
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
            "lost_bytes": sum(one["lost_bytes"] for one in made),
            "lost_files": sorted({name for one in made for name in one["lost_files"]}),
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

    def __init__(self, ledger: SplitScheduler, tasks: Sequence[SplitTask], tick: Tick) -> None:
        self._ledger, self._tick = ledger, tick
        self._weights = [max(task.shard.size_bytes, 1) for task in tasks]
        self._limits = tasks[0].limits
        self._parts: dict[int, float] = {}  # of each shard, how much of it is read
        self._bytes: dict[int, float] = {}
        for number in range(len(ledger.settled)):
            self._parts[number] = 1.0
        self._started = time.monotonic()

    def report(self, task: SplitTask, text_bytes: float) -> None:
        """A shard goes on."""
        self._bytes[task.number] = text_bytes
        self._parts[task.number] = min(text_bytes / self._weights[task.number], 0.95)  # what a compressed one holds is not known
        self._show()

    def done(self, task: SplitTask, made: dict[str, Any]) -> None:
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
    write_text(path, "".join(f"{json.dumps(reject)}\n" for reject in rejects))


def example(examples: Sequence[dict[str, str]]) -> str:
    """The first one, to end a message with."""
    return f", such as {' '.join(f'{key} {value}' for key, value in examples[0].items())}" if examples else ""


def counts(manifest: dict[str, Any]) -> str:
    """What a source holds, for the log."""
    held = f", {manifest['holdout_documents']} documents with {manifest['holdout_tokens']} tokens held out"
    reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.get("broken_by_reason", {}).items())
    lost = f"{manifest['lost_bytes']} bytes: {reasons}" if reasons else ""
    broken = f", {manifest['broken']} broken records skipped{f' ({lost})' if lost else ''}"
    contaminated = manifest.get("contaminated", 0)
    shared = f", {contaminated} documents left out that share text with the evaluation sets" if contaminated else ""
    return f"{manifest['documents']} documents, {manifest['tokens']} tokens{held}{broken}{shared}"
