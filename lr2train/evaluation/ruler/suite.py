"""All RULER tasks over one tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from lr2train import progress
from lr2train.config import UserError
from lr2train.evaluation.ruler import spec
from lr2train.evaluation.ruler.draft import Generator
from lr2train.evaluation.ruler.essays import Essays
from lr2train.evaluation.ruler.frequencies import CommonGenerator, FrequentGenerator
from lr2train.evaluation.ruler.niah import NiahGenerator
from lr2train.evaluation.ruler.questions import QuestionGenerator, Questions, read_hotpotqa, read_squad
from lr2train.evaluation.ruler.task import RulerTask
from lr2train.evaluation.ruler.variables import VariableGenerator
from lr2train.evaluation.tokens import PromptTokenizer

_KEYS = {spec.SQUAD: "eval.squad", spec.HOTPOTQA: "eval.hotpotqa"}


def _tell(message: str) -> None:
    progress.say("evaluate", message)


def tasks(
    names: Sequence[str],
    lengths: Sequence[int],
    count: int,
    tokenizer: PromptTokenizer,
    seed: int,
    essays: str | Path | None = None,
    squad: str | Path | None = None,
    hotpotqa: str | Path | None = None,
    folder: Path | None = None,
    leave_out: bool = False,
    allow_download: bool = False,
    say: Callable[[str], None] = _tell,
) -> list[RulerTask]:
    """The tasks, in RULER's order, whatever the order of ``names``.

    Args:
        names: of ``spec.NAMES``.
        lengths: tokens of a prompt and what is generated, together.
        count: samples of each task and length.
        tokenizer: of the model.
        seed: of the samples.
        essays: text to hide needles in: a ``Path`` is a folder of .txt files, a ``str`` the text itself.
        squad: SQuAD's file, or the id of the data set on the hub; None leaves qa_1 out.
        hotpotqa: the same of HotpotQA; None leaves qa_2 out.
        folder: cache of made samples; None: none are kept.
        leave_out: whether a length that has no room for a task is left out of that task with a message; if not, it is
            refused.
        allow_download: whether a data set of the hub may be fetched.
        say: gets each message.

    Raises:
        UserError: a name is unknown, a file is unusable, every task lacks its file, there is no text to hide needles
            in, or a length has no room.
    """
    files = {spec.SQUAD: squad, spec.HOTPOTQA: hotpotqa}
    absent = [name for name in names if name in files and files[name] is None]
    _refuse_names(names, absent, essays)
    if any(name in spec.ESSAYS for name in names):
        say("RULER's scores are comparable with NVIDIA's only where eval.essays has Paul Graham's essays, as theirs")
    source = cache(lambda: Essays.of(essays) if essays is not None else None)
    made = []
    for name in spec.NAMES:
        if name not in names:
            continue
        if name in absent:
            say(f"{name} is left out of RULER, whose average is then over fewer tasks: {_KEYS[name]} is null")
            continue
        generator = _generator(
            name, tokenizer, source, partial(_questions, name, files.get(name) or "", allow_download)
        )
        task = RulerTask(name, tuple(dict.fromkeys(lengths)), count, tokenizer, seed, generator, folder)
        if task.n_samples < count:
            say(f"{name} has {task.n_samples} questions, not {count}: {_KEYS[name]} has no more")
        made.append(_with_room(task, leave_out, say))
    return [task for task in made if task.lengths]


def _refuse_names(names: Sequence[str], absent: Sequence[str], essays: str | Path | None) -> None:
    """Raises UserError for a name that is unknown, and where the tasks lack their files or their text."""
    unknown = [name for name in names if name not in spec.NAMES]
    if unknown:
        raise UserError(
            f"eval.tasks names {unknown[0]}, which is no task of RULER ({', '.join(spec.NAMES)}); remove it"
        )
    if essays is None and any(name in spec.ESSAYS for name in names):
        raise UserError("RULER has no text to hide needles in; set eval.essays to a folder of .txt files")
    if absent and len(absent) == len(names):
        raise UserError(f"eval.tasks names {absent[0]}, and {_KEYS[absent[0]]} is null; set {_KEYS[absent[0]]}")


def _generator(
    name: str,
    tokenizer: PromptTokenizer,
    essays: Callable[[], Essays | None],
    questions: Callable[[], Questions],
) -> Generator:
    if name in spec.NIAH:
        return NiahGenerator(spec.NIAH[name], essays() if name in spec.ESSAYS else None)
    if name == spec.VT:
        return VariableGenerator(tokenizer)
    if name == spec.CWE:
        return CommonGenerator()
    if name == spec.FWE:
        return FrequentGenerator()
    return QuestionGenerator(questions())


def _questions(name: str, path: str | Path, allow_download: bool) -> Questions:
    return (read_squad if name == spec.SQUAD else read_hotpotqa)(path, allow_download)


def _with_room(task: RulerTask, leave_out: bool, say: Callable[[str], None]) -> RulerTask:
    """The task at the lengths that have room for it."""
    room = []
    for length in task.lengths:
        shortest = task.too_short(length)
        if shortest is None:
            room.append(length)
        elif leave_out:
            say(f"{task.name} is left out of RULER at {length} tokens: with this tokenizer it needs {shortest}")
        else:
            raise task.no_room(length)
    return replace(task, lengths=tuple(room))
