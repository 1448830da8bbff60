"""Accounting of one rank's work: every tensor that is allocated, every product, every exchange, every look at a value.

Choice: a torch dispatch mode, which sees each operator below autograd: of the model, of our attention and of DeepSpeed.
So nothing is estimated that the code does: memory is the sum of the storages that are alive. It works on real tensors
and on fake ones, which have shapes and no memory. Cost: some microseconds an operator.

Trap: a backward operator of autograd's own has no Python frame. The sequence number of its node leads back to the
forward operator, whose line and module were noted.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lr2train.attention.blocks import Block, Queries, Round
from lr2train.attention.cuda import CudaKernel
from lr2train.attention.kernel import Kernel
from lr2train.model.host_copies import in_host_memory

BEFORE, FORWARD, BACKWARD, UPDATE = "before", "forward", "backward", "update"  # phases of a step
MODEL, OURS, ZERO, OTHER = "model", "ours", "zero", "other"  # whose line


class Place(NamedTuple):
    """A line of code that does something on the device."""

    whose: str  # MODEL: of transformers | OURS | ZERO: of DeepSpeed's ZeRO | OTHER
    line: str  # file:line
    module: str  # path of the module in the model; empty outside
    backward: bool  # autograd's backward of this line


NOWHERE = Place(OTHER, "?", "", False)


@dataclass(slots=True, eq=False)
class Allocation:
    """A storage on the device. ``died`` is None while it lives."""

    bytes: int
    born: int
    phase: str
    micro_batch: str
    operator: str
    place: Place
    died: int | None = None
    kind: str = ""
    on_host: bool = False


class Work(NamedTuple):
    """Operators that are alike: the key of ``Accounting.work``."""

    micro_batch: str
    phase: str
    operator: str
    dtype: torch.dtype
    flops: float  # of one
    bytes: int  # read and written by one


class Exchange(NamedTuple):
    """Exchanges that are alike: the key of ``Accounting.sent``, which holds bytes."""

    micro_batch: str
    phase: str
    by: str  # the strategy's module, or the part of ZeRO
    collective: str
    inside_node: bool


@dataclass(eq=False)
class Accounting(TorchDispatchMode):
    """What happens while the mode is entered.

    Args:
        ranks_per_node: ranks of one machine; a link between two ranks is inside a node, or between nodes.

    Attributes:
        allocations: in order of birth; ``now`` counts births and deaths.
        work: operators, each with the number of calls.
        sent: bytes that this rank sends.
        looks: places at which the host reads a value of the device, and so waits for it.
        kernel_calls: of attention, by (micro-batch, phase, "forward" | "backward").
    """

    ranks_per_node: int = 8
    allocations: list[Allocation] = field(default_factory=list)
    work: Counter[Work] = field(default_factory=Counter)
    sent: Counter[Exchange] = field(default_factory=Counter)
    looks: Counter[tuple[str, str, Place]] = field(default_factory=Counter)
    kernel_calls: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    phase: str = BEFORE
    micro_batch: str = ""
    now: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[weakref.ref[Any], Allocation]] = {}
        self._modules: list[str] = []
        self._forward_place: dict[int, Place] = {}
        self.phases: list[tuple[int, str, str]] = [(0, BEFORE, "")]
        self._failed = ""

    @property
    def failed_in(self) -> str:
        """The module in which an error was raised; empty outside of all."""
        return self._failed or (self._modules[-1] if self._modules else "")

    def enter(self, phase: str, micro_batch: str = "") -> None:
        """A phase begins."""
        self.phase, self.micro_batch = phase, micro_batch
        self.phases.append((self.now, phase, micro_batch))
        self._modules.clear()

    def watch(self, model: nn.Module) -> None:
        """Note which module of ``model`` computes."""
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._entering(name), prepend=True)
            module.register_forward_hook(self._left)

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            # Recomputation stops in the middle of a layer: the modules that it left are still on the stack.
            while self._modules and not name.startswith(f"{self._modules[-1]}.") and self._modules[-1]:
                self._modules.pop()
            self._modules.append(name)

        return hook

    def _left(self, *_: Any) -> None:
        if self._modules:
            self._modules.pop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and note it."""
        kwargs = kwargs or {}
        if (role := _role(function)) == "free":
            return function(*args, **kwargs)
        place: list[Place] = []

        def here() -> Place:
            if not place:
                place.append(self._place())
            return place[0]

        if role == "look":
            if (value := self._look(function, args, here)) is not None:
                return value
        elif role == "exchange":
            self._exchange(function, args, here())
        try:
            made = function(*args, **kwargs)
        except Exception:
            self._failed = here().module
            raise
        self._follow(made, function, here)
        if role == "compute":
            self._count(function, args, kwargs, made, here)
        return made

    # ---- memory ----

    def _follow(self, made: Any, function: Any, here: Callable[[], Place]) -> None:
        for tensor in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta":  # the latter has a shape and no memory
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            known = self._alive.get(key)
            if not size or (known is not None and known[0]() is storage):
                continue
            self.now += 1
            allocation = Allocation(size, self.now, self.phase, self.micro_batch, str(function), here())
            allocation.on_host = in_host_memory.get()
            self.allocations.append(allocation)
            self._alive[key] = weakref.ref(storage, self._freed(key, allocation)), allocation

    def _freed(self, key: int, allocation: Allocation) -> Callable[[Any], None]:
        def callback(_: Any) -> None:
            self.now += 1
            allocation.died = self.now
            if (known := self._alive.get(key)) is not None and known[1] is allocation:
                del self._alive[key]

        return callback

    def holding(self, tensor: Tensor) -> Allocation | None:
        """The allocation under a tensor; None for one that was made outside."""
        known = self._alive.get(tensor.untyped_storage()._cdata)
        return known[1] if known else None

    @property
    def alive_bytes(self) -> int:
        """Bytes of all storages that are alive."""
        return sum(one.bytes for _, one in self._alive.values())

    # ---- work ----

    def add_work(self, operator: str, dtype: torch.dtype, flops: float, n_bytes: int) -> None:
        """Note an operator that no formula here knows: a kernel of attention."""
        self.work[Work(self.micro_batch, self.phase, operator, dtype, flops, n_bytes)] += 1

    def _count(self, function: Any, args: Any, kwargs: Any, made: Any, here: Callable[[], Place]) -> None:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(made) if isinstance(x, Tensor)]
        if self.phase == BEFORE or not tensors or function._overloadpacket in _OWN_COUNT:
            return
        outputs = outputs or tensors  # changed in place, and not returned
        written = sum(map(_moved, outputs))
        read = written if function._overloadpacket in _SPARSE else sum(map(_moved, tensors))
        formula = flop_registry.get(function._overloadpacket)
        flops = float(formula(*args, **kwargs, out_val=made)) if formula else 0.0
        self.add_work(function._overloadpacket.__name__, outputs[0].dtype, flops, read + written)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            here()  # notes the place for the operator's backward

    # ---- exchanges ----

    def _exchange(self, function: Any, args: Any, place: Place) -> None:
        group = next(dist.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject) and _is_group(x))
        ranks, name = dist.get_process_group_ranks(group), function._overloadpacket.__name__
        by = _by(place)
        for inside_node, n_bytes in _sent(name, args, ranks, self.ranks_per_node).items():
            self.sent[Exchange(self.micro_batch, self.phase, by, name.strip("_"), inside_node)] += round(n_bytes)

    # ---- looks at a value ----

    def _look(self, function: Any, args: Any, here: Callable[[], Place]) -> Any:
        """The invented answer to a question about a fake tensor's value; None where the value is there."""
        asked = args[0]
        self.looks[self.micro_batch, self.phase, here()] += 1
        if not isinstance(asked, FakeTensor) or getattr(asked, "constant", None) is not None:
            return None
        if asked.dtype.is_floating_point:
            return 1.0
        overflow = here().whose == ZERO  # DeepSpeed asks for what is wrong; others ask whether all is finite
        return not overflow if asked.dtype == torch.bool else int(not overflow)

    # ---- places ----

    def _place(self) -> Place:
        whose, line, recomputed = _line(sys._getframe(2))
        module = self._modules[-1] if self._modules else ""
        if self.phase == BACKWARD:
            node = torch._C._current_autograd_node()
            of = self._forward_place.get(node._sequence_nr()) if node is not None else None
            if whose == OTHER and of is not None:
                return of._replace(backward=True)
            if of is not None and not recomputed:
                return Place(whose, line, of.module, True)
            if not recomputed:
                module = ""
        place = Place(whose, line, module, False)
        if torch.is_grad_enabled() or self.phase == FORWARD:
            self._forward_place[torch.autograd._get_sequence_nr() - 1] = place
        return place


class CountedKernel:
    """A kernel of attention that counts its calls and its work, and holds the scratch memory of FlashAttention-2.

    The backward of FlashAttention-2 sums the gradient of q in fp32 and, where query heads share a key head, makes the
    gradients of k and v for each query head. No operator shows this memory.
    """

    def __init__(self, own: Kernel, accounting: Accounting):
        self._own, self._accounting = own, accounting

    def rounds(self, block: Block) -> tuple[Round, ...]:
        """Of the kernel itself."""
        return self._own.rounds(block)

    def check(self, q: Tensor) -> None:
        """Of the kernel itself."""
        self._own.check(q)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, round_: Round, scale: float) -> tuple[Tensor, Tensor]:
        """Of the kernel itself."""
        self._note("forward", q, k, round_, 2)
        return self._own.forward(q, k, v, round_, scale)

    def backward(self, queries: Queries, k: Tensor, v: Tensor, round_: Round, scale: float) -> Sequence[Tensor]:
        """Of the kernel itself."""
        self._note("backward", queries.q, k, round_, 5)
        scratch = self._scratch(queries.q, k, round_)
        grads = self._own.backward(queries, k, v, round_, scale)
        del scratch
        return grads

    def _note(self, name: str, q: Tensor, k: Tensor, round_: Round, products: int) -> None:
        accounting, size = self._accounting, q.shape[-1]
        pairs = sum(tile.pairs(round_.sliding_window) for tile in round_.tiles) * q.shape[1]
        n_bytes = products * (len(round_.queries) * q.shape[1] + len(round_.keys) * k.shape[1]) * size * q.itemsize
        accounting.add_work(f"attention {name}", q.dtype, 2.0 * products * pairs * size, n_bytes)
        accounting.kernel_calls[accounting.micro_batch, accounting.phase, name] += 1

    def _scratch(self, q: Tensor, k: Tensor, round_: Round) -> list[Tensor]:
        if not isinstance(self._own, CudaKernel):
            return []
        rows_q, rows_k, (heads, size) = len(round_.queries), len(round_.keys), q.shape[1:]
        scratch = [torch.empty(rows_q + 128 * len(round_.tiles), heads, size, dtype=torch.float32)]
        if k.shape[1] != heads:
            scratch += [torch.empty(rows_k, heads, size, dtype=q.dtype) for _ in range(2)]
        return scratch


# ---- operators ----

_FREE = {"prim", "profiler", "prims"}
_LOOKS = {
    torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
    torch.ops.aten.unique_dim, torch.ops.aten._unique2, torch.ops.aten.equal,
}  # fmt: skip
_NO_COST = {
    torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided, torch.ops.aten._unsafe_view,
}  # fmt: skip
_SPARSE = {  # read as much as they write
    torch.ops.aten.embedding, torch.ops.aten.index, torch.ops.aten.index_select, torch.ops.aten.gather,
}  # fmt: skip
_OWN_COUNT = {  # attention counts its own work, from its tiles
    torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
}  # fmt: skip


@cache
def _role(function: Any) -> str:
    """free: nothing happens on the device. look | exchange | compute | made: a tensor, at no cost."""
    if function.namespace in _FREE:
        return "free"
    if function.namespace == "c10d":
        return "free" if "barrier" in str(function) or "recv" in str(function) else "exchange"
    packet = function._overloadpacket
    if packet in _LOOKS:
        return "look"
    returns = function._schema.returns
    if any(one.alias_info is not None and not one.alias_info.is_write for one in returns):
        return "free"  # a view
    return "made" if packet in _NO_COST else "compute"


def _moved(tensor: Tensor) -> int:
    """Bytes of memory that hold a tensor's elements: an expanded tensor is read once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


# ---- exchanges ----


def _is_group(x: Any) -> bool:
    return "ProcessGroup" in str(x._type())


def _sent(name: str, args: Any, ranks: list[int], per_node: int) -> dict[bool, float]:
    """Bytes that this rank sends, by whether the link is inside a node.

    Between all ranks of a group, gathers and reductions run as rings: each rank sends (n - 1) / n of the whole. A ring
    leaves a node once, and the node's ranks share that load.
    """
    me, n = dist.get_rank(), len(ranks)
    if n == 1:
        return {}
    near = [rank // per_node == me // per_node for rank in ranks]
    if name == "send":
        return {near[args[2]]: float(_size(args[0]))}
    if name in ("alltoall_base_", "alltoall_"):
        parts = _parts(args, n)
        return {
            inside: sum(
                size
                for rank, size in zip(ranks, parts, strict=True)
                if rank != me and near[ranks.index(rank)] == inside
            )
            for inside in (True, False)
        }
    whole = _size(args[0]) if "gather" in name or "all" in name or "broadcast" in name else _size(args[1])
    ring = whole * (n - 1) / n * (2 if "allreduce" in name else 1)
    if all(near):
        return {True: ring}
    return {False: ring / sum(near), True: ring - ring / sum(near)}


def _parts(args: Any, n: int) -> list[float]:
    """Bytes to each rank of an all-to-all."""
    if isinstance(args[1], list | tuple):
        return [float(_size(x)) for x in args[1]]
    split = args[4]
    whole = float(_size(args[1]))
    return [whole / n] * n if not split else [whole * part / max(1, sum(split)) for part in split]


def _size(tensors: Any) -> int:
    return sum(x.numel() * x.itemsize for x in tree_leaves(tensors) if isinstance(x, Tensor))


def _by(place: Place) -> str:
    if place.whose == ZERO:
        return "ZeRO: gradients" if "stage" in place.line else "ZeRO: weights"
    if place.whose == OTHER:
        return "the step"
    name = place.line.partition(":")[0].rpartition("/")[2].removesuffix(".py")
    return name if place.line.startswith("lr2train/attention/") else f"{name} (the step)"


# ---- lines ----


def _line(frame: FrameType | None) -> tuple[str, str, bool]:
    """(whose, file:line, whether checkpointing runs it again) of the innermost frame that is the model's, ours or
    ZeRO's.
    """
    step: str | None = None
    for one in _outwards(frame):
        whose = _whose(one.f_code)
        if whose is not None:
            line = f"{_short(one.f_code.co_filename)}:{one.f_lineno}"
            return whose, line, any(_is_recomputing(outer.f_code) for outer in _outwards(one.f_back))
        if step is None and one.f_code.co_filename.endswith("lr2train/training/deepspeed/engine.py"):
            step = f"{_short(one.f_code.co_filename)}:{one.f_lineno}"
    return OTHER, step or "?", False


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


@cache
def _whose(code: CodeType) -> str | None:
    path = code.co_filename.replace("\\", "/")
    if path.endswith(_OF_DTYPES):
        return ZERO
    if "/deepspeed/runtime/zero/" in path:
        return None if path.endswith("/linear.py") else ZERO  # ZeRO-3's own form of a linear layer: the model's work
    if "/transformers/" in path:
        return MODEL
    if "/lr2train/" not in path or any(part in path for part in _PASSED):
        return None
    return OURS


# ZeRO-1 in bfloat16, and what all stages ask of gradients: not in the folder of ZeRO.
_OF_DTYPES = ("/deepspeed/runtime/bf16_optimizer.py", "/deepspeed/runtime/utils.py")
# Frames that only pass on: the line that matters called them, or was called by them.
_PASSED = (
    "/planning/",
    "/parallel/comm.py",
    "/deepspeed/engine.py",
    "/deepspeed/rehearsed.py",
    "/rehearse.py",
    "/tests/",
    "/cli/",
)


@cache
def _is_recomputing(code: CodeType) -> bool:
    return code.co_name in ("recompute_fn", "unpack_hook") and "torch/utils/checkpoint" in code.co_filename


@cache
def _short(path: str) -> str:
    if "/site-packages/" in path:
        return path.rpartition("/site-packages/")[2]
    _, found, after = path.rpartition("/lr2train/")
    return found[1:] + after if found else path
