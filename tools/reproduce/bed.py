"""The test bed as one table: experiments, base models, lengths, seeds, and what the quick and the full form run of it.

The two forms have folders of their own. They differ in nothing but what stands here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Base:
    """A base model that is trained from scratch.

    Attributes:
        name: of its run.
        experiment: of its training.
        overrides: of its training.
        tokens: how many tokens it sees, in multiples of the usual number. Only bases with 1 have rows in the tables;
            the others are there for the hypothesis.
    """

    name: str
    experiment: str
    overrides: tuple[str, ...] = ()
    tokens: float = 1


@dataclass(frozen=True)
class Form:
    """What is run.

    Attributes:
        name: "quick" or "full".
        experiment: of search, training and evaluation; bases and lengths are overridden.
        original_window_tokens: L0 of all bases.
        cells: (base, extension ratio), each with a set of rows.
        rows: keys of ``rows.ROWS``.
        searches: keys of ``rows.SEARCHES``.
        seeds: trainings of each row.
        search_seeds: searches of each kind; seed n of a row takes the factors of search n modulo this number.
        search, training, evaluation: overrides of the verbs.
        map_rcd: arguments of tools.map_rcd.
    """

    name: str
    experiment: str
    original_window_tokens: int
    cells: tuple[tuple[Base, int], ...]
    rows: tuple[str, ...]
    searches: tuple[str, ...]
    seeds: int
    search_seeds: int
    search: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    map_rcd: tuple[str, ...] = ()

    @property
    def bases(self) -> list[Base]:
        """Every base once."""
        return list(dict.fromkeys(base for base, _ in self.cells))

    @property
    def ratios(self) -> list[int]:
        """Every extension ratio once, ascending."""
        return sorted({ratio for _, ratio in self.cells})

    def corpus(self, ratio: int) -> str:
        """Name of the corpus whose segments are L tokens."""
        return f"corpus_{ratio}x"

    def lengths(self, ratio: int) -> list[int]:
        """Lengths that are evaluated: half of L0, doubling, up to L."""
        found, length = [], self.original_window_tokens // 2
        while length <= self.original_window_tokens * ratio:
            found.append(length)
            length *= 2
        return found

    def settings(self, ratio: int, runs: Path, base: Base | None) -> tuple[str, ...]:
        """Overrides that every verb of a cell has; without a base those of the corpus."""
        target = self.original_window_tokens * ratio
        words = (
            f"experiment={self.experiment}",
            f"runs_folder={runs}",
            f"rope.target_window_tokens={target}",
            f"data.segment_tokens={target}",
        )
        if base is None:
            return words
        return (*words, f"data.path={runs / self.corpus(ratio)}", f"model.path={runs / base.name / 'model'}")


_A = Base("base_a", "bed_base")
_METHODS = ("pi", "ntk", "yarn", "longrope", "longrope2")
_ABLATIONS = ("ntk_rcd", "yarn_rcd", "text", "all_dims", "longrope2_one_table", "document", "distill", "one_factor")
FORMS = {
    "quick": Form(
        "quick",
        "bed",
        256,
        ((_A, 8),),
        (*_METHODS, *_ABLATIONS),
        ("needle", "text", "all_dims", "longrope"),
        1,
        1,
    ),
}
