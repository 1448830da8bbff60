"""LongBench: TriviaQA, TREC, LCC and RepoBench-P (Bai et al., 2024, arXiv:2308.14508), from its published files.

Prompts, budgets and scores are those of its code (github.com/THUDM/LongBench, folder LongBench). A prompt that is too
long loses its middle.

Choice: what the benchmark's code does is kept, oddities included, so that figures compare with published ones: nothing
stops the answer but its budget, and the first line counts afterwards. The similarity of code lines is difflib's ratio:
its requirements name fuzzywuzzy alone, which takes difflib where python-Levenshtein is not installed. Cost: an answer
is generated to its last token, as a stop at the first line break would empty an answer that begins with one.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lr2train.evaluation.files import TEXT, TEXTS, FolderTask, Source, fitted
from lr2train.evaluation.request import Answer, Generate, Sample

SOURCE = Source(
    "eval.longbench", "LongBench", "set eval.longbench to the unpacked data.zip of the data set THUDM/LongBench"
)


@dataclass(frozen=True)
class Form:
    """What the benchmark says about a task.

    Attributes:
        file: name of the data set and of its file.
        prompt: ``{context}`` and ``{input}`` stand for fields of a record.
        budget_tokens: most tokens of an answer.
        score: (the scored text of an answer, a right answer, all classes) -> 0 … 1.
        measure: name of the score.
        first_line: whether the score sees the first line alone.
        classes: whether a record lists all classes.
    """

    file: str
    prompt: str
    budget_tokens: int
    score: Callable[[str, str, Sequence[str]], float]
    measure: str
    first_line: bool = False
    classes: bool = False


def f1(prediction: str, truth: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words of two texts without case, punctuation and articles."""
    said, right = _words(prediction), _words(truth)
    same = sum((Counter(said) & Counter(right)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(said), same / len(right)
    return (2 * precision * recall) / (precision + recall)


def _words(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def class_share(prediction: str, truth: str, classes: Sequence[str]) -> float:
    """1 / number of classes that the prediction names, where the right one is among them, else 0.

    A class whose name is part of the right one's does not count. The benchmark removes such classes from the list that
    it walks, so it passes over the class after each removed one. That class counts.
    """
    named = [one for one in classes if one in prediction]
    at = 0
    while at < len(named):
        if named[at] in truth and named[at] != truth:
            del named[at]
        at += 1
    return 1.0 / len(named) if truth in named else 0.0


def line_similarity(prediction: str, truth: str, classes: Sequence[str] = ()) -> float:
    """fuzzywuzzy's ratio, in whole hundredths, of the first line without a backquote, ``#`` or ``//``."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((one for one in lines if not any(mark in one for mark in ("`", "#", "//"))), "")
    if line == truth:
        return 1.0
    if not line or not truth:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, truth).ratio()) / 100


_CODE = "Please complete the code given below. \n{context}%sNext line of code:\n"
FORMS = {
    "longbench_triviaqa": Form(
        "triviaqa",
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        32,
        f1,
        "f1",
        first_line=True,
    ),
    "longbench_trec": Form(
        "trec",
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64,
        class_share,
        "accuracy",
        first_line=True,
        classes=True,
    ),
    "longbench_lcc": Form("lcc", _CODE % "", 64, line_similarity, "edit_similarity"),
    "longbench_repobench-p": Form("repobench-p", _CODE % "{input}", 64, line_similarity, "edit_similarity"),
}
NAMES = tuple(FORMS)


class LongBenchTask(FolderTask):
    """One data set."""

    source = SOURCE

    @property
    def measures(self) -> tuple[str, ...]:
        """The one score."""
        return (FORMS[self.name].measure,)

    def samples(self) -> list[Sample]:
        """One sample a record; ``facts`` has its id, how many tokens were cut, and TREC's classes.

        Raises:
            UserError: the file is missing or has another form, or the length has no room for a prompt.
        """
        form = FORMS[self.name]
        fields = {"input": TEXT, "context": TEXT, "answers": TEXTS} | ({"all_classes": TEXTS} if form.classes else {})
        records = SOURCE.records(self._file(form.file), fields, self.limit)
        return [self._sample(number, record) for number, record in enumerate(records)]

    def grade(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """The best score among the right answers, in percent."""
        form = FORMS[self.name]
        text = answer.text.lstrip("\n").split("\n")[0] if form.first_line else answer.text
        classes = sample.facts.get("classes", ())
        return {form.measure: 100.0 * max(form.score(text, truth, classes) for truth in sample.answers)}

    def _file(self, name: str) -> Path:
        """The file: in the folder, or in the ``data`` that the published archive holds."""
        inner = self.folder / "data" / f"{name}.jsonl"
        return inner if inner.exists() else self.folder / f"{name}.jsonl"

    def _sample(self, number: int, record: dict[str, Any]) -> Sample:
        form = FORMS[self.name]
        text = form.prompt.format(context=record["context"], input=record["input"])
        prompt = fitted(self.tokenizer, text, self.length_tokens, form.budget_tokens, self.name, halves_apart=True)
        facts = {"id": record.get("_id"), "cut_tokens": prompt.cut_tokens}
        if form.classes:
            facts["classes"] = record["all_classes"]
        return Sample(
            self.name, number, Generate(prompt.tokens, form.budget_tokens), tuple(record["answers"]), facts=facts
        )


tasks = LongBenchTask.of_folder
