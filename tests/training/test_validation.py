"""The held-out loss equals plain transformers on any ranks, and a training with it is the training without."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from batches import labels_of
from ranks import RankError, run_ranks

from lr2train.changes import may_change
from lr2train.data.batch import LONG, WINDOWS
from lr2train.data.corpus import Corpus
from lr2train.data.feed.held_out import HeldOutSegments
from tests.training import starts
from tests.training.deepspeed.test_engine import ARCHITECTURE, T, config_for, factors, plain_step, segment

STEPS, EVERY, SEGMENTS = 6, 2, 3
MEASURED = ("heldout_loss_short", "heldout_loss_long", "heldout_tokens_short", "heldout_tokens_long")


# ---- whole runs ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("validation")
    tiny.make_corpus(made)
    return made


def train(folder: Path, *overrides: str, strike: tuple[int, int] | None = None) -> starts.Ended:
    """A training from scratch in one process."""
    sizes = [
        f"model.original_window_tokens={tiny.L0}", f"data.segment_tokens={tiny.L}", "model=tiny_llama",
        "model.path=null", f"model.architecture.max_position_embeddings={tiny.L0}",
        "model.architecture.hidden_size=32", "model.architecture.head_dim=16",
        "model.architecture.num_hidden_layers=1", f"model.architecture.vocab_size={tiny.VOCAB}",
        "model.architecture.intermediate_size=48", "rope.critical_index=2", "rope.tail=[4.0]",
        "rope.attention_factor=1.0", f"optim.steps={STEPS}", "optim.segments_per_step=2", "optim.warmup_steps=1",
        "optim.lr=1e-2", "logger=jsonl", "engine.checkpoint_every_steps=3", f"engine.validate_segments={SEGMENTS}",
    ]  # fmt: skip
    return starts.train([*tiny.arguments(folder), *sizes, *overrides], folder, strike=strike)


def lines_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def without_times(line: dict) -> dict:
    return {
        key: value for key, value in line.items() if key not in ("tokens_per_s", "peak_gib", "data_wait_s", "step_s")
    }


@pytest.fixture(scope="module")
def validated(folder) -> starts.Ended:
    ended = train(folder, "name=validated", f"engine.validate_every_steps={EVERY}")
    assert ended.code == 0, ended.err
    return ended


def test_a_training_with_held_out_loss_is_the_training_without(folder, validated):
    code, err = train(folder, "name=plain", "engine.validate_every_steps=0")
    assert code == 0, err
    first, *steps = map(without_times, lines_of(folder, "validated"))
    assert list(first) == ["step", "tokens_seen", *MEASURED]
    assert (first["step"], first["tokens_seen"]) == (0, 0)
    assert [line["step"] for line in steps if set(MEASURED) <= line.keys()] == [2, 4, 6]
    learned = [{key: value for key, value in line.items() if key not in MEASURED} for line in steps]
    assert learned == list(map(without_times, lines_of(folder, "plain")))
    weights = [(folder / name / "model" / "model.safetensors").read_bytes() for name in ("plain", "validated")]
    assert weights[0] == weights[1]
    assert validated.err.count("held-out loss every 2 steps, of 3 short segments and 3 long segments") == 1
    assert validated.err.count("step 4: held-out loss ") == 1


def test_a_killed_and_resumed_run_writes_the_lines_of_an_undisturbed_one(folder, validated):
    command = (folder, "name=killed", f"engine.validate_every_steps={EVERY}")
    killed = train(*command, strike=(3, signal.SIGKILL))  # before the first checkpoint: step 0 is measured again
    assert killed.code == -signal.SIGKILL, killed.err
    killed = train(*command, strike=(5, signal.SIGKILL))  # after the measurement of step 4, which is made again
    assert killed.code == -signal.SIGKILL, killed.err
    ended = train(*command)
    assert ended.code == 0, ended.err
    found, expected = (list(map(without_times, lines_of(folder, name))) for name in ("killed", "validated"))
    assert found == expected
    assert may_change("engine.validate_every_steps: 2 -> 0")
    assert may_change("engine.validate_segments: 8 -> 16")


def plain_loss(model, corpus: Corpus, window: str) -> tuple[float, int]:
    """The reference: each attention span of the segments through transformers by itself."""
    total, n_targets = 0.0, 0
    for batch in HeldOutSegments(corpus, window, tiny.L0, tiny.L, SEGMENTS).batches(0, 1, window == LONG):
        labels = torch.from_numpy(labels_of(batch)).long()
        for start, stop in batch.spans:  # transformers chooses the table by the length: at most L0, or more
            assert (stop - start > tiny.L0) == (window == LONG)
            ids = torch.from_numpy(batch.tokens[start:stop].astype(np.int64))
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            total += torch.nn.functional.cross_entropy(logits, labels[start:stop], reduction="sum").item()
            n_targets += int((labels[start:stop] != -100).sum())
    return total / n_targets, n_targets


@torch.no_grad()
def test_the_last_measurement_is_the_loss_of_the_written_model_in_transformers(folder, validated):
    from transformers import AutoModelForCausalLM

    path = folder / "validated" / "model"
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float64)
    line, corpus = lines_of(folder, "validated")[-1], Corpus.open(folder / "corpus")
    for window in WINDOWS:
        loss, n_targets = plain_loss(model, corpus, window)
        assert line[f"heldout_loss_{window}"] == pytest.approx(loss, rel=1e-5)
        assert line[f"heldout_tokens_{window}"] == n_targets


def test_a_corpus_without_held_out_documents_trains_without_the_loss(folder, tmp_path):
    from lr2train.prepare import prepare

    sizes = [f"data.segment_tokens={tiny.L}", f"data.vocab_size={tiny.VOCAB}", "data.holdout=0"]
    sources = f"data.sources=[{{name: texts, path: {folder}/texts}}]"
    own = [f"model.original_window_tokens={tiny.L0}", sources, "name=all_trained"]
    prepare(tiny.config("prepare", folder, *sizes, *own))
    code, err = train(folder, "name=unmeasured", f"data.path={folder}/all_trained", "engine.validate_every_steps=1")
    assert code == 0, err
    for window in WINDOWS:
        assert err.count(f"the held-out loss of the {window} window is not measured: the held-out documents") == 1
    assert [line["step"] for line in lines_of(folder, "unmeasured")] == list(range(1, STEPS + 1))


# ---- the engine on several ranks ----


def engine_of(world: int, sp: int, architecture: dict | None = None):
    from dataclasses import replace

    from lr2train.model import load
    from lr2train.parallel.mesh import make_mesh
    from lr2train.training.deepspeed.engine import Engine
    from lr2train.training.deepspeed.start import start_deepspeed

    start_deepspeed(torch.device("cpu"))
    config = config_for(sp, 1, world)
    model = replace(config.model, architecture=architecture or config.model.architecture)
    config = replace(config, model=model)
    return Engine(config, make_mesh(sp), factors(), load.config_of(config.model), torch.device("cpu"))


HELD = [2, 4, 1, 3]  # two short segments, two long ones
DROPOUT = {"model_type": "phi3", "resid_pdrop": 0.3, "pad_token_id": 0}


def measured(rank: int, world: int, sp: int):
    """The loss of each window."""
    engine = engine_of(world, sp)
    mine = [segment(number) for number in HELD[engine.mesh.dp_rank :: engine.mesh.dp_size]]
    return engine.measure(mine)


def undisturbed(rank: int, world: int, sp: int) -> bool:
    """Whether losses, weights and random numbers are the same bit for bit with measurements between steps."""
    runs = []
    for often in (0, 2):
        torch.manual_seed(5)
        engine = engine_of(world, sp, ARCHITECTURE | DROPOUT)
        held, seen = [segment(number) for number in (4, 3)], []
        for step in range(3):
            for _ in range(often):
                engine.measure(held)
            seen.append(engine.step([segment(step + 1)], lr=1e-2).loss)
        for _ in range(often):
            engine.measure(held)
        assert engine.model.training
        if often:  # no gathered weight stays in memory
            assert {one.ds_status.name for one in engine.model.parameters()} == {"NOT_AVAILABLE"}
        weights = [getattr(one, "ds_tensor", one).detach().clone() for one in engine.model.parameters()]
        runs.append((seen, weights, torch.rand(4)))
        engine._engine.destroy()
    (losses, weights, drawn), (other_losses, other_weights, other_drawn) = runs
    same = all(map(torch.equal, weights, other_weights))
    return losses == other_losses and same and torch.equal(drawn, other_drawn)


def not_finite(rank: int, world: int) -> tuple[dict, str]:
    """The figures and the output where the long table is broken."""
    from lr2train.training.validation import HeldOut

    engine, said = engine_of(world, 1), io.StringIO()
    tables = engine.model.rotary[0].tables
    tables["long"] = tables["long"]._replace(inv_freq=tables["long"].inv_freq * torch.nan)
    with contextlib.redirect_stderr(said):
        return HeldOut(engine, [segment(2), segment(1)], 1).measure(3), said.getvalue()


def one_rank(rank: int, world: int):
    return measured(rank, world, 1), undisturbed(rank, world, 1), not_finite(rank, world)


def two_ranks(rank: int, world: int):
    return [measured(rank, world, sp) for sp in (1, 2)], undisturbed(rank, world, 2)


def check(found: dict) -> None:
    loss, by_window, n_targets, _ = plain_step(HELD)
    assert {window: one.loss for window, one in found.items()} == pytest.approx(by_window, rel=1e-5)
    assert sum(one.n_target_tokens for one in found.values()) == n_targets
    assert sum(one.loss * one.n_target_tokens for one in found.values()) / n_targets == pytest.approx(loss, rel=1e-5)


def test_one_rank_measures_what_transformers_does_and_disturbs_no_step(tmp_path):
    ((found, same, (figures, said)),) = run_ranks(one_rank, 1, tmp_path=tmp_path, timeout_s=120)
    check(found)
    assert same
    assert figures["heldout_loss_long"] is None
    assert figures["heldout_loss_short"] == pytest.approx(plain_step([2])[0], rel=1e-5)
    assert figures["heldout_tokens_long"] == T - 1
    assert "step 3: the held-out loss of the long window is not finite; training goes on" in said


def test_two_ranks_measure_what_transformers_does_and_disturb_no_step(tmp_path):
    by_rank = run_ranks(two_ranks, 2, tmp_path=tmp_path, timeout_s=120)
    for losses, same in by_rank:
        assert losses == by_rank[0][0]
        for found in losses:
            check(found)
        assert same


def failing_inside(rank: int, world: int) -> None:
    """Rank 1 fails between two collectives of the forward pass."""
    engine = engine_of(world, world)
    if rank == 1:
        layer = engine.model.lm.base_model.layers[1]
        layer.mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(ArithmeticError("out of memory, say")))
    engine.measure([segment(1)])


def test_a_rank_that_fails_in_a_measurement_ends_all_with_its_reason(tmp_path):
    with pytest.raises(RankError) as raised:
        run_ranks(failing_inside, 2, tmp_path=tmp_path, timeout_s=120)
    lines = [line for line in str(raised.value).splitlines() if line.startswith(("ArithmeticError", "RuntimeError"))]
    assert "ArithmeticError: out of memory, say" in lines
    assert "RuntimeError: rank 1: ArithmeticError: out of memory, say" in lines
