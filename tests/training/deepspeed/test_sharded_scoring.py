"""A model divided over two ranks gives the scores of a whole model, with documents and factors of its own on each
rank.
"""

import gc

import numpy as np
import pytest
import torch
from ranks import run_ranks

from lr2train.config import ModelConfig
from lr2train.model import load, rotary
from lr2train.model import score as score_module
from lr2train.model.score import score
from lr2train.rope import METHODS, Factors, Spectrum

L0, L, VOCAB = 64, 256, 400
ARCHITECTURE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": L0, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}  # fmt: skip
# As with a large model: no parameter is too small to be divided, and not all of it is fetched ahead.
LARGE = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 6000}}
# tied embeddings, dtype, and how far apart two orders of the same sums may be (a gathered weight lies elsewhere in
# memory)
KINDS = {"tied": (True, "float32", 1e-6), "untied": (False, "float32", 1e-6), "bfloat16": (True, "bfloat16", 1e-2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models")
    for kind, (tied, *_) in KINDS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", **ARCHITECTURE, tie_word_embeddings=tied)
        )
        load.write_folder(model, load.plain_config(model.config), folder / kind)
    return folder


def factors(number: int) -> Factors:
    return METHODS["longrope2"](
        Spectrum(8, 1000.0, L0), L, critical_index=2, tail=[4.0 + 0.3 * number, 6.0], attention_factor=1 + number / 50
    )


def document(number: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Documents of unlike lengths and answers."""
    rng = np.random.default_rng(number)
    length = int(rng.integers(80, L))
    return rng.integers(2, VOCAB, length), [(10, 12 + number), (length - 7, length - 1)]


def jobs(rank: int) -> list[tuple[int, int, int]]:
    """(document, factors, chunk_tokens) of a rank; between them, ranks disagree on all three."""
    return [(2 * n + rank, 7 * rank - n, (0, 32 + 9 * rank)[n % 2]) for n in range(6)]


def scores(model, table, rank: int) -> list[tuple[float, ...]]:
    out = []
    for number, which, chunk_tokens in jobs(rank):
        table.use(factors(which))
        out.append(score(model, table, "long", *document(number), chunk_tokens).nlls)
    return out


def numbers_here(model) -> int:
    """Parameters that are whole on this rank now."""
    return sum(parameter.numel() for parameter in model.parameters())


def on_a_rank(rank: int, world: int, folder):
    from lr2train.training.deepspeed.scoring import load_sharded

    return [on_one_kind(rank, folder / kind, dtype, load_sharded) for kind, (_, dtype, _) in KINDS.items()]


def on_one_kind(rank: int, folder, dtype: str, load_sharded):
    model = load_sharded(ModelConfig(path=str(folder), dtype=dtype), torch.device("cpu"), LARGE)
    table = rotary.install(model, factors(0))
    gc.collect()  # nothing that is needed hangs on a forgotten reference
    score_module.CHUNK = (
        10  # ranks whose documents have unlike numbers of answers look at unlike numbers of chunks of logits
    )
    gathered: list[int] = []
    for layer in model.base_model.layers:
        layer.self_attn.register_forward_hook(lambda *_: gathered.append(numbers_here(model)))
    found = scores(model, table, rank)
    kept = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
    after = numbers_here(model)
    whole = load.load_whole(folder, dtype)
    return (
        found,
        scores(whole, rotary.install(whole, factors(0)), rank),
        kept,
        max(gathered),
        after,
        numbers_here(whole),
    )


def test_two_ranks_score_as_a_whole_model_and_hold_half_of_it(folder, tmp_path):
    ranks = run_ranks(on_a_rank, 2, folder, tmp_path=tmp_path, timeout_s=240)
    for (_, _, bound), by_rank in zip(KINDS.values(), zip(*ranks, strict=True), strict=True):
        for found, expected, kept, gathered, after, n_parameters in by_rank:
            assert [pytest.approx(one, rel=bound) for one in expected] == found
            assert len(set(found)) == len(found)
            assert kept == pytest.approx(n_parameters / 2, rel=0.01), "each rank keeps half"
            assert 0 < gathered < 0.8 * n_parameters, "some layers are whole at one time"
            assert after == 0, "and none in the end"
