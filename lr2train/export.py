"""export: write a Hugging Face folder for other runtimes: weights, config (``longrope``), tokenizer, model card.

    lr2train export run=tiny_4k [export.dtype=bfloat16] [export.folder=…]

Plain transformers loads the folder, and its logits are compared in both windows with those of the exported model. The
differences are in ``export.json`` of the run's folder, where that may be written.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch

from lr2train import io, progress, ranks, run
from lr2train.cli.door import main
from lr2train.config import Config, UserError
from lr2train.evaluation import trained_run
from lr2train.model import load, rotary
from lr2train.model.folder import GENERATION_FILES
from lr2train.parallel import processes
from lr2train.rope import hf as rope_hf
from lr2train.rope.factors import Factors

TOKENIZER_FILES = ("*token*", "*.model", "vocab.json", "merges.txt")
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [long-context, longrope2, lr2train]
---
# {name}

{base} extended from {original} to {target} tokens with LongRoPE2 (mixed context window training, lr2train).

- RoPE: `longrope` with searched factors ({method}); original RoPE up to {original} tokens, rescaled RoPE beyond.
- The text's total length (prompt + generated) decides the table. A runtime that changes tables in the middle of a text
  has to compute its
  cache anew; `lr2train generate model.path=<this folder>` does. vLLM chooses once, from `--max-model-len`; llama.cpp
  from the
  context size.
- attention_factor {attention_factor:g} multiplies cos and sin in the long window; the model was trained with
  {short_factor:g} in the short
  window. {note}
"""
EXACT = "They are the same, so transformers, vLLM and SGLang are exact in both windows."
SCALED = (
    "transformers has one attention_factor for both windows: below {original} tokens its logits differ from the "
    "trained model's. "
    "To serve short texts exactly, load with `rope_parameters={{'rope_type': 'default', 'rope_theta': {theta:g}}}`."
)


def export(config: Config) -> dict[str, Any]:
    """Run the verb; returns the contents of ``export.json``.

    Raises:
        UserError: the run is not finished; the dtype is unknown; the folder holds other files or cannot be written; or
            the model computes logits that are not finite. Nothing is replaced then, unless such logits come from plain
            transformers alone.
    """
    ranks.refuse_ranks("export")
    job = run.Run(trained_run.run_folder(config), "export")
    if config.export.dtype not in (None, *load.DTYPES):
        raise UserError(
            f"export.dtype={config.export.dtype} is not one of {', '.join(load.DTYPES)}; set one of them, or leave it "
            "empty"
        )
    io.read_json(job.folder / "train.json")  # refuses a run that is not finished
    factors = Factors.load(job.folder / "factors.json")
    folder = Path(config.export.folder or job.folder / "export")
    _refuse_to_overwrite(folder)
    _refuse_unwritable(folder)
    with job.lock(needed=False) or contextlib.nullcontext():  # another user's run may be exported: it is only read
        return _export(config, job, factors, folder)


def _export(config: Config, job: run.Run, factors: Factors, folder: Path) -> dict[str, Any]:
    config = trained_run.completed(config)
    dtype = config.export.dtype or io.read_json(job.folder / "model" / "config.json")["dtype"]
    device = str(processes.pick_device(config.device))
    ours = _write(job, folder, factors, dtype, device, config)
    differences = _differences(ours, _their_logits(folder, factors, device), folder, dtype)
    size = sum(file.stat().st_size for file in folder.iterdir())
    result = {"folder": str(folder), "dtype": dtype, "bytes": size, **differences, "provenance": run.provenance()}
    if reason := io.write_json_where_allowed(job.folder / "export.json", result):
        progress.say("export", f"{job.folder / 'export.json'} is not written ({reason})")
    _log(
        job,
        f"{folder}: largest logit difference between transformers and lr2train: long window "
        f"{result['long_logit_difference']:.2e}, "
        f"short window {result['short_logit_difference']:.2e}",
    )
    return result


def _log(job: run.Run, message: str) -> None:
    """Write to the terminal, and to the run's log where that may be written."""
    with contextlib.suppress(OSError):
        job.log(message)


def _refuse_to_overwrite(folder: Path) -> None:
    """Refuse a folder that is neither missing, empty nor an earlier export: an export replaces the whole folder."""
    ours = (folder / "config.json").exists() and (folder / "factors.json").exists()
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"export.folder={folder} exists and is no former export, and would be replaced; set export.folder to a "
            "new folder"
        )


def _refuse_unwritable(folder: Path) -> None:
    """Raises UserError before the work: the export is made beside its place, so the parent folder has to take files."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder.parent).close()
    except OSError as error:
        raise UserError(
            f"{folder.parent} cannot be written ({error.strerror}), and the export would go there; set export.folder "
            "to a folder of yours"
        ) from error


def _companions(config: Config, job: run.Run) -> list[Path]:
    """The files beside the weights: the base model's sampling settings and templates, and the tokenizer of the run."""
    trained, base = job.folder / "model", load.generation_files_of(config.model)
    generation_files = base or [trained / name for name in GENERATION_FILES]
    if (
        config.model.path
        and not Path(config.model.path).expanduser().is_dir()
        and not any(file.is_file() for file in generation_files)
    ):
        _log(
            job,
            f"the base model {config.model.path} is not here any more; its {' and '.join(GENERATION_FILES)}, if any, "
            "are left out",
        )
    return [*generation_files, *sorted(file for pattern in TOKENIZER_FILES for file in trained.glob(pattern))]


def _write(
    job: run.Run, folder: Path, factors: Factors, dtype: str, device: str, config: Config
) -> dict[str, torch.Tensor]:
    """Write the folder; returns the model's last logits by window. Nothing is written where a logit is not finite."""
    model = load.load_whole(job.folder / "model", dtype, device)
    values = load.plain_config(model.config)
    if factors.target_window_tokens > factors.spectrum.window_tokens:
        values = rope_hf.write(values, factors)
    table = rotary.install(model, factors)
    logits = {}  # before anything is written: a model without finite logits replaces no export
    for table.window, length in _lengths(factors).items():
        logits[table.window] = _last_logits(model, length)
        _refuse_not_finite(logits[table.window], str(job.folder / "model"), table.window, dtype)
    companions = _companions(config, job)
    card = _card(str(config.run), factors, table.tables["short"].attention_factor, config.model.path)

    def extras(temporary: Path) -> None:
        load.copy_companions(companions, temporary, factors.target_window_tokens)
        io.write_text(temporary / "README.md", card)
        factors.save(temporary / "factors.json")

    load.write_folder(model, values, folder, extras=extras)
    return logits


def _card(name: str, factors: Factors, short_factor: float, base: str | None) -> str:
    spectrum = factors.spectrum
    exact = factors.attention_factor == short_factor
    return CARD.format(
        name=name,
        base=Path(base or "A model trained from scratch").name,
        original=spectrum.window_tokens,
        target=factors.target_window_tokens,
        method=factors.method,
        attention_factor=factors.attention_factor,
        short_factor=short_factor,
        note=EXACT if exact else SCALED.format(original=spectrum.window_tokens, theta=spectrum.base),
    )


def _lengths(factors: Factors, extra_tokens: int = 64) -> dict[str, int]:
    """Length in tokens of the compared text, by window."""
    original = factors.spectrum.window_tokens
    return {"short": min(original, 2048), "long": min(original + extra_tokens, factors.target_window_tokens)}


def _their_logits(folder: Path, factors: Factors, device: str) -> dict[str, torch.Tensor]:
    """The last logits of the folder in plain transformers, by window."""
    from transformers import AutoModelForCausalLM

    load_model: Any = AutoModelForCausalLM.from_pretrained
    model = load_model(folder, trust_remote_code=False).to(device).eval()
    return {window: _last_logits(model, length) for window, length in _lengths(factors).items()}


def _differences(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], folder: Path, dtype: str
) -> dict[str, float]:
    """The largest absolute difference in each window."""
    for window, logits in theirs.items():
        _refuse_not_finite(logits, f"{folder} in plain transformers", window, dtype)
    return {f"{window}_logit_difference": (theirs[window] - ours[window]).abs().max().item() for window in ours}


def _refuse_not_finite(logits: torch.Tensor, of: str, window: str, dtype: str) -> None:
    if not torch.isfinite(logits).all():
        remedy = (
            ""
            if dtype == "float32"
            else "; set export.dtype=float32, as the model's own numbers may be too large for less"
        )
        raise UserError(
            f"{of} in {dtype} computes logits that are not finite in the {window} window, so the export cannot be "
            f"checked{remedy}"
        )


@torch.inference_mode()
def _last_logits(model: Any, length: int) -> torch.Tensor:
    """Logits [1, 16, V] at the last 16 positions of a text of ``length`` tokens."""
    # Multiples of a prime visit the whole vocabulary and need no seed.
    tokens = torch.arange(length, device=model.device)[None] * 7919 % model.config.vocab_size
    return model(tokens, use_cache=False, logits_to_keep=16).logits.float().cpu()


if __name__ == "__main__":
    main("export", export)
