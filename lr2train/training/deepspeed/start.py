"""Start DeepSpeed, translate an experiment into its config, and build parameters under ZeRO-3.

Choice: DeepSpeed adopts the process group that ``parallel.processes`` made. Its config follows from ours;
``engine.deepspeed`` is merged over the result. DeepSpeed is imported by the functions, not by this module: the import
takes seconds.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lr2train.config import Config, UserError
from lr2train.model import load

HPZ = "zero_hpz_partition_size"  # ranks that share a second copy of the weights, which the backward pass reads


def start_deepspeed(device: torch.device) -> None:
    """Let DeepSpeed adopt the process group, without building its CPU op and without output on stdout."""
    for name, value in (
        ("RANK", dist.get_rank()),
        ("WORLD_SIZE", dist.get_world_size()),
        ("LOCAL_RANK", dist.get_rank()),
        ("LOCAL_SIZE", dist.get_world_size()),
    ):
        # DeepSpeed reads them; a process group without a launcher is on one machine.
        os.environ.setdefault(name, str(value))
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls functions that torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed")
    with quiet():
        import deepspeed

        if device.type == "cpu":
            _without_cpu_op()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def _without_cpu_op() -> None:
    """Keep DeepSpeed from compiling and starting its shared-memory all-reduce for CPUs.

    Only DeepSpeed's inference calls the op. Compiling takes a minute, and a kill meanwhile leaves a lock on which every
    later run hangs. Running takes 69 MB of shared memory per rank, which no process frees. DeepSpeed looks the op up in
    this table; an entry in the table also saves the probes.
    """
    from deepspeed import ops

    ops.__dict__.setdefault("__compatible_ops__", {})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what DeepSpeed prints: stdout is for results. Errors still reach stderr."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def deepspeed_config(config: Config, accumulation: int) -> dict[str, Any]:
    """The DeepSpeed config of an experiment; ``engine.deepspeed`` is merged over it."""
    engine = config.engine
    written: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW runs on the CPU too when optimizer states are offloaded
        "steps_per_print": 10**12,  # never
        "communication_data_type": {"float32": "fp32", "bfloat16": "bf16"}[engine.reduce_dtype],
    }
    written |= dtype_sections(config.model.dtype)
    if config.model.dtype == "bfloat16":
        # Sums of 8 micro-batches in bfloat16 would lose small gradients.
        written["data_types"] = {"grad_accum_dtype": "fp32"}
    if engine.zero_stage == 3:
        written["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    return merged(written, engine.deepspeed)


def dtype_sections(dtype: str) -> dict[str, Any]:
    """The section of DeepSpeed's config that a dtype needs; float32 needs none."""
    return {
        section: {"enabled": True} for section, name in (("bf16", "bfloat16"), ("fp16", "float16")) if dtype == name
    }


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over``; nested dictionaries are merged key by key."""
    out = dict(base)
    for key, value in over.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def accumulation_of(config: Config, dp_size: int) -> int:
    """Gradient accumulation: the micro-batches of one data-parallel rank in an optimizer step.

    Raises:
        UserError: the global batch does not divide over the data-parallel ranks.
    """
    total = config.optim.segments_per_step
    if total % dp_size:
        raise UserError(
            f"optim.segments_per_step={total} is not divisible by the {dp_size} data-parallel ranks (world / "
            "parallel.sp); "
            f"set optim.segments_per_step to {-(-total // dp_size) * dp_size} or change parallel.sp"
        )
    return total // dp_size


def refuse_ranks(config: Config, world: int) -> None:
    """Refuse settings of DeepSpeed that this machine, or this number of ranks, cannot run; before weights are read.

    Raises:
        UserError: the device does not compute in float16, or the ranks do not divide into secondary groups (hpZ).
    """
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if config.model.dtype == "float16" and not accelerator.is_fp16_supported():
        raise UserError(
            "model.dtype=float16 is not computed by this device, says DeepSpeed; set model.dtype to bfloat16"
        )
    size = _secondary_ranks(config.engine.deepspeed)
    if world % min(max(size, 1), world):
        raise UserError(
            f"engine.deepspeed.zero_optimization.{HPZ}={size} does not divide the {world} ranks; set it to "
            f"{math.gcd(size, world)}"
        )


def zero_init(ds_config: dict[str, Any], batch_size: int) -> contextlib.AbstractContextManager[Any]:
    """A context in which every new parameter is divided over the ranks at once.

    Args:
        ds_config: DeepSpeed's; without a batch size.
        batch_size: micro-batches of all ranks in an optimizer step; every rank counts as data-parallel.
    """
    import deepspeed
    from deepspeed.utils import groups

    # DeepSpeed makes the secondary group (hpZ) once, and fails where a second model asks for the group.
    secondary = groups._get_zero_param_intra_parallel_group() if _secondary_ranks(ds_config) > 1 else None
    # No dtype argument: on a CPU without fp16, DeepSpeed 0.19.8 ignores it and takes bfloat16. It does obey the
    # sections bf16 and fp16 of the config.
    return deepspeed.zero.Init(
        config_dict_or_path=ds_config | {"train_batch_size": batch_size}, zero_param_parallel_group=secondary
    )


def _secondary_ranks(ds_config: dict[str, Any]) -> int:
    """Ranks that share a secondary copy of the weights (hpZ); 0 and 1 stand for no such copy."""
    return ds_config.get("zero_optimization", {}).get(HPZ, 1)


def gathered(modifier_rank: int | None) -> load.Gather:
    """A context that gathers divided parameters; on exit the changes of ``modifier_rank`` are kept (None: no
    changes).
    """
    import deepspeed

    return lambda parameters: deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


def gather_whole(modules: Iterable[nn.Module]) -> None:
    """Let ZeRO-3 gather all weights of each module before the module is called, and not those of its children one by
    one. To be called before ``deepspeed.initialize``.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in modules:
        set_z3_leaf_module(module, True)
