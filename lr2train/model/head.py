"""The head of a causal LM: how the products of the hidden states with its weight become logits.

Choice: the logits of a long segment never exist whole, so the model's own forward pass cannot compute them. Families
scale the products (Granite, Cohere) or cap them (Gemma 2), each under a key of its own, and one key divides in one
family and multiplies in another. So the form is measured: the model's own forward code runs once over invented hidden
states and a small head, and the form that gives the same logits is taken. A family with another form is refused by
name. Cost: a call of about a millisecond.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lr2train.config import UserError
from lr2train.model import config_json

_TOLERANCE = 1e-5  # relative, fp32; another form differs by more than a thousand times this
_SIZE = 16  # tokens of the invented vocabulary
# Keys under which families name a factor of their logits.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")


class LogitForm(NamedTuple):
    """Logits from products x of hidden states and head: ``scale x``, or ``softcap tanh(scale x / softcap)``.

    The cap is that of Gemma 2 (arXiv 2408.00118, section 2).
    """

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, products: Tensor) -> Tensor:
        """Logits of a shape [..., V] of products; may change the products in place. Not for autograd."""
        if self.scale != 1:
            products = products.mul_(self.scale)
        return products if self.softcap is None else products.div_(self.softcap).tanh_().mul_(self.softcap)

    def to_products(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient of the products from the gradient of the logits; may change ``grad`` in place."""
        if self.softcap is not None:
            grad = grad.mul_(1 - (logits / self.softcap).square_())
        return grad if self.scale == 1 else grad.mul_(self.scale)


PLAIN = LogitForm()


@torch.no_grad()
def form_of(model: Any) -> LogitForm:
    """The form of the logits of a Hugging Face causal LM on any device, the meta device too.

    Raises:
        UserError: the head is no linear layer, has a bias, or its logits have another form.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise UserError(
            f"{type(model).__name__} has no plain linear head without bias; set model.path to a model that has one"
        )
    small, hidden = _small_head(head.in_features), _hidden(head.in_features, _SIZE)
    theirs = forward_alone(model, _SIZE).logits
    for form in _candidates(model.config.get_text_config()):
        ours = form.logits(small(hidden))
        if theirs.shape == ours.shape and (ours - theirs).abs().max() <= _TOLERANCE * theirs.abs().max():
            return form
    raise UserError(
        f"{type(model).__name__} computes its logits from its head in a form that the chunked loss does not know; set "
        "model.path to another model"
    )


def _candidates(config: Any) -> Iterator[LogitForm]:
    named = [value for key in _SCALES if isinstance(value := getattr(config, key, None), (int, float)) and value]
    softcap = getattr(config, "final_logit_softcapping", None)
    for scale in (1.0, *(form for value in named for form in (float(value), 1 / value))):
        yield LogitForm(scale, softcap or None)


def forward_alone(model: Any, n_tokens: int, router_logits: Any = None, **given: Any) -> Any:
    """The output of the model's own forward pass over invented hidden states, under a small invented head.

    No weight of the model is read.

    Args:
        model: a Hugging Face causal LM on any device, the meta device too.
        n_tokens: length of the invented text.
        router_logits: what the decoder layers are to record of their routers.
        given: further arguments of the forward pass.

    Raises:
        UserError: the forward pass wants more than hidden states from the decoder layers.
    """
    width = model.get_output_embeddings().in_features
    probe = copy.copy(model)  # shares all but its direct modules, two of which are exchanged
    probe._modules = dict(model._modules)
    setattr(probe, model.base_model_prefix, _Gives(_hidden(width, n_tokens), router_logits))
    probe.set_output_embeddings(_small_head(width))
    probe.config = copy.copy(model.config)
    probe.config.vocab_size = probe.vocab_size = _SIZE  # families give one of the two to their loss
    try:
        return type(model).forward(probe, input_ids=torch.zeros(1, n_tokens, dtype=torch.int64), **given)
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        raise UserError(
            f"{type(model).__name__} has a head that cannot be run alone ({config_json.brief(error)}); set model.path "
            "to another model"
        ) from error


def _hidden(width: int, n_tokens: int) -> Tensor:
    return torch.randn(1, n_tokens, width, generator=torch.Generator().manual_seed(0))


def _small_head(width: int) -> nn.Linear:
    """A head whose products reach beyond every usual cap."""
    head = nn.Linear(width, _SIZE, bias=False, device="meta").to_empty(device="cpu").requires_grad_(False)
    head.weight.copy_(torch.randn(_SIZE, width, generator=torch.Generator().manual_seed(1)) * 20 * width**-0.5)
    return head


class _Gives(nn.Module):
    """In the place of the decoder layers."""

    def __init__(self, hidden: Tensor, router_logits: Any):
        super().__init__()
        self._given = hidden, router_logits

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        hidden, router_logits = self._given
        return MoeModelOutputWithPast(last_hidden_state=hidden, router_logits=router_logits)
