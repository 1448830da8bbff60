"""An engine that rehearses: the real code of a step, on tensors that have shapes and no memory, for one rank of many.

Choice: everything is real but the tensors and the other ranks: transformers, attention with its CUDA kernel's branch,
recomputation, DeepSpeed's partitioning, gathering, buckets and optimizer. Tensors are fake, and so is the process group:
collectives give back tensors of the right shape. So a rank of 64 runs on a laptop. Cost: nothing that depends on values
is seen (a loss, an overflow), and DeepSpeed's internals are exchanged at two places, which a new version may move.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lr2train.attention.segment import SegmentAttention
from lr2train.config import Config
from lr2train.data.batch import Batch
from lr2train.model import load
from lr2train.parallel.mesh import Mesh
from lr2train.rope.factors import Factors
from lr2train.training.deepspeed.engine import Engine

Enter = Callable[[str, str], None]
"""Told of each phase: ("forward" | "backward" | "update", name of the micro-batch)."""


class RehearsedEngine(Engine):
    """One rank of a job on fake tensors. The process group is fake, and DeepSpeed has been started on it."""

    def __init__(
        self, config: Config, mesh: Mesh, factors: Factors, hf_config: Any, modes: Callable[[], Any], n_batches: int
    ):
        """Build the rank.

        Args:
            config: of the experiment.
            mesh: the place of the rank.
            factors: of the long window.
            hf_config: the transformers config.
            modes: a context in which tensors are fake.
            n_batches: micro-batches of the rehearsed step.

        Raises:
            UserError: as ``Engine``.
        """
        self._modes, self._n_batches = modes, n_batches
        super().__init__(config, mesh, factors, hf_config, torch.device("cpu"))

    def _accumulation(self) -> int:
        return self._n_batches

    def _lm(self, hf_config: Any, ds_config: dict[str, Any]) -> Any:
        return load.build_empty(hf_config, self.config.model.dtype, lambda: torch.device("meta"))

    def _initialize(self, ds_config: dict[str, Any]) -> Any:
        with self._modes(), _alone():
            _without_values(self.model)
            if self.config.engine.zero_stage == 3:
                self._partition(ds_config)
            self.model.to = lambda *_, **__: self.model  # fake parameters cannot be swapped, and are on their device
            return super()._initialize(ds_config)

    def _partition(self, ds_config: dict[str, Any]) -> None:
        import deepspeed

        batch_size = {"train_batch_size": self._n_batches * self.mesh.world}
        deepspeed.zero.Init(module=self.model, config_dict_or_path=ds_config | batch_size)

    def rehearse(self, batches: Sequence[Batch], names: Sequence[str], enter: Enter) -> list[SegmentAttention]:
        """One optimizer step over these micro-batches of this rank; ``enter`` hears of each phase.

        Returns:
            The attention of each micro-batch.

        Raises:
            UserError: no attention strategy serves a batch.
        """
        attentions: list[SegmentAttention] = []
        work = self._described(batches, attentions)
        own, self._engine = self._engine, _Watched(self._engine, list(names), enter)
        try:
            with self._modes(), _alone():
                self._step(batches, attentions, work * self.mesh.dp_size, lambda: False)
        finally:
            self._engine = own
        return attentions


class _Watched:
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
                fresh = made.setdefault(id(parameter), nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
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
