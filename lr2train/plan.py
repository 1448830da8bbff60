"""plan: what an experiment needs, before anything is bought, downloaded or started: parameters, memory of a GPU, steps, hours, price.

    python -m lr2train.plan experiment=llama3_8b_128k [hardware.gpus=128 hardware.mfu=0.35 parallel.sp=4 …]

No weights, no GPU, no network: the architecture is counted from its config. Writes ``runs/<name>/plan.json`` and prints it as tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lr2train import io, run
from lr2train.attention import choice
from lr2train.attention import hf as attention
from lr2train.attention.strategy import PackedSegment
from lr2train.cli.door import main
from lr2train.config import Config, UserError
from lr2train.planning import cost, memory
from lr2train.planning.memory import GIB, Item, Setting
from lr2train.planning.shape import Shape, hf_config_of, shape_of
from lr2train.planning.tables import show
from lr2train.planning.work import Part, Work, work_of
from lr2train.rope.factors import refuse_target
from lr2train.training.deepspeed.engine import accumulation_of


def plan(config: Config) -> dict[str, Any]:
    """Run the verb; returns what ``plan.json`` holds.

    Raises:
        UserError: a mesh or batch that training would refuse, or a model whose config is not at hand.
    """
    refuse_mesh(config)
    hf_config = hf_config_of(config.model)
    shape = shape_of(hf_config, config.model)
    refuse_target(config.rope.target_window_tokens, shape.window_tokens)
    dp_size = config.hardware.gpus // config.parallel.sp
    accumulation = accumulation_of(config, dp_size)
    work = work_of(config, shape.window_tokens, dp_size)
    longest = max(part.span_tokens for part in work.parts)
    attention.refuse_config(hf_config, config.parallel, config.data.segment_tokens, longest, config.hardware.gpus_per_node)
    result = {
        "model": _model(shape, config),
        "parallel": _parallel(config, dp_size, accumulation) | _attention(hf_config, work, config),
        "memory": _memory(shape, config),
        "work": _work(work, config),
        "cost": _cost(shape, work, config),
        "search": _search(shape, config),
        "assumptions": [*work.assumptions, *_assumptions(config)],
    }
    path = Path(config.runs_folder) / config.name / "plan.json"
    io.write_json(path, result)
    show(result)
    run.say("plan", f"written to {path}")
    return result


def refuse_mesh(config: Config) -> None:
    """Refuse what no mesh can hold.

    Raises:
        UserError: ``parallel.sp`` does not divide ``hardware.gpus``.
    """
    gpus, sp = config.hardware.gpus, config.parallel.sp
    if gpus % sp:
        raise UserError(f"hardware.gpus={gpus} is not divisible by parallel.sp={sp}; set hardware.gpus to {-(-gpus // sp) * sp}")


def _model(shape: Shape, config: Config) -> dict[str, Any]:
    return {
        "name": shape.name,
        "parameters": shape.parameters,
        "embedding_parameters": shape.embedding_parameters,
        "head_parameters": shape.head_parameters,
        "layer_parameters": shape.layer_parameters,
        "layers": shape.layers,
        "hidden": shape.hidden,
        "heads": shape.heads,
        "key_heads": shape.key_heads,
        "head_dim": shape.head_dim,
        "vocabulary": shape.vocabulary,
        "original_window_tokens": shape.window_tokens,
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


def _attention(hf_config: Any, work: Work, config: Config) -> dict[str, Any]:
    """The ring axis, and which strategy serves each part of the work, its documents as long as they can be."""
    layers = attention.layers_of(hf_config, memory.WEIGHT_BYTES[config.model.dtype])
    ring = attention.ring_ranks(hf_config, config.parallel, config.hardware.gpus_per_node)
    return {"ring": ring, "attention": [_served(part, layers, ring, config) for part in work.parts]}


def _served(part: Part, layers: choice.Layers, ring: int, config: Config) -> dict[str, Any]:
    """``sent_gib`` is what the busiest rank sends for a segment, forward and backward."""
    strategy, n_tokens, sp = config.parallel.strategy, config.data.segment_tokens, config.parallel.sp
    if strategy == "local":  # documents that cross a border would be refused when they come
        return {"window": part.window, "strategy": strategy, "sent_gib": 0.0}
    spans = tuple((start, min(start + part.span_tokens, n_tokens)) for start in range(0, n_tokens, part.span_tokens))
    segment = PackedSegment(spans, n_tokens, sp, ring)
    chosen = choice.choose(strategy, layers, segment)
    sent = choice.bytes_sent(chosen, layers, segment)
    return {"window": part.window, "strategy": chosen.title, "sent_gib": sent / GIB}


def _memory(shape: Shape, config: Config) -> dict[str, Any]:
    items = memory.training_items(shape, Setting.of(config))
    total, limit = sum(item.bytes for item in items if item.on_gpu) / GIB, config.hardware.gpu_memory_gib
    return {
        "items": [{"name": item.name, "gib": item.bytes / GIB, "formula": item.formula, "on_gpu": item.on_gpu} for item in items],
        "total_gib": total,
        "gpu_gib": limit,
        "reserve_gib": memory.RESERVE * limit,
        "fits": total <= (1 - memory.RESERVE) * limit,
        "host_gib_per_node": _host_gib(items, config),
        "checkpoint_gib": memory.checkpoint_bytes(shape.parameters, memory.WEIGHT_BYTES[config.model.dtype]) / GIB,
        "checkpoints_kept": config.engine.keep_checkpoints,
    }


def _host_gib(items: list[Item], config: Config) -> float:
    return sum(item.bytes for item in items if not item.on_gpu) * min(config.hardware.gpus, config.hardware.gpus_per_node) / GIB


def _work(work: Work, config: Config) -> dict[str, Any]:
    tokens_per_step = config.optim.segments_per_step * config.data.segment_tokens
    return {
        "origin": work.origin,
        "segments_per_step": config.optim.segments_per_step,
        "tokens_per_step": tokens_per_step,
        "steps": work.steps,
        "segments": work.steps and work.steps * config.optim.segments_per_step,
        "tokens": work.steps and work.steps * tokens_per_step,
        "short_share": sum(work.share(part) for part in work.parts if part.window == "short"),
    }


def _cost(shape: Shape, work: Work, config: Config) -> dict[str, Any]:
    hardware = config.hardware
    parts = [_part(shape, part, work, config) for part in work.parts]
    flops = sum(part["share"] * part["flops_per_token"] for part in parts)
    again = sum(part["share"] * part["recomputed_flops_per_token"] for part in parts)
    step_flops = flops * config.optim.segments_per_step * config.data.segment_tokens
    hours = work.steps and cost.gpu_hours(step_flops * work.steps, hardware.gpu_bf16_tflops, hardware.mfu)
    return {
        "parts": parts,
        "flops_per_token": flops,
        "recompute_share": again / flops,
        "step_s": cost.gpu_hours(step_flops, hardware.gpu_bf16_tflops, hardware.mfu) * 3600 / hardware.gpus,
        "tokens_per_s_per_gpu": cost.tokens_per_s(hardware.gpu_bf16_tflops, hardware.mfu, flops),
        "total_flops": work.steps and step_flops * work.steps,
        "gpu_hours": hours,
        "hours": hours and hours / hardware.gpus,
        "price_usd": hours and hours * hardware.gpu_hour_price,
    }


def _part(shape: Shape, part: Part, work: Work, config: Config) -> dict[str, Any]:
    checkpointing, span = config.engine.activation_checkpointing, part.span_tokens
    flops = cost.training_flops_per_token(shape, span)
    return {
        "window": part.window,
        "span_tokens": span,
        "share": work.share(part),
        "flops_per_token": flops,
        "attention_share": 3 * cost.attention_flops_per_token(shape, span) / flops,
        "recomputed_flops_per_token": cost.recomputed_flops_per_token(shape, span, checkpointing),
        "tokens_per_s_per_gpu": cost.tokens_per_s(config.hardware.gpu_bf16_tflops, config.hardware.mfu, flops),
    }


def _search(shape: Shape, config: Config) -> dict[str, Any] | None:
    """The search's cost; None where the window is not extended."""
    target, knobs, hardware = config.rope.target_window_tokens, config.search, config.hardware
    if target <= shape.window_tokens:
        return None
    flops = cost.scoring_flops(shape, target)
    forwards = knobs.most_forwards
    hours = cost.gpu_hours(flops * forwards, hardware.gpu_bf16_tflops, hardware.mfu)
    return {
        "flops_per_document": flops,
        "document_forwards": forwards,
        "racing": knobs.racing and knobs.algorithm != "surrogate",
        "gpu_hours": hours,
        "hours": hours / hardware.gpus,
        "price_usd": hours * hardware.gpu_hour_price,
        "gpu_gib": memory.scoring_bytes(shape, target, memory.WEIGHT_BYTES[config.model.dtype]) / GIB,
    }


def _assumptions(config: Config) -> list[str]:
    hardware = config.hardware
    return [
        f"{hardware.mfu:.0%} of {hardware.gpu_bf16_tflops:g} TFLOP/s a GPU do useful work (hardware.mfu; recomputation is not "
        "counted as useful)",
        f"{memory.RUNTIME_BYTES / GIB:g} GiB for CUDA, NCCL and cuBLAS; {memory.RESERVE:.0%} of the GPU stay free for what the "
        "allocator loses",
        "a gated MLP and two norms a layer, as in Llama and Phi3; a GPU-hour costs "
        + f"{hardware.gpu_hour_price:g} USD (hardware.gpu_hour_price)",
        "loading, evaluation, checkpoints and restarts take no time",
    ]


if __name__ == "__main__":
    main("plan", plan)
