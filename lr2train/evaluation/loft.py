"""LOFT's text retrieval, the whole corpus in the prompt (Lee et al., 2024, arXiv:2406.13121), from its published files.

A prompt is an instruction, all documents with their numbers, worked examples, and the question. The model lists numbers
of documents, and the first k of them are compared with the right ones. Prompt and score are those of its code
(github.com/google-deepmind/loft); questions are those of the test set.

Choice: LOFT samples a corpus for each of three lengths, so the largest corpus whose length fits is taken and nothing is
cut: a cut corpus may miss the document that is asked for. A prompt that is too long for the model's tokenizer is left
out, with the reason. A prompt ends with the line break that follows each part of it, as sent to a model by LOFT, so a
base model begins the next line. Cost: the lengths are those of LOFT's authors; another tokenizer may need more tokens.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lr2train.config import UserError
from lr2train.evaluation.files import TEXT, FolderTask, Source
from lr2train.evaluation.request import Answer, Generate, Sample

SOURCE = Source(
    "eval.loft",
    "LOFT",
    "set eval.loft to a folder that LOFT's download.sh has filled (preprocess.py completes msmarco and quora)",
)
LENGTHS = {"32k": 32_000, "128k": 128_000, "1m": 1_000_000}
"""Folder -> most tokens of a prompt over its corpus, as LOFT counts."""


@dataclass(frozen=True)
class Form:
    """What the benchmark says about a data set.

    Attributes:
        things: what the corpus lists, in the instruction.
        goal: the end of the instruction.
        question: the question before its text.
        what: what the question's text is.
        lead: the line that the answer follows.
        titles: whether documents have titles, and an answer repeats the title; else it repeats the whole text.
        measure: the score that the paper reports.
    """

    things: str
    goal: str
    question: str
    what: str
    lead: str
    titles: bool
    measure: str = "recall@1"

    @property
    def instruction(self) -> str:
        """Text before the corpus."""
        return (
            f"You will be given a list of {self.things}. You need to read carefully and understand all of them. "
            f"Then you will be given {self.goal}\n"
            "\nYour final answer should be a list of IDs, in the following format:\nFinal Answer: [id1, id2, ...]\n"
            "If there is only one ID, it should be in the format:\nFinal Answer: [id1]\n\n"
            "If there is no perfect answer output the closest one. Do not give an empty final answer.\n\n"
        )

    @property
    def part(self) -> str:
        """What an answer prints of a document beside its number."""
        return "TITLE" if self.titles else "CONTENT"

    @property
    def budget_tokens(self) -> int:
        """Most tokens of an answer: room for several titles, or for a long document."""
        return 256 if self.titles else 1024

    def document(self, number: str, title: str, text: str) -> str:
        """A document of the corpus."""
        head = f"TITLE: {title} | " if self.titles else ""
        return f"ID: {number} | {head}CONTENT: {text} | END ID: {number}\n"

    def ask(self, query: str) -> str:
        """A question."""
        return (
            f"{self.question} Then format the IDs into a list.\n"
            "If there is no perfect answer output the closest one. Do not give an empty final answer.\n"
            f"{self.what}: {query}\n{self.lead}\n"
        )

    def cite(self, number: str, title: str, text: str) -> str:
        """A right document in a worked example."""
        return f"{self.part}: {title if self.titles else text} | ID: {number}\n"


_HELP = "and your goal is to find all documents from the list that can help answer the query."
_SCIFACT = Form(
    "passages",
    "a claim, and your goal is to find all passages from the list that can help verify the claim as true of false. "
    "Print out the ID and TITLE of each passage.",
    "Which passage is most relevant to the claim, and can help verify the claim as true or false? "
    "Print out the TITLE and ID of the document.",
    "claim",
    "The following passages can help verify this sentence:",
    titles=True,
)
FORMS = {
    "loft_arguana": Form(
        "statements",
        "a claim, and your goal is to find all statements from the list that can counterargue the claim.",
        "Given a claim, which statements provide a counterargument? Print out the CONTENT and ID of each statement.",
        "claim",
        "The following statements can counterargue the claim:",
        titles=False,
    ),
    "loft_fever": _SCIFACT,
    "loft_hotpotqa": Form(
        "documents",
        "a query that may require you to use 1 or more documents to find the answer. Your goal is to find all "
        "documents from the list that can help answer the query. Print out the ID and TITLE of each document.",
        "Which documents can help answer the query? Print out the TITLE and ID of each document.",
        "query",
        "The following documents can help answer the query:",
        titles=True,
        measure="mrecall@2",
    ),
    "loft_msmarco": Form(
        "documents",
        f"a query, {_HELP} Print out the ID and CONTENT of each document.",
        "Which document is most relevant to answering the query? Print out the CONTENT and ID of the document.",
        "query",
        "The following documents can answer the query:",
        titles=False,
    ),
    "loft_nq": Form(
        "documents",
        f"a query, {_HELP} Print out the ID and TITLE of each document.",
        "Which document is most relevant to answer the query? Print out the TITLE and ID of the document.",
        "query",
        "The following documents can help answer the query:",
        titles=True,
    ),
    "loft_quora": Form(
        "questions",
        "a new question, and your goal is to find all questions from the list that are near duplicates of the new "
        "question. Print out the ID and CONTENT of each question.",
        "Given the following query, which existing question is most similar to it? "
        "Print out the CONTENT and ID of the question.",
        "query",
        "The following existing questions are most similar to the given query:",
        titles=False,
    ),
    "loft_scifact": _SCIFACT,
}
NAMES = tuple(FORMS)
_RECALLS = (*(f"{kind}@{k}" for kind in ("recall", "mrecall") for k in (1, 2, 3, 5)), "capped_recall@1")

# What an answer is followed by where a base model goes on with one more example; its answer is none to the question.
_STOPS = ("====== Example", "====== Now let's start!")
_REMOVED = "childhood abuse"  # LOFT removes these words from its corpora


def listed_ids(text: str) -> list[str]:
    """The numbers in the first line with brackets, as texts; empty where its brackets hold no Python list.

    As LOFT reads an answer: ``*`` and backquotes are removed, an apostrophe between letters is taken as text, and an
    item need not be a number.
    """
    lines = text.replace("*", "").replace("`", "").strip().split("\n")
    line = next((one for one in lines if "[" in one and "]" in one), "")
    listed = re.sub(r"([a-zA-Z0-9])'([a-zA-Z0-9])", r"\1\'\2", line[line.find("[") : line.rfind("]") + 1])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            return [str(one) for one in ast.literal_eval(listed)]
    except Exception:  # whatever a parser raises on text of a model, memory and recursion among it
        return []


def recalls(right: Sequence[str], said: Sequence[str]) -> dict[str, float]:
    """LOFT's scores of a list of documents, 0 … 1, over the first k of the list.

    Recall@k is the share of the right documents that are listed. mRecall@k (Min et al., 2021) is 1 where all of the
    first k are right or all right documents are listed. The capped recall@1 is 1 where the first one is right.
    """
    found = {k: float(len(set(said[:k]).intersection(right))) for k in (1, 2, 3, 5)}
    shares = {f"recall@{k}": hits / len(right) for k, hits in found.items()}
    wholes = {f"mrecall@{k}": float(bool(said) and hits == min(k, len(right))) for k, hits in found.items()}
    return shares | wholes | {"capped_recall@1": found[1] / min(1, len(right))}


@dataclass(frozen=True)
class Document:
    """A document of a corpus; ``number`` is its place, as text."""

    number: str
    title: str
    text: str


@dataclass(frozen=True)
class Query:
    """A question: the documents that answer it, in the order of its answers, and those that a worked example cites."""

    qid: str
    text: str
    answers: tuple[str, ...]
    cited: tuple[str, ...]


class LoftTask(FolderTask):
    """One data set."""

    source = SOURCE

    @property
    def measures(self) -> tuple[str, ...]:
        """The paper's score, then all others of LOFT."""
        first = FORMS[self.name].measure
        return (first, *(one for one in _RECALLS if one != first))

    def samples(self) -> list[Sample]:
        """One sample a question, left out where it does not fit; the answers are numbers of documents.

        ``facts`` has the question's id, the corpus ("32k", "128k", "1m") and how many documents it has.

        Raises:
            UserError: no corpus is short enough, or a file is missing or has another form.
        """
        form, corpus = FORMS[self.name], self.corpus()
        documents = self._documents(corpus)
        queries = self._queries(corpus / "test_queries.jsonl", documents, self.limit)
        examples = self._queries(corpus / "few_shot_queries.jsonl", documents)
        before = _context(form, documents, examples)
        samples = []
        for number, query in enumerate(queries.values()):
            tokens = self.tokenizer.encode(f"{before}====== Now let's start! ======\n{form.ask(query.text)}")
            request = Generate(tokens, form.budget_tokens, _STOPS)
            too_long = self._too_long(request) if request.total_tokens > self.length_tokens else None
            right = tuple(documents[pid].number for pid in query.answers)
            facts = {"qid": query.qid, "corpus": corpus.name, "documents": len(documents)}
            samples.append(Sample(self.name, number, request, right, facts=facts, left_out=too_long))
        return samples

    def grade(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """Recalls of the listed documents, in percent; a number without a document makes the whole list void."""
        said = listed_ids(answer.text)
        known = {str(number) for number in range(sample.facts["documents"])}
        found = recalls(sample.answers, said if known.issuperset(said) else [])
        return {name: 100.0 * value for name, value in found.items()}

    def has_room(self) -> bool:
        """Whether the length has room for a corpus.

        Raises:
            UserError: the folder has no corpus at all.
        """
        return any(LENGTHS[one.name] <= self.length_tokens for one in self._corpora())

    def corpus(self) -> Path:
        """The folder of the largest corpus whose length fits.

        Raises:
            UserError: there is none.
        """
        there = self._corpora()
        fitting = [one for one in there if LENGTHS[one.name] <= self.length_tokens]
        if not fitting:
            shortest = LENGTHS[there[0].name]
            raise UserError(
                f"the shortest corpus of {self.name} is made for {shortest} tokens, and the length is "
                f"{self.length_tokens}; set eval.lengths_tokens to at least {shortest} if the model's window is that "
                f"long, else leave {self.name} out of eval.tasks"
            )
        return fitting[-1]

    def _corpora(self) -> list[Path]:
        """The folders of all corpora that are there, by length."""
        short = self.name.removeprefix("loft_")
        places = [self.folder / inner / short for inner in ("", "retrieval", "data/retrieval")]
        place = next((one for one in places if one.is_dir()), None)
        if place is None:
            raise UserError(f"{self.folder} has no folder {short} ({SOURCE.key}); {SOURCE.get}")
        there = [place / length for length in LENGTHS if (place / length).is_dir()]
        if not there:
            raise UserError(f"{place} has no folder 32k, 128k or 1m ({SOURCE.key}); {SOURCE.get}")
        return there

    def _too_long(self, request: Generate) -> str:
        return (
            f"prompt and answer need {request.total_tokens} tokens ({len(request.tokens)} and "
            f"{request.max_new_tokens}) and have {self.length_tokens}"
        )

    def _documents(self, corpus: Path) -> dict[str, Document]:
        """Document id -> document, in the order of the corpus; of two with the same id the later one stays."""
        records = SOURCE.records(corpus / "corpus.jsonl", {"pid": TEXT, "title_text": TEXT, "passage_text": TEXT})
        by_id = {one["pid"]: one for one in records}
        return {
            pid: Document(str(number), _clean(one["title_text"]) or "None", _clean(one["passage_text"]))
            for number, (pid, one) in enumerate(by_id.items())
        }

    def _queries(self, path: Path, documents: Mapping[str, Document], limit: int | None = None) -> dict[str, Query]:
        records = SOURCE.records(path, {"qid": TEXT, "query_text": TEXT}, limit)
        judged = "qrels" in _metadata(records[0])
        return {one["qid"]: _query(path, number, one, judged, documents) for number, one in enumerate(records, 1)}


def _clean(text: str) -> str:
    return text.strip().replace(_REMOVED, "")


def _query(path: Path, number: int, record: dict[str, Any], judged: bool, documents: Mapping[str, Document]) -> Query:
    """``judged``: a worked example cites the documents of ``metadata.qrels``, else those of ``answers``."""
    text = record["query_text"].strip()
    if not text:
        raise SOURCE.refuse(path, number, "has an empty query_text")
    right = _ids(path, number, "answers", record.get("answers"), documents)
    cited = _ids(path, number, "metadata.qrels", _metadata(record).get("qrels"), documents) if judged else right
    return Query(record["qid"], text, right, cited)


def _metadata(record: dict[str, Any]) -> dict[str, Any]:
    found = record.get("metadata")
    return found if isinstance(found, dict) else {}


def _ids(path: Path, number: int, name: str, pairs: Any, documents: Mapping[str, Document]) -> tuple[str, ...]:
    """The document ids of a list of [document id, number]."""
    if not isinstance(pairs, list) or not pairs or not all(map(_is_judgement, pairs)):
        raise SOURCE.refuse(path, number, f"has no {name} that is a list of [document id, number]")
    if unknown := [pair[0] for pair in pairs if pair[0] not in documents]:
        raise SOURCE.refuse(path, number, f"names the document {unknown[0]}, which corpus.jsonl does not have")
    return tuple(pair[0] for pair in pairs)


def _is_judgement(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], int | float)


def _context(form: Form, documents: Mapping[str, Document], examples: Mapping[str, Query]) -> str:
    """Text before the question."""
    parts = [form.instruction]
    parts += [form.document(one.number, one.title, one.text) for one in documents.values()]
    for number, example in enumerate(examples.values(), 1):
        cited = [documents[pid] for pid in example.cited]
        final = [documents[pid].number for pid in example.answers]
        parts.append(f"====== Example {number} ======\n{form.ask(example.text)}")
        parts += [form.cite(one.number, one.title, one.text) for one in cited]
        parts.append(f"Final Answer: {final}\n")
    return "".join(parts)


tasks = LoftTask.of_folder
