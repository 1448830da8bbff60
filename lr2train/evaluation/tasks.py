"""Names of ``eval.tasks`` -> tasks: our own benchmarks, by task or by group, for the tokenizer of each model.

Choice: ``package.module.Class`` is a task of a user's own package. Every other name that is none of ours is lm-eval's,
and lm-eval is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lr2train import progress
from lr2train.config import Config, UserError
from lr2train.config.plugins import is_plugin, plugin
from lr2train.data.corpus import Corpus
from lr2train.evaluation import infinitebench, loft, longbench, needles, ruler
from lr2train.evaluation.answers import Answers
from lr2train.evaluation.filler import TextFolder, essays_of
from lr2train.evaluation.models import Compared
from lr2train.evaluation.request import Task, TaskInputs
from lr2train.evaluation.subject import Subject
from lr2train.evaluation.tokens import PromptTokenizer
from lr2train.model import load

if TYPE_CHECKING:
    from lr2train.evaluation.harness import TaskResult as HarnessResult
    from lr2train.evaluation.harness_tasks import Loaded as HarnessTask

GROUPS: dict[str, tuple[str, ...]] = {
    "needles": (needles.NEEDLES, needles.TEXT),
    "ruler": tuple(ruler.NAMES),
    "loft": tuple(loft.NAMES),
    "infinitebench": tuple(infinitebench.NAMES),
    "longbench": tuple(longbench.NAMES),
    # lm-eval's, with the settings of conf/eval/short.yaml
    "short": ("mmlu@5:acc_mean_of_tasks", "mmlu_pro", "hellaswag@10", "truthfulqa_mc2", "gsm8k_cot"),
}
OURS = {name for group, names in GROUPS.items() if group != "short" for name in names}


class Suite:
    """What one command measures.

    Args:
        config: completed from the run's.
        lengths: of prompts and documents, tokens.
        models: that are compared.
        cache: folder of generated samples.

    Attributes:
        names: of our own tasks and of plug-ins, in the order of the tables.
        harness_names: of lm-eval's tasks.
        corpus: gives held-out text; None without ``data.path``.
    """

    def __init__(self, config: Config, lengths: list[int], models: Compared, cache: Path):
        self.config, self.lengths, self.cache = config, lengths, cache
        given = config.eval.tasks
        expanded = [name for one in given for name in GROUPS.get(one, (one,))]
        self.names = [name for name in dict.fromkeys(expanded) if name in OURS or is_plugin(name)]
        self.harness_names = [name for name in dict.fromkeys(expanded) if name not in self.names]
        self.corpus = Corpus.open(config.data.path) if config.data.path is not None else None
        self._models = models
        self._tokenizers: dict[Path, PromptTokenizer] = {}
        self._loaded: list[HarnessTask] = []
        self._ruler_tasks: dict[tuple[str, tuple[int, ...]], list[ruler.RulerTask]] = {}

    def refuse_unknown(self) -> None:
        """Refuse a suite that measures nothing.

        Raises:
            UserError: no task is named.
        """
        if not self.names and not self.harness_names:
            raise UserError("eval.tasks=[] leaves nothing to measure; set eval=needles or another suite")

    def refuse_nothing(self, made: bool) -> None:
        """Refuse a suite of which every task was left out: earlier results would be overwritten by empty tables.

        Args:
            made: whether a task of our own is left.

        Raises:
            UserError: neither such a task nor one of lm-eval is left.
        """
        if not made and not self._loaded:
            raise UserError(
                f"eval.tasks=[{','.join(self.names)}] leaves nothing to measure at eval.lengths_tokens={self.lengths}; "
                "set greater lengths, or other tasks"
            )

    def tokenizer(self, subject: Subject) -> PromptTokenizer:
        """The tokenizer of a model, else of the corpus; read once.

        Raises:
            UserError: there is neither.
        """
        if subject.folder not in self._tokenizers:
            own = any((subject.folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
            of_corpus = self.corpus.tokenizer_folder if self.corpus is not None else subject.folder
            self._tokenizers[subject.folder] = PromptTokenizer.of(subject.folder if own else of_corpus)
        return self._tokenizers[subject.folder]

    def dtype(self, subject: Subject) -> str:
        """Of weights and matrix products: ``model.dtype``; on a GPU a published model's own, unless another is set."""
        given, on_gpu = self.config.model.dtype, self.config.device != "cpu" and torch.cuda.is_available()
        return subject.dtype if given == "float32" and on_gpu and subject.dtype else given

    def identity(self, subject: Subject) -> dict[str, Any]:
        """Everything about a model that decides its answers."""
        tokenizer = self.tokenizer(subject)
        # Beside the weights: the ids that end a text, and how ids become text, stand in files of their own.
        texts = {"stop_ids": sorted(self.stop_ids(subject)), "cleaned": tokenizer.hf.clean_up_tokenization_spaces}
        return {**subject.identity(self.dtype(subject)), "tokenizer": tokenizer.fingerprint, **texts}

    def stop_ids(self, subject: Subject) -> set[int]:
        """Ids that end a text of a model."""
        return load.stop_ids_of(subject.folder, self.tokenizer(subject).hf)

    def tasks(self, subject: Subject) -> list[Task]:
        """Our own tasks for one model.

        Raises:
            UserError: a file or a setting is wrong.
        """
        lengths = [length for length in self.lengths if length <= subject.target_window_tokens]
        made: dict[str, Task] = {}
        for group in GROUPS:
            names = [name for name in self.names if name in GROUPS[group]]
            if names:
                made |= {task.name: task for task in self._group(group, names, subject, lengths)}
        made |= {name: self._plugin(name, subject, lengths) for name in self.names if name not in OURS}
        return [made[name] for name in self.names if name in made]

    def _plugin(self, name: str, subject: Subject, lengths: list[int]) -> Task:
        """A task of a user's own package.

        Raises:
            UserError: the class cannot be imported, or names its task like one of ours.
        """
        has_text = self.config.eval.essays is not None or self.corpus is not None
        source = self._source(subject) if has_text else None
        task = plugin(name, "eval.tasks", type)(TaskInputs(self.tokenizer(subject), lengths, self.config.eval, source))
        if task.name in OURS:
            raise UserError(f"eval.tasks: {name} names its task {task.name}, as one of ours; give it another name")
        return task

    def _group(self, group: str, names: list[str], subject: Subject, lengths: list[int]) -> Sequence[Task]:
        settings = self.config.eval
        if group == "needles":
            source = self._source(subject)
            own: dict[str, Task] = {
                needles.NEEDLES: needles.NeedleTask(settings, self.config.data.needles, source, lengths),
                needles.TEXT: needles.TextTask(settings, source, lengths),
            }
            return [own[name] for name in names]
        if group == "ruler":
            return self._ruler(names, subject, lengths)
        room = max(lengths, default=subject.target_window_tokens)
        if group == "loft":
            made = loft.tasks(names, settings.loft, self.tokenizer(subject), room, settings.limit)
            if room == max(self.lengths):
                return made
            # A base model has a shorter window than the extended one, which is measured all the same.
            fitting = [task for task in made if task.has_room()]
            if len(fitting) < len(made):
                absent = ", ".join(task.name for task in made if task not in fitting)
                progress.say("evaluate", f"{subject.label}: left out, as no corpus fits {room} tokens: {absent}")
            return fitting
        module, folder = {
            "infinitebench": (infinitebench, settings.infinitebench),
            "longbench": (longbench, settings.longbench),
        }[group]
        return module.tasks(names, folder, self.tokenizer(subject), room, settings.limit)

    def _source(self, subject: Subject) -> Corpus | TextFolder:
        """Where needles are hidden: ``eval.essays`` where it is set, else the held-out documents of the corpus."""
        if self.config.eval.essays is not None:
            return TextFolder(Path(self.config.eval.essays), self.tokenizer(subject))
        if self.corpus is None:
            raise UserError(
                "neither data.path nor eval.essays is set; set eval.essays to a folder of .txt files to hide needles in"
            )
        vocab_size = load.config_of(load.ModelConfig(path=str(subject.folder))).vocab_size
        self.corpus.refuse_other_tokenizer(vocab_size, subject.folder)
        return self.corpus

    def _ruler(self, names: list[str], subject: Subject, lengths: list[int]) -> list[ruler.RulerTask]:
        """RULER's tasks, made once for models with the same tokenizer and window."""
        tokenizer, settings = self.tokenizer(subject), self.config.eval
        key = (tokenizer.fingerprint, tuple(lengths))
        if key not in self._ruler_tasks:
            essays: str | Path | None = None
            if any(name in ruler.ESSAYS for name in names):
                source = self._source(subject)
                essays = essays_of(source) if isinstance(source, Corpus) else source.folder
            self._ruler_tasks[key] = ruler.tasks(
                names,
                lengths,
                settings.ruler_samples,
                tokenizer,
                settings.seed,
                essays,
                settings.squad,
                settings.hotpotqa,
                self.cache,
                leave_out=len(names) * len(lengths) > 1,
                allow_download=self.config.model.allow_download,
            )
        return self._ruler_tasks[key]

    def load_harness(self, log: Callable[[str], None]) -> None:
        """Load lm-eval's tasks with their documents, where any is named; a wrong name costs no computation.

        Raises:
            UserError: lm-eval is not installed, a name is unknown, or a data set is not there.
        """
        if self.harness_names:
            from lr2train.evaluation import harness  # here: lm-eval is optional, and takes seconds to import

            settings = self.config.eval
            self._loaded = harness.load_tasks(
                self.harness_names,
                settings.task_path,
                self.config.model.allow_download,
                log,
                others=sorted({*GROUPS, *OURS}),
            )

    def ask_harness(self, subject: Subject, answers: Answers, log: Callable[[str], None]) -> list[HarnessResult]:
        """Run lm-eval's tasks, where any is loaded."""
        if not self._loaded:
            return []
        from lr2train.evaluation import harness

        longest, settings = subject.target_window_tokens, self.config.eval
        return harness.run_tasks(
            self._loaded,
            answers,
            self.tokenizer(subject),
            longest,
            limit=settings.limit,
            chat_template=settings.chat_template,
            log=log,
        )
