"""The vLLM plugin's parts that need no vLLM: which folder, which table, which salt, and what is refused."""

import importlib
import json
import sys
import tomllib
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import serving_families as families
import torch
from hypothesis import given
from hypothesis import strategies as st

from lr2train.model import decode
from lr2train.serving import folders

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


EXTENDED = ("llama, llama3", "llama, linear", "qwen2, yarn")


def short_table_of(family, folder):
    """The RoPE dict of ``two/``, and the short table of the trained model."""
    trained = families.train(folder / "model", family, torch.float32)
    folders.write(trained.source("float32"), folder, ("two",), {"two": "a card"})
    rope = json.loads((folder / "two" / "config.json").read_text())["rope_parameters"]
    return rope, trained.ours(torch.float32)[1].tables["short"].inv_freq


@pytest.mark.parametrize("family", EXTENDED)
def test_the_short_table_of_an_extended_base_is_read_bit_for_bit(family, tmp_path):
    rope, own = short_table_of(family, tmp_path)
    assert torch.equal(torch.tensor(windows.short_frequencies(rope), dtype=torch.float32), own)
    assert windows.short_frequencies({**rope, "short_mscale": None}) is None, "no folder of ours"
    assert windows.short_frequencies(None) is None


def test_a_base_with_plain_rope_has_its_factors_alone(source):
    assert windows.short_frequencies(source.config_of("two")["rope_parameters"]) is None


# ---- the parts that derive from vLLM's classes, over stand-ins with what the plugin asks of vLLM 0.32 ----


class Base(torch.nn.Module):
    """vLLM's ``longrope``: [short rows | long rows] of cos and sin, and a row for each position and offset."""

    def __init__(self, window, original, base, short_factor, long_factor):
        super().__init__()
        self.original_max_position_embeddings, self.max_position_embeddings = original, window
        self.short_factor, self.long_factor, self.base = short_factor, long_factor, base
        self.use_long_rope = True
        rows = ((original, short_factor), (window, long_factor))
        angles = [torch.arange(n)[:, None].float() * self._compute_inv_freq(factors) for n, factors in rows]
        self.long_short_cos_sin_cache = torch.cat([torch.cat((one.cos(), one.sin()), -1) for one in angles])

    def _compute_inv_freq(self, rescale_factors):
        n_dims = len(rescale_factors)
        return 1.0 / (torch.tensor(rescale_factors) * self.base ** (torch.arange(n_dims).float() / n_dims))

    def forward(self, positions, query, key=None, offsets=None):
        return positions + offsets


class Scheduler:
    """Of vLLM: queues, and what preempting and adding a request do to it."""

    def __init__(self, vllm_config):
        self.vllm_config = vllm_config
        self.requests, self.running, self.waiting, self.prev_step_scheduled_req_ids = {}, [], [], set()
        self.kv_holding_waiting = []

    def add_request(self, request):
        self.requests[request.request_id] = request
        self.running.append(request)

    def schedule(self):
        return [one.request_id for one in self.running]

    def _preempt_request(self, request, timestamp, drop_stale_output=False):
        request.num_computed_tokens = 0
        self.waiting.insert(0, request)


class Request:
    """Its hashes follow from salt and tokens."""

    def __init__(self, name, num_tokens):
        self.request_id, self.num_tokens, self.cache_salt, self.status = name, num_tokens, None, "running"
        self.num_computed_tokens, self.block_hashes = num_tokens, []

    def update_block_hashes(self):
        self.block_hashes.append((self.cache_salt, self.num_tokens))


@pytest.fixture
def parts(monkeypatch):
    """(module ``rotary``, module ``runner``, module ``scheduler``, VllmConfig of the last call)."""
    made = config()
    modules = {
        "vllm": {}, "vllm.config": {"get_current_vllm_config": lambda: made},
        "vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope": {
            "Phi3LongRoPEScaledRotaryEmbedding": Base
        },
        "vllm.v1.core.sched.scheduler": {"Scheduler": Scheduler},
        "vllm.v1.request": {"Request": Request, "RequestStatus": SimpleNamespace(WAITING_FOR_STREAMING_REQ="paused")},
    }  # fmt: skip
    for name, contents in modules.items():
        for end in range(1, name.count(".") + 2):
            part = ".".join(name.split(".")[:end])
            if part not in sys.modules:
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        for key, value in contents.items():
            monkeypatch.setattr(sys.modules[name], key, value, raising=False)
    names = ("rotary", "runner", "scheduler")
    yield *(importlib.import_module(f"lr2train_vllm.{name}") for name in names), made
    for name in names:
        sys.modules.pop(f"lr2train_vllm.{name}")


def served(made, rope):
    """The config serves a folder with this RoPE dict."""
    made.model_config.hf_text_config.rope_parameters = rope
    made.model_config.max_model_len = made.model_config.hf_text_config.max_position_embeddings = families.L
    made.scheduler_config.max_num_batched_tokens = 16


@pytest.mark.parametrize("family", ["llama", *EXTENDED])
def test_the_rows_of_the_rotary_are_our_two_tables(parts, family, tmp_path):
    rope, own = short_table_of(family, tmp_path)
    served(parts[3], rope)
    tables = [rope[key] for key in ("short_factor", "long_factor")]
    found = parts[0].TwoTablesRotary(families.L, families.L0, rope["rope_theta"], *tables)
    assert torch.equal(found._compute_inv_freq(found.short_factor), own)
    angles = torch.arange(families.L0)[:, None].float() * own
    assert torch.equal(found.long_short_cos_sin_cache[: families.L0], torch.cat((angles.cos(), angles.sin()), -1))
    long = Base(families.L, families.L0, rope["rope_theta"], tables[1], tables[1])
    assert torch.equal(found.long_short_cos_sin_cache[families.L0 :], long.long_short_cos_sin_cache[families.L0 :])


def test_each_token_of_a_step_reads_the_row_of_its_requests_length(parts, tmp_path):
    rope, _ = short_table_of("llama", tmp_path)
    served(parts[3], rope)
    rotary = parts[0].TwoTablesRotary(families.L, families.L0, 1e4, rope["short_factor"], rope["long_factor"])
    lengths = {"a": families.L0, "b": families.L0 + 1, "c": 90}
    runner = SimpleNamespace(
        vllm_config=parts[3], get_model=lambda: torch.nn.Sequential(rotary),
        requests={name: Request(name, length) for name, length in lengths.items()},
        input_batch=SimpleNamespace(req_ids=["b", "a", "c"]),
    )  # fmt: skip
    parts[1].find_rotaries(runner)
    for one in runner.requests.values():
        one.num_computed_tokens = 0  # a prompt's first chunk has the table of the whole prompt
    parts[1].write_offsets(runner, np.array([2, 3, 1]))
    positions = torch.tensor([31, 32, 0, 1, 2, 89])
    assert rotary(positions, None).tolist() == [63, 64, 0, 1, 2, 121]
    runner.get_model = lambda: torch.nn.Linear(1, 1)
    with pytest.raises(refusals.Refused, match="Linear does not rotate by vLLM's longrope module"):
        parts[1].find_rotaries(runner)


def test_a_request_that_outgrows_the_window_is_computed_anew_under_another_salt(parts, tmp_path):
    rope, _ = short_table_of("llama", tmp_path)
    served(parts[3], rope)
    scheduler = parts[2].TwoTablesScheduler(parts[3])
    stays, grows, long = Request("stays", 3), Request("grows", families.L0), Request("long", families.L0 + 1)
    for one in (stays, grows, long):
        one.cache_salt = "mine"
        scheduler.add_request(one)
    assert [windows.is_long(one.cache_salt) for one in (stays, grows, long)] == [False, False, True]
    assert scheduler.schedule() == ["stays", "grows", "long"]
    grows.num_tokens += 1
    scheduler.prev_step_scheduled_req_ids = {"grows"}
    assert scheduler.schedule() == ["stays", "long"]
    assert (scheduler.waiting, grows.num_computed_tokens, scheduler.prev_step_scheduled_req_ids) == ([grows], 0, set())
    assert grows.cache_salt == windows.salted("mine", long=True)
    assert grows.block_hashes == [(grows.cache_salt, families.L0 + 1)]
    scheduler._preempt_request(stays, 0.0)
    assert stays.cache_salt == windows.salted("mine", long=False), "for want of memory: the table stays"


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


@pytest.mark.parametrize("platform", ["cuda", "rocm", "cpu"])
def test_what_can_be_served_is_not_refused(platform):
    for scheduler in (None, windows.SCHEDULER):
        served = config(scheduler_config__scheduler_cls=scheduler)
        assert refusals.refuse_before(served) is None
        assert list(refusals._reasons(served, False, platform)) == []


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
