"""Documents of several lengths: which depths they meet, and that none depends on another."""

from collections import Counter

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from lr2train.config import SearchConfig
from lr2train.data.corpus import Corpus
from lr2train.evolution.documents import SearchDocument, depths_of, draw_documents


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4))
def test_each_length_meets_each_depth_once_in_a_round(n_lengths, n_depths, questions):
    lengths, depths = [1 / (1 + i) for i in range(n_lengths)], [i / 8 for i in range(n_depths)]
    given_settings = SearchConfig(lengths=lengths, depths=depths, questions=questions)
    for first in (0, 3 * n_lengths * n_depths):
        numbers = range(first, first + n_lengths * n_depths)
        for question in range(questions):
            met = Counter((given_settings.length_of(one), depths_of(given_settings, one)[question]) for one in numbers)
            assert met == {(length, depth): 1 for length in lengths for depth in depths}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return Corpus.open(tiny.make_corpus(tmp_path_factory.mktemp("world")))


def drawn(corpus: Corpus, *more: str) -> list[SearchDocument]:
    words = ["name=s", "search=small", "search.documents=6", "search.questions=2", "search.distractors=1"]
    return draw_documents(tiny.config("search", corpus.folder.parent, *words, *more), corpus)


def test_a_document_does_not_depend_on_the_lengths_of_the_others(corpus):
    """Its tokens are those that it has where all documents have its length."""
    lengths = [0.5, 1.0, 0.8]
    alone = {share: drawn(corpus, f"search.lengths=[{share}]") for share in lengths}
    for number, one in enumerate(drawn(corpus, f"search.lengths={lengths}")):
        same = alone[lengths[number % len(lengths)]][number]
        assert len(one.tokens) == round(lengths[number % len(lengths)] * tiny.L)
        assert one.tokens.tobytes() == same.tokens.tobytes() and one.spans == same.spans


def test_needles_of_a_shorter_document_lie_at_its_own_depths(corpus):
    config = SearchConfig(lengths=[1.0, 0.5], questions=2)
    for number, one in enumerate(drawn(corpus, "search.lengths=[1.0,0.5]")):
        asked_at = one.spans[0][0]
        for (start, stop), depth in zip(one.spans, depths_of(config, number), strict=True):
            answer = one.tokens[start:stop]
            places = [i for i in range(asked_at) if np.array_equal(one.tokens[i : i + len(answer)], answer)]
            assert len(places) == 1
            assert places[0] / asked_at == pytest.approx(depth, abs=0.25)  # further needles and the question take room


def test_plain_text_of_several_lengths_is_the_beginning_of_the_same_texts(corpus):
    whole = drawn(corpus, "search.objective=text", "search.lengths=[1.0]")
    for number, one in enumerate(drawn(corpus, "search.objective=text", "search.lengths=[1.0,0.5]")):
        length = (tiny.L, tiny.L // 2)[number % 2]
        assert one.spans == ((1, length),)
        np.testing.assert_array_equal(one.tokens, whole[number].tokens[:length])
