"""Report sections on how a model was made: factors, search, training, corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lr2train.reporting import charts, search_charts
from lr2train.reporting.canvas import WIDE
from lr2train.reporting.inputs import HELD_OUT, Json, ReportInputs
from lr2train.reporting.numbers import count, perplexity
from lr2train.reporting.page import Missing, facts, figure, heading, table, text
from lr2train.reporting.population import candidates


def factors(inputs: ReportInputs) -> str | Missing:
    """Rescale factors and periods, beside methods without a search."""
    made = inputs.factors
    if made is None or made.scale == 1:
        return Missing("This run has no factors of its own.", "lr2train search experiment=… name=factors")
    index, spectrum = inputs.critical_index, made.spectrum
    sentence = (
        f"Rotary dimension {spectrum.rotary_dim}, base {spectrum.base:g}; attention factor {made.attention_factor:g} "
        "in the long "
        "window, exactly 1 in the short window."
    )
    low, high = (bound / made.scale for bound in (min(made.rescale[index or 0 :]), max(made.rescale[index or 0 :])))
    where = (
        f"From the critical index {index} on ({_below(spectrum.critical_index - index)})"
        if index is not None
        else "Over all dimensions"
    )
    sentence += f" {where} the factors lie between {low:.2f} s and {high:.2f} s."
    caption = (
        "Each point divides one rotation frequency by λᵢ. <em>tcd</em> is the first index whose period exceeds the "
        "original window. Ten periods of <em>d10</em> still fit into the original window."
        + (
            " <em>rcd</em> is the first index with a searched factor. The band is the search's usual range."
            if index is not None
            else ""
        )
    )
    of_periods = (
        "The original RoPE crosses the original window L0 at <em>tcd</em>. Below that line, pretraining has seen whole "
        "periods. The index where a method's curve crosses the target window L is that method's own critical index."
    )
    return (
        heading("RoPE factors", sentence) + "<div "
        f'class="figures">{figure("Rescale factors", charts.factor_curves(made, index).svg(), caption, wide=True)}'
        + f"{figure('Periods', replace(charts.periods(made, index), size=WIDE).svg(), of_periods, wide=True)}</div>"
    )


def _below(dimensions: int) -> str:
    """The distance of rcd from tcd, in words; ``dimensions`` is tcd - rcd."""
    if dimensions == 0:
        return "the theoretical critical index"
    return (
        f"{count(abs(dimensions), 'dimension')} {'below' if dimensions > 0 else 'above'} the theoretical critical index"
    )


def search(inputs: ReportInputs) -> str | Missing:
    """How the search found the factors."""
    lines = inputs.generations
    if not lines:
        return Missing(
            "No search of this run's factors was found.",
            "lr2train search experiment=… name=factors",
        )
    tokens = (
        "the answers' tokens of needle documents" if inputs.objective == "needle" else "all tokens of plain documents"
    )
    figures = [
        figure(
            "Perplexity by generation",
            search_charts.search_progress(lines, inputs.objective).svg(),
            f"Over {tokens}, before any training. In a converged search, best and median are flat and close at the end."
            + _dropped(lines),
        ),
        figure(
            "Attention factor",
            search_charts.attention_factors(lines, inputs.search, inputs.objective).svg(),
            "Each point is a candidate. The attention factor scales attention logits by its square.",
        ),
    ]
    if inputs.has_border:
        figures += _critical_indices(inputs)
    if inputs.journal:
        caption = (
            "A bar spans the quartiles of all candidates. A long bar tells candidates apart; a short bar does not."
        )
        figures.append(figure("Documents", search_charts.documents(inputs.journal).svg(), caption))
    return heading("Search", _search_sentence(inputs)) + f'<div class="figures">{"".join(figures)}</div>'


def _dropped(lines: Sequence[Json]) -> str:
    every = candidates(lines)
    dropped = len(every) - int(every.complete.sum())
    if not dropped:
        return ""
    return (
        f" {dropped:,} of {len(every):,} candidates were dropped before all documents were read. Median and quartiles "
        "include them at the perplexity they had then."
    )


def _critical_indices(inputs: ReportInputs) -> list[str]:
    spectrum = inputs.factors.spectrum if inputs.factors else None
    between = (
        f", between d10 = {spectrum.lowest_critical_index} and tcd = {spectrum.critical_index}" if spectrum else ""
    )
    return [
        figure(
            "Critical index",
            search_charts.critical_index_histogram(inputs.generations, inputs.search, inputs.top_k, spectrum).svg(),
            "All candidates, and the best of the last generation.",
        ),
        figure(
            "Critical index by generation",
            search_charts.critical_indices(inputs.generations, spectrum).svg(),
            f"Share of the population at each critical index{between}.",
        ),
    ]


def _search_sentence(inputs: ReportInputs) -> str:
    forwards = (inputs.search or inputs.generations[-1]).get(
        "document_forwards", inputs.generations[-1]["document_forwards"]
    )
    sentence = f"{forwards:,} document-forwards in {inputs.generations[-1]['generation']} generations after the first"
    if inputs.journal:
        sentence += (
            f", {sum(entry['seconds'] for entry in inputs.journal) / len(inputs.journal):.2f} s each on "
            f"{count(len({entry['rank'] for entry in inputs.journal}), 'rank')}"
        )
    if inputs.search:
        border = f"rcd {inputs.search['critical_index']}, " if inputs.search["critical_index"] else ""
        sentence += (
            f"; the winner has {border}attention factor {inputs.search['attention_factor']:g} and {inputs.objective} "
            f"perplexity {perplexity(inputs.search['perplexity'])}"
        )
        if "scored_documents" in inputs.search:
            sentence += f" over {inputs.search['scored_documents']} documents"
    else:
        best = perplexity(inputs.generations[-1]["best_perplexity"])
        sentence += f"; the search still runs, the best {inputs.objective} perplexity so far is {best}"
    return text(sentence + ".")


def training(inputs: ReportInputs) -> str | Missing:
    """Loss, learning rate, gradients, speed."""
    if not inputs.metrics:
        return Missing("Training has not begun.", f"lr2train train experiment=… name={inputs.folder.resolve().name}")
    lines = inputs.metrics
    figures = [
        figure(
            "Loss by window",
            charts.loss_by_window(lines, inputs.held_out, "the run").svg(),
            "Thin: every step. Strong: moving average over 4 % of the run." + _points(inputs.held_out),
        )
    ]
    for key, label, smoothed, caption in (
        ("grad_norm", "gradient norm", True, "Global, before clipping."),
        ("lr", "learning rate", False, "Warm-up and schedule."),
        ("tokens_per_s", "tokens / s", True, _speed(lines)),
        ("mfu", "model FLOPs utilisation", True, "Share of the GPUs' peak. Recomputation does not count as work."),
    ):
        if charts.has(lines, key):
            figures.append(
                figure(label[0].upper() + label[1:], charts.metric(lines, key, label, smoothed).svg(), caption)
            )
    return (
        heading("Training", _training_sentence(lines) + _held_out(inputs.held_out))
        + f'<div class="figures">{"".join(figures)}</div>'
        + _base(inputs)
    )


def _speed(lines: Sequence[Json]) -> str:
    total = sum(line["step_s"] for line in lines)
    waited = sum(line.get("data_wait_s") or 0.0 for line in lines)
    return (
        f"Sum over ranks; {waited / total:.1%} of the time was spent waiting for data." if total else "Sum over ranks."
    )


def _training_sentence(lines: Sequence[Json]) -> str:
    last, long = lines[-1], sum(line["window_mix"] for line in lines) / len(lines)
    return text(
        f"Step {last['step']:,}, {last['tokens_seen']:,} tokens seen, {long:.0%} of the segments long; peak memory "
        f"{last['peak_gib']:.2f} GiB in one process." + _bad_steps(last)
    )


def _points(held_out: Sequence[Json]) -> str:
    return " Points: held-out documents, the same segments each time." if held_out else ""


def _held_out(lines: Sequence[Json]) -> str:
    """The first and the last held-out loss of each window."""
    changes = []
    for window, key in zip(("short", "long"), HELD_OUT, strict=True):
        of_window = [line for line in lines if key in line]
        if of_window:
            first, last = of_window[0], of_window[-1]
            changes.append(
                f"{window} window {perplexity(first[key])} (step {first['step']:,}) to {perplexity(last[key])} "
                f"(step {last['step']:,})"
            )
    return f" Held-out loss: {', '.join(changes)}." if changes else ""


def _bad_steps(last: Json) -> str:
    number_of = last.get("bad_steps", 0)
    if not number_of:
        return ""
    return f" {count(number_of, 'step')} made no update: loss or gradient norm was not finite."


def _base(inputs: ReportInputs) -> str:
    if not inputs.base_metrics:
        return ""
    caption = (
        f"From <code>{text(inputs.base_folder)}</code>, {len(inputs.base_metrics):,} steps from scratch. Jumps are "
        "stages of its curriculum." + _points(inputs.base_held_out)
    )
    chart = replace(charts.loss_by_window(inputs.base_metrics, inputs.base_held_out, "the base model"), size=WIDE).svg()
    drawn = figure("Loss of the base model", chart, caption, wide=True)
    return f'<h3>The base model</h3><div class="figures">{drawn}</div>'


def corpus(inputs: ReportInputs) -> str | Missing:
    """Documents, tokens and segments by source and window."""
    if not inputs.corpus:
        return Missing("The corpus of this run was not found.", "lr2train prepare experiment=… name=corpus")
    one = inputs.corpus
    rows = [_source(source, one) for source in one["sources"]]
    head = [
        "source",
        "documents",
        "tokens",
        "held-out documents",
        "planned tokens, short",
        "planned tokens, long",
        "broken records",
    ]
    sentence = (
        f"<code>{text(inputs.corpus_folder)}</code>, fingerprint <code>{text(one['fingerprint'])}</code>. In "
        "brackets: passes "
        "over the source's documents of that window."
    )
    return heading("Corpus", sentence) + table("Sources", head, rows) + _plan(one)


def _source(source: Json, manifest: Json) -> list[str]:
    planned = [_planned(manifest["windows"][window]["sources"].get(source["name"], {})) for window in ("short", "long")]
    counts = [f"{number:,}" for number in (source["documents"], source["tokens"], source["holdout_documents"])]
    return [text(source["name"]), *counts, *planned, f"{source.get('broken', 0):,}"]


def _planned(counts: Json) -> str:
    """Planned tokens, and passes over the tokens that exist."""
    planned, there = counts.get("planned_tokens", 0), counts.get("tokens", 0)
    return f"{planned:,}" + (f" ({planned / there:.2g}×)" if there else "")


def _plan(manifest: Json) -> str:
    rows = [
        [window, f"{plan['segments']:,}", f"{plan['planned_tokens']:,}", f"{plan['padding_share']:.2%}"]
        for window, plan in ((window, manifest["windows"][window]) for window in ("short", "long"))
    ]
    lost = ", ".join(
        f"{cause.replace('_', ' ')} {number:,}" for cause, number in manifest.get("lost_tokens", {}).items()
    )
    pairs = [("vocabulary", f"{manifest['vocab_size']:,} token ids")] if "vocab_size" in manifest else []
    pairs += [("lost tokens", text(lost))] if lost else []
    return table(
        f"Segments <span>of {manifest['segment_tokens']:,} tokens</span>",
        ["window", "segments", "tokens", "padding"],
        rows,
    ) + (facts(pairs) if pairs else "")
