"""Every experiment of conf/ at full width, through the real code, as one rank of many: a signature, a shape or a memory
that changes on the CUDA branch fails here, without a GPU.
"""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lr2train import plan
from lr2train import rehearse as verb
from lr2train.cli.composition import compose
from lr2train.config import UserError
from lr2train.io import for_user
from lr2train.planning import cost, memory, rehearsal, rehearsal_tables
from lr2train.planning.counts import counts_of, hf_config_of
from lr2train.planning.memory import GIB, MemorySetting
from lr2train.planning.remedies import settings
from lr2train.planning.timeline import BUCKETS, GATHERED, KINDS, SAVED, STATES
from lr2train.planning.workload import refuse_mesh, workload_of
from lr2train.rehearse import Rehearsed, rehearsed
from lr2train.report import compose as compose_page


def composed(experiment: str, *overrides: str):
    return compose("rehearse", [f"experiment={experiment}", *overrides])


def run(config, layers: int, **options) -> Rehearsed:
    hf_config = hf_config_of(config.model)
    dp_size = config.hardware.gpus // config.parallel.sp
    window_tokens = config.model.original_window_tokens or hf_config.max_position_embeddings
    return rehearsed(config, hf_config, workload_of(config, window_tokens, dp_size), layers, **options)


@pytest.fixture(scope="module")
def llama() -> Rehearsed:
    """LLaMA3-8B with two layers on 64 ranks, of which 8 share a segment in two rings; all strategies."""
    config = composed("llama3_8b_128k", "parallel.ring=2", "engine.recompute=layer")
    return run(config, 2, strategies=("ulysses", "ring", "gather", "ulysses_ring"))


def test_every_strategy_calls_the_kernel_once_a_layer_and_again_for_recomputation(llama):
    """A ring of R ranks takes R steps, and zigzag rounds join what one call can compute."""
    calls = llama.accounting.kernel_calls
    assert llama.windows["short"] == "local"
    for name in ("short", "ulysses", "gather"):
        forward, again, backward = (calls[name, *one] for one in PASSES)
        assert (forward, again, backward) == (2, 2, 2) or name == "gather", name
        assert forward == again == backward, name
    assert calls["ring", "forward", "forward"] >= 2 * 8
    assert calls["ulysses_ring", "forward", "forward"] >= 2 * 2


PASSES = (("forward", "forward"), ("backward", "forward"), ("backward", "backward"))


def test_the_bytes_that_a_strategy_sends_are_those_it_declares(llama):
    """Forward, forward again and backward; a rank of one node sends nothing to another one."""
    from lr2train.attention import hf as attention
    from lr2train.attention.strategies import STRATEGIES
    from lr2train.attention.strategy import PackedSegment

    config = composed("llama3_8b_128k")
    layers = attention.layers_of(hf_config_of(config.model))
    (work,) = layers.works(PackedSegment(((0, 131072),), 131072, 8, 2))
    for name in ("ulysses", "ring", "gather", "ulysses_ring"):
        declared = STRATEGIES[name].traffic(work, 0)
        sent = sum(
            n for one, n in llama.accounting.sent.items() if one.micro_batch == name and not one.by.startswith("ZeRO")
        )
        assert sent == pytest.approx(2 * (2 * declared.forward + declared.backward), rel=1e-3), name
        across = (one for one in llama.accounting.sent if one.micro_batch == name and not one.by.startswith("ZeRO"))
        assert all(one.inside_node or not llama.accounting.sent[one] for one in across if one.by != "the step"), name
    assert not any(one.by == "local" for one in llama.accounting.sent)


def test_the_host_waits_for_no_device_in_forward_and_backward_passes(llama):
    assert {phase for _, phase, _ in llama.accounting.looks} <= {"before", "update"}


def test_flops_are_those_of_the_estimate(llama):
    """A layer has four passes: forward, again, and two of the backward. The head has three: its loss computes the
    gradients in the forward pass.
    """
    from lr2train.planning.roofline import ATTENTION, PRODUCTS, flops_of

    config = composed("llama3_8b_128k", "model.architecture.num_hidden_layers=2")
    counts = counts_of(hf_config_of(config.model), config.model)
    found, tokens = flops_of(llama.accounting, "ulysses"), 131072 / 8
    head = counts.vocabulary * counts.hidden
    products = 4 * counts.multiplied_parameters - head
    assert found[PRODUCTS] == pytest.approx(tokens * 2 * products, rel=0.002)
    # 2 products forward, 2 again, 5 in flash attention's backward: 4.5 forwards
    assert found[ATTENTION] == pytest.approx(4.5 * tokens * cost.attention_flops_per_token(counts, 131072), rel=0.001)


def test_states_and_buckets_are_those_of_zeros_formulas(llama):
    config = composed("llama3_8b_128k", "model.architecture.num_hidden_layers=2")
    counts = counts_of(hf_config_of(config.model), config.model)
    found = llama.timeline.peak.bytes
    # weights, gradients, fp32 weights and two moments; each parameter is padded to a multiple of the ranks
    assert found[STATES] == pytest.approx(18 * counts.parameters / 64, rel=0.02)
    assert found[BUCKETS] >= 5e8 * 4
    assert found[GATHERED] >= 2 * counts.head_parameters
    assert found[SAVED] >= 2 * 131072 / 8 * counts.hidden * 2


ON_ONE_GPU = (
    *("hardware.gpus=1", "parallel.sp=1", "optim.segments_per_step=8"),
    *("engine=zero3_offload", "engine.tile_mlp=4096", "engine.offload_inputs=true"),
)


@pytest.mark.parametrize(
    ("experiment", "overrides"),
    [
        ("llama3_8b_128k", ON_ONE_GPU),
        ("phi3_mini_128k", ("hardware.gpus=16", "parallel.sp=16", "engine.recompute=none")),
        ("tiny_4k", ()),
        ("llama3_8b_128k", ("engine.zero_stage=2", "optim.distill_short=0.5")),
        pytest.param("tiny_4k", ("engine.zero_stage=0",), marks=pytest.mark.slow),
        pytest.param("tiny_base", ("hardware.gpus=8", "optim.segments_per_step=8"), marks=pytest.mark.slow),
    ],
)
def test_the_estimate_of_an_experiment_agrees_within_five_percent(experiment, overrides):
    layers = 2
    config = composed(experiment, *overrides, f"model.architecture.num_hidden_layers={layers}")
    seen = run(config, layers)
    counts = counts_of(hf_config_of(config.model), config.model)
    items = memory.training_items(counts, MemorySetting.of(config))
    estimate, on_host = (
        memory.gpu_bytes(items) - memory.RUNTIME_BYTES,
        sum(one.bytes for one in items if not one.on_gpu),
    )
    assert on_host == pytest.approx(seen.timeline.host_bytes, rel=0.05)
    print(f"{experiment} {overrides}: plan {estimate / GIB:.2f}, rehearsed {seen.timeline.peak.total / GIB:.2f} GiB")
    assert estimate == pytest.approx(seen.timeline.peak.total, rel=0.05)


@pytest.mark.parametrize(
    ("experiment", "recompute"),
    [("llama3_8b_128k", "layer"), pytest.param("phi3_mini_128k", "keep_attention", marks=pytest.mark.slow)],
)
def test_the_estimate_of_all_layers_agrees_with_one_and_two_layers_carried_on(experiment, recompute):
    config = composed(experiment, f"engine.recompute={recompute}")
    hf_config = hf_config_of(config.model)
    peak_gib, _ = verb._estimate(config, hf_config)
    items = memory.training_items(counts_of(hf_config, config.model), MemorySetting.of(config))
    estimate = (memory.gpu_bytes(items) - memory.RUNTIME_BYTES) / GIB
    print(f"{experiment} {recompute}: plan {estimate:.2f}, rehearsed {peak_gib:.2f} GiB")
    assert estimate == pytest.approx(peak_gib, rel=0.05)


@pytest.mark.parametrize("n_settings", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_verb_writes_what_it_shows(n_settings, tmp_path, capsys, monkeypatch):
    config = composed(
        "tiny_4k", "model.architecture.num_hidden_layers=1", "engine.recompute=layer", f"runs_folder={tmp_path}"
    )
    settings = verb.settings
    monkeypatch.setattr(verb, "settings", lambda config: settings(config)[2 : 2 + n_settings])  # not all ten
    result = verb.rehearse(config)
    assert json.loads((tmp_path / "rehearse" / verb.FILE).read_text()) == json.loads(json.dumps(result))
    shown = capsys.readouterr().out
    for words in ("peak memory of each phase", "loss.py", "ulysses", "A100", "engine.recompute=", "lower bound"):
        assert words in shown
    assert result["memory"]["peak_gib"] == max(one["gib"] for one in result["memory"]["phases"])
    assert {one["micro_batch"] for one in result["work"]} == {"short", "long"}
    assert_drawn(tmp_path / "rehearse", result["memory"])


SHOWN = {
    "model": {"name": "LlamaForCausalLM", "parameters": 8.03e9, "layers": 32},
    "parallel": {
        "gpus": 64,
        "dp": 8,
        "sp": 8,
        "zero_stage": 3,
        "kernel": "torch_varlen",
        "recompute": "as told",
        "strategies": {"short": "local"},
    },
    "memory": {
        "peak_gib": 75.4,
        "runtime_gib": 1.5,
        "total_gib": 76.9,
        "gpu_gib": 80,
        "fits": False,
        "host_gib_per_node": 0,
        "at": {"phase": "update", "micro_batch": "", "module": "", "line": "deepspeed/stage3.py:7", "gib": 0.25},
        "phases": [{"phase": "update", "micro_batch": "", "gib": 75.4, **dict.fromkeys(KINDS, 12.57)}],
        "holders": [{"kind": STATES, "line": "a.py:1", "module": "lm.*", "tensors": 291, "gib": 12.34}],
    },
    "traffic": [],
    "work": [],
    "looks": [],
    "time": [
        {
            "gpu": "A100 80GB",
            "step_s": 68.1,
            "step_without_overlap_s": 70.2,
            "tokens_per_s_per_gpu": 1930,
            "mfu_at_most": 0.61,
            "parts": [],
        }
    ],
    "gpu": "A100 80GB",
    "settings": [{"setting": "parallel.sp=16", "refused": "a long sentence, with a remedy: " + "[ring] " * 30 + "end"}],
    "assumptions": ["hardware.gpu=[mine]"],
}


def test_no_figure_and_no_sentence_is_cut_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    rehearsal_tables.show(SHOWN)
    text = capsys.readouterr().out
    assert "…" not in text
    for figure in ("12.57", "75.40", "12.34", "1,930", "61%", "[mine]"):
        assert figure in text, figure
    told = " ".join(text.split())
    assert "in the update: outside the model, deepspeed/stage3.py:7, where 0.25 GiB are allocated" in told
    assert told.partition("parallel.sp=16 is refused: ")[2].startswith(SHOWN["settings"][0]["refused"])


def test_a_setting_that_cannot_be_cut_into_shards_is_not_among_the_candidates():
    config = composed("llama3_8b_128k", "data.segment_tokens=131000")
    assert [one.text for one in settings(config) if "parallel.sp" in one.keys] == ["parallel.sp=4"]


def test_a_full_disk_is_refused_before_the_rehearsal(tmp_path, monkeypatch):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limit[1]))  # a disk that takes 64 KiB
    monkeypatch.setattr(verb, "rehearsed", None)  # not called
    try:
        with pytest.raises(OSError, match="too large") as refused:
            verb.rehearse(composed("tiny_4k", f"runs_folder={tmp_path}"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert for_user(refused.value) is not None


def assert_drawn(folder, memory):
    """The picture, its numbers and the section of the page."""
    rows = list(csv.DictReader((folder / "pictures" / "memory.csv").open()))
    most = max(sum(float(row[f"{kind.replace(' ', '_')}_gib"]) for kind in KINDS) for row in rows)
    assert most == pytest.approx(memory["peak_gib"])  # the sampled moments hold the peak
    assert (folder / "pictures" / "memory.png").read_bytes().startswith(b"\x89PNG")
    page = compose_page([folder]).page
    assert "Memory over a step" in page
    assert f"peak {memory['peak_gib']:.2f} GiB" in page
    assert memory["at"]["line"].rpartition("/")[2] in page


@pytest.mark.parametrize(
    ("keys", "kind", "told"),
    [
        ((), "A100 80GB", None),
        (("hardware.gpu=H100",), "H100 SXM", None),
        (("hardware.gpu=H200", "hardware.gpu_memory_gib=70"), "H200", None),
        (("hardware.gpu_bf16_tflops=989.4", "hardware.gpu_memory_gib=141"), "H200", "hardware.gpu=A100"),
        (("hardware.gpu=L40S",), "A100 80GB", "a GPU of 362 TFLOP/s (hardware.gpu=L40S)"),
        (("hardware.gpu=MI300X",), "H200", "hardware.gpu=MI300X"),  # the largest of the nearest
    ],
)
def test_the_kind_of_gpu_is_the_named_one_else_the_page_says_which_stands_for_it(keys, kind, told):
    hardware = composed("llama3_8b_128k", *keys).hardware
    assert rehearsal.gpu_like(hardware).name == kind
    lines = rehearsal.assumptions_of(hardware)
    assert [told in line and line.startswith(kind) for line in lines] == ([True] if told else [])


def test_more_ranks_for_a_segment_than_gpus_is_refused_with_a_size_that_serves():
    with pytest.raises(UserError, match=r"parallel\.sp=128 exceeds hardware\.gpus=48; set parallel\.sp to 16"):
        refuse_mesh(composed("llama3_8b_128k", "hardware.gpus=48", "parallel.sp=128"))


@pytest.mark.parametrize("estimate", [plan.plan, verb.rehearse])
@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ("engine.deepspeed.zero_optimization.stage=2", "is decided by engine.zero_stage"),
        ("engine.deepspeed.zero_optimisation.x=1", "engine.deepspeed.zero_optimisation"),
        ("parallel.strategy=ulysses parallel.sp=64", "num_attention_heads=32 cannot be shared by parallel.sp=64 ranks"),
    ],
)
def test_what_training_would_refuse_is_refused_before_the_first_tensor(estimate, keys, told, tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "rehearsed", None)  # not called
    shallow = "model.overrides.num_hidden_layers=1"
    with pytest.raises(UserError, match=told):
        estimate(composed("llama3_8b_128k", shallow, *keys.split(), f"runs_folder={tmp_path}"))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_the_rehearsal(tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "rehearsed", None)  # not called
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as refused:
        verb.rehearse(composed("tiny_4k", f"runs_folder={tmp_path / 'file'}"))
    told = for_user(refused.value)
    assert told is not None and "runs_folder" in str(told)


def test_what_does_not_fit_names_the_layer(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    def twisted(self, x):
        return self.down_proj(self.gate_proj(x)[..., 1:])

    monkeypatch.setattr(LlamaMLP, "forward", twisted)
    with pytest.raises(UserError, match=r"lm\.model\.layers\.0\.mlp\.down_proj does not fit \(forward of a short"):
        run(composed("llama3_8b_128k", "hardware.gpus=8"), 1, learn=False)


def test_a_strategy_that_does_not_fit_is_refused_in_its_own_words():
    with pytest.raises(UserError, match=r"parallel\.strategy=local cannot serve"):
        run(composed("llama3_8b_128k", "hardware.gpus=8", "parallel.strategy=local"), 1, learn=False)


def test_a_signal_ends_a_long_rehearsal_at_once(tmp_path):
    """By CPU time, which a busy machine does not change: the interpreter's own end takes most of it."""
    keys = ("experiment=tiny_4k", "model.architecture.num_hidden_layers=200", f"runs_folder={tmp_path}")
    command = [sys.executable, "-m", "lr2train.rehearse", *keys]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr
        assert any("forward, backward" in line for line in process.stderr)
        taken = cpu_seconds(process.pid)
        process.send_signal(signal.SIGTERM)
        told = process.stderr.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert told[-1] == "rehearse: interrupted; run the same command again"
    assert usage.ru_utime + usage.ru_stime - taken < 1.0
    assert not list(tmp_path.rglob("*.json"))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
