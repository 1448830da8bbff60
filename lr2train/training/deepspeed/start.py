"""Start DeepSpeed on the job's process group, write its config, and build a model under ZeRO-3.

Choice: DeepSpeed adopts the process group that ``parallel.processes`` made, and its config follows from ours. DeepSpeed is imported when a function
here is called, not with this module: the import takes seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from lr2train.config import Config, UserError
from lr2train.model import load


def start_deepspeed(device: torch.device) -> None:
    """Let DeepSpeed adopt the process group that ``parallel.processes.start`` made."""
    for name, value in (
        ("RANK", dist.get_rank()),
        ("WORLD_SIZE", dist.get_world_size()),
        ("LOCAL_RANK", dist.get_rank()),
        ("LOCAL_SIZE", dist.get_world_size()),
    ):
        os.environ.setdefault(name, str(value))  # DeepSpeed reads them; whoever made the process group by hand is on one machine
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed")  # DeepSpeed calls what torch has renamed
    with quiet():
        import deepspeed

        if device.type == "cpu":
            _without_cpu_op()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def _without_cpu_op() -> None:
    """Keep DeepSpeed from compiling and starting its shared-memory all-reduce for CPUs.

    Only DeepSpeed's inference calls it. It costs a minute of compiling, which a kill leaves locked for ever, and 69 MB of shared memory a rank,
    which no process frees. DeepSpeed asks this table whether the op can be built; filling the table also spares the probes behind it.
    """
    from deepspeed import ops

    ops.__dict__.setdefault("__compatible_ops__", {})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed prints build and start-up chatter to stdout, which belongs to results; errors stay on stderr."""
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
        "steps_per_print": 10**12,
    }
    written |= dtype_sections(config.model.dtype)
    if config.model.dtype == "bfloat16":
        written["data_types"] = {"grad_accum_dtype": "fp32"}
        written["communication_data_type"] = "fp32"  # 64 ranks x 8 micro-steps of bfloat16 sums would round away small gradients
    if engine.zero_stage == 3:
        written["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    return merged(written, engine.deepspeed)


def dtype_sections(dtype: str) -> dict[str, Any]:
    return {section: {"enabled": True} for section, name in (("bf16", "bfloat16"), ("fp16", "float16")) if dtype == name}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def accumulation_of(config: Config, dp_size: int) -> int:
    """Micro-steps of an optimizer step.

    Raises:
        UserError: the global batch does not divide over the data-parallel ranks.
    """
    total = config.optim.segments_per_step
    if total % dp_size:
        raise UserError(
            f"optim.segments_per_step={total} is not divisible by the {dp_size} data-parallel ranks (world / parallel.sp); "
            f"set optim.segments_per_step to {-(-total // dp_size) * dp_size} or change parallel.sp"
        )
    return total // dp_size


def zero_init(ds_config: dict[str, Any], batch_size: int) -> contextlib.AbstractContextManager[Any]:
    """Parameters that are made inside are divided over the ranks at once."""
    import deepspeed

    # No dtype argument: on a CPU without fp16, 0.19.8 takes bfloat16 whatever it says; the config's bf16 and fp16 sections are heard.
    return deepspeed.zero.Init(config_dict_or_path=ds_config | {"train_batch_size": batch_size})


def gathered(modifier_rank: int | None) -> load.Gather:
    import deepspeed

    return lambda parameters: deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)
