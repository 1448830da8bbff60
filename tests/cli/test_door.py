"""The command line: one door for every flag, exit codes, sweeps, remedies that lead on, configs from a wheel."""

import errno
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import tiny
from remedies import remedy_of

from lr2train import plan, prepare, search, train
from lr2train.cli import door as cli
from lr2train.cli import help
from lr2train.cli.composition import compose
from lr2train.config import CONF_FOLDER, READS, VERBS, Algorithm, Config, UserError, as_typed, reads
from lr2train.data.feed.loader import make_loader
from lr2train.data.plan import packing

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [[], ["--run"], ["--config-dir", str(CONF_FOLDER)], ["--config-name=train"]]


def start(monkeypatch, job, *arguments: str, verb: str = "train") -> int:
    """Run a verb's door in this process; its exit code."""
    monkeypatch.setattr("sys.argv", [verb, *arguments])
    try:
        cli.main(verb, job)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def raising(error: BaseException):
    def job(_):
        raise error

    return job


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
@pytest.mark.parametrize(
    ("error", "code", "tells"),
    [
        (UserError("a.b=1 is above 0; set a.b to 0"), 2, "train: a.b=1 is above 0; set a.b to 0\n"),
        (OSError(errno.ENOSPC, "x", "runs/x/a.bin"), 2, "train: runs/x/a.bin: No space left on device; free some"),
        (OSError(errno.EDQUOT, "x", "runs/x/a.bin"), 2, "train: runs/x/a.bin: Disk quota exceeded; free some"),
        (
            OSError(errno.EACCES, "x", "runs/x"),
            2,
            "train: runs/x: Permission denied; let this user read and write there",
        ),
        (OSError(errno.EFBIG, "x", "runs/x/a.bin"), 2, "train: runs/x/a.bin: File too large; raise the limit"),
        (OSError(errno.EROFS, "x", "runs/x"), 2, "train: runs/x: Read-only file system; set runs_folder"),
        (OSError(errno.ENAMETOOLONG, "x", "runs/xx"), 2, "train: runs/xx: File name too long; give a shorter name="),
        (KeyboardInterrupt(), 130, "train: interrupted; run the same command again"),
    ],
    ids=lambda one: type(one).__name__ + str(getattr(one, "errno", "")) if isinstance(one, BaseException) else "",
)
def test_exit_codes_and_sentences_are_the_same_with_every_flag(monkeypatch, capsys, flags, error, code, tells):
    assert start(monkeypatch, raising(error), "name=x", *flags) == code
    out = capsys.readouterr()
    assert out.err.startswith(tells)
    assert (out.out, out.err.count("\n")) == ("", 1)


def test_a_launcher_may_end_a_rank_that_ctrl_c_has_reached(monkeypatch):
    assert start(monkeypatch, raising(KeyboardInterrupt()), "name=x") == 130
    signal.raise_signal(signal.SIGTERM)  # raises nothing


WAITS = """
import signal, weakref
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from lr2train.cli import door

def job(_):
    held = type("Held", (), {})()
    seen = weakref.ref(held, lambda _: signal.raise_signal(signal.SIGNAL))
    del held  # the signal strikes in the callback, whose exceptions Python drops
    signal.pause()
    raise AssertionError("not interrupted")

door.main("plan", job)
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_that_strikes_where_python_drops_exceptions_still_ends_the_verb(number):
    code = WAITS.replace("SIGNAL", number)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT)
    told = "plan: interrupted; run the same command again\n"  # plan keeps nothing to go on from
    assert (ended.returncode, ended.stderr, ended.stdout) == (130, told, "")


@pytest.mark.parametrize(("verb", "again"), [("search", "again to go on"), ("doctor", "again")])
def test_only_a_verb_that_keeps_its_work_says_that_it_goes_on(verb, again, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the test's process keeps its own
    monkeypatch.setattr("atexit.register", lambda _: None)
    with pytest.raises(SystemExit) as ended, cli.door(verb):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"{verb}: interrupted; run the same command {again}\n"


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_a_defect_keeps_its_traceback_with_every_flag(monkeypatch, flags):
    for error in (RuntimeError("ours"), OSError(errno.ENOENT, "x", "gone"), KeyError("ours")):
        with pytest.raises(type(error)):
            start(monkeypatch, raising(error), "name=x", *flags)


@pytest.mark.parametrize("flags", [*FLAGS, ["--cfg", "job"]], ids=" ".join)
def test_a_typo_is_one_sentence_with_what_was_probably_meant(monkeypatch, capfd, flags):
    assert start(monkeypatch, raising(AssertionError("must not run")), "name=x", "optim.lrr=1", *flags) == 2
    out = capfd.readouterr()
    assert re.search(r"train: Could not override 'optim.lrr'; Key.*; did you mean lr\?\n", out.err)
    assert out.out == ""


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("gpus=8", "hardware.gpus"),
        ("engine.sp=8", "parallel.sp"),
        ("steps=10", "optim.steps"),
        ("path=/models/x", "model.path or data.path"),
    ],
)
def test_a_key_without_its_group_is_answered_with_the_group(monkeypatch, capfd, typed, meant):
    assert start(monkeypatch, raising(AssertionError("must not run")), "name=x", typed) == 2
    assert capfd.readouterr().err.endswith(f"; did you mean {meant}?\n")


@pytest.mark.parametrize(
    ("typed", "tells"),
    [
        ("experiment=llama3_8b_64k", r"is not one of bed, .*, tiny_base; did you mean llama3_8b_128k\?"),
        ("engine=offload", r"is not one of zero3, zero3_hpz, zero3_offload(; did you mean \w+\?)?"),
    ],
)
def test_an_unknown_preset_is_answered_with_those_that_are_there(monkeypatch, capfd, typed, tells):
    assert start(monkeypatch, raising(AssertionError("must not run")), "name=x", typed) == 2
    assert re.fullmatch(rf"train: {typed} {tells}\n", capfd.readouterr().err)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["", "two"])
def test_a_variable_of_a_launcher_that_is_no_number_is_one_sentence(monkeypatch, capfd, name, value):
    monkeypatch.setenv(name, value)
    assert start(monkeypatch, raising(AssertionError("must not run")), "name=x") == 2
    told = f"train: {name}={value} in the environment is no whole number of at least 0; unset or correct it\n"
    assert capfd.readouterr().err == told


def test_flags_may_stand_anywhere_among_the_keys(monkeypatch):
    seen = []
    assert (
        start(monkeypatch, seen.append, "name=1e5", "--config-dir", str(CONF_FOLDER), "optim.lr=0.5", "--local_rank=0")
        == 0
    )
    assert (seen[0].name, seen[0].optim.lr) == ("1e5", 0.5)


@pytest.mark.parametrize(
    ("flag", "tells"), [("--config-path=/x", "--config-dir"), ("--experimental-rerun=x", "overrides of the former run")]
)
def test_flags_that_are_not_served_are_refused_by_name(monkeypatch, capsys, flag, tells):
    assert start(monkeypatch, raising(AssertionError("must not run")), "name=x", flag) == 2
    assert tells in capsys.readouterr().err


def test_cfg_shows_text_as_it_was_typed_and_runs_nothing(monkeypatch, capsys):
    job = raising(AssertionError("must not run"))
    typed = ["name=x", "data.sources=[{name: t}]", "data.sources.t.path=/a=b#(c", "model.overrides.rope_theta=5"]
    assert start(monkeypatch, job, *typed, "--cfg", "job") == 0
    shown = capsys.readouterr().out
    assert "path: /a=b#(c" in shown
    assert "rope_theta: 5" in shown


def job_of(verb: str):
    """A job that must not run, of a verb's module."""
    job = raising(AssertionError("must not run"))
    job.__module__ = importlib.import_module(f"lr2train.{verb}").__name__
    return job


@pytest.mark.parametrize("verb", READS)
def test_help_shows_the_keys_that_the_verb_reads_and_no_others(monkeypatch, capsys, verb):
    assert start(monkeypatch, job_of(verb), "--help", verb=verb) == 0
    said = capsys.readouterr().out
    shown = set(re.findall(r"^  ([a-z][\w.]*(?:\.NAME\.\w+)?)[ =(]", said, re.MULTILINE)) - {"presets"}
    assert said.startswith(f"{verb}: ")
    assert {key for key in shown if not reads(verb, key)} == set()
    assert {key for key in READS[verb] if "." in key and not any(one.startswith(key) for one in shown)} == set()


def test_help_shows_value_type_limits_comment_and_presets(monkeypatch, capsys):
    assert start(monkeypatch, job_of("train"), "experiment=tiny_4k", "optim.lr=0.125", "--help") == 0
    said = capsys.readouterr().out
    assert "  optim.lr = 0.125  (number above 0)\n      Peak learning rate.\n" in said
    assert "  model.dtype = float32  (float32 | bfloat16 | float16)\n" in said
    assert "  name=…  has to be given" in said
    assert "experiment=llama3_8b_128k, experiment=" in said
    assert "  data.segment_tokens = 4096  (" in said, "the values are those of the experiment"


def test_every_key_has_a_comment():
    assert [key.name for key in help._keys(Config) if not help._comments()[key.owner.__name__, key.field.name]] == []


def lr2train(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lr2train", *arguments], capture_output=True, text=True, cwd=folder)


def test_without_a_verb_all_verbs_are_listed_a_line_each():
    done = lr2train()
    assert done.returncode == 0
    assert [verb for verb in VERBS if not re.search(rf"^  {verb} +\S", done.stdout, re.MULTILINE)] == []


@pytest.mark.parametrize("verb", sorted(READS))
def test_a_wrong_flag_names_the_verb_and_no_file(verb, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"/somewhere/{verb}.py", "--wrong"])
    with pytest.raises(SystemExit):
        cli.configured(verb)
    assert f"lr2train {verb}: error: unrecognized arguments: --wrong" in capsys.readouterr().err


def test_a_value_in_a_message_is_as_the_user_types_it():
    typed = [as_typed(one) for one in (None, True, False, 1, 0.5, [1, None], {"a": True}, Algorithm.gradient, "x")]
    assert typed == ["null", "true", "false", "1", "0.5", "[1,null]", "{a:true}", "gradient", "x"]


def test_a_wrong_verb_is_refused_with_the_one_that_was_probably_meant():
    done = lr2train("trian", "name=x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lr2train: 'trian' is no verb; did you mean train?\n"


def test_an_ascii_locale_does_not_change_what_is_read(tmp_path):
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "lr2train", "inspect", "data.path=Привет 世界", "--cfg", "job"]
    done = subprocess.run(
        command, capture_output=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), **ascii_locale}
    )
    assert done.returncode == 0, done.stderr
    assert "path: Привет 世界" in done.stdout.decode("utf-8")


def test_a_verb_runs_as_its_module_does():
    done = lr2train("inspect", "inspect.documents=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "inspect: inspect.documents=0 is below 1; set inspect.documents to 1\n"


def test_a_key_that_the_verb_does_not_read_is_remarked_in_one_line(monkeypatch, capsys):
    typed = [
        "name=x",
        "parallel.sp=0",
        "data.segment_tokens=64",
        "optim.lr=2",
        "experiment=tiny_4k",
        "hydra.run.dir=x",
        "search=paper",
    ]
    assert start(monkeypatch, lambda _: None, *typed, verb="prepare") == 0
    assert (
        capsys.readouterr().err
        == "[prepare] given, but not read by prepare: parallel.sp, optim.lr, hydra.run.dir, search\n"
    )


def test_a_key_that_is_given_twice_is_remarked_in_one_line(monkeypatch, capsys):
    seen = []
    assert start(monkeypatch, seen.append, "name=x", "optim.lr=1e-3", "seed=1", "optim.lr=1e-5") == 0
    assert seen[0].optim.lr == 1e-5
    assert capsys.readouterr().err == "[train] given more than once, and the last value counts: optim.lr\n"


def test_a_rank_that_fails_alone_is_heard(monkeypatch, capsys):
    """The launcher has not ended it: its machine's first rank had nothing to say."""
    monkeypatch.setattr(cli, "_PATIENCE_S", 0.0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "5")
    assert start(monkeypatch, raising(AssertionError("must not run")), "name=x", "optim.lr=-1") == 2
    assert capsys.readouterr().err == "train (rank 5): optim.lr=-1.0 is not above 0; set optim.lr to 2e-05\n"


def test_a_full_disk_is_named_though_the_write_does_not_say_which_file(monkeypatch, capsys):
    class Writer:
        def __init__(self):
            self.file = open("/dev/full", "w")  # noqa: SIM115

        def write(self):
            self.file.write("x" * 10)
            self.file.flush()

    writer = Writer()
    assert start(monkeypatch, lambda _: writer.write(), "name=x") == 2
    assert capsys.readouterr().err.startswith("train: /dev/full: No space left on device; free some")
    with pytest.raises(OSError, match="No space"):
        writer.file.close()


@pytest.mark.parametrize(
    ("typed", "tells"),
    [
        (f"name={'y' * 300}", "File name too long; give a shorter name="),
        ("name=x/../../etc", "no name of a folder"),
        ("runs_folder=file", "Not a directory; set runs_folder, or the key that names this path, to a folder"),
    ],
    ids=["long", "dots", "file"],
)
def test_a_run_folder_that_no_disk_takes_is_refused(monkeypatch, capsys, tmp_path, typed, tells):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert start(monkeypatch, plan.plan, "experiment=tiny_4k", typed, verb="plan") == 2
    said = capsys.readouterr().err
    assert tells in said
    assert sum(line.startswith("plan: ") for line in said.splitlines()) == 1


# Sweeps.


def run(verb: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A verb as a person starts it, in ``folder``, from this checkout."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", f"lr2train.{verb}", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a corpus and a base model of the tiny world."""
    folder = tmp_path_factory.mktemp("world")
    tiny.make_corpus(folder)
    tiny.make_model(folder / "base")
    for file in (folder / "corpus" / "tokenizer").iterdir():
        shutil.copy(file, folder / "base")
    return folder


def prepared(world: Path) -> list[str]:
    """A preparation of the texts, with the tokenizer that is there."""
    return [
        f"runs_folder={world}",
        f"data.sources=[{{name: texts, path: {world}/texts}}]",
        f"model.original_window_tokens={tiny.L0}",
        f"data.segment_tokens={tiny.L}",
        f"data.tokenizer={world}/base",
    ]


def test_a_verb_runs_with_closed_standard_streams(world):
    typed = [*prepared(world), "name=silent", "data.holdout=0.4"]
    command = shlex.join([sys.executable, "-m", "lr2train.prepare", *typed])
    done = subprocess.run(
        ["bash", "-c", f"exec {command} <&- >&- 2>&-"], cwd=world, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0
    assert (world / "silent" / "prepare.json").exists()


def test_a_sweep_runs_every_job_in_a_process_and_tells_of_the_one_that_failed(world):
    """With the verb that starts fastest; what a job computes is nothing to the sweep."""
    swept = ["name=held_${data.holdout}", "data.holdout=0.3,-1,0.4", "--multirun"]
    done = run("prepare", *prepared(world), *swept, folder=world)
    assert done.returncode == 2
    assert sorted(file.parent.name for file in world.glob("held_*/prepare.json")) == ["held_0.3", "held_0.4"]
    assert "job 1 of 3: done: data.holdout=0.3" in done.stderr
    assert "job 2 of 3: failed with exit code 2: data.holdout=-1" in done.stderr
    assert "job 3 of 3: done: data.holdout=0.4" in done.stderr
    assert "1 of 3 jobs failed" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "tells"),
    [
        (["name=a,b"], {"WORLD_SIZE": "2"}, "2 ranks"),
        (["name=a,b", "hydra/launcher=joblib"], {}, "hydra/launcher"),
    ],
)
def test_a_sweep_says_why_it_does_not_run(monkeypatch, capsys, arguments, environment, tells):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert start(monkeypatch, raising(AssertionError("must not run")), "-m", *arguments) == 2
    assert tells in capsys.readouterr().err


# Remedies.


def checks_of_prepare(config):
    prepare.check_data(config.data, prepare.original_window(config.model))
    packing.check_sequence_shards(config.data.segment_tokens, packing.sequence_shards(config.data.align_sp), 1)


def checks_of_train(config):
    inputs = train.checked_inputs(config)
    factors = inputs.factors
    windows = factors.spectrum.window_tokens, factors.target_window_tokens
    make_loader(inputs.corpus, config.data, config.seed, 0, 1, config.optim.segments_per_step, *windows)


def checks_of_plan(config):
    plan.plan(config)


CHECKS = {"prepare": checks_of_prepare, "train": checks_of_train, "search": search.inputs, "plan": checks_of_plan}


@pytest.mark.parametrize(
    ("verb", "wrong"),
    [
        ("prepare", ["data.align_sp=3"]),
        ("prepare", ["data.segment_tokens=250", "data.align_sp=8"]),
        ("prepare", ["data.vocab_size=0", "data.max_repeats=-1", "data.workers=-1"]),
        ("prepare", ["data.sources.texts.max_broken_share=7", "data.sources.texts.max_bytes=0"]),
        ("train", ["parallel.sp=3"]),
        ("train", ["parallel.sp=3", "parallel.ring=2"]),
        ("train", ["parallel.sp=2", "parallel.strategy=ulysses_ring", "parallel.ring=7"]),
        ("train", ["parallel.sp=4", "parallel.strategy=ulysses"]),
        ("train", ["data.segment_tokens=32"]),
        ("train", ["data.segment_tokens=255", "parallel.sp=2"]),
        ("train", ["data.segment_tokens=512"]),
        ("train", ["rope.target_window_tokens=4096"]),
        ("train", ["rope.target_window_tokens=128"]),
        ("train", ["model.original_window_tokens=128"]),
        ("train", ["data.group_segments=3", "optim.segments_per_step=4"]),
        ("train", ["optim.lr=-1", "optim.betas=[0.9]", "optim.clip=nan"]),
        ("search", ["search.algorithm=evolution", "search.top_k=16", "search.population=16"]),
        ("search", ["search.algorithm=evolution", "search.population=1"]),
        ("search", ["search=authors"]),
        ("search", ["search.depths=[]"]),
        ("search", ["search.questions=100000"]),
        ("search", ["search.depths=[2]", "search.mutation_step=0", "search.tail_low=inf"]),
        ("plan", ["parallel.sp=3"]),
        ("plan", ["hardware.gpus=7", "parallel.sp=2"]),
        ("plan", ["optim.segments_per_step=3", "hardware.gpus=4"]),
        ("plan", ["parallel.sp=64", "hardware.gpus=64", "parallel.strategy=ulysses", "optim.segments_per_step=64"]),
        ("plan", ["search.top_k=99", "hardware.mfu=3"]),
    ],
    ids=lambda one: one if isinstance(one, str) else " ".join(one),
)  # fmt: skip
def test_every_remedy_leads_on_until_the_verb_starts(world, verb, wrong):
    settings = [
        "rope=pi", f"data.segment_tokens={tiny.L}", "optim.segments_per_step=4", f"model.path={world}/base",
        f"data.tokenizer={world}/base",
        f"data.sources=[{{name: texts, path: {world}/texts}}]", "data.align_sp=1", "name=remedies",
        "search=small", "search.distractors=0", "search.questions=1", "search.documents=1",
    ]  # fmt: skip
    arguments = tiny.arguments(world, *settings, *wrong)
    with pytest.raises(UserError):
        CHECKS[verb](compose(verb, arguments))
    followed: list[str] = []
    while (remedy := refused(verb, [*arguments, *followed])) is not None:
        assert remedy not in followed, "in a circle"
        followed.append(remedy)
    assert 0 < len(followed) < 7


def refused(verb: str, arguments: list[str]) -> str | None:
    """The remedy that a verb's checks name, None where they pass."""
    try:
        CHECKS[verb](compose(verb, arguments))
    except UserError as error:
        return remedy_of(error)
    return None


# A release.


def test_a_release_in_a_fresh_environment_serves_from_an_empty_folder(tmp_path):
    """The wheel is made from the sdist, so that the sdist holds all that a build needs."""
    sources, environment, empty = tmp_path / "sources", tmp_path / "environment", tmp_path / "an empty folder = ü"
    shutil.copytree(ROOT / "lr2train", sources / "lr2train", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", sources / "conf", ignore=shutil.ignore_patterns("local"))
    (sources / "conf" / "local").mkdir()
    (sources / "conf" / "local" / "default.yaml").write_text("name: of_this_machine")
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    build = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=sources, check=True, capture_output=True, text=True)
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "-w", str(tmp_path), done.stdout.split()[-1]],
        check=True,
        cwd=tmp_path,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "beside.pth").write_text(
        sysconfig.get_path("purelib")
    )  # the packages of requirements.txt, without installing them again
    subprocess.run(
        [*pip, "--python", str(environment / "bin" / "python"), "install", *offline, str(wheel)],
        check=True,
        capture_output=True,
    )
    installed = {file.relative_to(site / "lr2train") for file in (site / "lr2train").rglob("*.yaml")}
    assert installed == {file.relative_to(ROOT) for file in CONF_FOLDER.rglob("*.yaml") if file.parent.name != "local"}
    empty.mkdir()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    lr2train = str(environment / "bin" / "lr2train")
    said = subprocess.run([lr2train, "--version"], cwd=empty, env=clean, capture_output=True, text=True)
    released = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert said.stdout == f"lr2train {released[0]}\n"
    assert wheel.name.startswith(f"lr2train-{released[0]}-py3")
    command = [lr2train, "plan", "experiment=llama3_8b_128k"]
    done = subprocess.run(command, cwd=empty, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8.03B" in done.stdout
    assert (empty / "runs" / "plan" / "plan.json").exists()


def test_the_help_starts_without_torch():
    """Its import takes longer than everything else together."""
    code = "import sys, lr2train.__main__; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
