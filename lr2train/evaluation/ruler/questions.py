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
from lr2train.io import fingerprint, sha256_of

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


@dataclass(frozen=True)
class _Source:
    """Where the questions of a task come from.

    Attributes:
        key: of the config.
        what: the benchmark's own file.
        hub_id: the same questions on the hub.
        hub_config: of the hub's data set.
    """

    key: str
    what: str
    hub_id: str
    hub_config: str | None = None


_SQUAD = _Source("eval.squad", "SQuAD 2.0 (dev-v2.0.json)", "rajpurkar/squad_v2")
_HOTPOTQA = _Source("eval.hotpotqa", "HotpotQA (hotpot_dev_distractor_v1.json)", "hotpotqa/hotpot_qa", "distractor")


def read_squad(path: str | Path, allow_download: bool = False) -> Questions:
    """Questions with an answer from SQuAD.

    Args:
        path: its own JSON file; a .jsonl file or a folder of the hub's data set; or the id of that data set.
        allow_download: whether a data set of the hub may be fetched.

    Raises:
        UserError: the file is missing, has another form, or holds no question with an answer.
    """
    return _read(path, _SQUAD, _squad, allow_download)


def read_hotpotqa(path: str | Path, allow_download: bool = False) -> Questions:
    """Questions of HotpotQA (distractor setting). Arguments and errors as in ``read_squad``."""
    return _read(path, _HOTPOTQA, _hotpotqa, allow_download)


@dataclass(frozen=True)
class _Raw:
    """A question with its documents as text."""

    text: str
    answers: Sequence[str]
    documents: Sequence[str]
    near: Sequence[str] = ()
    others: Sequence[str] = ()


def _read(path: str | Path, source: _Source, parse: Any, allow_download: bool) -> Questions:
    key, what = source.key, source.what
    try:
        values, identity = _values(path, source, allow_download)
        raw = [_checked(one) for one in parse(values)]
    except OSError as error:
        raise UserError(f"{key}={path} cannot be read ({error.strerror}); make it a readable file") from None
    except UserError:
        raise
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
    return Questions(tuple(_numbered(one, number) for one in questions), tuple(documents), identity)


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


def _values(path: str | Path, source: _Source, allow_download: bool) -> tuple[Any, str]:
    """The contents of a file, or the rows of a data set of the hub, and a fingerprint of them."""
    file = Path(path)
    if file.is_dir():
        files = sorted(one for one in file.iterdir() if one.suffix in (".json", ".jsonl"))
        if len(files) != 1:
            return _rows(path, source, allow_download=True)  # a local copy
        file = files[0]
    if not file.exists():
        return _rows(path, source, allow_download)
    text = file.read_text(encoding="utf-8")
    lines = file.suffix == ".jsonl"
    values = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
    return values, sha256_of(file)[:16]


def _rows(path: str | Path, source: _Source, allow_download: bool) -> tuple[list[dict[str, Any]], str]:
    """The rows of a data set in the hub's form: a folder of such a data set, or an id.

    Raises:
        UserError: the path is neither, the download is not allowed or fails, or the data set cannot be read.
    """
    import datasets  # here: it takes a second to import

    local = Path(path).is_dir()
    if not local and str(path).count("/") != 1:
        raise UserError(
            f"{source.key}={path} does not exist; set {source.key} to the file of {source.what}, or to {source.hub_id} "
            "with model.allow_download=true"
        )
    if not local and not allow_download:
        raise UserError(f"{source.key}={path} would be downloaded; set model.allow_download=true, or a local file")
    config = None if local else source.hub_config
    try:
        rows = list(datasets.load_dataset(str(path), config, split="validation"))
    except Exception as error:  # datasets raises a dozen kinds; each means the same to the user
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source.key}={path} cannot be read as a data set ({type(error).__name__}: {reason}); set {source.key} to "
            f"the file of {source.what}"
        ) from None
    return rows, fingerprint(rows)  # type: ignore[arg-type, return-value]


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
