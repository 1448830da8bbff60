"""search, evaluate and export from end to end, on a random tiny model and a corpus of a few text files."""

import errno
import gc
import json
import os
import platform
import shutil
import signal
import sys
import weakref
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from ranks import forking, run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lr2train import evaluate as evaluate_module
from lr2train import io, journals, run
from lr2train.cli import door as cli
from lr2train.cli.composition import compose
from lr2train.config import UserError
from lr2train.evaluate import evaluate
from lr2train.evaluation import trained_run
from lr2train.evaluation.models import compared
from lr2train.export import export
from lr2train.generate import generate
from lr2train.model import folder as folder_module
from lr2train.model import load
from lr2train.model.weights import TensorReader
from lr2train.rope import Factors
from lr2train.rope import hf as rope_hf
from lr2train.search import search
from lr2train.serving import folders
from lr2train.serving.folders import class_of

SEARCH = [
    "search=paper",
    "search.search_attention_factor=true",
    "search.move_critical_index=0.2",
    "search.questions=2",
    "search.distractors=1",
    "search.final_documents=1",
    "search.population=6",
    "search.top_k=2",
    "search.documents=2",
    "search.generations=3",
]


pytestmark = pytest.mark.usefixtures("no_trace_of_a_job")


def overrides(world: Path, tmp_path: Path, *more: str) -> list[str]:
    """Runs lie in tmp_path; the corpus and the base stay in the world."""
    return tiny.arguments(world, f"runs_folder={tmp_path}", *more)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- search ----


def search_config(world, tmp_path, *more: str):
    return compose("search", overrides(world, tmp_path, f"model.path={world}/base", *SEARCH, *more))


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests of the result: pictures take most of the time of so small a search."""
    monkeypatch.setattr("lr2train.search.write_search_pictures", lambda folder: None)


def test_search_writes_factors_that_a_model_can_use(world, tmp_path):
    result = search(search_config(world, tmp_path, "name=s"))
    factors = Factors.load(tmp_path / "s" / "factors.json")
    assert factors.spectrum == tiny.SPECTRUM
    assert factors.rescale[result["critical_index"] :] == tuple(result["tail"])
    assert factors.attention_factor == result["attention_factor"]
    journal, generations = lines(tmp_path / "s" / "journal.jsonl"), lines(tmp_path / "s" / "generations.jsonl")
    assert len(journal) == result["document_forwards"] == result["evaluations"] == 2 * (6 + 3 * 4) + 2
    assert result["candidates"] == 6 + 3 * 4
    assert [one["generation"] for one in generations] == [0, 1, 2, 3]
    assert generations[-1]["best_perplexity"] == min(generations[-1]["perplexities"])
    assert result["scored_documents"] == 1, "the final's own document decides"
    assert len(result["finalists"]) == 2
    assert 0.5 <= result["confidence"]["chance"] <= 1 and result["confidence"]["documents"] == 1
    assert result["confidence"]["words"] in (tmp_path / "s" / "log.txt").read_text()
    found = json.loads((tmp_path / "s" / "factors.json").read_text())["search"]
    assert found["settings"]["population"] == 6
    assert [one["generation"] for one in found["history"]] == [0, 1, 2, 3]
    assert found["inputs"]["model"]
    pictures = {file.name for file in (tmp_path / "s" / "pictures").iterdir()}
    assert {"factors.png", "fitness.png", "rcd.png", "temperature.png"} <= pictures


@pytest.mark.parametrize(
    "more",
    [
        ["search=longrope"],
        ["search=gradient", "search.distractors=1", "search.space=longrope"],
        ["search=gradient", "search.distractors=1", "search.objective=text"],
        ["search=gradient", "search.distractors=1", "search.chunk_tokens=100"],
        ["search=small", "search.distractors=1", "search.final_documents=0"],
        ["search=authors", "search.critical_index=5", "search.tail_high=4"],
    ],
)
def test_every_space_objective_and_algorithm_ends_with_factors_and_pictures(world, tmp_path, more):
    result = search(search_config(world, tmp_path, "name=s", *more))
    factors = Factors.load(tmp_path / "s" / "factors.json")
    assert factors.rescale[-len(result["tail"]) :] == tuple(result["tail"])
    assert (result["critical_index"] == 0) == ("longrope" in " ".join(more))
    assert (result["confidence"] is None) == (more[0] == "search=small"), "one track has no runner-up"
    assert (tmp_path / "s" / "pictures" / "factors.png").exists()


def test_a_finished_search_is_not_run_again_and_refuses_another_config(world, tmp_path, monkeypatch):
    first = search(search_config(world, tmp_path, "name=s", "search.generations=1"))
    monkeypatch.setattr(load, "load_whole", lambda *_: pytest.fail("must not load the model"))
    assert search(search_config(world, tmp_path, "name=s", "search.generations=1")) == first
    with pytest.raises(UserError, match=r"search\.generations: 1 -> 2"):
        search(search_config(world, tmp_path, "name=s", "search.generations=2"))


def test_a_journal_of_another_model_under_the_same_path_is_refused(world, tmp_path, no_pictures):
    base = tiny.make_model(tmp_path / "base")
    settings = ["name=s", f"model.path={base}", "search.generations=1"]
    search(search_config(world, tmp_path, *settings))
    (tmp_path / "s" / "search.json").unlink()  # as if killed before its end
    tiny.make_model(base, seed=7)
    with pytest.raises(UserError, match=r"was made from another model than is there now"):
        search(search_config(world, tmp_path, *settings))


def killed_after(n_evaluations: int, arguments: list[str]) -> None:
    """The verb from its command line, in a process that kills itself as soon as the journal holds ``n_evaluations``."""
    append = journals.append

    def append_and_die(file, entries):
        append(file, entries)
        if len(lines(file)) >= n_evaluations:
            os.kill(os.getpid(), signal.SIGKILL)

    journals.append = append_and_die
    sys.argv = ["search", *arguments]
    cli.main("search", search)


KILLS = (3, 14)  # evaluations in the journal at each kill: in generation 0, and later


def kill_searches(folder: Path, commands: dict[str, list[str]]) -> None:
    """Start and kill each search twice, and note what each kill leaves. One process imports for all of them: they are
    forked from it.
    """
    noted = []
    for name, arguments in commands.items():
        for n_evaluations in KILLS:
            if (pid := os.fork()) == 0:
                killed_after(n_evaluations, arguments)
            _, status = os.waitpid(pid, 0)
            left = {file.name for file in (folder / name).iterdir()}
            noted.append(
                [name, os.WTERMSIG(status), len(lines(folder / name / "journal.jsonl")), "factors.json" in left]
            )
    (folder / "kills.json").write_text(json.dumps(noted))


@pytest.fixture(scope="module")
def killed(world, tmp_path_factory):
    """(runs folder, command lines by algorithm) of searches that were killed twice."""
    folder = tmp_path_factory.mktemp("killed")
    commands = {
        algorithm: overrides(
            world, folder, f"model.path={world}/base", *SEARCH, f"search.algorithm={algorithm}", f"name={algorithm}"
        )
        for algorithm in ("evolution", "gradient")
    }
    process = forking().Process(target=kill_searches, args=(folder, commands))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert json.loads((folder / "kills.json").read_text()) == [
        [name, signal.SIGKILL, n, False] for name in commands for n in KILLS
    ]
    return folder, commands


@pytest.mark.parametrize("algorithm", ["evolution", "gradient"])
def test_a_search_killed_with_kill_9_is_resumed_to_the_same_result(world, tmp_path, killed, no_pictures, algorithm):
    folder, commands = killed
    left = sum(map(forwards, lines(folder / algorithm / "journal.jsonl")))
    search(compose("search", commands[algorithm]))
    assert f"{left} evaluations found in the journal" in (folder / algorithm / "log.txt").read_text()
    undisturbed = search(search_config(world, tmp_path, f"search.algorithm={algorithm}", "name=undisturbed"))
    found, expected = folder / algorithm, tmp_path / "undisturbed"
    assert (found / "generations.jsonl").read_bytes() == (expected / "generations.jsonl").read_bytes()
    assert Factors.load(found / "factors.json") == Factors.load(expected / "factors.json")
    journal = lines(found / "journal.jsonl")
    assert len({(one["candidate"], one["document"], "slopes" in one) for one in journal}) == len(journal)
    assert sum(map(forwards, journal)) == undisturbed["document_forwards"]


def forwards(entry: dict) -> int:
    """Document-forwards of a line of the journal; a loss with its slopes counts three."""
    return 3 if "slopes" in entry else 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["model.path=null"], r"model\.path is empty"),
        (["data.path=null"], r"data\.path is empty"),
        (["rope.target_window_tokens=64"], r"rope\.target_window_tokens=64 does not exceed the model's window of 64"),
        (["search.critical_index=8"], r"search\.critical_index=8 is outside"),
        (["search.tail_high=0.5"], r"search\.tail_low=1\.0 and search\.tail_high=0\.5 are no range"),
        (["search.tail_high=inf"], r"search\.tail_high=inf is not a finite number above 0"),
        (["search.mutation_spread=-1"], r"search\.mutation_spread=-1\.0 is below 1e-06"),
        (["search.attention_factor=0"], r"search\.attention_factor=0\.0 is not above 0"),
        (
            ["search.questions=1600"],
            r"search\.questions=1600 and search\.distractors=1 make more needles than there are names",
        ),
        (["search.questions=60"], r"needle document of 256 tokens is \d+ too short"),
        (["search.depths=[]"], r"search\.depths=\[\] names no depth"),
    ],
)
def test_bad_input_of_a_search_is_refused_before_weights_are_read(world, tmp_path, monkeypatch, more, words):
    monkeypatch.setattr(load, "load_whole", lambda *_: pytest.fail("must not load the model"))
    with pytest.raises(UserError, match=words):
        search(search_config(world, tmp_path, "name=s", *more))


def at_a_folder_in_use(rank: int, ranks: int, settings: list[str]) -> str:
    with mock.patch.dict(os.environ, RANK=str(rank)), pytest.raises(UserError) as raised:
        search(compose("search", settings))
    return str(raised.value)


def test_a_folder_in_use_is_refused_on_every_rank(world, tmp_path):
    settings = overrides(world, tmp_path, f"model.path={world}/base", *SEARCH, "name=s")
    lock = run.open_run(compose("search", settings), "search", ()).lock()
    said = run_ranks(at_a_folder_in_use, 2, settings, tmp_path=tmp_path)
    assert (
        said
        == [
            f"rank 0: run folder {tmp_path}/s is in use by search, process {os.getpid()} on {platform.node()}; wait "
            "until it has ended, or choose another name="
        ]
        * 2
    )
    lock.close()


def test_a_corpus_of_another_vocabulary_is_refused(world, tmp_path):
    base = tiny.make_model(tmp_path / "base")
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**values, "vocab_size": tiny.VOCAB - 1}))
    with pytest.raises(UserError, match=r"uses 400 token ids and the model knows 399"):
        search(search_config(world, tmp_path, "name=s", f"model.path={base}"))


# ---- evaluate ----

EVAL = ["eval.lengths_tokens=[64,128,256]", "eval.depths=[0.0,1.0]", "eval.samples=1", "eval.text_documents=1"]


def evaluate_config(world, runs, *more: str):
    return compose("evaluate", [*tiny.arguments(world, f"runs_folder={runs}"), *EVAL, "eval.methods=[none,pi]", *more])


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Labels of the models that are really asked."""
    labels, model = [], evaluate_module._model
    monkeypatch.setattr(
        evaluate_module, "_model", lambda subject, *rest: (labels.append(subject.label), model(subject, *rest))[1]
    )
    return labels


def test_evaluate_compares_before_and_after(world, capsys):
    tiny.make_run(world, "compared")
    result = evaluate(evaluate_config(world, world, "run=compared"))
    assert [row["label"] for row in result["rows"]] == [
        "none untrained",
        "pi untrained",
        "longrope2 untrained",
        "longrope2 trained",
    ]
    assert (result["original_window_tokens"], result["target_window_tokens"], result["lengths_tokens"]) == (
        64,
        256,
        [64, 128, 256],
    )
    assert json.loads((world / "compared" / "evaluate.json").read_text()) == result
    none, pi, before, after = result["rows"]
    for row in result["rows"]:
        assert [(cell["length_tokens"], cell["depth"], cell["documents"]) for cell in row["cells"]] == [
            (length, depth, 1) for length in (64, 128, 256) for depth in (0.0, 1.0)
        ]
    text = [[one["text_perplexity"] for one in row["by_length"]] for row in (none, pi, before, after)]
    assert text[0][0] == pytest.approx(text[2][0], rel=1e-6), "up to L0 the factors leave the original model"
    assert text[1][0] != text[0][0], "pi rescales at every length, as it was published"
    assert len({row[2] for row in text}) == 4
    assert "longrope2 trained" in (printed := capsys.readouterr().out)
    assert (world / "compared" / "evaluation" / "table.txt").read_text() == printed
    assert (world / "compared" / "evaluation" / "prompt.txt").read_text()
    assert result["provenance"]["packages"]["torch"]


def test_a_run_is_evaluated_with_the_settings_of_its_training(world):
    tiny.make_run(world, "alone", dtype=torch.bfloat16)
    bare = [f"runs_folder={world}", "run=alone"]
    found = compared(compose("evaluate", bare))
    config, subjects = found.config, found.subjects
    assert (config.model.dtype, config.model.path, config.data.path) == ("bfloat16", f"{world}/base", f"{world}/corpus")
    assert (config.data.needles.wording, config.data.needles.digits) == ("code", 4)
    assert subjects[-2].folder == world / "base"
    told = [*bare, "model.dtype=float16", "data.needles.digits=5", "model.path=/elsewhere", "data.path=/other"]
    config = compared(compose("evaluate", told)).config
    assert (config.model.dtype, config.model.path, config.data.path) == ("float16", f"{world}/base", "/other")
    assert (config.data.needles.wording, config.data.needles.digits) == ("code", 5)


def test_overrides_of_a_run_are_laid_over_its_base_alone(world):
    folder = tiny.make_run(world, "overridden")
    values = json.loads((folder / "train.config.json").read_text())
    values["model"]["overrides"] = {"rms_norm_eps": 0.5}
    (folder / "train.config.json").write_text(json.dumps(values))
    subjects = compared(compose("evaluate", [f"runs_folder={world}", "run=overridden"])).subjects
    models = [load.load_whole(subject.folder, "float32", "cpu", subject.overrides) for subject in subjects[-2:]]
    assert [model.config.rms_norm_eps for model in models] == [0.5, 1e-6]
    assert all(subject.overrides == {"rms_norm_eps": 0.5} for subject in subjects[:-1])


def test_rows_are_measured_once_and_again_when_what_decides_them_changes(world, measured):
    folder = tiny.make_run(world, "cached")
    first = evaluate(evaluate_config(world, world, "run=cached"))
    assert len(measured) == 4
    measured.clear()
    assert evaluate(evaluate_config(world, world, "run=cached"))["rows"] == first["rows"]
    assert measured == []
    evaluate(evaluate_config(world, world, "run=cached", "eval.methods=[none,ntk]"))
    assert measured == ["ntk untrained"], "another row leaves the rows that are there"
    measured.clear()
    evaluate(evaluate_config(world, world, "run=cached", "eval.seed=1"))
    assert len(measured) == 4
    measured.clear()
    tiny.make_model(folder / "model", tiny.factors_with(), seed=5)
    evaluate(evaluate_config(world, world, "run=cached", "eval.seed=1"))
    assert measured == ["longrope2 trained"], "the weights were written anew"
    measured.clear()
    journal = folder / "evaluation" / "longrope2_trained" / "answers.jsonl"
    journal.write_text('"nlls": [1'.join(journal.read_text().rsplit('"nlls": [', 1)))
    evaluate(evaluate_config(world, world, "run=cached", "eval.seed=1"))
    assert measured == ["longrope2 trained"], "a damaged answer is no measurement"


def test_any_model_folder_can_be_measured(world, tmp_path):
    tiny.factors_with().save(tmp_path / "factors.json")
    rope = ["name=other", f"model.path={world}/base", f"rope.factors={tmp_path}/factors.json"]
    result = evaluate(evaluate_config(world, tmp_path, *rope))
    assert [row["label"] for row in result["rows"]] == ["none untrained", "pi untrained", "longrope2"]
    assert (tmp_path / "other" / "evaluate.json").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["name=x"], "run is empty"),
        (["run=nothing"], r"nothing/train\.json does not exist"),
        (["run=refused", "eval.methods=[yarm]"], r"eval\.methods names yarm, .* not one of"),
        (["run=refused", "eval.methods=[yarn_rcd]"], r"eval\.methods names yarn_rcd, .* needs rope\.critical_index"),
        (
            ["run=refused", "eval.lengths_tokens=[512]"],
            r"eval\.lengths_tokens holds 512, beyond the target window of 256",
        ),
        (["run=refused", "eval.text_documents=0"], r"eval\.text_documents=0 is not between 1"),
        (["run=refused", "eval.depths=[0.5,1.5]"], r"eval\.depths\.1=1\.5 is not between 0 and 1"),
        (["run=refused", "eval.depths=[]"], r"eval\.depths=\[\] leaves nothing to measure"),
    ],
)
def test_bad_input_of_evaluate_is_refused(world, more, words):
    tiny.make_run(world, "refused")
    with pytest.raises(UserError, match=words):
        evaluate(evaluate_config(world, world, *more))


# ---- export ----


def export_config(world, *more: str):
    return compose("export", tiny.arguments(world, *more))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("attention_factor", [1.0, 1.2])
def test_an_export_is_the_model_in_plain_transformers(world, attention_factor, capsys):
    folder = tiny.make_run(world, f"exported_{attention_factor}", attention_factor)
    result = export(export_config(world, f"run={folder.name}"))
    of = result["folders"]
    assert of["short"]["short_logit_difference"] == 0.0, "bit for bit"
    assert of["two"]["short_logit_difference"] == of["two"]["long_logit_difference"] == 0.0, "bit for bit"
    assert of["long"]["long_logit_difference"] < 5e-5, "folding rounds: logits are of the order of 10"
    assert (of["long"]["long_logit_difference"] == 0) == (attention_factor == 1)
    assert {name: one["window_tokens"] for name, one in of.items()} == {"long": tiny.L, "short": tiny.L0, "two": tiny.L}
    assert json.loads((folder / "export.json").read_text()) == result
    assert result["bytes"] == sum(
        {file.stat().st_ino: file.stat().st_size for file in folder.glob("export/*/*")}.values()
    )

    original = load_file(folder / "model" / "model.safetensors")
    for name in ("long", "short", "two"):  # without code of the folder
        independent = AutoModelForCausalLM.from_pretrained(folder / "export" / name).eval()
        assert type(independent).__name__ == "LlamaForCausalLM"
        same = [torch.equal(original[key], parameter) for key, parameter in independent.named_parameters()]
        assert all(same) == (name != "long" or attention_factor == 1)
        tokenizer = AutoTokenizer.from_pretrained(folder / "export" / name)
        assert (
            tokenizer.decode(tokenizer("some words 1234")["input_ids"], skip_special_tokens=True) == "some words 1234"
        )
        assert tokenizer.model_max_length == independent.config.max_position_embeddings == of[name]["window_tokens"]
        card = (folder / "export" / name / "README.md").read_text()
        assert card.startswith("---\n")
        assert f"# {folder.name}\n" in card
    said = capsys.readouterr().err
    for runtime in ("transformers", "vLLM", "SGLang", "llama.cpp", "TensorRT-LLM"):
        assert f"[export] {runtime}, " in said
    assert ("up to 64 tokens are exact too" in said) == (attention_factor == 1)


def test_the_configs_of_an_export(world):
    """One table in long/, plain RoPE in short/, both tables in two/."""
    folder = tiny.make_run(world, "configs")
    export(export_config(world, "run=configs"))
    long, short, two = (io.read_json(folder / "export" / name / "config.json") for name in ("long", "short", "two"))
    factors = Factors.load(folder / "factors.json")
    assert (both := rope_hf.factors_of(two)) is not None
    assert (both.rescale, both.attention_factor, both.short_attention_factor) == (factors.rescale, 1.2, 1.0)
    assert set(two["auto_map"]) == {"AutoModelForCausalLM"}
    for rope in (long["rope_parameters"], long["rope_scaling"]):
        assert rope["short_factor"] == rope["long_factor"] == list(factors.rescale)
        assert rope["attention_factor"] == rope["short_mscale"] == rope["long_mscale"] == rope["factor"] == 1
        assert rope["rope_type"] == rope["type"] == "longrope"
        assert rope["original_max_position_embeddings"] == tiny.L
        assert rope["rope_theta"] == factors.spectrum.base
    assert long["original_max_position_embeddings"] == long["max_position_embeddings"] == tiny.L
    assert (short["max_position_embeddings"], short["rope_parameters"]["rope_type"]) == (tiny.L0, "default")
    assert short.get("rope_scaling") is None
    for values in (long, short, two):
        assert values["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("runtime", "names"),
    [
        ("transformers", {"two"}),
        ("vllm", {"long", "short", "two"}),
        ("sglang", {"long", "short"}),
        ("gguf", {"long", "two"}),
    ],
)
def test_a_runtime_gets_the_folders_that_it_needs(world, runtime, names):
    folder = tiny.make_run(world, f"for_{runtime}")
    result = export(export_config(world, f"run={folder.name}", f"export.runtime={runtime}", "export.check=false"))
    assert {file.name for file in (folder / "export").iterdir()} == set(result["folders"]) == names


@pytest.mark.parametrize("attention_factor", [1.0, 1.2])
def test_folders_with_the_same_weights_share_their_files(world, attention_factor, monkeypatch):
    monkeypatch.setattr("lr2train.model.folder.SHARD_BYTES", 20_000)
    folder = tiny.make_run(world, f"links_{attention_factor}", attention_factor)
    export(export_config(world, f"run={folder.name}", "export.check=false"))
    inodes = [
        {file.name: file.stat().st_ino for file in (folder / "export" / name).glob("*.safetensors*")}
        for name in ("short", "two", "long")
    ]
    assert len(inodes[0]) > 3, "several shards and their index"
    assert inodes[0] == inodes[1]
    assert (inodes[0] == inodes[2]) == (attention_factor == 1)
    values = AutoModelForCausalLM.from_pretrained(folder / "export" / "two").state_dict()
    assert all(torch.equal(values[key], one) for key, one in load_weights(folder / "model").items())


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: one for file in folder.glob("*.safetensors") for key, one in load_file(file).items()}


def test_an_export_on_a_disk_without_hard_links_copies(world, monkeypatch):
    def refused(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    folder = tiny.make_run(world, "copies")
    export(export_config(world, "run=copies"))
    short, two = (folder / "export" / name / "model.safetensors" for name in ("short", "two"))
    assert short.read_bytes() == two.read_bytes()
    assert short.stat().st_ino != two.stat().st_ino


def test_an_export_streams_its_weights(world, monkeypatch):
    """Without the check no model is built, and no more than one file of weights is in memory."""
    monkeypatch.setattr("lr2train.model.folder.SHARD_BYTES", 10_000)
    monkeypatch.setattr(load, "load_whole", lambda *_: pytest.fail("must not load the model"))
    folder = tiny.make_run(world, "streamed")
    alive, most = [], 0
    read = TensorReader.read

    def watched(self, name, *rest):
        nonlocal most
        value = read(self, name, *rest)
        alive.append((weakref.ref(value), value.nbytes))
        most = max(most, sum(size for reference, size in alive if reference() is not None))
        return value

    monkeypatch.setattr(TensorReader, "read", watched)
    export(export_config(world, "run=streamed", "export.check=false"))
    sizes = [one.nbytes for one in load_weights(folder / "model").values()]
    assert most <= 10_000 + 2 * max(sizes) < sum(sizes)


def test_a_complete_folder_is_not_written_again(world, monkeypatch):
    folder = tiny.make_run(world, "again")
    first = export(export_config(world, "run=again"))
    before = {path: path.stat().st_ino for path in folder.glob("export/*/*")}
    second = export(export_config(world, "run=again"))
    assert {path: path.stat().st_ino for path in folder.glob("export/*/*")} == before
    assert {one["written"] for one in first["folders"].values()} == {True}
    assert {one["written"] for one in second["folders"].values()} == {False}
    (folder / "export" / "two" / "model.safetensors").unlink()
    (folder / "model" / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr(folders, "_stream", lambda *_: pytest.fail("the same weights are linked, and not read"))
    third = export(export_config(world, "run=again"))
    assert {one["written"] for one in third["folders"].values()} == {True}, "a file of them has changed"
    assert (folder / "export" / "two" / "model.safetensors").exists()


def test_folders_of_former_weights_do_not_stay(world):
    folder = tiny.make_run(world, "trained_on")
    export(export_config(world, "run=trained_on"))
    tiny.make_model(folder / "model", tiny.factors_with(), seed=9)
    export(export_config(world, "run=trained_on", "export.runtime=sglang"))
    assert {file.name for file in (folder / "export").iterdir()} == {"long", "short"}
    stored = load_weights(folder / "export" / "short")
    assert all(torch.equal(stored[key], one) for key, one in load_weights(folder / "model").items())


def test_an_export_of_one_folder_is_replaced_by_the_three(world):
    folder = tiny.make_run(world, "old_layout")
    shutil.copytree(folder / "model", folder / "export")
    shutil.copyfile(folder / "factors.json", folder / "export" / "factors.json")
    export(export_config(world, "run=old_layout"))
    assert {file.name for file in (folder / "export").iterdir()} == {"long", "short", "two"}


def test_a_model_with_one_window_has_one_folder(world):
    from lr2train.rope import METHODS

    folder = tiny.make_run(world, "one_window")
    tiny.make_model(folder / "model")
    METHODS["none"](tiny.SPECTRUM, tiny.L0).save(folder / "factors.json")
    result = export(export_config(world, "run=one_window"))
    assert result["folders"]["short"]["short_logit_difference"] == 0.0
    assert {file.name for file in (folder / "export").iterdir()} == set(result["folders"]) == {"short"}


def test_an_export_keeps_the_trained_dtype_unless_told(world):
    folder = tiny.make_run(world, "bf16", dtype=torch.bfloat16)
    for more, name in (([], "bfloat16"), (["export.dtype=float16"], "float16")):
        result = export(export_config(world, "run=bf16", *more))
        assert result["dtype"] == name
        for one in ("long", "short", "two"):
            assert json.loads((folder / "export" / one / "config.json").read_text())["dtype"] == name
            stored = load_file(folder / "export" / one / "model.safetensors")
            assert {tensor.dtype for tensor in stored.values()} == {load.DTYPES[name]}


def test_an_export_replaces_only_an_earlier_export(world, tmp_path):
    tiny.make_run(world, "careful", 1.0)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"export\.folder=.*home exists and is no former export"):
        export(export_config(world, "run=careful", f"export.folder={tmp_path}/home"))
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"
    for _ in range(2):
        export(export_config(world, "run=careful", f"export.folder={tmp_path}/new/model"))
    assert (tmp_path / "new" / "model" / "two" / "model.safetensors").exists()


def test_an_export_cut_short_leaves_the_old_one_and_can_be_repeated(world, monkeypatch):
    folder = tiny.make_run(world, "cut")
    export(export_config(world, "run=cut"))
    before = contents(folder / "export")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "copy_companions", killed)
        with pytest.raises(KeyboardInterrupt):
            export(export_config(world, "run=cut", "export.dtype=bfloat16"))
    assert contents(folder / "export") == before
    assert export(export_config(world, "run=cut", "export.dtype=bfloat16"))["dtype"] == "bfloat16"


def export_and_die(arguments: list[str], after: int) -> None:
    """The export in this process, which kills itself after so many tensors."""
    read, done = TensorReader.read, []

    def read_and_die(self, *rest):
        if len(done) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(1)
        return read(self, *rest)

    TensorReader.read = read_and_die
    export(compose("export", arguments))


def kill_exports(folder: Path, arguments: list[str], n_tensors: int) -> None:
    """Kill an export in its first folder, then in its second, and note what each kill leaves."""
    noted = []
    for after in (3, n_tensors + 3):
        if (pid := os.fork()) == 0:
            export_and_die(arguments, after)
        _, status = os.waitpid(pid, 0)
        noted.append([os.WTERMSIG(status), sorted(file.name for file in (folder / "export").iterdir())])
    (folder / "kills.json").write_text(json.dumps(noted))


def test_an_export_killed_with_kill_9_is_made_whole_by_the_same_command(world):
    folder, undisturbed = tiny.make_run(world, "killed"), tiny.make_run(world, "undisturbed")
    arguments = tiny.arguments(world, "run=killed", "export.check=false")
    n_tensors = len(load_weights(folder / "model"))
    process = forking().Process(target=kill_exports, args=(folder, arguments, n_tensors))
    process.start()
    process.join(60)
    assert json.loads((folder / "kills.json").read_text()) == [
        [signal.SIGKILL, [".long.tmp"]],
        [signal.SIGKILL, [".short.tmp", "long"]],
    ]
    result = export(compose("export", arguments))
    assert {name: one["written"] for name, one in result["folders"].items()} == {
        "long": False, "short": True, "two": True,
    }  # fmt: skip
    export(compose("export", tiny.arguments(world, "run=undisturbed", "export.check=false")))
    of_run = [contents(one / "export") for one in (folder, undisturbed)]
    for files in of_run:
        for name in ("long", "short", "two"):
            files.pop(f"{name}/README.md"), files.pop(f"{name}/lr2train.json")  # name of the run, time of its weights
    assert of_run[0] == of_run[1]


def test_an_export_copies_the_base_models_sampling_settings_and_templates(world, tmp_path):
    folder = tiny.make_run(world, "talks")
    base = tiny.make_model(tmp_path / "base")
    settings = {"eos_token_id": [1, 7], "temperature": 0.6, "do_sample": True}
    (base / "generation_config.json").write_text(json.dumps(settings))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    values = json.loads((folder / "train.config.json").read_text())
    values["model"]["path"] = str(base)
    (folder / "train.config.json").write_text(json.dumps(values))
    export(export_config(world, "run=talks"))
    for name in ("long", "short", "two"):
        assert json.loads((folder / "export" / name / "generation_config.json").read_text()) == settings
        assert (folder / "export" / name / "chat_template.jinja").read_text() == "{{ messages }}"
    shutil.rmtree(base)
    export(export_config(world, "run=talks"))
    assert "is not here any more" in (folder / "log.txt").read_text()


def test_the_base_of_a_run_may_have_moved(world, tmp_path, capsys):
    """Its own folder counts while it is there; then the one that the command names."""
    folder, moved = tiny.make_run(world, "far"), tiny.make_model(tmp_path / "moved")
    values = json.loads((folder / "train.config.json").read_text())
    asked = export_config(world, "run=far", f"model.path={moved}")
    assert trained_run.completed(asked).model.path == values["model"]["path"]
    values["model"]["path"] = str(tmp_path / "gone")
    (folder / "train.config.json").write_text(json.dumps(values))
    assert trained_run.completed(asked).model.path == str(moved)
    assert f"{tmp_path / 'gone'} is not here any more; model.path={moved} stands in" in capsys.readouterr().err
    assert trained_run.completed(export_config(world, "run=far")).model.path == str(tmp_path / "gone")


def test_the_check_of_an_export_holds_one_model_at_a_time(world, monkeypatch):
    tiny.make_run(world, "frugal")
    models = []

    def watched(make):
        def made(*args, **kwargs):
            gc.collect()
            assert not any(reference() for reference in models)
            models.append(weakref.ref(model := make(*args, **kwargs)))
            return model

        return made

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched(AutoModelForCausalLM.from_pretrained))
    monkeypatch.setattr(load, "assembled", watched(load.assembled))
    monkeypatch.setattr(folders, "class_of", lambda folder: watched_class(folder, watched))
    export(export_config(world, "run=frugal"))
    assert len(models) == 4


def watched_class(folder: Path, watched):
    made = class_of(folder)
    made.from_pretrained = watched(made.from_pretrained)
    return made


def test_an_export_has_the_new_window_and_no_path_of_this_machine(world, tmp_path):
    folder = tiny.make_run(world, "window")
    base = tiny.make_model(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"max_length": tiny.L0, "eos_token_id": [1, 7]}))
    file = folder / "model" / "tokenizer_config.json"
    said = {
        "model_max_length": tiny.L0,
        "name_or_path": str(base),
        "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]},
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), **said}))
    (folder / "model" / ".tokenizer.json.77.tmp").write_text("half")
    (folder / "model" / "tokenizer.json").chmod(0o600)
    values = json.loads((folder / "train.config.json").read_text())
    values["model"]["path"] = str(base)
    (folder / "train.config.json").write_text(json.dumps(values))
    umask = os.umask(0o027)
    try:
        export(export_config(world, "run=window"))
    finally:
        os.umask(umask)
    usual = {
        "README.md", "config.json", "generation_config.json", "lr2train.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    for name, window in (("long", tiny.L), ("short", tiny.L0), ("two", tiny.L)):
        exported = folder / "export" / name
        tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=False)
        assert tokenizer.model_max_length == window
        generation = json.loads((exported / "generation_config.json").read_text())
        assert generation == {"max_length": window, "eos_token_id": [1, 7]}
        more = {"factors.json", "modeling_longrope2.py"} if name == "two" else set()
        more |= set() if name == "short" else {"gguf_longrope.py"}
        assert {file.name for file in exported.iterdir()} == usual | more
        assert {file.stat().st_mode & 0o777 for file in exported.iterdir()} == {0o640}
        for file in exported.iterdir():
            assert str(tmp_path).encode() not in file.read_bytes()
            assert str(world).encode() not in file.read_bytes()
        assert "auto_map" not in (exported / "tokenizer_config.json").read_text()


def test_an_export_is_on_the_disk_before_it_has_its_name(world, monkeypatch):
    folder = tiny.make_run(world, "synced")
    synced, rename = [], Path.rename
    monkeypatch.setattr(io, "sync_file", lambda path: synced.append(path.name))
    monkeypatch.setattr(io, "sync_folder", lambda path: synced.append(f"{path.name}/"))

    def renamed(self, target):
        if Path(target).parent == folder / "export":
            assert {file.name for file in self.iterdir()} | {f"{self.name}/"} <= set(synced)
            synced.clear()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    export(export_config(world, "run=synced"))
    assert "export/" in synced


@pytest.mark.parametrize("bad", [float("nan"), 3e38])
def test_a_model_with_logits_that_are_not_finite_replaces_no_export(world, bad):
    """A weight that is not finite is refused at load; finite ones whose products are not are found by the logits."""
    folder = tiny.make_run(world, "useless")
    export(export_config(world, "run=useless"))
    before = contents(folder / "export")
    said = (folder / "export.json").read_bytes()
    tensors = load_file(folder / "model" / "model.safetensors")
    tensors["model.norm.weight"][:] = bad
    save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        export(export_config(world, "run=useless"))
    assert contents(folder / "export") == before
    assert (folder / "export.json").read_bytes() == said
    assert {file.name for file in (folder / "export").iterdir()} == {"long", "short", "two"}


def refused_to(monkeypatch, folder: Path) -> None:
    """Files under ``folder`` may only be read, whoever runs the test."""
    replacing, opened = io.replacing, Path.open

    def denied(path: Path) -> None:
        if path.is_relative_to(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(io, "replacing", lambda path: (denied(path), replacing(path))[1])
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", *rest, **more: ("a" in mode and denied(self), opened(self, mode, *rest, **more))[1],
    )


def test_a_run_in_a_folder_without_write_access_is_exported_and_generates(world, tmp_path, monkeypatch, capsys):
    folder = tiny.make_run(world, "theirs")
    elsewhere = f"export.folder={tmp_path}/mine"
    with monkeypatch.context() as patch:
        refused_to(patch, folder)
        export(export_config(world, "run=theirs", elsewhere))
        generate(tiny.generate_config(world, "run=theirs", "generate.prompt=ab"))
    assert (tmp_path / "mine" / "long" / "model.safetensors").exists()
    said = capsys.readouterr().err
    assert f"{folder}/export.json is not written (Permission denied)" in said
    assert f"{folder}/generate.json is not written (Permission denied)" in said
    assert not (folder / "export.json").exists()


def test_an_export_folder_that_cannot_be_written_is_refused_before_the_work(world, tmp_path, monkeypatch):
    tiny.make_run(world, "refusing")
    monkeypatch.setattr(load, "load_whole", lambda *_: pytest.fail("must not load the model"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"file/deep cannot be written \(Not a directory\).*set export\.folder"):
        export(export_config(world, "run=refusing", f"export.folder={tmp_path}/file/deep/export"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "run is empty"),
        (["run=nothing"], r"train\.json does not exist"),
        (["run=x", "export.dtype=int4"], r"export\.dtype=int4 is not one of null, float32, bfloat16, float16"),
    ],
)
def test_bad_input_of_export_is_refused(world, more, words):
    with pytest.raises(UserError, match=words):
        export(export_config(world, *more))


# ---- one loader ----


@pytest.mark.parametrize("verb", ["search", "evaluate", "generate", "export"])
def test_every_verb_refuses_weights_that_the_loader_refuses(world, monkeypatch, verb):
    """`train` and a sharded search call it too (tests/training)."""
    folder = tiny.make_run(world, "alike")
    tensors = load_file(folder / "model" / "model.safetensors")
    save_file(
        {**tensors, "model.layers.9.mlp.up_proj.weight": torch.ones(2)},
        folder / "model" / "model.safetensors",
        {"format": "pt"},
    )
    path = f"model.path={folder}/model"
    verbs = {
        "search": lambda: search(compose("search", [*tiny.arguments(world, path, *SEARCH, "name=alike_s")])),
        "evaluate": lambda: evaluate(evaluate_config(world, world, "name=alike_e", path, "rope=pi")),
        "generate": lambda: generate(tiny.generate_config(world, path, "generate.prompt=ab")),
        "export": lambda: export(export_config(world, "run=alike")),
    }
    with pytest.raises(
        UserError, match=r"1 tensors that have no place in the model \(model\.layers\.9\.mlp\.up_proj\.weight\)"
    ):
        verbs[verb]()
