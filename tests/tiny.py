"""A tiny world for tests of whole verbs: a corpus prepared from a few text files, a random model, a run as `train`
leaves it.

Windows 64 -> 256. The model's weights are large, so that what it says depends on every position and every table.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from lr2train.cli.composition import compose
from lr2train.config import Config, to_dict
from lr2train.io import write_json
from lr2train.model import load
from lr2train.prepare import prepare
from lr2train.rope import METHODS, Factors, Spectrum
from lr2train.rope import hf as rope_hf

L0, L, VOCAB = 64, 256, 400
SPECTRUM = Spectrum(16, 1000.0, L0)
ARCHITECTURE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": L0, "bos_token_id": 0, "eos_token_id": 1,
    "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}  # fmt: skip


def config(verb: str, folder: Path, *overrides: str) -> Config:
    """The verb's config over the corpus and windows of this world; runs lie in ``folder``."""
    return compose(verb, arguments(folder, *overrides))


def arguments(folder: Path, *overrides: str) -> list[str]:
    """The same as a command line."""
    return [
        f"runs_folder={folder}", f"data.path={folder}/corpus", f"rope.target_window_tokens={L}",
        "data.needles.wording=code",
        "data.needles.digits=4", "device=cpu", "threads=1", *overrides,
    ]  # fmt: skip


def generate_config(folder: Path, *more: str) -> Config:
    """Of `generate` with 12 new tokens."""
    return config("generate", folder, "generate.max_new_tokens=12", *more)


def make_corpus(folder: Path) -> Path:
    """``folder/corpus``, prepared from twelve text files."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abdeiklmnorstu"), rng.integers(2, 8))) for _ in range(300)]
    for number in range(12):
        text = " ".join(rng.choice(words, 1500))
        (folder / "texts").mkdir(parents=True, exist_ok=True)
        (folder / "texts" / f"{number}.txt").write_text(text)
    sizes = [
        f"model.original_window_tokens={L0}",
        f"data.segment_tokens={L}",
        f"data.vocab_size={VOCAB}",
        "data.holdout=0.4",
    ]
    prepare(config("prepare", folder, "name=corpus", f"data.sources=[{{name: texts, path: {folder}/texts}}]", *sizes))
    return folder / "corpus"


def make_model(folder: Path, factors: Factors | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A model folder with random weights, which are the same for a seed; with factors, as `train` writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **ARCHITECTURE))
    values = load.plain_config(model.config)
    load.write_folder(model, rope_hf.write(values, factors) if factors else values, folder, dtype=dtype)
    return folder


def factors_with(attention_factor: float = 1.2) -> Factors:
    """Searched-looking factors of this world's model."""
    return METHODS["longrope2"](
        SPECTRUM, L, critical_index=3, tail=[4.5, 5.0, 5.5, 6.0, 7.0], attention_factor=attention_factor
    )


def make_run(folder: Path, name: str, attention_factor: float = 1.2, dtype: torch.dtype = torch.float32) -> Path:
    """``folder/name`` as a finished training run leaves it: the base with other weights, under other factors."""
    factors = factors_with(attention_factor)
    make_model(folder / name / "model", factors, seed=1, dtype=dtype)
    shutil.copytree(folder / "corpus" / "tokenizer", folder / name / "model", dirs_exist_ok=True)
    factors.save(folder / name / "factors.json")
    trained_with = to_dict(config("train", folder, f"name={name}", f"model.path={folder}/base"))
    write_json(folder / name / "train.config.json", trained_with)
    write_json(folder / name / "train.json", {"base": str(folder / "base"), "corpus": str(folder / "corpus")})
    return folder / name
