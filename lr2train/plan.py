"""plan: estimate memory per GPU, steps, hours and price of an experiment, without GPU, weights or download.

    lr2train plan experiment=llama3_8b_128k [hardware.gpus=128 hardware.mfu=0.35 parallel.sp=4 …]

No weights, no GPU, no network: parameters are counted from the model's config. Writes ``runs/<name>/plan.json`` and
prints the same figures as tables.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lr2train import io, progress
from lr2train.attention import choice
from lr2train.attention import hf as attention
from lr2train.attention.strategy import PackedSegment
from lr2train.cli.door import main
from lr2train.config import Config, LongPositions, SearchConfig, UserError
from lr2train.data.batch import LONG, SHORT
from lr2train.model.flops import TRAINING
from lr2train.planning import cost, memory
from lr2train.planning.counts import ModelCounts, counts_of, hf_config_of
from lr2train.planning.memory import GIB, MemorySetting
from lr2train.planning.remedies import remedies
from lr2train.planning.tables import show
from lr2train.planning.workload import Workload, WorkloadPart, refuse_mesh, refuse_training, workload_of
from lr2train.rope.factors import refuse_target
from lr2train.training.deepspeed.keys import refuse_keys
from lr2train.training.deepspeed.start import accumulation_of


def plan(config: Config) -> dict[str, Any]:
    """Run the verb; returns the content of ``plan.json``.

    Raises:
        UserError: training would refuse this mesh or global batch, the model's config is missing, or the folder holds a
            corpus.
    """
    folder = Path(config.runs_folder) / config.name
    if (folder / "prepare.config.json").exists():
        raise UserError(
            f"run folder {folder} belongs to a run of prepare, whose plan.json the estimate would overwrite; choose "
            "another name="
        )
    refuse_mesh(config)
    refuse_keys(config.engine.deepspeed)
    hf_config = hf_config_of(config.model)
    counts = counts_of(hf_config, config.model)
    refuse_target(config.rope.target_window_tokens, counts.window_tokens)
    given = config
    config, recompute = memory.with_recompute(config, counts)
    dp_size = config.hardware.gpus // config.parallel.sp
    accumulation = accumulation_of(config, dp_size)
    workload = workload_of(config, counts.window_tokens, dp_size)
    refuse_training(config, hf_config, workload)
    attention.tell_windows(hf_config, workload.longest_span_tokens)
    result = {
        "model": _model(counts, config),
        "parallel": _parallel(config, dp_size, accumulation) | _attention(hf_config, workload, config),
        "memory": _with_remedies(_memory(counts, config) | {"recompute": recompute}, given, counts, hf_config),
        "work": _work(workload, config),
        "cost": _cost(counts, workload, config),
        "search": _search(counts, config),
        "assumptions": [*workload.assumptions, *_assumptions(config)],
    }
    io.write_json(folder / "plan.json", result)
    show(result)
    progress.say("plan", f"written to {folder / 'plan.json'}")
    return result


def _model(counts: ModelCounts, config: Config) -> dict[str, Any]:
    return {
        "name": counts.name,
        "parameters": counts.parameters,
        "embedding_parameters": counts.embedding_parameters,
        "head_parameters": counts.head_parameters,
        "layer_parameters": counts.layer_parameters,
        "layers": counts.layers,
        "hidden": counts.hidden,
        "heads": counts.heads,
        "key_heads": counts.key_heads,
        "head_dim": counts.head_dim,
        "vocabulary": counts.vocabulary,
        "original_window_tokens": counts.window_tokens,
        "target_window_tokens": config.rope.target_window_tokens,
    }


def _parallel(config: Config, dp_size: int, accumulation: int) -> dict[str, Any]:
    return {
        "gpus": config.hardware.gpus,
        "nodes": -(-config.hardware.gpus // config.hardware.gpus_per_node),
        "dp": dp_size,
        "sp": config.parallel.sp,
        "accumulation": accumulation,
        "segment_tokens": config.data.segment_tokens,
        "tokens_per_gpu": config.data.segment_tokens // config.parallel.sp,
        "zero_stage": config.engine.zero_stage,
    }


def _attention(hf_config: Any, workload: Workload, config: Config) -> dict[str, Any]:
    """The ring axis, and the attention choice for each kind of segment, with its longest possible documents."""
    # training chooses per segment; the estimate takes the longest documents of each window
    layers = attention.layers_of(hf_config, memory.WEIGHT_BYTES[config.model.dtype])
    ring = attention.ring_ranks(hf_config, config.parallel, config.hardware.gpus_per_node)
    return {"ring": ring, "attention": [_served(part, layers, ring, config) for part in workload.parts]}


def _served(part: WorkloadPart, layers: choice.Layers, ring: int, config: Config) -> dict[str, Any]:
    """``sent_gib``: bytes of the rank that sends most, for one segment, forward and backward."""
    strategy, n_tokens, sp = config.parallel.strategy, config.data.segment_tokens, config.parallel.sp
    if strategy == "local":  # training refuses a document that crosses a border of a sequence shard
        return {"window": part.window, "strategy": strategy, "sent_gib": 0.0}
    spans = tuple((start, min(start + part.span_tokens, n_tokens)) for start in range(0, n_tokens, part.span_tokens))
    segment = PackedSegment(spans, n_tokens, sp, ring)
    chosen = choice.choose(strategy, layers, segment)
    sent = choice.bytes_sent(chosen, layers, segment)
    return {"window": part.window, "strategy": chosen.title, "sent_gib": sent / GIB}


def _memory(counts: ModelCounts, config: Config) -> dict[str, Any]:
    items = memory.training_items(counts, MemorySetting.of(config))
    total, limit = memory.gpu_bytes(items) / GIB, config.hardware.gpu_memory_gib
    return {
        "items": [
            {"name": item.name, "gib": item.bytes / GIB, "formula": item.formula, "on_gpu": item.on_gpu}
            for item in items
        ],
        "total_gib": total,
        "gpu_gib": limit,
        "reserve_gib": memory.RESERVE * limit,
        "fits": total <= (1 - memory.RESERVE) * limit,
        "host_gib_per_node": memory.host_gib_per_node(items, config.hardware),
        "checkpoint_gib": memory.checkpoint_bytes(counts.parameters, memory.WEIGHT_BYTES[config.model.dtype]) / GIB,
        "checkpoints_kept": config.engine.keep_checkpoints,
    }


def _with_remedies(found: dict[str, Any], given: Config, counts: ModelCounts, hf_config: Any) -> dict[str, Any]:
    """Adds ``remedies``, the settings that would fit, and ``closest``, where none of them does."""
    fitting, closest = ([], None) if found["fits"] else remedies(given, counts, hf_config)
    return found | {"remedies": [asdict(one) for one in fitting], "closest": asdict(closest) if closest else None}


def _work(workload: Workload, config: Config) -> dict[str, Any]:
    tokens_per_step = config.optim.segments_per_step * config.data.segment_tokens
    return {
        "origin": workload.origin,
        "segments_per_step": config.optim.segments_per_step,
        "tokens_per_step": tokens_per_step,
        "steps": workload.steps,
        "segments": workload.steps and workload.steps * config.optim.segments_per_step,
        "tokens": workload.steps and workload.steps * tokens_per_step,
        "short_share": sum(workload.share(part) for part in workload.parts if part.window == "short"),
    }


def _cost(counts: ModelCounts, workload: Workload, config: Config) -> dict[str, Any]:
    hardware = config.hardware
    parts = [_part(counts, part, workload, config) for part in workload.parts]
    flops = sum(part["share"] * part["flops_per_token"] for part in parts)
    original = sum(part["share"] * part["original_flops_per_token"] for part in parts)
    again = sum(part["share"] * part["recomputed_flops_per_token"] for part in parts)
    step_flops = flops * config.optim.segments_per_step * config.data.segment_tokens
    done = step_flops * (1 + original / flops)  # the original model's pass takes time, and is no useful work
    hours = workload.steps and cost.gpu_hours(done * workload.steps, hardware.gpu_bf16_tflops, hardware.mfu)
    return {
        "parts": parts,
        "flops_per_token": flops,
        "recompute_share": again / flops,
        "original_share": original / flops,
        "held_out_share": _held_out_share(counts, flops, parts, config),
        "step_s": cost.gpu_hours(done, hardware.gpu_bf16_tflops, hardware.mfu) * 3600 / hardware.gpus,
        "tokens_per_s_per_gpu": cost.tokens_per_s(hardware.gpu_bf16_tflops, hardware.mfu, flops + original),
        "total_flops": workload.steps and step_flops * workload.steps,
        "gpu_hours": hours,
        "hours": hours and hours / hardware.gpus,  # None where the number of steps is unknown
        "price_usd": hours and hours * hardware.gpu_hour_price,
    }


def _held_out_share(counts: ModelCounts, flops: float, parts: list[dict[str, Any]], config: Config) -> float:
    """Time of the measurements of the held-out loss between steps, as a share of the time of training."""
    every, dp_size = config.engine.validate_every_steps, config.hardware.gpus // config.parallel.sp
    if not every:
        return 0.0
    segments = -(-config.engine.validate_segments // dp_size) * dp_size  # ranks without a segment wait
    longest = {part["window"]: part["flops_per_token"] for part in parts}  # of a curriculum: its last stage
    if config.data.long_positions == LongPositions.skip and LONG in longest:  # measured at the target window
        target = config.rope.target_window_tokens
        longest[LONG] = cost.training_flops_per_token(counts, target) * target / config.data.segment_tokens
    needles = -(-config.engine.validate_needles // dp_size) * dp_size * longest.get(LONG, 0.0)
    return (sum(longest.values()) * segments + needles) / TRAINING / (every * config.optim.segments_per_step * flops)


def _part(counts: ModelCounts, part: WorkloadPart, workload: Workload, config: Config) -> dict[str, Any]:
    setting, span = MemorySetting.of(config), part.span_tokens
    flops = cost.training_flops_per_token(counts, span)
    distilled = bool(config.optim.distill_short) and part.window == SHORT
    original = cost.forward_flops_per_token(counts, span) if distilled else 0.0
    return {
        "window": part.window,
        "span_tokens": span,
        "share": workload.share(part),
        "flops_per_token": flops,
        "attention_share": 3 * cost.attention_flops_per_token(counts, span) / flops,
        "recomputed_flops_per_token": cost.recomputed_flops_per_token(
            counts, span, setting.recompute, setting.recomputed(counts.layers)
        ),
        "original_flops_per_token": original,
        "tokens_per_s_per_gpu": cost.tokens_per_s(
            config.hardware.gpu_bf16_tflops, config.hardware.mfu, flops + original
        ),
    }


def _search(counts: ModelCounts, config: Config) -> dict[str, Any] | None:
    """Cost of the search; None where the window is not extended."""
    target, search, hardware = config.rope.target_window_tokens, config.search, config.hardware
    if target <= counts.window_tokens:
        return None
    flops = cost.scoring_flops(counts, target)
    document_hours = cost.gpu_hours(flops, hardware.gpu_bf16_tflops, hardware.mfu)
    busy_hours = document_hours * cost.search_forwards(search)
    on_all = _ranks(search, document_hours, hardware.gpus, hardware.gpu_hour_price)
    return {
        "flops_per_document": flops,
        "document_forwards": search.most_forwards,
        "busy_gpu_hours": busy_hours,
        **on_all,
        "busy_share": busy_hours / on_all["gpu_hours"],
        "one_node": _ranks(search, document_hours, hardware.gpus_per_node, hardware.gpu_hour_price),
        **_search_memory(counts, config),
    }


_LESS_MEMORY: tuple[dict[str, Any], ...] = (
    {"chunk_tokens": 8192},
    {"shard": True},
    {"chunk_tokens": 8192, "shard": True},
)


def _search_memory(counts: ModelCounts, config: Config) -> dict[str, Any]:
    """``remedy``: keys under which the search fits the GPU; empty where the search fits, or no key is known to help."""
    hardware, limit = config.hardware, (1 - memory.RESERVE) * config.hardware.gpu_memory_gib
    target, b = config.rope.target_window_tokens, memory.WEIGHT_BYTES[config.model.dtype]

    def gib(**keys: Any) -> float:
        own = memory.search_bytes(counts, target, b, replace(config.search, **keys), hardware.gpus)
        return (own + memory.RUNTIME_BYTES) / GIB

    fits = gib() <= limit
    keys: dict[str, Any] = {} if fits else next((one for one in _LESS_MEMORY if gib(**one) <= limit), {})
    remedy = " ".join(f"search.{key}={str(value).lower()}" for key, value in keys.items())
    return {"gpu_gib": gib(), "fits": fits, "remedy": remedy}


def _ranks(search: SearchConfig, document_hours: float, gpus: int, price: float) -> dict[str, Any]:
    """What a search costs on so many GPUs, one document on each at a time."""
    depth = cost.search_depth(search, gpus)
    hours = depth * document_hours
    return {"gpus": gpus, "depth": depth, "hours": hours, "gpu_hours": hours * gpus, "price_usd": hours * gpus * price}


def _assumptions(config: Config) -> list[str]:
    hardware = config.hardware
    return [
        f"a GPU does useful work at {hardware.mfu:.0%} of {hardware.gpu_bf16_tflops:g} TFLOP/s (hardware.mfu; "
        "recomputation is "
        "not useful work)",
        f"CUDA, NCCL and cuBLAS take {memory.RUNTIME_BYTES / GIB:g} GiB; {memory.RESERVE:.0%} of the GPU stays free "
        "for fragmentation",
        "a layer has a gated MLP and two norms, as in Llama and Phi3",
        f"a GPU-hour costs {hardware.gpu_hour_price:g} USD (hardware.gpu_hour_price)",
        "loading, evaluation, the held-out loss, checkpoints and restarts take no time",
    ]


if __name__ == "__main__":
    main("plan", plan)
