"""An engine that rehearses: the real code of a step, on tensors that have shapes and no memory, for one rank of many.

Choice: everything is real but the tensors and the other ranks: transformers, attention with its CUDA kernel's branch,
recomputation, DeepSpeed's partitioning, gathering, buckets and optimizer. Tensors are fake, and so is the process
group: collectives give back tensors of the right shape. So a rank of 64 runs on a laptop. Cost: nothing that depends on
values is seen (a loss, an overflow), and DeepSpeed's internals are exchanged at two places, which a new version may
move.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lr2train.attention.segment import SegmentAttention
from lr2train.config import Config
from lr2train.data.batch import Batch
from lr2train.model import load
from lr2train.parallel.mesh import Mesh
from lr2train.rope.factors import Factors
from lr2train.training.agreement import MicroBatch, described
from lr2train.training.deepspeed.engine import Engine
from lr2train.training.deepspeed.scoring import gather_in_forward, scoring_config
from lr2train.training.deepspeed.start import start_deepspeed

Enter = Callable[[str, str], None]
"""Told of each phase: ("forward" | "backward" | "update", name of the micro-batch)."""


class RehearsedEngine(Engine):
    """One rank of a job on fake tensors. The process group is fake, and DeepSpeed has been started on it."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        factors: Factors,
        hf_config: Any,
        modes: Callable[[], Any],
        n_batches: int,
        on_cuda: bool = True,
    ):
        """Build the rank.

        Args:
            config: of the experiment.
            mesh: the place of the rank.
            factors: of the long window.
            hf_config: the transformers config.
            modes: a context in which tensors are fake.
            n_batches: micro-batches of the rehearsed step.
            on_cuda: whether parts that have a branch for CUDA take it.

        Raises:
            UserError: as ``Engine``.
        """
        self._modes, self._n_batches, self._as_on_cuda = modes, n_batches, on_cuda
        super().__init__(config, mesh, factors, hf_config, torch.device("cpu"))
        self.model.loss_head.one_pass = on_cuda

    @property
    def _on_cuda(self) -> bool:
        return self._as_on_cuda

    def _accumulation(self) -> int:
        return self._n_batches

    def _accelerate(self, lm: Any, device: torch.device) -> None:
        """Nothing: plain operators stand in the place of fused kernels, and the device is not the one that is meant."""

    def _lm(self, hf_config: Any, ds_config: dict[str, Any]) -> Any:
        self._architecture = hf_config
        return self._fake(ds_config)

    def _fake(self, ds_config: dict[str, Any]) -> Any:
        """A model of shapes, divided over the ranks under ZeRO-3."""
        lm = load.build_empty(self._architecture, self.config.model.dtype, lambda: torch.device("meta"))
        with self._modes(), _alone():
            _without_values(lm)
            if self.config.engine.zero_stage == 3:
                self._partition(lm, ds_config)
        return lm

    def _frozen(self, ds_config: dict[str, Any]) -> Any:
        ds_config = scoring_config(self.config.model.dtype, ds_config)
        lm = self._fake(ds_config).eval().requires_grad_(False)
        if self.config.engine.zero_stage == 3:
            lm.to = lambda *_, **__: lm
            with self._modes(), _alone():
                gather_in_forward(lm, ds_config)
        return lm

    def _initialize(self, ds_config: dict[str, Any]) -> Any:
        with self._modes(), _alone():
            self.model.to = lambda *_, **__: self.model  # fake parameters cannot be swapped, and are on their device
            return super()._initialize(ds_config)

    def _partition(self, lm: nn.Module, ds_config: dict[str, Any]) -> None:
        import deepspeed

        batch_size = {"train_batch_size": self._n_batches * self.mesh.world}
        deepspeed.zero.Init(module=lm, config_dict_or_path=ds_config | batch_size)

    def rehearse(
        self, batches: Sequence[Batch], names: Sequence[str], enter: Enter, strategies: Sequence[str] = ()
    ) -> list[SegmentAttention]:
        """One optimizer step over these micro-batches of this rank; ``enter`` hears of each phase.

        Args:
            batches: of the step.
            names: of the micro-batches.
            enter: told of each phase.
            strategies: the last batch again, served by each of these.

        Returns:
            The attention of each micro-batch.

        Raises:
            UserError: no attention strategy serves a batch.
        """
        attentions: list[SegmentAttention] = []
        work = self._described(batches, attentions)
        for strategy in strategies:
            work.append(self._served(batches[-1], strategy, attentions))
        batches, names = [*batches, *[batches[-1]] * len(strategies)], [*names, *strategies]
        own, self._engine = self._engine, Watched(self._engine, names, enter)
        try:
            with self._modes(), _alone():
                self._step(batches, attentions, work * self.mesh.dp_size, lambda: False)
        finally:
            self._engine = own
        return attentions

    def _served(self, batch: Batch, strategy: str, attentions: list[SegmentAttention]) -> MicroBatch:
        attentions.append(replace(self.attention, strategy=strategy).segment(batch.spans, len(batch.tokens)))
        return described(batch, attentions[-1].choice.title)

    def close(self) -> None:
        """Let DeepSpeed take its hooks off the model, and free everything."""
        self._engine.destroy()

    def buckets(self) -> list[torch.Tensor]:
        """The buffers in which DeepSpeed gathers gradients before it reduces them."""
        buckets = getattr(self._engine.optimizer, "ipg_buckets", {}).values()
        return [one for bucket in buckets for one in _tensors(bucket.buffer)]

    def on_host(self) -> list[torch.Tensor]:
        """Tensors that lie in host memory: those of an optimizer that is offloaded."""
        optimizer = self._engine.optimizer
        if not getattr(optimizer, "offload_optimizer", False) and not getattr(optimizer, "cpu_offload", False):
            return []
        inner = optimizer.optimizer
        masters = [one for group in inner.param_groups for one in group["params"]]
        masters += _tensors(getattr(optimizer, "fp32_partitioned_groups_flat", []))  # ZeRO-3's, between two updates
        moments = [one for state in inner.state.values() for one in _tensors(list(state.values()))]
        gradients = [one.grad for one in masters if one.grad is not None]
        return [*masters, *moments, *gradients, *_tensors(getattr(optimizer, "grad_partitions_flat_buffer", None))]


def _tensors(held: Any) -> list[torch.Tensor]:
    if isinstance(held, list | tuple):
        return [one for item in held for one in _tensors(item)]
    return [held] if isinstance(held, torch.Tensor) else []


class Watched:
    """DeepSpeed's engine, telling what it is about to do."""

    def __init__(self, engine: Any, names: list[str], enter: Enter):
        self._watched, self._names, self._enter, self._number = engine, names, enter, -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watched, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward."""
        self._number += 1
        self._enter("forward", self._names[self._number])
        return self._watched(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward."""
        self._enter("backward", self._names[self._number])
        self._watched.backward(loss)

    def step(self) -> None:
        """The update, after the last micro-batch."""
        if self._number == len(self._names) - 1:
            self._enter("update", "")
        self._watched.step()


def fake_tensors() -> FakeTensorMode:
    """A mode in which new tensors have no memory; tables that exist already may be read."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def _without_values(model: nn.Module) -> None:
    """Exchange parameters on the meta device for fake ones on the CPU; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = made.setdefault(
                    id(parameter), nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
                )
                module._parameters[name] = fresh
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """DeepSpeed compares module orders between ranks: here there is nobody to compare with."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    own = coordinator.assert_ints_same_as_other_ranks
    coordinator.assert_ints_same_as_other_ranks = lambda _: None
    try:
        yield
    finally:
        coordinator.assert_ints_same_as_other_ranks = own


@contextlib.contextmanager
def one_rank_of(world: int) -> Iterator[None]:
    """This process as rank 0 of ``world`` ranks that do not exist. DeepSpeed is started on their fake process group.

    Leaves neither a process group nor variables of the environment behind.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a rehearsal is a process of its own"
    environment, linear = dict(os.environ), torch.nn.functional.linear
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        with _deepspeed_anew():
            start_deepspeed(torch.device("cpu"))
            yield
    finally:
        dist.destroy_process_group()
        torch.nn.functional.linear = linear  # ZeRO-3 puts its own in this place
        os.environ.clear()
        os.environ |= environment


@contextlib.contextmanager
def _deepspeed_anew() -> Iterator[None]:
    """DeepSpeed keeps its groups in global variables; another world needs them empty."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    kept = {name: value for name, value in vars(groups).items() if name.startswith("_") and name.isupper()}
    try:
        yield
    finally:
        comm.cdb = None
        for name, value in kept.items():
            setattr(groups, name, value)
