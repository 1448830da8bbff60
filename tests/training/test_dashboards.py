"""Dashboards: what wandb records and never records, resumed curves, no waiting for a network, the panels."""

import inspect
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imsave
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lr2train import dashboard
from lr2train.cli.composition import compose
from lr2train.config import Config, UserError
from lr2train.evolution.history import History
from lr2train.training import loop, metrics, panels, wandb_view
from lr2train.training.deepspeed.engine import StepStats
from lr2train.training.validation import HeldOut

SECRETS = {
    "argument": "swordfish-argument",
    "option": "swordfish-option",
    "key": "0123456789abcdef" * 2 + "89abcdef",
    "token": "hf_" + "q7W" * 11,
}
JOB = """
import sys
from pathlib import Path
from lr2train.config import Config, LoggerConfig, DataConfig, SourceConfig
from lr2train.training import metrics

folder, mode, done, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
source = SourceConfig(name="web", options={"api_key": "swordfish-option", "url": "https://x.org"})
config = Config(name="one", data=DataConfig(sources=[source]),
    logger=LoggerConfig(tensorboard=False, wandb=True, mode=mode, group="of-three"))
opened = metrics.sinks(config, folder, done)
for step in range(done, last + 1):
    for sink in opened:
        sink.write(step, {"loss": float(step)})
for sink in opened:
    sink.close()
"""


def start(folder: Path, mode: str, done: int, last: int, **environment: str) -> subprocess.Popen[str]:
    """A job that writes steps to all sinks, in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command = [sys.executable, "-c", JOB, str(folder), mode, str(done), str(last)]
    environment = {**kept, "NETRC": os.devnull, "WANDB_CONFIG_DIR": str(folder / "none"), **environment}
    return subprocess.Popen(
        [*command, "data.sources.web.options.token=swordfish-argument"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def said_by(job: subprocess.Popen[str]) -> str:
    """What the job says until its end."""
    said = job.communicate()[1]
    assert job.returncode == 0, said
    return said


def record(folder: Path, mode: str, done: int, last: int, **environment: str) -> str:
    """Run a job; what it says."""
    return said_by(start(folder, mode, done, last, **environment))


@pytest.fixture(scope="module", autouse=True)
def without_help(tmp_path_factory):
    """(folder, job) without a network and without a login. Started first: wandb waits a dozen seconds for a server."""
    folder = tmp_path_factory.mktemp("online")
    # Port 9 of this machine refuses at once; wandb itself would try again for a minute and a half.
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1", "WANDB_SILENT": "true"}
    jobs = {
        name: (folder / name, start(folder / name, "online", 0, 1, **environment))
        for name, environment in {"network": {"WANDB_API_KEY": SECRETS["key"], **nowhere}, "login": {}}.items()
    }
    yield jobs
    for _, job in jobs.values():
        job.kill()
        job.wait()


def recorded(folder: Path) -> list[tuple[str, list[int]]]:
    """(id, group and job type; steps) of each offline record, oldest first."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        identity, steps = "", []
        for data in leveldb_records(file.read_bytes()):
            one = wandb_internal_pb2.Record()
            one.ParseFromString(data)
            if one.WhichOneof("record_type") == "run":
                identity = f"{one.run.run_id} {one.run.run_group} {one.run.job_type}"
            elif one.WhichOneof("record_type") == "history":
                steps.append(one.history.step.num)
        found.append((identity, steps))
    return found


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log after wandb's 7 bytes: checksum (4), length (2), kind (1: whole, 2-4: parts)."""
    position, record, block = 7, b"", 1 << 15
    while position + 7 <= len(data):
        if block - position % block < 7:  # a block's end is too short for a header
            position += block - position % block
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_offline_runs_resume_without_repeats_and_hold_no_secret(tmp_path):
    """The first job writes steps 0 to 5 after its checkpoint of step 3; the second goes on from there."""
    said = record(tmp_path, "offline", 0, 5, WANDB_API_KEY=SECRETS["key"], HF_TOKEN=SECRETS["token"])
    assert f"upload it with `wandb sync {tmp_path}/wandb/offline-run-" in said
    record(tmp_path, "offline", 4, 8, WANDB_API_KEY=SECRETS["key"], HF_TOKEN=SECRETS["token"])
    first, second = recorded(tmp_path)
    identity = json.loads((tmp_path / "train.wandb.json").read_text())["id"]
    assert first == (f"{identity} of-three train", [0, 1, 2, 3, 4, 5])
    assert second == (f"{identity} of-three train", [6, 7, 8])
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(b"https://x.org" in file.read_bytes() for file in files)  # the config is there
    for name, secret in SECRETS.items():
        assert [file for file in files if secret.encode() in file.read_bytes()] == [], name


def test_the_group_is_that_of_the_folders_other_verbs(tmp_path):
    from lr2train.training.wandb_sink import _identity

    trained, is_new = _identity(_config(group="mine"), tmp_path, "train")
    assert is_new
    assert _identity(_config(), tmp_path, "evaluate")[0]["group"] == "mine"
    assert _identity(_config(group="mine"), tmp_path, "train") == (trained, False)
    assert _identity(_config(), tmp_path / "alone", "search")[0]["group"] == "alone"


def test_a_run_that_goes_back_gets_a_new_curve_once(tmp_path):
    from lr2train.training.wandb_sink import _identity

    def start(back_to: int | None) -> str:
        config = _config()
        config.engine.resume_from = back_to
        return _identity(config, tmp_path, "train")[0]["id"]

    first, back, again = start(None), start(3), start(3)
    assert first != back == again == start(None)
    assert start(3) != back


def _config(**logger) -> Config:
    config = Config(name="x")
    config.logger.group = logger.get("group")
    return config


def test_tensorboard_has_the_panels_pictures_and_tables(tmp_path):
    imsave(tmp_path / "map.png", np.random.default_rng(0).random((4, 6, 3)))
    sink = metrics.TensorBoard(tmp_path, 0)
    sink.picture("evaluate/needles", tmp_path / "map.png")
    sink.table("evaluate/ruler", ("model", "4096"), [("first", 93.25), ("a|b", None)])
    sink.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0}).Reload()
    (image,) = events.Images("evaluate/needles")
    assert (image.height, image.width) == (4, 6)
    (text,) = events.Tensors("evaluate/ruler/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines == ["| model | 4096 |", "| --- | --- |", "| first | 93.25 |", "| a\\|b | - |"]
    layout = layout_pb2.Layout()
    (told,) = events.Tensors("custom_scalars__config__")
    layout.ParseFromString(told.tensor_proto.string_val[0])
    shown = {one.title: {chart.title: tuple(chart.multiline.tag) for chart in one.chart} for one in layout.category}
    assert shown == {name: {one.title: one.keys for one in every} for name, every in panels.SECTIONS.items()}


def shown_keys() -> set[str]:
    return {key for every in panels.SECTIONS.values() for one in every for key in one.keys}


def test_every_figure_of_training_and_search_has_a_panel_and_no_panel_is_empty():
    values = dict.fromkeys((one for one in inspect.signature(StepStats).parameters), 1.0)
    engine = SimpleNamespace(mesh=SimpleNamespace(world=1), device=torch.device("cpu"))
    written = loop._figures(StepStats(**values), 0.1, 1, 1.0, 0.1, 1.0, engine)
    held_out = {f"heldout_{what}_{window}" for what in ("loss", "tokens") for window in ("short", "long", "needles")}
    assert all(
        key.partition("_")[0] in inspect.getsource(HeldOut) or key in inspect.getsource(HeldOut) for key in held_out
    )
    line = {"best": {"critical_index": 3, "attention_factor": 1.1}, "best_perplexity": 2.0}
    line |= {"document_forwards": 4, "candidates": 5}
    searched = History(Config(name="x").search, None, Path("x"), [line]).figures
    assert shown_keys() - {"distill_loss"} == {*written, "bad_steps", *held_out, *searched} - {"distill_loss"}


def test_the_view_that_wandb_gets_shows_every_panel_of_the_group():
    pytest.importorskip("wandb_workspaces", reason="pip install -r requirements-dashboard.txt")
    view = wandb_view.view_of("team", "lr2train", "llama3's")._to_model()
    sent = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))["section"]
    sections = sent["panelBankConfig"]["sections"]
    assert [one["name"] for one in sections] == [*panels.SECTIONS, "Evaluation", "Machine"]
    plotted = [panel["config"] for one in sections[:3] for panel in one["panels"] if "metrics" in panel["config"]]
    assert {key for one in plotted for key in one["metrics"]} == shown_keys()
    assert {one["xAxis"] for one in plotted} == {"_step"}
    places = [(one["layout"]["x"], one["layout"]["y"]) for one in sections[0]["panels"]]
    assert len(set(places)) == len(places)
    media = [key for one in sections for panel in one["panels"] for key in panel["config"].get("mediaKeys", [])]
    assert media == [key for every in panels.PICTURES.values() for key in every]
    (runs,) = sent["runSets"]
    told = [(one["key"]["name"], one["op"], one["value"]) for one in runs["filters"]["filters"]]
    assert told == [("group", "=", "llama3's")]


def test_a_run_that_is_not_on_wandb_is_refused(tmp_path):
    with pytest.raises(UserError, match="run is empty; set run="):
        dashboard.dashboard(compose("dashboard", []))
    (tmp_path / "first").mkdir()
    with pytest.raises(UserError, match="has no run on wandb; start its training"):
        dashboard.dashboard(compose("dashboard", ["run=first", f"runs_folder={tmp_path}"]))


def test_a_server_that_does_not_answer_is_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("wandb_workspaces", reason="pip install -r requirements-dashboard.txt")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["key"])
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")  # wandb asks again and again for so long
    (tmp_path / "first").mkdir()
    told = {"id": "a", "project": "p", "entity": "me", "group": "g"}
    (tmp_path / "first" / "train.wandb.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="cannot be saved on wandb"):
        dashboard.dashboard(compose("dashboard", ["run=first", f"runs_folder={tmp_path}"]))
    assert not (tmp_path / "first" / "dashboard.json").exists()


def test_without_a_network_or_a_login_a_run_is_recorded_offline(without_help):
    said = {name: said_by(job) for name, (_, job) in without_help.items()}
    assert said["network"].count("wandb does not start online") == 1
    assert "nobody is logged in" in said["login"]
    for folder, _ in without_help.values():
        assert [steps for _, steps in recorded(folder)] == [[0, 1]]
