"""The 13 tasks: their questions can be answered from their prompts, they fill their length, and they never change."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import remedies
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import world

from lr2train.config import UserError
from lr2train.evaluation import ruler
from lr2train.evaluation.request import Answer
from lr2train.evaluation.ruler import cache, frequencies, spec
from lr2train.evaluation.ruler.draft import NoRoom, Prompt, Tokens, fit
from lr2train.evaluation.ruler.essays import Essays, ends_sentence
from lr2train.evaluation.ruler.task import FORMAT

ALL = ruler.NAMES


def same(one, other) -> bool:
    return (
        np.array_equal(one.request.tokens, other.request.tokens)
        and (one.answers, one.facts, one.number, one.length_tokens, one.request.enough)
        == (other.answers, other.facts, other.number, other.length_tokens, other.request.enough)
    )  # fmt: skip


@pytest.mark.parametrize("kind", world.KINDS)
def test_answers_that_are_read_out_of_a_prompt_score_100_and_prompts_fill_their_length(tmp_path, kind):
    tokenizer = world.tokenizer(kind)
    made = world.build(tmp_path, kind, lengths=(4096, 6000), count=2, leave_out=True)
    assert [task.name for task in made] == list(ALL)
    for task in made:
        assert task.measures == ("score",)
        samples = task.samples()
        assert [(one.length_tokens, one.number) for one in samples] == [
            (length, number) for length in task.lengths for number in range(2)
        ]
        for one in samples:
            where = (task.name, one.length_tokens, one.number)
            text = task._draft(one.length_tokens, one.number).prompt(one.facts["size"]).text
            assert np.array_equal(tokenizer.encode(text), one.request.tokens), where
            assert one.request.max_new_tokens == spec.NEW_TOKENS[task.name]
            assert 0.95 * one.length_tokens <= one.request.total_tokens <= one.length_tokens, where
            right = [one.answers[-1]] if task.is_part else world.solve(task.name, text)
            assert all(answer in text for answer in one.answers)
            assert len(set(one.answers)) == len(one.answers)
            assert sorted(right) == sorted(one.answers) or task.is_part
            assert task.grade(one, Answer("short", text=f" {', '.join(right).upper()}.")) == {"score": 100}
            assert task.grade(one, Answer("short", text="")) == {"score": 0}


def test_a_byte_level_prompt_is_its_text(tmp_path):
    tokenizer = world.tokenizer("demo")
    for task in world.build(tmp_path, "demo", count=1, leave_out=True):
        (one,) = task.samples()
        text = tokenizer.decode(one.request.tokens)
        assert all(answer in text for answer in one.answers)
        if not task.is_part:
            assert set(world.solve(task.name, text)) == set(one.answers)


@settings(max_examples=20)
@given(name=st.sampled_from(ALL), length=st.integers(2600, 7000), seed=st.integers(-5, 2**40), number=st.integers(0, 9))
def test_every_sample_of_every_seed_and_length_fits(tmp_path_factory, name, length, seed, number):
    folder = tmp_path_factory.mktemp("any")
    made = world.build(folder, names=[name], lengths=(length,), count=10, seed=seed, leave_out=True)
    for task in made:  # none where the length is too short for cwe
        fitted = task._fitted(length, number, None)[1]
        total = len(fitted.tokens) + task.max_new_tokens
        assert total <= length
        assert total >= 0.95 * length or length < 4096


def test_a_sample_depends_on_nothing_but_its_place(tmp_path):
    few = world.build(tmp_path, names=["niah_multikey_1", "vt", "qa_1"], lengths=(1500, 2000), count=2)
    many = world.build(tmp_path, names=["qa_1", "vt", "niah_multikey_1"], lengths=(2000, 1500, 2000), count=5)
    for one, other in zip(few, many, strict=True):
        assert one.name == other.name
        longer = {(sample.length_tokens, sample.number): sample for sample in reversed(other.samples())}
        assert len(longer) == 10
        assert all(same(sample, longer[sample.length_tokens, sample.number]) for sample in one.samples())
    seeded = world.build(tmp_path, names=["vt"], lengths=(1500,), seed=4)[0].samples()
    assert not any(same(*pair) for pair in zip(few[1].samples(), seeded, strict=False))


def test_samples_come_from_the_cache_unchanged_and_damage_is_made_again(tmp_path):
    def task(count, **more):
        return world.build(tmp_path, names=["niah_multiquery"], lengths=(1500,), count=count, **more)[0]

    fresh = task(4).samples()
    folder = tmp_path / "cache"
    first = task(2, folder=folder).samples()
    (file,) = folder.iterdir()
    before = file.read_bytes()
    grown = task(4, folder=folder).samples()
    assert file.read_bytes() != before
    assert all(same(*pair) for pair in zip(fresh, grown, strict=True))
    assert all(same(*pair) for pair in zip(first, grown, strict=False))
    whole = file.read_bytes()
    assert all(same(*pair) for pair in zip(first, task(2, folder=folder).samples(), strict=True))
    assert file.read_bytes() == whole  # fewer samples rewrite nothing
    first[0].request.tokens[:] = 0  # a reader's copy is its own
    places = [0, 8 * len(grown[0].request.tokens), len(whole) - 900, len(whole) - 9, len(whole) - 8, len(whole) - 1]
    for damaged in [whole[:cut] for cut in (0, 5, 4000, len(whole) - 1)] + [flipped(whole, at) for at in places]:
        file.write_bytes(damaged)
        assert all(same(*pair) for pair in zip(fresh, task(4, folder=folder).samples(), strict=True))
        assert file.read_bytes() == whole
    task(2, folder=folder, seed=4).samples()
    task(2, folder=folder, essays=world.essay(3000, seed=2)).samples()
    assert len(list(folder.iterdir())) == 3


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_cached_sample_is_used_and_not_made(tmp_path, monkeypatch):
    made = world.build(tmp_path, names=["vt"], lengths=(1500,), folder=tmp_path / "cache")
    kept = made[0].samples()
    again = world.build(tmp_path, names=["vt"], lengths=(1500,), folder=tmp_path / "cache")
    monkeypatch.setattr(ruler.RulerTask, "_fitted", None)
    assert all(same(*pair) for pair in zip(kept, again[0].samples(), strict=True))


def test_ranks_share_the_making_of_samples(tmp_path, monkeypatch):
    names, lengths, folder = ["niah_single_1", "vt", "fwe"], (1200, 1500), tmp_path / "cache"
    alone = world.build(tmp_path, names=names, lengths=lengths)
    for part in range(2):
        for task in world.build(tmp_path, names=names, lengths=lengths, folder=folder)[part::2]:
            task.samples()
        assert len(list(folder.iterdir())) == (4, 6)[part]
    wanted = [one for task in alone for one in task.samples()]
    monkeypatch.setattr(ruler.RulerTask, "_fitted", None)
    found = [
        one for task in world.build(tmp_path, names=names, lengths=lengths, folder=folder) for one in task.samples()
    ]
    assert all(same(*pair) for pair in zip(wanted, found, strict=True))


def test_a_file_that_another_job_rewrites_with_fewer_samples_costs_nothing(tmp_path, monkeypatch):
    def task(count):
        return world.build(tmp_path, names=["vt"], lengths=(1200,), count=count, folder=tmp_path / "cache")[0]

    write = cache.write
    monkeypatch.setattr(cache, "write", lambda path, identity, samples: write(path, identity, list(samples)[:1]))
    assert len(task(3).samples()) == 3


def test_texts_are_those_of_this_format(tmp_path):
    """A change of these numbers needs another ``task.FORMAT``: caches hold samples of the former generators."""
    sizes = {"fwe": 400}
    found = {}
    for task in world.build(tmp_path, lengths=(6000,), count=1):
        text = task._draft(6000, 0).prompt(sizes.get(task.name, 40)).text
        found[task.name] = xxhash.xxh3_64(text.encode()).hexdigest()[:6]
    assert (FORMAT, found) == (1, {
        "niah_single_1": "ec9629", "niah_single_2": "b739c7", "niah_single_3": "e29250", "niah_multikey_1": "59677b",
        "niah_multikey_2": "db2b8c", "niah_multikey_3": "cba49f", "niah_multivalue": "f0ec2b",
        "niah_multiquery": "d8cce6", "vt": "922d32", "cwe": "a16254", "fwe": "9cf1c9", "qa_1": "7703de",
        "qa_2": "0066de",
    })  # fmt: skip


def test_positions_count_the_tokens_before_an_answer(tmp_path):
    tokenizer = world.tokenizer("bytes")
    for task in world.build(tmp_path, names=["niah_multivalue", "niah_single_3", "vt"], lengths=(2500,)):
        for one in task.samples():
            text = tokenizer.decode(one.request.tokens)
            for answer, position in zip(one.answers, one.facts["answer_positions"], strict=True):
                place = text.index(f"VAR {answer} =" if task.name == "vt" else answer)
                before = tokenizer.count(text[:place])
                assert abs(position - before) <= 1  # a token may begin with the space before the answer
    lossy = Tokens.of(world.tokenizer("wordpiece"), "One  two")
    assert lossy.position(0) == 1  # after <s>
    assert lossy.position(3) == lossy.position(5)  # white space has no token


def test_depths_are_rulers_and_needles_stand_there(tmp_path):
    assert spec.DEPTHS_PERCENT[:4] == (0, 3, 5, 8)
    assert spec.DEPTHS_PERCENT[-2:] == (97, 100)
    assert len(set(spec.DEPTHS_PERCENT)) == 40
    task = world.build(tmp_path, names=["niah_single_2"], count=12)[0]
    for one in task.samples():
        (depth,) = one.facts["depths"]
        assert round(depth * 100) in spec.DEPTHS_PERCENT
        (position,) = one.facts["answer_positions"]
        assert position / len(one.request.tokens) == pytest.approx(depth, abs=0.03)


def test_answers_stand_at_all_depths_alike(tmp_path):
    names = ["niah_single_1", "niah_multikey_1", "niah_multikey_2", "niah_multiquery", "vt"]
    for task in world.build(tmp_path, names=names, count=1):
        drafts = (task._draft(4096, number).prompt(150) for number in range(200))
        depths = [depth for one in drafts for depth in one.facts["depths"]]
        fifths = np.histogram(depths, 5, (0, 1))[0] / len(depths)
        assert np.abs(fifths - 0.2).max() < 0.08  # three standard deviations of a share of 200


@pytest.mark.parametrize(
    ("length", "listed", "example"),
    [(2800, {6: 10, 1: None}, {3: 10, 1: 10}), (5600, {30: 10, 3: None}, {10: 10, 3: 30})],
)
def test_words_of_cwe_repeat_as_often_as_ruler_says(tmp_path, length, listed, example):
    (task,) = world.build(tmp_path, names=["cwe"], lengths=(length,), count=1)
    text = task.tokenizer.decode(task.samples()[0].request.tokens)
    shown, asked = (part.split("\n")[1] for part in text.split("Below is a numbered list")[1:])
    for line, wanted in ((shown, example), (asked, listed)):
        words = [entry.split(" ", 1)[1] for entry in split_numbered(line)]
        times = Counter(Counter(words).values())
        assert set(times) == set(wanted)
        assert all(n is None or times[repeats] == n for repeats, n in wanted.items())


def split_numbered(line: str) -> list[str]:
    """Entries ``1. word`` of a line; numbers rise by one."""
    entries, number = [], 1
    while line:
        following = line.find(f" {number + 1}. ")
        entries.append(line if following < 0 else line[:following])
        assert entries[-1].startswith(f"{number}. ")
        line, number = "" if following < 0 else line[following + 1 :], number + 1
    return entries


def test_more_words_than_wonderwords_has_are_pairs_and_never_common(tmp_path):
    (task,) = world.build(tmp_path, names=["cwe"], count=1, lengths=(6000,))
    known = len(frequencies.all_words())
    prompt = task._draft(6000, 0).prompt(known + 500)
    words = Counter(entry.split(" ", 1)[1] for entry in split_numbered(prompt.text.split("\n")[4]))
    assert len(words) == known + 500
    assert {word for word, times in words.items() if times == 30} == set(prompt.answers)
    assert set(prompt.answers) <= set(frequencies.all_words())


@given(size=st.integers(53, 10**6), vocabulary=st.integers(5, 3000))
def test_frequencies_of_fwe_follow_a_zeta_distribution_and_answers_are_the_most_frequent(size, vocabulary):
    counts = frequencies.frequencies(size, vocabulary)
    zeta = 1.6449340668482264
    wanted = [int(size * rank**-2.0 / zeta) for rank in range(1, vocabulary + 1)]
    assert np.abs(counts - wanted).max() <= (1 if size > 10**5 else 0)  # rounding of the last bit
    assert counts[0] > counts[1] >= counts[2] >= counts[3] > counts[4]


@given(n=st.integers(1, 900))
def test_sentences_are_the_words_in_order_again_and_again(n):
    text = world.essay(300)
    words = text.split()
    joined = " ".join(Essays(text).sentences(n)).split()
    assert joined == (words * 4)[:n]


def test_sentences_end_where_a_reader_sees_it():
    text = (
        'He met Mr. Smith at 5 p.m. in St. James. "Why?" she asked. It was 3.5 miles, i.e. far (really!). '
        "J. S. Bach wrote it. [He did.] “Indeed!” Then, e.g. in Nov. 1999, it ended... and began. Done"
    )
    assert Essays(text).sentences(len(text.split())) == [
        "He met Mr. Smith at 5 p.m. in St. James.", '"Why?"', "she asked.", "It was 3.5 miles, i.e. far (really!).",
        "J. S. Bach wrote it.", "[He did.]", "“Indeed!”", "Then, e.g. in Nov. 1999, it ended... and began.", "Done",
    ]  # fmt: skip
    assert ends_sentence("end.", "“New")
    assert not ends_sentence("comma,", "New")


class Jumps:
    """A draft whose text grows by leaps, and once shrinks."""

    smallest = 1

    def __init__(self, leaps):
        self._leaps = leaps

    def prompt(self, size: int) -> Prompt:
        return Prompt("in " * max(1, sum(self._leaps[index % len(self._leaps)] for index in range(size))), ("in",))


@given(
    leaps=st.lists(st.integers(-1, 60), min_size=1, max_size=9).filter(lambda leaps: sum(leaps) > len(leaps)),
    room=st.integers(5, 3000),
)
def test_a_fit_ends_and_never_exceeds_the_room(leaps, room):
    tokenizer = world.tokenizer("wordpiece")
    word = tokenizer.count("in in") - tokenizer.count("in")
    least = len(Tokens.of(tokenizer, Jumps(leaps).prompt(1).text).ids)
    if least > room:
        with pytest.raises(NoRoom) as refused:
            fit(Jumps(leaps), tokenizer, room)
        assert refused.value.tokens == least
        return
    fitted = fit(Jumps(leaps), tokenizer, room)
    assert len(fitted.tokens.ids) <= room
    assert len(fitted.tokens.ids) >= min(0.99 * room, room - word * max(leaps))
    assert np.array_equal(tokenizer.encode(fitted.prompt.text), fitted.tokens.ids)


@pytest.mark.parametrize("name", ALL)
def test_a_length_without_room_is_refused_with_one_that_has(tmp_path, name):
    with pytest.raises(UserError, match=f"RULER's {name} does not fit a length of 90 tokens") as refused:
        world.build(tmp_path, names=[name], lengths=(90,))
    remedy = remedies.remedy_of(refused.value)
    assert remedy.startswith("eval.lengths_tokens=[")
    shortest = json.loads(remedy.split("=")[1])[0]
    (task,) = world.build(tmp_path, names=[name], lengths=(shortest,))
    assert len(task.samples()) == 2
    said = []
    (task,) = world.build(tmp_path, names=[name], lengths=(90, shortest), leave_out=True, say=said.append)
    assert task.lengths == (shortest,)
    assert f"{name} is left out of RULER at 90 tokens: with this tokenizer it needs {shortest}" in said
    assert task.shortest() <= 1.1 * shortest  # what is drawn depends on the length
    assert world.build(tmp_path, names=[name], lengths=(90,), leave_out=True) == []


def test_a_missing_file_of_questions_leaves_its_task_out_with_the_key(tmp_path):
    said = []
    made = world.build(tmp_path, lengths=(6000,), squad=None, count=20, say=said.append)
    assert [task.name for task in made] == [name for name in ALL if name != "qa_1"]
    assert any("qa_1 is left out" in one and "eval.squad is null" in one for one in said)
    assert any("qa_2 has 12 questions, not 20" in one and "eval.hotpotqa" in one for one in said)
    assert sum("comparable with NVIDIA's" in one for one in said) == 1
    assert len(made[-1].samples()) == 12
    said.clear()
    world.build(tmp_path, names=["vt", "cwe"], lengths=(6000,), essays=None, say=said.append)
    assert not said


def test_unknown_names_and_missing_text_are_refused(tmp_path):
    with pytest.raises(UserError, match="niah_single_4"):
        world.build(tmp_path, names=["niah_single_4"])
    with pytest.raises(UserError, match=r"eval\.essays"):
        world.build(tmp_path, essays=None)
    with pytest.raises(UserError, match=r"eval\.essays"):
        world.build(tmp_path, essays=tmp_path)  # a folder without .txt files
    with pytest.raises(UserError, match=r"eval\.essays"):
        world.build(tmp_path, essays=" \n")
    (tmp_path / "b.txt").write_text(" Second text.")
    (tmp_path / "a.txt").write_text("First text.")
    assert Essays.of(tmp_path).sentences(4) == ["First text.", "Second text."]
