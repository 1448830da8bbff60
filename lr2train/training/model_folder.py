"""What ``train`` writes into ``model/`` beside the weights. An export from a checkpoint writes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lr2train.config import ModelConfig
from lr2train.model import load
from lr2train.rope import hf as rope_hf
from lr2train.rope.factors import Factors


def extends(factors: Factors) -> bool:
    """Whether the target window is longer than the original one."""
    return factors.target_window_tokens > factors.spectrum.window_tokens


def config_values(hf_config: Any, factors: Factors) -> dict[str, Any]:
    """The contents of config.json: the base model's own, with the factors.

    Raises:
        UserError: the factors have no form in config.json.
    """
    values = load.plain_config(hf_config)
    return rope_hf.write(values, factors) if extends(factors) else values


def write_companions(model: ModelConfig, tokenizer: Path, factors: Factors, folder: Path) -> None:
    """Copy the base model's sampling settings and templates and the corpus' tokenizer into ``folder``."""
    files = [*load.generation_files_of(model), *sorted(tokenizer.iterdir())]
    load.copy_companions(files, folder, factors.target_window_tokens)
