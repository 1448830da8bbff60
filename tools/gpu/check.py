"""Check attention kernels on this GPU: are they correct, and how fast is the work of one rank?

    python -m tools.gpu.check [--quick]

Three parts on one GPU print details. A summary table and one JSON file (--out) follow. A fourth part needs a process
for each GPU, and runs alone:

    torchrun --nproc-per-node 8 -m tools.gpu.check --only ranks

  parity     Every importable kernel (flash-attn 3 and 2, torch's varlen, the CPU kernel), forward and backward, beside
             attention written out in float64. Cases: head sizes up to 256, MHA/GQA/MQA, packed spans, sliding windows,
             bf16 and fp16, whole segments, blocks with merged log-sum-exp, strategies on simulated ranks, sampled
             rows of 131072 tokens. An error is a ratio to the error of plain attention in the same dtype.
  attention  One layer's attention on one rank of LLaMA3-8B at 128k and sp=8: the long segment under ulysses and on the
             ring, packed short documents under gather (they cross sequence shards) and local (they do not). Beside
             plain calls of the same kernel on the same pairs, torch's attention, and ring-flash-attn where importable.
             TFLOP/s count causal pairs. Target: at most 5 % longer than the plain kernel; ring and gather 10 %.
  layer      The same rank's whole decoder layer (projections, MLP, norms; recomputation is overhead) and the chunked
             loss: TFLOP/s and share of the bf16 peak. Target: at most 10 % longer than a count from the measured rates
             of the GPU, which is printed (``tools.gpu.layer``).
  ranks      Real ranks on nccl: strategies, one optimizer step and its memory (``tools.gpu.ranks``).

Exit codes: 1 where a kernel is wrong, one of our calls fails or a target is missed; 2 where the check cannot start.
--device cpu runs the same code on small shapes and asserts parity alone. --quick shortens every part and asserts no
speed. Nothing is downloaded, and no setting of the GPU changes. A part that does not fit into memory continues with
half the tokens, and says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lr2train.attention.kernel import kernel_name
from lr2train.config import Config, UserError
from lr2train.config.gpus import peak_tflops
from lr2train.io import write_json
from lr2train.parallel import processes
from lr2train.progress import say
from tools.bench.figures import Figure, conclude
from tools.gpu import layer as gpu_layer
from tools.gpu import parity as gpu_parity
from tools.gpu import ranks as gpu_ranks
from tools.gpu import slice as gpu_slice
from tools.gpu import timing as gpu_timing
from tools.gpu.kernels import available
from tools.gpu.sampled import check_long
from tools.gpu.tables import Line, show_parity, show_speed, show_summary

PARTS = ("parity", "attention", "layer")  # on one GPU
RANKS = "ranks"
LAUNCH = "torchrun --nproc-per-node 8 -m tools.gpu.check --only ranks"
SLICES: dict[str, gpu_slice.Documents] = {
    "ulysses": "whole", "ring": "whole", "gather": "crossing", "local": "aligned"
}  # fmt: skip
LAYERS = ("ulysses", "ring", "local")  # of SLICES: the long segment twice, and the short one
# Time over the plain kernel's. A ring merges parts in fp32 and adds up gradients, and so does gather: by count 3 % of
# an A100's kernel time at 128k (10 bytes a number of q and step, forward; twice that backward).
OVER_PLAIN = {"ulysses": 1.05, "ring": 1.10, "gather": 1.10, "local": 1.05}
OVER_COUNTED = 1.10  # of a layer: launches, copies around exchanges, and a ring's merges
LOSS_CHUNK_TOKENS = 4096  # engine.loss_chunk_tokens of experiment=llama3_8b_128k

T = TypeVar("T")


@dataclass
class Findings:
    """Results so far: the JSON, and the figures that decide the exit status."""

    out: Path
    json: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)

    def add(self, part: str, rows: Any, figures: Sequence[Figure]) -> None:
        """Add a part and rewrite the file, so that results survive a crash of a later part."""
        self.figures += figures
        self.json[part] = rows
        self.json["figures"] = [{**figure._asdict(), "holds": figure.holds} for figure in self.figures]
        write_json(self.out, _finite(self.json))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        if RANKS in arguments.only:
            return run_ranks(arguments)
        setting = _setting(arguments)
    except UserError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    return run(setting, arguments)


def run(setting: gpu_slice.SliceSetting, arguments: argparse.Namespace) -> int:
    """Run the parts of ``--only``; the exit status."""
    found = available(setting.device)
    about = {
        "machine": _machine(setting.device),
        "setting": _plain(setting),
        "kernels": found.names,
        "not_used": found.missing,
    }
    findings = Findings(Path(arguments.out), {"format": 1, **about})
    for line in found.missing:
        print(line)
    print(_described(setting, findings.json["machine"]))
    asserted = setting.device.type == "cuda" and not arguments.quick
    if "parity" in arguments.only:
        _parity(findings, setting, found.names, arguments.quick)
    if "attention" in arguments.only:
        _attention(findings, setting, found.names, asserted)
    if "layer" in arguments.only:
        _layer(findings, setting, arguments.peak, asserted)
    show_summary(findings.figures)
    print(f"written: {findings.out}")
    return conclude(findings.figures)


def run_ranks(arguments: argparse.Namespace) -> int:
    """The part with a process for each GPU; the exit status, the same on every rank.

    Raises:
        UserError: there is one process, or another part is asked for too.
    """
    if len(arguments.only) > 1:
        raise UserError(f"--only {' '.join(arguments.only)}: ranks runs alone; give --only {RANKS}")
    if "RANK" not in os.environ and not dist.is_initialized():
        raise UserError(f"--only {RANKS} checks several ranks; start {LAUNCH}")
    config = Config(name="gpu_check")
    config.device = torch.device(arguments.device).type
    device = processes.start(config)
    figures = gpu_ranks.check_ranks(device)
    if dist.get_rank() == 0:
        about = {"machine": _machine(device), "world": dist.get_world_size(), "backend": dist.get_backend()}
        Findings(Path(arguments.out), {"format": 1, **about}).add(
            RANKS, [figure._asdict() for figure in figures], figures
        )
        show_summary(figures)
        print(f"written: {arguments.out}")
        return conclude(figures)
    return 0 if all(figure.holds for figure in figures) else 1


# ---- the parts ----


def _parity(findings: Findings, setting: gpu_slice.SliceSetting, kernels: Sequence[str], quick: bool) -> None:
    cpu = setting.device.type == "cpu"
    dtypes = (torch.float32, torch.bfloat16) if cpu else (torch.bfloat16, torch.float16)
    device, small = setting.device, quick or cpu
    checks = [gpu_parity.check(kernels, device, dtypes, small)]
    if not cpu:
        checks.append(gpu_parity.check(["explicit"], device, [torch.float32], small))
    n_tokens = 1024 if small else 131072
    checks.append(check_long(kernels, device, dtypes[-1] if cpu else dtypes[0], n_tokens, gpu_parity.attend_rows))
    rows = []
    for row in itertools.chain(*checks):
        say(
            "gpu_check",
            f"parity: {row.kernel}, {row.level}, {row.dtype}: {'passes' if row.passes else 'FAILS'} {row.error or ''}",
        )
        rows.append(row)
    show_parity(rows)
    failures = sum(not row.passes for row in rows)
    findings.add(
        "parity",
        [{**asdict(row), "passes": row.passes} for row in rows],
        [Figure("parity_failures", failures, at_most=0)],
    )


def _attention(findings: Findings, setting: gpu_slice.SliceSetting, kernels: Sequence[str], asserted: bool) -> None:
    before = gpu_timing.clocks(setting.device)
    slices = {
        name: _fitting(_of(setting, name), f"attention, {name}", partial(_time_attention, name, kernels))
        for name in SLICES
    }
    failures = sum(len(kernels) if one is None else one.failures for one in slices.values())
    measured = [one for one in slices.values() if one is not None]
    figures = [
        Figure(
            f"attention_{one.strategy}_{name}_over_plain",
            one.ratio(ours),
            OVER_PLAIN[one.strategy] if asserted else None,
        )
        for one in measured
        for name, ours in one.ours
    ]
    lines = [
        Line(one.strategy, one.n_tokens, name, timing, one.beside(name))
        for one in measured
        for name, timing in one.timings.items()
    ]
    clocks = {"before": before, "after": gpu_timing.clocks(setting.device)}
    show_speed(f"attention of rank {setting.rank} of {setting.sp}, one layer of {setting.model.name}", lines, clocks)
    rows = {"rows": [line.json() for line in lines], "clocks": clocks}
    findings.add("attention", rows, [*figures, Figure("attention_failures", failures, at_most=0)])


def _time_attention(strategy: str, kernels: Sequence[str], setting: gpu_slice.SliceSetting) -> gpu_slice.SliceTimings:
    return gpu_slice.time_attention(setting, strategy, kernels)


def _layer(findings: Findings, setting: gpu_slice.SliceSetting, peak: float | None, asserted: bool) -> None:
    if peak is None and setting.device.type == "cuda":
        print(
            f"the bf16 peak of {torch.cuda.get_device_name(setting.device)} is unknown, so no share of it is shown; "
            "give --peak TFLOPS"
        )
    before = gpu_timing.clocks(setting.device)
    steps = {name: _fitting(_of(setting, name), f"layer, {name}", partial(_time_layer, name)) for name in LAYERS}
    failures = sum(step is None or step.failed for step in steps.values())
    measured = [step for step in steps.values() if step is not None]
    for step in measured:
        print(f"layer, {step.strategy}, by count: {step.counted.described()}")
    figures = [figure for step in measured for figure in _layer_figures(step, setting, peak, asserted)]
    lines = [
        Line(step.strategy, step.n_tokens, name, timing) for step in measured for name, timing in step.timings.items()
    ]
    clocks = {"before": before, "after": gpu_timing.clocks(setting.device)}
    show_speed(f"decoder layer of rank {setting.rank} of {setting.sp}, {setting.model.name}", lines, clocks)
    rows = {"rows": [line.json() for line in lines], "clocks": clocks, "peak_tflops": peak}
    findings.add("layer", rows, [*figures, Figure("layer_failures", failures, at_most=0)])


def _time_layer(strategy: str, setting: gpu_slice.SliceSetting) -> gpu_layer.LayerStep:
    chunk_tokens = min(LOSS_CHUNK_TOKENS, max(1, setting.n_tokens // setting.sp // 2))  # at least two chunks
    return gpu_layer.time_layer(setting, strategy, chunk_tokens)


def _of(setting: gpu_slice.SliceSetting, strategy: str) -> gpu_slice.SliceSetting:
    """The segment that ``strategy`` is timed on."""
    return replace(setting, documents=SLICES[strategy])


def _layer_figures(
    step: gpu_layer.LayerStep, setting: gpu_slice.SliceSetting, peak: float | None, asserted: bool
) -> list[Figure]:
    name = f"layer_{step.strategy}"
    figures = [
        Figure(f"{name}_over_counted", step.over_counted, at_most=OVER_COUNTED if asserted else None),
        Figure(f"{name}_tflops_per_s", step.tflops_per_s),
        Figure(f"{name}_recomputed_share_of_time", step.recomputed),
        Figure(f"{name}_tokens_per_s_of_{step.layers}_layers", step.n_tokens / setting.sp / step.seconds),
    ]
    if peak is None:
        return figures
    return [*figures, Figure(f"{name}_share_of_peak", step.tflops_per_s / peak)]


def _fitting(setting: gpu_slice.SliceSetting, what: str, measure: Callable[[gpu_slice.SliceSetting], T]) -> T | None:
    """``measure(setting)`` with as many tokens as fit; None, with a message, where the last halving does not fit."""
    sizes = [
        setting.n_tokens >> halvings for halvings in range(4) if setting.n_tokens % (2 * setting.sp << halvings) == 0
    ]
    say("gpu_check", f"{what}: {setting.n_tokens} tokens; {_free(setting.device)}")
    try:
        return gpu_timing.fitting(
            lambda n_tokens: measure(setting.on(n_tokens)),
            sizes,
            "tokens",
            lambda line: print(f"{what}: {line}", flush=True),
        )
    except torch.OutOfMemoryError as error:
        print(f"{what}: {sizes[-1]} tokens do not fit either: {' '.join(str(error).split())[:200]}")
        return None


# ---- arguments ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device",
        default="cuda",
        help="cuda, cuda:1 … or cpu (small shapes, no speed targets); default %(default)s",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small shapes and few rounds: seconds, without speed targets"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(*PARTS, RANKS),
        default=list(PARTS),
        metavar="PART",
        help=f"parts to run, of {', '.join(PARTS)}, or {RANKS}; default all but {RANKS}",
    )
    parser.add_argument("--out", default="runs/gpu_check.json", help="path of the JSON; default %(default)s")
    parser.add_argument(
        "--peak", type=_positive_float, metavar="TFLOPS", help="dense bf16 peak of the GPU; default: by its name"
    )
    parser.add_argument(
        "--tokens", type=_positive, help="tokens of the segment; default 131072 (8192 with --quick, 1024 on cpu)"
    )
    parser.add_argument("--sp", type=_positive, help="ranks that share the segment; default 8 (4 on cpu)")
    parser.add_argument("--rank", type=int, help="the measured rank; default: the last, which merges most on the ring")
    parser.add_argument(
        "--rounds", type=_positive, help="timed rounds after 2 warm-ups; default 7 (2 with --quick or on cpu)"
    )
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _positive_float(text: str) -> float:
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def _setting(arguments: argparse.Namespace) -> gpu_slice.SliceSetting:
    """The setting to measure; fills ``arguments.peak``.

    Raises:
        UserError: the device does not exist, or the sizes do not divide each other.
    """
    device = _device(arguments.device)
    cpu, short = device.type == "cpu", device.type == "cpu" or arguments.quick
    model = gpu_slice.SMALL if cpu else gpu_slice.LLAMA3_8B
    sp = arguments.sp or (4 if cpu else 8)
    n_tokens = arguments.tokens or (1024 if cpu else 8192 if arguments.quick else 131072)
    rank = sp - 1 if arguments.rank is None else arguments.rank
    if not 0 <= rank < sp or model.heads % sp or n_tokens % (2 * sp):
        raise UserError(
            f"--rank {rank} --sp {sp} --tokens {n_tokens}: --rank must be below --sp, --sp must divide the "
            f"{model.heads} "
            f"query heads of {model.name}, and 2*sp must divide --tokens"
        )
    if not cpu and arguments.peak is None:
        arguments.peak = peak_tflops(torch.cuda.get_device_name(device))
    dtype = torch.float32 if cpu else torch.bfloat16
    return gpu_slice.SliceSetting(
        model, n_tokens, sp, rank, device, dtype, arguments.rounds or (2 if short else 7), 1 if cpu else 2
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device; give cuda, cuda:1 … or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {name} has no attention kernel here; give cuda or cpu")
    if device.type == "cuda":
        n_devices = torch.cuda.device_count()
        if (device.index or 0) >= n_devices:
            raise UserError(
                f"--device {name}: torch {torch.__version__} sees {n_devices} CUDA devices; give --device cpu for "
                "small shapes"
            )
        torch.cuda.set_device(device)
    return device


def _machine(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    return {
        "device": properties.name if properties else platform.processor() or platform.machine(),
        "capability": f"{properties.major}.{properties.minor}" if properties else None,
        "memory_gib": properties.total_memory / 2**30 if properties else None,
        "kernel": kernel_name(device),
        "versions": {
            name: _version(name) for name in ("torch", "transformers", "flash-attn", "flash-attn-3", "ring-flash-attn")
        },
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "clocks": gpu_timing.clocks(device),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(setting: gpu_slice.SliceSetting) -> dict[str, Any]:
    return {**asdict(setting), "device": str(setting.device), "dtype": str(setting.dtype)}


def _described(setting: gpu_slice.SliceSetting, machine: dict[str, Any]) -> str:
    name, reason = machine["kernel"]
    return f"{machine['device']}: training would use {name} ({reason}); {_free(setting.device)}"


def _free(device: torch.device) -> str:
    if device.type != "cuda":
        return "on the CPU"
    free, total = torch.cuda.mem_get_info(device)
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _finite(value: Any) -> Any:
    """None for nan, which JSON does not have: a figure that was not measured."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
