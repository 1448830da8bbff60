"""The chunked loss against cross-entropy over whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lr2train.model import loss
from lr2train.model.loss import IGNORE, LossHead
from tools.bench.live_bytes import LiveBytes

T, H, V = 37, 12, 50


@pytest.fixture(params=[False, True], ids=["two passes", "one pass"])
def one_pass(request):
    """Whether the forward pass computes the gradients."""
    return request.param


def case(dtype=torch.float64):
    """hidden [T, H], head, labels [T] with 26 targets among 37 positions."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = nn.Linear(H, V, bias=False, dtype=dtype)
    head.weight.data = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(V, (T,), generator=generator)
    labels[torch.randperm(T, generator=generator)[26:]] = IGNORE
    return hidden, head, labels


def whole(hidden, weight, labels):
    """(loss, gradient of hidden, gradient of weight) over whole logits in fp64."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    value = F.cross_entropy(h @ w.T, labels, reduction="sum", ignore_index=IGNORE)
    return value.detach(), *torch.autograd.grad(value, (h, w))


@pytest.mark.parametrize("chunk", [1, 5, 13, 26, T, 1000])  # 26 targets: 13 and 26 divide it, 5 does not
def test_value_and_gradients_equal_whole_logits(chunk, one_pass):
    hidden, head, labels = case()
    value = LossHead(head, chunk, one_pass=one_pass)(hidden, labels)
    (3.0 * value).backward()  # a scale, as the engine uses one
    expected, grad_hidden, grad_weight = whole(hidden, head.weight, labels)
    # both in fp64: sums of up to 37 x 50 terms in another order, so a few hundred roundings of 1e-16
    torch.testing.assert_close(value.detach(), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(hidden.grad, 3 * grad_hidden, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(head.weight.grad, 3 * grad_weight, rtol=1e-12, atol=1e-13)


def test_known_targets_give_the_same_bits_and_the_host_reads_nothing_from_the_device():
    """On fake tensors a look at a value raises, as a sum over labels or ``nonzero`` would need it."""
    hidden, head, labels = case(torch.bfloat16)
    targets = (labels != IGNORE).nonzero().flatten()
    found = []
    for given in ((), (targets,)):
        value = LossHead(head, 8)(hidden, labels, *given)
        found.append([value, *torch.autograd.grad(value, (hidden, head.weight))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    with FakeTensorMode() as mode:
        hidden, head, labels, targets = (mode.from_tensor(x) for x in (hidden, head.weight, labels, targets))
        module = LossHead(nn.Linear(H, V, bias=False), 8)
        module.weight = nn.Parameter(head)
        module(hidden, labels, targets).backward()
        with pytest.raises(DynamicOutputShapeException):
            module(hidden, labels)


def test_without_targets_loss_and_gradients_are_zero(one_pass):
    hidden, head, labels = case(torch.float32)
    value = LossHead(head, 8, one_pass=one_pass)(hidden, torch.full_like(labels, IGNORE))
    value.backward()
    assert value.item() == 0.0
    assert value.dtype == torch.float32
    assert hidden.grad is not None and not hidden.grad.any()
    assert head.weight.grad is not None and not head.weight.grad.any()


def test_bfloat16_sums_in_float32(one_pass):
    """From the same bf16 numbers the loss differs only by the bf16 logits: 2^-9 of a logit each, averaging out over the
    targets.
    """
    hidden, head, labels = case(torch.bfloat16)
    value = LossHead(head, 8, one_pass=one_pass)(hidden, labels)
    value.backward()
    expected, grad_hidden, grad_weight = whole(hidden, head.weight, labels)
    assert value.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert head.weight.grad is not None and head.weight.grad.dtype == torch.bfloat16
    assert value.item() == pytest.approx(expected.item(), rel=2e-3)
    for ours, theirs in ((hidden.grad, grad_hidden), (head.weight.grad, grad_weight)):
        # a bf16 carries 2^-9 = 0.002; softmax and two products
        assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()


def test_many_bfloat16_chunks_do_not_lose_the_weights_gradient(one_pass):
    """Added up in bf16, thousands of small terms would stop counting; each chunk's part is added in fp32."""
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16, requires_grad=True)
    head = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(head.weight)
    LossHead(head, 1, one_pass=one_pass)(hidden, torch.zeros(4096, dtype=torch.int64)).backward()
    assert head.weight.grad is not None
    assert head.weight.grad[:, 0].tolist() == [-2048.0, 2048.0]  # 4096 x (softmax(0, 0) - (1, 0)), exact


def test_a_tied_weight_gathers_both_gradients(one_pass):
    embedding, labels = nn.Embedding(V, H, dtype=torch.float64), case()[2]
    tokens = torch.arange(T) % V
    head = nn.Linear(H, V, bias=False, dtype=torch.float64)
    head.weight = embedding.weight
    LossHead(head, 5, one_pass=one_pass)(torch.tanh(embedding(tokens)), labels).backward()
    ours, embedding.weight.grad = embedding.weight.grad, None
    F.cross_entropy(
        torch.tanh(embedding(tokens)) @ embedding.weight.T, labels, reduction="sum", ignore_index=IGNORE
    ).backward()
    torch.testing.assert_close(ours, embedding.weight.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_gives_the_gradients_of_two_within_rounding(dtype):
    """The scale is known to the backward alone; it is no power of two, and is not rounded to bfloat16."""
    found = []
    for one_pass in (False, True):
        hidden, head, labels = case(dtype)
        value = LossHead(head, 5, one_pass=one_pass)(hidden, labels)
        found.append([value.detach(), *torch.autograd.grad(value, (hidden, head.weight), torch.tensor(0.1234567))])
    for two, one in zip(*found, strict=True):
        assert one.dtype == two.dtype
        # Two roundings more of each element; and exp(log p) has the rounding of log p, which reaches -15 here.
        assert (one.double() - two.double()).norm() < 4 * torch.finfo(dtype).eps * two.double().norm()
        assert (one.double().norm() / two.double().norm() - 1).abs() < torch.finfo(dtype).eps / 8 + 1e-6


def test_a_scale_that_is_not_a_number_reaches_every_gradient_of_one_pass():
    hidden, head, labels = case(torch.bfloat16)
    value = LossHead(head, 5, one_pass=True)(hidden, labels)
    gradients = torch.autograd.grad(value, (hidden, head.weight), torch.tensor(torch.nan), retain_graph=True)
    assert value.isfinite()
    assert all(gradient.isnan().all() for gradient in gradients)
    with pytest.raises(AssertionError, match="one backward pass"):
        torch.autograd.grad(value, (hidden, head.weight))


def test_one_pass_computes_no_gradient_where_none_is_wanted():
    hidden, head, labels = case(torch.float32)
    with torch.no_grad(), Products() as products:
        value = LossHead(head, 5, one_pass=True)(hidden, labels)
    assert value.grad_fn is None
    assert products.count == 6, "26 targets in chunks of 5: logits alone"


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.linear)
        return function(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, forward or backward."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(part.numel() for part in tree_leaves(made) if isinstance(part, torch.Tensor))])
        return made


def test_logits_never_exceed_a_chunk(monkeypatch, one_pass):
    rows, linear = [], F.linear
    monkeypatch.setattr(loss.F, "linear", lambda x, weight: (rows.append(len(x)), linear(x, weight))[1])
    hidden, head, labels = case()
    with Largest() as largest:
        LossHead(head, 8, one_pass=one_pass)(hidden, labels).backward()
    passes = 1 if one_pass else 2  # forward; and backward
    assert rows == [8, 8, 8, 2] * passes, "26 targets; positions without a target cost nothing"
    assert largest.numel == max(8 * V, T * H, V * H) < 26 * V
    with Largest() as largest:  # the check itself is checked: it finds whole logits where they exist
        whole(hidden, head.weight, labels)
    assert largest.numel == T * V


def test_the_logits_of_a_chunk_are_free_when_the_next_ones_are_made(one_pass):
    """More chunks of one size take no more memory than one, but for what grows with the tokens themselves."""
    chunk, width, vocabulary = 64, 4, 4096
    head = nn.Linear(width, vocabulary, bias=False)
    peaks = []
    for n_tokens in (chunk, 4 * chunk):
        hidden, labels = torch.randn(n_tokens, width, requires_grad=True), torch.randint(vocabulary, (n_tokens,))
        with LiveBytes() as live:
            LossHead(head, chunk, one_pass=one_pass)(hidden, labels).backward()
        peaks.append(live.peak)
    logits = 4 * chunk * vocabulary
    assert peaks[0] < 4 * logits
    assert peaks[1] - peaks[0] < 0.1 * logits
