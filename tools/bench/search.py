"""The search beside the paper's plain loop on three base models: document-forwards, perplexity of held-out needles.

    python -m tools.bench.search [--only demo window_128] [--seeds 5] [--minutes 9]

Plain is the paper's loop in a scaled form: population 32, 8 iterations, 10 documents with the needle at the start. It
also searches the attention factor, and its critical index mutates: else it would compare attention factors.
``gradient_ntk`` and ``small_ntk`` have the paper's factors below the critical index, as plain has;
``gradient_start`` has its needle at the start too. Still, the presets ask for four needles a document, plain for one.
Searches run one after another in this process, and a finished one is not run again; after ``--minutes`` it ends and the
same command goes on. The base of ``demo`` is launch/base; the other two are trained first where they are
missing, from the demo's corpus.

All winners are scored on the same held-out documents, which no corpus holds: each is a source file of an installed
package, with one question. A first set has the needle at the start, a second one at five depths. A difference to plain
has a standard error, by a bootstrap over seeds and documents. The last lines read ``name: value``. Exits with 1 where
``gradient`` or ``small`` is worse than plain by more than one standard error, or where nothing has been compared yet.
"""

from __future__ import annotations

import argparse
import contextlib
import io as text_io
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lr2train import io, progress, run
from lr2train.cli.composition import compose
from lr2train.data.corpus import Corpus
from lr2train.data.needles import NeedleDocument, NeedleMaker
from lr2train.model import load, rotary
from lr2train.model.score import score
from lr2train.rope import METHODS, Factors
from lr2train.search import search

ROOT = Path(__file__).resolve().parents[2]
LICENSE_CHARACTERS = 2000  # the license at the top of every file is skipped
NEEDLES = 21  # in every document, asked for or not: every good candidate finds a single needle
DEPTHS = {"start": [0.0], "depths": [0.0, 0.25, 0.5, 0.75, 1.0]}
VARIANTS = {
    "plain": [
        "search=paper", "search.population=32", "search.top_k=8", "search.generations=8",
        "search.search_attention_factor=true", "search.move_critical_index=0.2", "search.questions=1",
        f"search.distractors={NEEDLES - 1}",
    ],
    "gradient": ["search=gradient"],
    "small": ["search=small"],
    "gradient_ntk": ["search=gradient", "search.head=ntk"],
    "small_ntk": ["search=small", "search.head=ntk"],
    "gradient_start": ["search=gradient", "search.head=ntk", "search.depths=[0.0]"],
}  # fmt: skip
PRESETS = ("gradient", "small")  # as users run them
_SHORT_STAGES = (
    "data.stages=[{steps: 200, length_tokens: 64, repeats: 1.0},"
    "{steps: 450, length_tokens: 128, repeats: 0.15, needles: 0.3, dense: 0.4, text: 0.15}]"
)
_WINDOW_128 = [_SHORT_STAGES, "rope.target_window_tokens=128", "model.architecture.max_position_embeddings=128"]


@dataclass(frozen=True)
class Base:
    """A base model: how it is trained, and the window that it is extended to."""

    target_tokens: int
    overrides: Sequence[str] = ()


BASES = {
    "demo": Base(4096),
    "window_128": Base(1024, [*_WINDOW_128, "seed=1"]),
    "theta_1e5": Base(1024, [*_WINDOW_128, "seed=2", "model.architecture.rope_parameters.rope_theta=100000.0"]),
}
Losses = dict[str, list[float]]
"""Set of held-out documents -> loss per answer token of each document, nats."""


def main() -> int:
    """Run what is missing until the time is over; print the table of all that is finished."""
    asked, start = _arguments(), time.monotonic()
    torch.set_num_threads(1)
    for work in _all_work(asked):
        work()
        if time.monotonic() - start > 60 * asked.minutes:
            progress.say("bench_search", "time is over; the same command goes on")
            break
    return _report(asked)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=BASES, default=list(BASES), help="base models")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="searches")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--held-out", type=int, default=60, help="documents of each set")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after this time")
    parser.add_argument("--runs", default="runs", help="folder of corpus and base models, made where missing")
    parser.add_argument("--out", default="runs/bench_search", help="folder of the searches")
    return parser.parse_args()


def _model(asked: argparse.Namespace, base: str) -> Path:
    return ROOT / "launch" / "base" if base == "demo" else Path(asked.runs) / base / "model"


def _all_work(asked: argparse.Namespace) -> Iterator[Any]:
    """Functions that each do one missing piece, in their order."""
    corpus = Path(asked.runs) / "corpus"
    if not (corpus / "corpus.json").exists():
        yield lambda: _call("prepare", "experiment=tiny_4k", f"runs_folder={asked.runs}", "name=corpus")
    for base in asked.only:
        if not (_model(asked, base) / "config.json").exists():
            yield lambda base=base: _train(asked, base)
    for seed in range(asked.seeds):
        for base in asked.only:
            for variant in asked.variants:
                if not (_folder(asked, base, variant, seed) / "search.json").exists():
                    yield lambda one=(base, variant, seed): _search(asked, *one)
                if not _losses_file(asked, base, variant, seed).exists():
                    yield lambda one=(base, variant, seed): _score(asked, *one)


def _call(verb: str, *overrides: str) -> None:
    if code := subprocess.run([sys.executable, "-m", "lr2train", verb, *overrides]).returncode:
        raise SystemExit(code)  # the verb has said why


def _train(asked: argparse.Namespace, base: str) -> None:
    where = [f"runs_folder={asked.runs}", f"name={_model(asked, base).parent.name}", f"data.path={asked.runs}/corpus"]
    _call("train", "experiment=tiny_base", *where, *BASES[base].overrides)


def _folder(asked: argparse.Namespace, base: str, variant: str, seed: int) -> Path:
    return Path(asked.out) / base / f"{variant}_{seed}"


def _search(asked: argparse.Namespace, base: str, variant: str, seed: int) -> None:
    folder = _folder(asked, base, variant, seed)
    progress.say("bench_search", f"{base}, {variant}, seed {seed}")
    with contextlib.redirect_stdout(text_io.StringIO()):
        search(compose("search", [*_setting(asked, base), f"seed={seed}", *VARIANTS[variant],
            f"runs_folder={folder.parent}", f"name={folder.name}"]))  # fmt: skip


def _setting(asked: argparse.Namespace, base: str) -> list[str]:
    return [
        "experiment=tiny_4k", f"model.path={_model(asked, base)}", "model.original_window_tokens=null",
        f"data.path={asked.runs}/corpus", f"rope.target_window_tokens={BASES[base].target_tokens}", "device=cpu",
        "threads=1", "logger.tensorboard=false",
    ]  # fmt: skip


# ---- held-out documents ----


def _losses_file(asked: argparse.Namespace, base: str, variant: str, seed: int) -> Path:
    return _folder(asked, base, variant, seed) / f"held_out_{asked.held_out}.json"


def _score(asked: argparse.Namespace, base: str, variant: str, seed: int) -> None:
    factors = Factors.load(_folder(asked, base, variant, seed) / "factors.json")
    io.write_json(_losses_file(asked, base, variant, seed), _losses(asked, base, factors))


def _losses(asked: argparse.Namespace, base: str, factors: Factors) -> Losses:
    model = load.load_whole(_model(asked, base))
    table = rotary.install(model, factors)
    table.use(factors)
    return {
        kind: [score(model, table, "long", one.tokens, one.answer_spans).nll / one.n_answer_tokens for one in documents]
        for kind, documents in _held_out(asked, BASES[base].target_tokens).items()
    }


_HELD_OUT: dict[int, dict[str, list[NeedleDocument]]] = {}


def _held_out(asked: argparse.Namespace, length: int) -> dict[str, list[NeedleDocument]]:
    """The two sets, of ``length`` tokens a document; each source file gives one document."""
    if length not in _HELD_OUT:
        needles = compose("search", ["experiment=tiny_4k", "name=held_out"]).data.needles
        tokenizer = Corpus.open(Path(asked.runs) / "corpus").tokenizer
        texts = _unseen_texts(tokenizer, len(DEPTHS) * asked.held_out, length)
        maker = NeedleMaker(tokenizer.encode, needles.wording, needles.digits, tokenizer.bos, None)
        made = _HELD_OUT.setdefault(length, {})
        for place, (kind, depths) in enumerate(DEPTHS.items()):
            rng = run.stream(20_000, "held_out", kind)
            made[kind] = [
                maker.make(rng, text, length, depths[number % len(depths)], NEEDLES)
                for number, text in enumerate(texts[place :: len(DEPTHS)])
            ]
    return _HELD_OUT[length]


def _unseen_texts(tokenizer: Any, n_texts: int, length: int) -> list[np.ndarray]:
    """Token ids of ``n_texts`` long source files of transformers, which no corpus of the demo holds."""
    import transformers

    files = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    texts = []
    for number in run.stream(20_000, "unseen").permutation(len(files)):
        body = files[number].read_text()[LICENSE_CHARACTERS : LICENSE_CHARACTERS + 40 * length]
        ids = tokenizer.encode(body)
        if len(ids) >= length:
            texts.append(np.asarray(ids))
        if len(texts) == n_texts:
            return texts
    raise SystemExit(f"only {len(texts)} of {n_texts} source files of transformers are long enough")


# ---- report ----


def _report(asked: argparse.Namespace) -> int:
    """Print a row for each base and search, over the seeds that every search of the base has finished."""
    columns = ["base", "search", "seeds", "document-forwards", "share of plain"]
    columns += [cell for kind in DEPTHS for cell in (kind, "minus plain, nats", "standard error")]
    print("\n| " + " | ".join(columns) + " |\n|---|---|" + "---:|" * (len(columns) - 2))
    figures, worse = [], []
    for base in asked.only:
        seeds = [
            seed
            for seed in range(asked.seeds)
            if all(_losses_file(asked, base, one, seed).exists() for one in asked.variants)
        ]
        if not seeds:
            continue
        losses = {one: [io.read_json(_losses_file(asked, base, one, seed)) for seed in seeds] for one in asked.variants}
        cost = {one: np.mean([_forwards(asked, base, one, seed) for seed in seeds]) for one in asked.variants}
        for one in asked.variants:
            cells = [base, one, len(seeds), f"{cost[one]:.0f}"]
            cells.append(f"{cost[one] / cost['plain']:.3f}" if "plain" in cost else "")
            for kind in DEPTHS:
                mine = np.array([of_seed[kind] for of_seed in losses[one]])
                cells += [f"{math.exp(mine.mean()):.4f}"]
                if one == "plain" or "plain" not in losses:
                    cells += ["", ""]
                    continue
                difference = mine - np.array([of_seed[kind] for of_seed in losses["plain"]])
                error = _standard_error(difference)
                cells += [f"{difference.mean():+.4f}", f"{error:.4f}"]
                figures.append((f"{base}_{one}_{kind}_nats_minus_plain", difference.mean()))
                if difference.mean() > error:
                    worse.append((base, one, kind))
            print("| " + " | ".join(map(str, cells)) + " |")
        for name in ("ntk", "yarn"):
            print(
                "| "
                + " | ".join(map(str, [base, f"{name}, no search", "", 0, "", *_unsearched(asked, base, name)]))
                + " |"
            )
    print()
    for name, value in figures:
        print(f"{name}: {value:.4f}")
    if not figures:
        print("no seed of a base has finished plain and all the other searches; nothing is compared")
        return 1
    print(f"worse_than_plain_by_more_than_one_standard_error: {', '.join(map('_'.join, worse)) or 'none'}")
    return 1 if any(one in PRESETS for _, one, _ in worse) else 0


def _forwards(asked: argparse.Namespace, base: str, variant: str, seed: int) -> int:
    return json.loads((_folder(asked, base, variant, seed) / "search.json").read_text())["document_forwards"]


def _unsearched(asked: argparse.Namespace, base: str, method: str) -> list[str]:
    """Cells of a method without a search."""
    file = Path(asked.out) / base / f"{method}_{asked.held_out}.json"
    if not file.exists():
        spectrum = Factors.load(next((Path(asked.out) / base).glob("*_*/factors.json"))).spectrum
        io.write_json(file, _losses(asked, base, METHODS[method](spectrum, BASES[base].target_tokens)))
    return [cell for losses in io.read_json(file).values() for cell in (f"{math.exp(np.mean(losses)):.4f}", "", "")]


def _standard_error(differences: np.ndarray) -> float:
    """Standard error of the mean of differences [seeds, documents], by a bootstrap over seeds and documents."""
    rng, (n_seeds, n_documents) = run.stream(0, "bootstrap"), differences.shape
    drawn = (
        differences[np.ix_(rng.integers(n_seeds, size=n_seeds), rng.integers(n_documents, size=n_documents))]
        for _ in range(1000)
    )
    return float(np.std([one.mean() for one in drawn]))


if __name__ == "__main__":
    sys.exit(main())
