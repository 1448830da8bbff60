"""Needle perplexity against plain transformers, and a journal that survives any cut."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
from ranks import run_ranks

from lr2train.config import NeedleConfig, SearchConfig
from lr2train.data.corpus import Corpus
from lr2train.data.needles import needle_set
from lr2train.evolution import fitness as fitness_module
from lr2train.evolution.fitness import NeedleFitness
from lr2train.evolution.genome import Space
from lr2train.model import load, rotary
from lr2train.model.score import Score
from lr2train.rope import METHODS
from lr2train.rope import hf as rope_hf

N_DOCUMENTS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny.make_corpus(folder)
    tiny.make_model(folder / "base")
    return folder


def space() -> Space:
    return Space(tiny.SPECTRUM, tiny.L, SearchConfig(population=4, top_k=2), 1.0)


def documents(folder):
    needles = NeedleConfig(wording="code", digits=4)
    return needle_set(Corpus.open(folder / "corpus"), needles, N_DOCUMENTS, tiny.L, [0.0], np.random.default_rng(0))


def fitness_over(folder, journal) -> NeedleFitness:
    model = load.load_whole(folder / "base")
    table = rotary.install(model, METHODS["none"](tiny.SPECTRUM, tiny.L))
    return NeedleFitness(model, table, space(), documents(folder), journal)


def candidates():
    return space().initial(np.random.default_rng(0))


def pairs(journal) -> list[tuple[str, int]]:
    return [(entry["candidate"], entry["document"]) for entry in map(json.loads, journal.read_text().splitlines())]


@torch.no_grad()
def plain_perplexity(folder, candidate) -> float:
    """exp(mean nll of the answers) from whole logits of plain transformers with the candidate in its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = rope_hf.write(json.loads((folder / "base" / "config.json").read_text()), space().factors(candidate))
    hf_config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", config=hf_config, dtype=torch.float64).eval()
    total, count = 0.0, 0
    for document in documents(folder):
        logits = model(torch.from_numpy(document.tokens)[None]).logits[0].log_softmax(-1)
        (start, stop), *others = document.answer_spans
        assert not others
        assert document.tokens[start:stop].size == stop - start > 0
        total -= sum(logits[t - 1, document.tokens[t]].item() for t in range(start, stop))
        count += stop - start
    return math.exp(total / count)


def test_perplexity_is_that_of_whole_logits_in_plain_transformers(folder, tmp_path):
    found = fitness_over(folder, tmp_path / "journal.jsonl")(candidates())
    expected = [plain_perplexity(folder, candidate) for candidate in candidates()]
    assert found == pytest.approx(expected, rel=1e-4)  # fp32 against fp64, through two layers of large weights
    assert len({round(value, 3) for value in found}) == 4, "candidates differ"


def counting(monkeypatch) -> list:
    """What is really computed, by the model's own forward."""
    calls, score = [], fitness_module.score
    monkeypatch.setattr(fitness_module, "score", lambda *args: (calls.append(args[3].tobytes()), score(*args))[1])
    return calls


def test_what_stands_in_the_journal_is_not_computed_again(folder, tmp_path, monkeypatch):
    calls, journal = counting(monkeypatch), tmp_path / "journal.jsonl"
    first = fitness_over(folder, journal)
    expected = first(candidates())
    assert len(calls) == len(pairs(journal)) == first.document_forwards == 4 * N_DOCUMENTS
    again = fitness_over(folder, journal)
    assert again.recovered == 4 * N_DOCUMENTS
    assert again(candidates()) == expected
    assert len(calls) == 4 * N_DOCUMENTS
    assert again.document_forwards == first.document_forwards, "generations.jsonl reads the same after a kill"


def test_a_journal_cut_anywhere_goes_on_to_the_same_result(folder, tmp_path, monkeypatch):
    """As a kill leaves it: cut in a line, between two lines, before a line's end."""
    journal = tmp_path / "journal.jsonl"
    fitness = fitness_over(folder, journal)
    expected, whole = fitness(candidates()), journal.read_bytes()
    wanted, calls = pairs(journal), counting(monkeypatch)
    nll = {(entry["candidate"], entry["document"]): entry["nll"] for entry in map(json.loads, whole.decode().splitlines())}
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in sorted({0, 1, *range(7, len(whole), 97), *ends, *(end - 1 for end in ends), *(end - 2 for end in ends)}):
        journal.write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n")
        calls.clear()
        # the model is the same: what a new process would have
        fitness = NeedleFitness(fitness._model, fitness._rotary, space(), fitness._documents, journal)
        assert fitness.recovered == complete
        assert fitness(candidates()) == expected
        assert len(calls) == len(wanted) - complete, "nothing in the journal is computed again"
        assert sorted(pairs(journal)) == sorted(wanted), "each pair stands there once"
        entries = [json.loads(line) for line in journal.read_text().splitlines()]
        assert all(entry["nll"] == nll[entry["candidate"], entry["document"]] for entry in entries)


def test_a_damaged_line_costs_what_follows_it_and_no_more(folder, tmp_path):
    journal = tmp_path / "journal.jsonl"
    expected = fitness_over(folder, journal)(candidates())
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:5], b"\0\0\xff\0\n", *lines[6:]]))
    resumed = fitness_over(folder, journal)
    assert resumed.recovered == 5
    assert resumed(candidates()) == expected
    assert fitness_over(folder, journal).recovered == len(lines)


def test_a_candidate_that_breaks_the_model_is_the_worst(folder, tmp_path, monkeypatch):
    scores = iter([math.nan, 1e6, 2.0])
    monkeypatch.setattr(fitness_module, "score", lambda *_: Score(next(scores), 1, False))
    fitness = fitness_over(folder, tmp_path / "journal.jsonl")
    fitness._documents = fitness._documents[:1]
    broken, hopeless, good = fitness(candidates()[:3])
    assert broken == math.inf
    assert good == math.exp(2.0 / fitness._documents[0].n_answer_tokens)
    assert good < hopeless < math.inf


def on_ranks(rank: int, world: int, folder, journal):
    fitness = fitness_over(folder, journal)
    return fitness(candidates()), fitness(candidates()[:2]), fitness.recovered


def test_any_number_of_ranks_finds_the_same(folder, tmp_path):
    journals = {world: tmp_path / f"{world}.jsonl" for world in (1, 2)}
    found = {world: run_ranks(on_ranks, world, folder, journals[world], tmp_path=tmp_path) for world in (1, 2)}
    assert found[2] == found[1] * 2

    def content(world: int) -> list[tuple[str, int, float]]:
        entries = [json.loads(line) for line in journals[world].read_text().splitlines()]
        assert {entry["rank"] for entry in entries} == set(range(world)), "every rank works"
        return sorted((entry["candidate"], entry["document"], entry["nll"]) for entry in entries)

    assert content(1) == content(2)
    resumed = run_ranks(on_ranks, 2, folder, journals[1], tmp_path=tmp_path)
    assert [(one[0], one[2]) for one in resumed] == [(found[1][0][0], 4 * N_DOCUMENTS)] * 2, "a journal of one rank, read by two"
