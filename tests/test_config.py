"""Configs: every experiment composes, bad keys and values are named, a run folder belongs to one config."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lr2train import io, run
from lr2train.config import CONF_FOLDER, READS, Config, UserError, compose, reads

EXPERIMENTS = sorted(path.stem for path in (CONF_FOLDER / "experiment").glob("*.yaml"))
GROUPS = [(path.parent.name, path.stem) for path in sorted(CONF_FOLDER.glob("*/*.yaml")) if path.parent.name not in ("experiment", "local")]
VERBS = sorted(READS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_experiment_composes_for_every_verb(verb, experiment):
    composed = compose(verb, [f"experiment={experiment}", "name=x"])
    assert composed.name == "x"
    assert composed.rope.target_window_tokens > 0


@pytest.mark.parametrize(("group", "choice"), GROUPS)
def test_every_choice_of_every_group_composes(group, choice):
    assert compose("train", ["name=x", "model=tiny_llama", f"{group}={choice}"]).name == "x"


def test_the_papers_settings():
    llama = compose("train", ["experiment=llama3_8b_128k", "name=x"])
    assert (llama.rope.target_window_tokens, llama.optim.segments_per_step, llama.optim.lr, llama.optim.schedule) == (
        131072,
        64,
        2e-5,
        "cosine",
    )
    assert (llama.rope.critical_index, len(llama.rope.tail)) == (33, 31)
    paper = compose("search", ["experiment=llama3_8b_128k", "search=paper", "name=x"]).search
    assert (paper.questions, paper.racing, paper.search_attention_factor, paper.final_documents) == (1, False, False, 0)
    assert (paper.population, paper.generations, paper.mutation_probability, paper.documents) == (
        64,
        40,
        0.3,
        10,
    )
    assert llama.data.short_tokens + llama.data.long_tokens == 10_000_000_000


@pytest.mark.parametrize(
    ("override", "tells"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean lr?"]),
        ("optim.lr=fast", ["optim.lr", "fast", "Float"]),
        ("optim.lr=-1", ["optim.lr=-1", "not above 0"]),
        ("data.long_attention=all", ["long_attention", "all", "segment, document"]),
        ("model.dtype=int8", ["model.dtype=int8", "float32, bfloat16"]),
        ("experiment=nope", ["experiment/nope", "tiny_4k"]),
        ("parallel.sp=3", ["data.segment_tokens=4096", "parallel.sp=3", "set parallel.sp to 1"]),
        ("parallel.sp=0", ["parallel.sp=0", "below 1"]),
        ("search.top_k=99", ["search.top_k=99", "search.population=16"]),
        ("data.holdout=2", ["data.holdout=2", "between 0 and 1"]),
        ("search.looks=0.5", ["search.looks=0.5", "below 1"]),
        ("search.looks=nan", ["search.looks=nan", "finite"]),
        ("search.algorithm=annealing", ["search.algorithm=annealing", "evolution, surrogate, cmaes"]),
        ("inspect.segment=-1", ["inspect.segment=-1", "below 0"]),
        ("=3", ["=3", "key=value"]),
        ("name=", ["name=''", "runs_folder=runs"]),
        ("name=../out", ["name='../out'", "begin with a letter"]),
        ("name=a/b", ["name='a/b'"]),
    ],
)
def test_bad_input_names_key_value_and_limit(override, tells):
    experiment = [] if override.startswith("experiment") else ["experiment=tiny_4k"]
    with pytest.raises(UserError) as error:
        compose(_reader(override), [*experiment, "name=x", override])
    sentence = str(error.value)
    assert all(part in sentence for part in tells), sentence
    assert "\n" not in sentence


def _reader(override: str) -> str:
    """A verb that reads the key."""
    return next(verb for verb in ("train", *READS) if reads(verb, override.partition("=")[0]) or verb == "plan")


def test_a_missing_name_is_asked_for():
    with pytest.raises(UserError, match="name has no value"):
        compose("train", ["experiment=tiny_4k"])


def _config(tmp_path: Path, **changes) -> Config:
    return Config(name="one", runs_folder=str(tmp_path), **changes)


GROUPS_OF_TRAIN = ("seed", "parallel", "engine")


def test_a_run_folder_belongs_to_one_config(tmp_path):
    job = run.open_run(_config(tmp_path), "train", GROUPS_OF_TRAIN)
    assert not job.folder.exists(), "a name is taken before the input has proved good"
    job.claim({}).close()
    assert (job.folder / "train.config.json").exists()
    assert (job.folder / "train.provenance.json").exists()
    run.open_run(_config(tmp_path), "train", GROUPS_OF_TRAIN)  # the same again
    before = (job.folder / "train.config.json").read_bytes()
    with pytest.raises(UserError, match=r"seed: 0 -> 1"):
        run.open_run(_config(tmp_path, seed=1), "train", GROUPS_OF_TRAIN)
    assert (job.folder / "train.config.json").read_bytes() == before


def test_a_run_folder_belongs_to_one_verb(tmp_path):
    run.open_run(_config(tmp_path), "search", ("seed",)).claim({}).close()
    run.open_run(_config(tmp_path), "search", ("seed",))
    with pytest.raises(UserError, match="belongs to a run of search, whose results train would overwrite"):
        run.open_run(_config(tmp_path), "train", GROUPS_OF_TRAIN)


def test_keys_that_change_no_result_may_change(tmp_path):
    run.open_run(_config(tmp_path), "train", GROUPS_OF_TRAIN).claim({}).close()
    changed = _config(tmp_path, device="cpu", threads=2)
    changed.parallel.timeout_s, changed.engine.checkpoint_every_steps = 5.0, 7
    run.open_run(changed, "train", GROUPS_OF_TRAIN)
    changed.engine.zero_stage = 1
    with pytest.raises(UserError, match=r"engine.zero_stage: 3 -> 1"):
        run.open_run(changed, "train", GROUPS_OF_TRAIN)


def test_a_key_that_a_later_release_has_added_refuses_no_old_run(tmp_path):
    job = run.open_run(_config(tmp_path), "train", GROUPS_OF_TRAIN)
    job.claim({}).close()
    saved = io.read_json(job.folder / "train.config.json")
    del saved["engine"]["loss_chunk_tokens"]
    io.write_json(job.folder / "train.config.json", saved)
    assert run.open_run(_config(tmp_path), "train", GROUPS_OF_TRAIN).folder == job.folder


def test_inputs_written_anew_under_the_same_path_are_refused(tmp_path):
    job = run.open_run(_config(tmp_path), "train", GROUPS_OF_TRAIN)
    job.claim({"corpus": "a", "model": "b"}).close()
    job.claim({"corpus": "a", "model": "b"}).close()
    with pytest.raises(UserError, match="made from another model"):
        job.claim({"corpus": "a", "model": "c"})


def test_two_jobs_do_not_write_into_one_folder(tmp_path):
    job = run.open_run(_config(tmp_path), "train", GROUPS_OF_TRAIN)
    lock = job.claim({})
    with pytest.raises(UserError, match=r"in use by process \d+"):
        run.open_run(_config(tmp_path), "train", GROUPS_OF_TRAIN).claim({})
    lock.close()
    job.claim({}).close()


def test_random_streams_depend_on_seed_and_name_only():
    first = run.stream(1, "a", 2).integers(1 << 30, size=4)
    assert (first == run.stream(1, "a", 2).integers(1 << 30, size=4)).all()
    assert (first != run.stream(1, "a", 3).integers(1 << 30, size=4)).any()
    assert (first != run.stream(2, "a", 2).integers(1 << 30, size=4)).any()


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    io.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        io.write_json(path, {"a": object()})
    assert io.read_json(path) == {"a": 1}
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        io.read_json(path)
