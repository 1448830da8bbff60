"""inspect shows the loader's own tokens, targets and segments, in a form that prints."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import tiny
from batches import labels_of

from lr2train.cli.composition import compose
from lr2train.config import UserError, to_dict
from lr2train.data.batch import IGNORE
from lr2train.data.corpus import Corpus
from lr2train.data.feed.loader import make_loader
from lr2train.data.feed.viewing import PADDING, DocumentView, SegmentView, bar, ends, escaped
from lr2train.inspect import inspect
from lr2train.training.steps import FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("inspect")
    tiny.make_corpus(made)
    return made


def shown(folder, *overrides: str) -> list[SegmentView]:
    return inspect(compose("inspect", [f"runs_folder={folder}", f"data.path={folder}/corpus", *overrides]))


def loader(folder, size: int = 1, rank: int = 0, total: int = 8):
    config = compose("train", [*tiny.arguments(folder), "name=x", f"data.segment_tokens={tiny.L}"])
    return make_loader(Corpus.open(folder / "corpus"), config.data, 0, rank, size, total)


def test_a_segments_documents_and_targets_are_the_loaders(folder, capsys):
    corpus = Corpus.open(folder / "corpus")
    (segment,) = shown(folder, "inspect.window=long", "inspect.segment=2", "inspect.text_chars=10")
    (batch,) = loader(folder).load([("long", 2)])
    assert segment.n_targets == batch.n_target_tokens == sum(one.n_targets for one in segment.documents)
    for one in segment.documents:
        tokens = corpus.stores()[0][one.document][one.start : one.stop]
        inside = slice(one.at, one.at + len(tokens))
        assert (batch.tokens[inside] == tokens).all()
        assert one.n_targets == int((labels_of(batch)[inside] != IGNORE).sum())
        assert one.head == escaped(corpus.tokenizer.decode(tokens))[:10]
        assert (one.begins_before, one.goes_on) == (one.start > 0, one.stop < len(corpus.stores()[0][one.document]))
        assert re.search(r"\d+\.txt", one.origin)
    out = capsys.readouterr().out
    assert f"long segment 2 of {segment.n_segments}: {tiny.L} tokens, {len(segment.documents)} documents" in out
    assert "\x1b" not in out, "colours are for terminals only"
    assert all(one.origin in out for one in segment.documents)


def test_a_step_shows_the_segments_that_the_ranks_will_train(folder, capsys):
    segments = shown(folder, "inspect.step=3", "inspect.dp_size=4", "optim.segments_per_step=8")
    ranks = [loader(folder, 4, rank).segments(2) for rank in range(4)]
    assert [(one.window, one.number) for one in segments] == [
        segment for micro_batch in zip(*ranks, strict=True) for segment in micro_batch
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 3: 8 segments in groups of 4, 4 data-parallel ranks")
    assert len([line for line in lines if line.startswith("micro-batch")]) == 8


def test_a_step_of_a_run_takes_seed_batch_groups_and_skips_of_the_run(folder, capsys):
    run = folder / "first"
    run.mkdir()
    skips = ["data.skip_steps=[9]", "seed=5", "optim.segments_per_step=4"]  # of the first start; the last one skips 2-4
    saved = to_dict(tiny.config("train", folder, "name=first", *skips))
    (run / "train.config.json").write_text(json.dumps(saved))
    (run / FILE).write_text(json.dumps({"group_segments": 2, "skipped": [[2, 4]]}))
    segments = shown(folder, "run=first", "inspect.step=3", "inspect.dp_size=1")
    config = tiny.config(
        "train", folder, "name=x", "data.group_segments=2", "optim.segments_per_step=4", f"data.segment_tokens={tiny.L}"
    )
    expected = make_loader(Corpus.open(folder / "corpus"), config.data, 5, 0, 1, 4).segments(2)
    assert [(one.window, one.number) for one in segments] == expected
    assert capsys.readouterr().out.startswith("step 3 (passed over: data.skip_steps): 4 segments in groups of 2")


def test_a_segment_step_or_size_that_does_not_exist_is_refused(folder):
    with pytest.raises(UserError, match=r"inspect\.segment=9999 .*\d+ short and \d+ long segments"):
        shown(folder, "inspect.segment=9999")
    with pytest.raises(UserError, match=r"inspect\.step=0 .*1"):
        shown(folder, "inspect.step=0")
    with pytest.raises(UserError, match=r"inspect\.dp_size=3 .*optim\.segments_per_step"):
        shown(folder, "inspect.step=1", "inspect.dp_size=3")


def test_text_prints_on_one_line_and_its_ends_are_its_ends():
    assert escaped("a\n\t\x1b[31mü\u200b") == "a\\n\\t\\x1b[31mü\\u200b"

    class Letters:
        def decode(self, tokens) -> str:
            return "".join(chr(97 + one) for one in tokens)

    assert ends(Letters(), np.arange(26), 3) == ("abc", "xyz")
    assert ends(Letters(), np.arange(5), 3) == ("abcde", "")
    assert ends(Letters(), np.arange(26), 0) == ("", "")


def test_the_bar_shows_sources_documents_and_padding():
    def document(at: int, n: int, source: str) -> DocumentView:
        return DocumentView(at, source, 0, "", 0, n, n, n, "", "")

    segment = SegmentView("short", 0, 1, 80, 0, 3, (document(0, 20, "a"), document(20, 10, "a"), document(40, 30, "b")))
    assert bar(segment, 8, {"a": "A", "b": "B"}) == f"AAa{PADDING}BBB{PADDING}"
