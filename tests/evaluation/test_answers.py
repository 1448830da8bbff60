"""Answers of one model: against plain transformers on both sides of L0; each computed once, whatever is killed and on
however many ranks.
"""

import json
import math
import weakref

import asked
import numpy as np
import pytest
import tiny
import torch
from ranks import run_ranks
from transformers import AutoModelForCausalLM

from lr2train.config import UserError
from lr2train.evaluation.request import Generate, Likelihood
from lr2train.evaluation.window_model import WindowModel


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return asked.world(tmp_path_factory.mktemp("world"))


def plain(model, window: str):
    """The same weights in plain transformers, under one table for every length."""
    found = AutoModelForCausalLM.from_pretrained(model).eval()
    if window == "short":
        values = json.loads((model / "config.json").read_text())
        rope = {"rope_type": "default", "rope_theta": values["rope_parameters"]["rope_theta"]}
        config = type(found.config)(**{**values, "rope_parameters": rope, "rope_scaling": rope})
        short = AutoModelForCausalLM.from_config(config).eval()
        short.load_state_dict(found.state_dict())
        return short
    return found


@torch.no_grad()
def test_log_likelihoods_are_those_of_a_plain_forward_pass_on_both_sides_of_l0(model):
    ours = asked.window_model(model)
    rng, seen = np.random.default_rng(1), set()
    for length in (tiny.L0 - 1, tiny.L0, tiny.L0 + 1, 200):
        tokens = rng.integers(2, tiny.VOCAB, length)
        (answer,) = ours.answer([Likelihood(tokens, ((10, 14), (length - 2, length)))])
        seen.add(answer.window)
        logits = plain(model, answer.window)(torch.from_numpy(tokens)[None]).logits[0].log_softmax(-1)
        for (start, stop), nll, right in zip(((10, 14), (length - 2, length)), answer.nlls, answer.right, strict=True):
            expected = -sum(float(logits[at - 1, tokens[at]]) for at in range(start, stop))
            assert nll == pytest.approx(expected, rel=2e-4)  # the long table differs by rounding of its factors
            assert right == sum(int(logits[at - 1].argmax()) == tokens[at] for at in range(start, stop))
    assert seen == {"short", "long"}


def test_generation_is_that_of_generate_on_both_sides_of_l0(model):
    ours = asked.window_model(model)
    for n_prompt, n_new, window in ((20, 20, "short"), (50, 14, "short"), (50, 15, "long"), (150, 20, "long")):
        tokens = np.random.default_rng(n_prompt).integers(2, tiny.VOCAB, n_prompt)
        (answer,) = ours.answer([Generate(tokens, n_new)])
        reference = plain(model, window)
        if window == "long" and n_prompt <= tiny.L0:
            for rope in (reference.config.rope_parameters, reference.config.rope_scaling):
                rope["short_factor"] = rope["long_factor"]
            config = reference.config
            rebuilt = AutoModelForCausalLM.from_config(config).eval()
            rebuilt.load_state_dict(reference.state_dict())
            reference = rebuilt
        said = reference.generate(
            torch.from_numpy(tokens)[None], max_new_tokens=n_new, do_sample=False, eos_token_id=1, pad_token_id=1
        )
        expected = said[0, n_prompt:].tolist()
        expected = expected[: expected.index(1)] if 1 in expected else expected
        assert answer.window == window
        assert answer.text == ours.tokenizer.decode(expected)


def test_a_text_ends_before_its_stop_string_and_where_enough_is_said(model):
    ours = asked.window_model(model)
    tokens = np.random.default_rng(5).integers(2, tiny.VOCAB, 30)
    (whole,) = ours.answer([Generate(tokens, 20)])
    stop = whole.text[4:7]
    (cut,) = ours.answer([Generate(tokens, 20, stops=(stop, "", "never said"))])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.n_new_tokens < whole.n_new_tokens
    wanted = whole.text[2:5].upper()
    (enough,) = ours.answer([Generate(tokens, 20, enough=(wanted,))])
    assert wanted.lower() in enough.text.lower() and enough.n_new_tokens < whole.n_new_tokens
    assert whole.text.startswith(enough.text)
    (not_enough,) = ours.answer([Generate(tokens, 20, enough=(wanted, "never said"))])
    assert not_enough.text == whole.text


def test_batches_have_one_kind_one_window_and_a_bounded_size(model):
    ours, texts = asked.window_model(model, batch_tokens=300), asked.requests(60)
    batches = ours.batches(texts)
    assert sorted(number for batch in batches for number in batch) == list(range(60))
    for batch in batches:
        of_batch = [texts[number] for number in batch]
        assert len({(type(one), ours.subject.window(one.total_tokens)) for one in of_batch}) == 1
        assert len(batch) == 1 or len(batch) * max(one.total_tokens for one in of_batch) <= 300
    assert len(batches) < 30, "short requests are answered together"


def same(one, other) -> bool:
    """Equal but for the time, and for the last bits of losses that were computed in other batches."""
    return (one.window, one.text, one.right, one.error) == (other.window, other.text, other.right, other.error) and all(
        math.isclose(a, b, rel_tol=1e-5) for a, b in zip(one.nlls, other.nlls, strict=True)
    )


def test_answers_do_not_depend_on_the_batch(model, tmp_path):
    together = asked.answers_of(model, tmp_path / "a", batch_tokens=4096).ask(asked.requests(), "x")
    alone = asked.answers_of(model, tmp_path / "b", batch_tokens=1).ask(asked.requests(), "x")
    assert all(map(same, together, alone))


@pytest.fixture
def computed(monkeypatch) -> list:
    """The requests that the model is really asked."""
    seen, answer = [], WindowModel.answer
    monkeypatch.setattr(WindowModel, "answer", lambda self, some: (seen.extend(some), answer(self, some))[1])
    return seen


def test_nothing_is_computed_twice(model, tmp_path, computed):
    first = asked.answers_of(model, tmp_path / "j").ask(asked.requests(), "x")
    assert len(computed) == 12
    again = asked.answers_of(model, tmp_path / "j")
    assert again.ask(asked.requests(), "x") == first and again.recovered == 12
    assert len(computed) == 12
    more = asked.answers_of(model, tmp_path / "j").ask([*asked.requests(14), *asked.requests(3)], "x")
    assert more[:12] == first and more[14:] == first[:3]
    assert len(computed) == 14, "a request that is asked twice is answered once"


def test_a_journal_cut_anywhere_goes_on(model, tmp_path, computed):
    journal = tmp_path / "j"
    first, whole = asked.answers_of(model, journal).ask(asked.requests(), "x"), journal.read_bytes()
    for cut in (0, 1, len(whole) // 3, len(whole) - 1):
        journal.write_bytes(whole[:cut])
        computed.clear()
        assert all(map(same, asked.answers_of(model, journal).ask(asked.requests(), "x"), first))
        assert len(computed) == 12 - whole[:cut].count(b"\n")
        assert len(journal.read_bytes().splitlines()) == 12


def test_another_model_does_not_take_these_answers(model, tmp_path, computed):
    asked.answers_of(model, tmp_path / "j").ask(asked.requests(4), "x")
    other = asked.answers_of(model, tmp_path / "j")
    other._identity = "another"
    other.ask(asked.requests(4), "x")
    assert len(computed) == 8


def test_a_request_that_fails_is_told_and_the_rest_goes_on(model, tmp_path, monkeypatch, computed):
    answer = WindowModel.answer

    def failing(self, some):
        if any(len(one.tokens) == len(asked.requests()[3].tokens) for one in some):
            raise RuntimeError("out of memory")
        return answer(self, some)

    monkeypatch.setattr(WindowModel, "answer", failing)
    told = []
    answers = asked.answers_of(model, tmp_path / "j", batch_tokens=4096)
    answers._log = told.append
    found = answers.ask(asked.requests(), "x")
    assert [one.error for one in found].count(None) == 11 and found[3].error == "out of memory"
    assert told == ["a sample failed and the rest goes on: out of memory"]
    monkeypatch.setattr(WindowModel, "answer", answer)
    computed.clear()
    again = asked.answers_of(model, tmp_path / "j").ask(asked.requests(), "x")
    assert all(one.error is None for one in again)


def test_the_memory_of_a_batch_that_failed_is_free_when_its_requests_are_tried_alone(model, tmp_path, monkeypatch):
    answer, held, free = WindowModel.answer, [], []

    def failing(self, some):
        if len(some) > 1:
            hidden = torch.zeros(3)
            held.append(weakref.ref(hidden))
            raise RuntimeError("out of memory")
        free.extend(one() is None for one in held)
        return answer(self, some)

    monkeypatch.setattr(WindowModel, "answer", failing)
    found = asked.answers_of(model, tmp_path / "j", batch_tokens=4096).ask(asked.requests(), "x")
    assert free and all(free) and all(one.error is None for one in found)


def test_a_text_beyond_the_window_is_no_answer(model, tmp_path, computed):
    tokens = np.full(tiny.L, 5)
    (found,) = asked.answers_of(model, tmp_path / "j").ask([Generate(tokens, 1)], "x")
    assert found.error == "257 tokens are beyond the window of 256" and not computed


def test_losses_that_are_not_finite_are_no_answer(model):
    ours = asked.window_model(model)
    with torch.no_grad():
        ours._model.get_input_embeddings().weight[7] = math.nan
    (found,) = ours.answer([Likelihood(np.array([3, 7, 4]), ((2, 3),))])
    assert found.error == "the losses are not finite" and found.nlls == ()


def test_a_full_disk_is_an_error_of_the_user(model, tmp_path):
    answers = asked.answers_of(model, tmp_path / "j")
    answers._file = tmp_path / "missing" / "j"
    with pytest.raises(UserError, match="cannot be written"):
        answers.ask(asked.requests(2), "x")


def on_ranks(rank: int, world: int, model, journal, shard: bool):
    """On every rank: all answers, and how many this rank computed."""
    from lr2train.evaluation.answers import LOCKSTEP

    seen, answer = [], WindowModel.answer
    WindowModel.answer = lambda self, some: (seen.extend(some), answer(self, some))[1]
    how = {"batch_tokens": 400} if not shard else {"batch_tokens": 400, "lockstep": LOCKSTEP}
    answers = asked.answers_of(model, journal, **how)
    if shard:
        answers._make_model = lambda: sharded_model(model)
    return answers.ask(asked.requests(), "x"), len(seen)


def sharded_model(model):
    """The model divided over the ranks (ZeRO-3)."""
    from lr2train.config import ModelConfig
    from lr2train.evaluation.answers import LOCKSTEP
    from lr2train.evaluation.subject import install
    from lr2train.evaluation.tokens import PromptTokenizer
    from lr2train.training.deepspeed.scoring import load_sharded

    subject = asked.subject_of(model)
    loaded = load_sharded(ModelConfig(path=str(model)), torch.device("cpu"))
    return WindowModel(subject, loaded, install(subject, loaded), PromptTokenizer.of(model), {1}, lockstep=LOCKSTEP)


@pytest.mark.parametrize(("n_ranks", "shard"), [(2, False), (3, False), (2, True)])
def test_ranks_share_the_work_and_agree(model, tmp_path, n_ranks, shard):
    alone = asked.answers_of(model, tmp_path / "alone", batch_tokens=400).ask(asked.requests(), "x")
    found = run_ranks(on_ranks, n_ranks, model, tmp_path / "shared", shard, tmp_path=tmp_path)
    for answers, _ in found:
        assert all(map(same, answers, alone))
        assert answers == found[0][0], "every rank has the same answers"
        if not shard:
            assert [(one.nlls, one.text) for one in answers] == [(one.nlls, one.text) for one in alone], "bit for bit"
    assert len((tmp_path / "shared").read_text().splitlines()) == 12
    if not shard:
        assert sum(n for _, n in found) == 12 and all(n for _, n in found)
