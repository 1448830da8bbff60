"""rehearse: run one optimizer step of one rank without GPU, weights or network, and report memory, traffic and time.

    lr2train rehearse experiment=llama3_8b_128k [parallel.sp=16 engine.loss_chunk_tokens=1024 …]

The real configuration runs through the real code, forward, backward and update: the model of transformers, attention
with the branch of its CUDA kernel, recomputation and DeepSpeed. Tensors have shapes and no memory, and the other ranks
do not exist. Writes ``runs/<name>/rehearsal.json``, a picture of the memory over the step, and prints the
same figures as tables. A shape, dtype or strategy that does not fit ends the verb with one sentence that names the
layer.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lr2train import io, progress
from lr2train.attention import kernel
from lr2train.attention.hf import ring_ranks, tell_windows
from lr2train.cli.door import main
from lr2train.config import Config, UserError
from lr2train.data.batch import IGNORE, Batch
from lr2train.model import config_json, load
from lr2train.parallel.mesh import make_mesh
from lr2train.planning import cost, rehearsal
from lr2train.planning.accounting import Accounting, CountedKernel
from lr2train.planning.counts import counts_of, hf_config_of
from lr2train.planning.memory import GIB, MemorySetting, training_items, with_recompute
from lr2train.planning.rehearsal import StepShape, gpu_like
from lr2train.planning.rehearsal_tables import show
from lr2train.planning.remedies import settings
from lr2train.planning.roofline import ASSUMPTIONS, ROOFLINES
from lr2train.planning.timeline import GATHERED, Timeline
from lr2train.planning.workload import Workload, WorkloadPart, refuse_mesh, refuse_training, workload_of
from lr2train.reporting.memory import FILE
from lr2train.reporting.pictures import write_memory_picture
from lr2train.rope.factors import refuse_target
from lr2train.rope.methods import METHODS
from lr2train.training.deepspeed.keys import refuse_keys
from lr2train.training.deepspeed.rehearsed import RehearsedEngine, fake_tensors, one_rank_of
from lr2train.training.deepspeed.start import accumulation_of

log = logging.getLogger(__name__)
_RESULT_BYTES = 2**20  # more than the numbers and the picture take
FIRST = "first"  # the micro-batch in which DeepSpeed learns the order of modules: it fetches nothing ahead


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal saw.

    Attributes:
        accounting: of every operator.
        timeline: of memory.
        windows: name -> attention strategy of each micro-batch.
        kernel: of attention.
        seconds: that it took.
    """

    accounting: Accounting
    timeline: Timeline
    windows: dict[str, str]
    kernel: str
    seconds: float


def rehearse(config: Config) -> dict[str, Any]:
    """Run the verb; returns the content of ``rehearsal.json``.

    Raises:
        UserError: training would refuse this config, or a layer does not fit; the text names the layer.
    """
    refuse_mesh(config)
    refuse_keys(config.engine.deepspeed)
    hf_config = hf_config_of(config.model)
    counts = counts_of(hf_config, config.model)
    refuse_target(config.rope.target_window_tokens, counts.window_tokens)
    config, recompute = with_recompute(config, counts)
    dp_size = config.hardware.gpus // config.parallel.sp
    accumulation = accumulation_of(config, dp_size)
    workload = workload_of(config, counts.window_tokens, dp_size)
    refuse_training(config, hf_config, workload)
    tell_windows(hf_config, workload.longest_span_tokens)
    folder = _writable(Path(config.runs_folder) / config.name)
    progress.say("rehearse", f"{counts.layers} layers, rank 0 of {config.hardware.gpus}: forward, backward, update")
    seen = rehearsed(config, hf_config, workload)
    useful = sum(_useful(counts, part, workload) for part in workload.parts) * _tokens_per_step(config)
    shape = StepShape(_in_a_step(workload, accumulation), useful, _tokens_per_step(config), config.hardware.gpus)
    result = {
        "model": {"name": counts.name, "parameters": counts.parameters, "layers": counts.layers},
        "parallel": {
            "gpus": config.hardware.gpus,
            "dp": dp_size,
            "sp": config.parallel.sp,
            "accumulation": accumulation,
            "zero_stage": config.engine.zero_stage,
            "strategies": {name: title for name, title in seen.windows.items() if name != FIRST},
            "kernel": seen.kernel,
            "recompute": recompute,
        },
        "memory": rehearsal.memory_of(seen.timeline, config.hardware),
        "traffic": rehearsal.traffic_of(seen.accounting),
        "work": rehearsal.work_of(seen.accounting, [name for name in seen.windows if name != FIRST]),
        "looks": rehearsal.looks_of(seen.accounting),
        "time": [rehearsal.time_of(seen.accounting, shape, one) for one in ROOFLINES],
        "gpu": gpu_like(config.hardware).name,
        "settings": _settings(config, hf_config),
        "assumptions": [*workload.assumptions, *rehearsal.assumptions_of(config.hardware), *ASSUMPTIONS],
        "seconds": seen.seconds,
    }
    path = folder / FILE
    io.write_json(path, result)
    picture, _ = write_memory_picture(folder)
    show(result)
    progress.say("rehearse", f"{seen.seconds:.0f} s; written to {path}; memory over the step: {picture}")
    return result


def _writable(folder: Path) -> Path:
    """The folder, after a file could be written there: a refusal comes before the minutes of a rehearsal."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(_RESULT_BYTES))
        file.flush()
    return folder


def rehearsed(
    config: Config,
    hf_config: Any,
    workload: Workload,
    layers: int | None = None,
    strategies: tuple[str, ...] = (),
    learn: bool = True,
    kernel_name: str | None = None,
) -> Rehearsed:
    """One optimizer step of rank 0: a micro-batch of each window, after one in which DeepSpeed learns the order.

    Args:
        config: of the experiment.
        hf_config: the transformers config.
        workload: which segments a step has.
        layers: decoder layers; None: all.
        strategies: further micro-batches with the longest documents, each served by one of these strategies.
        learn: whether a first micro-batch is for DeepSpeed alone.
        kernel_name: of attention; None: torch's own on CUDA, and for float32, which it does not serve, the CPU's.

    Raises:
        UserError: a layer does not fit; the text names the layer.
    """
    started, gpus = time.perf_counter(), config.hardware.gpus
    hf_config = _of_depth(hf_config, layers)
    accounting = Accounting(config.hardware.gpus_per_node)
    name = kernel_name or ("cpu_flash" if config.model.dtype == "float32" else "torch_varlen")
    counted, fake = CountedKernel(kernel.KERNELS[name], accounting), fake_tensors()

    @contextlib.contextmanager
    def modes() -> Iterator[None]:
        with fake, accounting, kernel.using(counted), warnings.catch_warnings():
            # DeepSpeed below stage 3 looks at the alignment of its buffers; a fake tensor's is as good as any
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield

    parts = _parts(workload)
    batches = [segment_of(config, part) for part in parts.values()]
    names = list(parts)
    if learn:
        batches, names = [batches[0], *batches], [FIRST, *names]
    with one_rank_of(gpus), _naming_the_layer(accounting):
        ring = ring_ranks(hf_config, config.parallel, config.hardware.gpus_per_node)
        mesh = make_mesh(config.parallel.sp, ring=ring)
        spectrum = load.spectrum_of(hf_config, config.model)
        factors = METHODS["none"](spectrum, spectrum.window_tokens)  # numbers do not matter here
        n_batches = len(batches) + len(strategies)
        engine = RehearsedEngine(config, mesh, factors, hf_config, modes, n_batches, name != "cpu_flash")
        accounting.watch(engine.model)
        attentions = engine.rehearse(batches, names, accounting.enter, strategies)
        buckets, host = (
            [one for x in tensors if (one := accounting.holding(x)) is not None]
            for tensors in (engine.buckets(), engine.on_host())
        )
        timeline = Timeline(accounting, buckets, host)
        titles = [attention.choice.title for attention in attentions]
        engine.close()
        del engine
    gc.collect()
    seconds = time.perf_counter() - started
    return Rehearsed(accounting, timeline, dict(zip([*names, *strategies], titles, strict=True)), name, seconds)


def _of_depth(hf_config: Any, layers: int | None) -> Any:
    if layers is None or layers >= hf_config.get_text_config().num_hidden_layers:
        return hf_config
    hf_config = copy.deepcopy(hf_config)
    text = hf_config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return hf_config


@contextlib.contextmanager
def _naming_the_layer(accounting: Accounting) -> Iterator[None]:
    """Turn an error inside a layer into one sentence with the layer's path."""
    try:
        yield
    except Exception as error:
        where = accounting.failed_in
        if not where:
            raise
        log.debug("the rehearsal failed", exc_info=True)
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {config_json.brief(error)}"
        article = "the" if accounting.micro_batch == FIRST else "a"
        of = f" of {article} {accounting.micro_batch} micro-batch" if accounting.micro_batch else ""
        when = f"{accounting.phase}{of}"
        raise UserError(f"{where} does not fit ({when}): {what}") from error


def _parts(workload: Workload) -> dict[str, WorkloadPart]:
    """The parts of a step by name: the window, or under a curriculum the window and the length of its documents."""
    named: dict[str, WorkloadPart] = {}
    several = len({part.window for part in workload.parts}) < len(workload.parts)
    for part in workload.parts:
        name = f"{part.window} {part.span_tokens}" if several else part.window
        if name not in named:
            named[name] = part
    return named


def _in_a_step(workload: Workload, accumulation: int) -> dict[str, float]:
    """Micro-batches of a step by name."""
    found: dict[str, float] = {}
    for name, part in _parts(workload).items():
        alike = [one for one in workload.parts if (one.window, one.span_tokens) == (part.window, part.span_tokens)]
        found[name] = accumulation * sum(workload.share(one) for one in alike)
    return found


def segment_of(config: Config, part: WorkloadPart) -> Batch:
    """A segment of documents of the longest length."""
    n_tokens, length = config.data.segment_tokens, min(part.span_tokens, config.data.segment_tokens)
    spans = tuple((start, min(start + length, n_tokens)) for start in range(0, n_tokens, length))
    ends = np.array([stop - 1 for _, stop in spans], np.int64)
    breaks = np.stack([ends, np.full(len(ends), IGNORE)])
    return Batch(np.zeros(n_tokens, np.int32), breaks, spans, part.window)


def _useful(counts: Any, part: WorkloadPart, workload: Workload) -> float:
    return workload.share(part) * cost.training_flops_per_token(counts, part.span_tokens)


def _tokens_per_step(config: Config) -> int:
    return config.optim.segments_per_step * config.data.segment_tokens


# ---- settings that would help ----

_DEPTHS = (1, 2)  # layers of a short rehearsal; memory and time grow by the same from layer to layer


def _settings(config: Config, hf_config: Any) -> list[dict[str, Any]]:
    """Peak memory and time of a step under other settings, each from two short rehearsals. The smallest peak first."""
    progress.say("rehearse", "other settings, with few layers")
    with _without_log():
        return _compared(config, hf_config)


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Keep back what every rehearsal logs anew: its kernels and strategies."""
    ours = logging.getLogger("lr2train")
    level = ours.level
    ours.setLevel(logging.WARNING)
    try:
        yield
    finally:
        ours.setLevel(level)


def _compared(config: Config, hf_config: Any) -> list[dict[str, Any]]:
    peak, seconds = _estimate(config, hf_config)
    found = []
    for change in settings(config):
        text, other = change.text, change.of(config)
        try:
            other_peak, other_seconds = _estimate(other, hf_config)
        except UserError as refused:
            found.append({"setting": text, "refused": str(refused)})
            continue
        found.append(
            {
                "setting": text,
                "refused": None,
                "peak_gib": other_peak,
                "peak_change_gib": other_peak - peak,
                "step_s": other_seconds,
                "step_change": other_seconds / seconds - 1,
            }
        )
    return sorted(found, key=lambda one: one.get("peak_gib", math.inf))


def _estimate(config: Config, hf_config: Any) -> tuple[float, float]:
    """(peak in GiB, seconds of a step) at full depth, from two short rehearsals.

    Raises:
        UserError: the config does not fit.
    """
    dp_size, layers = config.hardware.gpus // config.parallel.sp, hf_config.get_text_config().num_hidden_layers
    window_tokens = load.spectrum_of(hf_config, config.model).window_tokens
    workload = workload_of(config, window_tokens, dp_size)
    in_a_step = _in_a_step(workload, accumulation_of(config, dp_size))
    points, setting, counts = [], MemorySetting.of(config), counts_of(hf_config, config.model)
    for depth in _DEPTHS:
        seen = rehearsed(config, hf_config, workload, depth, learn=False)
        peak = seen.timeline.peak  # gathered weights grow up to a limit, not with each layer
        seconds = rehearsal.seconds_of(seen.accounting, in_a_step, config.hardware)
        points.append(((peak.total - peak.bytes[GATHERED]) / GIB, seconds))
    grown = (layers - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])
    (peak, seconds), (deeper, longer) = points
    gathered = sum(item.bytes for item in training_items(counts, setting) if item.name == GATHERED) / GIB
    return peak + grown * (deeper - peak) + gathered, seconds + grown * (longer - seconds)


if __name__ == "__main__":
    main("rehearse", rehearse)
