"""Search algorithms beside the paper's plain loop: document-forwards, and perplexity on held-out needles.

    python -m tools.bench.search [--quick]

Every search is a run of ``lr2train search`` on the demo's tiny model, in its own process. Finished searches
are not run again. Plain and racing searches of a seed share population size, iterations, operators and the first
candidates.

All winners are scored on the same held-out documents, which no corpus holds: each is a source file of an installed
package. Documents have the paper's form (one question, needle at the start) with distractors; a second set has the
needle at five depths. A quick run has too few seeds to tell similar searches apart, so its bound allows one standard
error. The last lines read ``name: value``. Exits with 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lr2train import progress, run
from lr2train.cli.composition import compose
from lr2train.config import NeedleConfig
from lr2train.data.corpus import Corpus
from lr2train.data.needles import NeedleDocument, NeedleMaker
from lr2train.model import load, rotary
from lr2train.model.score import score
from lr2train.rope import METHODS, Factors

ROOT = Path(__file__).resolve().parent.parent.parent

BOUND = "surrogate"  # the search with bounds: the default of ``search=``
COST_BOUND = 0.25  # of the plain loop's document-forwards
LICENSE_CHARACTERS = 2000  # the license at the top of every file is skipped
NEEDLES = 21  # in every document, asked for or not: every good candidate finds a single needle
ONE = ["search.questions=1", f"search.distractors={NEEDLES - 1}"]
FOUR = ["search.questions=4", f"search.distractors={NEEDLES - 4}"]
PLAIN = ["search.racing=false", "search.documents=10", "search.final_documents=0", *ONE]
RACING = ["search.racing=true", "search.documents=3", "search.final_documents=24", *FOUR]
VARIANTS = {
    "plain": PLAIN,
    "racing_only": [*PLAIN, "search.racing=true"],
    "racing": RACING,
    "cmaes": [*RACING, "search.algorithm=cmaes"],
    "surrogate": [*ONE, "search.algorithm=surrogate", "search.documents=20", "search.final_documents=24"],
}
COLUMNS = (
    "variant",
    "seed",
    "document-forwards",
    "rcd",
    "attention factor",
    "search perplexity",
    "held-out: start",
    "held-out: depths",
)
DESCRIPTIONS = {
    "plain": "the paper's loop: every candidate on 10 documents of one question",
    "racing_only": "the same documents, hopeless candidates dropped",
    "racing": "3 documents of 4 questions, racing, the last top_k on 24 further documents",
    "cmaes": "CMA-ES instead of evolution, on racing's documents",
    "surrogate": (
        "20 documents of one question and 24 further documents; a Gaussian process over all evaluations chooses "
        "candidates and documents"
    ),
}


@dataclass(frozen=True)
class SearchSize:
    """Extent of the benchmark."""

    seeds: int
    population: int
    generations: int
    top_k: int
    variants: tuple[str, ...]
    held_out: int  # documents with the needle at the start, and as many with needles at five depths
    margin: float  # standard errors by which a search may be worse and still count as equal


FULL = SearchSize(5, 32, 8, 8, ("plain", "racing_only", "racing", "cmaes", "surrogate"), 120, 0.0)
QUICK = SearchSize(4, 16, 4, 4, ("plain", "surrogate"), 40, 1.0)  # too few seeds for a smaller margin


def main() -> int:
    """Run all searches, score their winners, print the table and the figures."""
    arguments = _arguments()
    size, folder = (QUICK if arguments.quick else FULL), Path(arguments.out) / ("quick" if arguments.quick else "full")
    _make_model(arguments)
    jobs = [(variant, seed) for seed in range(size.seeds) for variant in size.variants]
    _search_all(arguments, size, folder, jobs)
    held_out = _score_all(arguments, size, folder, jobs)
    return _report(size, folder, held_out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small search, plain and surrogate alone; less than ten minutes"
    )
    parser.add_argument("--model", default="runs/base/model", help="where missing, the demo's first two steps make it")
    parser.add_argument("--corpus", default="runs/corpus", help="where missing, the demo's first step makes it")
    parser.add_argument(
        "--out", default="runs/bench_search", help="folder of the searches; finished searches are not run again"
    )
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="concurrent searches, one thread each"
    )
    return parser.parse_args()


def _make_model(arguments: argparse.Namespace) -> None:
    """The demo's corpus and base model, where they are missing."""
    if not (Path(arguments.corpus) / "corpus.json").exists():
        _call("lr2train.prepare", "experiment=tiny_4k", *_where(Path(arguments.corpus)))
    if not (Path(arguments.model) / "config.json").exists():
        progress.say("bench_search", f"no model at {arguments.model}: training the demo's base, about five minutes")
        where = _where(Path(arguments.model).parent)
        subprocess.run(
            [
                "bash",
                str(ROOT / "launch" / "run.sh"),
                "2",
                "train",
                "experiment=tiny_base",
                f"data.path={arguments.corpus}",
                *where,
            ],
            check=True,
        )


def _where(folder: Path) -> list[str]:
    return [f"runs_folder={folder.parent}", f"name={folder.name}"]


def _call(module: str, *overrides: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", module, *overrides], env=environ, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(overrides)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


# ---- searches ----


def _overrides(arguments: argparse.Namespace, size: SearchSize, variant: str, seed: int) -> list[str]:
    return [
        "experiment=tiny_4k", f"model.path={arguments.model}", f"data.path={arguments.corpus}", "device=cpu",
        "threads=1", f"seed={seed}", f"search.population={size.population}",
        f"search.generations={size.generations}", f"search.top_k={size.top_k}", *VARIANTS[variant],
    ]  # fmt: skip


def _search_all(arguments: argparse.Namespace, size: SearchSize, folder: Path, jobs: Sequence[tuple[str, int]]) -> None:
    def one(job: tuple[str, int]) -> None:
        variant, seed = job
        run_folder = folder / f"{variant}_{seed}"
        _call("lr2train.search", *_overrides(arguments, size, variant, seed), *_where(run_folder))

    _in_order("searches", [job for job in jobs if job[0] != "racing_only"], one, arguments.processes)
    again = [job for job in jobs if job[0] == "racing_only"]
    for variant, seed in again:
        _copy_journal(folder / f"plain_{seed}", folder / f"{variant}_{seed}")
    _in_order("searches over the plain loop's journal", again, one, arguments.processes)


def _copy_journal(plain: Path, run_folder: Path) -> None:
    """Reuse the plain loop's evaluations of the same documents; they count as document-forwards all the same."""
    if not run_folder.exists():
        run_folder.mkdir(parents=True)
        (run_folder / "journal.jsonl").write_text((plain / "journal.jsonl").read_text())


def _in_order(what: str, jobs: Sequence[Any], one: Callable[[Any], None], processes: int) -> None:
    start = time.monotonic()
    with ThreadPoolExecutor(processes) as pool:
        for number, done in enumerate(as_completed([pool.submit(one, job) for job in jobs]), 1):
            if done.exception():
                pool.shutdown(cancel_futures=True)
            done.result()
            spent = time.monotonic() - start
            progress.say(
                "bench_search",
                f"{what}: {number}/{len(jobs)}, {spent:.0f} s, {spent / number * (len(jobs) - number):.0f} s left",
            )


# ---- held-out documents ----

Task = tuple[str, str, list[NeedleDocument], Factors, str]  # model, name, documents, factors, kind


def _score_all(
    arguments: argparse.Namespace, size: SearchSize, folder: Path, jobs: Sequence[tuple[str, int]]
) -> dict[tuple[str, str], list[float]]:
    """(subject, kind) -> loss per answer token of every held-out document."""
    settings = compose("search", [*_overrides(arguments, size, "plain", 0), "name=held_out"])
    corpus, length = Corpus.open(arguments.corpus), settings.rope.target_window_tokens
    kinds = {"start": [0.0], "depths": [0.0, 0.25, 0.5, 0.75, 1.0]}
    texts = _unseen_texts(corpus, 2 * size.held_out, length)
    documents = {
        kind: _held_out(corpus, settings.data.needles, texts[number :: len(kinds)], length, depths, kind)
        for number, (kind, depths) in enumerate(kinds.items())
    }
    subjects = {
        f"{variant}_{seed}": Factors.load(folder / f"{variant}_{seed}" / "factors.json") for variant, seed in jobs
    }
    spectrum = next(iter(subjects.values())).spectrum
    subjects |= {name: METHODS[name](spectrum, length) for name in ("ntk", "yarn")}
    tasks: list[Task] = [
        (arguments.model, name, documents[kind], factors, kind) for name, factors in subjects.items() for kind in kinds
    ]
    found: dict[tuple[str, str], list[float]] = {}
    start = time.monotonic()
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        for number, (key, losses) in enumerate(pool.map(_losses, tasks), 1):
            found[key] = losses
            left = (time.monotonic() - start) / number * (len(tasks) - number)
            progress.say("bench_search", f"held-out: {number}/{len(tasks)}, {left:.0f} s left")
    return found


def _unseen_texts(corpus: Corpus, n_texts: int, length: int) -> list[np.ndarray]:
    """Token ids of ``n_texts`` long source files of transformers, which no corpus of the demo holds."""
    import transformers

    files = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    texts = []
    for number in run.stream(20_000, "unseen").permutation(len(files)):
        body = files[number].read_text()[LICENSE_CHARACTERS : LICENSE_CHARACTERS + 40 * length]
        ids = corpus.tokenizer.encode(body)
        if len(ids) >= length:
            texts.append(np.asarray(ids))
        if len(texts) == n_texts:
            return texts
    raise SystemExit(f"only {len(texts)} of {n_texts} source files of transformers are long enough")


def _held_out(
    corpus: Corpus,
    needles: NeedleConfig,
    texts: Sequence[np.ndarray],
    length: int,
    depths: Sequence[float],
    kind: str,
) -> list[NeedleDocument]:
    rng, tokenizer = run.stream(20_000, "held_out", kind), corpus.tokenizer
    maker = NeedleMaker(tokenizer.encode, needles.wording, needles.digits, tokenizer.bos, None)
    return [maker.make(rng, text, length, depths[number % len(depths)], NEEDLES) for number, text in enumerate(texts)]


def _losses(task: Task) -> tuple[tuple[str, str], list[float]]:
    path, name, documents, factors, kind = task
    torch.set_num_threads(1)
    model = load.load_whole(path)
    table = rotary.install(model, factors)
    table.use(factors)
    return (name, kind), [
        score(model, table, "long", one.tokens, one.answer_spans).nll / one.n_answer_tokens for one in documents
    ]


# ---- report ----


def _report(size: SearchSize, folder: Path, held_out: dict[tuple[str, str], list[float]]) -> int:
    results = {
        (variant, seed): json.loads((folder / f"{variant}_{seed}" / "search.json").read_text())
        for variant in size.variants
        for seed in range(size.seeds)
    }
    print(
        f"P = {size.population}, {size.generations} iterations, top_k = {size.top_k}, {size.seeds} seeds, {NEEDLES} "
        "needles a document\n"
    )
    for variant in size.variants:
        print(f"{variant}: {DESCRIPTIONS[variant]}")
    print()
    print(_row(*COLUMNS))
    for (variant, seed), one in results.items():
        found = (
            one["document_forwards"],
            one["critical_index"],
            f"{one['attention_factor']:.3f}",
            f"{one['perplexity']:.4f}",
        )
        print(_row(variant, seed, *found, *_held_out_perplexities(held_out, f"{variant}_{seed}")))
    for name in ("ntk", "yarn"):
        print(_row(name, "", "", "", "", "", *_held_out_perplexities(held_out, name)))
    return _figures(size, folder, results, held_out)


def _held_out_perplexities(held_out: dict[tuple[str, str], list[float]], subject: str) -> list[str]:
    return [f"{_perplexity(held_out[subject, kind]):.4f}" for kind in ("start", "depths")]


def _row(*cells: object) -> str:
    """A line of the table; each column is as wide as its heading."""
    first, *others = (f"{cell}" for cell in cells)
    return f"{first:12}" + "".join(f"  {cell:>{len(head)}}" for cell, head in zip(others, COLUMNS[1:], strict=True))


def _figures(
    size: SearchSize,
    folder: Path,
    results: dict[tuple[str, int], dict[str, Any]],
    held_out: dict[tuple[str, str], list[float]],
) -> int:
    print()
    seeds, forwards, perplexity = range(size.seeds), {}, {}
    for variant in size.variants:
        forwards[variant] = [results[variant, seed]["document_forwards"] for seed in seeds]
        print(f"document_forwards_{variant}: {sum(forwards[variant])}")
        for kind in ("start", "depths"):
            losses = [loss for seed in seeds for loss in held_out[f"{variant}_{seed}", kind]]
            perplexity[variant, kind] = _perplexity(losses)
            print(f"held_out_perplexity_{kind}_{variant}: {perplexity[variant, kind]:.4f}")
    for variant in size.variants[1:]:
        shares = [mine / plain for mine, plain in zip(forwards[variant], forwards["plain"], strict=True)]
        wins = sum(
            np.mean(held_out[f"{variant}_{seed}", "start"]) <= np.mean(held_out[f"plain_{seed}", "start"])
            for seed in seeds
        )
        print(f"cost_{variant}_over_plain: {sum(forwards[variant]) / sum(forwards['plain']):.4f}")
        print(f"largest_cost_{variant}_over_plain_of_a_seed: {max(shares):.4f}")
        print(f"seeds_on_which_{variant}_is_at_least_as_good_as_plain: {wins} of {size.seeds}")
        mine, plain = (np.array([held_out[f"{one}_{seed}", "start"] for seed in seeds]) for one in (variant, "plain"))
        print(f"nats_a_token_{variant}_minus_plain: {(mine - plain).mean():.4f}")
        print(f"standard_error_of_{variant}_minus_plain: {_standard_error(mine - plain):.4f}")
    journals = [folder / f"plain_{seed}" / "journal.jsonl" for seed in seeds]
    seconds = [json.loads(line)["seconds"] for journal in journals for line in journal.read_text().splitlines()]
    print(f"seconds_per_document_forward: {np.median(seconds):.4f}")
    cheap = max(mine / plain for mine, plain in zip(forwards[BOUND], forwards["plain"], strict=True)) <= COST_BOUND
    worse = np.array(
        [np.subtract(held_out[f"{BOUND}_{seed}", "start"], held_out[f"plain_{seed}", "start"]) for seed in seeds]
    )
    good = worse.mean() <= size.margin * _standard_error(worse)
    print(f"bound_cost_of_{BOUND}_at_most_{COST_BOUND}: {'met' if cheap else 'MISSED'}")
    margin = f"_within_{size.margin:g}_standard_error" if size.margin else ""
    print(f"bound_{BOUND}_at_least_as_good_as_plain_on_held_out_needles{margin}: {'met' if good else 'MISSED'}")
    return 0 if cheap and good else 1


def _standard_error(differences: np.ndarray) -> float:
    """Standard error of the mean of differences [seeds, documents], by a bootstrap over seeds and documents."""
    rng, (n_seeds, n_documents) = run.stream(0, "bootstrap"), differences.shape
    drawn = (
        differences[np.ix_(rng.integers(n_seeds, size=n_seeds), rng.integers(n_documents, size=n_documents))]
        for _ in range(1000)
    )
    return float(np.std([one.mean() for one in drawn]))


def _perplexity(losses: Sequence[float]) -> float:
    return math.exp(min(float(np.mean(losses)), 700.0))


if __name__ == "__main__":
    sys.exit(main())
