"""GPUs, attention kernels, and what DeepSpeed's ops could be compiled with. Nothing is compiled or allocated.

Choice: torch and ``nvidia-smi`` are asked; a machine where torch sees no GPU and the driver does is the fault to find.
"""

from __future__ import annotations

import ctypes.util
import os
import re
import runpy
import shutil
import subprocess
import time
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl

from lr2train.attention import cuda, kernel
from lr2train.config import UserError
from lr2train.diagnosis.findings import Findings

GPUS, KERNELS, OPS = "GPUs", "Attention kernels", "DeepSpeed ops"
_SMI_TIMEOUT_S = 20.0
_GIB = 2**30
_BUSY_GIB = 4.0  # more memory than a driver and a desktop take
_STALE_S = 600.0  # DeepSpeed's ops compile in less


def look(found: Findings) -> None:
    """Note GPUs, kernels and ops; name what keeps torch from the GPUs."""
    driver = _driver()
    found.note(GPUS, "CUDA of torch", torch.version.cuda or "none (a CPU build)")
    found.note(GPUS, "NVIDIA driver", driver or "none")
    if torch.cuda.is_available():
        _gpus(found)
    else:
        found.note(GPUS, "GPUs that torch sees", "none")
        _why_no_gpu(found, driver)
    _kernels(found)
    _ops(found)


def _driver() -> str:
    """The driver's version; empty where no NVIDIA driver answers."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ",".join(dict.fromkeys(_smi("driver_version")))
    version = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", text)
    return version[0] if version else text.splitlines()[0]


def _smi(what: str) -> list[str]:
    """A column of ``nvidia-smi``, a line for each GPU; empty where the program is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _why_no_gpu(found: Findings, driver: str) -> None:
    """Name why torch sees no GPU on a machine that has a driver."""
    if not driver:
        return
    if not os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip():
        found.note(GPUS, "hidden by", "CUDA_VISIBLE_DEVICES, which is empty")
    elif torch.version.cuda is None:
        found.problem(
            f"driver {driver} is here, and torch {torch.__version__} is a CPU build",
            "install a CUDA build of torch, see requirements-gpu.txt",
            stops=True,
        )
    else:
        found.problem(
            f"driver {driver} is here, and torch with CUDA {torch.version.cuda} sees no GPU",
            f"install a driver for CUDA {torch.version.cuda}, or start the container with the GPUs",
            stops=True,
        )


def _gpus(found: Findings) -> None:
    count = torch.cuda.device_count()
    found.note(GPUS, "GPUs that torch sees", str(count))
    found.note(GPUS, "NCCL", ".".join(map(str, nccl.version())))
    for number in range(count):
        one = torch.cuda.get_device_properties(number)
        found.note(
            GPUS,
            f"GPU {number}",
            f"{one.name}, {one.total_memory / _GIB:.0f} GiB, compute capability {one.major}.{one.minor}",
        )
    if count > 1:
        found.note(GPUS, "peer access", _peers(count))
    _busy(found)


def _peers(count: int) -> str:
    """Which pairs of GPUs read each other's memory directly (NVLink or PCIe), as far as torch tells."""
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    apart = [(a, b) for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    if not apart:
        return f"all {len(pairs)} pairs"
    return f"{len(pairs) - len(apart)} of {len(pairs)} pairs; not {', '.join(f'{a}-{b}' for a, b in apart[:8])}"


def _busy(found: Findings) -> None:
    """Name GPUs whose memory is taken already."""
    used = [(number, float(text) / 1024) for number, text in enumerate(_smi("memory.used")) if text.isdecimal()]
    for number, gib in used:
        if gib > _BUSY_GIB:
            found.problem(
                f"{gib:.0f} GiB of the memory of nvidia-smi's GPU {number} are taken",
                "end the process that holds them (`nvidia-smi`)",
            )


# ---- kernels ----


def _kernels(found: Findings) -> None:
    """Note the kernel of each device, with the reason of the choice, and which libraries could serve CUDA."""
    found.note(KERNELS, "cpu", _kernel(found, "cpu"))
    if not torch.cuda.is_available():
        found.note(KERNELS, "cuda", "none: torch sees no GPU")
        return
    found.note(KERNELS, "cuda", _kernel(found, "cuda"))
    for name, why in cuda.libraries().items():
        found.note(KERNELS, name, why or "can be used")


def _kernel(found: Findings, device: str) -> str:
    try:
        name, reason = kernel.kernel_name(device)
    except UserError as error:
        found.problem(f"no attention kernel on {device}", str(error), stops=True)
        return "none"
    return f"{name} ({reason})"


# ---- ops ----


def _ops(found: Findings) -> None:
    """Note compiled ops and what compiles others. lr2train itself needs none; offload to NVMe needs async_io."""
    found.note(OPS, "needed by lr2train", "none; async_io for optimizer states on NVMe")
    found.note(OPS, "compiled when installed", ", ".join(_installed_ops()) or "none")
    folder = _extensions_folder()
    found.note(OPS, "compiled since", ", ".join(sorted({file.stem for file in folder.glob("*/*/*.so")})) or "none")
    compiler = os.environ.get("CXX") or "c++"
    found.note(OPS, "compiler", f"{compiler} {_first_version(compiler, '-dumpfullversion', '-dumpversion')}")
    found.note(OPS, "ninja", _first_version("ninja", "--version"))
    found.note(OPS, "CUDA_HOME", _cuda_home())
    found.note(OPS, "libaio", ctypes.util.find_library("aio") or "not found: async_io cannot be compiled")
    for lock in folder.glob("*/*/lock"):
        _stale(found, lock)


def _installed_ops() -> list[str]:
    """The ops that were compiled with the package, from a file that it writes when it is built."""
    spec = util.find_spec("deepspeed")
    file = Path((spec and spec.origin) or "").parent / "git_version_info_installed.py"
    if not file.is_file():
        return []
    told: dict[str, Any] = runpy.run_path(str(file))
    return sorted(name for name, there in told.get("installed_ops", {}).items() if there)


def _extensions_folder() -> Path:
    """Where torch keeps compiled extensions: a folder for each Python and CUDA, in it one for each extension."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions"))


def _stale(found: Findings, lock: Path) -> None:
    """Name a lock that a killed compilation has left: whoever compiles next waits for ever."""
    age_s = time.time() - lock.stat().st_mtime
    if age_s > _STALE_S:
        op = lock.parent.name
        found.problem(
            f"a compilation of {op} was killed {age_s / 3600:.1f} h ago, and its lock makes later runs hang",
            f"remove the file `lock` in the folder {op} of {lock.parent.parent}",
            stops=True,
        )


def _cuda_home() -> str:
    """The CUDA toolkit that extensions are compiled with."""
    nvcc = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or (nvcc and str(Path(nvcc).parents[1]))
    if not home and Path("/usr/local/cuda").is_dir():
        home = "/usr/local/cuda"
    if not home:
        return "not found: no CUDA op can be compiled"
    return f"{home} (nvcc {_first_version(str(Path(home) / 'bin' / 'nvcc'), '--version')})"


def _first_version(program: str, *flags: str) -> str:
    """The version that a program tells; ``not found`` where it does not start."""
    for flag in flags:
        try:
            done = subprocess.run([*program.split(), flag], capture_output=True, text=True, timeout=_SMI_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            return "not found"
        versions = re.findall(r"\b\d+(?:\.\d+)+\b|^\d+$", done.stdout, re.MULTILINE)
        if done.returncode == 0 and versions:
            return versions[0]
    return "of unknown version"
