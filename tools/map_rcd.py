"""Map needle perplexity over the critical index rcd and the tail's scale, before any training: the paper's hypothesis.

    python -m tools.map_rcd --model launch/base --corpus runs/corpus --target 4096 --window 512 \\
        --attention-factor 1.0 1.15 1.3

A cell is a set of factors in the shape of LongRoPE2, with a constant tail of ``scale * L / L0`` from rcd on. The
measure is the perplexity of the answers of needle documents, and the share of the answers that greedy decoding finds.
Documents equal those of a search with the same number and seed. No rescaling, YaRN, NTK and PI are measured beside the
map, at the same attention factor. ``map_rcd_verdicts`` tests two
hypotheses over the cells.

Finished cells stand in ``<out>/cells.jsonl`` and are not measured again: the same command continues a killed one.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch

from lr2train import io, progress
from lr2train.cli.composition import compose
from lr2train.cli.door import EXIT_BAD_INPUT
from lr2train.config import Config, UserError, to_dict
from lr2train.data.corpus import Corpus
from lr2train.evolution.documents import SearchDocument, digest, draw_documents
from lr2train.model import load, rotary
from lr2train.model.score import score
from lr2train.rope.methods import METHODS
from lr2train.rope.spectrum import Spectrum
from tools.map_rcd_verdicts import FIXED_METHODS, RESAMPLES, Json, MapCell, in_words, table, verdicts


class Meter:
    """Measures cells on a loaded model and needle documents."""

    def __init__(self, config: Config, documents: Sequence[SearchDocument]) -> None:
        torch.set_num_threads(1)
        self._spectrum, self._target = spectrum_of(config), config.rope.target_window_tokens
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load.load_whole(load.folder_of(config.model), config.model.dtype, device, config.model.overrides)
        self._rotary = rotary.install(self._model, METHODS["none"](self._spectrum, self._target))
        self._documents = documents

    def measure(self, cell: MapCell) -> Json:
        """The line of a cell in cells.jsonl."""
        start = time.monotonic()
        self._rotary.use(cell.factors(self._spectrum, self._target))
        scores = [score(self._model, self._rotary, "long", one.tokens, one.spans) for one in self._documents]
        # A loss that is not finite comes from a broken model: as bad as possible.
        nll = [loss if math.isfinite(loss) else 1e9 for one in scores for loss in one.nlls]
        lengths = answer_tokens(self._documents)
        right = [n for one in scores for n in one.right]
        of_model = {"nll": nll, "found": [n == length for n, length in zip(right, lengths, strict=True)]}
        perplexity = math.exp(min(sum(nll) / sum(lengths), 700.0))
        return {**asdict(cell), "perplexity": perplexity, **of_model, "seconds": round(time.monotonic() - start, 2)}


def answer_tokens(documents: Sequence[SearchDocument]) -> list[int]:
    """Number of tokens of each answer, of all documents in order."""
    return [stop - start for one in documents for start, stop in one.spans]


_of_process: list[Meter] = []  # in a worker process: one meter, so that the model is loaded once


def _start_worker(config: Config, documents: Sequence[SearchDocument]) -> None:
    _of_process[:] = [Meter(config, documents)]


def _measure(cell: MapCell) -> Json:
    return _of_process[0].measure(cell)


def spectrum_of(config: Config) -> Spectrum:
    """Spectrum of the original model."""
    return load.spectrum_of(load.config_of(config.model), config.model)


def compose_config(given: argparse.Namespace) -> Config:
    """The experiment's search config with the model, corpus and windows of the command line."""
    window = "null" if given.window is None else given.window
    return compose(
        "search",
        [
            "name=map_rcd",
            f"experiment={given.experiment}",
            f"model.path='{given.model}'",
            f"data.path='{given.corpus}'",
            f"model.original_window_tokens={window}",
            f"rope.target_window_tokens={given.target}",
            "rope.factors=null",
            f"search.documents={given.documents}",
            "search.final_documents=0",
            f"search.seed={given.seed}",
            *(
                f"search.{key}={value}"
                for key in ("questions", "distractors")
                if (value := getattr(given, key)) is not None
            ),
            *given.set,
        ],
    )


def documents_of(config: Config) -> list[SearchDocument]:
    """The documents that a search with the same config scores."""
    corpus = Corpus.open(config.data.path)
    corpus.refuse_other_tokenizer(load.config_of(config.model).vocab_size, load.folder_of(config.model))
    return draw_documents(config, corpus)


def cells_of(given: argparse.Namespace, spectrum: Spectrum) -> list[MapCell]:
    """All cells, one attention factor after another.

    Raises:
        UserError: ``--indices`` names an index that the model does not have.
    """
    indices = given.indices or range(
        spectrum.lowest_critical_index, min(spectrum.critical_index + 2, spectrum.n_dims - 1) + 1
    )
    for index in indices:
        if not 1 <= index < spectrum.n_dims:
            raise UserError(
                f"--indices {index} is outside 1 … {spectrum.n_dims - 1}, the cosine indices of this model; give others"
            )
    cells = []
    for factor in given.attention_factor:
        cells += [MapCell(method, factor) for method in FIXED_METHODS]
        cells += [MapCell("longrope2", factor, index, scale) for index in indices for scale in given.scales]
    return list(dict.fromkeys(cells))


def settings_of(config: Config, documents: Sequence[SearchDocument], spectrum: Spectrum) -> Json:
    """Settings that decide the value of a cell; finished cells of other settings are refused."""
    return {
        "model": load.folder_fingerprint(load.folder_of(config.model)),
        "corpus": Corpus.open(config.data.path).fingerprint,
        "spectrum": asdict(spectrum),
        "target_window_tokens": config.rope.target_window_tokens,
        "documents": len(documents),
        "content": digest(documents),
        "questions": config.search.questions,
        "distractors": config.search.distractors,
        "depths": list(config.search.depths),
        "seed": config.search.seed,
        "needles": to_dict(config)["data"]["needles"],
        "dtype": config.model.dtype,
        "answer_tokens": answer_tokens(documents),
    }


def finished_cells(out: Path, settings: Json) -> dict[MapCell, Json]:
    """The finished cells in ``out``. A last line that a kill cut short is removed from the file.

    Raises:
        UserError: the cells were measured with another model, other documents or other windows.
    """
    if (out / "settings.json").exists():
        found = io.read_json(out / "settings.json")
        changed = [key for key, value in settings.items() if found.get(key) != value]
        if changed:
            raise UserError(
                f"--out {out} holds cells of other settings ({', '.join(changed)}); choose another --out, or remove "
                "the folder"
            )
    io.write_json(out / "settings.json", settings)
    file = out / "cells.jsonl"
    text = file.read_text() if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    lines = [json.loads(line) for line in whole.splitlines()]
    names = MapCell.__dataclass_fields__
    return {MapCell(**{name: line[name] for name in names}): line for line in lines}


def measured(
    cells: Sequence[MapCell], config: Config, documents: Sequence[SearchDocument], processes: int
) -> Iterator[Json]:
    """The lines of cells, in the order in which they are finished."""
    if processes <= 1:
        meter = Meter(config, documents)
        yield from map(meter.measure, cells)
        return
    context = get_context("forkserver")  # torch and transformers are imported once, not once per worker
    context.set_forkserver_preload(["tools.map_rcd"])
    with ProcessPoolExecutor(processes, context, _start_worker, (config, documents)) as pool:
        waiting = [pool.submit(_measure, cell) for cell in cells]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def fill(
    cells: Sequence[MapCell],
    done: dict[MapCell, Json],
    config: Config,
    documents: Sequence[SearchDocument],
    given: argparse.Namespace,
) -> None:
    """Measure the missing cells; each goes into ``done`` and to the end of cells.jsonl."""
    missing = [cell for cell in cells if cell not in done]
    names = MapCell.__dataclass_fields__
    with (given.out / "cells.jsonl").open("a") as file:
        lines = measured(missing, config, documents, given.processes) if missing else iter(())
        for line in progress.track(lines, len(cells), "map_rcd", len(cells) - len(missing)):
            file.write(json.dumps(line) + "\n")
            file.flush()
            done[MapCell(**{name: line[name] for name in names})] = line


def make_map(given: argparse.Namespace) -> Json:
    """Measure, test, draw; returns the content of summary.json.

    Raises:
        UserError: the model, the corpus, ``--indices`` or ``--out`` do not fit.
    """
    from tools.map_rcd_picture import rcd_map  # imports matplotlib, which workers do not need

    config = compose_config(given)
    spectrum, documents = spectrum_of(config), documents_of(config)
    cells, settings = cells_of(given, spectrum), settings_of(config, documents, spectrum)
    done = finished_cells(given.out, settings)
    knobs = config.search
    of = f"{len(documents)} documents with {knobs.questions} of {knobs.questions + knobs.distractors} needles asked for"
    progress.say("map_rcd", f"{len(cells)} cells of {of}, {sum(cell in done for cell in cells)} finished before")
    fill(cells, done, config, documents, given)
    lines = {cell: done[cell] for cell in cells}
    found = verdicts(lines, settings["answer_tokens"], spectrum.critical_index, given.seed)
    pictures = []
    for factor in given.attention_factor:
        print(table(lines, factor, spectrum), *([in_words(found[f"{factor:g}"])] if found else []), "", sep="\n")
        chart = rcd_map([line for cell, line in lines.items() if cell.attention_factor == factor], spectrum)
        pictures.append(chart.write(given.out / f"map_{factor:g}")[0])
    if "all" in found:
        print("all attention factors", in_words(found["all"]), "", sep="\n")
    summary = {
        "verdicts": found,
        "cells": len(cells),
        "documents": len(documents),
        "pictures": pictures,
        "resamples": RESAMPLES,
    }
    io.write_json(given.out / "summary.json", summary)
    print(*(f"picture: {picture}" for picture in pictures), sep="\n")
    return summary


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.map_rcd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the pretrained model, such as launch/base")
    parser.add_argument(
        "--corpus", type=Path, required=True, help="folder that prepare wrote; needles are hidden in its held-out text"
    )
    parser.add_argument(
        "--target",
        type=int,
        required=True,
        metavar="TOKENS",
        help="L, the target window; documents are this long",
    )
    parser.add_argument(
        "--window", type=int, metavar="TOKENS", help="L0, the original window (default: from the model's config)"
    )
    parser.add_argument("--documents", type=int, default=20, metavar="N", help="needle documents a cell (default: 20)")
    parser.add_argument(
        "--questions", type=int, metavar="N", help="needles asked for in each document (default: the experiment's)"
    )
    parser.add_argument("--distractors", type=int, metavar="N", help="needles beside them (default: the experiment's)")
    parser.add_argument(
        "--attention-factor",
        type=float,
        nargs="+",
        default=[1.2],
        metavar="X",
        help="attention factors of the long window, one map each; logits scale by the square (default: 1.2)",
    )
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=[0.8, 1.0, 1.25, 1.6, 2.0],
        metavar="X",
        help="scales of the tail, in multiples of s = L / L0 (default: 0.8 1.0 1.25 1.6 2.0)",
    )
    parser.add_argument(
        "--indices", type=int, nargs="+", metavar="I", help="critical indices, zero-based (default: d10 … tcd + 2)"
    )
    parser.add_argument(
        "--experiment",
        default="tiny_4k",
        metavar="NAME",
        help="experiment whose needle settings are used (default: tiny_4k)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="further settings of the search, such as model.dtype=bfloat16 search.depths=[0.0]",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the documents and of the bootstrap (default: 0)")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the cells, one thread each (default: 1)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/map_rcd"), help="folder of the results (default: runs/map_rcd)"
    )
    return parser.parse_args(words)


def main() -> int:
    """Exit codes: 0 done, 2 the input was wrong (one sentence on stderr)."""
    try:
        make_map(arguments())
    except UserError as error:
        print(f"map_rcd: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
