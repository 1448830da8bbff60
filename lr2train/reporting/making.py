"""Sections on how it was made: factors, search, training, corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lr2train.reporting import charts
from lr2train.reporting.canvas import WIDE
from lr2train.reporting.inputs import Inputs, Json
from lr2train.reporting.page import Missing, count, facts, figure, heading, number, table, text
from lr2train.reporting.population import candidates


def factors(inputs: Inputs) -> str | Missing:
    """The rescale factors beside those of fixed rules."""
    made = inputs.factors
    if made is None or made.scale == 1:
        return Missing("This run has no factors of its own.", "python -m lr2train.search experiment=… name=factors")
    index, spectrum = inputs.critical_index, made.spectrum
    sentence = (
        f"Rotary dimension {spectrum.rotary_dim}, base {spectrum.base:g}; attention factor {made.attention_factor:g} in the long "
        "window, exactly 1 in the short one."
    )
    low, high = (bound / made.scale for bound in (min(made.rescale[index or 0 :]), max(made.rescale[index or 0 :])))
    where = (
        f"From the critical index {index} on ({_below(spectrum.critical_index - index)})" if index is not None else "Over all dimensions"
    )
    sentence += f" {where} the factors lie between {low:.2f} s and {high:.2f} s."
    caption = (
        "Each point divides one rotation frequency by λᵢ. <em>tcd</em> is the first index whose period exceeds the original "
        "window; ten periods of <em>d10</em> still fit into it"
        + ("; <em>rcd</em> is where this run's free factors begin. The band is the search's usual range." if index is not None else ".")
    )
    of_periods = (
        "The original RoPE crosses the original window L0 at <em>tcd</em>; below that line whole turns were seen in training. Where a rule "
        "crosses the target window L, its own border lies."
    )
    return (
        heading("RoPE factors", sentence)
        + f'<div class="figures">{figure("Rescale factors", charts.factor_curves(made, index).svg(), caption, wide=True)}'
        + f"{figure('Periods', replace(charts.periods(made, index), size=WIDE).svg(), of_periods, wide=True)}</div>"
    )


def _below(dimensions: int) -> str:
    """Where rcd lies beside tcd."""
    if dimensions == 0:
        return "the theoretical one"
    return f"{count(abs(dimensions), 'dimension')} {'below' if dimensions > 0 else 'above'} the theoretical one"


def search(inputs: Inputs) -> str | Missing:
    """How the factors were found."""
    lines = inputs.generations
    if not lines:
        return Missing(
            "The factors of this run come from no search that is at hand.", "python -m lr2train.search experiment=… name=factors"
        )
    tokens = "the answers' tokens of needle documents" if inputs.objective == "needle" else "all tokens of plain documents"
    figures = [
        figure(
            "Perplexity by generation",
            charts.search_progress(lines, inputs.objective).svg(),
            f"Over {tokens}, before any training. A search that has converged is flat at the end, best and "
            "median together." + _dropped(lines),
        ),
        figure(
            "Attention factor",
            charts.attention_factors(lines, inputs.search, inputs.objective).svg(),
            "Every candidate once. The factor scales attention logits by its square.",
        ),
    ]
    if inputs.has_border:
        figures += _critical_indices(inputs)
    if inputs.journal:
        caption = "Bars hold the middle half of the candidates scored on it. Documents on which they differ decide the search."
        figures.append(figure("Documents", charts.documents(inputs.journal).svg(), caption))
    return heading("Search", _search_sentence(inputs)) + f'<div class="figures">{"".join(figures)}</div>'


def _dropped(lines: Sequence[Json]) -> str:
    every = candidates(lines)
    dropped = len(every) - int(every.complete.sum())
    if not dropped:
        return ""
    return (
        f" {dropped:,} of {len(every):,} candidates were dropped before all documents were read; they count in median and middle half at "
        "the perplexity that they had then."
    )


def _critical_indices(inputs: Inputs) -> list[str]:
    spectrum = inputs.factors.spectrum if inputs.factors else None
    between = f", between d10 = {spectrum.lowest_critical_index} and tcd = {spectrum.critical_index}" if spectrum else ""
    return [
        figure(
            "Critical index",
            charts.critical_index_histogram(inputs.generations, inputs.search, inputs.top_k, spectrum).svg(),
            "Every candidate once, beside the parents that the last generation leaves.",
        ),
        figure(
            "Critical index by generation",
            charts.critical_indices(inputs.generations, spectrum).svg(),
            f"Where the population puts the border{between}.",
        ),
    ]


def _search_sentence(inputs: Inputs) -> str:
    forwards = (inputs.search or inputs.generations[-1]).get("document_forwards", inputs.generations[-1]["document_forwards"])
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
            f"perplexity {number(inputs.search['perplexity'])}"
        )
        if "scored_documents" in inputs.search:
            sentence += f" over {inputs.search['scored_documents']} documents"
    else:
        sentence += f"; it still runs, the best {inputs.objective} perplexity so far is {number(inputs.generations[-1]['best_perplexity'])}"
    return text(sentence + ".")


def training(inputs: Inputs) -> str | Missing:
    """Loss, learning rate, gradients, speed."""
    if not inputs.metrics:
        return Missing("No step was taken yet.", f"python -m lr2train.train experiment=… name={inputs.folder.resolve().name}")
    lines = inputs.metrics
    figures = [
        figure(
            "Loss by window",
            charts.loss_by_window(lines, "the run").svg(),
            "Thin: every step. Strong: running mean over a twenty-fifth of the run.",
        )
    ]
    for key, label, smoothed, caption in (
        ("grad_norm", "gradient norm", True, "Global, before clipping."),
        ("lr", "learning rate", False, "Warm-up and schedule."),
        ("tokens_per_s", "tokens / s", True, _speed(lines)),
        ("mfu", "model FLOPs utilisation", True, "Share of the GPUs' peak, without what is recomputed."),
    ):
        if charts.has(lines, key):
            figures.append(figure(label[0].upper() + label[1:], charts.metric(lines, key, label, smoothed).svg(), caption))
    return heading("Training", _training_sentence(lines)) + f'<div class="figures">{"".join(figures)}</div>' + _base(inputs)


def _speed(lines: Sequence[Json]) -> str:
    total = sum(line["step_s"] for line in lines)
    waited = sum(line.get("data_wait_s") or 0.0 for line in lines)
    return f"All ranks together; {waited / total:.1%} of the time went into waiting for data." if total else "All ranks together."


def _training_sentence(lines: Sequence[Json]) -> str:
    last, long = lines[-1], sum(line["window_mix"] for line in lines) / len(lines)
    return text(
        f"Step {last['step']:,}, {last['tokens_seen']:,} tokens seen, {long:.0%} of the segments long; at most "
        f"{last['peak_gib']:.2f} GiB in one process." + _bad_steps(last)
    )


def _bad_steps(last: Json) -> str:
    number_of = last.get("bad_steps", 0)
    return f" {count(number_of, 'step')} had a loss or a gradient norm that is not finite: no update was made there." if number_of else ""


def _base(inputs: Inputs) -> str:
    if not inputs.base_metrics:
        return ""
    caption = (
        f"From <code>{text(inputs.base_folder)}</code>, {len(inputs.base_metrics):,} steps from scratch. Jumps are stages of its "
        "curriculum."
    )
    chart = replace(charts.loss_by_window(inputs.base_metrics, "the base model"), size=WIDE).svg()
    return f'<h3>The base model</h3><div class="figures">{figure("Loss of the base model", chart, caption, wide=True)}</div>'


def corpus(inputs: Inputs) -> str | Missing:
    """Documents, tokens and segments by source and window."""
    if not inputs.corpus:
        return Missing("The corpus of this run is not at hand.", "python -m lr2train.prepare experiment=… name=corpus")
    one = inputs.corpus
    rows = [_source(source, one) for source in one["sources"]]
    head = ["source", "documents", "tokens", "held out", "short, planned tokens", "long, planned tokens", "broken records"]
    sentence = (
        f"<code>{text(inputs.corpus_folder)}</code>, fingerprint <code>{text(one['fingerprint'])}</code>. In brackets: passes over "
        "the source's documents of that window."
    )
    return heading("Corpus", sentence) + table("Sources", head, rows) + _plan(one)


def _source(source: Json, manifest: Json) -> list[str]:
    planned = [_planned(manifest["windows"][window]["sources"].get(source["name"], {})) for window in ("short", "long")]
    counts = [f"{number:,}" for number in (source["documents"], source["tokens"], source["holdout_documents"])]
    return [text(source["name"]), *counts, *planned, f"{source.get('broken', 0):,}"]


def _planned(counts: Json) -> str:
    """Planned tokens, and how often that passes over what there is."""
    planned, there = counts.get("planned_tokens", 0), counts.get("tokens", 0)
    return f"{planned:,}" + (f" ({planned / there:.2g}×)" if there else "")


def _plan(manifest: Json) -> str:
    rows = [
        [window, f"{plan['segments']:,}", f"{plan['planned_tokens']:,}", f"{plan['padding_share']:.2%}"]
        for window, plan in ((window, manifest["windows"][window]) for window in ("short", "long"))
    ]
    lost = ", ".join(f"{cause.replace('_', ' ')} {number:,}" for cause, number in manifest.get("lost_tokens", {}).items())
    pairs = [("vocabulary", f"{manifest['vocab_size']:,} token ids")] if "vocab_size" in manifest else []
    pairs += [("lost tokens", text(lost))] if lost else []
    return table(f"Segments <span>of {manifest['segment_tokens']:,} tokens</span>", ["window", "segments", "tokens", "padding"], rows) + (
        facts(pairs) if pairs else ""
    )
