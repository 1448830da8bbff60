"""Batches that teach a base model from scratch, stage by stage: repeated tokens, needle documents, chains, plain text.

Choice: no segment is planned. A segment is filled with rows (documents) of one length from its own random stream, keyed
by (seed, step, segment). So it does not depend on the number of ranks, and any step can be made at once. Text is
cropped at random from training documents. Cost: there are no epochs, and tokens repeat.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lr2train.config import DataConfig, StageConfig, UserError
from lr2train.data.batch import IGNORE, SHORT, Batch
from lr2train.data.corpus import Corpus
from lr2train.data.needles import NeedleMaker, check_needles
from lr2train.data.text import Text
from lr2train.run import stream

DENSE_PAIRS = 12  # at most, in a row of kind "dense"
MOST_CHAINS = 4  # in a row of kind "chains"

# tokens int64 [rows, length]; bool [rows, length], whether a token is a target of the one before it
Rows = tuple[np.ndarray, np.ndarray]


class CurriculumLoader:
    """Batches by stage; the last stage goes on for ever.

    Args:
        corpus: gives the tokenizer and the training text.
        data: ``stages``, ``needles``, ``segment_tokens``.
        seed: of everything.
        dp_rank, dp_size: this data-parallel rank and their number.
        accumulation: micro-batches a step on this rank.

    Raises:
        UserError: there are no stages, a stage has no kind of row, or the documents of a stage cannot be made.
    """

    def __init__(
        self, corpus: Corpus, data: DataConfig, seed: int, dp_rank: int, dp_size: int, accumulation: int
    ) -> None:
        if not data.stages:
            raise UserError("data.stages is empty, and data.kind=curriculum needs them; add a stage")
        check_needles(data.needles)
        self._stages, self._size, self._seed = data.stages, data.segment_tokens, seed
        self._segments = range(dp_rank, dp_size * accumulation, dp_size)
        self._eos = corpus.tokenizer.eos
        self._rows = RowMaker(corpus, data)
        self._ends = np.cumsum([stage.steps for stage in data.stages])
        self.fingerprint = f"{corpus.fingerprint}-curriculum"
        for number, stage in enumerate(data.stages):
            self._rows.check(number, stage)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of all stages."""
        return int(self._ends[-1])

    def _stage(self, step: int) -> int:
        return min(int(np.searchsorted(self._ends, step, side="right")), len(self._stages) - 1)

    def described(self, step: int) -> list[str]:
        """Number and stage of each of this rank's segments of a step."""
        return [f"{segment} of stage {self._stage(step)}" for segment in self._segments]

    def batches(self, step: int) -> list[Batch]:
        """This rank's batches of a step."""
        stage = self._stages[self._stage(step)]
        return [self._batch(stage, stream(self._seed, "curriculum", step, segment)) for segment in self._segments]

    def _batch(self, stage: StageConfig, rng: np.random.Generator) -> Batch:
        length, n_rows = stage.length_tokens, self._size // stage.length_tokens
        row_tokens, is_target = self._rows.make(stage, n_rows, rng)
        used = n_rows * length
        tokens, learned = np.full(self._size, self._eos, np.int32), np.zeros(self._size, bool)
        tokens[:used] = row_tokens.ravel()
        learned[:used].reshape(n_rows, length)[:, :-1] = is_target[:, 1:]  # a row's last token predicts nothing
        ignored = np.flatnonzero(~learned)
        spans = tuple((start, start + length) for start in range(0, used, length))
        return Batch(tokens, np.stack([ignored, np.full_like(ignored, IGNORE)]), spans, SHORT)


class RowMaker:
    """Makes the rows of a stage. Each row begins with BOS where the tokenizer has one."""

    def __init__(self, corpus: Corpus, data: DataConfig) -> None:
        tokenizer = corpus.tokenizer
        self._bos = [] if tokenizer.bos is None else [tokenizer.bos]
        self._ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special_ids)
        self._text = Text(corpus.stores(), tokenizer.n_borders)
        self._needles, self._size = data.needles, data.segment_tokens
        self._maker = NeedleMaker(tokenizer.encode, data.needles.wording, data.needles.digits, tokenizer.bos, None)
        # By length, questions and chains; counting takes a while.
        self._most_pairs: dict[tuple[int, int, int], int] = {}
        self._kinds: dict[str, Callable[[np.random.Generator, int, int], Rows]] = {
            "repeats": self._repeats,
            "needles": self._needle_rows,
            "dense": self._dense_rows,
            "chains": self._chain_rows,
            "text": self._text_rows,
        }

    def check(self, number: int, stage: StageConfig) -> None:
        """Refuse a stage that cannot be made, before training starts.

        Raises:
            UserError: steps, lengths or shares are out of their limits, or documents of that length cannot be made.
        """
        where, length = f"data.stages[{number}]", stage.length_tokens
        if stage.steps < 1 or not 8 <= length <= self._size:
            raise UserError(
                f"{where} has steps={stage.steps}, length_tokens={length}; steps must be 1 or more, length_tokens 8 to "
                f"data.segment_tokens={self._size}"
            )
        if self._shares(stage).min() < 0 or not self._shares(stage).sum() > 0:
            raise UserError(
                f"{where} has shares repeats={stage.repeats}, needles={stage.needles}, dense={stage.dense}, "
                f"chains={stage.chains}, text={stage.text}; set one above 0 and none below"
            )
        asks = stage.needles or stage.dense or stage.chains
        if asks and not self._pairs_that_fit(length, self._needles.max_questions if stage.needles else 1):
            raise UserError(
                f"{where}.length_tokens={length} has no room for a needle; use a greater length, fewer "
                "data.needles.digits, or data.needles.wording=code"
            )
        if stage.chains and not self._pairs_that_fit(length, 1, 1):
            raise UserError(
                f"{where}.length_tokens={length} has no room for a chain of {self._needles.hops + 1} needles beside a "
                "pair; use a greater length or fewer data.needles.hops"
            )
        if (asks or stage.text) and self._text.longest < length:
            raise UserError(
                f"{where}.length_tokens={length} is longer than every training document ({self._text.longest} tokens); "
                "use a smaller length or other sources"
            )

    def make(self, stage: StageConfig, n_rows: int, rng: np.random.Generator) -> Rows:
        """``n_rows`` rows, the number of each kind within one of its share."""
        shares = self._shares(stage).cumsum()
        # Systematic sampling, one random offset for all rows: shares hold in each segment, not only on average.
        borders = np.floor(shares / shares[-1] * n_rows + rng.random()).astype(int).clip(0, n_rows)
        borders[shares == shares[-1]] = n_rows
        counts = np.diff(borders, prepend=0)
        made = [
            self._kinds[kind](rng, int(count), stage.length_tokens)
            for kind, count in zip(self._kinds, counts, strict=True)
            if count
        ]
        return np.concatenate([tokens for tokens, _ in made]), np.concatenate([is_target for _, is_target in made])

    def _shares(self, stage: StageConfig) -> np.ndarray:
        return np.array([getattr(stage, kind) for kind in self._kinds], dtype=np.float64)

    def _repeats(self, rng: np.random.Generator, n_rows: int, length: int) -> Rows:
        """BOS, then random tokens that repeat with a period of an eighth to a half of the row.

        Periods differ from row to row: the model has to look for a token's last occurrence and not for a fixed
        distance. Targets are the tokens that can be known: all after the first token of the second period.
        """
        body = length - len(self._bos)
        period = rng.integers(max(2, length // 8), length // 2, size=(n_rows, 1), endpoint=True)
        place = np.arange(body)[None]
        once = self._ordinary[rng.integers(len(self._ordinary), size=(n_rows, length // 2))]
        tokens = self._after_bos(np.take_along_axis(once, place % period, axis=1))
        is_target = np.zeros_like(tokens, dtype=bool)
        is_target[:, len(self._bos) :] = place > period
        return tokens, is_target

    def _text_rows(self, rng: np.random.Generator, n_rows: int, length: int) -> Rows:
        tokens = self._after_bos(self._text.draw(rng, n_rows, length - len(self._bos)))
        return tokens, np.ones_like(tokens, dtype=bool)

    def _needle_rows(self, rng: np.random.Generator, n_rows: int, length: int) -> Rows:
        """Needle documents with a few pairs, some of them asked for."""
        most = self._pairs_that_fit(length, self._needles.max_questions)
        n_pairs = rng.integers(1, min(self._needles.max_pairs, most), size=n_rows, endpoint=True)
        n_questions = rng.integers(1, np.minimum(n_pairs, self._needles.max_questions), endpoint=True)
        return self._hidden_and_asked(rng, length, n_pairs, n_questions)

    def _dense_rows(self, rng: np.random.Generator, n_rows: int, length: int) -> Rows:
        """Needle documents with up to ``DENSE_PAIRS`` pairs, as many as fit, each asked for."""
        most = min(DENSE_PAIRS, self._pairs_that_fit(length, DENSE_PAIRS + 1))
        n_pairs = rng.integers(min(3, most), most, size=n_rows, endpoint=True)
        return self._hidden_and_asked(rng, length, n_pairs, n_pairs)

    def _chain_rows(self, rng: np.random.Generator, n_rows: int, length: int) -> Rows:
        """Needle documents with up to ``MOST_CHAINS`` chains, as many as fit, and pairs in the rest; one pair is asked
        for.
        """
        most = max(n for n in range(1, MOST_CHAINS + 1) if self._pairs_that_fit(length, 1, n) or n == 1)
        n_chains = rng.integers(1, most, size=n_rows, endpoint=True)
        fitting = np.array([self._pairs_that_fit(length, 1, n) for n in range(most + 1)])[n_chains]
        n_pairs = rng.integers(1, np.minimum(self._needles.max_pairs, fitting), endpoint=True)
        return self._hidden_and_asked(rng, length, n_pairs, np.ones_like(n_pairs), n_chains)

    def _hidden_and_asked(
        self,
        rng: np.random.Generator,
        length: int,
        n_pairs: np.ndarray,
        n_questions: np.ndarray,
        n_chains: np.ndarray | None = None,
    ) -> Rows:
        """One needle document a row; the answers alone are targets."""
        fillers = self._text.draw(rng, len(n_pairs), length)
        depths = np.where(rng.random(len(n_pairs)) < self._needles.at_start, 0.0, np.nan)
        tokens, is_target = np.empty((len(n_pairs), length), np.int64), np.zeros((len(n_pairs), length), bool)
        chains = np.zeros_like(n_pairs) if n_chains is None else n_chains
        for row, (filler, depth, pairs, questions, chained) in enumerate(
            zip(fillers, depths, n_pairs.tolist(), n_questions.tolist(), chains.tolist(), strict=True)
        ):
            place = None if np.isnan(depth) else 0.0
            hops = self._needles.hops
            document = self._maker.make(rng, filler, length, place, pairs, questions, n_chains=chained, hops=hops)
            tokens[row] = document.tokens
            for start, stop in document.answer_spans:
                is_target[row, start:stop] = True
        return tokens, is_target

    def _after_bos(self, body: np.ndarray) -> np.ndarray:
        """int64 [rows, length]: BOS, then the body; the body alone where the tokenizer has no BOS."""
        first = np.broadcast_to(np.array(self._bos, dtype=np.int64), (len(body), len(self._bos)))
        return np.concatenate([first, body], axis=1)

    def _pairs_that_fit(self, length: int, max_questions: int, n_chains: int = 0) -> int:
        key = (length, max_questions, n_chains)
        if key not in self._most_pairs:
            self._most_pairs[key] = self._maker.most_pairs(*key, self._needles.hops)
        return self._most_pairs[key]
