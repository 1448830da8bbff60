"""Losses against plain transformers; a journal that survives any cut; the same search on any number of ranks."""

import json
import math
import resource

import numpy as np
import pytest
import tiny
import torch
from ranks import run_ranks

from lr2train.config import ModelConfig, NeedleConfig, SearchConfig, UserError
from lr2train.data.corpus import Corpus
from lr2train.data.needles import needle_set
from lr2train.evolution import fitness as fitness_module
from lr2train.evolution.documents import SearchDocument, draw_documents
from lr2train.evolution.final import CandidateScorer
from lr2train.evolution.fitness import WORST, Fitness
from lr2train.evolution.genome import Space
from lr2train.model import load, rotary
from lr2train.model.score import Score
from lr2train.rope import METHODS
from lr2train.rope import hf as rope_hf
from lr2train.search import ALGORITHMS
from lr2train.training.deepspeed.scoring import load_sharded

N_DOCUMENTS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny.make_corpus(folder)
    tiny.make_model(folder / "base")
    return folder


def space() -> Space:
    return Space(tiny.SPECTRUM, tiny.L, SearchConfig(population=4, top_k=2))


def documents(folder) -> list[SearchDocument]:
    """Two of three needles are asked for."""
    needles = NeedleConfig(wording="code", digits=4)
    made = needle_set(
        Corpus.open(folder / "corpus"), needles, N_DOCUMENTS, tiny.L, [0.0], np.random.default_rng(0), 2, 1
    )
    return [SearchDocument(one.tokens, one.answer_spans) for one in made]


def fitness_over(folder, journal, sharded: bool = False, chunk_tokens: int = 0) -> Fitness:
    model = (
        load_sharded(ModelConfig(path=str(folder / "base")), torch.device("cpu"))
        if sharded
        else load.load_whole(folder / "base")
    )
    table = rotary.install(model, METHODS["none"](tiny.SPECTRUM, tiny.L))
    return Fitness(model, table, space(), documents(folder), journal, lockstep=sharded, chunk_tokens=chunk_tokens)


def losses_of(fitness: Fitness) -> list[float]:
    """Mean loss of every candidate over every document, as a generation computes it."""
    every = candidates()
    fitness.settle(lambda losses: [losses(one, document) for one in every for document in range(N_DOCUMENTS)])
    return [fitness.loss(candidate, range(N_DOCUMENTS)) for candidate in every]


def candidates():
    return space().initial(np.random.default_rng(0))


def pairs(journal) -> list[tuple[str, int]]:
    return [(entry["candidate"], entry["document"]) for entry in map(json.loads, journal.read_text().splitlines())]


@torch.no_grad()
def plain_loss(folder, candidate) -> float:
    """Mean loss of the answer tokens, from whole logits of plain transformers with the candidate in its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = rope_hf.write(json.loads((folder / "base" / "config.json").read_text()), space().factors(candidate))
    hf_config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", config=hf_config, dtype=torch.float64).eval()
    total, count = 0.0, 0
    for document in documents(folder):
        logits = model(torch.from_numpy(document.tokens)[None]).logits[0].log_softmax(-1)
        assert len(document.spans) == 2
        for start, stop in document.spans:
            total -= sum(logits[t - 1, document.tokens[t]].item() for t in range(start, stop))
            count += stop - start
    return total / count


def test_the_loss_is_that_of_whole_logits_in_plain_transformers(folder, tmp_path):
    found = losses_of(fitness_over(folder, tmp_path / "journal.jsonl"))
    expected = [plain_loss(folder, candidate) for candidate in candidates()]
    assert found == pytest.approx(expected, abs=1e-4)  # fp32 against fp64, through two layers of large weights
    assert len({round(value, 3) for value in found}) == 4, "candidates differ"


def counting(monkeypatch) -> list:
    """The documents that are scored, in order. A document under the same factors goes through the model once and is
    then remembered.
    """
    calls, remembered, score = [], {}, fitness_module.score

    def counted(model, table, window, tokens, *rest):
        calls.append(tokens.tobytes())
        pair = tokens.tobytes(), table.tables[window].attention_factor, table.tables[window].inv_freq.numpy().tobytes()
        return remembered.get(pair) or remembered.setdefault(pair, score(model, table, window, tokens, *rest))

    monkeypatch.setattr(fitness_module, "score", counted)
    return calls


def test_evaluations_in_the_journal_are_not_computed_again(folder, tmp_path, monkeypatch):
    calls, journal = counting(monkeypatch), tmp_path / "journal.jsonl"
    first = fitness_over(folder, journal)
    expected = losses_of(first)
    assert len(calls) == len(pairs(journal)) == first.document_forwards == first.computed == 4 * N_DOCUMENTS
    again = fitness_over(folder, journal)
    assert again.recovered == 4 * N_DOCUMENTS
    assert losses_of(again) == expected
    assert len(calls) == 4 * N_DOCUMENTS
    assert again.document_forwards == first.document_forwards, "generations.jsonl is the same after a kill"


def test_a_journal_cut_anywhere_goes_on_to_the_same_result(folder, tmp_path, monkeypatch):
    """A kill leaves it cut in a line, between two lines, or before a line's end."""
    journal = tmp_path / "journal.jsonl"
    fitness = fitness_over(folder, journal)
    expected, whole = losses_of(fitness), journal.read_bytes()
    wanted, calls = pairs(journal), counting(monkeypatch)
    nll = {
        (entry["candidate"], entry["document"]): entry["nll"] for entry in map(json.loads, whole.decode().splitlines())
    }
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in sorted({0, 1, *range(7, len(whole), 97), *ends, *(end - 1 for end in ends), *(end - 2 for end in ends)}):
        journal.write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n")
        calls.clear()
        # The model stands for the one that a new process loads.
        fitness = Fitness(fitness._model, fitness._rotary, space(), fitness.documents, journal)
        assert fitness.recovered == complete
        assert losses_of(fitness) == expected
        assert len(calls) == len(wanted) - complete, "no evaluation in the journal is computed again"
        assert sorted(pairs(journal)) == sorted(wanted), "each pair is in the journal once"
        entries = [json.loads(line) for line in journal.read_text().splitlines()]
        assert all(entry["nll"] == nll[entry["candidate"], entry["document"]] for entry in entries)


def test_damaged_lines_are_removed_and_computed_again(folder, tmp_path):
    journal = tmp_path / "journal.jsonl"
    expected = losses_of(fitness_over(folder, journal))
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:5], b"\0\0\xff\0\n", *lines[6:8], b"[3]\n", *lines[8:]]))
    resumed = fitness_over(folder, journal)
    assert (resumed.recovered, resumed.damaged) == (len(lines) - 1, 2)
    assert losses_of(resumed) == expected
    assert sorted(journal.read_bytes().splitlines(keepends=True)[:-1]) == sorted(lines[:5] + lines[6:]), (
        "good lines are kept as they are"
    )
    assert fitness_over(folder, journal).recovered == len(lines)


def test_a_loss_that_is_not_finite_counts_as_the_worst(folder, tmp_path, monkeypatch):
    scores = iter([(math.nan, 1.0), (math.inf, 1.0), (1e4, 1.0)])
    monkeypatch.setattr(fitness_module, "score", lambda *_: Score(next(scores), 1, False))
    fitness = fitness_over(folder, tmp_path / "journal.jsonl")
    every = candidates()[:3]
    fitness.settle(lambda losses: [losses(one, 0) for one in every])
    (start, stop), _ = fitness.documents[0].spans
    broken = WORST * (stop - start) + 1.0
    tokens = fitness.documents[0].n_scored_tokens
    assert [fitness.loss(one, [0]) * tokens for one in every] == pytest.approx([broken, broken, 10001.0]), (
        "a finite loss is kept, however large"
    )


def test_plain_text_is_scored_whole_and_without_a_cap(folder, tmp_path):
    """A text loses more nats than any answer."""
    config = tiny.config(
        "search",
        folder,
        "name=x",
        f"model.path={folder}/base",
        "search.objective=text",
        "search.documents=1",
        "search.final_documents=0",
    )
    (document,) = draw_documents(config, Corpus.open(folder / "corpus"))
    assert document.n_scored_tokens == tiny.L - 1
    model = load.load_whole(folder / "base")
    table = rotary.install(model, METHODS["none"](tiny.SPECTRUM, tiny.L))
    fitness, one = Fitness(model, table, space(), [document], tmp_path / "journal.jsonl"), candidates()[0]
    fitness.settle(lambda losses: losses(one, 0))
    table.use(space().factors(one))
    table.window = "long"
    logits = model(torch.from_numpy(document.tokens)[None]).logits[0, :-1].double().log_softmax(-1)
    expected = -logits[torch.arange(tiny.L - 1), torch.from_numpy(document.tokens)[1:]].mean().item()
    assert fitness.loss(one, [0]) == pytest.approx(expected, rel=1e-5)
    (entry,) = map(json.loads, (tmp_path / "journal.jsonl").read_text().splitlines())
    assert len(entry["answers"]) == 1
    assert entry["answers"][0] > 50.0


def test_the_final_is_decided_on_the_further_documents_alone(folder, tmp_path, monkeypatch):
    """The candidate that is best on the generations' documents is worse on the further one, and must not win."""
    first, second = candidates()[:2]
    losses = {first.key: [0.1, 0.1, 3.0], second.key: [2.0, 2.0, 1.0]}
    fitness = fitness_over(folder, tmp_path / "journal.jsonl")
    monkeypatch.setattr(
        fitness,
        "_evaluate",
        lambda candidate, document: {
            "candidate": candidate.key,
            "document": document,
            "answers": [losses[candidate.key][document]] * 2,
        },
    )
    scorer = CandidateScorer(
        Space(tiny.SPECTRUM, tiny.L, SearchConfig(population=4, top_k=2, documents=2, final_documents=1)), fitness
    )
    best = sorted(scorer([first, second]), key=lambda one: one.loss)
    assert [one.candidate for one in best] == [first, second]
    final, confidence = scorer.final([*best, best[0]])
    assert (confidence.documents, confidence.unseen, confidence.spared) == (1, True, 0)
    assert [(one.candidate, one.documents) for one in final] == [(second, 1), (first, 1)]


def test_a_decision_is_run_until_no_loss_is_missing_and_its_lookups_are_counted(folder, tmp_path):
    """This decision looks at a second document only for the candidate with the lowest loss on the first."""
    fitness, every, runs = fitness_over(folder, tmp_path / "journal.jsonl"), candidates(), []

    def decide(losses):
        runs.append([float(losses(one, 0).sum()) for one in every])
        best = min(zip(runs[-1], every, strict=True), key=lambda pair: pair[0])[1]
        return float(losses(best, 2).sum()), best.key

    loss, key = fitness.settle(decide)
    assert fitness.document_forwards == fitness.computed == 5
    assert [(pair[0], pair[1]) for pair in pairs(tmp_path / "journal.jsonl")] == [
        *((one.key, 0) for one in every),
        (key, 2),
    ]
    assert fitness.settle(decide) == (loss, key)
    assert fitness.computed == 5


def whole_search(folder, journal, sharded: bool = False, algorithm: str = "evolution", chunk_tokens: int = 0) -> tuple:
    """A whole search; what it found and what it cost."""
    settings = SearchConfig(population=6, top_k=2, generations=3, documents=2, final_documents=1, algorithm=algorithm)
    fitness, space = fitness_over(folder, journal, sharded, chunk_tokens), Space(tiny.SPECTRUM, tiny.L, settings)
    scorer = CandidateScorer(space, fitness)
    generations = list(ALGORITHMS[algorithm](space, scorer, 0))
    final = scorer.final(generations[-1].population[:2])
    return generations, final, fitness.document_forwards, fitness.computed


def on_ranks(rank: int, world: int, folder, journals) -> dict:
    """Everything that needs ranks, in one launch of each size."""
    found: dict = {
        name: whole_search(folder, journals / f"{name}_{world}.jsonl", algorithm=name)
        for name in ("evolution", "gradient")
    }
    if world == 2:
        for name in ("evolution", "gradient"):
            found[f"{name}, resumed"] = whole_search(folder, journals / f"{name}_1.jsonl", algorithm=name)
        found["full disk"] = without_room(rank, folder, journals / "full_disk.jsonl")
        found["failing"] = failing(rank, folder, journals / "failing.jsonl")
    return found


def without_room(rank: int, folder, journal) -> str:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # a short write, as on a full disk
    with pytest.raises(UserError) as raised:
        whole_search(folder, journal)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return str(raised.value)


def failing(rank: int, folder, journal) -> str:
    if rank == 1:
        fitness_module.score = lambda *_: 1 / 0  # in this process only, and last
    with pytest.raises(RuntimeError) as raised:
        whole_search(folder, journal)
    return str(raised.value)


@pytest.fixture(scope="module")
def launched(folder, tmp_path_factory):
    """(folder of the journals, what each rank found by the number of ranks)."""
    journals = tmp_path_factory.mktemp("journals")
    return journals, {world: run_ranks(on_ranks, world, folder, journals, tmp_path=journals) for world in (1, 2, 4)}


def entries_of(journal) -> dict[tuple[str, int, bool], dict]:
    """By candidate, document, and whether the entry has slopes."""
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    by_key = {(entry["candidate"], entry["document"], "slopes" in entry): entry for entry in entries}
    assert len(by_key) == len(entries), "no evaluation is computed twice"
    return by_key


def forwards_of(entries: dict) -> int:
    """A loss with its slopes costs a forward and a backward pass: three forward passes."""
    return sum(3 if "slopes" in entry else 1 for entry in entries.values())


@pytest.mark.parametrize("algorithm", ["evolution", "gradient"])
def test_any_number_of_ranks_finds_the_same(launched, algorithm):
    journals, found = launched
    generations, final, wanted, computed = found[1][0][algorithm]
    alone = entries_of(journals / f"{algorithm}_1.jsonl")
    assert wanted == computed == forwards_of(alone), "one rank computes nothing in vain"
    assert algorithm != "evolution" or wanted == 2 * generations[-1].evaluated + 2
    for world in (2, 4):
        assert [one[algorithm][:3] for one in found[world]] == [(generations, final, wanted)] * world
        entries = entries_of(journals / f"{algorithm}_{world}.jsonl")
        assert {entry["rank"] for entry in entries.values()} == set(range(world)), "every rank works"
        assert wanted <= forwards_of(entries) == found[world][0][algorithm][3]
        assert all(entries[pair]["answers"] == alone[pair]["answers"] for pair in entries.keys() & alone.keys())


@pytest.mark.parametrize("algorithm", ["evolution", "gradient"])
def test_two_ranks_resume_the_journal_of_one(launched, algorithm):
    _, found = launched
    assert [one[f"{algorithm}, resumed"] for one in found[2]] == [found[1][0][algorithm]] * 2


def test_a_full_disk_is_one_sentence_on_every_rank_and_costs_only_the_line_that_was_being_written(
    folder, launched, tmp_path
):
    journals, found = launched
    journal = journals / "full_disk.jsonl"
    remedy = "free some room on that disk, and run the same command again to go on"
    sentence = f"rank 0: {journal} cannot be written (File too large); {remedy}"
    assert [one["full disk"] for one in found[2]] == [sentence] * 2
    assert journal.stat().st_size == 2000
    assert whole_search(folder, journal)[:3] == found[1][0]["evolution"][:3]


def test_an_error_on_one_rank_is_raised_on_all_ranks(launched):
    _, found = launched
    assert [one["failing"] for one in found[2]] == ["rank 1: ZeroDivisionError: division by zero"] * 2


def with_divided_weights(rank: int, world: int, folder, journals) -> dict:
    return {
        name: whole_search(folder, journals / f"{name}.jsonl", True, name, chunk_tokens=128 * (name == "gradient"))
        for name in ("evolution", "gradient")
    }


def test_ranks_that_divide_the_weights_find_the_same(folder, launched, tmp_path):
    """Some rounds have fewer pairs than ranks: a rank without a pair joins the passes all the same. The descent
    computes its layers again in the backward pass.
    """
    found = run_ranks(with_divided_weights, 2, folder, tmp_path, tmp_path=tmp_path, timeout_s=240)
    for name in ("evolution", "gradient"):
        generations, (final, _), wanted, _ = launched[1][1][0][name]
        assert forwards_of(entries_of(tmp_path / f"{name}.jsonl")) == found[0][name][3]
        for one in found:
            divided_generations, (divided_final, _), divided_wanted, _ = one[name]
            for divided, whole in zip(divided_generations, generations, strict=True):
                assert divided.best.loss == pytest.approx(whole.best.loss, rel=1e-4)
                assert name == "gradient" or divided.best.candidate == whole.best.candidate
            assert [one.loss for one in divided_final] == pytest.approx([one.loss for one in final], rel=1e-4)
            assert divided_wanted == wanted
