"""launch/slurm.sbatch with commands of SLURM that only write down how they were called; launch/demo.sh's commands."""

import json
import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lr2train.cli.composition import compose
from lr2train.config import Config, to_dict
from lr2train.data import tokenizer
from lr2train.data.needles import NeedleMaker
from lr2train.model import load, rotary
from lr2train.model.score import score
from lr2train.rope.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
DEMO = (ROOT / "launch" / "demo.sh").read_text().replace("\\\n", " ")
SCRIPT = ROOT / "launch" / "slurm.sbatch"
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> calls
bash -c 'echo "asked: $MASTER_ADDR $LR2TRAIN_INTERRUPTED"' >> calls
[ "$INTERRUPTED" = 1 ] && touch "$LR2TRAIN_INTERRUPTED"
exit "$CODE"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> calls
[ "$1" = show ] && printf 'node7\\nnode8\\n'
exit 0
"""


@pytest.mark.parametrize(
    ("interrupted", "code"),
    [
        (True, 130),
        (True, 137),  # a rank that still ended was killed
        (True, 143),
        (False, 0),
        (False, 1),
        (False, 130),  # an interrupt whose checkpoint could not be written leaves no marker
    ],
)
def test_slurm_queues_a_job_again_where_rank_0_has_left_its_marker(tmp_path, interrupted, code):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    marker = tmp_path / "slurm-42.interrupted"
    marker.touch()  # of an earlier start
    environ = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[7-8]", "INTERRUPTED": str(int(interrupted)), "CODE": str(code),
    }  # fmt: skip
    ended = subprocess.run(["bash", str(SCRIPT), "train", "name=first", "a=[1, 2]"], env=environ, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ended.returncode == code, ended.stderr
    assert calls[0] == "scontrol show hostnames node[7-8]"
    assert calls[1].startswith("srun --kill-on-bad-exit=1 bash -c ")
    assert f"asked: node7 {marker}" in calls
    assert any(call.endswith(" train name=first a=[1, 2]") for call in calls)
    assert ("scontrol requeue 42" in calls) == interrupted
    assert not marker.exists()


def demo_command(verb: str, named: str) -> Config:
    """The config of the demo's command of a verb whose arguments hold ``named``."""
    found = re.findall(rf"(?:ranks|lr2train) {verb} ([^\"\n]*) \"\$@\"", DEMO)
    (arguments,) = (words for words in map(shlex.split, found) if named in words)
    return compose(verb, arguments)


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    return {
        key: value
        for name, one in values.items()
        for key, value in (flat(one, f"{prefix}{name}.") if isinstance(one, dict) else {f"{prefix}{name}": one}).items()
    }


def test_the_demo_trains_both_methods_alike():
    ours, yarn = (flat(to_dict(demo_command("train", name))) for name in ("name=tiny_4k", "name=tiny_4k_yarn"))
    differing = {key for key in {*ours, *yarn} if ours.get(key) != yarn.get(key)}
    assert differing == {
        "name", "rope.method", "rope.factors", "rope.options.beta_fast", "rope.options.beta_slow",
    }  # fmt: skip
    assert (ours["rope.method"], yarn["rope.method"]) == ("longrope2", "yarn")


def test_the_demo_asks_both_the_same_questions():
    ours, yarn = (demo_command("evaluate", name) for name in ("run=tiny_4k", "run=tiny_4k_yarn"))
    assert ours.eval == replace(yarn.eval, methods=ours.eval.methods, untrained=True)


def test_the_demos_base_has_the_architecture_that_tiny_base_trains():
    tiny, base = compose("train", ["experiment=tiny_base", "name=base"]), ROOT / "launch" / "base"
    made = load.config_of(tiny.model).to_dict()
    shipped = json.loads((base / "config.json").read_text())
    assert {key: made[key] for key in tiny.model.architecture} == {key: shipped[key] for key in tiny.model.architecture}
    assert demo_command("search", "name=factors").model.path == "launch/base"
    assert (base / "model.safetensors").stat().st_size < 4e6


def test_the_demos_base_answers_inside_its_window():
    """It was trained on such documents; a model without training finds none of a million numbers."""
    base = ROOT / "launch" / "base"
    settings, model = compose("evaluate", ["experiment=tiny_4k", "run=x"]), load.load_whole(base)
    encode = tokenizer.load(str(base)).encode
    maker = NeedleMaker(encode, settings.data.needles.wording, settings.data.needles.digits, 0, None)
    table = rotary.install(
        model, METHODS["none"](load.spectrum_of(load.config_of(settings.model), settings.model), 512)
    )
    filler, rng = encode(Path(shlex.__file__).read_text()), np.random.default_rng(0)
    found = []
    for number in range(4):
        one = maker.make(rng, filler[600 * number :], 512, 0.5, 20, 4)
        right = score(model, table, "short", one.tokens, one.answer_spans).right
        found += [n == stop - start for n, (start, stop) in zip(right, one.answer_spans, strict=True)]
    assert np.mean(found) > 0.7, found


def test_every_command_of_the_demo_can_be_composed():
    commands = re.findall(r"(?:ranks|lr2train) (\w+) ([^\"\n]*) \"\$@\"", DEMO)
    assert len(commands) == 8
    for verb, arguments in commands:
        compose(verb, shlex.split(arguments))
