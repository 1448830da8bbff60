"""export: a folder that other runtimes load: weights, config with the `longrope` dict, tokenizer, model card.

    python -m lr2train.export run=tiny_4k [export.dtype=bfloat16] [export.folder=…]

The folder is loaded again with plain transformers and its logits are compared with ours in both windows; the figures stand in
``export.json``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lr2train import run
from lr2train.config import Config, UserError, main
from lr2train.model import load, rotary
from lr2train.rope import hf as rope_hf
from lr2train.rope.factors import Factors

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [long-context, longrope2, lr2train]
---
# {name}

{base} extended from {original} to {target} tokens with LongRoPE2 (mixed context window training, lr2train).

- RoPE: `longrope` with searched factors ({method}); original RoPE up to {original} tokens, rescaled RoPE beyond.
- The text's total length (prompt + generated) decides the table. A runtime that changes tables in the middle of a text has to compute its
  cache anew; `python -m lr2train.generate model.path=<this folder>` does. vLLM chooses once, from `--max-model-len`; llama.cpp from the
  context size.
- attention_factor {attention_factor:g} multiplies cos and sin in the long window; the model was trained with 1 in the short window. {note}
"""
EXACT = "It is 1, so every runtime is exact in both windows."
SCALED = (
    "transformers has one attention_factor for both windows: below {original} tokens its logits differ from the trained model's. "
    "To serve short texts exactly, load with `rope_parameters={{'rope_type': 'default', 'rope_theta': {theta:g}}}`."
)


def export(config: Config) -> dict[str, Any]:
    """Run the verb; returns what ``export.json`` holds.

    Raises:
        UserError: the run is not finished, the dtype is unknown, or the folder holds something else.
    """
    if config.run is None:
        raise UserError("run is empty; set run=<name of a finished training run>")
    if config.export.dtype not in (None, *load.DTYPES):
        raise UserError(f"export.dtype={config.export.dtype} is not one of {', '.join(load.DTYPES)}; set one of them, or leave it empty")
    job = run.Run(Path(config.runs_folder) / config.run, "export")
    trained = run.read_json(job.folder / "train.json")
    factors = Factors.load(job.folder / "factors.json")
    folder = Path(config.export.folder or job.folder / "export")
    _refuse_to_overwrite(folder)
    dtype = config.export.dtype or run.read_json(job.folder / "model" / "config.json")["dtype"]
    _write(job.folder / "model", folder, factors, dtype)
    (folder / "README.md").write_text(_card(config.run, factors, trained))
    size = sum(file.stat().st_size for file in folder.iterdir())
    result = {"folder": str(folder), "dtype": dtype, "bytes": size, **check(folder, factors)}
    job.write_json("export.json", result)
    job.log(
        f"{folder}: largest logit difference between transformers and lr2train: long window {result['long_logit_difference']:.2e}, "
        f"short window {result['short_logit_difference']:.2e}"
    )
    return result


def _refuse_to_overwrite(folder: Path) -> None:
    """An export replaces a whole folder: only one that an export wrote, or an empty one."""
    ours = (folder / "config.json").exists() and (folder / "factors.json").exists()
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"export.folder={folder} exists and is no former export, and would be replaced; set export.folder to a new folder")


def _write(trained_folder: Path, folder: Path, factors: Factors, dtype: str) -> None:
    model = load.load_whole(trained_folder, dtype)
    config = load.plain_config(model.config)
    extended = factors.target_window_tokens > factors.spectrum.window_tokens
    load.write_folder(model, rope_hf.write(config, factors) if extended else config, folder)
    for file in trained_folder.glob("*"):
        if "token" in file.name:
            shutil.copy2(file, folder / file.name)
    factors.save(folder / "factors.json")


def _card(name: str, factors: Factors, trained: dict[str, Any]) -> str:
    spectrum = factors.spectrum
    note = EXACT if factors.attention_factor == 1 else SCALED.format(original=spectrum.window_tokens, theta=spectrum.base)
    return CARD.format(
        name=name,
        base=Path(trained["base"] or "A model trained from scratch").name,
        original=spectrum.window_tokens,
        target=factors.target_window_tokens,
        method=factors.method,
        attention_factor=factors.attention_factor,
        note=note,
    )


@torch.inference_mode()
def check(folder: Path, factors: Factors, extra_tokens: int = 64) -> dict[str, float]:
    """Largest absolute logit difference between the folder in plain transformers and in lr2train: 16 positions, once in each window."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = load.load_whole(folder, str(theirs.dtype).removeprefix("torch."))
    table = rotary.install(ours, factors)
    original = factors.spectrum.window_tokens
    lengths = {"short": min(original, 2048), "long": min(original + extra_tokens, factors.target_window_tokens)}
    differences = {}
    for window, length in lengths.items():
        table.window = window
        tokens = torch.arange(length)[None] * 7919 % ours.config.vocab_size
        logits = [model(tokens, use_cache=False, logits_to_keep=16).logits.float() for model in (theirs, ours)]
        differences[f"{window}_logit_difference"] = (logits[0] - logits[1]).abs().max().item()
    return differences


if __name__ == "__main__":
    main("export", export)
