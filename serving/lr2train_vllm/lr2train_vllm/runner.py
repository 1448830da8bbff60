"""What the model runner does besides: before each step it writes which table each token uses."""

from __future__ import annotations

from typing import Any

import torch

from lr2train_vllm import windows
from lr2train_vllm.refusals import Refused
from lr2train_vllm.rotary import TwoTablesRotary


def find_rotaries(runner: Any) -> None:
    """Note the model's rotary modules; called when the model is loaded, before a first step.

    Raises:
        Refused: the model rotates by other code.
    """
    runner.two_tables = []
    if windows.switch_of(runner.vllm_config) is None:
        return
    model = runner.get_model()
    runner.two_tables = [one for one in model.modules() if isinstance(one, TwoTablesRotary) and one.per_request]
    if not runner.two_tables:
        raise Refused(
            f"{type(model).__name__} does not rotate by vLLM's longrope module, so one RoPE table would serve all; "
            "leave --model-impl out, or serve the folder short/ or long/"
        )


def write_offsets(runner: Any, n_scheduled: Any) -> None:
    """Fill ``row_offsets`` for the coming step.

    Args:
        runner: a GPUModelRunner whose batch is in its final order.
        n_scheduled: tokens of each request in this step, numpy [requests].
    """
    for rotary in runner.two_tables:
        lengths = [runner.requests[name].num_tokens for name in runner.input_batch.req_ids]
        offsets = windows.row_offsets(lengths, n_scheduled, rotary.original_max_position_embeddings)
        rotary.row_offsets[: len(offsets)].copy_(torch.from_numpy(offsets))
