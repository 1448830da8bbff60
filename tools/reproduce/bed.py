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
        """Lengths that are evaluated: L0, doubling, up to L."""
        found = [self.original_window_tokens]
        while found[-1] < self.original_window_tokens * ratio:
            found.append(2 * found[-1])
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


_A, _B = Base("bed_a", "bed_base"), Base("bed_b", "bed_base", ("model=bed_b",))
_QUARTER = Base("bed_a_quarter", "bed_base", ("data.stages.1.steps=75", "data.stages.2.steps=100"), 0.25)
_FOUR = Base("bed_a_four", "bed_base", ("data.stages.1.steps=1200", "data.stages.2.steps=1600"), 4)
_METHODS = ("longrope2", "yarn", "ntk", "pi", "longrope")
_ABLATIONS = ("ntk_rcd", "yarn_rcd", "text", "all_dims")
_ROWS = (
    *_METHODS[:-1],
    *(f"{one}_shared" for one in _METHODS[1:-1]),
    "longrope2_one_table",
    *_ABLATIONS,
    *("longrope", "longrope_shared"),
    *("distill", "one_factor", "document"),
    *(f"{one}_one_table" for one in _METHODS[1:]),
    *(f"{one}_shared" for one in _ABLATIONS),
)
_DEMO = Base("base", "tiny_base")
_SEARCHES = ("needle", "text", "all_dims", "longrope")
_MAP = ("--attention-factor", "1.2", "1.3", "--documents")
FORMS = {
    "demo": Form(  # the demo's base model, with many needles that are not asked for; one seed
        name="demo",
        experiment="tiny_4k",
        original_window_tokens=512,
        cells=((_DEMO, 8),),
        rows=_ROWS,
        searches=_SEARCHES,
        seeds=1,
        search_seeds=1,
        training=("parallel.sp=1", "optim.steps=20", "engine.validate_every_steps=0", "logger.tensorboard=false"),
        evaluation=("eval.samples=6", "eval.questions=4", "eval.distractors=20", "eval.text_documents=8"),
        map_rcd=(*_MAP, "8", "--scales", "1.0", "1.6"),
    ),
    "quick": Form(
        name="quick",
        experiment="bed",
        original_window_tokens=256,
        cells=((_A, 8), (_QUARTER, 8)),
        rows=_ROWS,
        searches=_SEARCHES,
        seeds=2,
        search_seeds=1,
        map_rcd=(*_MAP, "12", "--scales", "1.0", "1.6"),
    ),
    "full": Form(
        name="full",
        experiment="bed",
        original_window_tokens=256,
        cells=((_A, 8), (_B, 8), (_A, 16), (_B, 16), (_QUARTER, 8), (_FOUR, 8)),
        rows=_ROWS,
        searches=_SEARCHES,
        seeds=3,
        search_seeds=3,
        map_rcd=(*_MAP, "40"),
    ),
}
