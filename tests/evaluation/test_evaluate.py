"""The verb evaluate: models side by side, on any number of ranks, killed and started again, given wrong input."""

import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import published
import pytest
import tiny
from ranks import RankError, forking, run_ranks

from lr2train import journals
from lr2train.cli import door
from lr2train.cli.composition import compose
from lr2train.config import UserError
from lr2train.evaluate import evaluate
from lr2train.evaluation import answers as answers_module
from lr2train.evaluation import loft
from lr2train.evaluation.models import compared
from lr2train.evaluation.results import folder_name
from lr2train.evaluation.subject import as_published
from lr2train.evaluation.tasks import Suite
from lr2train.parallel import processes

SMALL = [
    "eval.lengths_tokens=[64,192]", "eval.depths=[0.0,1.0]", "eval.samples=2", "eval.text_documents=1",
    "eval.methods=[none]", "eval.batch_tokens=400",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("no_trace_of_a_job")


@pytest.fixture(scope="module")
def world(world):
    tiny.make_run(world, "first")
    tiny.make_run(world, "second", attention_factor=1.1)
    return world


def config_of(world: Path, *more: str, small: list[str] = SMALL):
    return compose("evaluate", [*tiny.arguments(world, f"runs_folder={world}"), *small, *more])


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_sample_score_and_table_is_written(world):
    result = evaluate(config_of(world, "run=first"))
    folder = world / "first" / "evaluation"
    for label in ("none_untrained", "longrope2_untrained", "longrope2_trained"):
        samples = lines(folder / label / "needles.jsonl")
        assert [one["length_tokens"] for one in samples] == [64] * 4 + [192] * 4
        assert {one["depth"] for one in samples} == {0.0, 1.0} and all(one["answers"] for one in samples)
    trained = [one for one in result["scores"] if one["model"] == "longrope2 trained" and one["task"] == "needles"]
    assert [(one["length_tokens"], one["samples"], one["failed"]) for one in trained] == [(64, 4, 0), (192, 4, 0)]
    samples = [one for one in lines(folder / "longrope2_trained" / "needles.jsonl") if one["length_tokens"] == 64]
    assert {one["window"] for one in samples} == {"short"}
    assert trained[0]["measures"]["recall"] == pytest.approx(sum(one["recall"] for one in samples) / 4)
    rows = (folder / "scores.csv").read_text().splitlines()
    assert rows[0].startswith("model,task,length_tokens,measure,value") and len(rows) == 1 + 3 * 2 * (2 + 1)
    assert (folder / "needles.png").stat().st_size > 1000
    positions = result["rows"][-1]["by_position"]
    assert [(one["first"], one["stop"]) for one in positions] == [(1, 192)]


def test_several_runs_and_folders_stand_side_by_side(world, tmp_path):
    more = ["name=pair", f"run=[{world}/base,first,{world}/first/model]", "eval.lengths_tokens=[64]"]
    result = evaluate(config_of(world, *more))
    assert [row["label"] for row in result["rows"]] == ["base", "first", "model"]
    base, first, as_published = result["rows"]
    assert (world / "pair" / "evaluate.json").exists()
    assert first["by_length"] == as_published["by_length"], "the folder that train wrote holds the same two tables"
    assert base["by_length"] != first["by_length"]
    shares = [row["by_length"][0]["shares"] for row in result["rows"]]
    assert shares[0].keys() == shares[1].keys() and len(shares[0]) == 4, "the same documents have the same names"
    assert [np.mean(list(one.values())) for one in shares] == [
        row["by_length"][0]["accuracy"] for row in result["rows"]
    ]


def test_a_model_is_asked_up_to_its_own_window(world):
    result = evaluate(config_of(world, "name=windows", f"run=[{world}/base,first]"))
    assert [[one["length_tokens"] for one in row["by_length"]] for row in result["rows"]] == [[64], [64, 192]]
    assert "-" in (world / "windows" / "evaluation" / "table.txt").read_text().splitlines()[2]


def test_a_corpus_that_only_the_longer_model_has_room_for_is_left_out_of_the_other(world, tmp_path, monkeypatch):
    monkeypatch.setattr(loft, "LENGTHS", {"32k": 100})
    corpus = tmp_path / "nq" / "32k"
    published.write_lines(corpus / "corpus.jsonl", [{"pid": "a", "title_text": "t", "passage_text": "a text"}])
    for name in ("few_shot", "test"):
        asked = {"qid": name, "query_text": "Which?", "answers": [["a", 1]]}
        published.write_lines(corpus / f"{name}_queries.jsonl", [asked])
    more = ["name=loft", f"run=[{world}/base,first]", f"eval.loft={tmp_path}", "eval.tasks=[loft_nq]"]
    found = evaluate(config_of(world, *more))["scores"]
    assert [(one["model"], one["samples"] + one["failed"]) for one in found] == [("first", 1)]
    assert re.search(r"base +- +-\n", (world / "loft" / "evaluation" / "table.txt").read_text())


def test_a_run_that_is_read_only_is_evaluated_into_another_folder(world, monkeypatch, capsys):
    own = world / "second" / "evaluation"
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    evaluate(config_of(world, "name=elsewhere", "run=second", "eval.lengths_tokens=[64]"))
    assert (world / "elsewhere" / "evaluate.json").exists() and not own.exists()
    assert f"second cannot be written; the results go to {world}/elsewhere" in capsys.readouterr().err


def test_models_of_one_name_have_labels_of_their_own(world):
    found = compared(config_of(world, "name=x", f"run=[first,{world}/first]"))
    assert [one.label for one in found.subjects] == ["first", "first 2"]
    shutil.copytree(world / "first", world / "First")
    shutil.copytree(world / "first", world / "first 2")
    found = compared(config_of(world, "name=x", "run=[first,First,first 2]"))
    assert [folder_name(one.label) for one in found.subjects] == ["first", "first_2", "first_2_2"]


def test_a_damaged_line_of_the_journal_is_told_and_computed_again(world):
    config = config_of(world, "name=damaged", f"run=[{world}/first/model]", "eval.lengths_tokens=[64]")
    whole = evaluate(config)
    journal = world / "damaged" / "evaluation" / "model" / "answers.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b"nlls", b"nlXs", 1))
    again = evaluate(config)
    assert "1 damaged lines of the journal are computed again" in (world / "damaged" / "log.txt").read_text()
    assert again["rows"][0]["by_length"][0]["accuracy"] == whole["rows"][0]["by_length"][0]["accuracy"]


def test_a_model_without_a_window_has_one_sentence(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_positions=64).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no max_position_embeddings"):
        as_published("gpt2", tmp_path, {})


def test_what_an_earlier_command_measured_stays_in_the_report(world):
    config = [*SMALL, "run=second"]
    evaluate(config_of(world, *config))
    needles = json.loads((world / "second" / "evaluate.json").read_text())
    evaluate(config_of(world, *config, "eval.tasks=[text]"))
    both = json.loads((world / "second" / "evaluate.json").read_text())
    assert both["rows"] == needles["rows"]
    assert sorted(map(str, both["scores"])) == sorted(map(str, needles["scores"]))
    tiny.make_model(world / "second" / "model", tiny.factors_with(1.1), seed=7)
    result = evaluate(config_of(world, *config, "eval.tasks=[text]"))
    assert not result["rows"], "rows of other weights are dropped"
    assert not [one for one in result["scores"] if one["model"] == "longrope2 trained" and one["task"] == "needles"]


def test_text_files_keep_the_tables_of_earlier_commands(world, capsys):
    config = ["name=tables", f"run=[{world}/first/model]", "eval.lengths_tokens=[192]"]
    text = evaluate(config_of(world, *config, "eval.tasks=[text]"))
    shown = capsys.readouterr().out
    (score,) = text["scores"]
    assert shown.splitlines()[0] == "Perplexity of held-out text, by length"
    assert shown.split()[-1] == f"{math.exp(score['measures']['nats']):.2f}"
    evaluate(config_of(world, *config))
    needles = (world / "tables" / "evaluation" / "table.txt").read_text()
    evaluate(config_of(world, *config, "eval.tasks=[text]"))
    assert (world / "tables" / "evaluation" / "table.txt").read_text() == needles
    assert needles.splitlines()[0] == "Needles found, percent of the answers"
    assert needles.splitlines()[3].startswith("4 documents a cell; standard error of a cell: 25 points at 50%")


def on_ranks(rank: int, world_size: int, world: Path, name: str):
    """The verb inside a process group that exists already, and goes on after it."""
    with mock.patch("lr2train.evaluate.processes.stop"):
        result = evaluate(config_of(world, f"name={name}", f"run=[{world}/base,first]"))
    return {key: result[key] for key in ("rows", "scores")}


@pytest.mark.parametrize("n_ranks", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_scores_are_equal_on_any_number_of_ranks(n_ranks, world, tmp_path):
    """The samples are no multiple of three."""
    alone = evaluate(config_of(world, f"name=one_beside_{n_ranks}", f"run=[{world}/base,first]"))
    name = f"ranks_{n_ranks}"
    found = run_ranks(on_ranks, n_ranks, world, name, tmp_path=tmp_path, timeout_s=120)
    assert all(one["rows"] == found[0]["rows"] for one in found)
    for ours, theirs in zip(alone["scores"], found[0]["scores"], strict=True):
        assert {k: v for k, v in ours.items() if k not in ("seconds", "measures")} == {
            k: v for k, v in theirs.items() if k not in ("seconds", "measures")
        }
        for measure, value in ours["measures"].items():
            # ranks have other numbers of threads, so sums differ in their last bits; decisions do not
            assert theirs["measures"][measure] == pytest.approx(value, rel=1e-6)
    journal = lines(world / name / "evaluation" / "first" / "answers.jsonl")
    assert len({one["key"] for one in journal}) == len(journal) == 2 * 4 + 2


def test_another_end_of_texts_is_another_model(world, tmp_path):
    """The weights are the same: generation_config.json says which ids end a text, and answers depend on them."""
    folder = tmp_path / "model"
    shutil.copytree(world / "first" / "model", folder)
    config = config_of(world, "name=ends", f"run=[{folder},first]")

    def identity():
        models = compared(config)
        return Suite(models.config, [64], models, tmp_path).identity(models.subjects[0])

    before = identity()
    assert identity() == before
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9]}))
    assert identity() != before


class Killed(BaseException):
    pass


def test_a_killed_evaluation_goes_on_where_it_was(world, monkeypatch):
    whole = evaluate(config_of(world, "name=whole", "run=[first]"))
    append, written = answers_module.journals.append, []

    def dying(file, entries):
        append(file, entries)
        written.extend(entries)
        if len(written) >= 7:
            raise Killed

    monkeypatch.setattr(answers_module.journals, "append", dying)
    folder = world / "first"
    for file in (folder / "evaluation").rglob("answers.jsonl"):
        file.unlink()
    starts = 0
    while True:
        written.clear()
        starts += 1
        try:
            again = evaluate(config_of(world, "name=whole", "run=[first]"))
            break
        except Killed:
            processes.stop()
    assert starts > 2
    journal = lines(folder / "evaluation" / "longrope2_trained" / "answers.jsonl")
    assert len({one["key"] for one in journal}) == len(journal), "no sample is computed twice"
    for ours, theirs in zip(whole["rows"], again["rows"], strict=True):
        for one, other in zip(ours["by_length"], theirs["by_length"], strict=True):
            assert one["accuracy"] == other["accuracy"]
            assert math.isclose(one["answer_perplexity"], other["answer_perplexity"], rel_tol=1e-5)


def test_needles_can_be_hidden_in_a_folder_of_texts(world, tmp_path):
    (tmp_path / "a.txt").write_text("It was a dark night. " * 400)
    more = ["name=essays", f"run=[{world}/first/model]", f"eval.essays={tmp_path}"]
    result = evaluate(config_of(world, *more))
    assert [one["length_tokens"] for one in result["rows"][0]["by_length"]] == [64, 192]


def test_several_wordings_are_measured_together(world):
    result = evaluate(config_of(world, "name=wordings", f"run=[{world}/first/model]", "eval.wordings=[code,plain]",
                                "eval.lengths_tokens=[192]"))  # fmt: skip
    samples = lines(world / "wordings" / "evaluation" / "model" / "needles.jsonl")
    assert [one["wording"] for one in samples] == ["code"] * 4 + ["plain"] * 4
    assert result["rows"][0]["cells"][0]["documents"] == 4


def test_a_model_of_another_type_is_measured_as_it_was_published(world, tmp_path):
    """YaRN: a rule that is none of ours; its window is the config's."""
    folder = tiny.make_model(tmp_path / "yarn")
    values = json.loads((folder / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1000.0}
    (folder / "config.json").write_text(
        json.dumps({**values, "rope_parameters": yarn, "rope_scaling": yarn, "max_position_embeddings": 256})
    )
    result = evaluate(config_of(world, "name=yarn", f"run=[{folder},{world}/base]", "eval.lengths_tokens=[64,192]"))
    assert [[one["length_tokens"] for one in row["by_length"]] for row in result["rows"]] == [[64, 192], [64]]
    assert result["rows"][0]["by_length"][0] != result["rows"][1]["by_length"][0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["run=[first,nothing]"], r"run=nothing: .*nothing/train\.json does not exist, .*; set run to a finished run"),
        (["run=[first,meta/llama]"], r"run=meta/llama: .*downloads are off"),
        (["run=first", "eval.tasks=[]"], r"eval\.tasks=\[\] leaves nothing to measure"),
        (["run=first", "eval.tasks=[loft]"], r"eval\.loft"),
        (["run=first", "eval.tasks=[qa_1]"], r"eval\.tasks names qa_1, and eval\.squad is null; set eval\.squad"),
        (["run=first", "eval.tasks=[cwe,vt]"], r"eval\.tasks=\[cwe,vt\] leaves nothing to measure at .*=\[64, 192\]"),
        (["run=first", "eval.tasks=[longbench]", "eval.longbench=/nowhere"], r"eval\.longbench=/nowhere"),
        (["run=first", "eval.wordings=[loud]"], r"eval\.wordings holds loud"),
        (["run=first", "eval.lengths_tokens=[64,300]"], r"eval\.lengths_tokens holds 300, beyond .* of 256"),
        (["run=first", "eval.lengths_tokens=[20]"], "too short"),
        (["run=first", "eval.essays=/nowhere"], r"eval\.essays=/nowhere holds no text"),
    ],
)
def test_wrong_input_is_one_sentence(world, more, words):
    with pytest.raises(UserError, match=words) as refused:
        evaluate(config_of(world, "name=wrong", *more))
    assert len(re.findall(r"\n", str(refused.value))) == 0


def test_other_verbs_take_one_run(world):
    with pytest.raises(UserError, match=r"run=\[first,second\] names several runs, and export takes one"):
        compose("export", [f"runs_folder={world}", "run=[first,second]"])


def killed_after(n_answers: int, arguments: list[str]) -> None:
    """The verb from its command line, in a process that kills itself after so many more answers in a journal."""
    append, written = journals.append, []

    def append_and_die(file, entries):
        append(file, entries)
        written.extend(entries)
        if len(written) >= n_answers:
            os.kill(os.getpid(), signal.SIGKILL)

    journals.append = append_and_die
    sys.argv = ["evaluate", *arguments]
    door.main("evaluate", evaluate)


def one_of_two_killed(rank: int, world_size: int, arguments: list[str]) -> None:
    killed_after(4, arguments)


def test_an_evaluation_killed_with_kill_9_goes_on_to_the_same_scores(world, tmp_path):
    """On one rank, then on two ranks of which the first is killed; scores are those of an undisturbed evaluation."""
    published.write_lines(
        tmp_path / "trec.jsonl",
        [
            {"input": f"Where is {'a ' * number}?", "context": "x", "answers": ["Date"], "all_classes": ["Date"]}
            for number in range(6)
        ],
    )
    mixed = [f"eval.longbench={tmp_path}", "eval.tasks=[needles,longbench_trec]", "run=[first,second]"]
    arguments = [*tiny.arguments(world), *SMALL, *mixed]
    process = forking().Process(target=killed_after, args=(5, [*arguments, "name=killed"]))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(RankError):
        run_ranks(one_of_two_killed, 2, [*arguments, "name=killed"], tmp_path=tmp_path)
    folder = world / "killed" / "evaluation"
    assert not (world / "killed" / "evaluate.json").exists()
    assert sum(len(lines(file)) for file in folder.rglob("answers.jsonl")) >= 9, "answers of both starts are kept"
    again, whole = (evaluate(config_of(world, *mixed, f"name={name}")) for name in ("killed", "undisturbed"))
    for label in ("first", "second"):
        journal = lines(folder / label / "answers.jsonl")
        assert len({one["key"] for one in journal}) == len(journal)
        undisturbed = lines(world / "undisturbed" / "evaluation" / label / "answers.jsonl")
        assert {one["key"] for one in journal} == {one["key"] for one in undisturbed}
    for ours, theirs in zip(whole["scores"], again["scores"], strict=True):
        assert theirs["measures"] == pytest.approx(ours["measures"], rel=1e-6)
        assert (theirs["samples"], theirs["failed"]) == (ours["samples"], ours["failed"])
