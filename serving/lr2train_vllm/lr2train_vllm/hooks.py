"""Puts the parts into vLLM: four functions and one class are replaced, each by one that calls the original.

Choice: the config's own completion is the place to choose scheduler and runner, because every way to start an engine
passes it, and because the chosen values travel to all processes inside the config. Cost: these functions are not
vLLM's public interface. Their signatures are compared first; where one differs, a folder with two tables is refused
and all other models are served as before.
"""

from __future__ import annotations

import functools
from typing import Any

from lr2train_vllm import RUN_WITH, refusals, windows

_MARK = "_lr2train"  # on a function that is replaced already


def install() -> None:
    """Replace the functions, once in a process."""
    from vllm.config import VllmConfig

    if not hasattr(VllmConfig.__post_init__, _MARK):
        reason = _replace_parts()
        _replace_completion(VllmConfig, reason)


def _replace_parts() -> str | None:
    """Replace rotary class and runner functions; returns why that is not possible, or None."""
    from vllm import __version__

    try:
        from vllm.model_executor.layers import rotary_embedding
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.request import Request
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        base = rotary_embedding.Phi3LongRoPEScaledRotaryEmbedding
    except (ImportError, AttributeError) as error:
        return f"a part of vLLM {__version__} is missing ({error})"
    expected = (
        (base, "forward", ("self", "positions", "query", "key", "offsets")),
        (base, "_compute_inv_freq", ("self", "rescale_factors")),
        (GPUModelRunner, "_prepare_inputs", ("self", "scheduler_output", "num_scheduled_tokens")),
        (GPUModelRunner, "initialize_kv_cache", ("self",)),
        (Scheduler, "add_request", ("self", "request")),
        (Scheduler, "schedule", ("self",)),
        (Scheduler, "_preempt_request", ("self", "request", "timestamp", "drop_stale_output")),
        (Scheduler, "_free_request_blocks", ("self", "request")),
        (Request, "update_block_hashes", ("self",)),
    )
    named = ((getattr(owner, name, None), f"{owner.__name__}.{name}", names) for owner, name, names in expected)
    if reason := refusals.changed(named, __version__):
        return reason
    from lr2train_vllm import rotary, runner

    rotary_embedding.Phi3LongRoPEScaledRotaryEmbedding = rotary.TwoTablesRotary
    prepare, initialize = GPUModelRunner._prepare_inputs, GPUModelRunner.initialize_kv_cache

    @functools.wraps(initialize)
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        runner.find_rotaries(self)
        return initialize(self, *args, **kwargs)

    @functools.wraps(prepare)
    def prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        runner.write_offsets(self, num_scheduled_tokens)
        return prepare(self, scheduler_output, num_scheduled_tokens, *args, **kwargs)

    GPUModelRunner.initialize_kv_cache = initialize_kv_cache
    GPUModelRunner._prepare_inputs = prepare_inputs
    return None


def _replace_completion(config_class: Any, reason: str | None) -> None:
    """Choose scheduler and runner when a config is completed, and refuse what cannot be served right.

    Args:
        config_class: VllmConfig.
        reason: why a folder with two tables cannot be served at all, or None.
    """
    complete, uses_v2 = config_class.__post_init__, getattr(config_class, "use_v2_model_runner", None)
    if uses_v2 is None:
        reason = reason or "VllmConfig has no use_v2_model_runner"

    @functools.wraps(complete)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if _switch_of(self) is None:
            complete(self, *args, **kwargs)
            refusals.refuse_layer_types(self)
            return _say_how_to_serve_both(self)
        if reason is not None:
            raise refusals.Refused(f"{reason}; use vLLM {RUN_WITH[-1]}, or serve the folder short/ or long/")
        refusals.refuse_before(self)
        self.scheduler_config.scheduler_cls = windows.SCHEDULER
        self.scheduler_config.async_scheduling = False
        self.parallel_config.worker_extension_cls = self.parallel_config.worker_extension_cls or windows.EXTENSION
        _mark(self)
        complete(self, *args, **kwargs)
        _finish(self)

    def use_v2_model_runner(self: Any) -> bool:
        return False if _switch_of(self) is not None else uses_v2.fget(self)

    setattr(post_init, _MARK, True)
    config_class.__post_init__ = post_init
    if uses_v2 is not None:
        config_class.use_v2_model_runner = property(use_v2_model_runner)


def _switch_of(config: Any) -> int | None:
    """As ``windows.switch_of``; None too for a part of a config, which is never served by itself."""
    part = getattr(getattr(config, "model_config", None), "is_submodel_config", False)
    return None if part else windows.switch_of(config)


def _say_how_to_serve_both(config: Any) -> None:
    """vLLM's default window of a folder with two tables is L0; so a user may think that all is served."""
    original = windows.original_window_of(config)
    if original is not None:
        _logger().info(
            "lr2train_vllm: the server's window ends where the RoPE table changes (%d tokens); for both tables set "
            "--max-model-len to at most %d",
            original,
            windows.longest_of(config),
        )


def _mark(config: Any) -> None:
    """Write the plugin into the config.

    vLLM names its cache of compiled models by the config. Without this mark it would load what it compiled without the
    plugin: a model with one table.
    """
    from importlib.metadata import version

    if not isinstance(config.additional_config, dict):
        raise refusals.Refused("additional_config has to be a dict; leave --additional-config out")
    config.additional_config = {**config.additional_config, "lr2train_vllm": version("lr2train-vllm")}


def _finish(config: Any) -> None:
    """Refuse, or say what is served."""
    from vllm import __version__, envs
    from vllm.platforms import current_platform

    refusals.refuse_after(config, bool(envs.VLLM_USE_V2_MODEL_RUNNER), current_platform.device_name)
    _logger().info(
        "lr2train_vllm: two RoPE tables; a request of more than %d tokens has the long one, up to %d tokens",
        windows.switch_of(config),
        config.model_config.max_model_len,
    )
    if __version__ not in RUN_WITH:
        _logger().warning(
            "lr2train_vllm was run with vLLM %s, and not with %s; compare once with tools/serving_check.py of lr2train",
            ", ".join(RUN_WITH),
            __version__,
        )


def _logger() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.lr2train_vllm")
