"""tools.map_rcd: cells equal a plain forward pass, killed maps continue, the bootstrap finds known answers."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from lr2train.config import UserError
from lr2train.model import load
from lr2train.rope.methods import METHODS
from lr2train.rope.spectrum import Spectrum
from tools import map_rcd, map_rcd_verdicts
from tools.map_rcd_picture import rcd_map
from tools.map_rcd_verdicts import MapCell

CELLS = [
    "--scales",
    "1.0",
    "1.5",
    "--indices",
    "3",
    "4",
    "--attention-factor",
    "1.0",
    "1.2",
    "--questions",
    "2",
    "--distractors",
    "1",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny.make_corpus(folder)
    tiny.make_model(folder / "base")
    return folder


def arguments(world, out, *more: str):
    places = ["--model", str(world / "base"), "--corpus", str(world / "corpus"), "--out", str(out)]
    return map_rcd.arguments(
        [*places, "--target", str(tiny.L), "--window", str(tiny.L0), "--documents", "2", *CELLS, *more]
    )


def lines_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def serial(world):
    """(arguments, summary) of a map that one process has measured."""
    given = arguments(world, world / "map")
    return given, map_rcd.make_map(given)


def test_a_cell_equals_a_plain_forward_pass(world, serial):
    given, summary = serial
    lines = lines_of(given.out)
    assert len(lines) == summary["cells"] == 2 * (4 + 2 * 2)
    config = map_rcd.compose_config(given)
    documents = map_rcd.documents_of(config)
    assert [len(one.tokens) for one in documents] == [tiny.L] * 2
    assert [len(one.spans) for one in documents] == [2, 2]
    for line in (line for line in lines if line["attention_factor"] == 1.2):
        factors = _cell_of(line).factors(tiny.SPECTRUM, tiny.L)
        losses = [loss for one in documents for loss in _plain_losses(world / "base", factors, one)]
        assert line["nll"] == pytest.approx(losses, rel=1e-4)
        mean = sum(losses) / sum(one.n_scored_tokens for one in documents)
        assert line["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert len({line["perplexity"] for line in lines}) == len(lines), "two cells were measured with the same factors"
    for picture in summary["pictures"]:
        assert min(Image.open(picture).size) > 300


def _cell_of(line: dict) -> MapCell:
    return MapCell(*(line[key] for key in ("method", "attention_factor", "critical_index", "scale")))


def _plain_losses(folder, factors, document) -> list[float]:
    """The loss of each answer without our modules: transformers' own rotary table is overwritten."""
    model = load.load_whole(folder)
    rotary = model.base_model.rotary_emb
    rotary.inv_freq = torch.tensor(factors.inv_freq, dtype=torch.float32)
    rotary.attention_scaling = factors.attention_factor
    ids = torch.from_numpy(document.tokens)
    with torch.no_grad():
        likelihoods = model(ids[None]).logits[0].double().log_softmax(-1)
    return [-sum(likelihoods[t - 1, ids[t]].item() for t in range(start, stop)) for start, stop in document.spans]


def test_a_killed_map_measures_only_missing_cells(world, serial, tmp_path, monkeypatch, capsys):
    out = Path(shutil.copytree(serial[0].out, tmp_path / "map"))
    asked = []
    measure = map_rcd.Meter.measure
    monkeypatch.setattr(map_rcd.Meter, "measure", lambda self, cell: asked.append(cell) or measure(self, cell))
    map_rcd.make_map(arguments(world, out))
    first, table = lines_of(out), capsys.readouterr().out
    assert asked == []
    text = (out / "cells.jsonl").read_text()
    (out / "cells.jsonl").write_text(text[: text.rindex('{"method"') + 40])  # killed while it wrote the last line
    map_rcd.make_map(arguments(world, out))
    assert len(asked) == 1
    assert [line["nll"] for line in lines_of(out)] == [line["nll"] for line in first]
    assert capsys.readouterr().out == table
    with pytest.raises(UserError, match="other settings .*distractors"):
        map_rcd.make_map(arguments(world, out, "--distractors", "2"))


def test_several_processes_measure_the_same_cells(world, serial, tmp_path):
    only = ["--indices", "4", "--attention-factor", "1.2"]
    map_rcd.make_map(arguments(world, tmp_path, *only, "--processes", "2"))
    expected = {_cell_of(line): line["nll"] for line in lines_of(serial[0].out)}
    found = {_cell_of(line): line["nll"] for line in lines_of(tmp_path)}
    assert len(found) == 6
    assert found == {cell: expected[cell] for cell in found}


def test_an_index_beyond_the_model_is_refused(world, tmp_path):
    with pytest.raises(UserError, match=r"--indices 8 is outside 1 … 7"):
        map_rcd.make_map(arguments(world, tmp_path / "map", "--indices", "8"))


def test_default_indices_span_d10_to_tcd_plus_2(world, tmp_path):
    given = arguments(world, tmp_path)
    given.indices, given.scales, given.attention_factor = None, [1.0], [1.0]
    found = [cell.critical_index for cell in map_rcd.cells_of(given, Spectrum(64, 10000.0, 512)) if cell.scale]
    assert found == list(range(8, 19))  # d10 8, tcd 16


# ---- the bootstrap ----


def grid(losses, indices=(14, 16), scales=(1.0,), factor: float = 1.0) -> dict[MapCell, dict]:
    """Cells from losses(index, scale) -> float64 [answers], one token an answer."""
    lines = {}
    for index in indices:
        for scale in scales:
            nll = np.asarray(losses(index, scale), dtype=float)
            lines[MapCell("longrope2", factor, index, scale)] = {
                "nll": nll.tolist(),
                "perplexity": math.exp(nll.mean()),
            }
    return lines


def verdict(lines, n_documents: int, tcd: int = 16):
    return map_rcd_verdicts.verdicts(lines, [1] * n_documents, tcd, seed=0)


def test_a_difference_on_every_document_is_sure():
    hard = np.random.default_rng(0).exponential(1.0, 20)
    found = verdict(grid(lambda index, _: hard + (0.3 if index == 16 else 0.0)), 20)["1"]["rcd < tcd beats tcd"]
    assert found["difference"] == pytest.approx(0.3)
    assert (found["low"], found["high"]) == (pytest.approx(0.3), pytest.approx(0.3))
    assert (found["pairs"], found["pairs_won"], found["sure"], found["best_sure"]) == (1, 1, 1.0, 1.0)
    opposite = verdict(grid(lambda index, _: hard + (0.3 if index == 14 else 0.0)), 20)["1"]["rcd < tcd beats tcd"]
    assert (opposite["difference"], opposite["sure"], opposite["best_sure"]) == (pytest.approx(-0.3), 0.0, 0.0)


def test_the_bootstrap_interval_is_that_of_the_mean():
    differences = np.random.default_rng(1).normal(0.1, 0.5, 400)
    found = verdict(grid(lambda index, _: 5 + differences * (index == 16)), 400)["1"]["rcd < tcd beats tcd"]
    error = differences.std() / math.sqrt(400)
    assert found["low"] == pytest.approx(differences.mean() - 1.96 * error, abs=0.1 * error)
    assert found["high"] == pytest.approx(differences.mean() + 1.96 * error, abs=0.1 * error)


def test_a_document_weighs_by_its_answer_tokens():
    lines = grid(lambda index, _: [6.0, 1.0] if index == 14 else [0.0, 4.0])
    losses = map_rcd_verdicts.resample(lines, [3, 1], seed=0, n_resamples=50)
    column = losses.column[MapCell("longrope2", 1.0, 14, 1.0)]
    # the first document twice, each document once, the second document twice
    assert set(np.round(losses.resampled[:, column], 9)) == {2.0, 7 / 4, 1.0}
    assert set(np.round(losses.left_out[:, column][np.isfinite(losses.left_out[:, column])], 9)) == {2.0, 1.0}


def test_the_best_of_many_equal_cells_is_not_taken_for_better():
    rng = np.random.default_rng(2)
    shares = []
    for _ in range(12):
        found = verdict(grid(lambda *_: 1 + rng.normal(0, 0.3, 30), indices=(*range(2, 16), 16), scales=(1.0, 1.2)), 30)
        shares.append(found["1"]["rcd < tcd beats tcd"])
    assert 0.3 < np.mean([one["best_sure"] for one in shares]) < 0.7
    assert np.mean([one["best_better"]["perplexity"] < one["best_worse"]["perplexity"] for one in shares]) > 0.8, (
        "comparing the best cells on the same documents would mislead"
    )


def test_pairs_differ_in_the_tested_property_alone():
    lines = grid(
        lambda index, scale: np.full(5, index / 10 + scale), indices=(12, 14, 16, 17), scales=(0.8, 1.0, 1.6, 2.0)
    )
    lines |= grid(
        lambda index, scale: np.full(5, index / 10 + scale),
        indices=(12, 14, 16, 17),
        scales=(0.8, 1.0, 1.6, 2.0),
        factor=1.2,
    )
    found = verdict(lines, 5)
    assert list(found) == ["1", "1.2", "all"]
    assert found["1"]["rcd < tcd beats tcd"]["pairs"] == 2 * 4  # 17 is not below, and only cells of the same scale meet
    assert found["all"]["rcd < tcd beats tcd"]["pairs"] == 2 * 2 * 4
    assert found["1"]["scale > 1 beats scale 1"]["pairs"] == 4 * 2  # 0.8 is not above
    assert {key: round(one["difference"], 9) for key, one in found["1"]["rcd against tcd"].items()} == {
        "12": 0.4,
        "14": 0.2,
        "17": -0.1,
    }
    assert {key: round(one["difference"], 9) for key, one in found["1"]["scale against 1"].items()} == {
        "0.8": 0.2,
        "1.6": -0.6,
        "2": -1.0,
    }


def test_an_empty_group_has_no_verdict():
    found = verdict(grid(lambda *_: np.ones(4), indices=(16,)), 4)["1"]
    assert found["rcd < tcd beats tcd"] is None
    assert "no cells to compare" in map_rcd_verdicts.in_words(found)


# ---- the picture ----


def test_the_map_shows_every_number_and_both_critical_indices():
    spectrum = Spectrum(64, 10000.0, 512)
    lines = [
        {"method": "longrope2", "critical_index": index, "scale": scale, "perplexity": 1.001 + 0.01 * index * scale}
        for index in range(8, 19)
        for scale in (0.8, 1.0, 2.0)
    ]
    lines += [{"method": method, "critical_index": None, "scale": None, "perplexity": 3e5} for method in ("yarn", "pi")]
    svg = rcd_map(lines, spectrum).svg()
    words = [part.split("</text>")[0] for part in svg.split("<text")[1:]]
    texts = [word.rsplit(">", 1)[-1] for word in words]
    assert sum(text == "1.0650" for text in texts) == 1  # rcd 8, 0.8 s
    assert sum(bool(re.fullmatch(r"1\.\d{3,4}", text)) for text in texts) >= 33
    assert texts.count("3e5") == 2
    for word in ("d10", "tcd", "YaRN", "PI", "0.8 s", "18"):
        assert word in texts, word
    assert METHODS["yarn"](spectrum, 4096).scale == 8
