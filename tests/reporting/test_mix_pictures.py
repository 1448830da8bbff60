"""Pictures of a corpus's segment table: written whole, redrawn when plan.json changes, with any number of sources."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lr2train.config import BucketConfig, DataConfig, SourceConfig
from lr2train.data.plan.compose import compose_segments
from lr2train.data.plan.report import report_of
from lr2train.reporting import mix, pictures


def write_plan(folder: Path, n_sources: int = 2, buckets: list[BucketConfig] | None = None, **settings) -> None:
    data = DataConfig(
        sources=[SourceConfig(name=f"s{i}") for i in range(n_sources)],
        segment_tokens=512,
        buckets=buckets or [],
        **settings,
    )
    lengths = [np.random.default_rng(i).lognormal(4, 1, 300).astype(np.int32).clip(2) for i in range(n_sources)]
    masks = [None] * n_sources
    report = report_of(data, lengths, masks, compose_segments(data, lengths, masks, 128, 0))
    (folder / "plan.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"n_sources": 9, "buckets": [BucketConfig(name="a", to_tokens=300), BucketConfig(name="b", above_tokens=300)]},
        {"segment_tokens_more": True},
    ],
    ids=["plain", "many", "no_segment"],
)
def test_every_corpus_has_three_pictures(tmp_path, plan):
    if plan.pop("segment_tokens_more", False):
        data = DataConfig(sources=[SourceConfig(name="s")], segment_tokens=1 << 20)
        lengths = [np.array([300, 5], np.int32)]
        (tmp_path / "plan.json").write_text(
            json.dumps(report_of(data, lengths, [None], compose_segments(data, lengths, [None], 128, 0)))
        )
    else:
        write_plan(tmp_path, **plan)
    paths = pictures.ensure_mix_pictures(tmp_path)
    assert [path.name for path in paths] == ["lengths.png", "mix.png", "segments.png"]
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape[0] > 400 and pixels.shape[1] > 600
        assert pixels.std() > 5, "an empty picture"
    assert not list((tmp_path / "pictures").glob(".*")), "a temporary file is left"


def test_pictures_are_redrawn_when_plan_json_is_newer(tmp_path):
    write_plan(tmp_path)
    paths = pictures.ensure_mix_pictures(tmp_path)
    before = [path.stat().st_mtime_ns for path in paths]
    assert [path.stat().st_mtime_ns for path in pictures.ensure_mix_pictures(tmp_path)] == before
    later = paths[-1].stat().st_mtime + 5
    os.utime(tmp_path / "plan.json", (later, later))
    assert all(
        path.stat().st_mtime_ns > old for path, old in zip(pictures.ensure_mix_pictures(tmp_path), before, strict=True)
    )


def test_the_smallest_of_many_sources_are_summed_without_loss():
    tokens = {f"s{i}": np.full(4, float(i)) for i in range(9)}
    grouped = mix.grouped(tokens)
    assert list(grouped) == ["s4", "s5", "s6", "s7", "s8", "others"]
    assert sum(one.sum() for one in grouped.values()) == sum(one.sum() for one in tokens.values())
