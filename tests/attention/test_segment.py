"""One object serves a segment's attention: made once, shared by all layers and the backward, gone with the segment."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from lr2train.attention.choice import Layers
from lr2train.attention.hf import ModelAttention
from lr2train.attention.strategies import STRATEGIES
from lr2train.parallel.mesh import Mesh
from tests.attention.reference import attend_explicitly, random_qkv, relative_error

N_TOKENS = 32
SPANS = ((0, 5), (5, 21), (22, 29))
SLIDING = Layers(4, 2, 8, ((None, 1), (4, 1), (100, 1)))
CPU = torch.device("cpu")


def model_attention(strategy: str = "auto", mesh: Mesh | None = None) -> ModelAttention:
    return ModelAttention(mesh or Mesh(), SLIDING, strategy)


def test_layers_of_one_sliding_window_share_what_was_prepared(monkeypatch):
    """A window as long as the longest document hides nothing: such layers share with the full ones."""
    prepared = []

    def prepare(segment, mesh, sliding_window):
        prepared.append(sliding_window)
        return local.prepare(segment, mesh, sliding_window)

    local = STRATEGIES["local"]
    monkeypatch.setitem(STRATEGIES, "noting", replace(local, name="noting", prepare=prepare))
    attention = model_attention("noting").segment(SPANS, N_TOKENS)
    q, k, v = random_qkv(N_TOKENS, 4, 2, 8)
    for sliding_window in (None, 4, 16, 100, 4, None):
        out = attention(q, k, v, 0.3, sliding_window)
        expected, _ = attend_explicitly(q, k, v, SPANS, 0.3, sliding_window=sliding_window)
        assert relative_error(out, expected) < 1e-5
    assert prepared == [None, 4]


@pytest.mark.parametrize("strategy", ["ulysses", "ring", "ulysses_ring"])
def test_positions_count_within_documents_and_lie_as_the_tokens_lie(strategy):
    whole = torch.zeros(N_TOKENS, dtype=torch.int64)
    for start, stop in SPANS:
        whole[start:stop] = torch.arange(stop - start)
    for rank in range(4):
        mesh = Mesh(world=4, sp_size=4, sp_rank=rank, ring_size=2)
        attention = model_attention(strategy, mesh).segment(SPANS, N_TOKENS)
        with torch.inference_mode():
            positions = attention.positions(CPU)
        assert not positions.is_inference(), "an evaluation may ask first, and training must be able to use them"
        assert torch.equal(positions, whole[attention.layout.indices])
        assert attention.positions(CPU) is positions


def test_nothing_outlives_the_segment():
    """No global cache keeps what was computed from a segment: not its rounds, nor its ring."""
    attention = model_attention().segment(SPANS, N_TOKENS)
    q, k, v = (x.requires_grad_() for x in random_qkv(N_TOKENS, 4, 2, 8))
    out = attention(q, k, v, 0.3, 4)
    out.sum().backward()
    gone = [weakref.ref(attention), weakref.ref(attention.segment)]
    del attention, out
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_a_layer_whose_sliding_window_the_config_does_not_name_is_our_own_mistake():
    attention = model_attention().segment(SPANS, N_TOKENS)
    with pytest.raises(AssertionError, match="sliding window 7"):
        attention(*random_qkv(N_TOKENS, 4, 2, 8), 0.3, 7)
