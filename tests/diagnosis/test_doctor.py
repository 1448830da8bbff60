"""doctor: facts of one machine and of several ranks, problems with remedies, exit codes, and no secret."""

import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from ranks import run_ranks

from lr2train import doctor
from lr2train.cli.composition import compose
from lr2train.diagnosis import devices, machine, network, packages
from lr2train.diagnosis import ranks as together
from lr2train.diagnosis.findings import Findings, Problem, in_words, stops

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    "HF_TOKEN": "hf_" + "q7W" * 11,
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "89abcdef",
    "NCCL_MY_SECRET": "swordfish",
    "HF_ENDPOINT": "https://me:trout-fish@hub.org",
    "WANDB_TAGS": "ghp_" + "x1" * 18,
}


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    command = [sys.executable, "-m", "lr2train", "doctor", *arguments]
    environment = {**kept, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_one_command_tells_everything_and_no_secret(tmp_path):
    done = start(f"runs_folder={tmp_path}/runs", "parallel.timeout_s=5", **SECRETS)
    assert done.returncode == 0, done.stderr
    for secret in SECRETS.values():
        assert re.sub("https://|@.*", "", secret) not in done.stdout + done.stderr
    assert re.search(rf"^  torch +{re.escape(torch.__version__)}", done.stdout, re.MULTILINE)
    assert re.search(r"^  HF_TOKEN +\(hidden\)$", done.stdout, re.MULTILINE)
    assert re.search(r"^  cpu +cpu_flash", done.stdout, re.MULTILINE)
    sections = re.findall(r"^[A-Z].*", done.stdout, re.MULTILINE)
    assert [name for name in sections if name != "Problems"] == [
        packages.SECTION, devices.GPUS, devices.KERNELS, devices.OPS, machine.CPU, machine.DISK, machine.LIMITS,
        machine.CLOCK, machine.VARIABLES, network.SECTION,
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []  # nothing is kept


def test_what_would_stop_a_run_comes_first_and_is_the_exit_code(tmp_path, monkeypatch, capsys):
    """A lock that a killed compilation has left; an interface that is not there."""
    lock = tmp_path / "extensions" / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (1e9, 1e9))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib99")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    text = stopping(capsys, f"runs_folder={tmp_path}/runs")
    lines = text.splitlines()
    assert lines[0].startswith("lr2train doctor: 2 problems would stop a run, ")
    assert [line.split()[0] for line in lines[3:6]] == ["STOPS", "STOPS", "note"]
    assert "cpu_adam was killed" in text
    assert "NCCL_SOCKET_IFNAME=ib99 names no interface" in text


def stopping(capsys, *arguments: str) -> str:
    """What is printed, with the exit code 2."""
    with pytest.raises(SystemExit) as end:
        doctor.from_the_command_line(compose("doctor", list(arguments)))
    assert end.value.code == 2
    return capsys.readouterr().out


def test_a_folder_without_permission_stops_a_run(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(machine, "existing", lambda _: tmp_path / "file")  # root may write everywhere
    found = Findings()
    machine._writable(found, tmp_path / "file" / "runs", tmp_path / "file")
    assert [problem.stops for problem in found.problems] == [True]


@pytest.mark.parametrize("below", ["", "/runs"])
def test_a_file_in_the_place_of_runs_folder_stops_a_run(tmp_path, below):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        found = Findings()
        machine.look(found, Path(f"{tmp_path / name}{below}"))
        told = [one.what for one in found.problems if one.stops]
        assert told == [f"runs_folder={tmp_path / name}{below} cannot be made, because {tmp_path / name} is no folder"]


def test_a_folder_above_that_may_not_be_entered_is_a_finding(tmp_path, monkeypatch):
    def forbidden(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", forbidden)  # root may enter every folder
    assert machine.existing(tmp_path / "a" / "b") == tmp_path


def test_the_pins_are_compared(monkeypatch):
    monkeypatch.setattr(
        packages, "_pins", lambda: {"torch": Requirement("torch==1.0"), "nonesuch": Requirement("nonesuch==1")}
    )
    found = Findings()
    packages.look(found)
    assert [(problem.what.split()[0], problem.stops) for problem in found.problems] == [
        ("torch", False),
        ("nonesuch", True),
    ]
    assert found.facts[packages.SECTION]["torch"] == f"{torch.__version__}, tested ==1.0"


def test_the_installed_packages_are_those_of_requirements_txt():
    assert {"torch", "deepspeed", "transformers", "wandb"} <= set(packages._pins())
    found = Findings()
    packages.look(found)
    assert found.problems == []


def test_the_name_of_the_home_folder_is_in_no_line(monkeypatch, tmp_path):
    """In variables, paths of programs and folders, and the words of a problem; another folder's name stays."""
    home = tmp_path / "alice"
    (home / "runs").mkdir(parents=True)
    values = {"HOME": f"{home}", "CUDA_HOME": f"{home}/cuda", "CXX": f"g++ -I{home}/include", "TMPDIR": f"{home}x/tmp"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "_LITTLE_GIB", 1e9)
    found = Findings()
    machine.look(found, home / "runs")
    devices.look(found)
    text = in_words([found])
    assert f"{home}/" not in text
    for words in (
        "runs_folder                     ~/runs\n",
        "~/cuda (nvcc",
        "g++ -I~/include",
        "in runs_folder=~/runs;",
    ):
        assert words in text
    assert f"{home}x/tmp" in text


def test_a_user_without_a_home_is_no_fault(monkeypatch, tmp_path):
    """A container's user id that no list of users knows."""

    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    found = Findings()
    machine.look(found, tmp_path)
    devices.look(found)
    assert str(tmp_path) in in_words([found])


def test_public_addresses_are_not_shown():
    assert network._shown("8.8.8.8") == "a public IPv4 address"
    assert network._shown("10.1.2.3") == "10.1.2.3"


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "leads to the loopback"),
        ({"MASTER_ADDR": "no-such-host.invalid", "WORLD_SIZE": "4"}, "cannot be reached"),
        ({"GLOO_SOCKET_IFNAME": "=l"}, "names no interface"),
    ],
)
def test_an_address_that_ranks_cannot_meet_at(monkeypatch, environment, what):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = Findings()
    network.look(found)
    assert [what in problem.what and problem.stops for problem in found.problems] == [True]


def test_names_of_interfaces_as_nccl_reads_them(monkeypatch):
    """NCCL takes prefixes, exact names after =, and exclusions after ^."""
    name = next(iter(network.addresses_of_interfaces()))
    for value in (name[:2], f"={name}", "^docker", f"nonesuch,{name}"):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
        found = Findings()
        network._named_interfaces(found, set(network.addresses_of_interfaces()))
        assert found.problems == [], value


# ---- ranks ----


def findings_of(rank: int, world: int, folder: str) -> Findings:
    os.environ["OMP_NUM_THREADS"] = str(1 + rank % 2)
    found, mine = Findings(), Path(folder) / ("other" if rank == 2 else "runs")
    machine.look(found, mine)
    together.look(found, mine)
    return found


def test_ranks_see_each_other(tmp_path):
    """Rank 2 has a folder of its own; all clocks are one."""
    for name in ("runs", "other"):
        (tmp_path / name).mkdir()
    found = run_ranks(findings_of, 3, str(tmp_path), tmp_path=tmp_path)
    assert [any("another folder" in one.what for one in every.problems) for every in found] == [False, False, True]
    assert {every.facts[machine.CLOCK]["offset to rank 0"] for every in found} == {"none above 1 s"}
    assert list((tmp_path / "runs").iterdir()) == []
    text = in_words(found)
    assert re.search(r"^  OMP_NUM_THREADS +1  \[ranks 0, 2\]\n +2  \[rank 1\]$", text, re.MULTILINE)
    assert "is another folder than rank 0's (rank 2); set runs_folder" in text


def test_a_clock_that_is_off_is_told(tmp_path):
    found = run_ranks(offset_of, 2, tmp_path=tmp_path)
    assert [[problem.what for problem in one.problems] for one in found] == [[], ["the clock is +90 s from rank 0's"]]


def offset_of(rank: int, world: int) -> Findings:
    if rank == 1:
        clock = together.time.time
        together.time.time = lambda: clock() + 90
    found = Findings()
    together._offset(found)
    return found


FACT = st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), st.sampled_from(["1", "2"]))


@given(st.lists(st.lists(FACT, max_size=4), min_size=1, max_size=5))
def test_merging_loses_no_fact_of_any_rank(noted):
    found = []
    for facts in noted:
        found.append(Findings())
        for fact in facts:
            found[-1].note(*fact)
    assert _read_back(in_words(found), len(found)) == [one.facts for one in found]


def _read_back(text: str, world: int) -> list[dict[str, dict[str, str]]]:
    facts: list[dict[str, dict[str, str]]] = [{} for _ in range(world)]
    section = name = ""
    for line in text.splitlines()[1:]:
        if not line.startswith(" "):
            section = line
            continue
        told = re.fullmatch(r"  (\w?) +(\d)(?:  \[ranks? (.*)\])?", line)
        assert told, line
        name = told[1] or name
        every = told[3] or f"0-{world - 1}"
        for run in every.split(", "):
            first, _, last = run.partition("-")
            for rank in range(int(first), int(last or first) + 1):
                facts[rank].setdefault(section, {})[name] = told[2]
    return facts


def test_equal_problems_of_ranks_are_one_line():
    found = [Findings(problems=[Problem("a", "b")]), Findings(problems=[Problem("a", "b"), Problem("c", "d", True)])]
    assert in_words(found).splitlines()[2:5] == ["Problems", "  STOPS  c (rank 1); d", "  note   a; b"]
    assert stops(found)
    assert not stops(found[:1])


@pytest.mark.usefixtures("no_trace_of_a_job")
def test_ranks_that_do_not_meet_are_a_finding(monkeypatch, capsys):
    """Rank 0 of 2, without a port to meet at."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert "the 2 ranks do not meet" in stopping(capsys).splitlines()[3]


def test_all_attention_libraries_are_listed_and_not_only_the_chosen_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(devices.kernel, "kernel_name", lambda device: ("torch_varlen", "under test"))
    found = Findings()
    devices._kernels(found)
    told = found.facts[devices.KERNELS]
    assert list(told)[2:] == ["flash_attn_3", "flash_attn_4", "flash_attn"]
    assert told["flash_attn_3"] == "is built for compute capability 9.x alone"
    assert told["flash_attn"].startswith("is not importable")
