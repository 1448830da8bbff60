"""prepare from end to end on a few files: what it writes, reuses, holds out and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lr2train.config import Config, NeedleConfig, SourceConfig, UserError
from lr2train.data.batch import LONG, SHORT
from lr2train.data.corpus import Corpus
from lr2train.data.ingest.tokenize_split import is_held_out
from lr2train.data.needles import needle_set, text_set
from lr2train.data.tokenizer import Tokenizer
from lr2train.prepare import original_window, prepare
from lr2train.run import open_run


def small(folder, **data) -> Config:
    config = Config(name="corpus", runs_folder=str(folder))
    config.model.original_window_tokens = 128
    config.data.segment_tokens, config.data.vocab_size, config.data.holdout = 512, 400, 0.25
    config.data.tokenizer_train_bytes = 20_000  # training takes most of a test's time
    config.data.needles = NeedleConfig(wording="code", digits=4)
    config.data.sources = [
        SourceConfig(name="modules", kind="stdlib", max_bytes=60_000),
        SourceConfig(name="definitions", kind="stdlib", max_bytes=60_000, options={"unit": "definition"}),
        SourceConfig(
            name="hidden",
            kind="needles",
            options={"count": 6, "lengths_tokens": [100, 600], "max_pairs": 3, "questions": 2},
        ),
    ]
    for key, value in data.items():
        setattr(config.data, key, value)
    return config


def needles(max_tokens: int | None = None, **options) -> SourceConfig:
    return SourceConfig(name="hidden", kind="needles", max_tokens=max_tokens, options=options)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    config = small(tmp_path_factory.mktemp("runs"))
    return config, prepare(config), Corpus.open(f"{config.runs_folder}/corpus")


def test_several_ranks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"prepare .*2 ranks \(WORLD_SIZE\)"):
        prepare(small(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_counts_of_stores_and_plan_add_up(prepared):
    _, result, corpus = prepared
    stored = corpus.documents("train").lengths
    assert sum(source["tokens"] for source in result["sources"]) == stored.sum()
    by_window = {}
    for window in (SHORT, LONG):
        by_window[window] = sum(one["tokens"] for one in result["windows"][window]["sources"].values())
    assert by_window == {SHORT: stored[stored <= 128].sum(), LONG: stored[stored > 128].sum()}
    assert result["windows"][SHORT]["planned_tokens"] == by_window[SHORT]
    assert result["windows"][LONG]["planned_tokens"] + result["lost_tokens"]["tail"] == by_window[LONG]
    assert json.loads((corpus.folder / "prepare.json").read_text())["fingerprint"] == corpus.fingerprint


def test_documents_keep_their_borders_and_decode_to_their_text(prepared):
    _, _, corpus = prepared
    documents = corpus.documents("train")
    assert all(document[0] == 0 and document[-1] == 1 and document[1:-1].min() > 1 for document in documents)
    assert len(documents) == sum(len(store) for store in corpus.stores())
    assert (documents.lengths == [len(one) for one in documents]).all()
    assert "def " in corpus.tokenizer.decode(documents[0][1:-1])


def test_needle_documents_have_their_lengths_and_are_never_held_out(prepared):
    _, result, corpus = prepared
    assert corpus.stores()[2].lengths.tolist() == [100, 600] * 3
    assert result["sources"][2]["holdout_documents"] == 0


def test_no_held_out_document_is_trained_on(prepared):
    _, result, corpus = prepared
    held = {document.tobytes() for document in corpus.documents("holdout")}
    assert held
    assert held.isdisjoint(document.tobytes() for document in corpus.documents("train"))
    assert sum(source["holdout_documents"] for source in result["sources"]) == len(corpus.documents("holdout"))


def test_all_parts_of_a_module_are_held_out_together():
    names = [f"module{i}.py" for i in range(400)]
    held = [name for name in names if is_held_out(name, 0.25)]
    assert 60 < len(held) < 140
    assert all(is_held_out(f"{name}#7", 0.25) for name in held)
    assert not any(is_held_out(name, 0.0) for name in names)
    assert all(is_held_out(name, 1.0) for name in names)


def test_a_second_run_changes_nothing(prepared):
    config, first, corpus = prepared
    before = {file: file.stat().st_mtime_ns for file in (corpus.folder / "store").rglob("*")}
    again = prepare(config)
    assert {file: file.stat().st_mtime_ns for file in (corpus.folder / "store").rglob("*")} == before
    assert {**again, "seconds": 0} == {**first, "seconds": 0}


def test_a_killed_run_goes_on_where_it_was(prepared, tmp_path, monkeypatch):
    _, whole, _ = prepared
    encode, calls = Tokenizer.encode_batch, []

    def killed(self, texts):
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(small(tmp_path / "cut"))
    with pytest.raises(UserError, match="no finished corpus"):
        Corpus.open(tmp_path / "cut" / "corpus")
    resumed = prepare(small(tmp_path / "cut"))
    assert len(calls) == 3, "the finished source was tokenised again"
    assert resumed["fingerprint"] == whole["fingerprint"]


def windowed(folder, **data) -> Config:
    """Modules for the long window, definitions for the short one."""
    config = small(folder, **data)
    config.data.sources = config.data.sources[:2]
    config.data.sources[0].windows, config.data.sources[1].windows = [LONG], [SHORT]
    return config


def test_a_source_of_one_window_gives_documents_of_that_window_alone(tmp_path):
    result = prepare(windowed(tmp_path, short_tokens=3000, long_tokens=5000))
    long, short = Corpus.open(tmp_path / "corpus").stores()
    assert min(long.lengths) > 128 >= max(short.lengths)
    assert result["windows"][LONG]["sources"]["definitions"]["planned_tokens"] == 0
    assert result["windows"][SHORT]["sources"]["definitions"]["planned_tokens"] >= 3000
    again = windowed(tmp_path, short_tokens=3000, long_tokens=5000)
    again.model.original_window_tokens = 64
    with pytest.raises(UserError, match=r"sources\.modules: .*change of model\.original_window_tokens"):
        prepare(again)


def test_max_tokens_counts_documents_of_the_sources_windows_alone(tmp_path):
    config = windowed(tmp_path)
    config.data.sources[1].max_tokens = 1500
    result = prepare(config)["sources"][1]
    assert 1500 <= result["tokens"] + result["holdout_tokens"] < 1500 + 128


def test_a_budget_that_cannot_be_filled_is_refused(tmp_path):
    config = windowed(tmp_path, short_tokens=3000, long_tokens=5000)
    config.data.sources[0].windows = [SHORT]
    with pytest.raises(UserError, match=r"data\.long_tokens=5000, and no source has long among its windows"):
        prepare(config)
    (tmp_path / "a.txt").write_text("a few words " * 6)
    config = small(
        tmp_path,
        sources=[SourceConfig(name="a", path=str(tmp_path / "a.txt"))],
        holdout=0.0,
        long_tokens=5000,
    )
    with pytest.raises(UserError, match=r"data\.long_tokens=5000 cannot be filled.*all 5000 are missing"):
        prepare(config)
    config = small(
        tmp_path / "other",
        sources=[SourceConfig(name="a", path=str(tmp_path / "a.txt"), windows=[LONG])],
        holdout=0.0,
    )
    with pytest.raises(UserError, match=r"data\.sources\.a has no document for windows=\['long'\]"):
        prepare(config)


def test_a_source_without_documents_of_a_window_is_reported_with_its_share(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a few words " * 6)
    config = small(tmp_path / "runs", long_tokens=6000)
    config.data.sources[2] = SourceConfig(name="a", path=str(tmp_path / "a.txt"))
    config.data.holdout = 0.0
    prepare(config)
    assert "a has no long document, so the other sources take its share of 2000 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("share", "said"), [(0.0, "nothing is held out"), (0.1, "held out: only "), (0.5, "")], ids=str
)
def test_few_held_out_documents_are_said(share, said, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"text": "{number} {"a few words " * 20}"}}\n' for number in range(40))
    )
    sources = [SourceConfig(name="a", path=str(tmp_path / "a.jsonl"), windows=[SHORT])]
    result = prepare(small(tmp_path / "runs", holdout=share, sources=sources))
    held, printed = sum(source["holdout_documents"] for source in result["sources"]), capsys.readouterr().err
    assert (held == 0, 0 < held < 8, held >= 8) == (share == 0.0, share == 0.1, share == 0.5)
    assert said in printed
    assert ("raise data.holdout" in printed) == bool(said)


def test_a_given_tokenizer_folder_is_copied_unchanged(tmp_path):
    prepare(windowed(tmp_path / "first"))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for file in (tmp_path / "first" / "corpus" / "tokenizer").iterdir():
        (theirs / file.name).write_bytes(file.read_bytes())
    (theirs / "chat_template.jinja").write_text("{{ messages }}")
    (theirs / "weights.bin").write_bytes(b"not a tokenizer's")
    prepare(windowed(tmp_path / "second", tokenizer=str(theirs)))
    copied = {file.name: file.read_bytes() for file in (tmp_path / "second" / "corpus" / "tokenizer").iterdir()}
    assert copied == {file.name: file.read_bytes() for file in theirs.iterdir() if file.name != "weights.bin"}
    assert Corpus.open(tmp_path / "second" / "corpus").tokenizer.bos == 0


def test_another_original_window_plans_again_without_tokenising(prepared, tmp_path, monkeypatch):
    made, first, _ = prepared
    shutil.copytree(made.runs_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(Tokenizer, "encode_batch", None)
    config = small(tmp_path)
    config.model.original_window_tokens = 64
    second = prepare(config)
    assert second["fingerprint"] != first["fingerprint"]
    assert second["windows"][SHORT]["planned_tokens"] < first["windows"][SHORT]["planned_tokens"]
    assert Corpus.open(tmp_path / "corpus").original_window_tokens == 64


def test_budgets_and_weights_plan_the_mix(prepared, tmp_path):
    shutil.copytree(prepared[0].runs_folder, tmp_path, dirs_exist_ok=True)
    config = small(tmp_path, short_tokens=3000, long_tokens=60_000, max_repeats=100.0)
    config.data.sources[1].weight = 3.0
    windows = prepare(config)["windows"]
    present = {name: one for name, one in windows[SHORT]["sources"].items() if one["tokens"]}
    weights = {name: 3.0 if name == "definitions" else 1.0 for name in present}
    for name, one in present.items():
        share = 3000 * weights[name] / sum(weights.values())
        assert share <= one["planned_tokens"] < share + 128
    assert windows[LONG]["planned_tokens"] >= 60_000 - 512


def texts_only(folder, **data) -> Config:
    """Two sources of text, with budgets that their documents can fill."""
    config = windowed(folder, **{"short_tokens": 3000, "long_tokens": 5000, **data})
    config.data.sources[0].windows = [LONG, SHORT]
    return config


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A finished corpus for others to copy."""
    runs = tmp_path_factory.mktemp("planned")
    return runs, prepare(texts_only(runs))


def files_of(folder: Path) -> dict[Path, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in ("log.txt", ".lock")]
    return {file: file.read_bytes() for file in files}


def copied(planned, tmp_path) -> tuple[dict, Path]:
    runs, first = planned
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    return first, tmp_path / "corpus"


@pytest.mark.parametrize(("what", "words"), [("cut short", "promises"), ("a bit flipped", "checksum")])
def test_a_damaged_store_is_refused_when_it_is_reused(planned, tmp_path, what, words):
    _, folder = copied(planned, tmp_path)
    file = folder / "store" / "modules" / "train-00000.bin"
    data = bytearray(file.read_bytes())
    if what == "cut short":
        del data[-2:]
    else:
        data[40] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match=rf"modules.train-00000.*{words}"):
        prepare(texts_only(tmp_path))


def test_another_plan_in_the_same_folder_takes_the_tokens_that_are_there(planned, tmp_path, monkeypatch, capsys):
    first, folder = copied(planned, tmp_path)
    monkeypatch.setattr(Tokenizer, "encode_batch", None)
    other = texts_only(tmp_path, short_tokens=1500, max_repeats=9.0, align_sp=2, deduplicate="corpus")
    other.data.sources[0].weight = 5.0
    second = prepare(other)
    assert second["fingerprint"] != first["fingerprint"]
    assert second["windows"][SHORT]["planned_tokens"] < 2000 < first["windows"][SHORT]["planned_tokens"]
    said = capsys.readouterr().err
    assert "changed since the last time: data.short_tokens: 3000 -> 1500" in said
    assert "changed since the last time: data.sources.modules.weight: 1.0 -> 5.0" in said
    assert json.loads((folder / "prepare.config.json").read_text())["data"]["short_tokens"] == 1500
    Corpus.open(folder).verify()
    assert prepare(texts_only(tmp_path))["fingerprint"] == first["fingerprint"], "and back"


@pytest.mark.parametrize(
    "bad",
    [{"long_tokens": 10**9}, {"segment_tokens": 1024, "align_sp": 16}, {"holdout": 0.5}, {"vocab_size": 420}],
)
def test_a_refused_change_leaves_the_corpus_as_it_was(planned, tmp_path, bad):
    first, folder = copied(planned, tmp_path)
    before = files_of(folder)
    with pytest.raises(UserError):
        prepare(texts_only(tmp_path, **bad))
    after = files_of(folder)
    assert {file for file in before if before[file] != after.get(file)} <= {folder / "verified.json"}
    assert Corpus.open(folder).fingerprint == first["fingerprint"]
    Corpus.open(folder).verify()


@pytest.mark.parametrize(
    "where",
    [
        "lr2train.data.plan.segment_table.write",
        "lr2train.data.plan.stage.write_json",
        "lr2train.data.integrity.write_checksums",
    ],
)
def test_a_plan_that_was_killed_midway_is_made_again(planned, tmp_path, monkeypatch, where):
    """Killed between the files of another plan, the next start finds old and new ones side by side."""
    _, folder = copied(planned, tmp_path)
    other = {"long_tokens": 4000, "deduplicate": "corpus"}

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, cut)
        with pytest.raises(KeyboardInterrupt):
            prepare(texts_only(tmp_path, **other))
    with pytest.raises(UserError, match="no finished corpus|does not exist; run the verb"):
        Corpus.open(folder).verify()
    resumed, anew = prepare(texts_only(tmp_path, **other)), prepare(texts_only(tmp_path / "anew", **other))
    assert resumed["fingerprint"] == anew["fingerprint"]
    Corpus.open(folder).verify()


def test_a_second_job_in_the_same_folder_is_refused(tmp_path):
    config = texts_only(tmp_path)
    lock = open_run(config, "prepare", ("data",)).lock()
    assert lock is not None
    with lock, pytest.raises(UserError, match=r"in use by prepare, process \d+"):
        prepare(config)
    assert [file.name for file in (tmp_path / "corpus").iterdir()] == [".lock"]
    prepare(config)


def test_evaluation_sets_come_from_held_out_text(prepared):
    _, _, corpus = prepared
    rng = np.random.default_rng(0)
    documents = needle_set(corpus, NeedleConfig(wording="plain", digits=4), 3, 300, [0.0, 0.5], rng)
    assert [one.depth for one in documents] == [0.0] * 3 + [0.5] * 3
    assert all(len(one.tokens) == 300 and one.n_answer_tokens == 2 for one in documents)
    held = np.concatenate(list(corpus.documents("holdout"))).tobytes()
    for tokens in text_set(corpus, 4, 200, rng):
        assert len(tokens) == 200
        assert tokens[0] == 0
        assert tokens[1:].astype(np.uint16).tobytes() in held
    assert len(text_set(corpus, 1, 100_000, rng)[0]) == 100_000, "longer than any document: documents are joined"


@pytest.mark.parametrize(
    ("words", "data"),
    [
        (r"data\.sources is empty", {"sources": []}),
        ("needles only", {"sources": [SourceConfig(name="n", kind="needles")]}),
        ("'a' 2 times", {"sources": [SourceConfig(name="a", kind="stdlib"), SourceConfig(name="a", kind="stdlib")]}),
        ("the name 'a/b'", {"sources": [SourceConfig(name="a/b", kind="stdlib")]}),
        ("kind=web", {"sources": [SourceConfig(name="a", kind="web")]}),
        ("below the original window", {"segment_tokens": 64}),
        ("windows=", {"sources": [SourceConfig(name="a", kind="stdlib", windows=["both"])]}),
        ("at_start=2", {"needles": NeedleConfig(at_start=2.0)}),
        (r"options\.max_pairs=0", {"sources": [SourceConfig(name="a", kind="stdlib"), needles(max_pairs=0)]}),
        ("make no document", {"sources": [SourceConfig(name="a", kind="stdlib"), needles(lengths_tokens=[])]}),
        ("max_tokens does nothing", {"sources": [SourceConfig(name="a", kind="stdlib"), needles(max_tokens=5)]}),
    ],
)
def test_bad_configs_are_refused_before_anything_is_written(tmp_path, words, data):
    with pytest.raises(UserError, match=words):
        prepare(small(tmp_path / "runs", **data))
    assert not (tmp_path / "runs").exists()


def test_too_little_text_for_one_segment_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a few words that are long enough to make one long document " * 6)
    config = small(tmp_path / "runs", sources=[SourceConfig(name="a", path=str(tmp_path))], holdout=0.0)
    config.model.original_window_tokens = 16
    with pytest.raises(UserError, match="do not fill one segment"):
        prepare(config)


def test_the_original_window_is_read_from_the_model(tmp_path):
    config = Config()
    config.model.architecture = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 512}
    assert original_window(config.model) == 512
    (tmp_path / "config.json").write_text(json.dumps({**config.model.architecture, "max_position_embeddings": 2048}))
    config.model.path = str(tmp_path)
    assert original_window(config.model) == 2048
    config.model.path = "someone/a-model"
    with pytest.raises(UserError, match=r"set model\.original_window_tokens"):
        original_window(config.model)


def test_a_model_with_another_tokenizer_is_refused(prepared, tmp_path):
    _, _, corpus = prepared
    corpus.refuse_other_tokenizer(400, corpus.tokenizer_folder)
    corpus.refuse_other_tokenizer(400, tmp_path)  # no tokenizer.json there: not asked
    with pytest.raises(UserError, match="uses 400 token ids and the model knows 399"):
        corpus.refuse_other_tokenizer(399, None)
    other = json.loads((corpus.tokenizer_folder / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    first, second = [token for token in vocabulary if len(token) == 1][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="another tokenizer than the model's"):
        corpus.refuse_other_tokenizer(400, tmp_path)
