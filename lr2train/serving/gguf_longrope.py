"""Add the RoPE tables of this folder to a GGUF that llama.cpp's converter made of this folder.

    pip install gguf                                                        (llama.cpp's requirements have it)
    python convert_hf_to_gguf.py FOLDER --outfile converted.gguf            (llama.cpp's own script, any --outtype)
    python FOLDER/gguf_longrope.py converted.gguf model.gguf
    llama-quantize model.gguf smaller.gguf Q4_K_M                           (if wanted; before or after this script)

The converter writes the tables of the Phi-3 family alone. Of a Llama or Mistral it writes the type ``longrope``
without tables, and llama.cpp computes plain RoPE at every length. This script adds the tensors ``rope_factors_long``
and ``rope_factors_short``, the attention factor, the original and the new window. Everything else is copied.

llama.cpp takes one table for a whole context: the long one if a sequence may have more than L0 tokens (``-c``), else
the short one. It has one attention factor for both, the long table's. ``--yarn-attn-factor`` corrects the factor in a
context of L0 tokens. The script prints both commands.

Choice: this file needs no lr2train, because who converts a model has llama.cpp and not its trainer. Tensors are copied
one by one from a memory-mapped file. The new file appears whole or not at all; the same inputs give the same bytes.
Cost: the disk holds both files.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

# Architectures of llama.cpp that load rope_factors_long and rope_factors_short, by the names in a GGUF. "llama" is
# Mistral and Mixtral too. Run: llama, phi3, granite.
TAKES_TABLES = ("llama", "mistral3", "phi3", "phimoe", "granite", "granitemoe")
NAME = Path(__file__).name
PADDING_TOKENS = 256  # llama.cpp rounds a context up to a multiple
TABLES = ("rope_factors_long.weight", "rope_factors_short.weight")
_REPLACED_TENSORS = (*TABLES, "rope_freqs.weight")
_REPLACED_KEYS = ("context_length", "rope.scale_linear")
_KEPT_SCALING = ("rope.scaling.finetuned",)  # Granite's switch of RoPE
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_K_TENSORS = {"attn_k": "k_proj", "attn_qkv": "qkv_proj"}  # the weights that hold an attention factor, if any
_EXACT_BITS = 8  # weights of at least so many bits keep the norm of a matrix within _TOLERANCE
_TOLERANCE = 0.01
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class Refusal(Exception):
    """Wrong input; the message is one sentence for the user."""


@dataclass(frozen=True)
class Tables:
    """The RoPE of a folder.

    Attributes:
        original, target: windows L0 and L in tokens; equal in a folder with one table.
        short, long: rescale factors, one for each pair of rotated dimensions.
        short_scale, long_scale: attention factors.
        base: rope_theta.
    """

    original: int
    target: int
    short: list[float]
    long: list[float]
    short_scale: float
    long_scale: float
    base: float

    @classmethod
    def of(cls, config: dict[str, Any]) -> Tables:
        """From config.json.

        Raises:
            Refusal: the config has no ``longrope`` tables.
        """
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if "long_factor" not in rope:
            raise Refusal("config.json has no long_factor; use the folder two/ or long/ of an lr2train export")
        return cls(
            rope["original_max_position_embeddings"],
            config["max_position_embeddings"],
            rope["short_factor"],
            rope["long_factor"],
            rope.get("short_mscale") or 1.0,
            rope["attention_factor"],
            rope["rope_theta"],
        )

    def commands(self, file: Path) -> list[str]:
        """How llama.cpp serves the file, a line for each window."""
        serve = f"llama-server -m {file}"
        if self.target == self.original:
            return [f"all texts, of up to {self.target} tokens: {serve} -c {self.target}"]
        lines = [f"texts of {self.original + 1} to {self.target} tokens: {serve} -c {self.target}"]
        if context := short_context(self.original):
            flags = short_flags(self.original, self.short_scale / self.long_scale)
            lines.append(f"texts of up to {context} tokens: {serve} {flags}")
        return lines


def short_context(original: int) -> int:
    """The largest context of llama.cpp with the short table, in tokens; 0: none. ``original`` is L0."""
    return original // PADDING_TOKENS * PADDING_TOKENS


def short_flags(original: int, ratio: float) -> str:
    """Flags of llama.cpp for texts of the short window.

    Args:
        original: L0 in tokens.
        ratio: attention factor of the short window, divided by the long window's, which is in the GGUF.
    """
    return f"-c {short_context(original)}" + ("" if ratio == 1 else f" --yarn-attn-factor {ratio:.9g}")


def add_tables(converted: Path, folder: Path, out: Path) -> Tables:
    """Write ``out``: the GGUF ``converted`` with the tables of a folder.

    Args:
        converted: a GGUF in one file, of any quantisation; tables in it are replaced.
        folder: config.json and safetensors of the model that was converted.
        out: does not exist.

    Raises:
        Refusal: llama.cpp takes no tables for the architecture; the GGUF is not of this folder; or a file cannot be
            read. Nothing is written then.
    """
    if out.exists():
        raise Refusal(f"{out} exists and would be replaced; name a new file")
    config = _config_of(folder)
    tables, reader = Tables.of(config), _read(converted)
    _refuse_architecture(reader, converted, tables)
    _refuse_other_sizes(reader, converted, config, tables)
    _refuse_other_weights(reader, converted, folder)
    _write(reader, tables, out)
    return tables


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(
            f"{folder / 'config.json'} cannot be read ({error}); run the script that lies in long/ or two/"
        ) from error


def _read(converted: Path) -> Any:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(converted)
    except OSError as error:
        raise Refusal(f"{converted} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, IndexError) as error:
        raise Refusal(f"{converted} cannot be read as GGUF ({error}); convert the folder anew") from error
    if reader.byte_order != "I":
        raise Refusal(f"{converted} is for machines of the other byte order; convert the folder without --bigendian")
    if (_value(reader, "split.count") or 1) > 1:
        raise Refusal(f"{converted} is one part of a model; join the parts with llama-gguf-split --merge")
    return reader


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _architecture(reader: Any) -> str:
    return _value(reader, "general.architecture")


def _refuse_architecture(reader: Any, converted: Path, tables: Tables) -> None:
    if (architecture := _architecture(reader)) not in TAKES_TABLES:
        raise Refusal(
            f"llama.cpp takes no RoPE tables for {architecture}, the architecture of {converted}, and would compute "
            f"plain RoPE at every length; convert the folder short/ instead, for texts of up to {tables.original} "
            "tokens"
        )


def _refuse_other_sizes(reader: Any, converted: Path, config: dict[str, Any], tables: Tables) -> None:
    architecture = _architecture(reader)
    wanted = {key: config[name] for key, name in _SIZES.items() if config.get(name) is not None}
    wanted["rope.freq_base"] = float(np.float32(tables.base))
    wanted["rope.dimension_count"] = 2 * len(tables.long)
    for key, value in wanted.items():
        found = _value(reader, f"{architecture}.{key}")
        if found is not None and any(one != value for one in np.atleast_1d(found)):
            raise Refusal(
                f"{converted} is of another model: {architecture}.{key} is {found} there, and {value} in this folder; "
                "convert this folder"
            )


def _refuse_other_weights(reader: Any, converted: Path, folder: Path) -> None:
    """Compare the last norm, which every quantisation keeps in fp32, and the size of the first layer's keys.

    The keys tell long/ (attention factor in the weights) from two/.
    """
    tensors = {one.name: one for one in reader.tensors}
    norm, own = tensors.get("output_norm.weight"), _published(folder, "model.norm.weight")
    if norm is not None and own is not None and not np.array_equal(norm.data, own):
        raise Refusal(f"{converted} has other weights (output_norm.weight) than this folder; convert this folder")
    for name, module in _K_TENSORS.items():
        tensor, own = (
            tensors.get(f"blk.0.{name}.weight"),
            _published(folder, f"model.layers.0.self_attn.{module}.weight"),
        )
        if tensor is None or own is None or 8 * tensor.n_bytes < _EXACT_BITS * tensor.n_elements:
            continue
        ratio = float(np.linalg.norm(_dequantized(tensor)) / np.linalg.norm(own))
        if abs(ratio - 1) > _TOLERANCE:
            raise Refusal(
                f"{converted} has other weights than this folder: {tensor.name} is {ratio:.3g} times as large; convert "
                "this folder, as long/ and two/ have different weights"
            )


def _dequantized(tensor: Any) -> np.ndarray:
    from gguf import dequantize

    return dequantize(tensor.data, tensor.tensor_type)


def _published(folder: Path, name: str) -> np.ndarray | None:
    """A tensor of the folder's safetensors in fp32; None if the folder has no such tensor."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            said = json.loads(stream.read(header_bytes)).get(name)
            if said is not None:
                start, stop = said["data_offsets"]
                stream.seek(8 + header_bytes + start)
                values = np.frombuffer(stream.read(stop - start), dtype=_NUMPY[said["dtype"]])
                return _widened(values, said["dtype"]).reshape(said["shape"])
    return None


def _widened(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of an fp32 number
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _write(reader: Any, tables: Tables, out: Path) -> None:
    from gguf import GGUFWriter

    temporary = out.with_name(f".{out.name}.tmp")
    writer = GGUFWriter(temporary, _architecture(reader))
    _add_keys(writer, reader, tables)
    kept = [one for one in reader.tensors if one.name not in _REPLACED_TENSORS]
    added = {
        name: np.asarray(table, dtype=np.float32)
        for name, table in zip(TABLES, (tables.long, tables.short), strict=True)
    }
    for name, table in added.items():
        writer.add_tensor_info(name, table.shape, table.dtype, table.nbytes)
    for one in kept:
        writer.add_tensor_info(one.name, one.data.shape, one.data.dtype, one.data.nbytes, one.tensor_type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for data in (*added.values(), *(one.data for one in kept)):
            writer.write_tensor_data(data)
        writer.flush()
        for stream in writer.fout or ():
            os.fsync(stream.fileno())
        writer.close()
        temporary.rename(out)
    except OSError as error:
        raise Refusal(f"{out} cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _add_keys(writer: Any, reader: Any, tables: Tables) -> None:
    from gguf import GGUFValueType, RopeScalingType

    prefix = f"{_architecture(reader)}."
    for field in reader.fields.values():
        own = field.name.removeprefix(prefix)
        replaced = own in _REPLACED_KEYS or (own.startswith("rope.scaling.") and own not in _KEPT_SCALING)
        if replaced or field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        if kind == GGUFValueType.ARRAY and not len(field.data):
            continue  # the writer has no empty arrays, and llama.cpp no need of one
        sub_type = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
    writer.data_alignment = int(reader.alignment)
    writer.add_context_length(tables.target)
    writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(tables.original)
    writer.add_rope_scaling_attn_factors(tables.long_scale)


def main() -> None:
    """The command line; exit code 2 for wrong input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("converted", type=Path, help="GGUF that llama.cpp's converter made of this folder")
    parser.add_argument("out", type=Path, help="the new GGUF")
    given = parser.parse_args()
    logging.disable(logging.INFO)
    try:
        tables = add_tables(given.converted, Path(__file__).parent, given.out)
    except ImportError as error:
        _die(f"{error.name} is not installed; install it with pip install gguf")
    except Refusal as refusal:
        _die(str(refusal))
    for line in (f"{given.out} is written", *tables.commands(given.out)):
        print(line)


def _die(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
