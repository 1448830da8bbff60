"""The panels of a dashboard, defined once: wandb's workspace and TensorBoard's layout are made of them.

Choice: a panel is a title and the names of figures, as ``metrics.jsonl`` and the other records have them. Figures that
a person compares share a panel: both windows, training and held-out loss.
"""

from __future__ import annotations

from typing import NamedTuple


class Panel(NamedTuple):
    """A chart of curves over steps, or over generations of a search."""

    title: str
    keys: tuple[str, ...]
    log_y: bool = False


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Training": (
        Panel("Loss of both windows, nats", ("loss_short", "loss_long")),
        Panel("Held-out loss, nats", ("heldout_loss_short", "heldout_loss_long", "heldout_loss_needles")),
        Panel("Loss, nats", ("loss",)),
        Panel("Gradient norm", ("grad_norm",), log_y=True),
        Panel("Learning rate", ("lr",)),
        Panel("Steps without an update", ("bad_steps",)),
        Panel("Share of long segments", ("window_mix",)),
        Panel("Load-balancing loss of experts", ("router_loss",)),
        Panel("Distillation loss, nats", ("distill_loss",)),
    ),
    "Speed and memory": (
        Panel("Tokens a second", ("tokens_per_s",)),
        Panel("Model FLOPs utilization", ("mfu",)),
        Panel("Seconds a step, and of these waiting for data", ("step_s", "data_wait_s")),
        Panel("Peak memory of rank 0, GiB", ("peak_gib",)),
        Panel("Tokens seen", ("tokens_seen",)),
        Panel(
            "Target tokens",
            ("n_target_tokens", "heldout_tokens_short", "heldout_tokens_long", "heldout_tokens_needles"),
        ),
    ),
    "Search": (
        Panel("Perplexity of the best candidate", ("search/best_perplexity",), log_y=True),
        Panel("Critical index of the best candidate", ("search/critical_index",)),
        Panel("Attention factor of the best candidate", ("search/attention_factor",)),
        Panel("Document-forwards", ("search/document_forwards",)),
        Panel("Candidates", ("search/candidates",)),
    ),
}
PICTURES = {
    "Search": tuple(f"search/{name}" for name in ("factors", "fitness", "rcd", "temperature", "documents")),
    "Evaluation": ("evaluate/needles",),
}
"""Section -> the names of its pictures."""
TABLES = {"Search": ("search/finalists",), "Evaluation": ("evaluate/needles_by_length",)}
"""Section -> the names of its tables; an evaluation has more, one for each benchmark."""


def layout() -> dict[str, dict[str, list[object]]]:
    """The panels as TensorBoard's custom scalars take them: section -> title -> [kind, keys]."""
    return {
        section: {panel.title: ["Multiline", list(panel.keys)] for panel in panels}
        for section, panels in SECTIONS.items()
    }
