"""export: write Hugging Face folders for other runtimes: weights, config, tokenizer, model card.

    lr2train export run=tiny_4k [export.runtime=vllm] [export.dtype=bfloat16] [export.folder=…]

    runs/tiny_4k/export/long/    the rescaled table at every length, the attention factor in the weights: long texts
    runs/tiny_4k/export/short/   the original window alone: short texts, in every runtime
    runs/tiny_4k/export/two/     both tables: for `lr2train generate`, and for transformers with trust_remote_code=True

A run that is not finished is exported from a checkpoint: ``export.checkpoint=last``, or a number of steps.

docs/SERVING.md says which runtime needs which folder. Weights are read and written as a stream. Then the logits of each
folder are compared with the run's, one model at a time (``export.check``). The run's ``export.json`` holds the
differences; it is left out if the run's folder is read-only.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lr2train import io, progress, ranks, run
from lr2train.cli.door import main
from lr2train.config import Config, UserError
from lr2train.data.corpus import Corpus
from lr2train.evaluation import trained_run
from lr2train.model import config_json, load, rotary, weights
from lr2train.model import folder as model_files
from lr2train.model.folder import GENERATION_FILES
from lr2train.parallel import processes
from lr2train.rope.factors import Factors
from lr2train.serving import engines, folders
from lr2train.training import model_folder
from lr2train.training.deepspeed import stored_weights
from lr2train.training.deepspeed.checkpoint import Checkpoints

TOKENIZER_FILES = ("*token*", "*.model", "vocab.json", "merges.txt")
WINDOWS_OF = {"long": ("long",), "short": ("short",), "two": ("short", "long")}
_OLD_LAYOUT = ("config.json", "factors.json")  # files of an export that was one folder


def export(config: Config) -> dict[str, Any]:
    """Run the verb; returns the contents of ``export.json``.

    Raises:
        UserError: the run is not finished, and no checkpoint is named; the checkpoint cannot be read; the dtype is
            unknown; the runtime is a plug-in that cannot be imported; the folder holds other files or cannot be
            written; the attention factor cannot be put into the weights; or the model computes logits that are not
            finite. Nothing is replaced then, unless such logits come from an exported folder alone.
    """
    ranks.refuse_ranks("export")
    job = run.Run(trained_run.run_folder(config), "export")
    if config.export.dtype not in (None, *load.DTYPES):
        raise UserError(
            f"export.dtype={config.export.dtype} is not one of {', '.join(load.DTYPES)}; set one of them, or leave it "
            "empty"
        )
    _refuse_unfinished(config, job)
    engines.runtime_of(str(config.export.runtime))  # a plug-in that cannot be imported is refused now
    factors = Factors.load(job.folder / "factors.json")
    root = Path(config.export.folder or job.folder / "export")
    _refuse_to_overwrite(root)
    _refuse_unwritable(root)
    with job.lock(needed=False) or contextlib.nullcontext():  # another user's run may be exported: it is only read
        with tempfile.TemporaryDirectory() as temporary:
            return _export(config, job, factors, root, Path(temporary))


def _export(config: Config, job: run.Run, factors: Factors, root: Path, temporary: Path) -> dict[str, Any]:
    checkpoint = _checkpoint(config, job)
    config = trained_run.completed(config, with_model=checkpoint is None)
    source = _source(config, job, factors) if checkpoint is None else _from(checkpoint, config, factors, temporary)
    names = _names(config, source)
    device = str(processes.pick_device(config.device))
    ours = _our_logits(source, device, names) if config.export.check else {}
    windows = engines.Windows(factors, source.short_factor, source.plain_short, source.values)
    asked = str(config.export.runtime)
    cards = {name: engines.card(name, str(config.run), config.model.path, windows, asked) for name in names}
    files = {name: engines.runtime_of(asked).files(name, windows) for name in names}
    written = folders.write(source, root, names, cards, files)
    _remove_outdated(job, source, root, names)
    of_folder = {
        name: {
            "window_tokens": source.window_of(name),
            "written": written[name],
            **(_differences(ours, root / name, name, source, device) if ours else {}),
        }
        for name in names
    }
    result = {
        "folder": str(root),
        "checkpoint": None if checkpoint is None else checkpoint.step,
        "dtype": source.dtype,
        "bytes": _bytes_of(root / name for name in names),
        "attention_factor": factors.attention_factor,
        "short_attention_factor": source.short_factor,
        "folders": of_folder,
        "provenance": run.provenance(),
    }
    if reason := io.write_json_where_allowed(job.folder / "export.json", result):
        progress.say("export", f"{job.folder / 'export.json'} is not written ({reason})")
    _tell(job, result, engines.lines_of(windows, names, asked))
    return result


def _refuse_unfinished(config: Config, job: run.Run) -> None:
    """Refuse a run without a model, unless a checkpoint is to be exported."""
    finished = (job.folder / "train.json").exists()
    if (finished and (job.folder / "model" / config_json.NAME).exists()) or config.export.checkpoint is not None:
        return
    if steps := Checkpoints(job.folder / "checkpoints").steps:
        raise UserError(
            f"run={config.run} {'has lost its model' if finished else 'is not finished and has no model'}, and holds "
            f"checkpoints up to {steps[-1].name}; set "
            f"export.checkpoint={stored_weights.LAST} to export its newest checkpoint"
        )
    io.read_json(job.folder / "train.json")
    io.read_json(job.folder / "model" / config_json.NAME)


def _checkpoint(config: Config, job: run.Run) -> stored_weights.StoredCheckpoint | None:
    if config.export.checkpoint is None:
        return None
    found = stored_weights.find(Checkpoints(job.folder / "checkpoints"), config.export.checkpoint)
    _log(job, f"exporting {found.folder}, after {found.step} steps")
    return found


def _from(
    checkpoint: stored_weights.StoredCheckpoint, config: Config, factors: Factors, temporary: Path
) -> folders.Source:
    """A checkpoint as the folders are made from it; ``temporary`` takes what a finished run's ``model/`` holds beside
    its weights.
    """
    dtype = config.model.dtype
    own = stored_weights.weights_of(checkpoint, load.DTYPES[dtype])
    hf_config = load.config_of(config.model)
    twin = load.build_empty(hf_config, dtype, lambda: torch.device("meta"))
    if set(own) - set(weights.owners(twin.state_dict(keep_vars=True)).values()):
        # Training found a head of its own in the weights of a base whose config ties it.
        hf_config.tie_word_embeddings = hf_config.get_text_config().tie_word_embeddings = False
        twin = load.build_empty(hf_config, dtype, lambda: torch.device("meta"))
    written = {**model_files.shareable(model_folder.config_values(hf_config, factors)), **model_files.facts_of(twin)}
    io.write_json(temporary / config_json.NAME, {**written, "dtype": dtype})
    model_folder.write_companions(
        config.model, Corpus.open(Path(str(config.data.path))).tokenizer_folder, factors, temporary
    )
    return folders.Source(
        model=temporary,
        values=load.plain_config(load.config_of(load.ModelConfig(path=str(temporary)))),
        factors=factors,
        dtype=config.export.dtype or dtype,
        companions=tuple(sorted(file for file in temporary.iterdir() if file.name != config_json.NAME)),
        tensors=model_files.published(twin, own),
        contents=checkpoint.fingerprint,
    )


def _source(config: Config, job: run.Run, factors: Factors) -> folders.Source:
    """The run as the folders are made from it."""
    model = job.folder / "model"
    values = load.plain_config(load.config_of(load.ModelConfig(path=str(model))))
    return folders.Source(
        model=model,
        values=values,
        factors=factors,
        dtype=config.export.dtype or io.read_json(model / "config.json")["dtype"],
        companions=tuple(_companions(config, job)),
    )


def _names(config: Config, source: folders.Source) -> tuple[str, ...]:
    """The folders to write; a model with one window has one folder.

    Raises:
        UserError: llama.cpp is asked for, and cannot compute the long window of the model's architecture.
    """
    if not source.extended:
        return ("short",)
    runtime = str(config.export.runtime)
    if runtime == "gguf" and (why := engines.why_no_gguf(source.values, source.window_of("two"))):
        raise UserError(
            f"{why}, so no GGUF has the window of {source.window_of('two')} tokens (export.runtime=gguf); set "
            "export.runtime=all to export for the other runtimes"
        )
    return engines.runtime_of(runtime).folders


def _tell(job: run.Run, result: dict[str, Any], lines: Sequence[engines.Line]) -> None:
    """The differences, then runtime by runtime the folder, the command and what is exact."""
    for name, said in result["folders"].items():
        differences = [
            f"{window} window {said[f'{window}_logit_difference']:.2e}"
            for window in WINDOWS_OF[name]
            if f"{window}_logit_difference" in said
        ]
        state = "written" if said["written"] else "complete already"
        compared = f"; largest logit difference from lr2train: {', '.join(differences)}" if differences else ""
        _log(job, f"{Path(result['folder']) / name}: {state}, {said['window_tokens']} tokens{compared}")
    for line in lines:
        _log(job, engines.in_words(line, Path(result["folder"]) / line.folder))


def _log(job: run.Run, message: str) -> None:
    """Write to the terminal, and to the run's log where that may be written."""
    with contextlib.suppress(OSError):
        job.log(message)


def _former(root: Path) -> bool:
    """Whether an export is here: of today's layout, or of the layout with one folder."""
    return any((root / name / folders.RECORD).exists() for name in folders.FOLDERS) or _is_old_layout(root)


def _is_old_layout(root: Path) -> bool:
    return all((root / name).exists() for name in _OLD_LAYOUT)


def _refuse_to_overwrite(root: Path) -> None:
    """Refuse a folder that is neither missing, empty nor an earlier export."""
    if not root.exists() or (root.is_dir() and _former(root)):
        return
    leftovers = {f".{name}{io.TEMPORARY}" for name in folders.FOLDERS}  # of a first export that was killed
    if not root.is_dir() or any(file.name not in leftovers for file in root.iterdir()):
        raise UserError(
            f"export.folder={root} exists and is no former export, and would be replaced; set export.folder to a "
            "new folder"
        )


def _refuse_unwritable(root: Path) -> None:
    """Raises UserError before the work."""
    place = root if root.is_dir() else root.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(
            f"{place} cannot be written ({error.strerror}), and the export would go there; set export.folder "
            "to a folder of yours"
        ) from error


def _remove_outdated(job: run.Run, source: folders.Source, root: Path, names: Sequence[str]) -> None:
    """Remove what an earlier export left of other weights, so that no folder contradicts another."""
    for name in folders.FOLDERS:
        if name not in names and (root / name / folders.RECORD).exists():
            if folders.weights_in(root / name) == source.weights_of(name):
                continue
            shutil.rmtree(root / name)
            _log(job, f"{root / name} held other weights, and is removed; export.runtime=all writes it anew")
    if _is_old_layout(root):
        for file in root.iterdir():
            if file.is_file():
                file.unlink()


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


def _bytes_of(places: Iterator[Path]) -> int:
    """Bytes on the disk; a file with several names counts once."""
    facts = [file.stat() for place in places for file in place.iterdir()]
    return sum({(one.st_dev, one.st_ino): one.st_size for one in facts}.values())


# ---- the logits of each folder, compared with the run's ----


def _our_logits(source: folders.Source, device: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The run's last logits by window, in the exported dtype: a model without finite logits replaces no export."""
    hf_config = load.config_of(load.ModelConfig(path=str(source.model)))
    model = load.assembled(hf_config, source.dtype, source.stored(), lambda: torch.device(device))
    model.eval().requires_grad_(False)
    table = rotary.install(model, source.factors)
    windows = {window for name in names for window in WINDOWS_OF[name]}
    logits = {}
    for table.window in sorted(windows):
        logits[table.window] = _last_logits(model, _length(source.factors, table.window))
        _refuse_not_finite(logits[table.window], "the run's model", table.window, source.dtype)
    return logits


def _length(factors: Factors, window: str, extra_tokens: int = 64) -> int:
    """Length in tokens of the compared text."""
    original = factors.spectrum.window_tokens
    return min(original, 2048) if window == "short" else min(original + extra_tokens, factors.target_window_tokens)


def _differences(
    ours: dict[str, torch.Tensor], folder: Path, name: str, source: folders.Source, device: str
) -> dict[str, float]:
    """The largest absolute difference in each window of a folder; ``two`` is loaded with its modelling file's class."""
    from transformers import AutoModelForCausalLM

    load_model: Any = (folders.class_of(folder) if name == "two" else AutoModelForCausalLM).from_pretrained
    model = load_model(folder, **({} if name == "two" else {"trust_remote_code": False})).to(device).eval()
    found = {}
    for window in WINDOWS_OF[name]:
        theirs = _last_logits(model, _length(source.factors, window))
        _refuse_not_finite(theirs, f"{folder} in transformers", window, source.dtype)
        found[f"{window}_logit_difference"] = (theirs - ours[window]).abs().max().item()
    return found


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
