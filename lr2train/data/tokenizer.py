"""Text to token ids and back: a byte-level BPE that we train, or one that came with a model.

Choice: digits are grouped in pairs from the left and all of 00 … 99 are tokens, so a hidden number costs few tokens and never merges with
what stands around it. Cost: 100 entries of the vocabulary. Ids are plain numpy; BOS and EOS are added by whoever stores documents, never by
the tokenizer.
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
_LONGEST_WORD = 512  # bytes; longer are runs without a border between words, of which the parts tell as much
_PIECE = 1 << 16  # characters of a text that training takes at a time
_BORDER = re.compile(r"(?<=[!-~])(?=[ \n])")
_CONFIG = "tokenizer_config.json"
DIGIT_PAIRS = tuple(f"{number:02d}" for number in range(100))
SMALLEST_VOCABULARY = 2 + 256 + len(DIGIT_PAIRS)  # specials, bytes, pairs

# What makes up a Hugging Face tokenizer folder, where it has them.
FILES = ("tokenizer.json", _CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "*.model")

# A bare tokenizer.json does not say which special token begins or ends a document; these are the names in use.
_KNOWN_BOS = (BOS, "<bos>", "<|begin_of_text|>", "<|startoftext|>")
_KNOWN_EOS = (EOS, "<eos>", "<|end_of_text|>", "<|endoftext|>")


class Tokenizer:
    """A fast tokenizer with its document borders.

    Attributes:
        bos: id that begins a document, None where the model has none (Qwen).
        eos: id that ends a document.

    Args:
        folder: the Hugging Face folder that it was read from, if any; ``save`` copies it.
    """

    def __init__(self, core: tokenizers.Tokenizer, bos: int | None, eos: int, folder: Path | None = None) -> None:
        core.no_truncation()
        core.no_padding()
        self._core, self.bos, self.eos, self._folder = core, bos, eos, folder

    @property
    def vocab_size(self) -> int:
        """Entries, added tokens included."""
        return self._core.get_vocab_size(with_added_tokens=True)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of added tokens and document borders: never part of ordinary text."""
        borders = {id for id in (self.bos, self.eos) if id is not None}
        return tuple(sorted(borders | set(self._core.get_added_tokens_decoder())))

    @property
    def added_tokens(self) -> list[str]:
        """Tokens that are found in a text before it is cut into words, special ones among them."""
        return [token.content for token in self._core.get_added_tokens_decoder().values()]

    def to_json(self) -> str:
        """The whole of tokenizer.json."""
        return self._core.to_str()

    @property
    def fingerprint(self) -> str:
        """Of the vocabulary, its rules and the borders."""
        return hashlib.sha256(f"{self._core.to_str()} {self.bos} {self.eos}".encode()).hexdigest()[:16]

    def same_ids(self, other: Tokenizer) -> bool:
        """Whether both give every token the same id."""
        return self._core.get_vocab() == other._core.get_vocab()

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int64, without BOS or EOS."""
        return np.array(self._core.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts on all cores, without BOS or EOS."""
        return [encoding.ids for encoding in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens included."""
        return self._core.decode([int(id) for id in ids], skip_special_tokens=False)

    def bound(self, ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """A document as it is stored: BOS ids EOS (no BOS where the model has none), int64."""
        whole = np.empty(len(ids) + self.n_borders, np.int64)
        whole[0] = self.eos if self.bos is None else self.bos
        whole[self.n_borders - 1 : -1] = ids
        whole[-1] = self.eos
        return whole

    @property
    def n_borders(self) -> int:
        """Tokens that ``bound`` adds."""
        return 1 if self.bos is None else 2

    def save(self, folder: Path) -> None:
        """Write a folder that ``AutoTokenizer.from_pretrained`` loads: the one it came from as it was, so that class and chat template survive."""
        if self._folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(file for pattern in FILES for file in self._folder.glob(pattern)):
                with replacing(folder / file.name) as copy:
                    copy.write(file.read_bytes())
            return
        named = {"bos_token": self._name(self.bos), "eos_token": self._name(self.eos), "pad_token": self._name(self.eos)}
        write_json(folder / _CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named})
        write_json(folder / "tokenizer.json", json.loads(self._core.to_str()))

    def _name(self, id: int | None) -> str | None:
        return None if id is None else self._core.id_to_token(id)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE in which every string 00 … 99 is one token.

    Words of more than ``_LONGEST_WORD`` characters are learned from in parts: the time of training grows with the square of a word's length.

    Args:
        texts: what to learn merges from.
        vocab_size: entries in all, special tokens included.

    Raises:
        UserError: the vocabulary has no room for bytes and digit pairs.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"data.vocab_size={vocab_size} is below {SMALLEST_VOCABULARY} (bytes, digit pairs, BOS, EOS); set data.vocab_size to "
            f"{SMALLEST_VOCABULARY} or more"
        )
    core = tokenizers.Tokenizer(models.BPE())
    # One digit a word: then training merges none, and has the rest of the vocabulary for itself.
    core.pre_tokenizer = pre_tokenizers.Sequence([_groups_of_digits(1), pre_tokenizers.FixedLength(_LONGEST_WORD)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(DIGIT_PAIRS), special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    core = _with_digit_pairs(core)
    # Other people's runtimes put BOS before a prompt because the tokenizer says so; our own code asks for none and adds its borders itself.
    bos, eos = core.token_to_id(BOS), core.token_to_id(EOS)
    assert bos is not None
    assert eos is not None
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)])
    return Tokenizer(core, bos, eos)


def _pieces(text: str) -> Iterator[str]:
    """A text cut where no word, as the pre-tokenizer has them, stands: before the white space that follows a visible character."""
    start = 0
    while len(text) - start > _PIECE:
        border = _BORDER.search(text, start + _PIECE)
        if border is None:
            break
        yield text[start : border.start()]
        start = border.start()
    yield text[start:]


def _with_digit_pairs(core: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer with 00 … 99 at the end of its vocabulary; two digits alone meet no other merge, so the rank of theirs is free."""
    state = json.loads(core.to_str())
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    vocabulary.update({pair: len(vocabulary) + number for number, pair in enumerate(DIGIT_PAIRS)})
    merges.extend([list(pair) for pair in DIGIT_PAIRS])
    grown = tokenizers.Tokenizer.from_str(json.dumps(state))
    grown.pre_tokenizer = _groups_of_digits(2)
    return grown


def _groups_of_digits(most: int) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(rf"\d{{1,{most}}}"), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def load(path: str) -> Tokenizer:
    """Read a Hugging Face tokenizer folder, or a bare ``tokenizer.json``.

    Raises:
        UserError: nothing readable there, or no token that ends a document.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"data.tokenizer={path} has no tokenizer.json; set data.tokenizer to a folder or a file with a fast tokenizer")
    if not os.access(file, os.R_OK):
        raise UserError(f"data.tokenizer={file} may not be opened by this user; make it readable")
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"data.tokenizer={file} is no tokenizer.json ({error}); set data.tokenizer to a fast tokenizer's file") from None
    names = _border_names(file.parent)
    bos = _border(core, names.get("bos_token"), () if names else _KNOWN_BOS)
    eos = _border(core, names.get("eos_token"), _KNOWN_EOS)
    if eos is None:
        raise UserError(f"data.tokenizer={path} names no token that ends a document; add eos_token to its tokenizer_config.json")
    whole = Path(path).is_dir() and (Path(path) / _CONFIG).is_file()
    return Tokenizer(core, bos, eos, Path(path) if whole else None)


def _border_names(folder: Path) -> dict[str, str | None]:
    """What a folder says of BOS and EOS, a string or a dict with its content; tokenizer_config.json over special_tokens_map.json."""
    config = _json(folder / "special_tokens_map.json") | _json(folder / _CONFIG)
    values = {key: config.get(key) for key in ("bos_token", "eos_token")} if config else {}
    return {key: value.get("content") if isinstance(value, dict) else value for key, value in values.items()}


def _json(file: Path) -> dict[str, Any]:
    """A file of somebody else's folder; empty where there is none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"data.tokenizer: {file} is not valid JSON ({error}); set data.tokenizer to a whole tokenizer folder") from None
    if not isinstance(config, dict):
        raise UserError(f"data.tokenizer: {file} holds no JSON object; set data.tokenizer to a whole tokenizer folder")
    return config


def _border(core: tokenizers.Tokenizer, name: str | None, known: Sequence[str]) -> int | None:
    found = (core.token_to_id(candidate) for candidate in ([name] if name else known))
    return next((id for id in found if id is not None), None)
