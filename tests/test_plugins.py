"""Parts of a user's own package: the section of CONTRIBUTING.md that shows them, block by block and command by command.

The blocks are written as files of a package beside lr2train. Its tests run, then each command, on a tiny world.
"""

import importlib
import json
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from ranks import run_ranks

from lr2train.attention.strategies import STRATEGIES, strategy_of
from lr2train.attention.strategy import PackedSegment, SegmentWork
from lr2train.cli.composition import compose
from lr2train.config import UserError
from lr2train.config.schema import Runtime, StrategyName
from lr2train.evaluate import evaluate
from lr2train.export import export
from lr2train.plan import plan
from lr2train.prepare import prepare
from lr2train.rope import Factors
from lr2train.serving.engines import RUNTIMES
from lr2train.train import checked_inputs

pytestmark = pytest.mark.usefixtures("no_trace_of_a_job")
SECTION = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text().split("## Add a part of your own")[1]
SECTION = SECTION.split("\n## ")[0]
BLOCKS = re.findall(r"```python\n# (my_lab/\w+\.py)\n(.*?)```", SECTION, re.DOTALL)
COMMANDS = {words[1]: words[2:] for line in re.findall(r"^(lr2train .*)$", SECTION, re.MULTILINE)
            if "strategy" not in line for words in [shlex.split(line)]}  # fmt: skip
(STRATEGY,) = (shlex.split(line)[2:] for line in re.findall(r"^(lr2train train .*strategy.*)$", SECTION, re.M))


@pytest.fixture(scope="module", autouse=True)
def my_lab(tmp_path_factory):
    """The package, on the path of this process and of every process that it starts."""
    folder = tmp_path_factory.mktemp("lab")
    for name, text in BLOCKS:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", f"{folder}:{Path(__file__).parents[1]}")
        yield folder


@pytest.fixture(scope="module")
def world(world):
    tiny.make_run(world, "first")
    return world


def arguments(world: Path, runs: Path, command: list[str], *more: str) -> list[str]:
    return tiny.arguments(world, *command, f"runs_folder={runs}", *more)


def test_each_part_is_shown_with_its_own_test(my_lab):
    assert {Path(name).stem for name, _ in BLOCKS} >= {"rope", "sources", "attention", "tasks", "serving"}
    tests = [
        getattr(module, name)
        for module in (importlib.import_module(f"my_lab.{file.stem}") for file in sorted(my_lab.rglob("test_*.py")))
        for name in dir(module)
        if name.startswith("test_")
    ]
    assert len(tests) == 4
    for test in tests:
        test()


def trained(rank: int, world: int, commands: list[list[str]], folder: str) -> list[int]:
    """The verb on a rank among others, once for each command; returns how often the strategy was prepared."""
    import sys

    from lr2train.train import train

    sys.path.insert(0, folder)
    own = importlib.import_module("my_lab.attention")
    _check_traffic(rank, world)
    counts = []
    for command in commands:
        with (
            mock.patch.object(own, "block_of", wraps=own.block_of) as asked,
            mock.patch("lr2train.parallel.processes.stop"),  # `run_ranks` still needs the process group
        ):
            train(compose("train", command))
        counts.append(asked.call_count)
    return counts


def _check_traffic(rank: int, world: int) -> None:
    """The strategy sends what it declares."""
    from lr2train.parallel.comm import counting
    from lr2train.parallel.mesh import make_mesh

    mesh, segment = make_mesh(world), PackedSegment(((0, 5), (5, 16)), 16, world)
    own, work = strategy_of("my_lab.attention.EVERYWHERE"), SegmentWork(segment, 4, 2, 8, 4)
    leaves = [torch.randn(8, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    with counting() as sent:
        out = own.prepare(segment, mesh, None)(*leaves, 0.3)
        forward = sent.total()
        out.sum().backward()
    assert 0 < forward < sent.total() and (forward, sent.total() - forward) == own.traffic(work, rank)


def figures(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines for key in ("loss", "grad_norm")]


def test_method_and_strategy_train_as_local_attention_does(world, my_lab, tmp_path):
    """The method's factors reach the model that is trained; shared segments give the numbers of whole ones."""
    step = [f"model.path={world}/base", "data.segment_tokens=256", "optim.steps=2", "optim.segments_per_step=2",
            "optim.warmup_steps=0", "engine.validate_every_steps=0", "logger=jsonl"]  # fmt: skip
    method = COMMANDS["train"]
    shared = arguments(world, tmp_path, [*method, *STRATEGY[1:]], *step, "name=shared")
    whole = arguments(world, tmp_path, method, *step, "name=whole")
    for shared_asks, whole_asks in run_ranks(
        trained, 2, [shared, whole], str(my_lab), tmp_path=tmp_path, timeout_s=300
    ):
        assert shared_asks and not whole_asks
    assert figures(tmp_path / "shared") == pytest.approx(figures(tmp_path / "whole"), rel=1e-5)
    factors = Factors.load(tmp_path / "shared" / "factors.json")
    expected = [(tiny.L / tiny.L0) ** (0.9 * i / 7) for i in range(8)]
    assert (factors.method, factors.rescale) == ("even", pytest.approx(expected))
    config = json.loads((tmp_path / "shared" / "model" / "config.json").read_text())
    assert config["rope_parameters"]["long_factor"] == pytest.approx(expected)
    result = plan(compose("plan", arguments(world, tmp_path, [*method, *STRATEGY[1:]], *step[:2], "name=planned")))
    assert {part["strategy"] for part in result["parallel"]["attention"]} == {"my_lab.attention.EVERYWHERE"}


def test_the_source_is_prepared(world, tmp_path):
    sizes = [f"model.original_window_tokens={tiny.L0}", "data.segment_tokens=256", "data.vocab_size=400"]
    result = prepare(compose("prepare", arguments(world, tmp_path, COMMANDS["prepare"], *sizes, "data.workers=1")))
    assert [one["documents"] + one["holdout_documents"] for one in result["sources"]] == [60]


def test_the_task_is_evaluated(world, tmp_path):
    small = ["eval.lengths_tokens=[64,192]", "eval.methods=[]", "eval.untrained=false"]
    result = evaluate(compose("evaluate", arguments(world, world, COMMANDS["evaluate"], *small)))
    scores = {(one["task"], one["length_tokens"], one["samples"]) for one in result["scores"]}
    assert scores == {("echo", 64, 2), ("echo", 192, 2)}
    (table,) = result["tables"]
    assert (table["title"], table["head"]) == ("echo: exact by length", ["", "64", "192"])


def test_the_target_is_exported(world):
    result = export(compose("export", arguments(world, world, COMMANDS["export"])))
    assert list(result["folders"]) == ["long"] and result["folders"]["long"]["long_logit_difference"] < 1e-3
    folder = world / "first" / "export" / "long"
    assert json.loads((folder / "my_server.json").read_text()) == {"max_tokens": tiny.L}
    assert "| my-server | `my-server .` |" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("verb", "override", "words"),
    [
        ("train", "rope.method=nowhere.at.all", "rope.method=nowhere.at.all cannot be imported"),
        ("train", "rope.method=json.dumps", "rope.options={} do not fit rope.method=json.dumps"),
        ("plan", "parallel.strategy=json.dumps", "parallel.strategy=json.dumps is no Strategy"),
        ("evaluate", "eval.tasks=[my_lab.tasks.Nothing]", "eval.tasks=my_lab.tasks.Nothing cannot be imported"),
        ("export", "export.runtime=my_lab.serving.lines", "export.runtime=my_lab.serving.lines is no Runtime"),
    ],
)
def test_what_is_no_such_part_is_refused(world, tmp_path, verb, override, words):
    job = {"train": checked_inputs, "plan": plan, "evaluate": evaluate, "export": export}[verb]
    more = ["run=first"] if verb in ("evaluate", "export") else ["name=refused", f"model.path={world}/base"]
    with pytest.raises(UserError, match=re.escape(words)):
        job(compose(verb, arguments(world, world, [override], *more)))


def test_ours_have_the_names_of_the_schema():
    assert {"all", *RUNTIMES} == {one.value for one in Runtime}
    assert {"auto", *STRATEGIES} == {one.value for one in StrategyName}
