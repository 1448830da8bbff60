"""What cannot be served right, each with a remedy; and whether vLLM's functions are as this plugin needs them.

Nothing here imports vLLM.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lr2train_vllm import windows


class Refused(RuntimeError):
    """The server would not compute what the model was trained for.

    No ValueError: pydantic would put its own words around the sentence.
    """

    def __init__(self, reason: str):
        super().__init__(f"lr2train_vllm: {reason}")


def refuse_layer_types(config: Any) -> None:
    """Raises Refused for a folder with two tables in the layers of one type: the plugin does not choose among them."""
    if name := windows.switching_layer_type(config):
        raise Refused(
            f"the layers of type {name} have two RoPE tables, and the long one would serve all texts; generate with "
            "lr2train or transformers instead"
        )


def refuse_before(config: Any) -> None:
    """Raises Refused for what a user asked for and the plugin would replace.

    Args:
        config: a VllmConfig whose defaults are not filled yet.
    """
    scheduler = config.scheduler_config
    if scheduler.async_scheduling:
        raise Refused(
            "async scheduling would compute a token under the short RoPE table after the text has outgrown it; leave "
            "--async-scheduling out"
        )
    if scheduler.scheduler_cls not in (None, windows.SCHEDULER):
        raise Refused(
            f"the scheduler {scheduler.scheduler_cls} does not compute a request anew when it outgrows its RoPE table; "
            "leave --scheduler-cls out"
        )


def refuse_after(config: Any, v2_asked: bool, platform: str) -> None:
    """Raises Refused for the first thing that cannot be served right.

    Args:
        config: a complete VllmConfig for a folder with two tables and a window beyond L0.
        v2_asked: ``VLLM_USE_V2_MODEL_RUNNER`` is set to 1.
        platform: "cuda" | "rocm" | "cpu" | another name.
    """
    reason = next(_reasons(config, v2_asked, platform), None)
    if reason is not None:
        raise Refused(reason)


def _reasons(config: Any, v2_asked: bool, platform: str) -> Iterator[str]:
    model, parallel = config.model_config, config.parallel_config
    longest = windows.longest_of(config)
    if v2_asked:
        yield "the V2 model runner does not choose a RoPE table for each request; unset VLLM_USE_V2_MODEL_RUNNER"
    if getattr(config.attention_config, "hisparse_config", None) or getattr(config, "watermark_config", None):
        yield "HiSparse and watermarking need the V2 model runner, which has one RoPE table for all; leave both out"
    if platform not in ("cuda", "rocm", "cpu"):
        yield f"the model runner of {platform} may not choose a RoPE table; serve the folder on CUDA, ROCm or CPU"
    if config.speculative_config is not None:
        yield "speculative decoding would cross the switch of RoPE tables inexactly; leave --speculative-config out"
    if parallel.pipeline_parallel_size > 1:
        yield (
            f"pipeline parallelism (--pipeline-parallel-size={parallel.pipeline_parallel_size}) runs steps ahead of "
            "the switch of RoPE tables; use --tensor-parallel-size"
        )
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        yield "prefill context parallelism reorders tokens between RoPE tables; use --tensor-parallel-size"
    if getattr(parallel, "use_ubatching", False):
        yield "micro-batches would read the RoPE table of other requests; leave --enable-dbo and --ubatch-size out"
    if config.kv_transfer_config is not None:
        yield (
            "KV connectors and KV offloading do not know of two RoPE tables; leave --kv-transfer-config and "
            "--kv-offloading-size out"
        )
    if getattr(config.cache_config, "kv_sharing_fast_prefill", False):
        yield "fast prefill computes some tokens only, under other RoPE tables; leave --kv-sharing-fast-prefill out"
    if model.is_encoder_decoder or getattr(config, "diffusion_config", None) is not None:
        yield "only causal language models have two RoPE tables; serve the folder short/ or long/"
    if model.max_model_len > longest:
        yield f"--max-model-len={model.max_model_len} is beyond the RoPE table; set it to at most {longest}"


def changed(functions: Iterable[tuple[Callable[..., Any] | None, str, Sequence[str]]], version: str) -> str | None:
    """The reason why a version of vLLM cannot be used; None where all functions are as expected.

    Args:
        functions: each with its name and its expected parameters; more of them may follow.
        version: of vLLM, for the message.
    """
    for function, name, parameters in functions:
        found = list(inspect.signature(function).parameters) if callable(function) else None
        if found is None or found[: len(parameters)] != list(parameters):
            what = "is missing" if found is None else f"takes ({', '.join(found)})"
            return f"{name} of vLLM {version} {what}, and ({', '.join(parameters)}) is needed"
    return None
