"""The MLP of a layer in tiles of tokens, so that its wide activations exist for one tile at a time.

A gated MLP holds 4 F numbers a token for its backward pass, and 3 F more inside it: 200 kB a token for LLaMA3-8B in
bfloat16, 25 GiB for 131072 tokens on one GPU. An MLP treats each token alone, so it can be computed tile by tile. The
backward pass computes each tile again and adds up the gradients of the weights. After the TiledMLP of ALST (Bekman et
al., arXiv 2506.13996).

    y[tile] = mlp(x[tile])      dx[tile] = (dy/dx)^T grad[tile]      dW = sum over tiles of (dy/dW)^T grad[tile]

The sum over tiles is kept in fp32 (fp64 for fp64) and rounded once. Results equal the untiled MLP within rounding.

Choice: one autograd function around the MLP's own forward, whatever its form. The weights are its inputs, so their
gradients reach DeepSpeed once for each layer. ZeRO-3 gathers the MLP as a whole (a leaf module), once for each pass
over a layer. Cost: the product with the last matrix runs once more, 2 H F FLOPs a token; gradients of the weights
take 4 bytes a parameter of one MLP while the tiles are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lr2train.config import UserError
from lr2train.model import load


def install(lm: Any, tile_tokens: int) -> list[nn.Module]:
    """Let the MLPs of a transformers model compute ``tile_tokens`` tokens at a time; returns the MLPs.

    Each of them must have all its weights whole while it is called, also under ZeRO-3.

    Raises:
        UserError: as ``mlps_of``.
    """
    mlps = mlps_of(lm, tile_tokens)
    for mlp in mlps:
        mlp.forward = TiledMLP(mlp.forward, tuple(mlp.parameters()), tile_tokens)
    return mlps


def refuse_config(hf_config: Any, tile_tokens: int) -> None:
    """Refuse a transformers config whose MLPs cannot be tiled. Needs no weights; 0 tokens refuse nothing.

    Raises:
        UserError: as ``mlps_of``.
    """
    if tile_tokens:
        mlps_of(load.build_empty(hf_config, "bfloat16", lambda: torch.device("meta")), tile_tokens)


def mlps_of(lm: Any, tile_tokens: int) -> list[nn.Module]:
    """The MLPs of all layers.

    Raises:
        UserError: a layer has no MLP, experts, or an MLP with dropout, whose tiles would not be computed alike twice.
    """
    mlps = [getattr(layer, "mlp", None) for layer in getattr(lm.base_model, "layers", ())]
    for mlp in mlps or [None]:
        fault = _fault(mlp)
        if fault:
            raise UserError(
                f"engine.tile_mlp={tile_tokens} serves layers with one MLP for all tokens, and a layer of "
                f"{type(lm).__name__} has {fault}; set engine.tile_mlp to 0"
            )
    return [mlp for mlp in mlps if mlp is not None]


def _fault(mlp: nn.Module | None) -> str:
    if mlp is None:
        return "no such module"
    if any("expert" in name.lower() for name, _ in mlp.named_modules()):
        return "experts"
    return "dropout in it" if any(isinstance(one, nn.Dropout) and one.p for one in mlp.modules()) else ""


@dataclass(frozen=True, eq=False)
class TiledMLP:
    """The forward of an MLP, in tiles.

    Attributes:
        whole: the MLP's own forward.
        weights: the MLP's parameters.
        tile_tokens: tokens of a tile; the last one may have fewer.
    """

    whole: Callable[[Tensor], Tensor]
    weights: tuple[nn.Parameter, ...]
    tile_tokens: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [.., T, H] -> [.., T, H]."""
        if x.shape[-2] <= self.tile_tokens:
            return self.whole(x)
        assert x.requires_grad or not torch.is_grad_enabled(), "without a gradient of x nothing is held for the weights"
        held: list[Any] = []
        return _Tiles.apply(_Hold.apply(x, held), held, self, *self.weights)

    def tiles(self, *whole: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The same tile of each of several tensors [.., T, :], one tile after the other."""
        for start in range(0, whole[0].shape[-2], self.tile_tokens):
            n = min(self.tile_tokens, whole[0].shape[-2] - start)
            yield tuple(x.narrow(-2, start, n) for x in whole)


class _Hold(torch.autograd.Function):
    """x for the backward of ``_Tiles``, saved before the MLP computes.

    Activation checkpointing stops the second pass over a layer at the last saved tensor. An autograd function saves at
    its end. So the second pass ends here, without an MLP whose output nobody reads.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: list[Any]) -> Tensor:
        """x [.., T, H] itself; ``held`` gets the node that holds x."""
        ctx.save_for_backward(x)
        held.append(ctx)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """The gradient itself."""
        return grad, None


class _Tiles(torch.autograd.Function):
    """The MLP, tile by tile in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: list[Any], mlp: TiledMLP, *weights: Tensor) -> Tensor:
        """x [.., T, H] -> [.., T, H]."""
        ctx.held, ctx.mlp = held, mlp
        out = torch.empty_like(x)
        for out_tile, x_tile in mlp.tiles(out, x):
            out_tile.copy_(mlp.whole(x_tile))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_out [.., T, H] -> gradients of x [.., T, H] and of the weights, in their own dtypes."""
        (x,), mlp = ctx.held[0].saved_tensors, ctx.mlp
        grad_x, sums = torch.empty_like(x), [_zeros(weight) for weight in mlp.weights]
        for tile, grad_out_tile, grad_x_tile in mlp.tiles(x, grad_out, grad_x):
            _add_tile(mlp, tile, grad_out_tile, grad_x_tile, sums)
        return grad_x, None, None, *(total.to(weight.dtype) for total, weight in zip(sums, mlp.weights, strict=True))


def _add_tile(mlp: TiledMLP, x: Tensor, grad_out: Tensor, grad_x: Tensor, sums: list[Tensor]) -> None:
    """Fill ``grad_x`` [.., n, H] and add the tile's gradients of the weights to ``sums``."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = mlp.whole(x)
    own, *grads = torch.autograd.grad(out, (x, *mlp.weights), grad_out)
    grad_x.copy_(own)
    for total, grad in zip(sums, grads, strict=True):
        total += grad


def _zeros(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight, dtype=torch.promote_types(torch.float32, weight.dtype))
