"""The rows of the tables: what each method or ablation changes in the training, and which search its factors come from.

Every row of a table has the same tokens, order of data, learning rate and number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lr2train.rope.factors import longrope_attention_factor
from tools.reproduce.bed import Form


@dataclass(frozen=True)
class Row:
    """One trained model.

    Attributes:
        key: names its run.
        label: in the tables.
        overrides: of `train`, beside the common ones.
        factors: the search that its factors come from, a name of ``SEARCHES``; "" for a method without a search.
        like: the row whose factors it takes, for a method without a search; "": it has its own.
        short: table of the short window (``Step.short``).
    """

    key: str
    label: str
    overrides: tuple[str, ...] = ()
    factors: str = ""
    like: str = ""
    short: str = "own"


SHARED = "_shared"  # ends the key of a row under the shared attention factor
ONE_TABLE = "_one_table"  # ends the key of a row without mixed windows
_SHARED = "rope.attention_factor={attention}"
_METHODS = {
    "pi": Row("pi", "PI", ("rope=pi",)),
    "ntk": Row("ntk", "NTK", ("rope=ntk",)),
    "yarn": Row("yarn", "YaRN", ("rope=yarn",)),
    "longrope": Row("longrope", "LongRoPE", factors="longrope"),
    "ntk_rcd": Row("ntk_rcd", "NTK-rcd", ("rope=ntk_rcd", "rope.critical_index={rcd}")),
    "yarn_rcd": Row("yarn_rcd", "YaRN-rcd", ("rope=yarn_rcd", "rope.critical_index={rcd}")),
    "text": Row("text", "LongRoPE2, text perplexity", factors="text"),
    "all_dims": Row("all_dims", "LongRoPE2, all dimensions", factors="all_dims"),
    "longrope2": Row("longrope2", "LongRoPE2", factors="needle"),
    "yarn_head": Row("yarn_head", "LongRoPE2, YaRN below rcd", factors="yarn_head"),
}


def _rows() -> dict[str, Row]:
    """All rows; those of the shared attention factor and without mixed windows are made of the others.

    LongRoPE2 has no row for the shared attention factor, because the shared one is the one that its search found. It
    stands as the paper prints it, with the NTK rule below the critical index; ``yarn_head`` is our default.
    """
    rows = dict(_METHODS)
    for key, row in _METHODS.items():
        if key not in ("longrope2", "yarn_head"):
            shared = (*row.overrides, _SHARED)
            rows[key + SHARED] = Row(key + SHARED, row.label, shared, row.factors)
        like = "" if row.factors else key
        rows[key + ONE_TABLE] = Row(key + ONE_TABLE, f"{row.label}, one table", (), row.factors, like, "rescaled")
    rows["document"] = Row("document", "LongRoPE2, attention by document", ("data.long_attention=document",), "needle")
    rows["distill"] = Row("distill", "LongRoPE2, short window distilled", ("optim.distill_short=1.0",), "needle")
    rows["one_factor"] = Row("one_factor", "LongRoPE2, one attention factor", (), "needle", short="factor")
    return rows


ROWS = _rows()


def _longrope(ratio: int, form: Form) -> tuple[str, ...]:
    """LongRoPE v1: all dimensions in [1, 1.25 s], text perplexity, and its own attention factor for every candidate.

    The algorithm is that of all searches, so that tables compare spaces and objectives alone.
    """
    factor = longrope_attention_factor(ratio, form.original_window_tokens)
    return (
        "search.space=longrope",
        "search.tail_high=1.25",
        "search.objective=text",
        "search.search_attention_factor=false",
        f"search.attention_factor={factor:.6f}",
    )


SEARCHES: dict[str, Callable[[int, Form], tuple[str, ...]]] = {
    "needle": lambda ratio, form: ("search.head=ntk",),
    "yarn_head": lambda ratio, form: ("search.head=yarn",),
    "text": lambda ratio, form: ("search.objective=text", "search.head=ntk"),
    "all_dims": lambda ratio, form: ("search.space=longrope",),
    "longrope": _longrope,
}
