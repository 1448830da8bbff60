from test_fitness import *  # noqa
import pytest

def divided(rank, world, folder, journal):
    return whole_search(folder, journal, sharded=True, algorithm="gradient")

def test_divided(folder, tmp_path):
    whole = whole_search(folder, tmp_path / "a.jsonl", algorithm="gradient")
    found = run_ranks(divided, 2, folder, tmp_path / "divided.jsonl", tmp_path=tmp_path, timeout_s=400)
    for a, b, c, d in found:
        print([one.best.candidate for one in a], [one.best.candidate for one in whole[0]])
        print([one.best.loss for one in a], [one.best.loss for one in whole[0]])
    assert [one.best.loss for one in found[0][0]] == pytest.approx([one.best.loss for one in whole[0]], rel=1e-4)
