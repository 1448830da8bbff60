"""How a field of the schema is declared: its default with its limits, its choices, or that it is a path."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class UserError(ValueError):
    """Input that a user can correct.

    The text is one sentence: what, the value, the limit, the config key, the remedy. Verbs print it and exit with code
    2.
    """


def as_typed(value: Any) -> str:
    """A value as a user types it on the command line, for messages: null, true, ``[1,2]``, an Enum's member by name."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{as_typed(one)}' for key, one in value.items())}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value.name if isinstance(value, Enum) else str(value)


@dataclass(frozen=True)
class Limits:
    """The numbers that a field takes. In a list or a dictionary every number has to keep the limits."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    count: int | None = None  # how many numbers a list has

    def why_not(self, value: float) -> str | None:
        """The fault of a number as a predicate, or None."""
        low, high = self.least if self.above is None else self.above, self.most if self.below is None else self.below
        if not math.isfinite(value):
            return (
                "is not a finite number "
                + (f"above {low}" if self.above is not None else f"of {low} or more")
                + (f" and at most {high}" if high else "")
            )
        too_low = low is not None and (value < low or value == self.above)
        too_high = high is not None and (value > high or value == self.below)
        if not (too_low or too_high):
            return None
        if low is not None and high is not None:
            left_out = self.above if too_low else self.below
            return f"is not between {low} and {high}" + ("" if left_out is None else f", {left_out} left out")
        return (
            f"is not above {self.above}"
            if self.above is not None
            else f"is below {low}"
            if too_low
            else f"is above {high}"
        )

    def in_words(self) -> str:
        """The limits for a help text, such as ``above 0 and at most 1``; empty where there is none."""
        bounds = (("of at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None and abs(bound) < 2**62)

    def nearest(self, value: float, default: Any) -> Any:
        """A number that is allowed, in the place of one that is not: the bound where only one stands, else the default,
        else a bound.
        """
        if self.least is not None and self.most is None and self.below is None and value < self.least:
            return self.least
        if isinstance(default, int | float) and self.why_not(default) is None:
            return default
        if self.most is not None and value > self.most:
            return self.most
        return self.least if self.least is not None else 1 if self.above == 0 else self.most


def number(default: Any, **limits: Any) -> Any:
    """A field of numbers within ``Limits``."""
    return _field(default, limits=Limits(**limits))


def one_of(default: Enum | None, choices: type[Enum] | None = None, plugins: bool = False) -> Any:
    """A field that takes a member of an Enum by its name; ``load`` turns the name into the member.

    Hydra sees text and not the Enum: it would refuse a wrong choice under every verb, also where an environment
    variable set it
    (``WANDB_MODE``) and the verb does not read the key.

    Args:
        default: a member, or None where null is a choice too.
        choices: the Enum, where the default does not tell it.
        plugins: ``package.module.NAME`` of a user's own package is a choice too; it stays text.
    """
    choices = choices or type(default)  # type: ignore[assignment]
    return _field(default, choices=choices, plugins=plugins)


def a_path(default: Any = None) -> Any:
    """A field of paths. ``~`` at the beginning stands for the home folder."""
    return _field(default, path=True)


def literal_text(default: str | list[str] | None = None) -> Any:
    """A field of text, or of texts, that the command line never interpolates: ``${`` stands for itself."""
    return _field(default, literal=True)


def _field(default: Any, **metadata: Any) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)
