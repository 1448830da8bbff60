"""The load-balancing loss of a mixture of experts, over a segment that several ranks share.

    E * sum_e f_e P_e     f_e: (token, choice) pairs that chose expert e, per token; P_e: mean probability of expert e

over the tokens of all layers (Switch Transformer, arXiv 2101.03961, eq. 4 to 6; there are k choices a token here). It
is E * k / E = k where all experts are chosen alike.

Choice: as in transformers, training adds this loss where the config has ``output_router_logits`` and
``router_aux_loss_coef``. The counts f are summed over the ranks of the segment, and have no gradient. The loss is
linear in P, so each rank returns its own tokens' part: the parts add up to the loss, and their gradients to its
gradient. A family whose own code computes another loss is refused by name. Cost: one all-reduce of E numbers for a
segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lr2train import progress
from lr2train.attention.segment import SegmentAttention
from lr2train.config import UserError
from lr2train.model.head import forward_alone

_TOLERANCE = 1e-5  # relative, fp32
_TOKENS, _LAYERS = 12, 3  # of the invented router logits
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOICES = ("num_experts_per_tok", "moe_k", "moe_top_k")


@dataclass(frozen=True)
class RouterLoss:
    """The load-balancing loss of a model.

    Attributes:
        coefficient: what the loss is multiplied by before it is added to the loss of the tokens.
        n_choices: experts of a token, k.
    """

    coefficient: float
    n_choices: int

    def __call__(self, gate_logits: Sequence[Tensor], attention: SegmentAttention) -> Tensor:
        """This rank's part of the loss of a segment (fp32 scalar), before the coefficient. A collective of the ranks
        that share the segment.

        Args:
            gate_logits: of each layer with experts, [T/sp, E]: of this rank's tokens.
            attention: of the segment; tokens outside documents do not count.
        """
        inside = attention.inside(gate_logits[0].device)
        counts, probabilities = summed(gate_logits, self.n_choices, inside)
        if attention.mesh.sp_size > 1:
            dist.all_reduce(counts, group=attention.mesh.sp_group)
        n_rows = max(1, attention.segment.n_inside) * len(gate_logits)
        return (counts / n_rows * probabilities / n_rows).sum() * len(counts)


def summed(gate_logits: Sequence[Tensor], n_choices: int, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Over layers and tokens: how often each expert was chosen [E], without gradient, and its probabilities [E]."""
    n_experts = gate_logits[0].shape[-1]
    weights = inside.to(torch.float32)
    counts = weights.new_zeros(n_experts)
    sums = []
    for logits in gate_logits:
        probabilities = torch.softmax(logits, dim=-1)
        chosen = probabilities.detach().topk(n_choices, dim=-1).indices
        counts.scatter_add_(0, chosen.flatten(), weights.repeat_interleave(n_choices))
        sums.append((probabilities.float() * weights[:, None]).sum(0))
    return counts, torch.stack(sums).sum(0)


def router_loss_of(model: Any) -> RouterLoss | None:
    """The load-balancing loss of a Hugging Face causal LM; None where its config asks for none.

    Raises:
        UserError: the model's own code computes another loss.
    """
    config = model.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if not coefficient or not hasattr(config, "output_router_logits"):
        return None
    if not config.output_router_logits:
        progress.say(
            "model",
            f"the config has output_router_logits=false, so its router_aux_loss_coef={coefficient} adds no loss; "
            "set model.overrides.output_router_logits=true to add it",
        )
        return None
    found = RouterLoss(float(coefficient), _named(model, _CHOICES))
    _refuse_another_loss(model, found, _named(model, _EXPERTS))
    return found


def _named(model: Any, keys: Sequence[str]) -> int:
    config = model.config.get_text_config()
    found = [value for key in keys if isinstance(value := getattr(config, key, None), int)]
    if not found:
        raise _another_loss(model)
    return found[0]


@torch.no_grad()
def _refuse_another_loss(model: Any, ours: RouterLoss, n_experts: int) -> None:
    """Run the model's own code over invented router logits, with and without the loss."""
    generator = torch.Generator().manual_seed(0)
    gates = tuple(torch.randn(_TOKENS, n_experts, generator=generator) for _ in range(_LAYERS))
    inside = torch.arange(_TOKENS) < _TOKENS - 2
    given = {"labels": torch.zeros(1, _TOKENS, dtype=torch.int64), "attention_mask": inside[None].long()}
    with_it, without = (
        forward_alone(model, _TOKENS, router_logits=gates, output_router_logits=wanted, **given)
        for wanted in (True, False)
    )
    counts, probabilities = summed(gates, ours.n_choices, inside)
    n_rows = int(inside.sum()) * _LAYERS
    expected = (counts / n_rows * probabilities / n_rows).sum() * n_experts
    theirs = getattr(with_it, "aux_loss", None)
    if not isinstance(theirs, Tensor) or not bool((theirs - expected).abs() <= _TOLERANCE * expected):
        raise _another_loss(model)
    added = (with_it.loss - without.loss).item()
    if abs(added - ours.coefficient * expected.item()) > _TOLERANCE * max(abs(with_it.loss.item()), 1):
        raise _another_loss(model)


def _another_loss(model: Any) -> UserError:
    return UserError(
        f"{type(model).__name__} computes its router's loss in a way that is not known here; set "
        "model.overrides.output_router_logits=false to train without this loss"
    )
