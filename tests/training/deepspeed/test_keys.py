"""engine.deepspeed: a key that lr2train decides or DeepSpeed does not know is refused by name; other keys reach
DeepSpeed.
"""

import pytest

from lr2train.changes import leaves
from lr2train.cli.overrides import place_of
from lr2train.config import Config, EngineConfig, UserError
from lr2train.training.deepspeed.keys import OURS, refuse_keys
from lr2train.training.deepspeed.start import deepspeed_config


@pytest.mark.parametrize(
    "good",
    [
        {},
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}},
        {"zero_optimization": {"stage3_max_live_parameters": 1000, "overlap_comm": True}},
        {"data_types": {"grad_accum_dtype": "fp32"}},
        {"wall_clock_breakdown": True, "comms_logger": {"enabled": False}},
        {"flops_profiler": {"enabled": False}},
    ],
)
def test_other_keys_reach_deepspeed(good):
    refuse_keys(good)
    written = dict(leaves(deepspeed_config(Config(name="one", engine=EngineConfig(deepspeed=good)), accumulation=1)))
    assert written | dict(leaves(good)) == written
    assert written["zero_optimization.stage"] == 3, "a section is merged, not replaced"


@pytest.mark.parametrize(
    ("wrong", "tells"),
    [
        ({"train_batch_size": "auto"}, ["engine.deepspeed.train_batch_size=auto", "optim.segments_per_step"]),
        (
            {"train_micro_batch_size_per_gpu": 4},
            ["engine.deepspeed.train_micro_batch_size_per_gpu=4", "optim.segments_per_step"],
        ),
        (
            {"gradient_accumulation_steps": 2},
            ["engine.deepspeed.gradient_accumulation_steps=2", "optim.segments_per_step"],
        ),
        ({"gradient_clipping": "auto"}, ["engine.deepspeed.gradient_clipping=auto", "optim.clip"]),
        ({"zero_optimization": {"stage": 2}}, ["engine.deepspeed.zero_optimization.stage=2", "engine.zero_stage"]),
        ({"bf16": {"enabled": "auto"}}, ["engine.deepspeed.bf16", "model.dtype"]),
        ({"optimizer": {"type": "AdamW"}}, ["engine.deepspeed.optimizer", "optim.lr"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["engine.deepspeed.scheduler", "optim.schedule"]),
        (
            {"zero_optimization": {"reduce_bucket_size": "auto"}},
            ["engine.deepspeed.zero_optimization.reduce_bucket_size=auto", "remove it"],
        ),
        (
            {"zero_optimisation": {"stage": 2}},
            ["engine.deepspeed.zero_optimisation ", "did you mean zero_optimization?"],
        ),
        (
            {"zero_optimization": {"overlap_com": True}},
            ["engine.deepspeed.zero_optimization.overlap_com ", "did you mean overlap_comm?"],
        ),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            ["zero_optimization.offload_param.devise", "did you mean device?"],
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "gpu"}}},
            ["zero_optimization.offload_param.device=gpu", "'cpu' or 'nvme'"],
        ),
        ({"comms_logger": {"enabledd": True}}, ["engine.deepspeed.comms_logger.enabledd", "did you mean enabled?"]),
        ({"zero_optimization": 3}, ["zero_optimization", "refused by DeepSpeed"]),
    ],
    ids=str,
)
def test_a_wrong_key_is_refused_by_name(wrong, tells):
    with pytest.raises(UserError) as error:
        refuse_keys(wrong)
    assert all(part in str(error.value) for part in tells), str(error.value)
    assert "\n" not in str(error.value)


def test_the_keys_of_lr2train_that_decide_instead_are_in_the_schema():
    named = {key.strip() for text in OURS.values() for key in text.replace(" and ", ",").split(",")}
    assert all(place_of(key).known for key in named)
