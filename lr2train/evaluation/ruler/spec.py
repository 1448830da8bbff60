"""What RULER prescribes: names, parameters, texts and numbers of generated tokens.

Source: NVIDIA's RULER repository, ``scripts/synthetic.yaml`` and ``scripts/data/synthetic/constants.py``, with the
template of base models (the task's text alone, then the beginning of the answer).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Niah:
    """Parameters of a needle task.

    Attributes:
        haystack: "noise" | "essay" | "needle".
        key: kind of the keys, "words" | "uuids".
        value: kind of the values, "numbers" | "uuids".
        keys: needles with different keys.
        values: needles of each key.
        queries: keys that are asked for.
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NIAH = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", value="uuids"),
    "niah_multikey_1": Niah("essay", keys=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", key="uuids", value="uuids"),
    "niah_multivalue": Niah("essay", values=4),
    "niah_multiquery": Niah("essay", keys=4, queries=4),
}
VT, CWE, FWE, SQUAD, HOTPOTQA = "vt", "cwe", "fwe", "qa_1", "qa_2"
NAMES = (*NIAH, VT, CWE, FWE, SQUAD, HOTPOTQA)
"""All tasks, in RULER's order."""
ESSAYS = tuple(name for name, one in NIAH.items() if one.haystack == "essay")
"""Tasks that hide in essays."""

NEW_TOKENS = {**dict.fromkeys(NIAH, 128), VT: 30, CWE: 120, FWE: 50, SQUAD: 32, HOTPOTQA: 32}
"""Task -> tokens that the model may generate."""

FEWER_BELOW = 4096
"""Tokens. Below this length cwe repeats its words less often."""

DEPTHS_PERCENT = tuple(int(depth) for depth in np.round(np.linspace(0, 100, 40)))
"""Depths in essays."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."

NIAH_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text is"
)
NIAH_MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text are"
)

VT_HOPS = 4
VT_NAME_LETTERS, VT_EXAMPLE_NAME_LETTERS = 5, 3
VT_EXAMPLE_TOKENS = 500  # most tokens of the worked example
VT_EXAMPLE_NOISES = 5  # least lines of noise in the worked example
VT_TEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {query}, they are: "
)

CWE_COMMON = 10
CWE_TEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)


@dataclass(frozen=True)
class Repeats:
    """How often cwe shows a word: a common one, an uncommon one; the same in the worked example of so many words."""

    common: int
    uncommon: int
    example_words: int
    example_common: int
    example_uncommon: int


CWE_REPEATS = Repeats(30, 3, 40, 10, 3)
CWE_FEWER_REPEATS = Repeats(6, 1, 20, 3, 1)

FWE_LETTERS = 6
FWE_TOKENS_A_WORD = 50  # length in tokens for each word of the vocabulary
FWE_NOISE = "..."  # stands for the most frequent word
FWE_TEXT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)

QA_DOCUMENT = "Document {number}:\n{text}"
QA_TEXT = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query} Answer:"
)
