"""Our figures beside the paper's, as sheets that the terminal, REPRODUCTION.md and the page all show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.figure import FigureBase

from lr2train.reporting.axes import legend, tick_labels
from lr2train.reporting.canvas import Chart, Drawn, Look, chart, stacked
from lr2train.reporting.results import Sheet
from lr2train.rope.factors import Factors
from tools.reproduce import paper
from tools.reproduce.claims import BESIDE_THE_PAPER, CLAIMS, PARTS, Verdict, judge
from tools.reproduce.figures import Estimate, pooled
from tools.reproduce.results import BASE, LONG, SHORT, UNTRAINED, Cell, best_index, row_for
from tools.reproduce.rows import ONE_TABLE, ROWS, SHARED

NOT_RUN = "not run"
# Numbers of the series, as in reports.
_COLORS = {"pi": 5, "ntk": 1, "yarn": 2, "longrope": 3, "longrope2": 0, "yarn_head": 4}
_METHODS = ("pi", "ntk", "yarn", "longrope", "longrope2")
_TABLES = (  # name, title, rows, whether they have a shared attention factor
    ("table_2", "Tables 2 and 4: the methods, each with mixed windows", _METHODS, True),
    (
        "table_4",
        "Tables 2 and 4: the methods without mixed windows",
        tuple(f"{one}{ONE_TABLE}" for one in _METHODS),
        False,
    ),
    ("table_5", "Table 5: the real critical index in NTK and YaRN", ("ntk", "ntk_rcd", "yarn", "yarn_rcd"), True),
    ("table_6", "Table 6: search on the perplexity of all text", ("text",), True),
    ("table_7", "Table 7: without mixed windows", (f"longrope2{ONE_TABLE}",), False),
    ("table_10", "Table 10: search over all dimensions", ("all_dims",), True),
    ("further", "Not in the paper", ("yarn_head", "document", "distill", "one_factor"), False),
)
_OF_THREE = ("table_5", "table_7", "table_10")  # their short scores are of three benchmarks, in the paper


@dataclass
class Section:
    """A part of the page."""

    title: str
    sentences: list[str] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    charts: dict[str, Chart] = field(default_factory=dict)


def row_sheets(cells: Sequence[Cell]) -> list[Sheet]:
    """The tables of rows: one for each table of the paper, attention factor (own, shared) and extension ratio.

    A ratio shows the rows that the form plans there, and leaves a table out that would only repeat rows of others.
    """
    found = []
    for ratio in sorted({cell.ratio for cell in cells}):
        here = [cell for cell in cells if cell.ratio == ratio]
        before: set[str] = set()
        for name, title, keys, has_shared in _TABLES:
            for shared in (False, True)[: 1 + has_shared]:
                rows = [row_for(key, shared) for key in dict.fromkeys((*keys, "longrope2"))]
                rows = [row for row in rows if row in here[0].planned]
                new = set(rows) - before
                before |= new
                if any(cell.rows.get(row) for cell in here for row in new):
                    kind = ("; one attention factor for all" if shared else "; each with its own") if has_shared else ""
                    sheet = f"{name}_{ratio}x" + (SHARED if shared else "")
                    found.append(_rows(sheet, f"{title}, {ratio}x{kind}", rows, here, three=name in _OF_THREE))
    return found


def untrained_sheet(cells: Sequence[Cell]) -> list[Sheet]:
    """The methods before any training, on each base."""
    found = []
    for cell in (cell for cell in cells if cell.untrained):
        rows = [
            [_label(row), *(_shown(cell.score(row, [length])) for length in cell.lengths)] for row in cell.untrained
        ]
        head = ["method", *map(str, cell.lengths)]
        found.append(Sheet(f"untrained_{cell.base.name}_{cell.ratio}x", f"Before training: {cell.name}", head, rows))
    return found


def search_sheet(cells: Sequence[Cell]) -> list[Sheet]:
    """What the searches found, and what they cost."""
    head = ["search", "base", "critical index", "attention factor", "perplexity", "document-forwards", "seconds"]
    rows = [
        [
            kind,
            cell.name,
            str(one["critical_index"] or "–"),
            f"{one['attention_factor']:.3f}",
            f"{one['perplexity']:.3f}",
            f"{one['document_forwards']:,}",
            f"{one['seconds']:.0f}",
        ]
        for cell in cells
        for kind, every in cell.searches.items()
        for one in every
    ]
    note = "The perplexity is that of the search's own objective, so only searches with one objective compare."
    return [Sheet("searches", "The searches", head, rows, note)] if rows else []


def _label(row: str) -> str:
    key = row.removeprefix(UNTRAINED)
    return ROWS[key].label if key in ROWS else key


def _rows(name: str, title: str, rows: Sequence[str], cells: Sequence[Cell], three: bool) -> Sheet:
    lengths = cells[0].lengths
    head = ["method", "attention factor", *map(str, lengths), f"at {lengths[-1]}, against LongRoPE2", "short kept, %"]
    head += ["short text perplexity, base = 100", *(f"paper: {one}, 128k" for one in paper.MODELS)]
    head += [f"paper: {one}, short kept, %" for one in paper.MODELS]
    benchmarks = "MMLU, MMLU-Pro and GSM8K" if three else "the five benchmarks of its Table 4"
    note = f"{_NOTE} The paper's short scores are the mean over {benchmarks}."
    return Sheet(name, title, head, [_row(row, lengths, cells, three) for row in rows], note)


_NOTE = (
    "Scores are the mean over tasks, 0 … 100, ± standard deviation over seeds. Against LongRoPE2: difference ± "
    "standard error over seeds and documents, with > or < where Student's t decides the sign. The attention "
    "factor is that of the first seed, for each base."
)


def _row(row: str, lengths: Sequence[int], cells: Sequence[Cell], three: bool) -> list[str]:
    ran = [cell for cell in cells if cell.rows.get(row)]
    n_seeds = {len(cell.rows[row]) for cell in ran}
    seeds = " to ".join(map(str, sorted({min(n_seeds), max(n_seeds)}))) if n_seeds else ""
    label = _label(row) + (f" ({seeds} seeds)" if n_seeds and max(n_seeds) > 1 else "")
    factor = "/".join(f"{cell.factors[row]:.3f}" for cell in ran) or "–"
    scores = [_shown(pooled([cell.score(row, [length]) for cell in ran])) for length in lengths]
    against = pooled([cell.difference(row, "longrope2", cell.window(LONG)) for cell in ran])
    beside = "–" if row == "longrope2" else _difference(against)
    known = [cell for cell in ran if BASE in cell.untrained]
    kept = _shown(pooled([cell.kept(row) for cell in known]))
    text = _shown(pooled([cell.text_ratio(row) for cell in known]))
    of_paper = row.removesuffix(SHARED)
    of_paper = of_paper if of_paper in paper.RULER else of_paper.removesuffix(ONE_TABLE)
    printed = [paper.longest(of_paper, model) for model in (0, 1)]
    printed += [paper.kept(of_paper, model, three) for model in (0, 1)]
    return [label, factor, *scores, beside, kept, text, *("–" if one is None else f"{one:.2f}" for one in printed)]


def _shown(one: Estimate) -> str:
    if not math.isfinite(one.mean):
        return NOT_RUN
    return f"{one.mean:.1f}" + (f" ± {one.spread:.1f}" if math.isfinite(one.spread) else "")


def _difference(one: Estimate) -> str:
    return f"{one.sign} {one.mean:+.1f} ± {one.se:.1f}" if math.isfinite(one.mean) else NOT_RUN


def verdicts(cells: Sequence[Cell]) -> list[Verdict]:
    """Every claim against what has been measured."""
    return [judge(claim, cells) for claim in CLAIMS]


def claim_sheet(found: Sequence[Verdict], cells: Sequence[Cell]) -> Sheet:
    """The claims, one a line: the paper's differences, ours in each cell, the verdict."""
    names = [cell.name for cell in cells if any(cell.name in one.each for one in found)]
    head = ["claim", "table", "attention factor", *(f"paper: {one}" for one in paper.MODELS), *names, "all", "verdict"]
    rows = []
    for one in found:
        printed = [one.claim.printed(model) for model in (0, 1)]
        of_paper = ["–" if value is None else f"{value:+.1f}" for value in printed]
        each = [_difference(one.each[name]) if name in one.each else NOT_RUN for name in names]
        word = one.word if one.claim.table else BESIDE_THE_PAPER[one.word]
        alike = ", both rows answer alike" if one.alike else ""
        word += alike or (", both rows at an end of the scale" if one.saturated else "")
        kind = "shared" if one.claim.shared else "own"
        rows.append([one.claim.words, one.claim.table or "–", kind, *of_paper, *each, _difference(one.pooled), word])
    note = (
        "Differences in points ± standard error over seeds and documents. The paper's for the short window are of the "
        "share kept, in percent."
    )
    return Sheet("claims", "The paper's claims, one by one", head, rows, note)


def part_sheet(cells: Sequence[Cell]) -> Sheet:
    """What each part of the method adds at the target window, all else equal."""
    names = [cell.name for cell in cells]
    rows = []
    for words, a, b in PARTS:
        each = [cell.difference(a, b, cell.window(LONG)) for cell in cells]
        rows.append([words, *map(_difference, each), _difference(pooled(each))])
    note = "Points at the target window ± standard error over seeds and documents."
    return Sheet("parts", "Which part carries what", ["part", *names, "all"], rows, note)


def best_rows(cells: Sequence[Cell]) -> list[str]:
    """A sentence for each cell: its best row at the target window, and how LongRoPE2 stands to it.

    The best of many rows is partly luck, which the standard error of the difference does not know; one more sentence
    says so.
    """
    said = []
    for cell in (cell for cell in cells if "longrope2" in cell.rows and len(cell.rows) > 1):
        scores = {row: cell.score(row, cell.window(LONG)).mean for row in cell.rows}
        best = max(scores, key=lambda row: scores[row])
        words = f"{cell.name}: the best row at {cell.lengths[-1]} tokens is {_label(best)}"
        words += " (shared attention factor)" if best.endswith(SHARED) else ""
        if best != "longrope2":
            less = cell.difference("longrope2", best, cell.window(LONG))
            words += f" with {scores[best]:.1f}; LongRoPE2 has {scores['longrope2']:.1f} ({_difference(less)})"
        said.append(f"{words}.")
    return [*said, "The best of so many rows is partly luck, which these errors do not count."] if said else []


def hypothesis_sheet(cells: Sequence[Cell], factors: dict[str, Factors]) -> Sheet:
    """Found against theoretical critical index, by tokens of the base's training."""
    head = ["base", "tokens", "d10", "tcd", "rcd of the searches", "rcd of the map's best cell", "rcd - tcd (map)"]
    rows = []
    for cell in sorted(cells, key=lambda one: (one.ratio, one.base.tokens)):
        if cell.base.name not in factors:
            continue
        spectrum, best = factors[cell.base.name].spectrum, best_index(cell.map)
        searched = ", ".join(str(one["critical_index"]) for one in cell.searches.get("needle", [])) or NOT_RUN
        shown = f"{best.mean:.1f} ± {best.se:.1f}" if math.isfinite(best.mean) else NOT_RUN
        moved = _difference(Estimate(best.mean - spectrum.critical_index, best.se))
        tcd, d10 = spectrum.critical_index, spectrum.lowest_critical_index
        rows.append([cell.name, f"{cell.base.tokens:g}", str(d10), str(tcd), searched, shown, moved])
    note = (
        "± is the standard deviation over resamples of the map's answers. A best index beyond the last one of the map "
        "cannot show."
    )
    return Sheet("hypothesis", "Real against theoretical critical index", head, rows, note)


@chart()
def by_length(figure: FigureBase, look: Look, cells: Sequence[Cell], shared: bool) -> Drawn:
    """Scores of the methods over the length, mean over bases, with the standard error as a bar."""
    axes, columns = figure.add_subplot(), {}
    lengths = cells[0].lengths
    for key, number in _COLORS.items():
        row = row_for(key, shared)
        each = [pooled([cell.score(row, [length]) for cell in cells if cell.rows.get(row)]) for length in lengths]
        if not math.isfinite(each[-1].mean):
            continue
        means, errors = np.array([one.mean for one in each]), np.array([one.se for one in each])
        style = {"color": look.series[number], "marker": "o", "markersize": 3}
        axes.errorbar(lengths, means, yerr=errors, label=ROWS[row].label, **style)
        columns[ROWS[row].label] = {"length_tokens": lengths, "score": means, "standard_error": errors}
    axes.set_xscale("log", base=2)
    axes.set(xlabel="length, tokens", ylabel="score", ylim=(-2, 102))
    axes.xaxis.set_major_formatter(tick_labels("{:g}".format))
    legend(figure, axes)
    return "Scores by length.", stacked(columns, "method")


def inside(cells: Sequence[Cell]) -> list[tuple[Cell, float]]:
    """Score of each untrained base inside its original window."""
    return [(cell, cell.score(BASE, cell.window(SHORT)).mean) for cell in cells if BASE in cell.untrained]
