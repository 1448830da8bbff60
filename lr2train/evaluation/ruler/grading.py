"""RULER's grades: shares of the answers that a prediction holds, in either case.

Source: ``scripts/eval/synthetic/constants.py`` and ``postprocess_pred`` in ``scripts/eval/evaluate.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def cleaned(prediction: str) -> str:
    """The prediction without outer white space, and with line breaks in the place of control characters."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Percentage of the answers that the prediction holds."""
    return 100 * sum(_holds(prediction, answers)) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """100 where the prediction holds any of the answers, else 0."""
    return 100.0 * any(_holds(prediction, answers))


def _holds(prediction: str, answers: Sequence[str]) -> list[bool]:
    text = cleaned(prediction).lower()
    return [answer.lower() in text for answer in answers]


def enough_for_all(answers: Sequence[str]) -> tuple[str, ...]:
    """Strings that decide ``string_match_all`` once a text holds them: all answers."""
    return tuple(answers) if all(map(_stays, answers)) else ()


def enough_for_part(answers: Sequence[str]) -> tuple[str, ...]:
    """A string that decides ``string_match_part`` once a text holds it: the shortest answer; empty where none does.

    Any answer would, but a text is asked for all strings of ``Generate.enough``, so only one is named.
    """
    sure = [answer for answer in answers if _stays(answer)]
    return (min(sure, key=len),) if sure else ()


def _stays(answer: str) -> bool:
    """Whether a text that holds the answer holds it with any continuation and after ``cleaned``.

    Lower case of letters outside ASCII may depend on the letters after them. Control characters and outer spaces are
    removed.
    """
    return answer.isascii() and answer.isprintable() and answer == answer.strip()
