"""Cost estimates: formulas beside numbers computed by hand, counts beside built models, the paper's speed, refusals."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lr2train import ranks
from lr2train.cli.composition import compose
from lr2train.cli.door import main
from lr2train.config import SearchConfig, UserError
from lr2train.evolution.descent import descend
from lr2train.evolution.final import CandidateScorer
from lr2train.evolution.fitness import Fitness, Slope
from lr2train.evolution.genome import Space
from lr2train.evolution.loop import evolve
from lr2train.io import write_json
from lr2train.model import load
from lr2train.model.rotary import install
from lr2train.model.slopes import SlopeModel
from lr2train.plan import plan
from lr2train.planning import cost, memory, tables
from lr2train.planning.counts import counts_of, hf_config_of
from lr2train.planning.memory import GIB
from lr2train.planning.workload import workload_of
from lr2train.rope import Spectrum
from lr2train.rope.methods import METHODS
from lr2train.run import open_run
from tools.bench.live_bytes import LiveBytes

L = 131072


def composed(*overrides: str):
    return compose("plan", list(overrides))


def shape(*overrides: str):
    config = composed(*overrides)
    return counts_of(hf_config_of(config.model), config.model)


@pytest.fixture(scope="module")
def llama():
    return shape("model=llama3_8b")


@pytest.fixture(scope="module")
def phi():
    return shape("model=phi3_mini")


def test_llama3_8b_counted_by_hand(llama):
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096  # q and o, k and v, gated MLP, two norms
    assert llama.layer_parameters == layer == 218_112_000
    assert llama.embedding_parameters == llama.head_parameters == 128256 * 4096
    assert llama.parameters == 32 * layer + 2 * 128256 * 4096 + 4096 == 8_030_261_248
    assert llama.multiplied_parameters == llama.parameters - 128256 * 4096
    assert llama.largest_gathered_parameters == 128256 * 4096
    assert llama.window_tokens == 8192


def test_phi3_mini_counted_by_hand(phi):
    layer = 4 * 3072 * 3072 + 3 * 3072 * 8192 + 2 * 3072
    assert phi.layer_parameters == layer
    assert phi.parameters == 32 * layer + 2 * 32064 * 3072 + 3072 == 3_821_079_552
    assert phi.window_tokens == 2048


def test_tiny_model_counted_on_a_built_one():
    config = composed("model=tiny_llama")
    hf_config = hf_config_of(config.model)
    built = load.build_empty(hf_config, "float32", lambda: torch.device("cpu"))
    tiny = counts_of(hf_config, config.model)
    assert tiny.parameters == sum(parameter.numel() for parameter in built.parameters())
    assert tiny.layer_parameters == sum(parameter.numel() for parameter in built.model.layers[0].parameters())
    assert tiny.head_parameters == 0  # tied
    assert tiny.multiplied_parameters == tiny.parameters


def test_a_folder_comes_before_the_architecture(tmp_path):
    config = composed("model=llama3_8b")
    write_json(tmp_path / "config.json", {**config.model.architecture, "num_hidden_layers": 2})
    assert shape("model=llama3_8b", f"model.path={tmp_path}").layers == 2


def test_flops_of_a_128k_forward(llama):
    """6.6 PFLOP with every parameter multiplied; 6.33 as the search computes: logits at the answer only."""
    attention = 2 * 32 * 32 * 128 * L
    assert cost.attention_flops_per_token(llama, L) == attention
    assert L * (2 * llama.parameters + attention) == pytest.approx(6.6e15, rel=0.01)
    assert cost.scoring_flops(llama, L) == pytest.approx(6.33e15, rel=0.002)


def test_gpu_hours_of_the_papers_search(llama):
    """64 candidates, 40 iterations, 10 documents on A100 at MFU 0.4: 376 h; 361 h with logits at the answer only."""
    forwards = 64 * 40 * 10
    assert cost.gpu_hours(6.6e15 * forwards, 312, 0.4) == pytest.approx(376, abs=1)
    assert cost.gpu_hours(cost.scoring_flops(llama, L) * forwards, 312, 0.4) == pytest.approx(361, abs=1)
    settings = {"algorithm": "evolution", "population": 64, "generations": 40, "top_k": 16}
    assert SearchConfig(**settings, documents=10).most_forwards == (64 + 40 * 48) * 10
    assert SearchConfig(**settings, documents=3, final_documents=24).most_forwards == (64 + 40 * 48) * 3 + 16 * 24
    authors = SearchConfig(population=64, generations=40, top_k=32, operators="authors", algorithm="evolution")
    assert authors.most_forwards == (128 + 40 * 32) * 10
    descent = SearchConfig(population=9, screen_documents=3, top_k=2, generations=11, final_documents=24)
    assert descent.most_forwards == 9 * 3 + 3 * 2 * 11 + 2 * 24


class Counted(Fitness):
    """Losses out of a hat, by the real scheduling over ``world`` ranks; ``depth``: document-forwards in sequence."""

    def __init__(self, settings: SearchConfig):
        n = settings.documents + settings.final_documents
        self.documents = tuple(SimpleNamespace(spans=((1, 2),), n_scored_tokens=1) for _ in range(n))
        self._known, self._slopes, self._wanted, self._wanted_slopes = {}, {}, set(), set()
        self.depth, self._again = 0, settings.chunk_tokens > 0
        self.draw = np.random.default_rng(0)

    def _compute(self, pairs, evaluate_pair):
        assert 0 < len(pairs) <= ranks.world()
        slopes = evaluate_pair == self._evaluate_slopes
        self.depth += 3 + self._again if slopes else 1
        for candidate, document in pairs:
            key, loss = (candidate.key, document), self.draw.random()
            if slopes:
                self._slopes[key] = Slope(loss, self.draw.normal(size=32), self.draw.normal())
            else:
                self._known[key] = np.array([loss])


@pytest.mark.parametrize("world", [1, 4, 7, 64])
@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "gradient", "population": 9, "top_k": 2, "generations": 5, "final_documents": 24},
        {
            "algorithm": "gradient",
            "population": 5,
            "top_k": 2,
            "generations": 5,
            "step_documents": 3,
            "chunk_tokens": 8,
        },
        {"algorithm": "evolution", "population": 8, "top_k": 3, "generations": 3, "final_documents": 5},
    ],
    ids=lambda one: "-".join(map(str, one.values())),
)
def test_a_search_takes_the_rounds_that_the_real_scheduling_makes(settings, world, monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: world)
    search = SearchConfig(documents=11, settle=1.0, **settings)
    space, fitness = Space(Spectrum(64, 10000.0, 512), 4096, search), Counted(search)
    scorer = CandidateScorer(space, fitness)
    gradient = search.algorithm == "gradient"
    *_, last = descend(space, scorer, 0) if gradient else evolve(space, scorer, 0)
    scorer.final(last.population[: search.top_k])
    assert fitness.document_forwards == search.most_forwards
    assert fitness.depth == cost.search_depth(search, world)
    if world == 1:
        assert fitness.depth == cost.search_forwards(search)


def test_the_time_of_a_search_is_that_of_its_rounds(tmp_path, capsys):
    """docs/SEARCH.md, "Cost on a large model": 64 A100."""
    found = {}
    for name in ("gradient", "small", "paper"):
        keys = ("experiment=llama3_8b_128k", f"search={name}", f"runs_folder={tmp_path}")
        chunk = "search.chunk_tokens=8192"
        found[name] = plan(composed(*keys, *([chunk] if name != "paper" else [])))["search"]
    assert [round(one["hours"], 1) for one in found.values()] == [1.2, 0.6, 4.7]
    assert [round(one["busy_gpu_hours"], 1) for one in found.values()] == [3.4, 0.8, 279.7]
    assert found["gradient"]["one_node"]["gpu_hours"] < 0.2 * found["gradient"]["gpu_hours"]
    assert "1.2 h on 64 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize("chunk", [0, 64])
def test_the_memory_of_slopes_agrees_with_a_real_pass(chunk):
    config = composed("model=tiny_llama", "model.architecture.num_hidden_layers=6")
    hf_config, tokens = hf_config_of(config.model), 512
    counts, search = counts_of(hf_config, config.model), SearchConfig(algorithm="gradient", chunk_tokens=chunk)
    lm = load.build_empty(hf_config, "float32", lambda: torch.device("cpu")).eval()
    spectrum = load.spectrum_of(hf_config, config.model)
    rotary = install(lm, METHODS["none"](spectrum, spectrum.window_tokens))
    model = SlopeModel(lm, rotary, recompute=chunk > 0)
    live = LiveBytes(lm.parameters())
    with live:
        model(np.zeros(tokens, np.int64), [(tokens - 9, tokens)])
    formula = memory.search_bytes(counts, tokens, 4, search, 1) - 4 * counts.parameters
    print(f"chunk {chunk}: formula {formula / 2**20:.2f}, measured {live.peak / 2**20:.2f} MiB")
    assert formula == pytest.approx(live.peak, rel=0.05)


def test_training_flops_agree_with_the_training_loop(llama):
    """MFU counts 6 N' + 6 layers * heads * head_dim * T a token."""
    assert cost.training_flops_per_token(llama, L) == 6 * 7_504_924_672 + 6 * 32 * 32 * 128 * L
    assert cost.training_flops_per_token(llama, L) == pytest.approx(148.1e9, rel=1e-3)
    assert cost.recomputed_flops_per_token(llama, L, "layer") == pytest.approx(
        cost.forward_flops_per_token(llama, L) - 2 * 128256 * 4096,
        rel=1e-4,  # all but the head
    )
    assert cost.recomputed_flops_per_token(llama, L, "none") == 0
    kept = cost.recomputed_flops_per_token(llama, L, "layer") - cost.recomputed_flops_per_token(
        llama, L, "keep_attention"
    )
    assert kept == cost.attention_flops_per_token(llama, L)
    whole, half = (cost.recomputed_flops_per_token(llama, L, "layer", n) for n in (32, 16))
    assert whole == 2 * half


@pytest.mark.parametrize(("name", "hours", "speed", "expected"), [("llama", 54, 804, 0.307), ("phi", 39, 1113, 0.274)])
def test_the_papers_speed_as_mfu(request, name, hours, speed, expected):
    """10B tokens on 64 A100, 3B of them short, as a share of 312 TFLOP/s."""
    model = request.getfixturevalue(name)
    assert 10e9 / (hours * 3600 * 64) == pytest.approx(speed, abs=1)
    flops = 0.3 * cost.training_flops_per_token(model, model.window_tokens) + 0.7 * cost.training_flops_per_token(
        model, L
    )
    mfu = speed * flops / 312e12
    assert mfu == pytest.approx(expected, abs=0.001)
    assert cost.tokens_per_s(312, mfu, flops) == pytest.approx(speed)
    assert cost.gpu_hours(flops * 10e9, 312, mfu) / 64 == pytest.approx(hours, rel=0.002)


def test_the_held_out_loss_costs_forward_passes_between_steps(llama, tmp_path):
    """Eight segments of each window among 8 data-parallel ranks, every 100 steps of 64 segments, 30 % of them short."""
    overrides = ("experiment=llama3_8b_128k", f"runs_folder={tmp_path}")
    mix = 0.3 * cost.training_flops_per_token(llama, 8192) + 0.7 * cost.training_flops_per_token(llama, L)
    both = cost.forward_flops_per_token(llama, 8192) + cost.forward_flops_per_token(llama, L)
    share = plan(composed(*overrides))["cost"]["held_out_share"]
    assert share == pytest.approx(8 * both / (100 * 64 * mix), rel=0.01)
    assert plan(composed(*overrides, "engine.validate_segments=9"))["cost"]["held_out_share"] == 2 * share
    assert plan(composed(*overrides, "engine.validate_every_steps=0"))["cost"]["held_out_share"] == 0


def test_states_by_zero_stage(llama):
    n, world = llama.parameters, 64
    setting = memory.MemorySetting.of(composed("experiment=llama3_8b_128k"))
    for stage, weights, gradients, optimizer in (
        (0, 1, 1, 1),
        (1, 1, 1, world),
        (2, 1, world, world),
        (3, world, world, world),
    ):
        items = memory.training_items(llama, replace(setting, zero_stage=stage))
        states = 12 if stage else 8  # without ZeRO the weights themselves are in fp32
        assert [item.bytes for item in items[:3]] == [2 * n / weights, 4 * n / gradients, states * n / optimizer]
        assert (items[3].name, items[3].bytes) == ("gradients, bfloat16", 2 * n) or stage != 1
        assert any(item.name == "gathered weights" for item in items) == (stage == 3)


def test_activations_by_hand(llama):
    t = L // 8
    assert memory.saved_inputs_bytes(32, 4096, t, 2) == 4 * GIB
    assert memory.gathered_bytes(llama, 10**9, 2) == 2 * (10**9 + 128256 * 4096)  # the head comes on top
    assert memory.gathered_bytes(llama, 10**10, 2) == 2 * llama.parameters  # a model below the limit is gathered whole
    chunk = (
        4096 * 128256 * 10 + 128256 * 4096 * 4 + t * 4096 * (2 + 8)
    )  # logits and probabilities in fp32, gradient in bf16; head gradient fp32; hidden gradient, last norm
    assert memory.loss_bytes(4096, 128256, 4096, t, 2) == chunk
    assert memory.loss_bytes(4096, 128256, 10**9, 7, 2) == memory.loss_bytes(4096, 128256, 7, 7, 2)
    norms, attention, mlp = 2 * 8 * 4096, 2 * (2 * 32 + 2 * 8) * 128, 8 * 14336
    assert memory.layer_saved_bytes(llama, 1, 2, 1) == norms + attention + mlp
    assert memory.layer_saved_bytes(llama, 1, 2, 8) == norms + attention + 2 * 32 * 128 + mlp
    repeated = 2 * (3 * 32 + 2 * 16) * 128  # 8 key heads repeated to 16 for 16 ranks
    assert memory.layer_saved_bytes(llama, 1, 2, 16) == norms + repeated + mlp
    assert memory.checkpoint_bytes(llama.parameters, 2) == 14 * llama.parameters


def test_a_layer_saves_what_the_formula_says():
    """Beside autograd: the bytes that a real bf16 layer keeps for its backward pass."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    tokens = 128
    config = composed("model=tiny_llama")
    hf_config = hf_config_of(config.model)
    hf_config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(hf_config, 0).to(torch.bfloat16)
    kept = {parameter.untyped_storage().data_ptr(): 0 for parameter in layer.parameters()}

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    x = torch.randn(1, tokens, hf_config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(tokens)[None]
    rotated = LlamaRotaryEmbedding(hf_config)(x, positions)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive = layer(x, position_embeddings=rotated, position_ids=positions)
    assert alive is not None
    assert memory.layer_saved_bytes(counts_of(hf_config, config.model), tokens, 2, 1) == pytest.approx(
        sum(kept.values()), rel=0.08
    )


def test_what_a_recomputed_layer_keeps_by_hand(llama):
    """LLaMA3-8B, 131072 tokens on one GPU: bf16 inputs of 4096, outputs of 32 heads of 128, fp32 log-sum-exps."""
    setting = memory.MemorySetting.of(composed("experiment=llama3_8b_128k", "parallel.sp=1", "hardware.gpus=8"))
    inputs, attention = 32 * L * 4096 * 2, 32 * L * 32 * (128 * 2 + 4)
    for recompute, offload, gpu, host in (
        ("layer", False, [inputs], []),
        ("keep_attention", False, [inputs, attention], []),
        ("layer", True, [inputs / 16], [inputs]),  # two of 32 layers are near
        ("keep_attention", True, [(inputs + attention) / 16], [inputs, attention]),
    ):
        items = memory.training_items(llama, replace(setting, recompute=recompute, offload_inputs=offload))[4:-3]
        assert [item.bytes for item in items if item.on_gpu] == gpu, recompute
        assert [item.bytes for item in items if not item.on_gpu] == host, recompute


def test_the_last_layers_may_keep_everything(llama):
    """With 20 of 32 layers recomputed; the peak of a recomputed layer comes after the 12 others are done."""
    setting = memory.MemorySetting.of(composed("experiment=llama3_8b_128k", "engine.recompute_layers=20"))
    t = L // 8
    saved, flight = memory.layer_saved_bytes(llama, t, 2, 8), memory.layer_flight_bytes(llama, t, 2)
    kept = 20 * (t * 4096 * 2 + memory.kept_attention_bytes(llama, t, 2))
    items = memory._activations(llama, replace(setting, chunk_tokens=1))
    loss = memory.loss_bytes(4096, 128256, 1, t, 2)
    assert sum(item.bytes for item in items) == kept + 12 * saved + max(flight, loss)
    for gpu_gib in (40, 80):
        fewest = memory.fewest_recomputed_layers(llama, setting, gpu_gib)
        assert fewest is not None and 0 < fewest < 32
        needed = [
            memory.gpu_bytes(memory.training_items(llama, replace(setting, recompute_layers=n)))
            for n in (fewest, fewest - 1)
        ]
        assert needed[0] <= 0.9 * gpu_gib * GIB < needed[1]
    assert memory.fewest_recomputed_layers(llama, setting, 10) is None
    assert memory.fewest_recomputed_layers(llama, setting, 500) == 0


def test_auto_keeps_attention_where_it_fits(llama):
    setting = memory.MemorySetting.of(composed("experiment=llama3_8b_128k"))
    needed = memory.gpu_bytes(memory.training_items(llama, replace(setting, recompute="keep_attention"))) / GIB
    at_least = needed / (1 - memory.RESERVE)
    assert memory.choose_recompute(llama, setting, at_least * 1.001)[0] == "keep_attention"
    chosen, why = memory.choose_recompute(llama, setting, at_least * 0.999)
    assert chosen == "layer"
    assert "attention's outputs of 4.06 GiB" in why
    less = memory.gpu_bytes(memory.training_items(llama, replace(setting, recompute="layer"))) / GIB
    assert needed - less == pytest.approx(4.0625)


@pytest.mark.parametrize(("gpu_gib", "chosen"), [(80, "keep_attention"), (26, "layer")])
def test_training_asks_the_same_estimate_about_its_own_gpu(gpu_gib, chosen, tmp_path, monkeypatch, capsys):
    """64 ranks of LLaMA3-8B; the GPU's memory is what the device says, not hardware.gpu_memory_gib."""
    from lr2train.train import GROUPS, _with_recompute

    config = compose("train", ["experiment=llama3_8b_128k", f"runs_folder={tmp_path}", "name=first"])
    about = SimpleNamespace(total_memory=gpu_gib * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    job, mesh, hf_config = open_run(config, "train", GROUPS), SimpleNamespace(world=64), hf_config_of(config.model)
    settled = _with_recompute(job, config, hf_config, mesh, torch.device("cuda"))  # type: ignore[arg-type]
    assert settled.engine.recompute == chosen
    assert config.engine.recompute == "auto"
    said = capsys.readouterr().err
    assert f"engine.recompute=auto takes {chosen}: with attention's outputs of 4.06 GiB" in said
    assert _with_recompute(job, config, hf_config, mesh, torch.device("cpu")).engine.recompute == "keep_attention"  # type: ignore[arg-type]
    assert _with_recompute(job, settled, hf_config, mesh, torch.device("cuda")) is settled  # type: ignore[arg-type]


def test_tiles_and_host_memory_make_room_for_long_shards(tmp_path):
    """131072 tokens of LLaMA3-8B on a GPU of 80 GB: one GPU, and eight that share a segment of a million tokens."""
    one = ("hardware.gpus=1", "parallel.sp=1", "optim.segments_per_step=1")
    million = "rope.target_window_tokens=1048576", "data.segment_tokens=1048576", "hardware.gpus=8"
    room = ("engine.tile_mlp=4096", "engine.offload_inputs=true")
    for size in (one, million):
        given = ("experiment=llama3_8b_128k", "engine=zero3_offload", f"runs_folder={tmp_path}", *size)
        assert not plan(composed(*given))["memory"]["fits"]
        tiled = plan(composed(*given, *room[:1]))["memory"]
        assert tiled["fits"]  # with few GiB to spare
        assert "engine.recompute=auto takes layer" in tiled["recompute"]
        found = plan(composed(*given, *room))["memory"]
        assert found["fits"]
        assert "engine.recompute=auto takes keep_attention" in found["recompute"]


@pytest.mark.parametrize("recompute", ["none", "layer", "keep_attention"])
@pytest.mark.parametrize("tile", [0, 128])
def test_a_layer_peaks_where_the_formula_says(recompute, tile):
    """Beside all tensors of a real bf16 layer, forward and backward, on the CPU."""
    from lr2train.attention.hf import install as install_attention
    from lr2train.config import EngineConfig
    from lr2train.model import recompute as layers
    from lr2train.parallel.mesh import Mesh

    tokens, config = 4096, composed("model=tiny_llama")
    hf_config = hf_config_of(config.model)
    lm = load.build_empty(hf_config, "bfloat16", lambda: torch.device("cpu")).train()
    attention = install_attention(lm, Mesh(), "local").segment(((0, tokens),), tokens)
    layers.install(lm, EngineConfig(recompute=recompute, tile_mlp=tile))
    x, grad = (torch.zeros(1, tokens, hf_config.hidden_size, dtype=torch.bfloat16) for _ in range(2))
    positions = torch.arange(tokens)[None]
    rotated = lm.base_model.rotary_emb(x, positions)
    live = LiveBytes([*lm.parameters(), *rotated, x, grad])
    with live:
        out = lm.base_model.layers[0](
            x.requires_grad_(), position_embeddings=rotated, position_ids=positions, use_cache=False,
            segment_attention=attention,
        )  # fmt: skip
        out.backward(grad)
    counts = counts_of(hf_config, config.model)
    formula = memory.layer_saved_bytes(counts, tokens, 2, 1, tile or None)
    formula += memory.layer_flight_bytes(counts, tokens, 2, tile or None)
    formula += sum(weight.nbytes for weight in lm.base_model.layers[0].parameters())  # their gradients
    measured = live.peak + grad.nbytes - out.nbytes  # inputs and outputs of layers are counted elsewhere
    assert measured <= formula <= 1.2 * measured


def test_offloading_moves_states_to_the_host(llama):
    config = composed("experiment=llama3_8b_128k", "engine=zero3_offload")
    setting = memory.MemorySetting.of(config)
    items = memory.training_items(llama, setting)
    assert [item.name for item in items if not item.on_gpu] == ["gradients", "fp32 weights and Adam's moments"]
    # 8 of gradients: their sums, and what the optimizer on the host reads
    assert sum(item.bytes for item in items if not item.on_gpu) == 20 * llama.parameters / 64


def test_deepspeeds_own_keys_change_the_estimate(llama):
    config = composed("experiment=llama3_8b_128k")
    config.engine.deepspeed = {"zero_optimization": {"reduce_bucket_size": 5e7, "stage3_max_live_parameters": 3e8}}
    items = {item.name: item.bytes for item in memory.training_items(llama, memory.MemorySetting.of(config))}
    assert items["reduction buckets"] == 5e7 * 4  # gradients are sent in fp32
    assert items["gathered weights"] == 2 * (3e8 + 128256 * 4096)


def test_steps_from_token_budgets_equal_the_loaders():
    config = composed("experiment=llama3_8b_128k", "data.short_tokens=3_000_000_000", "data.long_tokens=7_000_000_000")
    work = workload_of(config, 8192, 8)
    assert [(part.window, part.segments, part.span_tokens) for part in work.parts] == [
        ("short", 22889, 8192),
        ("long", 53406, L),
    ]
    assert work.steps == math.ceil((math.ceil(22889 / 8) + math.ceil(53406 / 8)) / 8) == 1193
    assert work.share(work.parts[1]) == pytest.approx(0.7, abs=1e-4)


def test_a_prepared_corpus_comes_before_token_budgets(tmp_path):
    write_json(tmp_path / "corpus.json", {"windows": {"short": {"segments": 30}, "long": {"segments": 10}}})
    work = workload_of(
        composed(f"data.path={tmp_path}", "data.short_tokens=1000000", "optim.segments_per_step=8"), 8192, 4
    )
    assert [part.segments for part in work.parts] == [30, 10]
    assert work.steps == math.ceil((8 + 3) / 2)
    assert work.origin == str(tmp_path / "corpus.json")


def test_steps_come_from_stages_or_stay_unknown():
    stages = "data.stages=[{steps: 250, length_tokens: 64, repeats: 1.0}, {steps: 50, length_tokens: 512, text: 1.0}]"
    work = workload_of(composed("data.kind=curriculum", stages), 512, 1)
    assert work.steps == 300
    assert [(part.window, part.span_tokens) for part in work.parts] == [("short", 64), ("short", 512)]
    unknown = workload_of(composed(), 8192, 64)
    assert unknown.steps is None
    assert "most expensive" in unknown.assumptions[0]
    assert workload_of(composed("optim.steps=7"), 8192, 64).steps == 7


def test_plan_of_llama3_8b(tmp_path, capsys):
    result = plan(composed("experiment=llama3_8b_128k", f"runs_folder={tmp_path}"))
    assert json.loads((tmp_path / "plan" / "plan.json").read_text()) == json.loads(json.dumps(result))
    assert result["parallel"] | {"dp": 8, "sp": 8, "accumulation": 8, "tokens_per_gpu": 16384} == result["parallel"]
    assert [(part["window"], part["strategy"]) for part in result["parallel"]["attention"]] == [
        ("short", "local"),
        ("long", "ulysses"),
    ]
    # (sp - 1) / sp * T / sp * D * (2 Hq + 2 Hkv) elements of 2 bytes, forward and again backward, in 32 layers
    assert result["parallel"]["attention"][1]["sent_gib"] * 2**30 == 7 / 8 * 131072 / 8 * 128 * (64 + 16) * 2 * 2 * 32
    assert result["memory"]["fits"]
    assert result["memory"]["total_gib"] == pytest.approx(sum(item["gib"] for item in result["memory"]["items"]))
    assert result["work"]["tokens"] == pytest.approx(10e9, rel=0.01)
    assert result["cost"]["hours"] == pytest.approx(41.5, abs=0.5)  # 54 h at the paper's 0.307
    assert result["cost"]["price_usd"] == pytest.approx(2 * result["cost"]["gpu_hours"])
    assert result["search"]["document_forwards"] == 204  # as docs/SEARCH.md says
    shown = capsys.readouterr().out
    for words in (
        "8.03B",
        "8,030,261,248",
        "dp 8 x sp 8",
        "gathered weights",
        "tokens/s/GPU",
        "assumptions",
        "6.33 PFLOP",
        "fits",
    ):
        assert words in shown


def test_the_folder_of_a_corpus_keeps_its_own_plan(tmp_path):
    (tmp_path / "corpus").mkdir()
    for name in ("plan.json", "prepare.config.json"):
        (tmp_path / "corpus" / name).write_text("{}")
    with pytest.raises(UserError, match=r"belongs to a run of prepare.*choose another name="):
        plan(composed("experiment=tiny_4k", "name=corpus", f"runs_folder={tmp_path}"))
    assert (tmp_path / "corpus" / "plan.json").read_text() == "{}"


def test_a_model_that_does_not_fit_is_reported(tmp_path, capsys):
    few = ("hardware.gpus=1", "parallel.sp=1", "optim.segments_per_step=1")
    result = plan(composed("experiment=llama3_8b_128k", *few, f"runs_folder={tmp_path}"))
    assert not result["memory"]["fits"]
    assert "does not fit by" in capsys.readouterr().out
    assert any("parallel.sp=4 hardware.gpus=4" in one["settings"] for one in result["memory"]["remedies"])  # together
    for one in result["memory"]["remedies"]:
        changed = plan(composed("experiment=llama3_8b_128k", *few, *one["settings"].split(), f"runs_folder={tmp_path}"))
        assert changed["memory"]["fits"], one
        assert changed["memory"]["total_gib"] == pytest.approx(one["total_gib"]), one


def test_the_remedies_of_a_small_shortage_are_single_settings_that_fit(tmp_path, capsys):
    """LLaMA3-8B on 64 GPUs takes 19.8 GiB with recompute=layer, and a GPU of 21 GiB leaves 18.9."""
    small = ("experiment=llama3_8b_128k", "hardware.gpu_memory_gib=21", f"runs_folder={tmp_path}")
    found = plan(composed(*small))["memory"]
    assert found["remedies"] and found["closest"] is None
    assert "GiB)" in capsys.readouterr().out
    for one in found["remedies"]:
        assert " " not in one["settings"]
        changed = plan(composed(*small, one["settings"]))["memory"]
        assert changed["fits"] and changed["total_gib"] == pytest.approx(one["total_gib"]), one


def test_what_nothing_remedies_says_by_how_much_the_best_misses(tmp_path, capsys):
    tiny = ("hardware.gpu_memory_gib=2", f"runs_folder={tmp_path}")
    found = plan(composed("experiment=llama3_8b_128k", *tiny))["memory"]
    assert found["remedies"] == []
    assert found["closest"]["total_gib"] < found["total_gib"]
    assert "misses by" in " ".join(capsys.readouterr().out.split())


def test_a_model_that_is_not_extended_has_no_search(tmp_path):
    result = plan(
        composed(
            "model=tiny_llama",
            "rope.target_window_tokens=512",
            "hardware.gpus=2",
            "engine.recompute=none",
            f"runs_folder={tmp_path}",
        )
    )
    assert result["search"] is None
    assert result["work"]["steps"] is None
    assert result["cost"]["hours"] is None


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("hardware.gpus=60",), "hardware.gpus=60"),
        (("parallel.sp=64", "parallel.strategy=ulysses"), "parallel.sp=64"),
        (("optim.segments_per_step=12",), "optim.segments_per_step=12"),
        (("data.segment_tokens=131071",), "data.segment_tokens=131071"),
        (("hardware.mfu=0",), "hardware.mfu"),
        (("engine.offload_inputs=true", "engine.recompute=none"), "engine.recompute=none"),
        (("engine.tile_mlp=64", "model.architecture.model_type=mixtral"), "engine.tile_mlp=64 .* has experts"),
        (("model=none", "model.path=nowhere/model"), "model.path=nowhere/model"),
    ],
)
def test_refusals_name_the_key(overrides, key, tmp_path):
    with pytest.raises(UserError, match=key):
        plan(composed("experiment=llama3_8b_128k", *overrides, f"runs_folder={tmp_path}"))


def test_numbers_are_short():
    assert [tables.amount(n) for n in (8_030_261_248, 525_336_576, 1536, 12)] == ["8.03B", "525.34M", "1.54k", "12"]
    assert tables.flops(6.61e15) == "6.61 PFLOP"
    assert [tables.hours(h) for h in (41.46, 0.5, 0.001)] == ["41.5 h", "30.0 min", "3.6 s"]


def test_the_command_prints_the_estimate_within_a_minute(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", "experiment=phi3_mini_128k", f"runs_folder={tmp_path}", "name=phi"])
    start = time.monotonic()
    main("plan", plan)
    assert time.monotonic() - start < 60
    assert "3.82B" in capsys.readouterr().out
    assert (tmp_path / "phi" / "plan.json").exists()
