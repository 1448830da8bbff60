"""What layers keep in host memory leaves the device and comes back whole, however late the copies are made."""

import weakref
from collections import deque

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lr2train.config import EngineConfig
from lr2train.model import recompute
from lr2train.model.host_copies import HostCopies, _Plain
from tests.attention.test_families import N_TOKENS, SEGMENTS, gradients, segment, tiny_model

LAYERS = 5


class Late(_Plain):
    """A stream whose copies are made as late as possible: when somebody waits. Until then their room holds NaN.

    Both tensors are held weakly: who frees one before the copy is made gets an error.
    """

    def __init__(self) -> None:
        self.queue: deque[tuple[int, weakref.ref, weakref.ref]] = deque()
        self.begun = 0

    def copy(self, to, x):
        to.fill_(torch.nan)
        self.begun += 1
        self.queue.append((self.begun, weakref.ref(to), weakref.ref(x)))
        return self.begun

    def wait(self, copied):
        while self.queue and self.queue[0][0] <= copied:
            _, to, x = self.queue.popleft()
            to, x = to(), x()
            assert to is not None and x is not None, "freed before it was copied"
            to.copy_(x)


def offloaded_model(how: str, side):
    from lr2train.attention.hf import install
    from lr2train.parallel.mesh import Mesh

    model = tiny_model("qwen3", {"num_hidden_layers": LAYERS}, torch.float32).train()
    attention = install(model, Mesh(), "local")
    recompute.install(model, EngineConfig(recompute=how, offload_inputs=side is not None))
    if side is not None:
        copies = model.model.layers[0]._gradient_checkpointing_func.copies
        copies.side_of = lambda _: side
        assert all(layer._gradient_checkpointing_func.copies is copies for layer in model.model.layers)
    return model, attention


def micro_batches(model, attention) -> dict[str, torch.Tensor]:
    """Gradients summed over two segments."""
    for name in ("short", "long"):
        ids, positions, weights = segment(SEGMENTS[name])
        given = attention.segment(SEGMENTS[name], N_TOKENS)
        logits = model(input_ids=ids, position_ids=positions, segment_attention=given, use_cache=False).logits
        (logits * weights).sum().backward()
    return gradients(model)


@pytest.mark.parametrize("how", ["layer", "keep_attention"])
def test_copies_that_are_made_late_are_waited_for(how):
    expected = micro_batches(*offloaded_model(how, None))
    side = Late()
    found = micro_batches(*offloaded_model(how, side))
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
    of_a_layer = 1 if how == "layer" else 3  # its input; attention's out and lse
    there_and_back = 2 * LAYERS - 2  # the last two layers have not left when the backward pass begins
    assert side.begun == 2 * of_a_layer * there_and_back


def test_two_layers_are_on_the_device_and_a_dropped_graph_leaves_nothing():
    copies, near, hosts = HostCopies(), [], []
    x = torch.ones(3, requires_grad=True)
    for _ in range(LAYERS):
        layer = copies.layer(x.device)
        with torch.autograd.graph.saved_tensors_hooks(layer.keep, layer.take):
            x = checkpoint(lambda x: (x * x).exp(), x, use_reentrant=False)
        kept = layer.kept[0]
        near.append(weakref.ref(kept))
        hosts.append(weakref.ref(kept.far))
        del kept, layer
    assert [one().near is None for one in near] == [True] * (LAYERS - 2) + [False] * 2
    del x
    assert not any(host() is not None for host in hosts)
    assert copies.layer(torch.device("cpu")).kept == []
    assert len(copies.layers) == 1
