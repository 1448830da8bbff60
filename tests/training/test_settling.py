"""A training ends when its held-out long loss has settled, at the same step after a kill, with a decayed rate."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from batches import labels_of
from hypothesis import given
from hypothesis import strategies as st

from lr2train.config import Config, OptimConfig
from lr2train.data.batch import IGNORE
from lr2train.data.corpus import Corpus
from lr2train.data.feed.held_out import needle_batches
from lr2train.training.settling import FILE, Settling
from tests.training.test_validation import lines_of, train, without_times

LOSS = "heldout_loss_long"
OPTIM = OptimConfig(lr=1.0, warmup_steps=0, settle_validations=2, settle_nats=0.1, schedule="constant")


def noted(losses: Sequence[float | None], optim: OptimConfig = OPTIM, every: int = 10, total: int = 1000) -> Settling:
    settling = Settling(Config(name="x", optim=optim), total)
    for number, loss in enumerate(losses):
        settling.note(number * every, {LOSS: loss})
    return settling


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([5.0, 4.0, 3.0, 2.0], None),
        ([5.0, 4.0, 3.95, 3.95], 30),  # two measurements without a gain of 0.1
        ([5.0, 4.0, 3.95, 3.85], None),  # the second one gains
        ([5.0, 4.0, 4.5, 3.85, 4.0, 4.0], 50),  # a rise is no gain, and the best one counts
        ([5.0, None, None], 20),
        ([5.0, 5.0], None),  # too few measurements
    ],
)
def test_the_rule(losses, step):
    assert noted(losses).step == step


@pytest.mark.parametrize(("warmup", "step"), [(0, 20), (1, 30), (10, 30), (11, None), (20, None)])
def test_a_loss_that_rises_in_the_warm_up_does_not_settle(warmup, step):
    """What counts begins with the end of the warm-up; losses after 0, 10, 20, … steps."""
    optim = OptimConfig(warmup_steps=warmup, settle_validations=2, settle_nats=0.1)
    assert noted([4.0, 5.0, 6.0, 5.5, 5.0, 4.5, 4.2], optim).step == step


def test_the_reason_says_that_a_loss_is_not_finite():
    assert noted([5.0, None, None]).reason == "the held-out loss of the long window was not finite in 2 measurements"
    assert "fell by less than 0.1 nats" in noted([5.0, None, 5.0]).reason


@given(st.lists(st.floats(0, 3), max_size=12), st.integers(1, 4), st.floats(0, 1), st.integers(0, 12))
def test_the_step_is_the_first_that_the_rule_names_and_a_resumed_run_finds_it_too(losses, n, nats, kept):
    optim = OptimConfig(warmup_steps=0, settle_validations=n, settle_nats=nats)
    holds = [
        number * 10
        for number in range(n, len(losses))
        if min(losses[: number - n + 1]) - min(losses[number - n + 1 : number + 1]) < nats
    ]
    assert noted(losses, optim).step == next(iter(holds), None)
    before = {number * 10: loss for number, loss in enumerate(losses[:kept])}
    begun = Settling(Config(name="x", optim=optim), 1000, before)
    for number, loss in enumerate(losses[kept:], kept):
        begun.note(number * 10, {LOSS: loss})
    assert begun.step == noted(losses, optim).step


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_learning_rate_falls_from_its_present_value_over_a_quarter_of_the_steps(schedule):
    optim = OptimConfig(**{**vars(OPTIM), "warmup_steps": 2, "schedule": schedule, "min_lr_ratio": 0.1})
    plain, settling = Settling(Config(name="x", optim=optim), 1000), noted([5.0] * 4, optim, every=100)
    assert (settling.step, settling.end) == (300, 375)
    rates = [settling.learning_rate(step) for step in range(settling.end)]
    assert rates[:301] == [plain.learning_rate(step) for step in range(301)]
    assert rates[0] < rates[1]  # the warm-up
    falls = {round(before - after, 12) for before, after in pairwise(rates[300:])}
    assert falls == {round((rates[300] - 0.1) / 75, 12)}
    assert rates[-1] == pytest.approx(0.1 + (rates[300] - 0.1) / 75)


def test_the_end_is_never_after_the_planned_one_and_skipped_steps_do_not_move_it():
    late = noted([5.0, 5.0, 5.0], total=21)
    assert (late.step, late.end) == (20, 21)
    settling = noted([5.0, 5.0, 5.0])
    assert settling.end == 25
    assert [settling.is_last(step, [18, 19, 22, 26, 27]) for step in (18, 19, 22)] == [False, False, True]
    assert settling.is_last(19, [18, 19, 26, 27])


# ---- whole runs ----

SETTLE = [
    "optim.steps=40", "optim.warmup_steps=0", "optim.settle_validations=2", "optim.settle_nats=9",
    "engine.validate_every_steps=2", "engine.validate_needles=3", "data.needles.max_pairs=3",
    "data.needles.max_questions=2",
]  # fmt: skip
MEASURED = "heldout_loss_needles"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("settling")
    tiny.make_corpus(made)
    return made


def test_a_settled_run_is_finished_and_a_killed_one_settles_at_the_same_step(folder):
    code, err = train(folder, *SETTLE, "name=settled")
    assert code == 0, err
    assert err.count("step 4: the held-out loss of needles fell by less than 9.0 nats in 2 measurements") == 1
    lines = lines_of(folder, "settled")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if MEASURED in line] == [0, 2, 4, 5]
    result = json.loads((folder / "settled" / "train.json").read_text())
    assert (result["steps"], result["settled"].partition(":")[0]) == (5, "after step 4")

    killed = train(folder, *SETTLE, "name=killed", strike=(5, signal.SIGKILL))  # settled, and not in the checkpoint yet
    assert killed.code == -signal.SIGKILL, killed.err
    assert list(json.loads((folder / "killed" / FILE).read_text())) == ["0", "2", "4"]
    code, err = train(folder, *SETTLE, "name=killed")
    assert code == 0, err
    assert list(map(without_times, lines_of(folder, "killed"))) == list(map(without_times, lines))
    weights = [(folder / name / "model" / "model.safetensors").read_bytes() for name in ("settled", "killed")]
    assert weights[0] == weights[1]

    again = train(folder, *SETTLE, "optim.steps=50", "name=killed")
    assert (again.code, again.err.count("already finished")) == (0, 1), again.err


@torch.no_grad()
def test_the_needle_loss_is_that_of_the_answers_in_transformers(folder):
    """After the test above, whose model it reads."""
    from transformers import AutoModelForCausalLM

    path, corpus = folder / "settled" / "model", Corpus.open(folder / "corpus")
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float64)
    needles = tiny.config("search", folder, "name=x", "data.needles.max_pairs=3", "data.needles.max_questions=2")
    batches = needle_batches(corpus, needles.data.needles, 3, tiny.L, 0, 1)
    total, n_targets = 0.0, 0
    for batch in batches:
        labels = torch.from_numpy(labels_of(batch)).long()
        answers = corpus.tokenizer.decode(labels[labels != IGNORE].tolist())
        text = corpus.tokenizer.decode(batch.tokens.tolist())
        assert len(answers) == 2 * 4
        assert text.count(answers[:4]) == text.count(answers[4:]) == 2  # in the needle, and in the answer
        logits = model(input_ids=torch.from_numpy(batch.tokens).long()[None], use_cache=False).logits[0]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        n_targets += batch.n_target_tokens
    line = lines_of(folder, "settled")[-1]
    assert line[MEASURED] == pytest.approx(total / n_targets, rel=1e-5)
    assert line["heldout_tokens_needles"] == n_targets
    of_ranks = [needle_batches(corpus, needles.data.needles, 3, tiny.L, rank, 2) for rank in range(2)]
    assert [[one.n_target_tokens for one in rank] for rank in of_ranks] == [
        [batches[0].n_target_tokens, batches[2].n_target_tokens], [batches[1].n_target_tokens, 0]
    ]  # fmt: skip


def test_a_run_that_measures_no_long_loss_cannot_settle(folder):
    beyond = ["engine.validate_needles=0", "rope.target_window_tokens=100000", "data.long_positions=skip"]
    code, err = train(folder, *SETTLE, *beyond, "name=unmeasured")
    assert code == 2
    assert "optim.settle_validations=2 looks at the held-out loss of the long window, which is not measured" in err
    assert not (folder / "unmeasured" / "train.inputs.json").exists()
