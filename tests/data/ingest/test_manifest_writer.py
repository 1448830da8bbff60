"""Manifests are written in groups: the newest version of each, in order, and none whose files are being replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lr2train.data.ingest.manifest_writer import ManifestWriter
from lr2train.data.store import sealed


@pytest.fixture
def manifests(monkeypatch) -> ManifestWriter:
    monkeypatch.setattr("lr2train.data.ingest.manifest_writer._FLUSH_EVERY_S", 1e9)
    return ManifestWriter()


def test_waiting_manifests_are_written_together_the_newest_of_each_in_order(tmp_path, manifests, monkeypatch):
    named: list[str] = []
    replace = os.replace
    monkeypatch.setattr(
        os,
        "replace",
        lambda source, target: named.append(Path(target).name) or replace(source, target),
    )
    for name, value in (("a", 1), ("b", 2), ("c", 3), ("a", 4)):
        manifests.add(tmp_path / f"{name}.json", {"value": value})
    manifests.drop(tmp_path / "b.json")
    assert not list(tmp_path.iterdir())
    manifests.flush()
    assert named == ["c.json", "a.json"]
    assert sealed(tmp_path / "a.json") == {"value": 4}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "c.json"]
    manifests.flush()
    assert named == ["c.json", "a.json"]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_waiting_manifests_are_written_however_the_job_ends(tmp_path, manifests, error):
    def job() -> None:
        with manifests:
            manifests.add(tmp_path / "a.json", {})
            if error is not None:
                raise error

    if error is None:
        job()
    else:
        with pytest.raises(error):
            job()
    assert (tmp_path / "a.json").exists()


def test_a_manifest_is_written_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr("lr2train.data.ingest.manifest_writer._FLUSH_EVERY_S", 0)
    ManifestWriter().add(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").exists()
