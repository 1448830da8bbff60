"""Sections on how it was made: factors, search, training, corpus."""

from __future__ import annotations

from collections.abc import Sequence

from lr2train.reporting import charts
from lr2train.reporting.inputs import Inputs, Json
from lr2train.reporting.page import facts, figure, heading, missing, table, text


def factors(inputs: Inputs) -> str:
    """The rescale factors beside those of fixed rules."""
    made = inputs.factors
    if made is None or made.scale == 1:
        return missing("RoPE factors", "This run has no factors of its own.", "python -m lr2train.search experiment=… name=factors")
    index, spectrum = critical_index(inputs), made.spectrum
    sentence = f"Rotary dimension {spectrum.rotary_dim}, base {spectrum.base:g}; attention factor {made.attention_factor:g} in the long window, exactly 1 in the short one."
    if index is not None:
        ratio = min(made.rescale[index:]) / made.scale, max(made.rescale[index:]) / made.scale
        sentence += f" From the critical index {index} on ({spectrum.critical_index - index} below the theoretical {spectrum.critical_index}) the factors lie between {ratio[0]:.2f} s and {ratio[1]:.2f} s."
    caption = (
        "Each point divides one rotation frequency by λᵢ. <em>tcd</em> is the first index whose period exceeds the original window; ten periods of <em>d10</em> still fit into it; "
        "<em>rcd</em> is where this run's free factors begin. The band is the search's usual range."
    )
    return heading("RoPE factors", sentence) + f'<div class="figures">{figure("Rescale factors", charts.factor_curves(made, index), caption, wide=True)}</div>'


def critical_index(inputs: Inputs) -> int | None:
    """rcd of the run's factors, where the search or the config says it."""
    if inputs.search and inputs.config.get("rope", {}).get("factors") is not None or inputs.search and not inputs.config:
        return inputs.search["critical_index"]
    return inputs.config.get("rope", {}).get("critical_index")


def search(inputs: Inputs) -> str:
    """How the factors were found."""
    lines = inputs.generations
    if not lines:
        return missing("Search", "The factors of this run come from no search that is at hand.", "python -m lr2train.search experiment=… name=factors")
    spectrum = inputs.factors.spectrum if inputs.factors else None
    found = [index for line in lines for index in line["critical_indices"]]
    low, high = (spectrum.lowest_critical_index, spectrum.critical_index) if spectrum else (min(found), max(found))
    figures = [
        figure("Perplexity by generation", charts.search_progress(lines), "Over the answers' tokens of all needle documents, before any training. A search that has converged is flat at the end, best and median together."),
        figure("Critical index", charts.critical_indices(lines, low, high), f"Where the population puts the border, inside d10 = {low} … tcd = {high}."),
        figure("Attention factor", charts.attention_factors(lines), "Every candidate of every generation. It scales attention logits by its square."),
    ]
    return heading("Search", _search_sentence(inputs)) + f'<div class="figures">{"".join(figures)}</div>'


def _search_sentence(inputs: Inputs) -> str:
    forwards = inputs.generations[-1]["document_forwards"]
    sentence = f"{forwards:,} document-forwards in {inputs.generations[-1]['generation']} generations after the first"
    if inputs.journal:
        sentence += f", {sum(entry['seconds'] for entry in inputs.journal) / len(inputs.journal):.2f} s each on {len({entry['rank'] for entry in inputs.journal})} rank(s)"
    if inputs.search:
        sentence += f"; the winner has rcd {inputs.search['critical_index']}, attention factor {inputs.search['attention_factor']:g} and needle perplexity {inputs.search['perplexity']:.3f}"
    return text(sentence + ".")


def training(inputs: Inputs) -> str:
    """Loss, learning rate, gradients, speed."""
    if not inputs.metrics:
        return missing("Training", "No step was taken yet.", f"python -m lr2train.train experiment=… name={inputs.folder.resolve().name}")
    lines = inputs.metrics
    figures = [figure("Loss by window", charts.loss_by_window(lines, "loss"), "Thin: every step. Strong: running mean over a twenty-fifth of the run.")]
    for key, label, smoothed, caption in (
        ("grad_norm", "gradient norm", True, "Global, before clipping."),
        ("lr", "learning rate", False, "Warm-up and schedule."),
        ("tokens_per_s", "tokens / s", True, _speed(lines)),
        ("mfu", "model FLOPs utilisation", True, "Share of the GPUs' peak, without what is recomputed."),
    ):
        if charts.has(lines, key):
            figures.append(figure(label[0].upper() + label[1:], charts.metric(lines, key, label, smoothed), caption))
    return heading("Training", _training_sentence(lines)) + f'<div class="figures">{"".join(figures)}</div>' + _base(inputs)


def _speed(lines: Sequence[Json]) -> str:
    total = sum(line["step_s"] for line in lines)
    waited = sum(line.get("data_wait_s") or 0.0 for line in lines)
    return f"All ranks together; {waited / total:.1%} of the time went into waiting for data." if total else "All ranks together."


def _training_sentence(lines: Sequence[Json]) -> str:
    last, long = lines[-1], sum(line["window_mix"] for line in lines) / len(lines)
    return text(f"Step {last['step']:,}, {last['tokens_seen']:,} tokens seen, {long:.0%} of the segments long; at most {last['peak_gib']:.2f} GiB in one process.")


def _base(inputs: Inputs) -> str:
    if not inputs.base_metrics:
        return ""
    caption = f"From <code>{text(inputs.base_folder)}</code>, {len(inputs.base_metrics):,} steps from scratch. Steps in the curve are stages of its curriculum."
    return f'<h3>The base model</h3><div class="figures">{figure("Loss of the base model", charts.loss_by_window(inputs.base_metrics, "base"), caption, wide=True)}</div>'


def corpus(inputs: Inputs) -> str:
    """Documents, tokens and segments by source and window."""
    if not inputs.corpus:
        return missing("Corpus", "The corpus of this run is not at hand.", "python -m lr2train.prepare experiment=… name=corpus")
    one = inputs.corpus
    rows = [_source(source, one) for source in one["sources"]]
    head = ["source", "documents", "tokens", "held out", "short, planned tokens", "long, planned tokens", "broken records"]
    return heading("Corpus", f"<code>{text(inputs.corpus_folder)}</code>, fingerprint <code>{text(one['fingerprint'])}</code>.") + table("Sources", head, rows) + _plan(one)


def _source(source: Json, manifest: Json) -> list[str]:
    planned = [manifest["windows"][window]["sources"].get(source["name"], {}).get("planned_tokens", 0) for window in ("short", "long")]
    counts = (source["documents"], source["tokens"], source["holdout_documents"], *planned, source.get("broken", 0))
    return [text(source["name"]), *(f"{count:,}" for count in counts)]


def _plan(manifest: Json) -> str:
    rows = [
        [window, f"{plan['segments']:,}", f"{plan['planned_tokens']:,}", f"{plan['padding_share']:.2%}"]
        for window, plan in ((window, manifest["windows"][window]) for window in ("short", "long"))
    ]
    lost = ", ".join(f"{cause.replace('_', ' ')} {count:,}" for cause, count in manifest.get("lost_tokens", {}).items())
    pairs = [("vocabulary", f"{manifest['vocab_size']:,} token ids")] if "vocab_size" in manifest else []
    pairs += [("lost tokens", text(lost))] if lost else []
    return table(f"Segments <span>of {manifest['segment_tokens']:,} tokens</span>", ["window", "segments", "tokens", "padding"], rows) + (facts(pairs) if pairs else "")
