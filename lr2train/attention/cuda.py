"""The CUDA kernels: flash-attn 3, 4 or 2 where installed, else torch's own variable-length flash attention.

Shape letters: N rows of queries and M rows of keys of a round, H heads, D head size.

Choice: all are called as raw functions, because only so do they return the log-sum-exp and take it back in the
backward. A round is one call over packed tiles, told apart by cumulative lengths (cu_seqlens). All lengths are Python
ints, so no call waits for the device. Cost: raw functions change between versions; ``refusal`` tells the versions that
do not fit by their signature. This is the only file that imports flash_attn.

flash-attn 3 is called through the operators that it registers with torch, because its Python function has had two
signatures and its operators one. torch's ``activate_flash_attention_impl`` is not used. "FA3" would call the same two
operators. "FA4" of torch 2.13 expects two results of flash-attn 4's forward function, which returns four since beta 20
and five since beta 36, and hands no longest lengths to the backward function.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lr2train.attention import explicit
from lr2train.attention.blocks import Block, Queries, Round, softcap_of
from lr2train.config import UserError
from lr2train.parallel.comm import to_device

_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward
WIDE = (torch.float32, torch.float64)  # no flash kernel has them


class _Library(NamedTuple):
    """A library of flash kernels.

    Attributes:
        module: holds its raw functions.
        generations: major compute capabilities of the GPUs that it is built for; None: 8 and newer.
        parameters: names of the parameters of its backward function, from the imported module.
        needed: parameters that older versions of the function do not have.
        since: the first version that has them.
    """

    module: str
    generations: tuple[int, ...] | None
    parameters: Callable[[ModuleType], frozenset[str]]
    needed: frozenset[str]
    since: str


def _parameters(function: Any) -> frozenset[str]:
    """Names of the parameters of a function or of a torch custom operator."""
    return frozenset(inspect.signature(getattr(function, "_init_fn", function)).parameters)


LIBRARIES = {  # by preference
    "flash_attn_3": _Library(
        "flash_attn_interface",
        (9,),
        lambda _: frozenset(argument.name for argument in torch.ops.flash_attn_3.bwd.default._schema.arguments),
        frozenset({"window_size_left", "cu_seqlens_q"}),
        "the one of flash-attn 2.8.3's folder hopper",
    ),
    "flash_attn_4": _Library(
        "flash_attn.cute.interface",
        (9, 10),
        lambda module: _parameters(module._flash_attn_bwd),
        frozenset({"window_size_left", "cu_seqlens_q", "max_seqlen_q"}),
        "4.0.0b8",
    ),
    "flash_attn": _Library(
        "flash_attn.flash_attn_interface",
        None,
        lambda module: _parameters(module._flash_attn_varlen_backward),
        frozenset({"window_size_left", "cu_seqlens_q"}),
        "2.7",
    ),
}


def libraries() -> dict[str, str | None]:
    """The libraries by preference, each with the reason why it does not serve the GPU of this machine, or None."""
    generation = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    return {name: refusal(name, generation) for name in LIBRARIES}


def choose() -> tuple[str, str]:
    """(name, reason) of the best kernel on this machine: flash_attn_3 | flash_attn_4 | flash_attn | torch_varlen.

    A GPU that is older than flash attention gets ``explicit``.
    """
    generation = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    if 0 < generation < 8:
        return "explicit", f"this GPU has compute capability {generation}.x, and flash attention needs 8 (A100)"
    refused = []
    for name in LIBRARIES:
        if (why := refusal(name, generation)) is None:
            return name, f"{name} is installed"
        refused.append(f"{name} {why}")
    return "torch_varlen", "; ".join(refused)


def refusal(name: str, generation: int) -> str | None:
    """The reason why a library does not serve GPUs of this compute capability (major), as a predicate; else None."""
    library = LIBRARIES[name]
    if library.generations and generation not in library.generations:
        return f"is built for compute capability {' and '.join(f'{one}.x' for one in library.generations)} alone"
    try:
        found = library.parameters(importlib.import_module(library.module))
    except Exception as error:  # of any kind: a library built for another torch or CUDA raises what it likes
        return f"is not importable: {' '.join(str(error).split())[:200]}"
    return None if library.needed <= found else f"is older than {library.since}"


@dataclass(frozen=True, eq=False)
class Varlen:
    """The shape of one call over packed tiles: cumulative lengths, longest tile, mask."""

    cu_q: Tensor  # int32 [tiles + 1]
    cu_k: Tensor
    max_q: int
    max_k: int
    left: int  # keys seen to the left of the bottom-right diagonal; -1: all
    right: int  # keys seen to the right of the diagonal; 0: causal, -1: all

    @cached_property
    def no_dropout(self) -> tuple[Tensor, Tensor]:
        """(random state, unused) that torch's backward wants although nothing is dropped."""
        with torch.inference_mode(False):
            return torch.zeros(2, dtype=torch.uint64, device=self.cu_q.device), torch.empty(0, device=self.cu_q.device)


def varlen_of(round_: Round, device: torch.device) -> Varlen:
    """A round as flash attention takes it.

    Flash attention aligns masks to the bottom right, as tiles do. In a tile of gap g, query i stands at its diagonal's
    key i + lead - g. So a sliding window of w tokens reaches w - 1 - g keys to the left of the diagonal.

    Trap: with a window to the left and none to the right, flash-attn 2 and torch set the window to the right to the
    longest keys. That hides keys from the first of many queries over few keys. So at least as many keys are declared as
    queries.
    """
    q_lengths, k_lengths = [tile.n_queries for tile in round_.tiles], [tile.n_keys for tile in round_.tiles]
    with torch.inference_mode(False):
        cu_q, cu_k = (_cu_seqlens(lengths, device) for lengths in (q_lengths, k_lengths))
    left = -1 if round_.sliding_window is None else round_.sliding_window - 1 - round_.tiles[0].gap
    assert left >= 0 or round_.sliding_window is None, f"{round_.tiles[0]} holds queries that see no key"
    max_q, max_k = max(q_lengths), max(k_lengths)
    if left >= 0 and not round_.causal:
        max_k = max(max_k, max_q)
    return Varlen(cu_q, cu_k, max_q, max_k, left, 0 if round_.causal else -1)


def _cu_seqlens(lengths: Sequence[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


_Forward = Callable[[Tensor, Tensor, Tensor, Varlen, float], tuple[Tensor, Tensor]]
_Backward = Callable[[Queries, Tensor, Tensor, Varlen, float], Sequence[Tensor]]  # with lse [Hq, N]


class ExplicitKernel:
    """``kernel.Kernel`` by the definition of attention, for float32 and float64 (see ``explicit``)."""

    def rounds(self, block: Block) -> tuple[Round, ...]:
        """The calls that a block takes."""
        return block.cuda_rounds

    def check(self, q: Tensor) -> None:
        """Refuse what the definition should not serve.

        Raises:
            UserError: the dtype is half precision, which is for models of a size that needs flash attention.
        """
        if q.dtype not in WIDE:
            raise UserError(
                f"model.dtype={_name_of(q.dtype)} needs flash attention, and this GPU is older than compute capability "
                "8 (A100); set model.dtype to float32"
            )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, round_: Round, scale: float) -> tuple[Tensor, Tensor]:
        """As ``CpuKernel.forward``."""
        return explicit.forward_round(q, k, v, round_, scale)

    def backward(self, queries: Queries, k: Tensor, v: Tensor, round_: Round, scale: float) -> Sequence[Tensor]:
        """As ``CpuKernel.backward``."""
        return explicit.backward_round(queries, k, v, round_, scale)


def _every_size(head_size: int) -> bool:
    return True


@dataclass(frozen=True)
class CudaKernel:
    """``kernel.Kernel`` over a flash kernel for packed tiles, whose out is [N, Hq, D] and lse [Hq, N] in fp32.

    float32 and float64, which flash kernels do not have, are computed by the definition.
    """

    call: _Forward
    call_backward: _Backward
    takes: Callable[[int], bool] = _every_size  # of the multiples of 8 up to 256
    wide = ExplicitKernel()

    def rounds(self, block: Block) -> tuple[Round, ...]:
        """The calls that a block takes."""
        return block.cuda_rounds

    def check(self, q: Tensor) -> None:
        """Refuse what flash attention does not serve.

        Raises:
            UserError: in half precision, the head size is no multiple of 8, or the kernel does not take it.
        """
        size = q.shape[-1]
        if q.dtype in WIDE:
            return
        if size % 8 or size > 256:
            raise UserError(
                f"head_dim={size} has no flash attention on CUDA, which serves multiples of 8 up to 256; "
                "choose another model (model.path)"
            )
        if not self.takes(size):
            raise UserError(
                f"head_dim={size} has no kernel in flash-attn-4 on this GPU, which serves up to 128, and 256; "
                "pip uninstall flash-attn-4"
            )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, round_: Round, scale: float) -> tuple[Tensor, Tensor]:
        """As ``CpuKernel.forward``."""
        if q.dtype in WIDE:
            return self.wide.forward(q, k, v, round_, scale)
        rows_q, rows_k = round_.queries.on(q.device), round_.keys.on(q.device)
        out, lse = self.call(q[rows_q], k[rows_k], v[rows_k], round_.once(varlen_of, q.device), scale)
        return out, lse.transpose(0, 1)

    def backward(self, queries: Queries, k: Tensor, v: Tensor, round_: Round, scale: float) -> Sequence[Tensor]:
        """As ``CpuKernel.backward``."""
        if k.dtype in WIDE:
            return self.wide.backward(queries, k, v, round_, scale)
        rows_k = round_.keys.on(k.device)
        part = queries.part(round_.queries.on(k.device))
        part = part._replace(lse=part.lse.transpose(0, 1).contiguous())
        return self.call_backward(part, k[rows_k], v[rows_k], round_.once(varlen_of, k.device), scale)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the libraries ----


def _torch_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> tuple[Tensor, Tensor]:
    """torch's own flash attention, called as ``torch.nn.attention.varlen`` calls it.

    Raises:
        UserError: the model caps its scores, which this kernel does not.
    """
    if softcap_of(scale):
        raise UserError("torch's own flash attention does not cap scores, which this model does; install flash-attn")
    out, lse, *_ = _flash(
        q, k, v, varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k, 0.0, _is_plainly_causal(varlen), False,
        scale=scale, window_size_left=varlen.left, window_size_right=varlen.right,
    )  # fmt: skip
    return out, lse


def _torch_backward(queries: Queries, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> Sequence[Tensor]:
    q, out, lse, grad_out = queries
    random_state, unused = varlen.no_dropout
    return _flash_backward(
        grad_out.contiguous(), q, k, v, out, lse, varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k, 0.0,
        _is_plainly_causal(varlen), random_state, unused,
        scale=scale, window_size_left=varlen.left, window_size_right=varlen.right,
    )  # fmt: skip


def _is_plainly_causal(varlen: Varlen) -> bool:
    return (varlen.left, varlen.right) == (-1, 0)


def _flash2_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> tuple[Tensor, Tensor]:
    """flash-attn 2.7 or newer, which returns (out, lse, dropout mask, random state)."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward  # optional, and only for CUDA

    out, lse, *_ = _flash_attn_varlen_forward(
        q, k, v, varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k, dropout_p=0.0, softmax_scale=scale,
        causal=varlen.right == 0, window_size_left=varlen.left, window_size_right=varlen.right,
        softcap=softcap_of(scale), alibi_slopes=None, return_softmax=False, block_table=None,
    )  # fmt: skip
    return out, lse


def _flash2_backward(queries: Queries, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> Sequence[Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    q, out, lse, grad_out = queries
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]  # the library fills them
    _flash_attn_varlen_backward(
        grad_out, q, k, v, out, lse, *grads, varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k, dropout_p=0.0,
        softmax_scale=scale, causal=varlen.right == 0, window_size_left=varlen.left, window_size_right=varlen.right,
        softcap=softcap_of(scale), alibi_slopes=None, deterministic=_in_a_fixed_order(),
    )  # fmt: skip
    return grads


def _flash3_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> tuple[Tensor, Tensor]:
    """flash-attn 3 (Hopper), whose one operator takes packed tiles where cumulative lengths are given.

    ``num_splits=1``, as its Python function has: the operator's own default may split the keys, and then a sum depends
    on the longest tile of the call.
    """
    out, lse, *_ = torch.ops.flash_attn_3.fwd(
        q, k, v, cu_seqlens_q=varlen.cu_q, cu_seqlens_k=varlen.cu_k, max_seqlen_q=varlen.max_q,
        max_seqlen_k=varlen.max_k, softmax_scale=scale, is_causal=varlen.right == 0, window_size_left=varlen.left,
        window_size_right=varlen.right, softcap=softcap_of(scale), num_splits=1,
    )  # fmt: skip
    return out, lse


def _flash3_backward(queries: Queries, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> Sequence[Tensor]:
    q, out, lse, grad_out = queries
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    torch.ops.flash_attn_3.bwd(
        grad_out, q, k, v, out, lse, *grads, cu_seqlens_q=varlen.cu_q, cu_seqlens_k=varlen.cu_k,
        max_seqlen_q=varlen.max_q, max_seqlen_k=varlen.max_k, softmax_scale=scale, is_causal=varlen.right == 0,
        window_size_left=varlen.left, window_size_right=varlen.right, softcap=softcap_of(scale),
        deterministic=_in_a_fixed_order(),
    )  # fmt: skip
    return grads


def _flash4_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> tuple[Tensor, Tensor]:
    """flash-attn 4 (Hopper, Blackwell), which returns out and lse first and writes None for a window without an end."""
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(
        q, k, v, cu_seqlens_q=varlen.cu_q, cu_seqlens_k=varlen.cu_k, max_seqlen_q=varlen.max_q,
        max_seqlen_k=varlen.max_k, softmax_scale=scale, causal=varlen.right == 0, softcap=softcap_of(scale),
        return_lse=True, **_windows4(varlen),
    )  # fmt: skip
    return out, lse


def _flash4_backward(queries: Queries, k: Tensor, v: Tensor, varlen: Varlen, scale: float) -> Sequence[Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    q, out, lse, grad_out = queries
    return _flash_attn_bwd(
        q, k, v, out, grad_out, lse, cu_seqlens_q=varlen.cu_q, cu_seqlens_k=varlen.cu_k, max_seqlen_q=varlen.max_q,
        max_seqlen_k=varlen.max_k, softmax_scale=scale, causal=varlen.right == 0, softcap=softcap_of(scale),
        deterministic=_in_a_fixed_order(), **_windows4(varlen),
    )[:3]  # fmt: skip


def _in_a_fixed_order() -> bool:
    """Whether the gradient of q is added in a fixed order (engine.deterministic); torch's own kernel asks this too."""
    return torch.are_deterministic_algorithms_enabled()


def _windows4(varlen: Varlen) -> dict[str, int | None]:
    """A plain causal mask is told by ``causal`` alone, as in flash-attn 4's own tests."""
    left, right = (None if size < 0 else size for size in (varlen.left, varlen.right))
    return {"window_size_left": left, "window_size_right": None if left is None else right}


def _flash4_takes(head_size: int) -> bool:
    """``_validate_head_dims`` of flash-attn 4: on Blackwell up to 128, and 256."""
    return head_size <= 128 or head_size == 256 or torch.cuda.get_device_capability()[0] == 9


KERNELS: dict[str, CudaKernel | ExplicitKernel] = {
    "explicit": ExplicitKernel(),
    "torch_varlen": CudaKernel(_torch_forward, _torch_backward),
    "flash_attn": CudaKernel(_flash2_forward, _flash2_backward),
    "flash_attn_3": CudaKernel(_flash3_forward, _flash3_backward),
    "flash_attn_4": CudaKernel(_flash4_forward, _flash4_backward, _flash4_takes),
}
