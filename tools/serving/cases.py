"""Cases, setups and requests of the serving check: which prompts a runtime gets, how, and what it promises.

A *case* is a prompt of a certain length and a number of new tokens. A *row* is one text that a runtime is asked for.
Rows of one batch run together. A *setup* is one way to run a runtime on one folder: its batches and its options. The
setups of each runtime stand in ``runtimes.py``.

Every prompt is the beginning of the same text, so that prefix caches have something to find.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCORED = 64  # log-probabilities of so many last prompt tokens are compared
NEW_TOKENS = 16
SHORT_TOKENS = 512  # a short prompt, or half of L0 where L0 is small


@dataclass(frozen=True)
class Case:
    """A prompt of ``prompt_tokens`` tokens, and ``new_tokens`` greedy tokens after the prompt."""

    prompt_tokens: int
    new_tokens: int = NEW_TOKENS


@dataclass(frozen=True)
class Row:
    """One text of a batch.

    Attributes:
        name: unique in its setup.
        case: key of the cases.
    """

    name: str
    case: str


@dataclass(frozen=True)
class Setup:
    """One way to run a runtime.

    Attributes:
        folder: what the runtime loads; named below the export where it lies there.
        how: the way in words, for the table.
        batches: rows that run together, batch after batch.
        exact: cases that the documentation promises to be exact.
        options: for the runtime's own script.
        window: "target" | "original": the context that the runtime sets up.
    """

    folder: Path
    how: str
    batches: tuple[tuple[Row, ...], ...]
    exact: Collection[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    window: str = "target"


def cases_of(original: int, target: int, longest: int | None = None) -> dict[str, Case]:
    """The cases of a model with the windows ``original`` and ``target`` (tokens).

    Args:
        longest: tokens of the long prompt; None: twice ``original``, or what the target window holds.
    """
    room = target - NEW_TOKENS
    return {
        "short": Case(min(SHORT_TOKENS, original // 2)),
        "crossing": Case(original - NEW_TOKENS // 2),
        "at L0": Case(original),
        "long": Case(min(longest or 2 * original, room)),
    }


def alone(*cases: str) -> tuple[tuple[Row, ...], ...]:
    """Each case as a batch of its own."""
    return tuple((Row(case, case),) for case in cases)


def together(*cases: str) -> tuple[Row, ...]:
    """One batch."""
    return tuple(Row(f"{case}, in a batch", case) for case in cases)


def request_of(
    setup: Setup, cases: Mapping[str, Case], text: Sequence[int], windows: Mapping[str, int], dtype: str
) -> dict[str, Any]:
    """The contents of request.json.

    ``{"folder", "max_tokens", "options", "batches": [[{"name", "prompt", "new_tokens"}]]}``. ``options`` holds the
    setup's options and ``dtype``.
    """
    return {
        "folder": str(setup.folder),
        "max_tokens": windows[setup.window],
        "options": {"dtype": dtype, **setup.options},
        "batches": [
            [
                {
                    "name": row.name,
                    "prompt": list(text[: cases[row.case].prompt_tokens]),
                    "new_tokens": _new_tokens(setup, cases[row.case], windows),
                }
                for row in batch
            ]
            for batch in setup.batches
        ],
    }


def _new_tokens(setup: Setup, case: Case, windows: Mapping[str, int]) -> int:
    """Fewer than the case wants where the setup's window ends before: there every runtime stops."""
    return max(1, min(case.new_tokens, windows[setup.window] - case.prompt_tokens))
