"""Processors, memory, disks, limits, the clock and the environment of a machine."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import psutil
import torch

import lr2train
from lr2train.config.hidden import shown
from lr2train.diagnosis.findings import Findings

CPU, DISK, LIMITS, CLOCK, VARIABLES = "CPU and memory", "Disk", "Limits", "Clock", "Environment variables"
_GIB = 2**30
_LEAST_GIB, _LITTLE_GIB = 1.0, 20.0  # free disk: too little for a tiny run; less than a checkpoint of 1B parameters
_SHM_GIB = 1.0  # NCCL takes some tens of MiB for each pair of GPUs; containers have 64 MiB unless told otherwise
_FEW_FILES = 4096  # a rank opens sockets to its peers, and the files of corpus, model and checkpoint
_LATE_S = 5.0  # a clock that is so far off confuses logs and certificates
_PREFIXES = ("NCCL_", "GLOO_", "OMP_", "MKL_", "CUDA_", "PYTORCH_", "TORCH_", "WANDB_", "HF_", "TRANSFORMERS_", "DS_")
_NAMES = {
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CXX"),
    *("SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "TOKENIZERS_PARALLELISM", "LD_LIBRARY_PATH", "TMPDIR", "HYDRA_FULL_ERROR"),
}
_OF_EACH_RANK = {"RANK", "LOCAL_RANK"}


def look(found: Findings, runs_folder: Path) -> None:
    """Note what a run meets here."""
    _cpu(found)
    _disk(found, runs_folder)
    _limits(found)
    _clock(found)
    _variables(found)


def _cpu(found: Findings) -> None:
    usable, cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = _cgroup_cores()
    found.note(CPU, "cores", f"{usable} of {cores}" + ("" if quota is None else f", limited to {quota:g} by a cgroup"))
    found.note(CPU, "threads of torch", str(torch.get_num_threads()))
    found.note(CPU, "load", f"{os.getloadavg()[0]:.1f}")
    memory, most = psutil.virtual_memory(), _cgroup_bytes()
    limit = "" if most is None or most >= memory.total else f", limited to {most / _GIB:.1f} by a cgroup"
    found.note(CPU, "memory", f"{memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} free{limit}")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > usable:
        found.problem(f"OMP_NUM_THREADS={threads} exceeds the {usable} cores", f"set it to {usable} or less")


def _cgroup_cores() -> float | None:
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    return None


def _cgroup_bytes() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    return None


# ---- disk ----


def _disk(found: Findings, runs_folder: Path) -> None:
    folder = existing(runs_folder)
    there = "" if folder == runs_folder.absolute() else ", not made yet"
    total, _, free = shutil.disk_usage(folder)
    kind = _file_system(folder)
    found.note(DISK, "runs_folder", f"{runs_folder}{there}")
    found.note(DISK, "free there", f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB ({kind})")
    inodes = os.statvfs(folder)
    if inodes.f_files and inodes.f_favail < 10_000:
        found.problem(f"runs_folder={runs_folder} has {inodes.f_favail} free inodes", "remove files there", stops=True)
    if free < _LITTLE_GIB * _GIB:
        found.problem(
            f"{free / _GIB:.1f} GiB are free in runs_folder={runs_folder}",
            "free some, or set runs_folder to another disk; `lr2train plan` tells a checkpoint's size",
            stops=free < _LEAST_GIB * _GIB,
        )
    _writable(found, runs_folder, folder)
    _in_the_way(found, runs_folder)
    shm = shutil.disk_usage("/dev/shm").total / _GIB if Path("/dev/shm").is_dir() else 0.0
    found.note(DISK, "/dev/shm", f"{shm:.2f} GiB")
    if shm < _SHM_GIB and torch.cuda.device_count() > 1:
        found.problem(
            f"/dev/shm has {shm:.2f} GiB, where NCCL needs about {_SHM_GIB:g}",
            "start the container with --ipc=host or --shm-size=16g",
            stops=True,
        )


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    # not Path.is_dir, which raises where a folder above may not be entered
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if os.path.isdir(one))


def _in_the_way(found: Findings, runs_folder: Path) -> None:
    """Name a file where runs_folder, or a folder above it, should be."""
    for one in (runs_folder.absolute(), *runs_folder.absolute().parents):
        if os.path.lexists(one) and not os.path.isdir(one):
            found.problem(
                f"runs_folder={runs_folder} cannot be made, because {one} is no folder",
                "set runs_folder to a folder",
                stops=True,
            )


def _file_system(folder: Path) -> str:
    """The type of the file system that a folder lies on."""
    mounts = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    return next((mounts[one] for one in (folder.resolve(), *folder.resolve().parents) if one in mounts), "unknown type")


def _writable(found: Findings, runs_folder: Path, folder: Path) -> None:
    """Write an unnamed file: may this user, and does the file server's clock agree?"""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"lr2train")
            file.flush()
            ahead_s = os.fstat(file.fileno()).st_mtime - time.time()
    except OSError as error:
        found.problem(
            f"runs_folder={runs_folder} cannot be written ({error.strerror})",
            "let this user write there, or set runs_folder to another place",
            stops=True,
        )
        return
    if abs(ahead_s) > _LATE_S:
        found.problem(
            f"the clock of the disk of runs_folder is {ahead_s:+.0f} s from this machine's", "set both by NTP"
        )


# ---- limits ----


def _limits(found: Findings) -> None:
    files, locked, size = (
        resource.getrlimit(one)[0] for one in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_FSIZE)
    )
    found.note(LIMITS, "open files (ulimit -n)", _limit(files, "", 1))
    found.note(LIMITS, "locked memory (ulimit -l)", _limit(locked, " MiB", 2**20))
    found.note(LIMITS, "size of a file (ulimit -f)", _limit(size, " GiB", _GIB))
    found.note(LIMITS, "processes (ulimit -u)", _limit(resource.getrlimit(resource.RLIMIT_NPROC)[0], "", 1))
    if 0 <= files < _FEW_FILES:
        found.problem(f"a process may open {files} files", f"run `ulimit -n {_FEW_FILES}` first, or have it raised")
    if locked != resource.RLIM_INFINITY and Path("/sys/class/infiniband").is_dir():
        found.problem(
            f"a process may lock {locked / 2**20:.0f} MiB of memory, and InfiniBand locks its buffers",
            "raise it: `ulimit -l unlimited`, or --ulimit memlock=-1 for a container",
        )
    if size != resource.RLIM_INFINITY:
        found.problem(f"a file may have {size / _GIB:.1f} GiB at most", "run `ulimit -f unlimited` first")


def _limit(value: int, unit: str, divisor: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value / divisor:g}{unit}"


# ---- clock ----


def _clock(found: Findings) -> None:
    found.note(CLOCK, "time zone", time.strftime("UTC%z"))
    installed = Path(lr2train.__file__).stat().st_mtime
    if time.time() < installed - 86400:
        found.problem(
            f"the clock says {time.strftime('%Y-%m-%d')}, before lr2train was installed", "set it, such as by NTP"
        )


# ---- environment ----


def _variables(found: Findings) -> None:
    """Note the variables that change a run, without their secrets."""
    for name in sorted(os.environ):
        if (name.startswith(_PREFIXES) or name in _NAMES) and name not in _OF_EACH_RANK:
            found.note(VARIABLES, name, shown(name, os.environ[name]) or "(empty)")
    found.facts.setdefault(VARIABLES, {"none": ""})
    if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        found.problem("CUDA_LAUNCH_BLOCKING=1 makes every kernel wait", "unset it, unless you look for a fault")
