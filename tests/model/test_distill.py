"""The loss of two targets against a plain version over whole logits, in fp64."""

import pytest
import torch
import torch.nn.functional as F

from lr2train.model.distill import DistillHead
from lr2train.model.head import LogitForm
from lr2train.model.loss import IGNORE, LossHead
from tests.model.test_loss import V, case

WEIGHT = 1.7
FORMS = [LogitForm(), LogitForm(0.3), LogitForm(1.0, 2.5), LogitForm(2.0, 4.0)]


def other_model(dtype=torch.float64):
    """hidden [T, H] and head [V, H] of the original model."""
    hidden, head, _ = case(dtype)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(V, head.in_features, generator=generator, dtype=torch.float64).to(dtype)
    return (hidden.flip(0) * 0.7).detach(), (head.weight + 0.5 * noise).detach()


def plain(hidden, weight, labels, form: LogitForm):
    """(total, loss, divergence) over whole logits, with torch's own functions."""

    def logits(states, head):
        scaled = form.scale * (states @ head.T)
        return scaled if form.softcap is None else form.softcap * torch.tanh(scaled / form.softcap)

    own, theirs = (logits(*pair)[labels != IGNORE] for pair in ((hidden, weight), other_model(hidden.dtype)))
    loss = F.cross_entropy(own, labels[labels != IGNORE], reduction="sum")
    divergence = F.kl_div(own.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True)
    return loss + WEIGHT * divergence, loss, divergence


def distilled(head: DistillHead, hidden, labels):
    targets = (labels != IGNORE).nonzero().flatten()
    return head(hidden, labels, targets, *other_model(hidden.dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 2, 9, 26, 52, 1000])  # half of it is taken; of 26 targets
def test_values_and_gradients_equal_whole_logits(chunk, form):
    hidden, head, labels = case()
    found = distilled(DistillHead(head, chunk, form, WEIGHT), hidden, labels)
    (3.0 * found[0]).backward()  # a scale, as the engine uses one
    h, w = hidden.detach().requires_grad_(), head.weight.detach().requires_grad_()
    expected = plain(h, w, labels, form)
    (3.0 * expected[0]).backward()
    torch.testing.assert_close(found.detach(), torch.stack(expected).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(hidden.grad, h.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(head.weight.grad, w.grad, rtol=1e-11, atol=1e-12)


def test_bfloat16_comes_near_and_sums_in_float32():
    hidden, head, labels = case(torch.bfloat16)
    found = distilled(DistillHead(head, 8, LogitForm(), WEIGHT), hidden, labels)
    found[0].backward()
    h, w = hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    expected = plain(h, w, labels, LogitForm())
    expected[0].backward()
    assert found.dtype == torch.float32
    assert (hidden.grad.dtype, head.weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(found.double(), torch.stack(expected).detach(), rtol=2e-2, atol=0)
    for gradient, exact in ((hidden.grad, h.grad), (head.weight.grad, w.grad)):
        assert (gradient.double() - exact).norm() < 2e-2 * exact.norm()


def test_a_model_at_its_original_has_no_divergence_and_the_gradient_of_the_loss_alone():
    hidden, head, labels = case()
    targets = (labels != IGNORE).nonzero().flatten()
    _, loss, divergence = DistillHead(head, 8, LogitForm(), WEIGHT)(
        hidden, labels, targets, hidden.detach(), head.weight.detach()
    )
    assert abs(divergence.item()) < 1e-12 * loss.item()


def test_loss_and_divergence_alone_have_no_gradient_and_long_segments_the_usual_loss():
    hidden, head, labels = case()
    ours = DistillHead(head, 8, LogitForm(), WEIGHT)
    (gradient,) = torch.autograd.grad(distilled(ours, hidden, labels)[1:].sum(), hidden, allow_unused=True)
    assert gradient is None or not gradient.any()
    assert torch.equal(ours(hidden, labels), LossHead(head, 8)(hidden, labels))


def test_a_shard_without_targets_adds_nothing():
    hidden, head, labels = case(torch.float32)
    nothing = torch.full_like(labels, IGNORE)
    found = distilled(DistillHead(head, 8, LogitForm(), WEIGHT), hidden, nothing)
    found[0].backward()
    assert not found.any()
    assert hidden.grad is not None
    assert not hidden.grad.any()
