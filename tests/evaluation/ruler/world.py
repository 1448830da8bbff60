"""What the tests of RULER share: tokenizers of four kinds, made here, and small files of questions."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lr2train.data import tokenizer as ours
from lr2train.evaluation import ruler
from lr2train.evaluation.ruler import spec
from lr2train.evaluation.ruler.essays import Essays
from lr2train.evaluation.tokens import PromptTokenizer

KINDS = ("demo", "bytes", "unigram", "wordpiece")


@cache
def essay(n_words: int = 4000, seed: int = 1) -> str:
    """Sentences of invented words."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("aeioudlmnrstk"), rng.integers(2, 9))) for _ in range(700)]
    sentences, left = [], n_words
    while left > 0:
        n = min(left, int(rng.integers(4, 22)))
        sentences.append(" ".join(rng.choice(words, n)).capitalize() + str(rng.choice([".", ".", "?", "!"])))
        left -= n
    return " ".join(sentences)


def training_text() -> list[str]:
    prompts = [spec.NIAH_ONE, spec.VT_TEXT, spec.CWE_TEXT, spec.FWE_TEXT, spec.QA_TEXT, spec.NOISE, spec.NEEDLE]
    return [essay(), *prompts * 8, " ".join(str(number) for number in range(0, 3000, 7))]


@cache
def tokenizer(kind: str) -> PromptTokenizer:
    """ "demo": byte-level BPE of a corpus; "bytes": GPT-2's words; "unigram": SentencePiece's form; "wordpiece"."""
    if kind == "demo":
        core = ours.train(training_text(), 500)._core
        return PromptTokenizer(PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>"))
    special = ["<s>", "</s>", "<unk>"]
    if kind == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "unigram":
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        letters = [chr(code) for code in range(33, 127)] + ["\n"]
        trainer = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=special, unk_token="<unk>", initial_alphabet=letters, show_progress=False
        )
    else:
        core = Tokenizer(models.WordPiece(unk_token="<unk>"))
        core.normalizer = normalizers.Lowercase()
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordPieceTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    core.train_from_iterator(training_text(), trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PromptTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    )


def paragraphs(n: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    source = Essays(essay())
    sentences = source.sentences(len(source))
    return [
        f"Number {seed}-{i}. " + " ".join(rng.choice(sentences, int(rng.integers(1, 6)), replace=False))
        for i in range(n)
    ]


def squad_articles() -> list[dict]:
    """Articles of SQuAD 2.0; every other question has no answer, and answers repeat."""
    articles = []
    for a in range(6):
        parts = []
        for context in paragraphs(5, 100 + a):
            first, second = context.split()[2:4]
            right = [{"text": f"{first} {second}"}, {"text": first}, {"text": first}]
            parts.append({
                "context": context,
                "qas": [
                    {"question": f"What follows {context.split('.')[0]}?", "is_impossible": False, "answers": right},
                    {"question": "What is not there?", "is_impossible": True, "answers": []},
                ],
            })  # fmt: skip
        articles.append({"title": f"Article {a}", "paragraphs": parts})
    return articles


def hotpotqa_rows() -> list[dict]:
    texts = paragraphs(60, 7)
    rng = np.random.default_rng(7)
    rows = []
    for number in range(12):
        own = rng.choice(len(texts), 4, replace=False).tolist()
        context = [[f"Title {i}", [sentence + ". " for sentence in texts[i].split(". ")]] for i in own]
        rows.append({"question": f"Question {number}?", "answer": texts[own[0]].split()[2], "context": context})
    return rows


def write_questions(folder: Path) -> tuple[Path, Path]:
    """The files of SQuAD and HotpotQA."""
    squad, hotpotqa = folder / "squad.json", folder / "hotpot.json"
    squad.write_text(json.dumps({"version": "v2.0", "data": squad_articles()}))
    hotpotqa.write_text(json.dumps(hotpotqa_rows()))
    return squad, hotpotqa


def build(home: Path, kind: str = "bytes", names=ruler.NAMES, lengths=(4096,), count=2, **more) -> list:
    """The tasks over this world."""
    squad, hotpotqa = write_questions(home)
    more = {"seed": 3, "essays": essay(), "squad": squad, "hotpotqa": hotpotqa, "say": lambda _: None, **more}
    return ruler.tasks(names, lengths, count, tokenizer(kind), **more)


def solve(name: str, text: str) -> list[str]:
    """The answers, read out of a prompt by a program that knows what the question means."""
    if name.startswith("niah"):
        query = re.search(r"What (?:is|are all) the special magic \w+ for (.*?) mentioned in", text)
        assert query
        keys = re.split(r", and |, ", query[1])
        pairs = re.findall(r"One of the special magic \w+ for (.+?) is: (\S+)\.", text)
        return [value for key in keys for known, value in pairs if known == key]
    if name == spec.VT:
        text = text[text.rindex("Memorize and track") :]
        asked = re.search(r"assigned the value (\d+) in the text above", text)
        assert asked
        value, chosen = asked[1], []
        for left, right in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)", text, re.M):
            if right == value or right in chosen:
                chosen.append(left)
        return chosen
    if name == spec.CWE:
        listed = text[text.rindex("Below is a numbered list") :].split("\n")[1]
        entries = Counter(re.split(r"(?:^| )\d+\. ", listed)[1:])
        return [word for word, _ in entries.most_common(10)]
    if name == spec.FWE:
        coded = text.split("frequently appeared coded words. ")[1].split("\nQuestion: ")[0]
        return [word for word, _ in Counter(coded.split()).most_common() if word != "..."][:3]
    raise AssertionError(name)
