"""The three folders of an export, written from a run's safetensors as a stream.

- ``long/``: the attention factor in the weights, the long table at every length. Nothing is left that a runtime could
  misread.
- ``short/``: the trained weights, the model's own RoPE, window L0.
- ``two/``: the trained weights, both tables, and a modelling file that is exact with ``trust_remote_code=True``.

Choice: no model is built. Tensors are read one by one under their published names, changed, and written; no more than
one file of weights is in memory. Folders with the same weights share their files by hard links. A folder appears whole
or not at all, with a record of what the folder was made of; the same export again writes nothing. Cost: a change inside
a linked file changes every folder that shares the file.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lr2train import io
from lr2train.config import UserError
from lr2train.model import config_json, load, rotary
from lr2train.model import folder as model_folder
from lr2train.model.weight_files import StoredTensor
from lr2train.model.weights import Conversion, TensorReader
from lr2train.rope import hf as rope_hf
from lr2train.rope.factors import Factors
from lr2train.serving import engines, fold, gguf_longrope

FOLDERS = engines.FOLDERS
CODE = "modeling_longrope2.py"
GGUF_CODE = gguf_longrope.NAME
RECORD = "lr2train.json"
_VERSION = 1  # of what a folder holds; raised when the same inputs make another folder
_BASE_LINE = "Base: Any = transformers.LlamaForCausalLM"
_FP32_LINE = "KEEPS_FP32 = False"
_LAYOUT_LINE = 'LAYOUT = "halves"'
_CLASS = "LongRope2ForCausalLM"


@dataclass(frozen=True)
class Source:
    """A run, as the folders are made from it.

    Attributes:
        model: folder of the trained model; without weights where ``tensors`` holds them.
        values: its config.json.
        factors: of the long window.
        dtype: of the exported weights, a key of ``load.DTYPES`` (tests: any dtype of torch by name).
        companions: tokenizer, sampling and template files.
        tensors: of a checkpoint, by published name; None: the weights of ``model``.
        contents: fingerprint of ``tensors``.
    """

    model: Path
    values: dict[str, Any]
    factors: Factors
    dtype: str
    companions: tuple[Path, ...] = ()
    tensors: Mapping[str, StoredTensor] | None = None
    contents: str = ""

    def stored(self) -> Mapping[str, StoredTensor]:
        """The weights by published name."""
        return load.safetensors_of(self.model) if self.tensors is None else self.tensors

    @property
    def extended(self) -> bool:
        """Whether the model has two windows."""
        return self.factors.target_window_tokens > self.factors.spectrum.window_tokens

    @property
    def short_factor(self) -> float:
        """The attention factor of the short window."""
        return rope_hf.spectrum_of(self.values).attention_factor

    @property
    def plain_short(self) -> bool:
        """Whether the short window has plain RoPE, and no table of its own."""
        spectrum = rope_hf.spectrum_of(self.values)
        return spectrum.own_rescale is None and spectrum.attention_factor == 1.0

    def factor_of(self, name: str) -> float:
        """What the rotated rows of a folder's weights are multiplied by."""
        return self.factors.attention_factor if name == "long" else 1.0

    def window_of(self, name: str) -> int:
        """The window of a folder in tokens."""
        return self.factors.spectrum.window_tokens if name == "short" else self.factors.target_window_tokens

    def config_of(self, name: str) -> dict[str, Any]:
        """config.json of a folder, but for the facts that follow from the weights."""
        if name == "short":
            return rope_hf.write_short_window(self.values, self.factors.spectrum.window_tokens)
        return (rope_hf.write_one_table if name == "long" else rope_hf.write)(self.values, self.factors)

    def weights_of(self, name: str) -> str:
        """Fingerprint of a folder's weights."""
        contents = self.contents or load.folder_fingerprint(self.model)
        return io.fingerprint([_VERSION, contents, self.dtype, self.factor_of(name)])


def code_of(architecture: str, form: rotary.RotaryForm) -> str:
    """The modelling file of ``two/``.

    Args:
        architecture: a class of transformers, such as ``LlamaForCausalLM``.
        form: as ``rotary.form_of`` says.
    """
    text = _text(CODE)
    for line, own in (
        (_BASE_LINE, f"Base: Any = transformers.{architecture}"),
        (_FP32_LINE, f"KEEPS_FP32 = {form.keeps_fp32}"),
        (_LAYOUT_LINE, f'LAYOUT = "{form.layout}"'),
    ):
        assert text.count(line) == 1
        text = text.replace(line, own)
    return text.replace(_CLASS, class_name(architecture))


def class_name(architecture: str) -> str:
    """The class in the modelling file; each architecture has its own, as transformers keeps rules by class name."""
    return f"LongRope2{architecture}"


def class_of(folder: Path) -> Any:
    """The class in the modelling file of a folder, made from this package's text and not from the folder's."""
    hf_config = load.config_of(load.ModelConfig(path=str(folder)))
    twin = load.build_empty(hf_config, "float32", lambda: torch.device("meta"))
    module = types.ModuleType("lr2train_two_tables")
    architecture = type(twin).__name__
    exec(compile(code_of(architecture, rotary.form_of(twin)), CODE, "exec"), module.__dict__)
    return getattr(module, class_name(architecture))


def write(
    source: Source,
    root: Path,
    names: Sequence[str],
    cards: Mapping[str, str],
    files: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, bool]:
    """Make the folders ``root/<name>``; returns which of them were written, and not found complete.

    Args:
        source: the run.
        root: folder of the export.
        names: of the folders.
        cards: model card of each folder.
        files: further texts of each folder, by file name (``engines.Runtime.files``).

    Raises:
        UserError: the weights do not belong to the config, cannot be folded, or hold numbers that are not finite.
    """
    texts = {name: {"README.md": cards[name], **(files or {}).get(name, {})} for name in names}
    made_of = {name: _fingerprint(source, name, texts[name]) for name in names}
    missing = [name for name in names if _record(root / name).get("made_of") != made_of[name]]
    if not missing:
        return dict.fromkeys(names, False)
    hf_config = load.config_of(load.ModelConfig(path=str(source.model)))
    tensors = source.stored()
    _, twin, conversions = load.planned(hf_config, source.dtype, tensors)
    for name in missing:
        with model_folder.replacing(root / name) as temporary:
            found = _same_weights(source.weights_of(name), root)
            if found is not None:
                model_folder.share_weights(found, temporary)
            else:
                model_folder.write_stream(_stream(source, name, twin, conversions, tensors), temporary)
            _write_rest(source, name, temporary, twin, texts[name])
            weights = {file.name: file.stat().st_size for file in temporary.glob("*.safetensors")}
            record = {"made_of": made_of[name], "weights": source.weights_of(name), "files": weights}
            io.write_json(temporary / RECORD, record)
    return {name: name in missing for name in names}


def _fingerprint(source: Source, name: str, texts: Mapping[str, str]) -> str:
    """Of all that goes into a folder, without a path: the same inputs elsewhere make the same folder."""
    companions = [[file.name, io.sha256_of(file)] for file in source.companions if file.is_file()]
    codes = [_text(CODE)] if name == "two" else []
    codes += [_text(GGUF_CODE)] if _for_gguf(source, name) else []
    config = model_folder.shareable(source.config_of(name))
    return io.fingerprint([name, source.weights_of(name), config, companions, texts, codes])


def _for_gguf(source: Source, name: str) -> bool:
    """Whether the folder holds the script that gives llama.cpp the tables."""
    return name != "short" and not engines.why_no_gguf(source.values, source.window_of(name))


def _text(name: str) -> str:
    """The text of a file of this package that goes into folders."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _record(folder: Path) -> dict[str, Any]:
    """The record of a complete folder; empty where there is none, or where a weight file is missing or cut short."""
    try:
        record = json.loads((folder / RECORD).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return record if whole else {}


def weights_in(folder: Path) -> str | None:
    """Fingerprint of the weights in a complete folder; None for a folder that is not complete."""
    return _record(folder).get("weights")


def _same_weights(weights: str, root: Path) -> Path | None:
    """A complete folder of this export with the same weights."""
    folders = (root / name for name in FOLDERS)
    return next((folder for folder in folders if weights_in(folder) == weights), None)


def _stream(
    source: Source, name: str, twin: Any, conversions: Iterable[Conversion], tensors: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a folder under their published names, one by one.

    Raises:
        UserError: a tensor cannot be read or folded; or, at the end, numbers are not finite.
    """
    from safetensors import SafetensorError

    factor, dtype = source.factor_of(name), getattr(torch, source.dtype)
    rows = {} if factor == 1 else fold.rotated_rows(twin, source.factors.spectrum.rotary_dim)
    reader = TensorReader(tensors)
    for conversion in conversions:
        folded = [target for target in conversion.targets if target in rows]
        if folded and (len(conversion.sources) > 1 or len(conversion.targets) > 1):
            raise UserError(
                f"the attention factor cannot be put into the weights, because {folded[0]} is published as part of "
                "another tensor; set export.runtime=transformers to export without the folder long/"
            )
        change = partial(fold.folded, rows=rows[folded[0]], factor=factor) if folded else None
        for published in conversion.sources:
            kept = dtype if getattr(tensors[published].dtype, "is_floating_point", False) else tensors[published].dtype
            try:
                tensor = reader.read(published, kept, change)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{published} cannot be read ({error}); restore {tensors[published].file}") from error
            yield published, tensor
    if refusal := reader.refusal():
        raise UserError(refusal)


def _write_rest(source: Source, name: str, folder: Path, twin: Any, texts: Mapping[str, str]) -> None:
    facts = model_folder.facts_of(twin)
    config = {**model_folder.shareable(source.config_of(name)), **facts, "dtype": source.dtype}
    model_folder.copy_companions(source.companions, folder, source.window_of(name))
    for file, text in texts.items():
        io.write_text(folder / file, text)
    if _for_gguf(source, name):
        io.write_text(folder / GGUF_CODE, _text(GGUF_CODE))
    if name == "two":
        architecture = facts["architectures"][0]
        io.write_text(folder / CODE, code_of(architecture, rotary.form_of(twin)))
        source.factors.save(folder / "factors.json")
        if rope_hf.BASE_ROPE in config:
            rope_hf.write_exact_short_table(config, rotary.short_table(twin).inv_freq.tolist())
        config["auto_map"] = {"AutoModelForCausalLM": f"{Path(CODE).stem}.{class_name(architecture)}"}
    io.write_json(folder / config_json.NAME, config)
