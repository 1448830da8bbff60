"""The test bed as one table: experiments, base models, lengths, seeds, and what the quick and the full form run of it.

Choice: quick and full run the family of ``conf/experiment/bed.yaml``, window 256. Its documents ask for needles and for
chains of two hops, among needles that are not asked for, so that rows keep away from 0 and 100 %. A segment of 8x is
2048 tokens, half the cost of the demo's. Few training steps leave differences to see: more steps make up for poor
factors. The quick form's steps are among the full form's, and both use one folder of runs. Cost: the demo's family
(window 512, needles alone) is a form of its own.
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
        tokens: of needles and text that it sees, in multiples of the usual number. Only bases with 1 have rows in the
            tables; the others are there for the hypothesis.
    """

    name: str
    experiment: str
    overrides: tuple[str, ...] = ()
    tokens: float = 1


@dataclass(frozen=True)
class Form:
    """What is run.

    Attributes:
        name: of the form.
        folder: of its runs, in runs/.
        experiment: of search, training and evaluation; bases and lengths are overridden.
        original_window_tokens: L0 of all bases.
        cells: (base, extension ratio), each with a set of rows.
        rows: keys of ``rows.ROWS``.
        far_rows: those that run at other ratios than the smallest, where a row costs several times as much; empty: all.
        searches: keys of ``rows.SEARCHES``.
        seeds: trainings of each row.
        search_seeds: searches of each kind; seed n of a row takes the factors of search n modulo this number.
        search, training, evaluation: overrides of the verbs.
        map_rcd: arguments of tools.map_rcd.
    """

    name: str
    folder: str
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
    far_rows: tuple[str, ...] = ()

    @property
    def bases(self) -> list[Base]:
        """Every base once."""
        return list(dict.fromkeys(base for base, _ in self.cells))

    @property
    def ratios(self) -> list[int]:
        """Every extension ratio once, ascending."""
        return sorted({ratio for _, ratio in self.cells})

    def rows_at(self, ratio: int) -> tuple[str, ...]:
        """Keys of the rows that run at a ratio."""
        return self.rows if ratio == self.ratios[0] else self.far_rows or self.rows

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


_LATER = (160, 320)  # steps of the stages after the first of conf/experiment/bed_base.yaml


def _base(name: str, tokens: float, *overrides: str) -> Base:
    """A base of the bed. The first stage of its training stays: there induction forms."""
    steps = [f"data.stages.{1 + i}.steps={round(tokens * one)}" for i, one in enumerate(_LATER) if tokens != 1]
    return Base(name, "bed_base", (*steps, *overrides), tokens)


_A, _B = _base("base_a", 1), _base("base_b", 1, "model=bed_b", "seed=1")
_QUARTER, _FOUR = _base("base_a_quarter", 0.25), _base("base_a_four", 4)
_METHODS = ("longrope2", "yarn", "ntk", "pi", "longrope")
_ABLATIONS = ("ntk_rcd", "yarn_rcd", "text", "all_dims")
_TABLE_2 = (*_METHODS, *(f"{one}_shared" for one in _METHODS[1:]))
_ROWS = (
    *_TABLE_2,
    "longrope2_one_table",
    *_ABLATIONS,
    *(f"{one}_shared" for one in _ABLATIONS),
    *("yarn_head", "distill", "one_factor", "document"),
    *(f"{one}_one_table" for one in _METHODS[1:]),
)
_SEARCHES = ("needle", "yarn_head", "text", "all_dims", "longrope")
_EVALUATION = ("eval.samples=12",)  # 60 documents of six answers at each length
_MAP = ("--questions", "4", "--distractors", "20", "--attention-factor", "1.2", "1.3", "--documents")
_SAME = {  # of quick and full
    "folder": "reproduce",
    "experiment": "bed",
    "original_window_tokens": 256,
    "rows": _ROWS,
    "searches": _SEARCHES,
    "evaluation": _EVALUATION,
    "map_rcd": (*_MAP, "12", "--scales", "1.0", "1.3", "1.6"),
}
FORMS = {
    "demo": Form(  # a base made like the demo's, one seed, more steps: the shortest form that fills tables
        name="demo",
        folder="reproduce_demo",
        experiment="tiny_4k",
        original_window_tokens=512,
        cells=((Base("base", "tiny_base"), 8),),
        rows=_ROWS,
        searches=_SEARCHES,
        seeds=1,
        search_seeds=1,
        training=("parallel.sp=1", "optim.steps=20", "engine.validate_every_steps=0", "logger.tensorboard=false"),
        evaluation=("eval.questions=4", "eval.distractors=20", "eval.samples=6", "eval.text_documents=8"),
        map_rcd=(*_MAP, "8", "--scales", "1.0", "1.6"),
    ),
    "quick": Form(name="quick", cells=((_A, 8), (_QUARTER, 8)), seeds=2, search_seeds=2, **_SAME),
    "full": Form(
        name="full",
        cells=((_A, 8), (_B, 8), (_QUARTER, 8), (_FOUR, 8), (_A, 16), (_B, 16)),
        seeds=3,
        search_seeds=3,
        far_rows=(*_TABLE_2, "yarn_head"),
        **_SAME,
    ),
}
