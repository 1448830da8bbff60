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

from lr2train import io, run
from lr2train.cli import main
from lr2train.config import Config, UserError
from lr2train.evaluation import of_run
from lr2train.model import load, rotary
from lr2train.parallel import processes
from lr2train.rope import hf as rope_hf
from lr2train.rope.factors import Factors

VERBATIM = ("generation_config.json", "chat_template.jinja", "chat_template.json")
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
    job = run.Run(of_run.folder_of(config), "export")
    if config.export.dtype not in (None, *load.DTYPES):
        raise UserError(f"export.dtype={config.export.dtype} is not one of {', '.join(load.DTYPES)}; set one of them, or leave it empty")
    io.read_json(job.folder / "train.json")  # refuses a run that is not finished
    factors = Factors.load(job.folder / "factors.json")
    folder = Path(config.export.folder or job.folder / "export")
    _refuse_to_overwrite(folder)
    config = of_run.completed(config)
    dtype = config.export.dtype or io.read_json(job.folder / "model" / "config.json")["dtype"]
    companions = {file.name: file for file in (*_tokenizer_files(job.folder / "model"), *_files_of_base(config, job))}
    card = _card(str(config.run), factors, config.model.path)
    _write(job.folder / "model", folder, factors, dtype, card, list(companions.values()))
    size = sum(file.stat().st_size for file in folder.iterdir())
    differences = check(folder, factors, str(processes.pick_device(config.device)))
    result = {"folder": str(folder), "dtype": dtype, "bytes": size, **differences, "provenance": run.provenance()}
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


def _tokenizer_files(trained_folder: Path) -> list[Path]:
    return [file for file in trained_folder.iterdir() if "token" in file.name or file.name in VERBATIM]


def _files_of_base(config: Config, job: run.Run) -> list[Path]:
    """How the base model samples and talks, which training leaves as it is."""
    if config.model.path is None:
        return []
    try:
        base = load.folder_of(config.model)
    except UserError:
        job.log(f"the base model {config.model.path} is not here any more; its {' and '.join(VERBATIM)}, if any, are left out")
        return []
    return [base / name for name in VERBATIM if (base / name).is_file()]


def _write(trained_folder: Path, folder: Path, factors: Factors, dtype: str, card: str, companions: list[Path]) -> None:
    def extras(temporary: Path) -> None:
        for file in companions:
            shutil.copy2(file, temporary / file.name)
        (temporary / "README.md").write_text(card)
        factors.save(temporary / "factors.json")

    model = load.load_whole(trained_folder, dtype)
    config = load.plain_config(model.config)
    extended = factors.target_window_tokens > factors.spectrum.window_tokens
    load.write_folder(model, rope_hf.write(config, factors) if extended else config, folder, extras=extras)


def _card(name: str, factors: Factors, base: str | None) -> str:
    spectrum = factors.spectrum
    note = EXACT if factors.attention_factor == 1 else SCALED.format(original=spectrum.window_tokens, theta=spectrum.base)
    return CARD.format(
        name=name,
        base=Path(base or "A model trained from scratch").name,
        original=spectrum.window_tokens,
        target=factors.target_window_tokens,
        method=factors.method,
        attention_factor=factors.attention_factor,
        note=note,
    )


def check(folder: Path, factors: Factors, device: str = "cpu", extra_tokens: int = 64) -> dict[str, float]:
    """Largest absolute logit difference between the folder in plain transformers and in lr2train: 16 positions, once in each window.

    The two models are in memory one after the other, not together.
    """
    original = factors.spectrum.window_tokens
    lengths = {"short": min(original, 2048), "long": min(original + extra_tokens, factors.target_window_tokens)}
    theirs, ours = _their_logits(folder, lengths, device), _our_logits(folder, factors, lengths, device)
    return {f"{window}_logit_difference": (theirs[window] - ours[window]).abs().max().item() for window in lengths}


def _their_logits(folder: Path, lengths: dict[str, int], device: str) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    load_model: Any = AutoModelForCausalLM.from_pretrained
    model = load_model(folder).to(device).eval()
    return {window: _last_logits(model, length) for window, length in lengths.items()}


def _our_logits(folder: Path, factors: Factors, lengths: dict[str, int], device: str) -> dict[str, torch.Tensor]:
    model = load.load_whole(folder, io.read_json(folder / "config.json")["dtype"], device)
    table = rotary.install(model, factors)
    logits = {}
    for window, length in lengths.items():
        table.window = window
        logits[window] = _last_logits(model, length)
    return logits


@torch.inference_mode()
def _last_logits(model: Any, length: int) -> torch.Tensor:
    tokens = torch.arange(length, device=model.device)[None] * 7919 % model.config.vocab_size
    return model(tokens, use_cache=False, logits_to_keep=16).logits.float().cpu()


if __name__ == "__main__":
    main("export", export)
