"""tools.gpu.check on a CPU: small shapes end to end, counts beside brute force, wrong kernels found."""

import inspect
import json
import math
import re
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from ranks import run_ranks
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import FlopCounterMode

from lr2train.attention import cpu, cuda, kernel, ring
from lr2train.attention.strategies import STRATEGIES
from lr2train.attention.strategy import PackedSegment, SegmentWork
from lr2train.parallel.comm import counting
from lr2train.parallel.layout import Layout
from lr2train.training.deepspeed.start import start_deepspeed
from tests.attention.reference import attend_explicitly, mask_of, random_qkv, relative_error
from tests.attention.test_ring_flash_attn import hand_it_our_kernel
from tools.gpu import check as gpu_check
from tools.gpu import kernels as gpu_kernels
from tools.gpu import layer as gpu_layer
from tools.gpu import one_rank as gpu_one_rank
from tools.gpu import parity as gpu_parity
from tools.gpu import ranks as gpu_ranks
from tools.gpu import slice as gpu_slice
from tools.gpu import timing as gpu_timing
from tools.gpu.sampled import check_long

CPU = torch.device("cpu")
MODEL = gpu_slice.Model("tiny", hidden=32, layers=2, heads=8, kv_heads=2, head_size=8, intermediate=48, vocabulary=64)
FLOPS = gpu_timing.Flops(2e12, 4e12)


def setting(n_tokens=64, sp=4, rank=1):
    return gpu_slice.SliceSetting(MODEL, n_tokens, sp, rank, CPU, torch.float32, rounds=1, warm_ups=0)


@pytest.fixture
def stand_ins():
    """flash-attn's modules over our CPU kernel, for one test."""
    before = dict(sys.modules)
    hand_it_our_kernel()
    yield
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in ("flash_attn", "ring_flash_attn"):
            del sys.modules[name]


# ---- the whole check ----


def test_the_whole_check_runs_on_cpu(tmp_path, capsys):
    """Every part runs, and the JSON agrees with the output."""
    out = tmp_path / "deep" / "gpu_check.json"
    assert (
        gpu_check.main(["--device", "cpu", "--tokens", "256", "--rounds", "1", "--peak", "1", "--out", str(out)]) == 0
    )
    printed = capsys.readouterr().out.splitlines()
    told = json.loads(out.read_text())
    assert told["kernels"] == ["cpu_flash"]
    assert told["not_used"][0] == "not used: flash_attn_3 (needs CUDA)"
    assert set(told["not_used"]) <= set(printed)
    assert {row["level"] for row in told["parity"]} == {
        "rows", "blocks", "ring on 4", "gather on 4", "ulysses on 4", "ulysses_ring on 2x2", "sampled, 1024",
    }  # fmt: skip
    cases = {"rows": 24, "blocks": 24, "sampled, 1024": 3}
    assert all(row["passes"] and row["cases"] == cases.get(row["level"], 12) for row in told["parity"])
    assert {row["strategy"] for row in told["attention"]["rows"]} == {"ulysses", "ring", "gather", "local"}
    assert {row["strategy"] for row in told["layer"]["rows"]} == {"ulysses", "ring", "local"}
    assert sum(line.startswith("layer, local, by count: linear layers ") for line in printed) == 1
    assert any(line.startswith("layer_ring_over_counted: ") for line in printed)
    assert all(
        row["forward_ms"] > 0 and row["tflops_per_s"] > 0
        for part in ("attention", "layer")
        for row in told[part]["rows"]
    )
    figures = {figure["name"]: figure for figure in told["figures"]}
    assert (
        figures["parity_failures"]["value"]
        == figures["attention_failures"]["value"]
        == figures["layer_failures"]["value"]
        == 0
    )
    assert figures["layer_ring_share_of_peak"]["value"] == pytest.approx(figures["layer_ring_tflops_per_s"]["value"])
    assert all(figure["holds"] for figure in figures.values())
    assert [line.split(": ")[0] for line in printed[-len(figures) :]] == list(figures)
    assert sum("summary: " in line for line in printed) == 1
    summary = printed[next(i for i, line in enumerate(printed) if "summary: " in line) :]
    for figure in figures.values():
        row = next(line for line in summary if f" {figure['name']} " in line)
        assert ("met" if figure["at_most"] is not None else "no target here") in row


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--device", "cuda:77"],
            "--device cuda:77: torch .* sees .* CUDA devices; give --device cpu",
        ),
        (["--device", "tpu9"], "--device tpu9 is no device; give cuda, cuda:1 … or cpu"),
        (["--device", "meta"], "--device meta has no attention kernel here"),
        (["--device", "cpu", "--rank", "4"], "--rank 4 --sp 4 --tokens 1024: --rank must be below --sp"),
        (["--device", "cpu", "--rank", "-1"], "--rank must be below --sp"),
        (["--device", "cpu", "--sp", "3"], "--sp must divide the 8 query heads"),
        (["--device", "cpu", "--tokens", "1001"], r"2\*sp must divide --tokens"),
    ],
)
def test_a_check_that_cannot_start_ends_with_2_and_one_sentence(arguments, sentence, tmp_path, capsys):
    out = tmp_path / "gpu_check.json"
    assert gpu_check.main([*arguments, "--out", str(out)]) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.parametrize("arguments", [["--tokens", "0"], ["--rounds", "-1"], ["--peak", "0"], ["--only", "speed"]])
def test_malformed_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        gpu_check.main(["--device", "cpu", *arguments])
    assert refused.value.code == 2


@pytest.mark.usefixtures("fewer_cases")
def test_a_wrong_kernel_ends_with_1(tmp_path, monkeypatch, capsys):
    flash = cpu._flash
    monkeypatch.setattr(cpu, "_flash", lambda q, *rest, **options: flash(1.01 * q, *rest, **options))
    assert gpu_check.main(["--device", "cpu", "--only", "parity", "--out", str(tmp_path / "out.json")]) == 1
    printed = capsys.readouterr().out
    assert "MISSED: parity_failures is" in printed
    assert "FAILS" in printed
    assert re.search(r"parity_failures .* at most 0 .* MISSED", printed), "in the summary too"


def test_a_part_that_does_not_fit_continues_with_fewer_tokens(tmp_path, monkeypatch, capsys):
    measure = gpu_slice.time_attention

    def small_memory(at, *rest):
        if at.n_tokens > (0 if rest[0] == "ring" else 64):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(at, *rest)

    monkeypatch.setattr(gpu_slice, "time_attention", small_memory)
    out = tmp_path / "out.json"
    arguments = ["--device", "cpu", "--only", "attention", "--tokens", "128", "--rounds", "1", "--out", str(out)]
    assert gpu_check.main(arguments) == 1, "a strategy without any measurement is a failure"
    printed = capsys.readouterr().out
    assert "attention, ulysses: 128 tokens do not fit into memory; going on with 64" in printed
    assert "attention, ring: 16 tokens do not fit either: CUDA out of memory" in printed
    assert "MISSED: attention_failures is 1" in printed
    assert {row["segment_tokens"] for row in json.loads(out.read_text())["attention"]["rows"]} == {64}


# ---- parity finds wrong kernels ----


@pytest.fixture
def fewer_cases(monkeypatch):
    monkeypatch.setattr(gpu_parity, "HEADS", {"gqa": (6, 2)})


def rows_of(*dtypes):
    return list(gpu_parity.check(["cpu_flash"], CPU, dtypes, quick=True))


def not_causal(q, k, v, dropout, causal, **options):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, False, **options)


def lse_off(q, k, v, *rest, **options):
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, *rest, **options)
    return out, lse + 0.05


def not_a_number(q, k, v, *rest, **options):
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, *rest, **options)
    out[..., 0, 0] = math.nan
    return out, lse


@pytest.mark.parametrize("broken", [not_causal, not_a_number, lse_off])
@pytest.mark.usefixtures("fewer_cases")
def test_a_wrong_forward_fails_at_every_level(broken, monkeypatch):
    monkeypatch.setattr(cpu, "_flash", broken)
    rows = rows_of(torch.float32, torch.bfloat16)
    assert len(rows) == 12
    assert [row.level for row in rows if row.passes] == []


@pytest.mark.usefixtures("fewer_cases")
def test_a_wrong_backward_fails_in_its_gradient_alone(monkeypatch):
    backward = cpu._flash_backward

    def wrong(*rest, **options):
        dq, dk, dv = backward(*rest, **options)
        return dq, 1.02 * dk, dv

    monkeypatch.setattr(cpu, "_flash_backward", wrong)
    for row in rows_of(torch.float32, torch.bfloat16):
        if row.level not in ("rows", "blocks"):
            continue  # on simulated ranks, the limit comes from the same wrong kernel
        assert not row.passes
        assert [name for name, ratio in row.ratios.items() if ratio > gpu_parity.LIMITS[name]] == ["dk"]
        assert row.worst.startswith("dk: ")


@pytest.mark.usefixtures("fewer_cases")
def test_a_merge_that_ignores_lse_fails_at_every_level_that_merges(monkeypatch):
    for module in (kernel, gpu_parity):
        monkeypatch.setattr(
            module, "merge", lambda out_a, lse_a, out_b, lse_b: ((out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b))
        )
    passing = {row.level for row in rows_of(torch.bfloat16) if row.passes}
    assert not passing & {"blocks", "ring on 4", "ulysses_ring on 2x2"}


@pytest.mark.usefixtures("fewer_cases")
def test_a_kernel_that_raises_is_a_failed_row_at_every_level(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(cpu, "_flash_backward", broken)
    rows = rows_of(torch.float32)
    assert len(rows) == 6
    assert all(not row.passes and row.error.endswith("RuntimeError: no kernel image is available") for row in rows)


@pytest.mark.parametrize("sliding_window", [None, 5])
def test_the_reference_equals_the_tests_own_reference(sliding_window):
    """Mask and attention of the check beside the independent ones of the tests."""
    spans = ((0, 1), (1, 9), (12, 40))
    assert torch.equal(gpu_parity.mask_of(spans, 48, sliding_window), mask_of(spans, 48, sliding_window=sliding_window))
    case = gpu_parity.ParityCase((4, 2), 8, torch.float64, spans, 48, sliding_window)
    segment = gpu_parity.draw(case, CPU)
    expected = attend_explicitly(segment.q, segment.k, segment.v, spans, segment.scale, sliding_window=sliding_window)
    answer = gpu_parity.written_out(segment, torch.float64)
    torch.testing.assert_close((answer.out, answer.lse), expected)
    assert all(grad.isfinite().all() for grad in answer.grads)


@pytest.mark.parametrize("broken", ["out", "lse", "dq", "dk", "dv"])
def test_a_wrong_row_of_a_long_segment_is_found(broken):
    """Errors of 2 % in the last document alone."""

    def wrong(inputs):
        answer = gpu_parity.attend_rows(inputs)
        named = dict(zip(("out", "lse", "dq", "dk", "dv"), (answer.out, answer.lse, *answer.grads), strict=True))
        start = inputs.spans[-1][0]
        named[broken] = named[broken].clone()
        named[broken][start:] = named[broken][start:] * 1.02 + 0.02
        return gpu_parity.Answer(named["out"], named["lse"], [named[name] for name in ("dq", "dk", "dv")])

    (right,) = check_long(["cpu_flash"], CPU, torch.float32, 512, gpu_parity.attend_rows)
    (row,) = check_long(["cpu_flash"], CPU, torch.float32, 512, wrong)
    assert right.passes and not row.passes


# ---- counts ----


@pytest.mark.parametrize("sp", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("strategy", "documents"),
    [("ulysses", "whole"), ("ulysses", "crossing"), ("ring", "whole"), ("gather", "crossing"), ("local", "aligned")],
)
def test_pairs_of_a_slice_equal_a_count(strategy, documents, sp):
    n_tokens = 64
    for rank in range(sp):
        at = replace(setting(n_tokens, sp, rank), documents=documents)
        seen = mask_of(at.spans, n_tokens)
        assert seen.diagonal().all(), "the documents fill the segment"
        kind = "zigzag" if strategy == "ring" else "contiguous"
        mine = slice(None) if strategy == "ulysses" else Layout(kind, n_tokens, rank, sp).indices
        expected = int(seen[mine].sum()) * MODEL.heads // (sp if strategy == "ulysses" else 1)
        assert gpu_slice.slice_pairs(at, strategy) == expected
        tiles, heads, kv_heads = gpu_slice.plain_tiles(at, strategy)
        assert heads * sum(tile.pairs() for tile in tiles) == expected, "the plain kernel does the same work"
        assert heads % kv_heads == 0


def test_flops_of_attention_equal_torch_s_counter():
    """FlopCounterMode counts two products forward and four backward; flash attention adds a fifth."""
    q, k, v = (x.requires_grad_() for x in random_qkv(32, 3, 3, 8))
    with FlopCounterMode(display=False) as forward:
        out = (q.transpose(0, 1) @ k.permute(1, 2, 0)) @ v.transpose(0, 1)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    counted = gpu_slice.kernel_flops(3 * 32 * 32, 8)
    assert counted.forward == forward.get_total_flops()
    assert counted.backward == backward.get_total_flops() * 5 / 4


def test_flops_of_a_layer_equal_torch_s_counter():
    """Linear layers as counted in transformers' own layer, attention by its pairs; backward is twice forward."""
    at = setting()
    with gpu_one_rank.one_rank(at.rank, at.sp) as mesh:
        lm, attention = gpu_layer._build(at, "ring", mesh)
        kept = next(one for one in gpu_layer._layer_passes(at, "ring", lm, attention) if one.name == gpu_layer.LAYER)
        with FlopCounterMode(display=False) as counter:
            kept.forward()
    linear = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}["aten.mm"]
    attention = 4 * MODEL.head_size * gpu_slice.slice_pairs(at, "ring")
    assert kept.flops.forward == linear + attention
    assert kept.flops.backward == 2 * kept.flops.forward
    loss = gpu_layer._loss_pass(at, lm, 8).flops
    assert loss == gpu_timing.Flops(2 * 32 * 64 * 16, 4 * 32 * 64 * 16)


def test_a_step_is_all_layers_and_one_loss_and_a_layer_is_counted_from_measured_rates():
    seconds = {  # forward, backward
        gpu_layer.LAYER: (1.0, 3.0), gpu_layer.LOSS: (1.0, 1.0), gpu_layer.KEPT: (1.0, 2.0),
        gpu_layer.PRODUCT: (2.0, 4.0), gpu_layer.ATTENTION: (0.25, 0.5), gpu_layer.MEMORY: (1.0, 2.0),
    }  # fmt: skip
    timings = {name: gpu_timing.Timing(FLOPS, [one], [other]) for name, (one, other) in seconds.items()}
    step = gpu_layer.LayerStep("ring", 64, 3, timings, linear_flops=5e11, moved_bytes=1e11)
    assert step.seconds == 14.0
    assert step.tflops_per_s == pytest.approx(4 * 6 / 14)
    assert step.recomputed == pytest.approx(0.25)
    assert not step.failed
    # 6e12 FLOPs in 6 s, and 6e12 bytes in 3 s
    assert step.counted == gpu_layer.Counted(4 * 5e11 / 1e12, 2 * 0.25 + 0.5, 4 * 1e11 / 2e12)
    assert step.over_counted == pytest.approx(4.0 / (2.0 + 1.0 + 0.2))
    assert step.counted.described().endswith("= 3200 ms")


def test_bytes_that_a_layer_moves_are_those_of_its_operations():
    """LLaMA3-8B, bf16, a token: two norms, two residuals, RoPE over 40 heads, SwiGLU."""
    at = replace(setting(8, 8, 0), model=gpu_slice.LLAMA3_8B, dtype=torch.bfloat16)
    assert gpu_layer.moved_bytes(at) == 2 * 36 * 4096 + 12 * 4096 + 18 * 40 * 128 + 10 * 14336


# ---- one rank alone runs the code of a real rank ----


@pytest.mark.parametrize(("strategy", "rings"), [("ulysses", 1), ("ring", 1), ("gather", 1), ("ulysses_ring", 2)])
@pytest.mark.parametrize("rank", [0, 3])
def test_one_rank_alone_sends_the_bytes_of_the_formula(strategy, rings, rank):
    segment = PackedSegment(((0, 64),), 64, 4, rings)
    work = SegmentWork(segment, 8, 2, 8, bytes_per_element=4)
    leaves = [x.requires_grad_() for x in random_qkv(16, 8, 2, 8)]
    with gpu_one_rank.one_rank(rank, 4, rings) as mesh, counting() as sent:
        out = STRATEGIES[strategy].prepare(segment, mesh, None)(*leaves, 0.3)
        assert sent.total() == STRATEGIES[strategy].traffic(work, rank).forward
        out.sum().backward()
    assert sent.total() == STRATEGIES[strategy].traffic(work, rank).total
    assert out.shape == (16, 8, 8)
    assert all(x.isfinite().all() and x.std() > 0 for x in (out, *(leaf.grad for leaf in leaves)))
    assert not torch.distributed.is_initialized()


def test_a_rank_alone_receives_what_it_sends():
    into = torch.full((5,), math.nan)
    gpu_one_rank._echo(into, [torch.empty(0), torch.tensor([1.0, 2.0])])
    assert into.tolist() == [1.0, 2.0, 1.0, 2.0, 1.0]
    gpu_one_rank._echo(into, [torch.empty(0)])
    assert into.isfinite().all()


def test_the_ring_computes_the_counted_pairs(monkeypatch):
    pairs = []
    forward = ring.forward_block

    def counted(q, k, v, block, *rest):
        pairs.append(q.shape[1] * block.pairs)
        return forward(q, k, v, block, *rest)

    monkeypatch.setattr(ring, "forward_block", counted)
    found = gpu_slice.time_attention(setting(), "ring", ["cpu_flash"])
    assert sum(pairs) == gpu_slice.slice_pairs(setting(), "ring")
    assert found.failures == 0
    assert found.ratio("ours, cpu_flash") > 0
    assert found.beside("plain cpu_flash") is None


@pytest.mark.usefixtures("stand_ins")
def test_ring_flash_attn_is_timed_where_importable():
    timings = gpu_slice.time_attention(setting(), "ring", ["cpu_flash"]).timings
    assert timings["ring-flash-attn"].error is None
    assert timings["ring-flash-attn"].median_s > 0
    assert timings["ring-flash-attn"].flops == timings["ours, cpu_flash"].flops
    assert not any("ring_flash_attn" in line for line in gpu_kernels.available(CPU).missing)


# ---- available kernels ----


def test_kernels_of_a_gpu_are_those_of_training_and_the_others_have_a_reason(monkeypatch):
    reasons = {"flash_attn_3": None, "flash_attn_4": "is older than 4.0.0b8", "flash_attn": None}
    asked = []
    monkeypatch.setattr(cuda, "refusal", lambda name, generation: asked.append(generation) or reasons[name])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = gpu_kernels.available(torch.device("cuda"))
    assert found.names == ("flash_attn_3", "flash_attn", "torch_varlen")
    assert found.missing[0] == "not used: flash_attn_4 (is older than 4.0.0b8)"
    assert set(asked) == {9}


def test_a_kernel_can_be_forced():
    with gpu_kernels.using("torch_varlen"):
        assert kernel.kernel_name("cuda") == ("torch_varlen", "asked for on cuda")
    assert kernel.kernel_name("cpu")[0] == "cpu_flash"


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """Stand-in for flash-attn's function on [B, T, H, D]; versions 2 and 3 share these names."""
    spans = ((0, q.shape[1]),)
    return attend_explicitly(q[0], k[0], v[0], spans, softmax_scale, causal)[0][None].to(q.dtype)


def varlen_stand_in(*args, **kwargs):
    """Stand-in for torch's varlen_attn, with the signature of the installed function."""
    given = inspect.signature(varlen_attn).bind(*args, **kwargs).arguments
    q = given["query"]
    assert given["cu_seq_q"].tolist() == [0, given["max_q"]] == [0, len(q)]
    assert given["cu_seq_k"].dtype == torch.int32
    assert given["enable_gqa"] == (q.shape[1] != given["key"].shape[1])
    causal = {(-1, 0): True, (-1, -1): False}[given["window_size"]]
    return attend_explicitly(q, given["key"], given["value"], ((0, len(q)),), given["scale"], causal)[0].to(q.dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", sorted(gpu_kernels.PLAIN))
def test_plain_calls_keep_to_the_libraries_signatures(name, causal, monkeypatch):
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        library = ModuleType(module)
        library.flash_attn_func = (
            flash_attn_func if module == "flash_attn" else lambda *args, **kwargs: (flash_attn_func(*args, **kwargs), 0)
        )
        monkeypatch.setitem(sys.modules, module, library)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_stand_in)
    for heads in ((4, 4), (6, 2)):
        q, k, v = random_qkv(32, *heads, 8)
        expected, _ = attend_explicitly(q, k, v, ((0, 32),), 0.2, causal)
        assert relative_error(gpu_kernels.PLAIN[name](q, k, v, 0.2, causal), expected) < 1e-5


# ---- timing ----


def test_a_failing_pass_is_not_run_again():
    leaf = torch.ones(4, requires_grad=True)
    calls = []

    def fails():
        calls.append(1)
        raise ValueError("no GQA\nhere")

    passes = [
        gpu_timing.Pass("works", lambda: [leaf * 2], (leaf,), FLOPS, [torch.ones(4)]),
        gpu_timing.Pass("fails", fails, (), FLOPS),
    ]
    timings = gpu_timing.time_in_turn(passes, CPU, rounds=3, warm_ups=2)
    assert len(calls) == 1
    assert timings["fails"].figures() == {"error": "ValueError: no GQA here"}
    assert len(timings["works"].rounds_s) == 3
    assert leaf.grad.tolist() == [2.0] * 4, "gradients are not summed over rounds"
    assert math.isnan(timings["fails"].over(timings["works"]))
    assert math.isnan(timings["works"].over(timings["fails"]))


def test_figures_are_medians_over_rounds():
    timing = gpu_timing.Timing(FLOPS, [1.0, 2.0, 9.0], [2.0, 3.0, 1.0])
    assert timing.rounds_s == [3.0, 5.0, 10.0]
    assert list(timing.figures().values()) == [2000.0, 2000.0, 1.0, 2.0, 6 / 5]
    assert timing.over(gpu_timing.Timing(FLOPS, [1.0, 1.0, 1.0], [1.0, 1.5, 1.0])) == 2.0, "the median of ratios"


def test_clocks_are_empty_without_a_gpu():
    assert gpu_timing.clocks(CPU) == {}


# ---- real ranks ----


def ranks_part(rank, world, out):
    return gpu_check.main(["--device", "cpu", "--only", "ranks", "--out", out]), torch.distributed.get_rank()


def test_the_part_with_real_ranks_runs_on_gloo(tmp_path):
    """The very code of ``torchrun … --only ranks``: small sizes, and no measured memory."""
    out = tmp_path / "ranks.json"
    assert run_ranks(ranks_part, 4, str(out), tmp_path=tmp_path) == [(0, rank) for rank in range(4)]
    told = json.loads(out.read_text())
    assert (told["backend"], told["world"]) == ("gloo", 4)
    figures = {figure["name"]: figure for figure in told["figures"]}
    strategies = ("local", "ulysses", "ring", "gather", "ulysses_ring")
    assert {
        f"ranks_{name}_{dtype}_error_over_limit" for name in strategies for dtype in ("float32", "bfloat16")
    } <= set(figures)
    assert {f"ranks_step_sp{sp}_loss_error" for sp in (2, 4)} <= set(figures)
    assert figures["ranks_memory_planned_gib"]["value"] > 0
    assert all(figure["holds"] for figure in figures.values())


@pytest.mark.parametrize(
    ("only", "sentence"),
    [
        (["ranks"], "--only ranks checks several ranks; start torchrun --nproc-per-node 8 -m tools.gpu.check"),
        (["ranks", "parity"], "--only ranks parity: ranks runs alone; give --only ranks"),
    ],
)
def test_ranks_without_ranks_are_refused(only, sentence, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert gpu_check.main(["--device", "cpu", "--only", *only]) == 2
    assert sentence in capsys.readouterr().err


def test_the_part_with_real_ranks_runs_on_one_rank(tmp_path):
    """As on a machine with one GPU: the step and its memory are of use there too."""
    assert run_ranks(ranks_part, 1, str(tmp_path / "ranks.json"), tmp_path=tmp_path) == [(0, 0)]


def broken_ranks_part(rank, world, out, whole):
    """One rank's ring computes with another scale: every rank has to end with 1."""
    forward = ring.forward_block
    ring.forward_block = lambda q, *rest: forward(q if rank else 1.01 * q, *rest)
    if not whole:
        gpu_ranks._steps = gpu_ranks._memory = lambda device: []  # the strategies fail before them
    return gpu_check.main(["--device", "cpu", "--only", "ranks", "--out", out])


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_wrong_rank_fails_the_check_on_all(whole, tmp_path):
    assert run_ranks(broken_ranks_part, 2, str(tmp_path / "ranks.json"), whole, tmp_path=tmp_path) == [1, 1]


def float32_steps(rank, world):
    """The steps of the part, through the attention that float32 has on CUDA."""
    kernel.kernel_name = lambda device: ("torch_varlen", "under test")
    start_deepspeed(CPU)
    return [(figure.name, figure.holds) for figure in gpu_ranks._steps(CPU)]


def test_a_float32_step_on_the_cuda_path_equals_transformers_in_float64(tmp_path):
    """What makes the tiny experiments, and the bounds of 1e-5, run on GPUs."""
    for found in run_ranks(float32_steps, 2, tmp_path=tmp_path):
        assert len(found) == 4 and all(holds for _, holds in found), found
