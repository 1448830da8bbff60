"""Skipped steps are left out and nothing else changes; a resumed run keeps its group size and the past of its skips."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from lr2train.config import DataConfig, UserError
from lr2train.io import write_json
from lr2train.training.loop import _due
from lr2train.training.steps import FILE, StepRanges, Steps
from tests.training import starts

RANGES = st.lists(
    st.tuples(st.integers(1, 60), st.integers(0, 9)).map(lambda one: f"{one[0]}-{one[0] + one[1]}"), max_size=5
)


def listed(texts: list[str]) -> set[int]:
    return {step for text in texts for first, last in [map(int, text.split("-"))] for step in range(first, last + 1)}


@given(RANGES, st.integers(0, 70), st.integers(0, 70))
def test_ranges_are_the_sets_that_they_name(texts, done, total):
    skips, named = StepRanges.parse(texts), listed(texts)
    assert {step for step in range(1, 80) if step in skips} == named
    assert skips.count == len(named)
    assert skips.until(done) == StepRanges.parse([str(step) for step in named if step <= done])
    assert skips.remaining(done, total) == [step for step in range(done, total) if step + 1 not in named]


@pytest.mark.parametrize("text", ["", "x", "0", "5-3", "-4", "3-", "1.5", "2-4-6"])
def test_an_entry_that_is_neither_step_nor_range_is_refused(text):
    with pytest.raises(UserError, match="data.skip_steps has the entry"):
        StepRanges.parse([text])


def test_the_first_start_settles_the_groups(tmp_path):
    assert Steps.settle(tmp_path, DataConfig(), 8, 8).group_segments == 8
    assert Steps.settle(tmp_path, DataConfig(group_segments=16), 8, 64).group_segments == 16
    assert Steps.settle(tmp_path, DataConfig(), 8, 64).group_segments == 16, (
        "a quarter of a step: up to 16 ranks may go on"
    )
    assert Steps.settle(tmp_path, DataConfig(), 3, 48).group_segments == 12
    assert Steps.settle(tmp_path, DataConfig(), 2, 2).group_segments == 2
    write_json(tmp_path / FILE, Steps.settle(tmp_path, DataConfig(), 8, 8).to_json())
    again = Steps.settle(tmp_path, DataConfig(), 2, 8)
    assert again.group_segments == again.applied(DataConfig()).group_segments == 8


def test_skips_may_change_for_steps_to_come_alone(tmp_path):
    write_json(
        tmp_path / FILE,
        json.loads(json.dumps(Steps.settle(tmp_path, DataConfig(skip_steps=["3-5", "90-99"]), 1, 4).to_json())),
    )
    for later in (["3-5"], ["3-4", "5", "11-20"], ["3-5", "95"]):
        Steps.settle(tmp_path, DataConfig(skip_steps=later), 1, 4).refuse_other_past(10)
    for other in ([], ["3-6"], ["3-5", "10-12"]):
        with pytest.raises(UserError, match="of the 10 steps that are done, and the run was made skipping 3-5"):
            Steps.settle(tmp_path, DataConfig(skip_steps=other), 1, 4).refuse_other_past(10)
    Steps.settle(tmp_path, DataConfig(), 1, 4).refuse_other_past(2)  # the checkpoint lies before the skipped steps


def test_a_checkpoint_is_due_though_its_step_was_skipped():
    assert [_due(8, done, 4) for done in (9, 11, 12, 13)] == [False, False, True, True]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("steps")
    tiny.make_corpus(made)
    return made


def train(folder: Path, *overrides: str, strike: tuple[int, int] | None = None) -> starts.Ended:
    """A training from scratch."""
    sizes = [
        f"model.original_window_tokens={tiny.L0}", f"data.segment_tokens={tiny.L}", "model=tiny_llama",
        "model.path=null",
        f"model.architecture.max_position_embeddings={tiny.L0}", "model.architecture.hidden_size=32",
        "model.architecture.head_dim=16",
        "model.architecture.num_hidden_layers=1", f"model.architecture.vocab_size={tiny.VOCAB}",
        "model.architecture.intermediate_size=48",
        "rope.critical_index=2", "rope.tail=[4.0]", "optim.steps=12", "optim.segments_per_step=2",
        "optim.warmup_steps=2", "logger=jsonl",
    ]  # fmt: skip
    return starts.train([*tiny.arguments(folder), *sizes, *overrides], folder, strike)


def test_training_passes_over_skipped_steps_and_refuses_another_past(folder):
    code, err = train(folder, "name=skipping", "data.skip_steps=[2-4, 6, 12]", "engine.validate_every_steps=3")
    assert code == 0, err
    lines = [json.loads(line) for line in (folder / "skipping" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 5, 7, 8, 9, 10, 11]
    assert [line["tokens_seen"] for line in lines] == [nth * 2 * tiny.L for nth in range(8)]
    # Steps 3, 6 and 12 were due and skipped: the step after is measured, and the last.
    assert [line["step"] for line in lines if "heldout_loss_long" in line] == [0, 5, 7, 9, 11]
    assert json.loads((folder / "skipping" / "checkpoints.latest.json").read_text()) == {"tag": "step_00000011"}
    (folder / "skipping" / "train.json").unlink()
    code, err = train(folder, "name=skipping", "data.skip_steps=[2-4]")
    assert (code, "data.skip_steps skips 2-4 of the 11 steps that are done" in err) == (2, True), err


def test_training_on_a_damaged_corpus_is_refused_before_it_starts(folder, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(folder / "corpus", corpus)
    tokens = next(corpus.glob("store/*/train-*.bin"))
    flipped = bytearray(tokens.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    tokens.write_bytes(flipped)
    code, err = train(folder, "name=damaged", f"data.path={corpus}")
    assert code == 2, err
    assert str(tokens) in err
    assert "prepare again" in err
    assert not (folder / "damaged" / "checkpoints").exists()


def losses(folder: Path, name: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_chosen_steps_leave_a_trace_across_an_interrupt_and_no_other_step_does(folder):
    """The interrupt ends the range 6-7 after its first step; step 40 does not exist."""
    plain = ["optim.steps=8", "engine.validate_every_steps=0"]
    chosen = ["name=profiled", *plain, "logger.profile_steps=[2-3, 6-7, 40]"]
    code, err = train(folder, *chosen, strike=(6, signal.SIGTERM))
    assert code == 130, err
    assert "2 of the 5 steps of logger.profile_steps (2-3, 6-7, 40) have no trace of this start" in err
    code, err = train(folder, *chosen)
    assert code == 0, err
    assert "4 of the 5 steps of logger.profile_steps" in err
    traces = {path.name: path for path in (folder / "profiled" / "profile").iterdir()}
    names = ("steps_2-3_rank0", "step_6_rank0", "step_7_rank0")
    assert traces.keys() == {f"{name}{ending}" for name in names for ending in (".json.gz", ".txt")}
    events = json.loads(gzip.decompress(traces["steps_2-3_rank0.json.gz"].read_bytes()))["traceEvents"]
    named = [one.get("name") for one in events]
    assert {one for one in named if str(one).startswith("step ")} == {"step 2", "step 3"}
    assert "aten::mm" in named
    header, *rows = traces["steps_2-3_rank0.txt"].read_text().splitlines()
    assert header.split() == ["operator", "calls", "cpu", "ms", "share"]
    spent = [float(row.split()[-2]) for row in rows]
    assert spent == sorted(spent, reverse=True)
    code, err = train(folder, "name=plain", *plain)
    assert code == 0, err
    assert losses(folder, "profiled") == losses(folder, "plain")
    assert not (folder / "plain" / "profile").exists()


def test_profile_steps_that_cannot_be_read_are_refused(folder):
    code, err = train(folder, "name=unread", "logger.profile_steps=[10..12]")
    assert (code, "logger.profile_steps has the entry '10..12'" in err) == (2, True), err
