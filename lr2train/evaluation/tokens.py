"""Text to tokens and back, as a benchmark needs it: with the special tokens that the model's tokenizer puts itself."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.model import load


class PromptTokenizer:
    """The tokenizer of a model folder.

    Attributes:
        hf: the tokenizer of transformers.
        fingerprint: of the tokenizer: the same for two tokenizers that give the same ids.
    """

    def __init__(self, hf: Any):
        self.hf = hf
        hf.model_max_length = sys.maxsize  # haystacks are cut to length after they are tokenised: no warning
        self.fingerprint = hashlib.sha256(hf.backend_tokenizer.to_str().encode()).hexdigest()[:16]

    @classmethod
    def of(cls, folder: str | Path) -> PromptTokenizer:
        """The tokenizer of a folder. Raises UserError where there is none."""
        return cls(load.load_tokenizer(folder))

    def encode(self, text: str) -> np.ndarray:
        """int64 [T]: the ids of a prompt, with BOS where the tokenizer puts one; never twice."""
        ids = self.hf(text)["input_ids"]
        bos = self.hf.bos_token_id
        return np.asarray(ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids, dtype=np.int64)

    def encode_plain(self, text: str) -> np.ndarray:
        """int64 [T]: the ids of a text without special tokens."""
        return np.asarray(self.hf(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

    def count(self, text: str) -> int:
        """Tokens of a prompt."""
        return len(self.encode(text))

    def decode(self, ids: Any) -> str:
        """The text of ids, without special tokens."""
        return self.hf.decode(ids, skip_special_tokens=True)
