"""Fused kernels in the place of a model's norms, rotations and gated activations: each reads its inputs once.

In plain PyTorch these parts are a chain of elementwise operators. Each operator reads and writes a whole tensor of
device memory. ``install`` gives modules of a Hugging Face model another ``forward`` that calls one kernel. Modules,
parameters and names stay, so ZeRO-3 gathers a weight for its module as before, and recomputation runs the same kernel.

    RMSNorm    y = x / sqrt(mean(x^2) + eps) * (offset + w)
    RoPE       y = [x1 cos - x2 sin, x2 cos + x1 sin], for the halves x1, x2 of the rotated dimensions
    GLU        y = act(gate) * up, for act SiLU (Shazeer, arXiv 2002.05202) or GELU in its tanh form

Choice: Liger's kernels (Hsu et al., arXiv 2410.10989), which many trainings have used, on CUDA alone. Families differ
in details: where a norm rounds, whether 1 is added to its weight, which dimensions turn together. No table of families
is kept. Each kind of module runs once over invented numbers, and is replaced where it computes one of the forms
above. Others stay as they are. Cost: a few milliseconds, and results that differ within the dtype's rounding.

The linear cross-entropy is ``loss.LossHead`` on every device. Liger's own rounds the loss of each token to the dtype of
the logits and asks the device for counts.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import itertools
import logging
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)

GATED = "GLU"
NORM = "RMSNorm"
ROPE = "RoPE"
_APPLY_ROPE = "apply_rotary_pos_emb"  # what attention modules of transformers call, by this global name


class NormForm(NamedTuple):
    """A form of RMSNorm.

    Attributes:
        offset: added to the weight (Gemma: 1).
        rounds_last: the product with the weight is in fp32 too (Gemma, OLMo 2); else x is rounded to its dtype first.
    """

    offset: float = 0.0
    rounds_last: bool = False


class Kernels(NamedTuple):
    """The fused computations. All are differentiable.

    Attributes:
        rms_norm: (x [..., N], weight [N], eps, form) -> [..., N].
        rope: (q [B, Hq, T, D], k [B, Hkv, T, D], cos, sin [B, T, R]) -> both, the first R of the D dimensions rotated.
            May write into q and k.
        glu: activation ("silu" | "gelu_tanh") -> (gate, up) -> act(gate) * up. The backward may write into both.
        joined_silu: [..., 2 N] -> [..., N], gate and up side by side.
    """

    rms_norm: Callable[[Tensor, Tensor, float, NormForm], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    glu: dict[str, Callable[[Tensor, Tensor], Tensor]]
    joined_silu: Callable[[Tensor], Tensor]


# ---- the forms, written out: what a module is compared with ----


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: NormForm) -> Tensor:
    """x [..., N] normalised over its last dimension in fp32, times ``offset + weight`` [N]; in x's dtype."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if form.rounds_last:
        return (wide * (form.offset + weight.float())).to(x.dtype)
    return wide.to(x.dtype) * (form.offset + weight)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [B, H, T, D]; cos and sin [B, T, R], R <= D; dimensions i and i + R / 2 turn together."""
    return _rotated(q, cos[:, None], sin[:, None]), _rotated(k, cos[:, None], sin[:, None])


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat(((turned * cos + torch.cat((-second, first), -1) * sin).to(x.dtype), kept), -1)


def _silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


PLAIN = Kernels(
    rms_norm, rope, {"silu": _silu, "gelu_tanh": _gelu_tanh}, lambda joined: _silu(*joined.chunk(2, dim=-1))
)
"""The definitions. Not faster than a model's own modules."""


# ---- the kernels ----


def chosen(setting: str, device: torch.device) -> tuple[Kernels | None, str]:
    """The kernels of ``engine.fused`` (None: plain modules), and the reason in words."""
    if setting == "off":
        return None, "engine.fused=off"
    if device.type != "cuda":
        return None, f"the kernels need CUDA, and this is {device.type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return None, "liger-kernel is not installed (requirements-gpu.txt)"
    return liger(), f"liger-kernel {importlib.metadata.version('liger-kernel')}"


def liger() -> Kernels:
    """Liger's Triton kernels; raises ImportError without liger-kernel or triton.

    The norm's backward does not write into the gradient that it is given: where a residual connection follows the norm
    (OLMo 2, Gemma 2), the other branch reads the same tensor.
    """
    # By module: the package's top level may put other implementations in their place.
    from liger_kernel.ops.geglu import LigerGELUMulFunction  # type: ignore[import-not-found]
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # type: ignore[import-not-found]
    from liger_kernel.ops.rope import LigerRopeFunction  # type: ignore[import-not-found]
    from liger_kernel.ops.swiglu import (  # type: ignore[import-not-found]
        LigerFusedGateUpSiLUMulFunction,
        LigerSiLUMulFunction,
    )

    def norm(x: Tensor, weight: Tensor, eps: float, form: NormForm) -> Tensor:
        casting = "gemma" if form.rounds_last else "llama"
        return LigerRMSNormFunction.apply(x, weight, eps, form.offset, casting, False)

    def joined_silu(joined: Tensor) -> Tensor:
        # Flat: the backward of 0.8.5 returns a gradient of two dimensions, whatever it was given.
        return LigerFusedGateUpSiLUMulFunction.apply(joined.flatten(0, -2)).unflatten(0, joined.shape[:-1])

    glu = {"silu": LigerSiLUMulFunction.apply, "gelu_tanh": LigerGELUMulFunction.apply}
    return Kernels(norm, LigerRopeFunction.apply, glu, joined_silu)


# ---- which modules compute one of the forms ----


def accelerate(model: Any, setting: str, device: torch.device) -> None:
    """Follow ``engine.fused`` for a model that runs on ``device``, and log what was replaced. Model: as ``install``."""
    kernels, reason = chosen(setting, device)
    log.info("%s", announcement({} if kernels is None else install(model, kernels), reason))


def install(model: Any, kernels: Kernels) -> dict[str, int]:
    """Replace the forward of every module that computes a known form.

    Args:
        model: a Hugging Face causal LM with its ``WindowRotary``, on any device; its weights may be divided over ranks.

    Returns:
        How many modules call each kernel: NORM, ROPE, GATED -> count. Kinds without a module are left out.
    """
    found = _Found(model, kernels)
    counts: Counter[str] = Counter()
    for module in model.modules():
        for kind, forward in found.forwards(module):
            assert "forward" not in module.__dict__, f"{type(module).__name__} has been given another forward before"
            module.forward = types.MethodType(forward, module)
            counts[kind] += 1
    return dict(counts)


def announcement(counts: dict[str, int], reason: str) -> str:
    """One line for the log, such as ``fused kernels: 65 RMSNorm, 32 RoPE, 32 GLU (liger-kernel 0.8.5)``."""
    named = ", ".join(f"{counts[kind]} {kind}" for kind in (NORM, ROPE, GATED) if counts.get(kind))
    return f"fused kernels: {named or 'none'} ({reason})"


class _Found:
    """Finds the new forward of a module; modules of one kind are measured once."""

    def __init__(self, model: Any, kernels: Kernels):
        self.kernels, self.known = kernels, {}
        self.rotary = getattr(model.base_model, "rotary_emb", None)
        config = model.config.get_text_config()
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def forwards(self, module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
        """(kind, forward) of a module: at most one, for a module is a norm, an attention or an MLP."""
        kind = type(module)
        for name, key, find in (
            (NORM, (kind, getattr(module, "variance_epsilon", getattr(module, "eps", None))), self._norm),
            (GATED, (kind, str(getattr(module, "act_fn", None))), self._gated),
            (ROPE, (kind, None), self._rope),
        ):
            key = (name, *key)
            if key not in self.known:
                self.known[key] = find(module)
            if (forward := self.known[key]) is not None:
                yield name, forward

    def _norm(self, module: nn.Module) -> Callable[..., Any] | None:
        weight, kernel = module._parameters.get("weight"), self.kernels.rms_norm
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if list(module._parameters) != ["weight"] or weight is None or module._modules or not isinstance(eps, float):
            return None
        shape = getattr(weight, "ds_shape", weight.shape)
        form = _norm_form(module, eps, shape[0]) if len(shape) == 1 else None
        return None if form is None else lambda self, x: kernel(x, self.weight, eps, form)

    def _gated(self, module: nn.Module) -> Callable[..., Any] | None:
        joined = "gate_up_proj" in module._modules
        if not ({"gate_proj", "up_proj"} <= module._modules.keys() or joined) or "down_proj" not in module._modules:
            return None
        activation = _activation(module, joined)
        if activation is None:
            return None
        glu, joined_silu = self.kernels.glu[activation], self.kernels.joined_silu
        if not joined:
            return lambda self, x: self.down_proj(glu(self.gate_proj(x), self.up_proj(x)))
        if activation == "silu":
            return lambda self, x: self.down_proj(joined_silu(self.gate_up_proj(x)))
        return lambda self, x: self.down_proj(glu(*self.gate_up_proj(x).chunk(2, dim=-1)))

    def _rope(self, module: nn.Module) -> Callable[..., Any] | None:
        """The module's own forward, in which the name of the rotation means the kernel.

        A copy of the function with globals of its own: nothing of transformers' modules changes.
        """
        forward = type(module).forward
        if not isinstance(forward, types.FunctionType) or _APPLY_ROPE not in forward.__code__.co_names:
            return None
        own, kernel = forward.__globals__.get(_APPLY_ROPE), self.kernels.rope
        if own is None or not self._rotates_halves(own):
            return None

        def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any) -> Any:
            return own(q, k, cos, sin, *others, **named) if others or named else kernel(q, k, cos, sin)

        names = {**forward.__globals__, _APPLY_ROPE: rotate}
        made = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
        made.__kwdefaults__ = forward.__kwdefaults__
        return made

    @torch.no_grad()
    def _rotates_halves(self, own: Callable[..., Any]) -> bool:
        """Whether a family's rotation is ``rope``, for heads that are rotated whole and in part."""
        if self.rotary is None or self.rotary.form.layout != "halves":
            return False
        width = 2 * len(self.rotary.tables["short"].inv_freq)
        same = []
        for size in sorted({width, self.head_size}):
            q, k, angles = _numbers(1, 2, 3, size), _numbers(1, 1, 3, size), _numbers(1, 3, width // 2)
            cos, sin = (torch.cat((x, x), dim=-1) for x in (angles.cos(), angles.sin()))
            try:
                same += [_close(*pair) for pair in zip(own(q, k, cos, sin), rope(q, k, cos, sin), strict=True)]
            except RuntimeError:  # the function takes heads of the other size alone
                continue
        return bool(same) and all(same)


@torch.no_grad()
def _norm_form(module: nn.Module, eps: float, size: int) -> NormForm | None:
    """The form of a norm over ``size`` numbers; None where it computes something else."""
    probe, weight = copy.copy(module), _numbers(size)
    x = _numbers(8, size) * torch.tensor([1e-3, 0.1, 1.0, 30.0] * 2)[:, None]  # eps counts in the small rows
    for form in itertools.starmap(NormForm, itertools.product((0.0, 1.0), (False, True))):
        same = True
        for dtype in (torch.float32, torch.bfloat16):
            probe._parameters = {"weight": nn.Parameter(weight.to(dtype), requires_grad=False)}
            try:
                theirs = type(module).forward(probe, x.to(dtype))  # type: ignore[arg-type]
            except (RuntimeError, TypeError, AttributeError):
                return None
            ours = rms_norm(x.to(dtype), probe._parameters["weight"], eps, form)  # type: ignore[arg-type]
            # In bfloat16 the forms round at other places: a quarter of the results differ.
            same &= theirs.shape == ours.shape and theirs.dtype == dtype
            same = same and (_close(theirs, ours) if dtype == torch.float32 else (theirs == ours).float().mean() > 0.98)
        if same:
            return form
    return None


@torch.no_grad()
def _activation(module: nn.Module, joined: bool) -> str | None:
    """Whose ``act(gate) * up`` an MLP computes between its projections; None where it computes something else."""
    probe, x, gate, up = copy.copy(module), _numbers(2, 3), _numbers(2, 8), _numbers(8, 2).T.contiguous()
    given = {"gate_up_proj": torch.cat((gate, up), -1)} if joined else {"gate_proj": gate, "up_proj": up}
    probe._modules = {**module._modules, "down_proj": nn.Identity(), **{k: _Gives(x, v) for k, v in given.items()}}
    try:
        theirs = type(module).forward(probe, x)  # type: ignore[arg-type]
    except (RuntimeError, TypeError, AttributeError, AssertionError):
        return None
    return next((name for name, glu in PLAIN.glu.items() if _close(theirs, glu(gate, up))), None)


class _Gives(nn.Module):
    """In the place of a projection: asserts that it is given the module's own input."""

    def __init__(self, expected: Tensor, result: Tensor):
        super().__init__()
        self._pair = expected, result

    def forward(self, x: Tensor) -> Tensor:
        expected, result = self._pair
        assert x is expected
        return result.clone()


def _numbers(*shape: int) -> Tensor:
    """Normal numbers on the CPU, the same for a shape."""
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(len(shape)), device="cpu")


def _close(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-6)
