"""inspect: show segments of a corpus: their documents, sources and text.

    lr2train inspect data.path=runs/corpus                                   the first segment of each window
    lr2train inspect data.path=runs/corpus inspect.window=long inspect.segment=3
    lr2train inspect run=first inspect.step=17 inspect.dp_size=8             step 17 of a run, rank by rank
    lr2train inspect data.path=runs/corpus optim.segments_per_step=64 inspect.step=17

Steps are counted as in metrics.jsonl. ``run=`` takes the corpus, the seed, the global batch and the groups of a
training run. In the bar a letter is a source, a dot is padding; case alternates by document. In the table
``<`` marks a document that begins before this segment, and ``>`` a document that goes on after it. The files of the
corpus are first compared with their checksums, once (``data.verify``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lr2train import io
from lr2train.cli.door import main
from lr2train.config import Config, LongAttention, UserError
from lr2train.data.batch import WINDOWS
from lr2train.data.corpus import Corpus
from lr2train.data.feed.loader import SegmentLoader, make_loader
from lr2train.data.feed.order import default_group
from lr2train.data.feed.viewing import PADDING, SegmentView, Viewer, bar, letters_of
from lr2train.training.steps import StepRanges, Steps

_BAR_CELLS, _STEP_CELLS, _NARROWEST = 96, 48, 140
_HEADER = ("at", "tokens", "source", "document", "from the document", "targets", "text")
_RIGHT = (0, 1, 5)  # columns of numbers


def inspect(config: Config) -> list[SegmentView]:
    """Run the verb: print the segments that were asked for; returns them.

    Raises:
        UserError: the corpus, segment, step or run does not exist.
    """
    config = _of_run(config)
    corpus = Corpus.open(config.data.path)
    corpus.verify(full=config.data.verify)
    asked, letters = config.inspect, letters_of(corpus.source_names)
    if asked.step is not None:
        return _show_step(config, corpus, letters)
    viewer = Viewer(corpus, _loader(config, corpus, 1))
    shown = [viewer.look(window, number, asked.text_chars) for window, number in _chosen(config, viewer.loader)]
    for segment in shown:
        _print_segment(segment, letters, asked.documents)
    return shown


def _of_run(config: Config) -> Config:
    """The config with the settings that decided the data of the run that ``run=`` names; unchanged without ``run=``."""
    if config.run is None:
        return config
    folder = Path(config.runs_folder) / config.run
    saved = io.read_json(folder / "train.config.json")
    if saved["data"]["kind"] != "segments":
        raise UserError(
            f"run={config.run} was trained with data.kind={saved['data']['kind']}, which plans no segments; choose "
            "another run"
        )
    data = replace(
        config.data,
        path=config.data.path or saved["data"]["path"],
        long_attention=LongAttention[saved["data"]["long_attention"]],
        group_segments=saved["data"].get("group_segments", 0),
        skip_steps=saved["data"].get("skip_steps", []),
    )
    steps = Steps.settle(folder, data, config.inspect.dp_size, saved["optim"]["segments_per_step"])
    if steps.before is not None:  # train.config.json is of the first start; a later start may skip more steps
        data = replace(data, skip_steps=steps.before.texts)
    optim = replace(config.optim, segments_per_step=saved["optim"]["segments_per_step"])
    return replace(config, seed=saved["seed"], data=steps.applied(data), optim=optim)


def _loader(config: Config, corpus: Corpus, dp_size: int) -> SegmentLoader:
    data = replace(config.data, segment_tokens=corpus.segment_tokens, kind="segments")
    loader = make_loader(corpus, data, config.seed, 0, dp_size, config.optim.segments_per_step)
    assert isinstance(loader, SegmentLoader)
    return loader


def _chosen(config: Config, loader: SegmentLoader) -> list[tuple[str, int]]:
    """Window and number of the segments that were asked for.

    Raises:
        UserError: no window has a segment of that number.
    """
    number, windows = (
        config.inspect.segment or 0,
        WINDOWS if config.inspect.window is None else (config.inspect.window,),
    )
    chosen = [(window, number) for window in windows if number < loader.n_segments(window)]
    if not chosen:
        counts = " and ".join(f"{loader.n_segments(window)} {window}" for window in windows)
        raise UserError(
            f"inspect.segment={number} is not there: the corpus has {counts} segments, counted from 0; set a smaller "
            "number"
        )
    return chosen


def _show_step(config: Config, corpus: Corpus, letters: dict[str, str]) -> list[SegmentView]:
    step, size = config.inspect.step or 1, config.inspect.dp_size
    if config.optim.segments_per_step % size:
        raise UserError(
            f"inspect.dp_size={size} does not divide the {config.optim.segments_per_step} segments of a step "
            "(optim.segments_per_step); set inspect.dp_size to a divisor"
        )
    viewer = Viewer(corpus, _loader(config, corpus, size))
    by_rank = [viewer.loader.segments(step - 1, rank) for rank in range(size)]
    skipped = " (passed over: data.skip_steps)" if step in StepRanges.parse(config.data.skip_steps) else ""
    group = config.data.group_segments or default_group(size, config.optim.segments_per_step)
    print(
        f"step {step}{skipped}: {config.optim.segments_per_step} segments in groups of {group}, {size} data-parallel "
        f"ranks, seed {config.seed}; an epoch has {viewer.loader.steps_per_epoch} steps"
    )
    print(_legend(letters, letters))
    shown = []
    for micro_batch, of_ranks in enumerate(zip(*by_rank, strict=True)):
        for rank, (window, number) in enumerate(of_ranks):
            shown.append(viewer.look(window, number, 0))
            print(f"micro-batch {micro_batch:>3}  rank {rank:>3}  {_line(shown[-1], letters)}")
    return shown


def _line(segment: SegmentView, letters: dict[str, str]) -> str:
    return (
        f"{segment.window:<5} {segment.number:>7}  {_painted(bar(segment, _STEP_CELLS, letters))}  "
        f"{len(segment.documents):>5} documents  {segment.padding_share:>6.2%} padding  {segment.n_targets:>9,} targets"
    )


def _print_segment(segment: SegmentView, letters: dict[str, str], most: int) -> None:
    print(
        f"\n{segment.window} segment {segment.number} of {segment.n_segments:,}: {segment.segment_tokens:,} tokens, "
        f"{len(segment.documents)} documents, attention over "
        f"{'the whole segment' if segment.n_spans == 1 else 'each document'}, "
        f"{segment.padding_share:.2%} padding, {segment.n_targets:,} targets"
    )
    print(_painted(bar(segment, _BAR_CELLS, letters)))
    print(_legend(letters, segment.sources))
    rows = list(_rows(segment, letters, most))
    if sys.stdout.isatty():
        _print_rich(rows)
    else:
        _print_plain(rows)
    if len(segment.documents) > most:
        print(
            f"… {len(segment.documents) - most} more documents (inspect.documents={len(segment.documents)} shows all)"
        )


def _legend(letters: dict[str, str], names: Sequence[str] | dict[str, str]) -> str:
    return "  ".join([*(f"{letters[name]} {name}" for name in names), f"{PADDING} padding"])


def _rows(segment: SegmentView, letters: dict[str, str], most: int) -> Iterator[tuple[str, ...]]:
    for one in segment.documents[:most]:
        part = f"[{one.start:,}, {one.stop:,}) of {one.length:,}"
        cut = f"{'<' if one.begins_before else ' '}{part}{'>' if one.goes_on else ' '}"
        document = f"{one.document}  {one.origin}" if one.origin else f"{one.document}"
        text = f"{one.head} … {one.tail}" if one.tail else one.head
        source = f"{letters[one.source]} {one.source}"
        yield f"{one.at:,}", f"{one.stop - one.start:,}", source, document, cut, f"{one.n_targets:,}", text


def _print_plain(rows: Sequence[tuple[str, ...]]) -> None:
    table = [_HEADER, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [f"{cell:{'>' if column in _RIGHT else '<'}{widths[column]}}" for column, cell in enumerate(row)]
        print("  ".join(cells).rstrip())


def _print_rich(rows: Sequence[tuple[str, ...]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.width = max(console.width, _NARROWEST)  # wrapped lines read better than columns of a few letters
    table = Table(*_HEADER, box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(table.columns[:-1]):
        column.no_wrap, column.justify = True, "right" if number in _RIGHT else "left"
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in a document are no markup
    console.print(table)


def _painted(cells: str) -> str:
    """The bar in colours, one for each letter, where the output is a terminal."""
    if not sys.stdout.isatty():
        return cells
    return "".join(
        cell if cell == PADDING else f"\x1b[{41 + (ord(cell.upper()) - ord('A')) % 6};30m{cell}\x1b[0m"
        for cell in cells
    )


def from_the_command_line(config: Config) -> None:
    """The verb as a person runs it; ``| head`` may close the pipe early."""
    try:
        inspect(config)
        sys.stdout.flush()
    except BrokenPipeError:
        # else the interpreter's own flush at exit fails too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main("inspect", from_the_command_line)
