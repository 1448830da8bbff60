"""Documents to ids as fast as can be trusted: Hugging Face's tokenizers, or gigatoken where it gives the same ids.

Choice: the ids are those of Hugging Face's tokenizers by definition. gigatoken (Rust, a cache of words) reads the same tokenizer.json and is
many times faster; it is compared on strings that tokenizers quarrel about, then on the beginning of every shard and on some documents all
along. Where one id differs the shard is done again without it. Cost: about a hundredth of the text is encoded twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lr2train.config import UserError
from lr2train.data.tokenizer import Tokenizer

HF, GIGATOKEN, AUTO = "hf", "gigatoken", "auto"
_FIRST_CHARACTERS = 1 << 17  # of every shard, all compared
_EVERY = 256  # documents after that, one of which is compared
_PIECE = 4096  # characters of it that are
_PROBES = (
    "", " ", "  \n\n \t x", "a\r\nb\rc", "don't WE'LL It's", "1234567 0.12 3,000", "naïve e\u0301 ﬁ ①", "日本語 한국어 ไทย", "🙂\u200d👩 \U0001f9d1\U0001f3fd",
    "\ufeffx\u2028y\u00a0z\u3000", "\x00\x01\x7f", "x" * 300, "    def f(x):\n        return x\n", "https://a.b/c?d=e&f#g", "ſ İ ß",
)  # fmt: skip

Encode = Callable[[Sequence[str]], list[np.ndarray]]


class Disagreement(Exception):
    """gigatoken does not load this tokenizer, or gives another id than Hugging Face's tokenizers; the text says where."""


class Encoder:
    """Ids of documents, without BOS and EOS.

    Args:
        tokenizer: decides the ids.
        backend: ``hf`` or ``gigatoken``.

    Raises:
        Disagreement: gigatoken cannot be had, or differs on the probes.
    """

    def __init__(self, tokenizer: Tokenizer, backend: str) -> None:
        self._tokenizer = tokenizer
        self._fast = _gigatoken(tokenizer) if backend == GIGATOKEN else None
        self._compared = self._documents = 0
        self._compare([*_PROBES, *(f"a {name}b{name}" for name in tokenizer.added_tokens)])

    def begin_shard(self) -> None:
        """From here on documents are compared anew."""
        self._compared = self._documents = 0

    def encode(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """Ids of each text.

        Raises:
            Disagreement: a compared one has others with gigatoken.
        """
        if self._fast is None:
            return self._tokenizer.encode_batch(texts)
        self._compare([text[:size] for text in texts if (size := self._compared_characters(text))])
        return self._fast(texts)

    def _compared_characters(self, text: str) -> int:
        """How much of a document: at a shard's beginning all that is asked for, because a fast encoder may cut what is long; then a piece of some."""
        self._documents += 1
        left = _FIRST_CHARACTERS - self._compared
        if left <= 0:
            return 0 if self._documents % _EVERY else _PIECE
        self._compared += min(len(text), left)
        return left

    def _compare(self, texts: Sequence[str]) -> None:
        if self._fast is None or not texts:
            return
        for text, ours, theirs in zip(texts, self._tokenizer.encode_batch(texts), self._fast(texts), strict=True):
            if not np.array_equal(ours, theirs):
                raise Disagreement(f"gigatoken gives other ids than tokenizers for {text[:60]!r}")


def _gigatoken(tokenizer: Tokenizer) -> Encode:
    try:
        import gigatoken

        core = gigatoken.Tokenizer.from_json(tokenizer.to_json())
    except ImportError as error:
        raise Disagreement(f"gigatoken is not installed ({error})") from None
    except Exception as error:  # of its Rust part: a model or a rule that it does not know
        raise Disagreement(f"gigatoken does not read this tokenizer ({' '.join(str(error).split())})") from None

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        try:
            return [core.encode(text) for text in texts]
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of its Rust part is no Exception
            raise Disagreement(f"gigatoken failed ({error})") from None

    return encode


def choose(tokenizer: Tokenizer, backend: str, log: Callable[[str], None]) -> str:
    """The backend that serves: ``auto`` takes gigatoken where it agrees on the probes, else says why not.

    Raises:
        UserError: gigatoken was asked for and does not serve.
    """
    if backend == HF:
        return HF
    try:
        Encoder(tokenizer, GIGATOKEN)
    except Disagreement as reason:
        if backend == GIGATOKEN:
            raise refusal(reason) from None
        log(f"tokenizing with Hugging Face's tokenizers, because {reason}")
        return HF
    return GIGATOKEN


def refusal(reason: Disagreement) -> UserError:
    """What to say where gigatoken was asked for by name."""
    return UserError(f"data.tokenizer_backend={GIGATOKEN} cannot be used: {reason}; set data.tokenizer_backend to {HF} or {AUTO}")
