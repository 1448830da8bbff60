"""Facts and problems: how one rank notes them, how those of all ranks become one list, how a person reads it.

Choice: a fact is a name and a text in a section. Facts that are equal on all ranks are one line; facts that differ are
a line for each text, with its ranks. So 64 ranks on 8 equal machines read as one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

_NAME_WIDTH = 30  # a longer name takes its own width


@dataclass(frozen=True)
class Problem:
    """Something to repair.

    Attributes:
        what: the problem with its value, as half a sentence.
        remedy: what to do, as the other half.
        stops: whether a run would stop or hang; else the run is slower or at risk.
    """

    what: str
    remedy: str
    stops: bool = False


@dataclass
class Findings:
    """What was found: facts as section -> name -> text, in the order of noting, and problems."""

    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def note(self, section: str, name: str, text: str) -> None:
        """Add a fact."""
        self.facts.setdefault(section, {})[name] = without_home(text)

    def problem(self, what: str, remedy: str, stops: bool = False) -> None:
        """Add a problem."""
        self.problems.append(Problem(without_home(what), without_home(remedy), stops))


def without_home(text: str) -> str:
    """A text with ~ in the place of the home folder, whose name is the user's: the output is made to be pasted."""
    home = os.path.expanduser("~")  # "~" where this user has none, as an unknown user of a container
    return text if home == "/" else re.sub(rf"(?:(?<=-[IL])|(?<![\w.])){re.escape(home)}(?![\w.-])", "~", text)


def in_words(found: Sequence[Findings]) -> str:
    """The findings of all ranks, in rank order, as text: problems first, then the facts, one a line."""
    problems = _merged_problems(found)
    stopping = sum(problem.stops for problem, _ in problems)
    parts = [_headline(stopping, len(problems) - stopping)]
    if problems:
        parts.append("\n".join(["Problems", *(_problem_line(*one, len(found)) for one in problems)]))
    return "\n\n".join([*parts, *(_section(found, name) for name in _names([one.facts for one in found]))])


def stops(found: Sequence[Findings]) -> bool:
    """Whether a problem of any rank would stop a run."""
    return any(problem.stops for one in found for problem in one.problems)


def _headline(stopping: int, others: int) -> str:
    if not stopping and not others:
        return "lr2train doctor: no problem found"
    counts = [
        f"{number} problem{'s' if number > 1 else ''} {which}"
        for number, which in ((stopping, "would stop a run"), (others, "worth a look"))
        if number
    ]
    return f"lr2train doctor: {', '.join(counts)}"


def _merged_problems(found: Sequence[Findings]) -> list[tuple[Problem, list[int]]]:
    """Each problem once with its ranks; those that stop a run first."""
    ranks: dict[Problem, list[int]] = {}
    for rank, one in enumerate(found):
        for problem in one.problems:
            ranks.setdefault(problem, []).append(rank)
    return sorted(ranks.items(), key=lambda item: not item[0].stops)


def _problem_line(problem: Problem, ranks: Sequence[int], world: int) -> str:
    where = "" if len(ranks) == world else f" ({_ranks_in_words(ranks)})"
    return f"  {'STOPS' if problem.stops else 'note '}  {problem.what}{where}; {problem.remedy}"


def _section(found: Sequence[Findings], section: str) -> str:
    facts = [one.facts.get(section, {}) for one in found]
    lines = [line for name in _names(facts) for line in _fact_lines(name, [one.get(name) for one in facts])]
    return "\n".join([section, *lines])


def _fact_lines(name: str, texts: Sequence[str | None]) -> list[str]:
    """The lines of a fact: one where all ranks agree, else one for each text."""
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        if text is not None:
            by_text.setdefault(text, []).append(rank)
    names = [name, *[""] * (len(by_text) - 1)]
    return [
        f"  {label:{_NAME_WIDTH}}  {text}{'' if len(ranks) == len(texts) else f'  [{_ranks_in_words(ranks)}]'}"
        for label, (text, ranks) in zip(names, by_text.items(), strict=True)
    ]


def _names(dictionaries: Sequence[Mapping[str, object]]) -> list[str]:
    """All keys, in the order in which they first stand."""
    return list(dict.fromkeys(name for one in dictionaries for name in one))


def _ranks_in_words(ranks: Sequence[int]) -> str:
    """``ranks 0-3, 6`` for [0, 1, 2, 3, 6]."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda one: one[1] - one[0])]
    words = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"
