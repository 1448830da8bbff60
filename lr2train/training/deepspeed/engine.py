"""The training engine: ``step``, ``save``, ``load`` and ``write_model`` over DeepSpeed.

Choice: to DeepSpeed every rank is a data-parallel rank. Sequence parallelism (context parallelism) is a transform of
the data and of attention: tokens, labels and positions are sharded together. Each rank returns the *sum* of the losses
of its own target tokens. The sum is scaled so that DeepSpeed's averaging over ranks and accumulation steps yields the
gradient of ``sum of losses / number of target tokens`` of the global batch. Cost: one all-reduce of a few numbers, and
one exchange of a few words on the host, in each step. The exchange finds a rank with other work than its peers before
any rank waits for it (``training.agreement``). It also carries the counts of the step: no rank asks its device for
them.

``measure`` computes the loss of batches without a step: no gradient, no dropout, no change of any state.

A loss that is not finite makes the gradients of the step NaN on every rank. So one rule covers losses and gradients: no
update is made where the global gradient norm is not finite. DeepSpeed's ZeRO optimizers decide this on all ranks
together; without ZeRO, ``FiniteAdamW`` decides.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from lr2train.attention.hf import install
from lr2train.attention.segment import SegmentAttention
from lr2train.config import Config, UserError
from lr2train.data.batch import LONG, WINDOWS, Batch
from lr2train.model import fused, load, recompute
from lr2train.model.distill import Original
from lr2train.model.window_lm import MODULE_PREFIX, WindowLM
from lr2train.parallel import control
from lr2train.parallel.failure import told_to_all
from lr2train.parallel.mesh import Mesh
from lr2train.rope.factors import Factors
from lr2train.training.agreement import MicroBatch, agree, described
from lr2train.training.deepspeed import checkpoint
from lr2train.training.deepspeed.checkpoint import Checkpoints
from lr2train.training.deepspeed.finite import FiniteAdamW, refuse_non_finite
from lr2train.training.deepspeed.saving import Saver
from lr2train.training.deepspeed.scoring import load_sharded
from lr2train.training.deepspeed.start import (
    accumulation_of,
    deepspeed_config,
    gather_whole,
    gathered,
    quiet,
    refuse_ranks,
    zero_init,
)
from lr2train.training.segment import shard_of


@dataclass(frozen=True)
class StepStats:
    """The figures of one optimizer step; all but ``suspects`` are the same on every rank."""

    loss: float  # nats per target token, over the global batch
    loss_short: float | None  # over short segments alone; None without short segments
    loss_long: float | None
    n_target_tokens: int  # labels that are predicted
    n_tokens: int  # of all segments, padding included
    window_mix: float  # share of long segments, 0 … 1
    n_pairs: int  # causal query-key pairs within document spans
    grad_norm: float | None  # before clipping; None where DeepSpeed computes none, or where the norm is not finite
    interrupted: bool  # some rank was asked to stop
    finite: bool = True  # loss and gradient norm are finite; False: no update was made
    suspects: tuple[int, ...] = ()  # micro-batches of this rank with a loss that is not finite
    router_loss: float | None = None  # the experts' load-balancing loss, mean over segments, without its coefficient
    # KL from the frozen original model, nats per target token of short segments; None where nothing is distilled
    distill_loss: float | None = None


class WindowLoss(NamedTuple):
    """A window's loss in nats per target token, and the target tokens, over all ranks."""

    loss: float
    n_target_tokens: int


class Engine:
    """A model being trained on all ranks of the job."""

    def __init__(self, config: Config, mesh: Mesh, factors: Factors, hf_config: Any, device: torch.device):
        """Build the model, read its weights and divide the weights over the ranks. A collective.

        Raises:
            UserError: the global batch does not divide over the data-parallel ranks, or the model cannot run on this
                mesh.
        """
        self.config, self.mesh, self.device = config, mesh, device
        self.accumulation = self._accumulation()
        refuse_ranks(config, mesh.world)
        ds_config = deepspeed_config(config, self.accumulation)
        lm = self._lm(hf_config, ds_config)
        self.attention = install(lm, mesh, config.parallel.strategy)
        weight = config.optim.distill_short
        original = self._original(factors) if weight else None
        self.model = WindowLM(lm, factors, config.engine.loss_chunk_tokens, original, weight).train()
        self._accelerate(lm, device)
        gather_whole(recompute.install(lm, config.engine))  # last: it tiles the MLPs that act
        self.hf_config = hf_config
        self._engine = self._initialize(ds_config)
        self._saver = Saver()

    def _accelerate(self, lm: Any, device: torch.device) -> None:
        fused.accelerate(lm, self.config.engine.fused, device)

    def _original(self, factors: Factors) -> Original:
        """The frozen original model, divided over the ranks under ZeRO-3, else whole on the device. A collective."""
        zero = {
            key: value
            for key, value in self.config.engine.deepspeed.get("zero_optimization", {}).items()
            if key != "offload_optimizer"  # it has none
        }
        lm = self._frozen({"zero_optimization": zero})
        install(lm, self.mesh, self.config.parallel.strategy)
        return Original(lm, factors, self._gather(modifier_rank=None))

    def _frozen(self, ds_config: dict[str, Any]) -> Any:
        """The model at ``model.path``, without gradients."""
        model = self.config.model
        if self.config.engine.zero_stage == 3:
            return load_sharded(model, self.device, ds_config)
        return load.load_whole(load.folder_of(model), model.dtype, self.device.type, model.overrides)

    @property
    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def _accumulation(self) -> int:
        """Micro-batches of a step."""
        return accumulation_of(self.config, self.mesh.dp_size)

    def _lm(self, hf_config: Any, ds_config: dict[str, Any]) -> Any:
        """The Hugging Face model with its weights, divided over the ranks."""
        weights = _weights(self.config, hf_config)
        dtype, init_context = self.config.model.dtype, lambda: self._init_context(ds_config)
        return load.assembled(hf_config, dtype, weights, init_context, self._gather(modifier_rank=0))

    def _initialize(self, ds_config: dict[str, Any]) -> Any:
        import deepspeed

        optim = self.config.optim
        optimizer = (torch.optim.AdamW if self.config.engine.zero_stage else FiniteAdamW)(
            _parameter_groups(self.model, optim.weight_decay),
            lr=optim.lr,
            betas=(optim.betas[0], optim.betas[1]),
            eps=optim.eps,
            fused=self._on_cuda,
        )
        with quiet():
            engine, *_ = deepspeed.initialize(
                model=self.model, optimizer=optimizer, config=ds_config, dist_init_required=False
            )
        return engine

    def _init_context(self, ds_config: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Where parameters are created: divided over the ranks at once under ZeRO-3, else whole on the device."""
        if self.config.engine.zero_stage != 3:
            return self.device if self.device.type == "cuda" else contextlib.nullcontext()
        return zero_init(ds_config, self.accumulation * self.mesh.world)

    def _gather(self, modifier_rank: int | None) -> load.Gather:
        return gathered(modifier_rank) if self.config.engine.zero_stage == 3 else load.whole

    def step(self, batches: Sequence[Batch], lr: float, interrupted: Callable[[], bool] = lambda: False) -> StepStats:
        """Make one optimizer step over the micro-batches of this data-parallel rank. A collective.

        Args:
            batches: one for each step of the gradient accumulation.
            lr: learning rate of this step.
            interrupted: whether this rank was asked to stop; called before the last backward pass, as late as all ranks
                can share the answer.

        Raises:
            UserError: the step has no target token, or no attention strategy serves a batch; on every rank.
            RuntimeError: ranks were given different work, or a rank failed; the text has the reason, on every rank.
        """
        # Made while ranks compare: a rank that no strategy serves tells the others.
        attentions: list[SegmentAttention] = []
        work = agree(lambda: self._described(batches, attentions), self.mesh.sp_size)
        assert len(batches) == self.accumulation, (
            f"{len(batches)} micro-batches for an accumulation of {self.accumulation}"
        )
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        with told_to_all():
            return self._step(batches, attentions, work, interrupted)

    def _step(
        self,
        batches: Sequence[Batch],
        attentions: Sequence[SegmentAttention],
        work: Sequence[MicroBatch],
        interrupted: Callable[[], bool],
    ) -> StepStats:
        """Forward, backward and update.

        Backward starts from ``sum_CE_local * world * accumulation / n_target_tokens``. DeepSpeed divides gradients by
        the world and losses by the accumulation, so the result is the gradient of the mean over all target tokens of
        the global batch. The router's loss is a mean over segments: its parts are scaled by ``world * accumulation /
        n_segments``, which is ``sp``, and by its coefficient. Where a short segment is distilled, ``sum_CE_local`` has
        the divergence from the original model in it, with its weight.
        """
        shards = [
            shard_of(batch, attention.layout, self.device) for batch, attention in zip(batches, attentions, strict=True)
        ]
        n_targets = sum(one.n_targets for one in work)
        if n_targets == 0:
            raise UserError("a step has no target token at all; check data.path: its segments hold only padding")
        # [loss of short, loss of long, ranks asked to stop, the router's loss, and where one is added: the divergence].
        sums = torch.zeros(4 + self.model.distills, dtype=torch.float64, device=self.device)
        router_scale = self.mesh.sp_size * self.model.router_loss.coefficient if self.model.router_loss else 0.0
        losses = []
        for number, (batch, attention, shard) in enumerate(zip(batches, attentions, shards, strict=True), 1):
            total, router, *alone = self._engine(*shard, segment_attention=attention, window=batch.window)
            losses.append(total.detach().double())
            sums[3] += router.detach()
            if alone:  # a distilled segment
                sums[0] += alone[0].detach()
                sums[4] += alone[1].detach()
            else:
                sums[int(batch.window == LONG)] += losses[-1]
            # Divides by the target tokens of the global batch; world and accumulation cancel DeepSpeed's averaging.
            scale = torch.full_like(losses[-1], self.mesh.world * self.accumulation / n_targets, dtype=total.dtype)
            if number == len(batches):
                sums[2] = float(interrupted())
                dist.all_reduce(sums)
                # NaN gradients on every rank, also where only another rank's loss is not finite.
                scale.masked_fill_(~torch.isfinite(sums[:2].sum() + sums[4:].sum()), torch.nan)
            self._engine.backward(total * scale + router * router_scale)
            self._engine.step()
        return self._stats(sums, work, torch.stack(losses))

    def measure(self, batches: Sequence[Batch]) -> dict[str, WindowLoss]:
        """The loss of each window over the batches of all ranks, without a step. A collective.

        Args:
            batches: of this data-parallel rank; every rank has as many, with the same windows in the same order.

        Returns:
            Window -> loss, the same on every rank; a window without a target token is left out. The loss may not be
            finite.

        Raises:
            UserError: no attention strategy serves a batch; on every rank.
            RuntimeError: ranks were given different work, or a rank failed; the text has the reason, on every rank.
        """
        attentions: list[SegmentAttention] = []
        work = agree(lambda: self._described(batches, attentions), self.mesh.sp_size)
        sums = torch.zeros(len(WINDOWS), dtype=torch.float64, device=self.device)  # the summed loss of each window
        with told_to_all(), self._evaluating():
            for batch, attention in zip(batches, attentions, strict=True):
                shard = shard_of(batch, attention.layout, self.device)
                total, _ = self._engine(*shard, segment_attention=attention, window=batch.window)
                sums[WINDOWS.index(batch.window)] += total.double()
            dist.all_reduce(sums)
            losses: dict[str, float] = dict(zip(WINDOWS, sums.tolist(), strict=True))
        n_targets = {window: sum(one.n_targets for one in work if one.window == window) for window in WINDOWS}
        return {window: WindowLoss(losses[window] / n, n) for window, n in n_targets.items() if n}

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Forward passes that keep no activations and draw no random numbers (dropout)."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()
        if self.config.engine.zero_stage == 3:
            # The last forward pass has begun to gather weights for a backward pass that does not come.
            self._engine.optimizer.empty_partition_cache()

    def _described(self, batches: Sequence[Batch], attentions: list[SegmentAttention]) -> list[MicroBatch]:
        """The micro-batches as ranks compare them; fills ``attentions`` with the attention of each."""
        attentions.extend(self.attention.segment(batch.spans, len(batch.tokens), batch.jumps) for batch in batches)
        return [described(batch, attention.choice.title) for batch, attention in zip(batches, attentions, strict=True)]

    def _stats(self, sums: torch.Tensor, work: Sequence[MicroBatch], losses: torch.Tensor) -> StepStats:
        n_long = sum(one.n_targets for one in work if one.window == LONG)
        n_short = sum(one.n_targets for one in work) - n_long
        norm = self._grad_norm()
        short, long, asked, router, *divergence = sums.tolist()
        finite = math.isfinite(short + long + sum(divergence)) and (
            self._loss_scaled or norm is None or math.isfinite(norm)
        )
        return StepStats(
            loss=(short + long) / (n_short + n_long),
            loss_short=short / n_short if n_short else None,
            loss_long=long / n_long if n_long else None,
            distill_loss=divergence[0] / n_short if divergence and n_short else None,
            router_loss=None if self.model.router_loss is None else router / len(work),
            n_target_tokens=n_short + n_long,
            n_tokens=sum(one.n_tokens for one in work),
            window_mix=sum(one.window == LONG for one in work) / len(work),
            n_pairs=sum(one.n_pairs for one in work),
            grad_norm=norm if norm is not None and math.isfinite(norm) else None,
            interrupted=asked > 0,
            finite=finite,
            suspects=tuple(number for number, loss in enumerate(losses.tolist()) if not math.isfinite(loss)),
        )

    @property
    def _loss_scaled(self) -> bool:
        """float16: DeepSpeed finds the loss scale by overflows, so a gradient that overflows is no fault."""
        return self.config.model.dtype == "float16"

    def _grad_norm(self) -> float | None:
        """The global norm of the last step, the same on every rank; not finite where no update was made."""
        norm = self._engine.get_global_grad_norm()
        if not self.config.engine.zero_stage and not self._engine.optimizer.finite:
            return math.nan
        return None if norm is None else float(norm)

    def refuse_non_finite(self) -> None:
        """Refuse a model or an optimizer that holds a number that is not finite. A collective.

        Raises:
            UserError: a weight or a state of some rank is not finite; the text names the tensor, on every rank.
        """
        control.together(lambda: refuse_non_finite(self._held()))

    def _held(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's part of the weights and of the optimizer's states, by name."""
        for name, parameter in self.model.named_parameters():
            yield f"the weight {name.removeprefix(MODULE_PREFIX)}", getattr(parameter, "ds_tensor", parameter).detach()
        for states in getattr(self._engine.optimizer, "optimizer", self._engine.optimizer).state.values():
            yield from (
                (f"the optimizer's {key}", value) for key, value in states.items() if isinstance(value, torch.Tensor)
            )

    def save(self, checkpoints: Checkpoints, step: int, wait: bool = True) -> None:
        """Write a checkpoint after ``step`` steps, as ``checkpoint.Draft.write`` does. A collective.

        Args:
            checkpoints: the run's.
            step: steps done so far.
            wait: False: return as soon as later steps cannot change the checkpoint any more (``saving``).

        Raises:
            UserError: a weight or a state is not finite, or the disk is full; earlier checkpoints stay.
        """
        self._saver.finish()
        self.refuse_non_finite()
        with quiet():
            self._saver.save(self._engine, checkpoints, step, wait)

    def check_saving(self) -> None:
        """Raise the error of a checkpoint that was written meanwhile; on every rank. A collective.

        Raises:
            UserError: the disk is full; earlier checkpoints stay.
        """
        self._saver.check()

    def finish_saving(self) -> None:
        """Wait for a checkpoint that is being written. A collective.

        Raises:
            UserError: the disk is full; earlier checkpoints stay.
        """
        self._saver.finish()

    def load(
        self, checkpoints: Checkpoints, resume_from: int | None = None, accept: Callable[[int], None] = lambda _: None
    ) -> int:
        """Read the latest checkpoint, or the one to go back to, as ``checkpoint.load`` does; returns the number of
        steps done. A collective.

        Raises:
            UserError: the checkpoint cannot be used, or ``accept`` refuses it; on every rank.
        """
        with quiet():
            return checkpoint.load(self._engine, checkpoints, resume_from, accept)

    def write_model(self, folder: Path, config: dict[str, Any], extras: Callable[[Path], None] | None = None) -> None:
        """Write a Hugging Face folder: the weights, ``config`` as config.json, and the files of ``extras``. A
        collective.

        No rank holds all weights at once.
        """
        load.write_folder(self.model.lm, config, folder, self._gather(modifier_rank=None), extras=extras)

    def named_gradients(self) -> dict[str, torch.Tensor]:
        """Whole fp32 gradients by the model's own names; valid between two backward passes.

        For tests and inspection. A collective.
        """
        from deepspeed.utils import safe_get_full_grad

        whole = ((name, safe_get_full_grad(parameter)) for name, parameter in self.model.named_parameters())
        return {name.removeprefix(MODULE_PREFIX): gradient for name, gradient in whole if gradient is not None}


def _weights(config: Config, hf_config: Any) -> dict[str, Any]:
    if config.model.path is None:
        return load.scratch_weights(hf_config, config.seed)
    return load.safetensors_of(load.folder_of(config.model))


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay; norms and biases, which have one dimension, do not."""
    matrices = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
