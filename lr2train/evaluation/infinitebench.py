"""InfiniteBench: Retrieve.KV and En.MC (Zhang et al., 2024, arXiv:2402.13718), from its published files.

Prompts, budgets and scores are those of its code (github.com/OpenBMB/InfiniteBench, folder src). A prompt that is too
long loses its middle.

Choice: of the prompts for each model, those of YaRN-Mistral are used. The benchmark gives them to its base models, and
they end where the answer begins ("The letter of the correct answer is"). The prompts for GPT-4 and Claude instruct a
chat model, and a base model goes on with more text after them. Cost: figures compare with the YaRN-Mistral and Yi
columns of the benchmark, not with the GPT-4 column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lr2train.evaluation.files import TEXT, TEXT_OR_TEXTS, TEXTS, FolderTask, Source, fitted
from lr2train.evaluation.request import Answer, Generate, Sample

SOURCE = Source(
    "eval.infinitebench",
    "InfiniteBench",
    "set eval.infinitebench to a folder with the files of the data set xinrongzhang2022/InfiniteBench",
)
LETTERS = "ABCD"


def names_value(prediction: str, label: Sequence[str]) -> bool:
    """Whether the value is a word of the prediction; words end at white space and at ``: " ' . , ? ! { }``."""
    return label[0] in _without(prediction, "\n:\"'.,?!{}").split()


def chooses(prediction: str, label: Sequence[str]) -> bool:
    """Whether the prediction chooses the right option; ``label`` is (text, letter).

    The first of these rules that applies decides. The prediction begins with a letter of A … D. It is the label. It has
    "answer is:", "answer:", "answer is" or "option is", looked for in this order: the label has to follow after one
    character. Else its first word that is a part of "ABCD" is the choice.
    """
    text = prediction.strip()
    if not text:
        return False
    if text[0] in LETTERS:
        return text[0] in label
    if text in label:
        return True
    text = _without(text, "\n\"'.,?!{}")
    while "  " in text:
        text = text.replace("  ", " ")
    for prefix in ("answer is:", "answer:", "answer is", "option is"):
        if prefix in text:
            return text[text.index(prefix) + len(prefix) + 1 :].startswith(tuple(label))
    word = next((one for one in text.split() if one in LETTERS), None)
    return word is not None and word in label


def _without(text: str, marks: str) -> str:
    return text.translate(str.maketrans(marks, " " * len(marks)))


@dataclass(frozen=True)
class Form:
    """What the benchmark says about a task.

    Attributes:
        file: name of its file.
        prompt: names in braces stand for fields of a record, ``{A}`` … ``{D}`` for its options.
        budget_tokens: most tokens of an answer.
        right: (answer, label) -> whether it is right.
        options: whether a record has options.
    """

    file: str
    prompt: str
    budget_tokens: int
    right: Callable[[str, Sequence[str]], bool]
    options: bool = False


FORMS = {
    "infinitebench_kv": Form(
        "kv_retrieval.jsonl",
        "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n{input}",
        50,
        names_value,
    ),
    "infinitebench_mc": Form(
        "longbook_choice_eng.jsonl",
        "Read the book and answer the question.\n\n{context}\n\nQuestion: {input}\n"
        "A. {A}\nB. {B}\nC. {C}\nD. {D}\n\nThe letter of the correct answer is",
        40,
        chooses,
        options=True,
    ),
}
NAMES = tuple(FORMS)


class InfiniteBenchTask(FolderTask):
    """One task."""

    source = SOURCE

    @property
    def measures(self) -> tuple[str, ...]:
        """The one score."""
        return ("accuracy",)

    def samples(self) -> list[Sample]:
        """One sample a record; ``facts`` has how many tokens were cut.

        Raises:
            UserError: the file is missing or has another form, or the length has no room for a prompt.
        """
        form = FORMS[self.name]
        fields = {"context": TEXT, "input": TEXT, "answer": TEXT_OR_TEXTS} | (
            {"options": TEXTS} if form.options else {}
        )
        path = self.folder / form.file
        records = SOURCE.records(path, fields, self.limit)
        return [self._sample(path, number, record) for number, record in enumerate(records)]

    def grade(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """100 for a right answer, else 0."""
        return {"accuracy": 100.0 * FORMS[self.name].right(answer.text, sample.answers)}

    def _sample(self, path: Path, number: int, record: dict[str, Any]) -> Sample:
        form = FORMS[self.name]
        options, label = _options(path, number + 1, record) if form.options else ({}, _value(path, number + 1, record))
        text = form.prompt.format(context=record["context"], input=record["input"], **options)
        prompt = fitted(self.tokenizer, text, self.length_tokens, form.budget_tokens, self.name, halves_apart=False)
        request = Generate(prompt.tokens, form.budget_tokens)
        return Sample(self.name, number, request, label, facts={"cut_tokens": prompt.cut_tokens})


def _value(path: Path, number: int, record: dict[str, Any]) -> tuple[str]:
    """The value that is asked for; the record has a text, or a list of one text."""
    answers = [record["answer"]] if isinstance(record["answer"], str) else record["answer"]
    if len(answers) != 1:
        raise SOURCE.refuse(path, number, f"has {len(answers)} answers instead of 1")
    return (answers[0],)


def _options(path: Path, number: int, record: dict[str, Any]) -> tuple[dict[str, str], tuple[str, str]]:
    """({letter: option}, (text of the right one, its letter)); some records name the letter themselves."""
    options, answer = record["options"], record["answer"]
    if len(options) != len(LETTERS):
        raise SOURCE.refuse(path, number, f"has {len(options)} options instead of {len(LETTERS)}")
    given = [answer] if isinstance(answer, str) else answer
    by_letter = dict(zip(LETTERS, options, strict=True))
    if len(given) == 2 and given[1] in by_letter:
        return by_letter, (given[0], given[1])
    if len(given) != 1 or given[0] not in options:
        raise SOURCE.refuse(path, number, "has an answer that is none of its options")
    return by_letter, (given[0], LETTERS[options.index(given[0])])


tasks = InfiniteBenchTask.of_folder
