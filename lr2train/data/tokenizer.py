"""Text to token ids and back: a byte-level BPE that we train, or the tokenizer of a model.

Choice: the trained tokenizer groups digits in pairs from the left, and each of 00 … 99 is one token. A hidden number
then costs few tokens and never merges with its surroundings. Cost: 100 entries of the vocabulary. Ids are plain numpy.
BOS and EOS are added where documents are stored (``bound``), never by ``encode``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from lr2train.config import UserError
from lr2train.io import replacing, write_json

BOS, EOS = "<s>", "</s>"
_LONGEST_WORD = 512  # bytes; a longer word is text without spaces, whose parts teach the same merges
_PIECE = 1 << 16  # characters of a text that training takes at a time
_PIECE_BORDER = re.compile(
    r"(?<=[!-~])(?=[ \n])",
)  # between a visible ASCII character and white space: never inside a word
_CONFIG = "tokenizer_config.json"
DIGIT_PAIRS = tuple(f"{number:02d}" for number in range(100))
SMALLEST_VOCABULARY = 2 + 256 + len(DIGIT_PAIRS)  # special tokens, bytes, pairs of digits

# The files of a Hugging Face tokenizer folder, as far as it has them.
FILES = ("tokenizer.json", _CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "*.model")

# A bare tokenizer.json does not say which special token begins or ends a document. These names are in use.
_KNOWN_BOS = (BOS, "<bos>", "<|begin_of_text|>", "<|startoftext|>")
_KNOWN_EOS = (EOS, "<eos>", "<|end_of_text|>", "<|endoftext|>")


class Tokenizer:
    """A fast tokenizer with the tokens that begin and end a document.

    Args:
        core: of the library.
        bos: id that begins a document, also an attribute; None where the model has none (Qwen).
        eos: id that ends a document, also an attribute.
        folder: the Hugging Face folder that the tokenizer was read from, copied by ``save``; None for a trained one.
    """

    def __init__(self, core: tokenizers.Tokenizer, bos: int | None, eos: int, folder: Path | None = None) -> None:
        core.no_truncation()
        core.no_padding()
        self._core, self.bos, self.eos, self._folder = core, bos, eos, folder

    @property
    def vocab_size(self) -> int:
        """Number of entries, added tokens included."""
        return self._core.get_vocab_size(with_added_tokens=True)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of added tokens, BOS and EOS: ordinary text does not contain them."""
        borders = {id for id in (self.bos, self.eos) if id is not None}
        return tuple(sorted(borders | set(self._core.get_added_tokens_decoder())))

    @property
    def added_tokens(self) -> list[str]:
        """Tokens that are matched before a text is cut into words, special tokens included."""
        return [token.content for token in self._core.get_added_tokens_decoder().values()]

    def to_json(self) -> str:
        """The contents of tokenizer.json."""
        return self._core.to_str()

    @property
    def fingerprint(self) -> str:
        """16 hex digits that stand for the vocabulary, its rules, BOS and EOS."""
        return hashlib.sha256(f"{self._core.to_str()} {self.bos} {self.eos}".encode()).hexdigest()[:16]

    def same_ids(self, other: Tokenizer) -> bool:
        """Whether both tokenizers give every token the same id."""
        return self._core.get_vocab() == other._core.get_vocab()

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int64 [n], without BOS and EOS."""
        return np.array(self._core.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, without BOS and EOS; uses all cores."""
        return [encoding.ids for encoding in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens included."""
        return self._core.decode([int(id) for id in ids], skip_special_tokens=False)

    def bound(self, ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """A document as it is stored: BOS ids EOS, int64 [len(ids) + n_borders]; no BOS where the model has none."""
        document = np.empty(len(ids) + self.n_borders, np.int64)
        document[0] = self.eos if self.bos is None else self.bos  # without a BOS, the ids overwrite this place
        document[self.n_borders - 1 : -1] = ids
        document[-1] = self.eos
        return document

    @property
    def n_borders(self) -> int:
        """Number of tokens that ``bound`` adds: 2, or 1 without a BOS."""
        return 1 if self.bos is None else 2

    def save(self, folder: Path) -> None:
        """Write a folder that ``AutoTokenizer.from_pretrained`` loads.

        The folder that the tokenizer was read from is copied unchanged, so its class and its chat template survive.

        Raises:
            OSError: a file cannot be written; ``filename`` says which.
        """
        if self._folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(file for pattern in FILES for file in self._folder.glob(pattern)):
                with replacing(folder / file.name) as copy:
                    copy.write(file.read_bytes())
            return
        bos, eos = self._name(self.bos), self._name(self.eos)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_json(folder / _CONFIG, {**config, "bos_token": bos, "eos_token": eos, "pad_token": eos})
        write_json(folder / "tokenizer.json", json.loads(self._core.to_str()))

    def _name(self, id: int | None) -> str | None:
        return None if id is None else self._core.id_to_token(id)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE in which each of 00 … 99 is one token.

    Words of more than ``_LONGEST_WORD`` bytes are learned from in parts, because the time of training grows with the
    square of a word's length.

    Args:
        texts: to learn merges from.
        vocab_size: entries in all, special tokens included.

    Raises:
        UserError: ``vocab_size`` has no room for the special tokens, the bytes and the pairs of digits.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"data.vocab_size={vocab_size} is below {SMALLEST_VOCABULARY} (bytes, pairs of digits, BOS, EOS); set "
            f"data.vocab_size to {SMALLEST_VOCABULARY} or more"
        )
    core = tokenizers.Tokenizer(models.BPE())
    # Each digit is a word of its own, so training merges no digits and spends its vocabulary on the rest.
    core.pre_tokenizer = pre_tokenizers.Sequence([_groups_of_digits(1), pre_tokenizers.FixedLength(_LONGEST_WORD)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(DIGIT_PAIRS),
        special_tokens=[BOS, EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    core = _with_digit_pairs(core)
    # Other runtimes put BOS before a prompt because the tokenizer's post-processor says so. Our own code encodes
    # without special tokens and adds BOS and EOS itself.
    bos, eos = core.token_to_id(BOS), core.token_to_id(EOS)
    assert bos is not None
    assert eos is not None
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, bos)],
    )
    return Tokenizer(core, bos, eos)


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of about ``_PIECE`` characters that cut no word of the pre-tokenizer."""
    start = 0
    while len(text) - start > _PIECE:
        border = _PIECE_BORDER.search(text, start + _PIECE)
        if border is None:
            break
        yield text[start : border.start()]
        start = border.start()
    yield text[start:]


def _with_digit_pairs(core: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer with 00 … 99 at the end of its vocabulary.

    A pair of digits is a word of its own, so no other merge applies to it, and the rank of its merge does not matter.
    """
    state = json.loads(core.to_str())
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    vocabulary.update({pair: len(vocabulary) + number for number, pair in enumerate(DIGIT_PAIRS)})
    merges.extend([list(pair) for pair in DIGIT_PAIRS])
    grown = tokenizers.Tokenizer.from_str(json.dumps(state))
    grown.pre_tokenizer = _groups_of_digits(2)
    return grown


def _groups_of_digits(most: int) -> pre_tokenizers.PreTokenizer:
    """A pre-tokenizer of byte-level words in which at most so many digits form a word, counted from the left."""
    split = pre_tokenizers.Split(Regex(rf"\d{{1,{most}}}"), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def load(path: str) -> Tokenizer:
    """Read a Hugging Face tokenizer folder, or a bare ``tokenizer.json``.

    Raises:
        UserError: there is no readable tokenizer.json, or no token that ends a document.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        remedy = "set data.tokenizer to a folder or a file with a fast tokenizer"
        raise UserError(f"data.tokenizer={path} has no tokenizer.json; {remedy}")
    if not os.access(file, os.R_OK):
        raise UserError(f"data.tokenizer={file} may not be opened by this user; make it readable")
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(
            f"data.tokenizer={file} is no tokenizer.json ({error}); set data.tokenizer to the file of a fast tokenizer"
        ) from None
    names = _border_names(file.parent)
    bos = _border(core, names.get("bos_token"), () if names else _KNOWN_BOS)
    eos = _border(core, names.get("eos_token"), _KNOWN_EOS)
    if eos is None:
        raise UserError(f"data.tokenizer={path} names no token that ends a document; add eos_token to its {_CONFIG}")
    whole = Path(path).is_dir() and (Path(path) / _CONFIG).is_file()
    return Tokenizer(core, bos, eos, Path(path) if whole else None)


def _border_names(folder: Path) -> dict[str, str | None]:
    """BOS and EOS as a folder names them; empty where it has neither of the two files.

    tokenizer_config.json wins over special_tokens_map.json. A name is a string, or a dict with the string as content.
    """
    config = _json(folder / "special_tokens_map.json") | _json(folder / _CONFIG)
    values = {key: config.get(key) for key in ("bos_token", "eos_token")} if config else {}
    return {key: value.get("content") if isinstance(value, dict) else value for key, value in values.items()}


def _json(file: Path) -> dict[str, Any]:
    """A JSON object of a folder that we did not write; empty where the file is missing.

    Raises:
        UserError: the file is not a JSON object in UTF-8.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(
            f"data.tokenizer: {file} is not valid JSON ({error}); set data.tokenizer to a whole tokenizer folder",
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"data.tokenizer: {file} holds no JSON object; set data.tokenizer to a whole tokenizer folder")
    return config


def _border(core: tokenizers.Tokenizer, name: str | None, known: Sequence[str]) -> int | None:
    """The id of a named token, else of the first known name in the vocabulary; None where there is no such token."""
    found = (core.token_to_id(candidate) for candidate in ([name] if name else known))
    return next((id for id in found if id is not None), None)
