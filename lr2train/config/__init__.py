"""The configuration: every key (``schema``), how a field is declared (``fields``), who reads a key (``verbs``), and
``load``, which checks.

Choice: structured Hydra schemas give the types, YAML under ``conf/`` gives the values, and ``load`` turns a composed
config into dataclasses
once, at the top of a verb. Nothing here imports another part of lr2train, and every part may import from here.
"""

from pathlib import Path

from lr2train.config.fields import Limits, UserError
from lr2train.config.loading import load, runs_of, to_dict, typed_key
from lr2train.config.schema import (
    NEEDLE_NAMES,
    SLOPE_FORWARDS,
    Algorithm,
    BucketConfig,
    Config,
    DataConfig,
    DataKind,
    DecontaminateConfig,
    Deduplicate,
    Device,
    Dtype,
    EngineConfig,
    EvalConfig,
    ExportConfig,
    GenerateConfig,
    GenerateWindow,
    HardwareConfig,
    InspectConfig,
    LearningRateSchedule,
    LoggerConfig,
    LongAttention,
    LongPositions,
    ModelConfig,
    NeedleConfig,
    Objective,
    Operators,
    OptimConfig,
    OverLong,
    ParallelConfig,
    Recompute,
    RopeConfig,
    SearchConfig,
    SearchSpace,
    SourceConfig,
    StageConfig,
    StartFrom,
    StrategyName,
    TokenizerBackend,
    WandbMode,
    WeightsOf,
    Window,
)
from lr2train.config.verbs import READS, VERBS, reads

_PACKAGE = Path(__file__).resolve().parent.parent
CONF_FOLDER = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""The YAML files: inside the package in a wheel, beside it in a checkout."""

__all__ = [
    "CONF_FOLDER",
    "NEEDLE_NAMES",
    "READS",
    "SLOPE_FORWARDS",
    "VERBS",
    "Algorithm",
    "BucketConfig",
    "Config",
    "DataConfig",
    "DataKind",
    "DecontaminateConfig",
    "Deduplicate",
    "Device",
    "Dtype",
    "EngineConfig",
    "EvalConfig",
    "ExportConfig",
    "GenerateConfig",
    "GenerateWindow",
    "HardwareConfig",
    "InspectConfig",
    "LearningRateSchedule",
    "Limits",
    "LoggerConfig",
    "LongAttention",
    "LongPositions",
    "ModelConfig",
    "NeedleConfig",
    "Objective",
    "Operators",
    "OptimConfig",
    "OverLong",
    "ParallelConfig",
    "Recompute",
    "RopeConfig",
    "SearchConfig",
    "SearchSpace",
    "SourceConfig",
    "StageConfig",
    "StartFrom",
    "StrategyName",
    "TokenizerBackend",
    "UserError",
    "WandbMode",
    "WeightsOf",
    "Window",
    "load",
    "reads",
    "runs_of",
    "to_dict",
    "typed_key",
]
