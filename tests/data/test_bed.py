"""The test bed's presets: every document fits its window, every kind of row and source is made, the ranges are real."""

from __future__ import annotations

import numpy as np
import pytest
from batches import labels_of

from lr2train.cli.composition import compose
from lr2train.data.batch import IGNORE
from lr2train.data.corpus import Corpus, source_store
from lr2train.data.feed.loader import make_loader
from lr2train.data.needles import needle_set
from lr2train.prepare import prepare
from lr2train.rope.spectrum import Spectrum

SMALL = [
    "data.sources.stdlib.max_bytes=300000", "data.sources.definitions.max_bytes=300000",
    "data.sources.needles_short.options.count=40", "data.sources.needles_long.options.count=4",
    "data.short_tokens=20000", "data.long_tokens=16384", "data.holdout=0.2",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    prepare(compose("prepare", ["experiment=bed", "name=bed_corpus", f"runs_folder={folder}", *SMALL]))
    return Corpus.open(folder / "bed_corpus")


@pytest.mark.parametrize(("model", "lowest", "highest"), [("bed_a", 5, 13), ("bed_b", 4, 9)])
def test_a_base_has_a_range_of_critical_indices(model, lowest, highest):
    made = compose("train", ["experiment=bed_base", f"model={model}", "name=x"]).model
    shape = made.architecture
    spectrum = Spectrum(shape["head_dim"], shape["rope_parameters"]["rope_theta"], made.original_window_tokens)
    assert (spectrum.lowest_critical_index, spectrum.critical_index) == (lowest, highest)
    assert shape["num_attention_heads"] * shape["head_dim"] == shape["hidden_size"]


def test_16x_is_one_override():
    config = compose("train", ["experiment=bed", "rope.target_window_tokens=4096", "name=x"])
    assert config.data.segment_tokens == 4096


@pytest.mark.parametrize("length", [256, 2048])
def test_every_document_of_the_evaluation_fits_and_asks_six_questions(corpus, length):
    config = compose("evaluate", ["experiment=bed", "run=x", "data.path=" + str(corpus.folder)])
    how = config.eval
    assert (how.questions, how.chains, config.data.needles.hops) == (4, 2, 1)
    made = needle_set(
        corpus, config.data.needles, 40, length, how.depths, np.random.default_rng(0), how.questions, how.distractors,
        how.chains,
    )  # fmt: skip
    assert len(made) == 40 * len(how.depths)
    for document in made:
        assert [answer.count(" = ") for answer in document.answers] == [0] * 4 + [1] * 2
        assert len(document.tokens) == length


def test_a_source_of_needles_asks_for_chains_and_answers_alone_are_targets(corpus):
    store = source_store(corpus.folder, "needles_long").shard(0)
    chains = 0
    for number, tokens in enumerate(store):
        assert len(tokens) == 2048
        targets = np.flatnonzero(store.is_target(number, 0, len(tokens)))
        answers = [
            corpus.tokenizer.decode(tokens[one]) for one in np.split(targets, np.flatnonzero(np.diff(targets) > 1) + 1)
        ]
        assert {answer.count(" = ") for answer in answers} <= {0, 1}
        chains += sum(answer.count(" = ") == 1 for answer in answers)
    assert len(store) == 4
    assert chains > 0


def test_the_curriculum_makes_every_stage(corpus):
    config = compose("train", ["experiment=bed_base", "name=x", f"data.path={corpus.folder}"])
    loader = make_loader(corpus, config.data, 0, 0, 1, 1, 256, 2048)
    ends = np.cumsum([stage.steps for stage in config.data.stages])
    assert loader.steps_per_epoch == ends[-1]
    for first, stage in zip([0, *ends[:-1].tolist()], config.data.stages, strict=True):
        (batch,) = loader.batches(first)
        assert {stop - start for start, stop in batch.spans} == {stage.length_tokens}
        assert (labels_of(batch) != IGNORE).any()
