"""What lr2train itself computes for the cases: the folder ``two/`` under lr2train's two tables.

Choice: the tables come from ``factors.json`` and the weights from the safetensors, so nothing that a runtime reads in
config.json decides here. Tokens come from ``model/decode.py``, log-probabilities from ``model/score.py``, which
computes whole texts and no cache. Cost: each case is computed twice; a case that crosses the switch four times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.config import UserError
from lr2train.model import decode, load, rotary, score
from lr2train.rope.factors import Factors
from lr2train.serving import folders
from tools.serving.cases import SCORED, Case


@dataclass(frozen=True)
class Answer:
    """As in answer.json; float64.

    Attributes:
        logprobs: of the last ``SCORED`` prompt tokens, at most.
        tokens: greedy ids.
        token_logprobs: of ``tokens``.
    """

    logprobs: list[float]
    tokens: list[int]
    token_logprobs: list[float]


class Reference:
    """A loaded model under lr2train's two tables.

    Args:
        folder: ``two/`` of an export.
        dtype: a key of ``load.DTYPES``.

    Raises:
        UserError: the folder is no ``two/``, or cannot be loaded.
    """

    def __init__(self, folder: Path, dtype: str):
        if not (folder / "factors.json").is_file():
            raise UserError(f"{folder} holds no factors.json, so it is no folder two/; name the folder of an export")
        factors = Factors.load(folder / "factors.json")
        self.original, self.target = factors.spectrum.window_tokens, factors.target_window_tokens
        if self.original >= self.target:
            raise UserError(f"{folder} has one window of {self.original} tokens, and no switch; name an extended model")
        self._model: Any = load.load_whole(folder, dtype)
        _refuse_other_code(folder, self._model)
        self._table = rotary.install(self._model, factors)
        self.vocabulary = self._model.get_input_embeddings().num_embeddings

    def answer(self, case: Case, text: Sequence[int]) -> Answer:
        """The answer for the beginning of a text of token ids."""
        prompt = list(text[: case.prompt_tokens])
        tokens = list(decode.generate(self._model, self._table, prompt, case.new_tokens, self.original))
        whole, first = [*prompt, *tokens], max(1, len(prompt) - SCORED)
        if len(prompt) > self.original:
            found = self._logprobs(whole, first, "long")
        else:
            switch = min(len(whole), self.original + 1)  # the short table predicts the tokens before
            found = self._logprobs(whole[:switch], first, "short")
            found += self._logprobs(whole, switch, "long") if switch < len(whole) else []
        n_scored = len(prompt) - first
        return Answer(found[:n_scored], tokens, found[n_scored:])

    def token_logprob(self, tokens: Sequence[int], token: int) -> float:
        """The log-probability of ``token`` after ``tokens``."""
        window = decode.window_of(len(tokens), self.original)
        return self._logprobs([*tokens, token], len(tokens), window)[0]

    def _logprobs(self, tokens: list[int], first: int, window: str) -> list[float]:
        """Of ``tokens[first:]``."""
        spans = [(t, t + 1) for t in range(first, len(tokens))]
        return [-nll for nll in score.score(self._model, self._table, window, np.asarray(tokens), spans).nlls]


def _refuse_other_code(folder: Path, model: Any) -> None:
    """Raises UserError unless the modelling file is lr2train's own: runtimes will execute the file."""
    own = folders.code_of(type(model).__name__, rotary.form_of(model))
    try:
        text = (folder / folders.CODE).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder / folders.CODE} cannot be read ({error.strerror}); export the run again") from error
    if text != own:
        raise UserError(
            f"{folder / folders.CODE} is not the file that this version of lr2train writes, and would be executed; "
            "export the run again"
        )
