"""DeepSpeed behind a narrow door: ``step``, ``save``, ``load``, ``write_model`` for training; ``load_sharded`` for forward passes alone.

Choice: to DeepSpeed every rank is a data-parallel rank. Sequence parallelism is a transform of the data (tokens, labels and positions are sharded together)
and of attention; each rank returns the *sum* of its own target tokens' losses, scaled so that DeepSpeed's averaging over ranks and accumulation steps
yields the gradient of ``sum of all losses / number of all target tokens`` of the step, exactly. Cost: two all-reduces of a few numbers and one
exchange of a few words on the host a step, by which a rank that was handed other work than its peers is found before it is waited for.

A loss that is not finite makes the step's gradients NaN on every rank. So one mechanism covers losses and gradients: no update is made where the
global gradient norm is not finite. DeepSpeed's ZeRO optimizers decide so on all ranks together; without ZeRO ``_FiniteAdamW`` does.

This is the only file that imports deepspeed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lr2train.attention.hf import install
from lr2train.attention.segment import SegmentAttention
from lr2train.config import Config, ModelConfig, UserError
from lr2train.data.batch import Batch
from lr2train.model import load
from lr2train.model.window_lm import WindowLM
from lr2train.parallel import control
from lr2train.parallel.failure import told_to_all
from lr2train.parallel.mesh import Mesh
from lr2train.rope.factors import Factors
from lr2train.training.agreement import Said, agree, said_of
from lr2train.training.deepspeed import checkpoint
from lr2train.training.deepspeed.checkpoint import Checkpoints
from lr2train.training.segment import tensors_of

MODULE_PREFIX = "lm."  # the Hugging Face model's names inside WindowLM


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did, the same on every rank."""

    loss: float  # nats per target token over the whole step
    loss_short: float | None  # over the step's short segments, None where there were none
    loss_long: float | None
    n_target_tokens: int
    n_tokens: int  # of all segments, padding included
    window_mix: float  # share of long segments
    n_pairs: float  # query-key pairs that attention has to look at, causal
    grad_norm: float | None  # None where DeepSpeed computes none, and where the norm is not finite
    interrupted: bool  # some rank was asked to stop
    finite: bool = True  # loss and gradient norm are finite; False: no update was made
    suspects: tuple[int, ...] = ()  # this rank's micro-batches whose own loss is not finite


def start_deepspeed(device: torch.device) -> None:
    """Let DeepSpeed adopt the process group that ``parallel.processes.start`` made."""
    for name, value in (
        ("RANK", dist.get_rank()),
        ("WORLD_SIZE", dist.get_world_size()),
        ("LOCAL_RANK", dist.get_rank()),
        ("LOCAL_SIZE", dist.get_world_size()),
    ):
        os.environ.setdefault(name, str(value))  # DeepSpeed reads them; whoever made the process group by hand is on one machine
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed")  # DeepSpeed calls what torch has renamed
    with _quiet():
        import deepspeed

        if device.type == "cpu":
            _without_cpu_op()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def _without_cpu_op() -> None:
    """Keep DeepSpeed from compiling and starting its shared-memory all-reduce for CPUs.

    Only DeepSpeed's inference calls it. It costs a minute of compiling, which a kill leaves locked for ever, and 69 MB of shared memory a rank,
    which no process frees. DeepSpeed asks this table whether the op can be built; filling the table also spares the probes behind it.
    """
    from deepspeed import ops

    ops.__dict__.setdefault("__compatible_ops__", {})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints build and start-up chatter to stdout, which belongs to results; errors stay on stderr."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def deepspeed_config(config: Config, accumulation: int) -> dict[str, Any]:
    """The DeepSpeed config of an experiment; ``engine.deepspeed`` is merged over it."""
    engine = config.engine
    written: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW runs on the CPU too when optimizer states are offloaded
        "steps_per_print": 10**12,
    }
    written |= _dtype_sections(config.model.dtype)
    if config.model.dtype == "bfloat16":
        written["data_types"] = {"grad_accum_dtype": "fp32"}
        written["communication_data_type"] = "fp32"  # 64 ranks x 8 micro-steps of bfloat16 sums would round away small gradients
    if engine.zero_stage == 3:
        written["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    return _merged(written, engine.deepspeed)


def _dtype_sections(dtype: str) -> dict[str, Any]:
    return {section: {"enabled": True} for section, name in (("bf16", "bfloat16"), ("fp16", "float16")) if dtype == name}


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = _merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


class Engine:
    """A model being trained on all ranks of the job."""

    def __init__(self, config: Config, mesh: Mesh, factors: Factors, hf_config: Any, device: torch.device):
        """Build, fill and shard the model.

        Raises:
            UserError: the batch does not divide over the data-parallel ranks, or the model cannot run under this mesh.
        """
        self.config, self.mesh, self.device = config, mesh, device
        self.accumulation = accumulation_of(config, mesh.dp_size)
        ds_config = deepspeed_config(config, self.accumulation)
        weights = _weights(config, hf_config)
        lm = load.assembled(hf_config, config.model.dtype, weights, lambda: self._init_context(ds_config), self._gather(modifier_rank=0))
        self.attention = install(lm, mesh, config.parallel.strategy)
        if config.engine.activation_checkpointing:
            lm.activation_checkpointing_enable({"use_reentrant": False})
        self.model = WindowLM(lm, factors, config.engine.loss_chunk_tokens).train()
        self.hf_config = hf_config
        self._engine = self._initialize(ds_config)

    def _initialize(self, ds_config: dict[str, Any]) -> Any:
        import deepspeed

        optim = self.config.optim
        optimizer = (torch.optim.AdamW if self.config.engine.zero_stage else _FiniteAdamW)(
            _parameter_groups(self.model, optim.weight_decay),
            lr=optim.lr,
            betas=(optim.betas[0], optim.betas[1]),
            eps=optim.eps,
            fused=self.device.type == "cuda",
        )
        with _quiet():
            engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=ds_config, dist_init_required=False)
        return engine

    def _init_context(self, ds_config: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
        if self.config.engine.zero_stage != 3:
            return self.device if self.device.type == "cuda" else contextlib.nullcontext()
        return _zero_init(ds_config, self.accumulation * self.mesh.world)

    def _gather(self, modifier_rank: int | None) -> load.Gather:
        return _gathered(modifier_rank) if self.config.engine.zero_stage == 3 else load.whole

    def step(self, batches: Sequence[Batch], lr: float, interrupted: Callable[[], bool] = lambda: False) -> StepStats:
        """One optimizer step over this data-parallel rank's micro-batches. ``interrupted`` is asked as late in the step as all ranks can share it.

        Raises:
            UserError: the step has no target token, or no strategy serves a batch; on every rank.
            RuntimeError: ranks were handed unlike work, or one of them failed; with the reason, on every rank.
        """
        attentions: list[SegmentAttention] = []  # made while ranks compare: a rank that no strategy serves tells the others
        agree(lambda: self._said(batches, attentions), self.mesh.sp_size)
        assert len(batches) == self.accumulation, f"{len(batches)} micro-batches for an accumulation of {self.accumulation}"
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        with told_to_all():
            return self._step(batches, attentions, interrupted)

    def _step(self, batches: Sequence[Batch], attentions: Sequence[SegmentAttention], interrupted: Callable[[], bool]) -> StepStats:
        """Forward, backward and update.

        The loss that goes into backward is ``sum_CE_local * world * accumulation / n_target_tokens``: DeepSpeed divides gradients by the world and losses by
        the accumulation, so what arrives is the gradient of the mean over all target tokens of the step.
        """
        shards = [self._shard(batch, attention) for batch, attention in zip(batches, attentions, strict=True)]
        counts = self._counts(batches, shards)
        n_targets = int(counts[:2].sum())
        if n_targets == 0:
            raise UserError("a step has no target token at all; check data.path: its segments hold only padding")
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss of short, of long, ranks that were asked to stop
        losses = []
        for number, (batch, attention, shard) in enumerate(zip(batches, attentions, shards, strict=True), 1):
            total = self._engine(*shard, segment_attention=attention, window=batch.window)
            losses.append(total.detach().double())
            sums[int(batch.window == "long")] += losses[-1]
            scale = torch.full_like(losses[-1], self.mesh.world * self.accumulation / n_targets, dtype=total.dtype)
            if number == len(batches):
                sums[2] = float(interrupted())
                dist.all_reduce(sums)
                scale.masked_fill_(~torch.isfinite(sums[:2].sum()), torch.nan)
            self._engine.backward(total * scale)
            self._engine.step()
        return self._stats(sums, counts, torch.stack(losses))

    def _said(self, batches: Sequence[Batch], attentions: list[SegmentAttention]) -> list[Said]:
        """What this rank says of the step; fills ``attentions`` with the attention of each batch."""
        attentions.extend(self.attention.segment(batch.spans, len(batch.tokens)) for batch in batches)
        return [said_of(batch, attention.choice.title) for batch, attention in zip(batches, attentions, strict=True)]

    def _shard(self, batch: Batch, attention: SegmentAttention) -> tuple[torch.Tensor, torch.Tensor]:
        # Cloned, as a view would keep the whole.
        tokens, labels = (attention.layout.shard(whole, 0).clone() for whole in tensors_of(batch, self.device))
        return tokens, labels

    def _counts(self, batches: Sequence[Batch], shards: Sequence[tuple[torch.Tensor, ...]]) -> torch.Tensor:
        """[targets in short, targets in long, tokens, long segments, segments, query-key pairs of all ranks' segments] of the whole step."""
        counts = torch.zeros(6, dtype=torch.int64, device=self.device)
        for batch, (tokens, labels) in zip(batches, shards, strict=True):
            long = int(batch.window == "long")
            counts[long] += (labels != -100).sum()
            counts[2] += len(tokens)
            counts[3] += long
            counts[4] += 1
            counts[5] += sum((stop - start) * (stop - start + 1) // 2 for start, stop in batch.spans)
        dist.all_reduce(counts)
        return counts

    def _stats(self, sums: torch.Tensor, counts: torch.Tensor, losses: torch.Tensor) -> StepStats:
        n_short, n_long, n_tokens, n_long_segments, n_segments, n_pairs = counts.tolist()
        norm = self._grad_norm()
        short, long, asked = sums.tolist()
        finite = math.isfinite(short + long) and (self._loss_scaled or norm is None or math.isfinite(norm))
        return StepStats(
            loss=(short + long) / (n_short + n_long),
            loss_short=short / n_short if n_short else None,
            loss_long=long / n_long if n_long else None,
            n_target_tokens=n_short + n_long,
            n_tokens=n_tokens,
            window_mix=n_long_segments / n_segments,
            n_pairs=n_pairs / self.mesh.sp_size,  # every rank of a sequence-parallel group has counted the whole segment
            grad_norm=norm if norm is not None and math.isfinite(norm) else None,
            interrupted=asked > 0,
            finite=finite,
            suspects=tuple(torch.isfinite(losses).logical_not().nonzero().flatten().tolist()),
        )

    @property
    def _loss_scaled(self) -> bool:
        """float16: DeepSpeed looks for the loss scale by overflows, so a gradient that overflows is no fault."""
        return self.config.model.dtype == "float16"

    def _grad_norm(self) -> float | None:
        """Of the step that was just made, the same on every rank; not finite where no update was made."""
        norm = self._engine.get_global_grad_norm()
        if not self.config.engine.zero_stage and not self._engine.optimizer.finite:
            return math.nan
        return None if norm is None else float(norm)

    def refuse_non_finite(self) -> None:
        """Refuse weights and optimizer states that hold a number that is not finite, on every rank.

        Raises:
            UserError: a rank's part holds one; the text names a tensor.
        """
        control.together(lambda: _refuse_non_finite(self._held()))

    def _held(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's part of the weights, and of the optimizer's states."""
        for name, parameter in self.model.named_parameters():
            yield f"the weight {name.removeprefix(MODULE_PREFIX)}", getattr(parameter, "ds_tensor", parameter).detach()
        for states in getattr(self._engine.optimizer, "optimizer", self._engine.optimizer).state.values():
            yield from ((f"the optimizer's {key}", value) for key, value in states.items() if isinstance(value, torch.Tensor))

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        """Write a checkpoint of step ``step`` (steps done so far) and only then name it the latest; older ones beyond ``checkpoints.keep`` go.

        Raises:
            UserError: a weight or state is not finite, or there is no room; the checkpoints before stay.
        """
        self.refuse_non_finite()
        with _quiet():
            checkpoint.save(self._engine, checkpoints, step)

    def load(self, checkpoints: Checkpoints, resume_from: int | None = None, accept: Callable[[int], None] = lambda _: None) -> int:
        """Load the latest checkpoint, or the one to go back to; returns the number of steps done, 0 where there is none.

        ``accept`` is called with that number before anything is read, and may refuse it.

        Raises:
            UserError: the checkpoint is damaged, another run's, not there on every machine, or cannot be read by this number of ranks; on every rank.
        """
        with _quiet():
            return checkpoint.load(self._engine, checkpoints, resume_from, accept)

    def write_model(self, folder: Path, config: dict[str, Any], extras: Callable[[Path], None] | None = None) -> None:
        """Write the weights as a Hugging Face folder with ``config`` as its config.json and ``extras``; no rank holds them all at once."""
        load.write_folder(self.model.lm, config, folder, self._gather(modifier_rank=None), extras=extras)

    def named_gradients(self) -> dict[str, torch.Tensor]:
        """Whole fp32 gradients by the model's own names, after backward and before the next step's; for tests and inspection."""
        from deepspeed.utils import safe_get_full_grad

        whole = ((name, safe_get_full_grad(parameter)) for name, parameter in self.model.named_parameters())
        return {name.removeprefix(MODULE_PREFIX): gradient for name, gradient in whole if gradient is not None}


class _FiniteAdamW(torch.optim.AdamW):
    """AdamW that makes no update where a gradient is not finite. For ZeRO stage 0, where every rank holds the same whole gradients.

    Attributes:
        finite: whether the last call made its update.
    """

    finite = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update, or none."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.finite = bool(torch.stack([torch.isfinite(one).all() for one in gradients]).all())
        return super().step(closure) if self.finite else None


def _refuse_non_finite(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    bad = [name for name, tensor in tensors if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    if bad:
        raise UserError(
            f"{bad[0]} holds numbers that are not finite ({len(bad)} tensors do), so no checkpoint is written and the one before stays; "
            "set optim.lr to a lower value under another name="
        )


def load_sharded(model_config: ModelConfig, device: torch.device, deepspeed_config: Mapping[str, Any] | None = None) -> Any:
    """A model for scoring whose weights are divided over all ranks (ZeRO-3); for one that does not fit a device.

    Returns a Hugging Face causal LM in eval mode, without gradients. Its base model and its output embeddings are called as those of
    ``load.load_whole``; a decoder layer's weights are gathered when it is called and let go after it. Every rank has to make the same
    calls in the same order, each with a document and factors of its own: the tables of a rotary module are no parameters. No rank ever
    holds more than its share, some layers and ``load.GROUP_BYTES``. A collective; starts DeepSpeed.

    Args:
        model_config: ``path`` names a folder of safetensors.
        device: of this rank.
        deepspeed_config: merged over ours; ``engine.deepspeed``.

    Raises:
        UserError: the folder is missing, or does not hold this model's weights.
    """
    start_deepspeed(device)
    hf_config = load.config_of(model_config)
    written = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "steps_per_print": 10**12, **_dtype_sections(model_config.dtype)
    }  # fmt: skip
    ds_config = _merged(written, dict(deepspeed_config or {}))
    weights, ranks = load.safetensors_of(load.folder_of(model_config)), dist.get_world_size()
    model = load.assembled(hf_config, model_config.dtype, weights, lambda: _zero_init(ds_config, ranks), _gathered(modifier_rank=0))
    _gather_in_forward(model.eval().requires_grad_(False), ds_config)
    return model


def _gather_in_forward(model: Any, ds_config: dict[str, Any]) -> None:
    """Have DeepSpeed gather weights around forward calls: those of a decoder layer together, once, however often its parts are called.

    DeepSpeed counts its passes by calls of the whole model; ours call the base model and the head, so a pass begins with the base model.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, sorted({type(layer) for layer in model.base_model.layers}, key=repr))
    with _quiet():
        engine: Any = deepspeed.initialize(model=model, config=ds_config, dist_init_required=False)[0]

    def begin_pass(*_: Any) -> None:
        engine.optimizer.get_param_coordinator().reset_step()  # this function also keeps the engine, whose end would take the hooks away

    model.base_model.register_forward_pre_hook(begin_pass, prepend=True)


def classes_in_checkpoints() -> list[Any]:
    """DeepSpeed's own classes that its checkpoints hold beside tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def _zero_init(ds_config: dict[str, Any], batch_size: int) -> contextlib.AbstractContextManager[Any]:
    """Parameters that are made inside are divided over the ranks at once."""
    import deepspeed

    # No dtype argument: on a CPU without fp16, 0.19.8 takes bfloat16 whatever it says; the config's bf16 and fp16 sections are heard.
    return deepspeed.zero.Init(config_dict_or_path=ds_config | {"train_batch_size": batch_size})


def _gathered(modifier_rank: int | None) -> load.Gather:
    import deepspeed

    return lambda parameters: deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


def accumulation_of(config: Config, dp_size: int) -> int:
    """Micro-steps of an optimizer step.

    Raises:
        UserError: the global batch does not divide over the data-parallel ranks.
    """
    total = config.optim.segments_per_step
    if total % dp_size:
        raise UserError(
            f"optim.segments_per_step={total} is not divisible by the {dp_size} data-parallel ranks (world / parallel.sp); "
            f"set optim.segments_per_step to {-(-total // dp_size) * dp_size} or change parallel.sp"
        )
    return total // dp_size


def _weights(config: Config, hf_config: Any) -> dict[str, Any]:
    if config.model.path is None:
        return load.scratch_weights(hf_config, config.seed)
    return load.safetensors_of(load.folder_of(config.model))


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases (one dimension) do not."""
    matrices = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
