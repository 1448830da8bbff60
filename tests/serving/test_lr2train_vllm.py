"""The vLLM plugin's parts that need no vLLM: which folder, which table, which salt, and what is refused."""

import importlib
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import serving_families as families
import torch
from hypothesis import given
from hypothesis import strategies as st

from lr2train.model import decode

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "serving" / "lr2train_vllm"))

from lr2train_vllm import refusals, windows

from tools.serving import with_vllm

PACKAGE = Path(refusals.__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return families.train(tmp_path_factory.mktemp("run") / "model", "llama", torch.float32).source("float32")


def test_only_the_folder_two_has_two_tables(source):
    of_folder = {name: source.config_of(name).get("rope_parameters") for name in ("long", "short", "two")}
    found = {name: windows.original_window(rope) for name, rope in of_folder.items()}
    assert found == {"long": None, "short": None, "two": families.L0}


def test_a_published_longrope_model_is_left_to_vllm():
    published = {"rope_type": "longrope", "original_max_position_embeddings": 32, **families.OWN_TABLE}
    assert windows.original_window(published) is None
    assert windows.original_window(None) is None


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6), st.integers(1, 40))
def test_offsets_choose_the_table_of_the_whole_text(requests, original):
    """However few tokens of a request the step computes."""
    lengths = [length for length, _ in requests]
    n_scheduled = np.array([min(n, length) for length, n in requests])
    slowly = []
    for length, n in zip(lengths, n_scheduled, strict=True):
        slowly += [0 if decode.window_of(length, original) == "short" else original] * n
    found = windows.row_offsets(lengths, n_scheduled, original)
    assert found.dtype == np.int64
    assert found.tolist() == slowly


@given(st.none() | st.text(), st.none() | st.text())
def test_no_salt_of_a_user_reads_as_the_other_table(one, other):
    short, long = windows.salted(one, long=False), windows.salted(other, long=True)
    assert short != long
    assert not windows.is_long(short)
    assert windows.is_long(long)
    assert windows.lengthened(short) == windows.salted(one, long=True)
    assert (windows.salted(one, long=False) == windows.salted(other, long=False)) == ((one or "") == (other or ""))


def config(**changes):
    """A VllmConfig that can be served, with changes by dotted name."""
    text = SimpleNamespace(max_position_embeddings=128)
    made = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text, max_model_len=128, is_encoder_decoder=False),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
        ),
        scheduler_config=SimpleNamespace(async_scheduling=None, scheduler_cls=None),
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        speculative_config=None, kv_transfer_config=None, watermark_config=None, diffusion_config=None,
    )  # fmt: skip
    for name, value in changes.items():
        *way, last = name.split("__")
        part = made
        for step in way:
            part = getattr(part, step)
        setattr(part, last, value)
    return made


def test_what_can_be_served_is_not_refused():
    refusals.refuse_before(config())
    refusals.refuse_before(config(scheduler_config__scheduler_cls=windows.SCHEDULER))
    refusals.refuse_after(config(), False, "cuda")


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"scheduler_config__async_scheduling": True}, "--async-scheduling"),
        ({"scheduler_config__scheduler_cls": "a.B"}, "--scheduler-cls"),
    ],
)
def test_what_the_plugin_would_replace_is_refused(changes, remedy):
    with pytest.raises(refusals.Refused, match=f"lr2train_vllm: .*leave {remedy} out"):
        refusals.refuse_before(config(**changes))


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"speculative_config": object()}, "--speculative-config"),
        ({"parallel_config__pipeline_parallel_size": 2}, "--tensor-parallel-size"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "--tensor-parallel-size"),
        ({"parallel_config__use_ubatching": True}, "--enable-dbo"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"watermark_config": object()}, "leave both out"),
        ({"attention_config__hisparse_config": object()}, "leave both out"),
        ({"diffusion_config": object()}, "short/ or long/"),
        ({"model_config__is_encoder_decoder": True}, "short/ or long/"),
        ({"model_config__max_model_len": 129}, "at most 128"),
    ],
)
def test_what_would_be_wrong_is_refused(changes, remedy):
    with pytest.raises(refusals.Refused, match=remedy):
        refusals.refuse_after(config(**changes), False, "cpu")


def test_two_tables_in_the_layers_of_one_type_are_refused(tmp_path):
    source = families.train(tmp_path / "model", "olmo3, yarn in global layers", torch.float32).source("float32")
    for name, window in (("two", families.L), ("two", families.L0), ("long", families.L), ("short", families.L0)):
        made = config()
        made.model_config.hf_text_config.rope_parameters = source.config_of(name)["rope_parameters"]
        made.model_config.max_model_len = window
        assert windows.switch_of(made) is None
        if (name, window) == ("two", families.L):
            with pytest.raises(refusals.Refused, match="layers of type full_attention have two RoPE tables"):
                refusals.refuse_layer_types(made)
        else:
            refusals.refuse_layer_types(made)


def test_the_second_runner_and_other_devices_are_refused():
    with pytest.raises(refusals.Refused, match="VLLM_USE_V2_MODEL_RUNNER"):
        refusals.refuse_after(config(), True, "cpu")
    with pytest.raises(refusals.Refused, match="tpu"):
        refusals.refuse_after(config(), False, "tpu")


def test_a_changed_function_of_vllm_is_named():
    def function(request, timestamp):
        """As in another version."""

    assert refusals.changed([(function, "f", ("request",))], "9.9") is None
    assert "vLLM 9.9 takes (request, timestamp)" in refusals.changed([(function, "f", ("request", "drop"))], "9.9")
    assert "is missing" in refusals.changed([(None, "f", ())], "9.9")


def test_the_entry_point_is_the_one_that_the_check_asks_for():
    said = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]["entry-points"][with_vllm.GROUP]
    module, function = said[with_vllm.PLUGIN].split(":")
    assert callable(getattr(importlib.import_module(module), function))
    for name in (windows.SCHEDULER, windows.EXTENSION):
        module, found = name.rsplit(".", 1)
        assert f"class {found}" in (PACKAGE / (module.replace(".", "/") + ".py")).read_text()
