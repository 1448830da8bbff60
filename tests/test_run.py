"""A run folder belongs to one verb, one config and one set of inputs; only listed keys may change between starts."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run_ranks

from lr2train import io, run
from lr2train.changes import differences
from lr2train.cli.door import door
from lr2train.config import Config, SourceConfig, UserError
from lr2train.parallel.inputs import identities

TRAIN = ("name", "seed", "model", "rope", "data", "parallel", "optim", "engine")


def config(folder: Path, **changes) -> Config:
    return Config(name="one", runs_folder=str(folder), **changes)


def opened(folder: Path, verb: str = "train", **changes) -> run.Run:
    return run.open_run(config(folder, **changes), verb, TRAIN)


def claimed(folder: Path, verb: str = "train", **changes) -> run.Run:
    job = opened(folder, verb, **changes)
    job.lock().close()
    job.claim({})
    return job


def test_opening_a_run_writes_nothing(tmp_path):
    assert not opened(tmp_path).folder.exists()


def test_another_config_is_refused_with_the_keys_that_differ(tmp_path):
    folder = claimed(tmp_path).folder
    before = (folder / "train.config.json").read_bytes()
    with pytest.raises(UserError, match=r"seed: 0 -> 1"):
        opened(tmp_path, seed=1)
    assert (folder / "train.config.json").read_bytes() == before


def test_another_verb_is_refused(tmp_path):
    claimed(tmp_path, "search")
    with pytest.raises(UserError, match="belongs to a run of search"):
        opened(tmp_path, "train")


def changed(folder: Path, key: str, value) -> Config:
    made = config(folder)
    *groups, name = key.split(".")
    target = made
    for group in groups:
        target = getattr(target, group)
    setattr(target, name, value)
    return made


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parallel.sp", 4), ("parallel.timeout_s", 5.0),
        ("engine.recompute", "none"), ("engine.loss_chunk_tokens", 64),
        ("engine.deepspeed", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5}}),
        ("engine.deepspeed", {"zero_optimization": {"zero_hpz_partition_size": 8}}),
        ("engine.checkpoint_every_steps", 7), ("engine.keep_checkpoints", 9), ("engine.max_bad_steps", 1),
        ("engine.resume_from", 3),
        ("optim.steps", 20), ("data.verify", False), ("data.prefetch_steps", 0), ("data.holdout", 0.5),
        ("data.skip_steps", ["3"]),
        ("data.sources", [SourceConfig(name="other")]), ("data.path", "elsewhere"), ("model.path", "elsewhere"),
        ("rope.factors", "elsewhere"),
    ],
)  # fmt: skip
def test_a_key_without_influence_on_the_result_may_change(tmp_path, key, value):
    base = config(tmp_path, optim=replace(Config().optim, steps=10))
    job = run.open_run(base, "train", TRAIN)
    job.lock().close()
    job.claim({})
    made = changed(tmp_path, key, value)
    made.optim.steps = max(made.optim.steps, 10)
    again = run.open_run(made, "train", TRAIN)
    lines = list(differences(job.values, again.values))
    assert lines, "the key belongs to the run's config"
    assert all(line.startswith(key) for line in lines)
    assert again.folder == job.folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1), ("optim.lr", 1e-3), ("optim.steps", 5), ("optim.segments_per_step", 8), ("engine.zero_stage", 1),
        ("model.dtype", "bfloat16"),
        ("data.segment_tokens", 64), ("data.kind", "curriculum"), ("rope.method", "yarn"), ("rope.options",
        {"factor": 8}),
        ("engine.deepspeed", {"prescale_gradients": True}), ("model.overrides", {"sliding_window": None}),
    ],
)  # fmt: skip
def test_a_key_that_changes_the_result_is_refused_by_name(tmp_path, key, value):
    base = config(tmp_path, optim=replace(Config().optim, steps=10))
    job = run.open_run(base, "train", TRAIN)
    job.lock().close()
    job.claim({})
    made = changed(tmp_path, key, value)
    made.optim.steps = value if key == "optim.steps" else 10
    with pytest.raises(UserError, match=key):
        run.open_run(made, "train", TRAIN)


def test_a_key_of_a_later_release_refuses_no_old_run(tmp_path):
    job = claimed(tmp_path)
    saved = io.read_json(job.folder / "train.config.json")
    del saved["engine"]["loss_chunk_tokens"]
    io.write_json(job.folder / "train.config.json", saved)
    assert opened(tmp_path).folder == job.folder


def test_saved_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    job = run.open_run(replace(config(Path("runs")), data=replace(Config().data, path="corpus")), "train", TRAIN)
    job.lock().close()
    job.claim({})
    saved = io.read_json(job.folder / "train.config.json")
    assert saved["data"]["path"] == str(tmp_path / "corpus")
    assert saved["model"]["path"] is None


def test_every_start_notes_its_provenance(tmp_path):
    claimed(tmp_path)
    job = claimed(tmp_path)
    starts = [json.loads(line) for line in (job.folder / "train.provenance.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert all(start["packages"]["torch"] for start in starts)


def test_one_lock_keeps_other_jobs_of_every_verb_out(tmp_path):
    train, search = (
        opened(tmp_path, "train"),
        opened(tmp_path, "search"),
    )  # both opened before either has written anything
    lock = train.lock()
    with pytest.raises(UserError, match=r"in use by train, process \d+"):
        search.lock()
    train.claim({})
    lock.close()
    with pytest.raises(UserError, match="belongs to a run of train"):
        search.lock()
    train.lock().close()


def test_the_fingerprint_of_a_run_does_not_depend_on_what_may_change(tmp_path):
    def fingerprint(folder: str, inputs: dict, **changes) -> str:
        job = opened(tmp_path / folder, **changes)
        job.lock().close()
        job.claim(inputs)
        return job.fingerprint

    inputs = {"corpus": "a", "model": {"content": "b", "files": {"x": [1, 2]}}}
    first = fingerprint("first", inputs)
    again = {"corpus": "a", "model": {"content": "b", "files": {"x": [1, 3]}}}
    assert fingerprint("again", again, parallel=replace(Config().parallel, sp=2)) == first
    assert fingerprint("seed", inputs, seed=1) != first
    assert fingerprint("corpus", {**inputs, "corpus": "c"}) != first


def test_an_interrupted_job_that_said_so_ends_with_130_and_no_second_sentence(capsys):
    with pytest.raises(SystemExit) as end, door("train"):
        raise run.Interrupted
    assert end.value.code == 130
    assert capsys.readouterr().err == ""


def inputs_of(rank: int, world: int, folder: Path, text: str) -> list[str]:
    """What a rank hears of a model of two files: at the first start, after a change of times, after a change of
    contents.
    """
    import torch.distributed as dist

    job = opened(folder)
    files = [folder / "a.safetensors", folder / "config.json"]
    heard = []
    for change in (None, touch, rewrite):
        if rank == 0 and change:
            change(files[0])
        dist.barrier()
        try:
            found = identities(job, {"corpus": text}, {"model": files})
            job.claim(found)
            heard.append(found["model"]["content"])
        except UserError as error:
            heard.append(str(error))
        dist.barrier()
    return heard


def touch(file: Path) -> None:
    os.utime(file, (1, 1))


def rewrite(file: Path) -> None:
    file.write_bytes(b"other weights")


def test_contents_decide_whether_an_input_is_the_same_and_all_ranks_hear_it(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "a.safetensors").write_bytes(b"these weights")
    (tmp_path / "config.json").write_text("{}")
    first, second = run_ranks(inputs_of, 2, tmp_path, "corpus", tmp_path=tmp_path)
    assert first == second
    before, touched, other = first
    assert before == touched
    assert "made from another model than is there now" in other


def test_a_key_of_a_later_release_counts_where_its_default_is_not_what_earlier_ones_did():
    """A search of an earlier release has the paper's factors below the critical index."""
    old = {"search": {"seed": 0}}
    assert list(differences(old, {"search": {"seed": 0, "head": "yarn"}})) == ["search.head: 'ntk' -> 'yarn'"]
    assert list(differences(old, {"search": {"seed": 0, "head": "ntk"}})) == []
    assert list(differences(old, {"search": {"seed": 0, "texts": 3}})) == []
