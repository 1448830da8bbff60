"""Question answering (qa_1: SQuAD, qa_2: HotpotQA): a question with its documents among those of other questions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from lr2train.config import UserError
from lr2train.evaluation.ruler import spec
from lr2train.evaluation.ruler.draft import Prompt, Streams
from lr2train.io import sha256_of

_FRAME = len("\n\n" + spec.QA_DOCUMENT.format(number=1000, text=""))  # characters around a document


@dataclass(frozen=True)
class Question:
    """A question; documents are numbers in the list of all documents.

    Attributes:
        text: as it is asked.
        answers: any of them is right.
        documents: must be in the prompt.
        near: fill the prompt before all others, the article that the answer is from.
    """

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Questions:
    """A file of questions.

    Attributes:
        questions: in the file's order.
        documents: all different documents, sorted.
        fingerprint: of the file.
    """

    questions: tuple[Question, ...]
    documents: tuple[str, ...]
    fingerprint: str

    @cached_property
    def lengths(self) -> list[int]:
        """Characters that each document takes in a prompt."""
        return [len(document) + _FRAME for document in self.documents]


class QuestionGenerator:
    """Draws the samples of a qa task: sample i asks question i of the file."""

    def __init__(self, questions: Questions):
        self._questions = questions
        self.identity: Any = questions.fingerprint

    def most(self) -> int | None:
        """As many as there are questions."""
        return len(self._questions.questions)

    def draft(self, length_tokens: int, number: int, streams: Streams) -> QuestionDraft:
        """The draft of a sample."""
        return QuestionDraft(self._questions, self._questions.questions[number], streams)


class QuestionDraft:
    """One sample. Its size counts characters of further documents.

    Documents of the same article come first, then all others, then all again. A document that is too long for what is
    left of the size is passed over, so that short ones fill the end.
    """

    def __init__(self, of_file: Questions, question: Question, streams: Streams):
        self._file, self._question, self._streams = of_file, question, streams

    @property
    def smallest(self) -> int:
        """No further document."""
        return 0

    def prompt(self, size: int) -> Prompt:
        """The prompt with up to ``size`` characters of further documents."""
        chosen = [*self._question.documents, *self._further(size)]
        order = self._streams("places").permutation(len(chosen)).tolist()
        text = qa_question([self._file.documents[chosen[index]] for index in order], self._question.text)
        own = sorted(order.index(index) for index in range(len(self._question.documents)))
        places = tuple(text.index(f"Document {place + 1}:\n") for place in own)
        facts = {"haystack_units": len(chosen), "depths": [place / len(chosen) for place in own]}
        return Prompt(text, self._question.answers, places, facts)

    def _further(self, size: int) -> Iterator[int]:
        lengths, shortest = self._file.lengths, min(self._file.lengths)
        for turn in count():
            if size < shortest:
                return
            before = size
            for document in self._order if turn == 0 else range(len(lengths)):
                if size < shortest:
                    return
                if lengths[document] <= size:
                    size -= lengths[document]
                    yield document
            if turn and before == size:
                return

    @cached_property
    def _order(self) -> list[int]:
        """All documents but the question's own, in the order in which they are taken."""
        rng, question = self._streams("documents"), self._question
        near = [question.near[index] for index in rng.permutation(len(question.near))]
        known = {*question.documents, *near}
        others = rng.permutation(len(self._file.documents)).tolist()
        return near + [document for document in others if document not in known]


def qa_question(documents: Sequence[str], question: str) -> str:
    """Documents with a question and the beginning of the answer."""
    context = "\n\n".join(spec.QA_DOCUMENT.format(number=number, text=text) for number, text in enumerate(documents, 1))
    return spec.QA_TEXT.format(context=context, query=question)


def read_squad(path: Path) -> Questions:
    """Questions with an answer from SQuAD: its own JSON file, or the .jsonl file of the hub's data set.

    Raises:
        UserError: the file is missing, has another form, or holds no question with an answer.
    """
    return _read(path, "eval.squad", "SQuAD 2.0 (dev-v2.0.json)", _squad)


def read_hotpotqa(path: Path) -> Questions:
    """Questions of HotpotQA: its own JSON file (distractor setting), or the .jsonl file of the hub's data set.

    Raises:
        UserError: the file is missing, has another form, or holds no question.
    """
    return _read(path, "eval.hotpotqa", "HotpotQA (hotpot_dev_distractor_v1.json)", _hotpotqa)


@dataclass(frozen=True)
class _Raw:
    """A question with its documents as text."""

    text: str
    answers: Sequence[str]
    documents: Sequence[str]
    near: Sequence[str] = ()
    others: Sequence[str] = ()


def _read(path: Path, key: str, what: str, parse: Any) -> Questions:
    file = _file_of(path, key, what)
    try:
        raw = [_checked(one) for one in parse(_values(file))]
    except OSError as error:
        raise UserError(f"{key}={path} cannot be read ({error.strerror}); make it a readable file") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{key}={path} does not have the form of {what} ({type(error).__name__}: {error}); "
            f"set {key} to an unchanged copy of that file"
        ) from None
    questions = [one for one in raw if any(answer.strip() for answer in one.answers)]
    if not questions:
        raise UserError(f"{key}={path} holds no question with an answer; set {key} to an unchanged copy of {what}")
    documents = sorted({text for one in raw for text in (*one.documents, *one.near)})
    number = {text: index for index, text in enumerate(documents)}
    return Questions(tuple(_numbered(one, number) for one in questions), tuple(documents), sha256_of(file)[:16])


def _checked(raw: _Raw) -> _Raw:
    """``raw``. Raises TypeError where something else stands for a text."""
    for text in (raw.text, *raw.answers, *raw.documents):
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is no text")
    return raw


def _numbered(raw: _Raw, number: dict[str, int]) -> Question:
    own = tuple(dict.fromkeys(number[text] for text in raw.documents))
    near = tuple(dict.fromkeys(number[text] for text in raw.near if number[text] not in own))
    answers = tuple(dict.fromkeys(answer for answer in raw.answers if answer.strip()))
    return Question(raw.text, answers, own, near)


def _file_of(path: Path, key: str, what: str) -> Path:
    """The file itself, or the only .json or .jsonl file of a folder."""
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
        if len(found) != 1:
            raise UserError(
                f"{key}={path} is a folder with {len(found)} .json or .jsonl files; set {key} to the file of {what}"
            )
        return found[0]
    if not path.is_file():
        raise UserError(f"{key}={path} does not exist; set {key} to the file of {what}")
    return path


def _values(file: Path) -> Any:
    text = file.read_text(encoding="utf-8")
    return (
        [json.loads(line) for line in text.splitlines() if line.strip()]
        if file.suffix == ".jsonl"
        else json.loads(text)
    )


def _squad(values: Any) -> Iterator[_Raw]:
    if isinstance(values, list):
        yield from _squad_rows(values)
        return
    for article in values["data"]:
        contexts = [paragraph["context"] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            own = [paragraph["context"]]
            if not paragraph["qas"]:
                yield _Raw("", (), own, contexts)  # its documents count all the same
            for asked in paragraph["qas"]:
                answers = [] if asked.get("is_impossible", False) else [one["text"] for one in asked["answers"]]
                yield _Raw(asked["question"], answers, own, contexts)


def _squad_rows(rows: list[Any]) -> Iterator[_Raw]:
    articles: dict[str, list[str]] = {}
    for row in rows:
        articles.setdefault(row["title"], []).append(row["context"])
    for row in rows:
        yield _Raw(row["question"], row["answers"]["text"], [row["context"]], articles[row["title"]])


def _hotpotqa(rows: Any) -> Iterator[_Raw]:
    for row in rows:
        context = row["context"]
        parts = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
        documents = [f"{title}\n{''.join(sentences)}" for title, sentences in parts]
        if not documents:
            raise ValueError("a question without documents")
        yield _Raw(row["question"], [row["answer"]], documents)
