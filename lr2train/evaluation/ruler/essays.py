"""The text that needles are hidden in, and its sentences.

Choice: a small rule finds the ends of sentences. RULER takes nltk's punkt, whose data is a download. Needles stand
between sentences, at a share of their number, so the rule matters little: tools/bench/ruler.py measures how much.
"""

from __future__ import annotations

import hashlib
import re
from functools import cached_property
from pathlib import Path

import numpy as np

from lr2train.config import UserError

# A word that ends a sentence, and closing brackets or quotes after the mark.
_END = re.compile(r"""[.?!]["'”’)\]*_]*$""")
_SURE_END = re.compile(r"""[?!]["'”’)\]]*$""")
_INITIAL = re.compile(r"^\W*[A-Za-z]\.$")
_ABBREVIATIONS = (
    "mr mrs ms dr st prof gen col capt lt rev sr jr hon messrs mme mlle vs etc al cf viz no nos vol vols ch fig figs "
    "pp e.g i.e a.m p.m u.s u.k inc ltd co corp bros dept est approx jan feb mar apr jun jul aug sep sept oct nov dec"
)
_NO_END = frozenset(_ABBREVIATIONS.split())


class Essays:
    """Words in order, from the beginning again where more are asked for than there are.

    Args:
        text: any text; its white space is not kept.

    Raises:
        UserError: the text has no word.
    """

    def __init__(self, text: str):
        self._words = text.split()
        if not self._words:
            raise UserError("the text that RULER hides needles in is empty; set eval.essays to a folder of .txt files")
        self.fingerprint = hashlib.sha256(" ".join(self._words).encode()).hexdigest()[:16]

    @classmethod
    def of(cls, source: str | Path) -> Essays:
        """A ``Path`` is a folder of .txt files, joined in the order of their names; a ``str`` is the text itself.

        Raises:
            UserError: the folder has no text.
        """
        if isinstance(source, str):
            return cls(source)
        files = sorted(source.glob("*.txt")) if source.is_dir() else []
        try:
            text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
        except OSError as error:
            raise UserError(
                f"eval.essays={source} cannot be read ({error.strerror}); make its .txt files readable"
            ) from None
        if not text.split():
            raise UserError(f"eval.essays={source} holds no .txt file with text; set eval.essays to a folder that does")
        return cls(text)

    def __len__(self) -> int:
        """Different words in order; more than these repeat."""
        return len(self._words)

    def sentences(self, n_words: int) -> list[str]:
        """The sentences of the first ``n_words`` words; the last one may be cut."""
        rounds, rest = divmod(n_words, len(self._words))
        sentences, ends = self._sentences
        whole = int(np.searchsorted(ends, rest, side="right"))
        begin = int(ends[whole - 1]) if whole else 0
        cut = [" ".join(self._words[begin:rest])] if begin < rest else []
        return sentences * rounds + sentences[:whole] + cut

    @cached_property
    def _sentences(self) -> tuple[list[str], np.ndarray]:
        """The sentences, and the number of words up to the end of each."""
        words = self._words
        last = [i for i in range(len(words) - 1) if ends_sentence(words[i], words[i + 1])]
        ends = np.asarray([*(i + 1 for i in last), len(words)])
        begins = [0, *ends[:-1].tolist()]
        return [" ".join(words[a:b]) for a, b in zip(begins, ends.tolist(), strict=True)], ends


def ends_sentence(word: str, following: str) -> bool:
    """Whether a sentence ends between two words."""
    if not _END.search(word):
        return False
    if _SURE_END.search(word):
        return True
    if following[:1].islower() or _INITIAL.match(word):
        return False
    return word.strip("\"'“”‘’()[]*_.").lower() not in _NO_END
