"""The tables of an export in a GGUF, read back with the gguf package."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import serving_families as families
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from serving_families import L0, L

from lr2train import io
from lr2train.config import Config, UserError
from lr2train.export import _names
from lr2train.rope import METHODS, Spectrum
from lr2train.serving import engines, folders, gguf_longrope
from lr2train.serving.gguf_longrope import Refusal, add_tables
from tools.serving import runtimes

gguf = pytest.importorskip("gguf", reason="pip install -r requirements-gguf.txt")
Type = gguf.GGMLQuantizationType
CARDS = dict.fromkeys(folders.FOLDERS, "a card")
OWN_SHORT = "phi3, own short table"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Exports by family: folders with long/ and two/."""
    root = tmp_path_factory.mktemp("world")
    for family in ("llama", OWN_SHORT, "qwen3, norms of a head"):
        trained = families.train(root / family / "model", family, torch.float32)
        folders.write(trained.source("bfloat16"), root / family, folders.FOLDERS, CARDS)
    return root


def convert(folder: Path, out: Path, kind=Type.BF16, alignment: int = 32, change=lambda writer: None, **keys) -> Path:
    """A GGUF of a folder, as a converter writes it: other names, keys of the sizes, a vocabulary, no RoPE tables.

    Args:
        kind: of matrices; norms are F32.
        keys: of the architecture, in the place of the folder's own.
        change: called with the writer before the file is written.
    """
    config = io.read_json(folder / "config.json")
    arch = {"llama": "llama", "phi3": "phi3", "qwen3": "qwen3"}[config["model_type"]]
    writer = gguf.GGUFWriter(out, arch)
    writer.add_custom_alignment(alignment)
    writer.add_name("a model")
    writer.add_token_list(["<unk>", "é", *(f"t{n}" for n in range(38))])
    writer.add_token_scores([0.5] * 40)
    writer.add_token_types([1] * 40)
    writer.add_add_bos_token(True)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config["rope_parameters"]
    sizes = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "rope.dimension_count": int(head_dim * (rope.get("partial_rotary_factor") or 1)),
    }
    for key, value in {**sizes, **keys}.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA if arch == "llama" else gguf.MODEL_ARCH.PHI3, 2)
    for published, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.float().numpy()
        own = Type.F32 if values.ndim == 1 else kind if values.shape[-1] % 32 == 0 else Type.F16
        name = names.get_name(published, try_suffixes=(".weight",)) or published
        writer.add_tensor(name, gguf.quants.quantize(values, own), raw_dtype=own)
    change(writer)
    with mock.patch("gguf.gguf_writer.logger"):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


def keys_of(file: Path) -> dict:
    fields = gguf.GGUFReader(file).fields.values()
    return {one.name: one.contents() for one in fields if not one.name.startswith("GGUF.")}


def tensors_of(file: Path) -> dict:
    return {one.name: one for one in gguf.GGUFReader(file).tensors}


# ---- what is written ----


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0])
@pytest.mark.parametrize("name", ["long", "two"])
def test_a_gguf_gets_the_tables_and_keeps_everything_else(world, tmp_path, name, kind):
    folder = world / "llama" / name
    converted = convert(folder, tmp_path / "converted.gguf", kind)
    add_tables(converted, folder, tmp_path / "model.gguf")
    rope = io.read_json(folder / "config.json")["rope_parameters"]
    before, after = keys_of(converted), keys_of(tmp_path / "model.gguf")
    added = {
        "llama.context_length": L,
        "llama.rope.scaling.type": "longrope",
        "llama.rope.scaling.original_context_length": L if name == "long" else L0,
        "llama.rope.scaling.attn_factor": float(np.float32(1.0 if name == "long" else 1.3)),
    }
    assert after == {**before, **added}
    before, after = tensors_of(converted), tensors_of(tmp_path / "model.gguf")
    for window in ("long", "short"):
        table = after.pop(f"rope_factors_{window}.weight")
        assert table.tensor_type == Type.F32
        assert table.data.tolist() == np.float32(rope[f"{window}_factor"]).tolist()
    assert after.keys() == before.keys()
    for tensor, one in before.items():
        assert (one.tensor_type, one.shape.tolist()) == (after[tensor].tensor_type, after[tensor].shape.tolist())
        assert one.data.tobytes() == after[tensor].data.tobytes()


def test_a_short_table_and_its_attention_factor_are_the_bases_own(world, tmp_path):
    folder = world / OWN_SHORT / "two"
    converted = convert(folder, tmp_path / "converted.gguf")
    tables = add_tables(converted, folder, tmp_path / "model.gguf")
    short = tensors_of(tmp_path / "model.gguf")["rope_factors_short.weight"].data
    assert short.tolist() == np.float32(families.OWN_TABLE["short_factor"]).tolist()
    own = io.read_json(folder / "config.json")["rope_parameters"]["short_mscale"]
    assert (tables.short_scale, tables.long_scale) == (own, 1.3)
    assert own != 1


def test_tables_in_a_gguf_are_replaced_and_the_same_inputs_give_the_same_bytes(world, tmp_path):
    folder = world / "llama" / "two"
    tables = {"rope_freqs.weight": np.ones(4, np.float32), "rope_factors_long.weight": np.ones(4, np.float32)}

    def other_rope(writer):
        for name, table in tables.items():
            writer.add_tensor(name, table)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_attn_factors(2.0)
        writer.add_rope_scaling_finetuned(True)

    plain = convert(folder, tmp_path / "plain.gguf")
    treated = convert(folder, tmp_path / "treated.gguf", change=other_rope)
    add_tables(plain, folder, tmp_path / "a.gguf")
    add_tables(plain, folder, tmp_path / "b.gguf")
    add_tables(tmp_path / "a.gguf", folder, tmp_path / "c.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert keys_of(tmp_path / "a.gguf") == keys_of(tmp_path / "c.gguf")
    add_tables(treated, folder, tmp_path / "d.gguf")
    assert keys_of(tmp_path / "d.gguf") == {**keys_of(tmp_path / "a.gguf"), "llama.rope.scaling.finetuned": True}
    assert tensors_of(tmp_path / "d.gguf").keys() == tensors_of(tmp_path / "a.gguf").keys()


def test_the_alignment_of_the_file_is_kept(world, tmp_path):
    folder = world / "llama" / "two"
    converted = convert(folder, tmp_path / "converted.gguf", alignment=128)
    add_tables(converted, folder, tmp_path / "model.gguf")
    after = tensors_of(tmp_path / "model.gguf")
    assert {one.data_offset % 128 for one in after.values()} == {0}
    assert all(one.data.tobytes() == after[name].data.tobytes() for name, one in tensors_of(converted).items())


# ---- what is refused ----


def split(writer):
    writer.add_uint16("split.count", 3)


REFUSED = {
    "architecture": ("qwen3, norms of a head", {}, "llama.cpp takes no RoPE tables for qwen3"),
    "layers": ("llama", {"block_count": 3}, r"llama\.block_count is 3 there, and 2 in this folder"),
    "rotated": ("llama", {"rope.dimension_count": 16}, r"llama\.rope\.dimension_count is 16 there, and 8"),
    "split": ("llama", {"change": split}, "llama-gguf-split --merge"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_gguf_that_the_tables_do_not_fit_is_refused(world, tmp_path, case):
    family, keys, message = REFUSED[case]
    folder = world / family / "two"
    converted = convert(folder, tmp_path / "converted.gguf", **keys)
    with pytest.raises(Refusal, match=message):
        add_tables(converted, folder, tmp_path / "model.gguf")
    assert os.listdir(tmp_path) == ["converted.gguf"]


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0])
@pytest.mark.parametrize(("of", "used"), [("long", "two"), ("two", "long")])
def test_weights_with_and_without_the_attention_factor_are_told_apart(world, tmp_path, of, used, kind):
    converted = convert(world / "llama" / of, tmp_path / "converted.gguf", kind)
    with pytest.raises(Refusal, match=r"blk\.0\.attn_k\.weight is (1\.3|0\.769) times as large"):
        add_tables(converted, world / "llama" / used, tmp_path / "model.gguf")
    assert os.listdir(tmp_path) == ["converted.gguf"]


def test_a_gguf_of_another_training_is_refused(world, tmp_path):
    converted = convert(world / "llama" / "two", tmp_path / "converted.gguf")
    other = shutil.copytree(world / "llama" / "two", tmp_path / "other", copy_function=shutil.copy)
    values = load_file(other / "model.safetensors")
    values["model.norm.weight"] *= 1.01
    save_file(values, other / "model.safetensors")
    with pytest.raises(Refusal, match=r"has other weights \(output_norm\.weight\)"):
        add_tables(converted, other, tmp_path / "model.gguf")


@pytest.mark.parametrize("keep", [0, 3, 1000, -1])
def test_a_file_that_is_cut_short_is_refused(world, tmp_path, keep):
    converted = convert(world / "llama" / "two", tmp_path / "converted.gguf")
    converted.write_bytes(converted.read_bytes()[:keep])
    with pytest.raises(Refusal, match=r"converted\.gguf cannot be read as GGUF"):
        add_tables(converted, world / "llama" / "two", tmp_path / "model.gguf")
    assert os.listdir(tmp_path) == ["converted.gguf"]


def test_the_other_byte_order_is_refused(world, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(Refusal, match="without --bigendian"):
        add_tables(tmp_path / "big.gguf", world / "llama" / "two", tmp_path / "model.gguf")


def test_files_are_neither_replaced_nor_left_unfinished(world, tmp_path, monkeypatch):
    folder = world / "llama" / "two"
    converted = convert(folder, tmp_path / "converted.gguf")
    before = converted.read_bytes()
    with pytest.raises(Refusal, match=r"converted\.gguf exists and would be replaced"):
        add_tables(converted, folder, converted)
    full = mock.Mock(side_effect=[None, OSError(28, "No space left on device")])
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(Refusal, match=r"model\.gguf cannot be written \(No space left on device\)"):
        add_tables(converted, folder, tmp_path / "model.gguf")
    assert full.call_count == 2
    assert os.listdir(tmp_path) == ["converted.gguf"]
    assert converted.read_bytes() == before


def test_a_folder_without_tables_is_refused(world, tmp_path):
    converted = convert(world / "llama" / "short", tmp_path / "converted.gguf")
    with pytest.raises(Refusal, match="has no long_factor; use the folder two/ or long/"):
        add_tables(converted, world / "llama" / "short", tmp_path / "model.gguf")
    with pytest.raises(Refusal, match=r"config\.json cannot be read.*; run the script that lies in long/ or two/"):
        add_tables(converted, tmp_path, tmp_path / "model.gguf")


def test_tensors_are_copied_from_the_file_and_not_held(world, tmp_path, monkeypatch):
    folder, held = world / "llama" / "two", []
    converted = convert(folder, tmp_path / "converted.gguf")
    write = gguf.GGUFWriter.write_tensor_data

    def watched(writer, tensor):
        base = tensor
        while isinstance(base.base, np.ndarray):
            base = base.base
        if not isinstance(base, np.memmap):
            held.append(tensor.nbytes)
        write(writer, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", watched)
    add_tables(converted, folder, tmp_path / "model.gguf")
    assert held == [16, 16], "the two tables alone"


# ---- the script in the folders, and what is said about it ----


def run(script: Path, *arguments: object, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, **more)


def test_the_script_lies_in_the_folders_that_need_it_and_runs_without_lr2train(world, tmp_path):
    assert not (world / "llama" / "short" / folders.GGUF_CODE).exists()
    assert not (world / "qwen3, norms of a head" / "two" / folders.GGUF_CODE).exists()
    folder = shutil.copytree(world / "llama" / "two", tmp_path / "model")
    convert(folder, tmp_path / "converted.gguf")
    environment = {**os.environ, "PYTHONPATH": str(Path(gguf.__file__).parents[1])}
    done = run(folder / folders.GGUF_CODE, "converted.gguf", "m.gguf", cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "m.gguf is written",
        f"texts of {L0 + 1} to {L} tokens: llama-server -m m.gguf -c {L}",
    ], "llama.cpp has no context of 32 tokens"
    done = run(folder / folders.GGUF_CODE, "converted.gguf", "m.gguf", cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: m.gguf exists and would be replaced; name a new file\n"


def test_without_the_package_the_script_names_it(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(sys, "argv", ["script", str(tmp_path / "a.gguf"), str(tmp_path / "b.gguf")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(world / "llama" / "two" / folders.GGUF_CODE), run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: gguf is not installed; install it with pip install gguf\n"


@given(st.integers(256, 2**20), st.floats(1, 2), st.floats(1, 2))
def test_the_flags_of_the_short_window(original, short, long):
    context, factor = re.fullmatch(
        r"-c (\d+)(?: --yarn-attn-factor (\S+))?", gguf_longrope.short_flags(original, short / long)
    ).groups()
    assert original - 256 < int(context) <= original, "a longer context would take the long table"
    assert int(context) % 256 == 0
    assert np.float32(factor or 1) * np.float32(long) == pytest.approx(short, rel=2e-7)


FACTORS = METHODS["yarn"](Spectrum(8, 10000.0, 4096), 16384)


def lines(plain_short: bool = True, **config) -> list[engines.Line]:
    windows = engines.Windows(FACTORS, plain_short=plain_short, config=config)
    return [line for line in engines.lines_of(windows, folders.FOLDERS) if line.runtime == "llama.cpp"]


def test_each_window_has_its_command():
    ratio = 1 / FACTORS.attention_factor
    long, short, one_table, alone = lines(model_type="llama")
    assert (long.folder, short.folder, one_table.folder, alone.folder) == ("two", "two", "long", "short")
    for line in (long, one_table):
        assert line.command.endswith(
            "{folder}/gguf_longrope.py converted.gguf model.gguf && llama-server -m model.gguf -c 16384"
        )
        assert line.exact == "texts of 4097 to 16384 tokens"
    assert short.command == f"llama-server -m model.gguf -c 4096 --yarn-attn-factor {ratio:.9g}"
    assert "gguf_longrope" not in alone.command
    assert [line.folder for line in lines(model_type="phi3", plain_short=False)] == ["two", "two", "long"]


@pytest.mark.parametrize(("kind", "limited"), [("dynamic", True), ("linear", True), ("default", False)])
def test_a_server_of_the_short_window_ends_at_it(kind, limited):
    """vLLM and SGLang would multiply the window of such a base by its factor."""
    config = {
        "model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0},
    }  # fmt: skip
    found = engines.lines_of(engines.Windows(FACTORS, config=config), ("short",))
    commands = {line.runtime: line.command for line in found}
    assert commands["vLLM"].endswith(" --max-model-len 4096") == limited
    assert commands["SGLang"].endswith(" --context-length 4096") == limited


def test_an_architecture_without_tables_has_its_short_window_alone():
    (line,) = lines(model_type="qwen3")
    assert line.folder == "short"
    assert "takes no RoPE tables for qwen3: do not convert long/ or two/" in line.limits


def test_a_sliding_window_that_llama_cpp_lacks_is_no_promise():
    """Its graphs of Mistral and Phi-3 attend to the whole text."""
    assert (
        len(lines(model_type="mistral", sliding_window=None))
        == len(lines(model_type="phi3", sliding_window=2**18))
        == 4
    )
    (line,) = lines(model_type="mistral", sliding_window=4096)
    assert (line.folder, line.limits) == (
        "short",
        "llama.cpp has no sliding window for mistral: do not convert long/ or two/.",
    )
    assert lines(model_type="phi3", sliding_window=2047) == []


def test_the_serving_check_asks_llama_cpp_for_both_contexts(world, tmp_path):
    (tmp_path / "two").mkdir()
    shutil.copy(world / "llama" / "two" / "config.json", tmp_path / "two")
    with pytest.raises(UserError, match=r"gguf holds no GGUF; make two\.gguf there"):
        runtimes.llama(tmp_path)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "two.gguf").touch()
    both = runtimes.llama(tmp_path)[0]
    assert both.folder == tmp_path / "gguf" / "two.gguf"
    assert both.options == {"original": {"tokens": L0, "attn_factor": 1 / 1.3}}
    assert set(both.exact) == {row.case for batch in both.batches for row in batch} == set(runtimes.EVERY)


def test_an_export_for_llama_cpp_is_refused_where_it_takes_no_tables(world):
    config = Config()
    config.export.runtime = "gguf"
    sources = [
        folders.Source(Path(), io.read_json(world / family / "two" / "config.json"), FACTORS, "bfloat16")
        for family in ("llama", "qwen3, norms of a head")
    ]
    assert _names(config, sources[0]) == ("long", "two")
    with pytest.raises(UserError, match=r"^llama.cpp takes no RoPE tables for qwen3.*; set export\.runtime=all"):
        _names(config, sources[1])
