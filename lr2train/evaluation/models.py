"""The models that one evaluation compares: what ``run=``, ``model.path`` and ``eval.methods`` name.

Choice: one run stands for the untrained model under each method of ``eval.methods``, the untrained model under the
run's factors, and the trained model last. Several runs or folders stand for one model each: the first one is the base
that the others are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lr2train import io
from lr2train.config import Config, RopeConfig, UserError
from lr2train.evaluation import trained_run
from lr2train.evaluation.results import folder_name
from lr2train.evaluation.subject import Subject, as_published, with_factors
from lr2train.model import load
from lr2train.rope.factors import Factors
from lr2train.rope.methods import build


@dataclass(frozen=True)
class Compared:
    """The models, and the config under which they are evaluated.

    Attributes:
        config: completed from the settings of the first training run among them.
        subjects: one row each.
    """

    config: Config
    subjects: list[Subject]

    @property
    def original_window_tokens(self) -> int:
        """L0 of the last model, which is the one that was extended."""
        return self.subjects[-1].original_window_tokens

    @property
    def target_window_tokens(self) -> int:
        """The longest window among the models."""
        return max(subject.target_window_tokens for subject in self.subjects)


def compared(config: Config) -> Compared:
    """The models that a config names; no weight is read.

    Raises:
        UserError: neither a run nor a model is named, or one of them is missing or not finished.
    """
    named = trained_run.named(config)
    if not named:
        if config.model.path is None:
            raise UserError(
                "run is empty; set run=<name of a finished training run, or a model folder>, or set model.path and rope"
            )
        return Compared(config, _before(config, load.folder_of(config.model)))
    if len(named) == 1:
        return _one(replace(config, run=named[0]))
    each = [_one(replace(config, run=one, eval=replace(config.eval, methods=[]))) for one in named]
    subjects = [replace(one.subjects[-1], label=Path(name).name) for name, one in zip(named, each, strict=True)]
    trained = [one.config for name, one in zip(named, each, strict=True) if trained_run.is_run(config, name)]
    return Compared(replace(trained[0] if trained else config, run=config.run), _distinct(subjects))


def _one(config: Config) -> Compared:
    name = trained_run.named(config)[0]
    if trained_run.is_run(config, name):
        return _trained(config)
    folder = _model_folder(config, name)
    return Compared(config, [as_published(folder.name, folder, config.model.overrides)])


def _model_folder(config: Config, name: str) -> Path:
    """The folder of a model that is no run of ours."""
    try:
        return load.folder_of(replace(config.model, path=name))
    except UserError as error:
        missing = f"run={name}: {trained_run.folder_of(config, name) / 'train.json'} does not exist"
        if load.is_hub_id(name):
            raise UserError(f"{missing}, and {error}") from error
        raise UserError(
            f"{missing}, and {name} is no folder; set run to a finished run or to a Hugging Face model folder"
        ) from error


def _trained(config: Config) -> Compared:
    folder = trained_run.run_folder(config)
    io.read_json(folder / "train.json")  # refuses a run that is not finished
    factors = Factors.load(folder / "factors.json")
    config = trained_run.completed(config)
    extended = factors.target_window_tokens > factors.spectrum.window_tokens
    label = f"{factors.method} trained" if extended else "base"
    after = with_factors(label, folder / "model", factors, True, {})
    if config.model.path is None:
        return Compared(config, [after])
    base, overrides = load.folder_of(config.model), config.model.overrides
    before = with_factors(f"{factors.method} untrained", base, factors, True, overrides)
    untrained = [before] if config.eval.untrained else []
    return Compared(config, [*_methods(config, base, factors), *untrained, after])


def _before(config: Config, folder: Path) -> list[Subject]:
    factors = build(config.rope, load.spectrum_of(load.config_of(config.model), config.model))
    own = with_factors(factors.method, folder, factors, True, config.model.overrides)
    return [*_methods(config, folder, factors), own]


def _methods(config: Config, folder: Path, factors: Factors) -> list[Subject]:
    """The untrained model under each method of ``eval.methods``, for the same windows."""
    return [
        with_factors(f"{name} untrained", folder, _method(name, factors), False, config.model.overrides)
        for name in config.eval.methods
        if name != factors.method
    ]


def _method(name: str, factors: Factors) -> Factors:
    try:
        return build(RopeConfig(target_window_tokens=factors.target_window_tokens, method=name), factors.spectrum)
    except UserError as error:
        raise UserError(
            f"eval.methods names {name}, which cannot be built from the windows alone ({error}); remove it from "
            "eval.methods"
        ) from error


def _distinct(subjects: Sequence[Subject]) -> list[Subject]:
    """The same models under labels of their own, which also name folders of their own."""
    taken: set[str] = set()
    found = []
    for subject in subjects:
        labels = (subject.label, *(f"{subject.label} {number}" for number in range(2, len(subjects) + 1)))
        label = next(one for one in labels if folder_name(one) not in taken)
        taken.add(folder_name(label))
        found.append(replace(subject, label=label))
    return found


def lengths_of(config: Config, models: Compared) -> list[int]:
    """The lengths to measure at: ``eval.lengths_tokens``, else doubling from 4096, or from L0 where that is shorter.

    Raises:
        UserError: a length is beyond the target window of every model.
    """
    target = models.target_window_tokens
    if beyond := [length for length in config.eval.lengths_tokens if length > target]:
        raise UserError(
            f"eval.lengths_tokens holds {beyond[0]}, beyond the target window of {target}; remove it from "
            "eval.lengths_tokens, or leave eval.lengths_tokens empty"
        )
    if config.eval.lengths_tokens:
        return sorted(set(config.eval.lengths_tokens))
    lengths = [min(4096, models.original_window_tokens, target)]
    while lengths[-1] * 2 <= target:
        lengths.append(lengths[-1] * 2)
    return sorted({*lengths, target})
