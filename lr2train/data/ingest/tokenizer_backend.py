"""Texts to token ids in bulk: by Hugging Face's tokenizers, or by gigatoken where it gives the same ids.

Choice: the ids of Hugging Face's tokenizers are right by definition. gigatoken (Rust, with a cache of words) reads the
same tokenizer.json and is many times faster. Its ids are compared on strings that tokenizers often disagree about, on
the beginning of every input split, and on one document in ``_EVERY`` after that. Where one id differs, the split is
tokenised again without gigatoken. Cost: about a hundredth of the text is tokenised twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lr2train.config import UserError
from lr2train.data.tokenizer import Tokenizer

HF, GIGATOKEN, AUTO = "hf", "gigatoken", "auto"
_FIRST_CHARACTERS = 1 << 17  # of every input split, all compared
_EVERY = 256  # documents; of these one is compared
_COMPARED_CHARACTERS = 4096  # of that document
_PROBES = (
    "", " ", "  \n\n \t x", "a\r\nb\rc", "don't WE'LL It's", "1234567 0.12 3,000", "naïve e\u0301 ﬁ ①",
    "日本語 한국어 ไทย", "🙂\u200d👩 \U0001f9d1\U0001f3fd", "\ufeffx\u2028y\u00a0z\u3000", "\x00\x01\x7f",
    "x" * 300, "    def f(x):\n        return x\n", "https://a.b/c?d=e&f#g", "ſ İ ß",
)  # fmt: skip

Encode = Callable[[Sequence[str]], list[np.ndarray]]


class Disagreement(Exception):
    """gigatoken does not load this tokenizer, or gives other ids than Hugging Face's tokenizers.

    The text says where.
    """


class Encoder:
    """Token ids of documents, without BOS and EOS.

    Args:
        tokenizer: decides the ids.
        backend: ``hf`` or ``gigatoken``.

    Raises:
        Disagreement: gigatoken is not installed, does not read the tokenizer, or differs on a probe.
    """

    def __init__(self, tokenizer: Tokenizer, backend: str) -> None:
        self._tokenizer = tokenizer
        self._fast = _gigatoken(tokenizer) if backend == GIGATOKEN else None
        self._n_compared = self._n_documents = 0  # characters, documents
        self._compare([*_PROBES, *(f"a {name}b{name}" for name in tokenizer.added_tokens)])

    def begin_split(self) -> None:
        """The next documents are the beginning of an input split, which is compared whole."""
        self._n_compared = self._n_documents = 0

    def encode(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """Token ids of each text.

        Raises:
            Disagreement: gigatoken gives other ids for a compared text.
        """
        if self._fast is None:
            return self._tokenizer.encode_batch(texts)
        self._compare([text[:size] for text in texts if (size := self._characters_to_compare(text))])
        return self._fast(texts)

    def _characters_to_compare(self, text: str) -> int:
        """How much of a document is compared.

        At the beginning of a split a long document is compared beyond its first part, because a fast tokenizer may cut
        long texts.
        """
        self._n_documents += 1
        left = _FIRST_CHARACTERS - self._n_compared
        if left <= 0:
            return 0 if self._n_documents % _EVERY else _COMPARED_CHARACTERS
        self._n_compared += min(len(text), left)
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
    except Exception as error:  # of its Rust part: an unknown model or rule
        raise Disagreement(f"gigatoken does not read this tokenizer ({' '.join(str(error).split())})") from None

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        try:
            return [core.encode(text) for text in texts]
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of its Rust part is a BaseException, not an Exception
            raise Disagreement(f"gigatoken failed ({error})") from None

    return encode


def choose_backend(tokenizer: Tokenizer, backend: str, log: Callable[[str], None]) -> str:
    """The backend for a config's ``tokenizer_backend``: ``auto`` takes gigatoken where it agrees, else logs why not.

    Raises:
        UserError: the config asks for gigatoken by name, and gigatoken disagrees.
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
    """The error for a config that asks for gigatoken by name."""
    key = "data.tokenizer_backend"
    return UserError(f"{key}={GIGATOKEN} cannot be used: {reason}; set {key} to {AUTO}")
