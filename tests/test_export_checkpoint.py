"""An export from a checkpoint equals the export of the finished run, byte for byte, on one process and without a
model folder.
"""

import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from ranks import run_ranks

from lr2train.cli.composition import compose
from lr2train.config import UserError
from lr2train.export import export
from lr2train.model import load
from lr2train.parallel import processes
from lr2train.train import train

EXPERTS = {
    "model_type": "mixtral", "vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": tiny.L0, "num_local_experts": 4, "num_experts_per_tok": 2, "bos_token_id": 0,
    "eos_token_id": 1, "initializer_range": 0.3, "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}  # fmt: skip
# name -> (ranks, overrides)
RUNS = {
    "llama_bfloat16": (2, ["model.dtype=bfloat16"]),
    "mixtral": (2, []),
    "tied_bfloat16": (1, ["model.dtype=bfloat16", "model.overrides.tie_word_embeddings=true"]),
    "stage_1": (2, ["engine.zero_stage=1"]),
    "stage_0": (1, ["engine.zero_stage=0"]),
    "tied_stage_0": (1, ["engine.zero_stage=0", "model.overrides.tie_word_embeddings=true"]),
}


pytestmark = pytest.mark.usefixtures("no_trace_of_a_job")


@pytest.fixture(scope="module")
def world(world) -> Path:
    hf_config = load.config_of(load.ModelConfig(architecture=EXPERTS))
    torch.manual_seed(0)
    model = load.assembled(hf_config, "float32", load.scratch_weights(hf_config, 0), lambda: torch.device("cpu"))
    load.write_folder(model, load.plain_config(hf_config), world / "mixtral_base")
    return world


def trained(rank: int, world: int, arguments: list[list[str]]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world))
    with mock.patch.object(processes, "stop"):  # the process group is of the caller
        for one in arguments:
            train(compose("train", one))


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> Path:
    """Finished runs of two steps, each with a checkpoint after the second."""
    for n_ranks in (1, 2):
        given = []
        for name, (ranks, more) in RUNS.items():
            if ranks == n_ranks:
                base = "mixtral_base" if name == "mixtral" else "base"
                given.append(tiny.arguments(
                    world, f"name={name}", f"model.path={world / base}", "rope=longrope2",
                    "rope.factors=null", "rope.critical_index=3", "rope.tail=[4.5,5.0,5.5,6.0,7.0]",
                    "rope.attention_factor=1.2", f"data.segment_tokens={tiny.L}", "optim.steps=2",
                    f"optim.segments_per_step={n_ranks}", "optim.lr=1e-2", "optim.warmup_steps=0", "logger=jsonl",
                    "engine.validate_every_steps=0", "engine.checkpoint_every_steps=2", *more,
                ))  # fmt: skip
        run_ranks(trained, n_ranks, given, tmp_path=tmp_path_factory.mktemp("ranks"), timeout_s=120)
    return world


def exported(runs: Path, name: str, folder: Path, *more: str):
    return export(compose("export", [f"runs_folder={runs}", f"run={name}", f"export.folder={folder}", *more]))


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the record, which names what a folder was made from."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "lr2train.json"
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_is_exported_like_the_finished_run(runs, tmp_path, name):
    exported(runs, name, tmp_path / "finished", "export.check=false")
    unfinished = tmp_path / "runs" / name
    shutil.copytree(runs / name, unfinished)
    (unfinished / "train.json").unlink()
    shutil.rmtree(unfinished / "model")
    with pytest.raises(UserError, match=r"is not finished .* set export\.checkpoint=last"):
        exported(tmp_path / "runs", name, tmp_path / "refused")
    found = exported(tmp_path / "runs", name, tmp_path / "checkpoint", "export.checkpoint=last")
    assert found["checkpoint"] == 2
    assert contents(tmp_path / "checkpoint") == contents(tmp_path / "finished")
    differences = [v for said in found["folders"].values() for k, v in said.items() if k.endswith("difference")]
    assert max(differences) < (1 if "bfloat16" in name else 1e-4)  # logits of up to 20
    again = exported(tmp_path / "runs", name, tmp_path / "checkpoint", "export.checkpoint=2", "export.check=false")
    assert not any(said["written"] for said in again["folders"].values())


def test_another_dtype_is_rounded_from_the_models(runs, tmp_path):
    exported(
        runs,
        "llama_bfloat16",
        tmp_path / "finished",
        "export.dtype=float32",
        "export.runtime=vllm",
        "export.check=false",
    )
    given = ["export.dtype=float32", "export.runtime=vllm", "export.check=false", "export.checkpoint=last"]
    exported(runs, "llama_bfloat16", tmp_path / "checkpoint", *given)
    assert contents(tmp_path / "checkpoint") == contents(tmp_path / "finished")


def test_no_such_or_no_whole_checkpoint_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match=r"export\.checkpoint=1 .* holds the steps 2; set export\.checkpoint to one"):
        exported(runs, "stage_0", tmp_path / "e", "export.checkpoint=1")
    shutil.copytree(runs / "mixtral", tmp_path / "mixtral")
    shard = next((tmp_path / "mixtral" / "checkpoints" / "step_00000002").glob("*rank_1_*optim*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"optim_states\.pt does not have the checksum that it was written with"):
        exported(tmp_path, "mixtral", tmp_path / "e", "export.checkpoint=last")
    shard.write_bytes(data[:-10])
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        exported(tmp_path, "mixtral", tmp_path / "e", "export.checkpoint=last")
    assert not (tmp_path / "e").exists()
