"""One source of text: finished token shards are reused or refused, the remaining input splits are tokenised.

Choice: a token shard carries the fingerprint of everything that decided its tokens (config, names and sizes of files,
tokenizer), and a digest of its documents. A source whose settings have changed is refused with the changed key: tokens
of two kinds are never mixed, and a typo does not throw away hours of work. Where only a file's time or location has
changed, its documents are read and compared, and not tokenised. Cost: a changed file that kept its size, location and
time is taken for the same.

Files beside the shards: ``recipe.json`` (the settings), ``seen.json`` (touched files that were compared),
``rejects.jsonl`` (examples of broken records), and ``source.json`` (what the shards hold), written last.
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
from lr2train.data.ingest.find_files import SourceInput
from lr2train.data.ingest.manifest_writer import ManifestWriter
from lr2train.data.ingest.sources import SourceLimits
from lr2train.data.ingest.split_scheduler import SplitScheduler
from lr2train.data.ingest.tokenize_split import SplitTask, TokenizeSettings, finished_manifest
from lr2train.data.ingest.workers import WorkerPool
from lr2train.data.store import HOLDOUT, TRAIN
from lr2train.data.tokenizer import Tokenizer
from lr2train.io import fingerprint as fingerprint_of
from lr2train.io import read_json, write_json, write_text
from lr2train.progress import Tick, meter

Log = Callable[[str], None]
RECIPE, REJECTS, SEEN = "recipe.json", "rejects.jsonl", "seen.json"
_MAX_EXAMPLES = 5  # of contaminated documents, in a source
# Keys of a source that do not decide the tokens of a shard.
_PLAN_KEYS = ("weight", "max_documents", "max_bytes", "max_tokens", "max_broken_share")


def config_without(source: SourceConfig, *keys: str) -> dict[str, Any]:
    """A source's config without some keys, and without the path of local files: these are known by their contents."""
    left_out = {*keys, "path"} if sources.is_local(source) else set(keys)
    return {key: value for key, value in to_dict(source).items() if key not in left_out}


class TextSource:
    """One source of text in a run folder.

    Args:
        folder: the run folder.
        source: the source's config.
        settings: what decides its tokens besides.
        tokenizer: the corpus' tokenizer.
        source_input: the input splits, and what was found beside them.
        manifests: writes the manifests.
        log: takes lines for a person.

    Raises:
        UserError: the settings have changed since the source was begun.
    """

    def __init__(
        self,
        folder: Path,
        source: SourceConfig,
        settings: TokenizeSettings,
        tokenizer: Tokenizer,
        source_input: SourceInput,
        manifests: ManifestWriter,
        log: Log,
    ) -> None:
        self._folder, self._source, self._input = folder, source, source_input
        self._manifests, self._log = manifests, log
        self._store_folder = source_folder(folder, source.name)
        self._recipe = self._make_recipe(settings, tokenizer)
        recipe, limits, splits = fingerprint_of(self._recipe), SourceLimits.of(source), source_input.splits
        self._tasks = [
            SplitTask(source, split, number, fingerprint_of([recipe, sources.extent(split)]), limits, stamp)
            for number, (split, stamp) in enumerate(zip(splits, sources.stamps(splits), strict=True))
        ]
        self._refuse_another_recipe()
        self._finished: dict[int, dict[str, Any]] = {}  # manifests of finished shards by number
        for task in self._tasks:
            if (manifest := finished_manifest(folder, task)) is not None:
                self._finished[task.number] = manifest

    @property
    def name(self) -> str:
        """The source's name."""
        return self._source.name

    @property
    def finished_stores(self) -> list[Path]:
        """Prefixes of the stores that an earlier run has finished."""
        return [self._prefix(split, number) for number in self._finished for split in (TRAIN, HOLDOUT)]

    def _prefix(self, split: str, number: int) -> Path:
        """Path prefix of the store of a shard's training (``TRAIN``) or held-out documents (``HOLDOUT``)."""
        return store_prefix(self._folder, self._source.name, split, number)

    def _manifest_file(self, split: str, number: int) -> Path:
        return store.suffixed(self._prefix(split, number), ".json")

    def _make_recipe(self, settings: TokenizeSettings, tokenizer: Tokenizer) -> dict[str, Any]:
        """Everything that decides the tokens of a shard."""
        config = config_without(self._source, *_PLAN_KEYS)
        one_window = set(config["windows"]) != set(WINDOWS)  # only then does L0 decide which documents are kept
        splits = self._input.splits
        return {
            **{f"data.sources.{self._source.name}.{key}": value for key, value in config.items()},
            "the source's files": sources.identity(self._source, splits),
            "data.shard_bytes": fingerprint_of([sources.extent(split) for split in splits]),
            "the tokenizer": tokenizer.fingerprint,
            "data.holdout": settings.holdout,
            "model.original_window_tokens": settings.original_window_tokens if one_window else None,
            "data.decontaminate": decontaminate.recipe(settings.decontaminate),
            "the format": FORMAT,
        }

    def _refuse_another_recipe(self) -> None:
        """Write the recipe, or compare it with the recipe of the shards that are there.

        Raises:
            UserError: the recipes differ.
        """
        file, n_shards = self._store_folder / RECIPE, len(list(self._store_folder.glob(f"{TRAIN}-*.json")))
        before = store.sealed(file) if file.exists() else {}
        changed = [key for key in self._recipe if before.get(key) != self._recipe[key]]
        if n_shards and changed:
            # other files make other splits too, so data.shard_bytes is named only where it is the single change
            keys = ", ".join(key for key in changed if key != "data.shard_bytes") or "data.shard_bytes"
            raise UserError(
                f"data.sources.{self._source.name}: {n_shards} token shards in {self._store_folder} were made "
                f"before a change of {keys}; choose another name= to tokenise again"
            )
        if changed:
            self._store_folder.mkdir(parents=True, exist_ok=True)
            self._manifests.add(file, self._recipe)

    def ensure(self, workers: WorkerPool[SplitTask]) -> dict[str, Any]:
        """Make the token shards that are missing; returns what all shards of the source hold.

        Raises:
            UserError: the text of finished shards has changed, too much is lost, or there is no document.
        """
        self._refuse_other_contents(workers)
        scheduler, started = SplitScheduler(self._tasks, self._finished), time.monotonic()
        if scheduler.complete:
            self._stop_if_broken(scheduler.counted, ended=True)
            summary = self._summary(scheduler.counted)
            self._log(f"{self._source.name}: done before, {summary_line(summary)}")
        else:
            if self._finished:
                n_finished, n_all = len(self._finished), len(self._tasks)
                self._log(f"{self._source.name}: going on after {n_finished} of {n_all} token shards")
            self._tokenise(scheduler, workers)
            summary = self._summary(scheduler.counted)
            seconds, example = time.monotonic() - started, first_example(summary["contaminated_examples"])
            self._log(f"{self._source.name}: {summary_line(summary)} in {seconds:.1f} s{example}")
        file = self._store_folder / SOURCE
        if not file.exists() or store.sealed(file) != json.loads(json.dumps(summary)):
            reopen(self._folder)
            self._manifests.add(file, summary)
        return summary

    def _refuse_other_contents(self, workers: WorkerPool[SplitTask]) -> None:
        """Read the input of finished shards whose files were touched, and compare.

        Raises:
            UserError: a text has changed.
        """
        compared_before = self._read_compared()
        finished = [task for task in self._tasks if task.number in self._finished]
        touched = [task for task in finished if not self._is_unchanged(task, compared_before)]
        if not touched:
            return
        self._log(f"{self.name}: {len(touched)} token shards have touched or moved files; comparing their text")
        waiting = iter([task._replace(made_before=self._finished[task.number]) for task in touched])
        done, total = 0, sum(max(task.split.size_bytes, 1) for task in touched)
        with meter(f"compare {self._source.name}") as tick:
            for task, result in workers.run(lambda: next(waiting, None), lambda *_: None):
                if not result["same"]:
                    raise UserError(
                        f"data.sources.{self.name}: the text of {task.split.name} has changed since its token shard in "
                        f"{self._store_folder} was made; choose another name= to tokenise again"
                    )
                done += max(task.split.size_bytes, 1)
                tick(done / total, 1.0, "")
        compared = {str(task.number): self._compared_entry(task) for task in touched}
        write_json(self._store_folder / SEEN, {**compared_before, **compared})

    def _is_unchanged(self, task: SplitTask, compared: dict[str, list[str]]) -> bool:
        """Whether a split's files have the stamp that they were tokenised with, or that they were compared with."""
        tokenised = task.stamp == self._finished[task.number]["stamp"]
        return tokenised or compared.get(str(task.number)) == self._compared_entry(task)

    def _compared_entry(self, task: SplitTask) -> list[str]:
        return [task.stamp, self._finished[task.number]["contents"]]

    def _read_compared(self) -> dict[str, list[str]]:
        """By number of the shard: the stamp and the contents that were compared last.

        A broken file only costs another comparison.
        """
        try:
            return dict(read_json(self._store_folder / SEEN)) if (self._store_folder / SEEN).exists() else {}
        except (UserError, TypeError, ValueError):
            return {}

    def _tokenise(self, scheduler: SplitScheduler, workers: WorkerPool[SplitTask]) -> None:
        reopen(self._folder)
        (self._store_folder / SOURCE).unlink(missing_ok=True)
        fallbacks = set[str]()  # reasons that were logged
        with meter(f"tokenise {self._source.name}") as tick:
            progress = _Progress(scheduler, self._tasks, tick)
            for task, manifest in workers.run(lambda: self._next_task(scheduler), progress.report):
                self._write_manifests(task, manifest)
                scheduler.add_result(task, manifest)
                progress.done(task, manifest)
                if manifest["fallback"] not in {"", *fallbacks}:
                    fallbacks.add(manifest["fallback"])
                    first, reason = task.split.name, manifest["fallback"]
                    self._log(f"{self._source.name}: Hugging Face's tokenizers from {first} on, because {reason}")
                self._stop_if_broken(scheduler.counted, ended=False)
        assert scheduler.complete
        # shards beyond the limits stay: they serve when the limits are raised
        self._stop_if_broken(scheduler.counted, ended=True)

    def _next_task(self, scheduler: SplitScheduler) -> SplitTask | None:
        task = scheduler.next_task()
        if task is not None:
            for split in (HOLDOUT, TRAIN):
                self._manifests.drop(self._manifest_file(split, task.number))  # of an earlier version of the shard
        return task

    def _write_manifests(self, task: SplitTask, manifest: dict[str, Any]) -> None:
        """Have the manifests of a shard's two stores written.

        The training store's comes last, so it stands for both.
        """
        train = {key: value for key, value in manifest.items() if key != "holdout"}
        for split, values in ((HOLDOUT, manifest["holdout"]), (TRAIN, train)):
            files = [store.suffixed(self._prefix(split, task.number), suffix) for suffix in values["files"]]
            self._manifests.add(self._manifest_file(split, task.number), values, files)

    def _stop_if_broken(self, manifests: Sequence[dict[str, Any]], ended: bool) -> None:
        """Stop the job where too much of the source is lost. The examples are written first.

        Raises:
            UserError: more than ``max_broken_share`` is lost, or there is no document.
        """
        lost = BrokenShare(self._source, manifests, self._input)
        part = lost.exceeding(ended)
        if ended or part:
            _write_rejects(self._store_folder / REJECTS, self._source.name, manifests)
        if ended and lost.records.lost == lost.records.total:
            raise broken_share.no_document(self._source, lost.reasons, lost.columns)
        if part is not None:
            raise lost.refusal(part, ended, self._store_folder / REJECTS)
        if ended and not any(one["documents"] + one["holdout"]["documents"] for one in manifests):
            border = self._recipe["model.original_window_tokens"]
            raise UserError(
                f"data.sources.{self.name} has no document for windows={list(self._source.windows)} (the border is the "
                f"original window of {border} tokens); add the other window"
            )

    def _summary(self, manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The counts of all shards of the source together."""
        reasons = sum((Counter(one["reasons"]) for one in manifests), Counter[str]())
        examples = chain.from_iterable(one["contaminated_examples"] for one in manifests)
        return {
            "name": self._source.name,
            "kind": self._source.kind,
            "fingerprint": fingerprint_of([task.fingerprint for task in self._tasks[: len(manifests)]]),
            "tokenizer": self._recipe["the tokenizer"],
            "shards": len(manifests),
            **store_totals(manifests, [one["holdout"] for one in manifests]),
            "text_bytes": sum(one["text_bytes"] for one in manifests),
            "broken": reasons.total(),
            "broken_by_reason": dict(reasons),
            "lost_bytes": sum(one["lost_bytes"] for one in manifests),
            "lost_files": sorted({name for one in manifests for name in one["lost_files"]}),
            "contaminated": sum(one["contaminated"] for one in manifests),
            "contaminated_examples": list(islice(examples, _MAX_EXAMPLES)),
        }


def store_totals(train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Totals and checksums over the manifests of a source's stores."""
    totals = {key: sum(one[key] for one in train) for key in ("documents", "tokens", "targets")}
    totals |= {f"holdout_{key}": sum(one[key] for one in held_out) for key in ("documents", "tokens")}
    return {
        **totals,
        "sha256": fingerprint_of([one["files"] for one in train]),
        "holdout_sha256": fingerprint_of([one["files"] for one in held_out]),
    }


class _Progress:
    """Progress of a source: the share of its input or of a limit, the largest of them."""

    def __init__(self, scheduler: SplitScheduler, tasks: Sequence[SplitTask], tick: Tick) -> None:
        self._scheduler, self._tick = scheduler, tick
        self._sizes = [max(task.split.size_bytes, 1) for task in tasks]
        self._limits = tasks[0].limits
        self._read_share: dict[int, float] = dict.fromkeys(range(len(scheduler.counted)), 1.0)  # of each split
        self._text_bytes: dict[int, float] = {}  # of each split, in this run
        self._started = time.monotonic()

    def report(self, task: SplitTask, text_bytes: float) -> None:
        """A split goes on."""
        self._text_bytes[task.number] = text_bytes
        # the text in a compressed split may exceed its size, and only `done` says that it is finished
        self._read_share[task.number] = min(text_bytes / self._sizes[task.number], 0.95)
        self._show()

    def done(self, task: SplitTask, manifest: dict[str, Any]) -> None:
        """A split is finished."""
        self._text_bytes[task.number], self._read_share[task.number] = manifest["text_bytes"], 1.0
        self._show()

    def _show(self) -> None:
        read = sum(share * self._sizes[number] for number, share in self._read_share.items())
        shares = [read / sum(self._sizes), *self._shares_of_limits()]
        megabytes_per_s = sum(self._text_bytes.values()) / 1e6 / max(time.monotonic() - self._started, 1e-9)
        self._tick(float(min(max(shares), 1.0)), 1.0, f"{megabytes_per_s:.1f} MB/s")

    def _shares_of_limits(self) -> Iterator[float]:
        for limit, key in (
            (self._limits.documents, "read_documents"),
            (self._limits.text_bytes, "text_bytes"),
            (self._limits.tokens, "read_tokens"),
        ):
            if limit is not None:
                yield sum(manifest[key] for manifest in self._scheduler.counted) / limit


def _write_rejects(path: Path, source: str, manifests: Sequence[dict[str, Any]]) -> None:
    rejects = [{"source": source, "shard": one["shard"], **reject} for one in manifests for reject in one["rejects"]]
    if not rejects:
        path.unlink(missing_ok=True)
        return
    write_text(path, "".join(f"{json.dumps(reject)}\n" for reject in rejects))


def first_example(examples: Sequence[dict[str, str]]) -> str:
    """The first example, as the end of a message; empty where there is none."""
    return f", such as {' '.join(f'{key} {value}' for key, value in examples[0].items())}" if examples else ""


def summary_line(summary: dict[str, Any]) -> str:
    """The counts of a source, for the log."""
    held = f", {summary['holdout_documents']} documents with {summary['holdout_tokens']} tokens held out"
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary.get("broken_by_reason", {}).items())
    lost = f" ({summary['lost_bytes']} bytes: {reasons})" if reasons else ""
    broken = f", {summary['broken']} broken records skipped{lost}"
    contaminated = ""
    if n_contaminated := summary.get("contaminated", 0):
        contaminated = f", {n_contaminated} documents left out that share text with the evaluation sets"
    return f"{summary['documents']} documents, {summary['tokens']} tokens{held}{broken}{contaminated}"
