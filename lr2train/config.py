"""Every setting of lr2train as a plain dataclass, with its unit, its reason and its limits, and ``load``, which checks a composed config.

Choice: structured Hydra schemas give the types, YAML under ``conf/`` gives the values, and ``load`` turns a composed config into dataclasses once,
at the top of a verb. Limits and choices stand beside their field, and a verb is refused over the keys that it reads alone (``READS``). Cost: a key
has to be written here before it can be written in YAML; in return a typo, a wrong type or a value out of its limits fails before the verb
starts, and names the key. Units stand in the names: ``_tokens``, ``_steps``, ``_s``, ``_gib``.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf


class UserError(ValueError):
    """Input that a user can mend. The text is one sentence: what, the value, the limit, the config key, the remedy. Verbs exit with code 2."""


@dataclass(frozen=True)
class Limits:
    """Which numbers a field takes; of a list or a dict, which numbers may stand in it."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    infinite: bool = False  # inf is a value with a meaning
    count: int | None = None  # how many numbers a list has

    def why_not(self, value: float) -> str | None:
        """What is wrong with a number, or None."""
        low, high = self.least if self.above is None else self.above, self.most if self.below is None else self.below
        if math.isnan(value) or (math.isinf(value) and not self.infinite):
            kind = "number" if self.infinite else "finite number"
            return (
                f"is not a {kind} "
                + (f"above {low}" if self.above is not None else f"of {low} or more")
                + (f" and at most {high}" if high else "")
            )
        too_low = low is not None and (value < low or value == self.above)
        too_high = high is not None and (value > high or value == self.below)
        if not (too_low or too_high):
            return None
        if low is not None and high is not None:
            left_out = self.above if too_low else self.below
            return f"is not between {low} and {high}" + ("" if left_out is None else f", {left_out} left out")
        return f"is not above {self.above}" if self.above is not None else f"is below {low}" if too_low else f"is above {high}"

    def nearest(self, value: float, default: Any) -> Any:
        """A number that is allowed, in the place of one that is not: the bound where only one stands, else the default, else a bound."""
        if self.least is not None and self.most is None and self.below is None and value < self.least:
            return self.least
        if isinstance(default, int | float) and self.why_not(default) is None:
            return default
        if self.most is not None and value > self.most:
            return self.most
        return self.least if self.least is not None else 1 if self.above == 0 else self.most


def number(default: Any, **limits: Any) -> Any:
    """A field of numbers within ``Limits``."""
    return _field(default, limits=Limits(**limits))


def any_number(default: Any, why: str) -> Any:
    """A field of numbers that has no limits, and why."""
    return _field(default, unlimited=why)


def one_of(default: Any, *others: Any) -> Any:
    """A field that takes one of some values."""
    return _field(default, choices=(default, *others))


def a_path(default: Any = None) -> Any:
    """A field of paths: ``~`` at the beginning is the home folder."""
    return _field(default, path=True)


def _field(default: Any, **metadata: Any) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


PACKAGE = Path(__file__).resolve().parent
CONF_FOLDER = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # in a wheel, in a checkout


NEEDLE_NAMES = 1600  # needles of one document have different names (lr2train.data.needles)


class LongAttention(Enum):
    """What a token of a long segment may attend to: the whole segment (the paper, Figure 5b) or its own document (the authors' released example)."""

    segment = "segment"
    document = "document"


class OverLong(Enum):
    """What becomes of a document over its bucket's limit (long: the segment; short: the original window) when segments are planned."""

    split = "split"
    truncate = "truncate"
    drop = "drop"


class WeightsOf(Enum):
    """What a source's weight is a share of: the tokens of each bucket, or all tokens of the corpus (then every bucket is met too)."""

    bucket = "bucket"
    corpus = "corpus"


@dataclass
class ModelConfig:
    """The causal LM: a Hugging Face folder or hub id to start from, or an architecture to train from scratch."""

    # Folder with config.json and safetensors, or a hub id. null: `architecture` is trained from scratch.
    path: str | None = a_path()
    # Commit of a hub model, so that a run can be repeated.
    revision: str | None = None
    # Hub ids are refused unless this is true: nothing is downloaded by surprise.
    allow_download: bool = False
    # transformers config values, `model_type` first. Used when `path` is null.
    architecture: dict[str, Any] = field(default_factory=dict)
    # transformers config values laid over those of `path`, such as sliding_window: null.
    overrides: dict[str, Any] = field(default_factory=dict)
    # L0. null: read from the model's own config.
    original_window_tokens: int | None = number(None, least=1)
    # The type that weights are held and multiplied in.
    dtype: str = one_of("float32", "bfloat16", "float16")


@dataclass
class RopeConfig:
    """Where the long window's factors come from: a method with its parameters, or a factors.json that a search wrote."""

    # L.
    target_window_tokens: int = number(131072, least=1)
    # A factors.json, or a model folder whose config carries a `longrope` dict. Wins over `method`.
    factors: str | None = a_path()
    # A name of lr2train.rope.METHODS.
    method: str = "longrope2"
    # rcd, a zero-based cosine index, of longrope2, yarn_rcd and ntk_rcd.
    critical_index: int | None = number(None, least=1)
    # Rescale factors from the critical index on (longrope2). One number stands for a constant tail.
    tail: list[float] = number([], above=0)
    # Multiplies cos and sin in the long window; it is always 1 in the short one. null: the method's own.
    attention_factor: float | None = number(None, above=0)
    # Further keyword arguments of the method.
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class SourceConfig:
    """One origin of documents. `kind` picks the reader: stdlib | folder | hub | needles, or custom for a class of your own that `target` names."""

    name: str = MISSING
    kind: str = "folder"
    # Folder or file (kind: folder), or hub id (kind: hub).
    path: str | None = a_path()
    # kind: custom. package.module.Class, built with `options`, whose instances iterate over (id, text).
    target: str | None = None
    # Of .jsonl, .parquet and .arrow records; dots lead into records (meta.text).
    text_column: str = "text"
    # null: no limit.
    max_documents: int | None = number(None, least=1)
    # Of text, read in order. null: no limit.
    max_bytes: int | None = number(None, least=1)
    # Of documents of `windows`, BOS and EOS included. Reading stops where they are reached. null: no limit.
    max_tokens: int | None = number(None, least=1)
    # A longer document is broken: real ones are books, not dumps.
    max_document_bytes: int = number(64 << 20, least=1)
    # Of a source's records, of its files and of its bytes. Beyond this share the job stops, because text is being lost.
    max_broken_share: float = number(0.05, least=0, most=1)
    # Documents of another window are skipped once tokenised.
    windows: list[str] = field(default_factory=lambda: ["short", "long"])
    # Share of the tokens of each bucket, or of the corpus (data.weights_of), relative to the other sources.
    weight: float = number(1.0, least=0)
    # Further settings of the kind (needles: lengths, wording …).
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageConfig:
    """One stage of the curriculum that trains a tiny base model from scratch. The four shares are relative to each other."""

    steps: int = number(MISSING, least=1)
    # Of every document. A segment holds segment_tokens / length_tokens documents.
    length_tokens: int = number(MISSING, least=8)
    # Segments that repeat random tokens, with loss on the repeats only.
    repeats: float = number(0.0, least=0)
    # Segments of needle documents of 1 … max_pairs pairs, with loss on the answers only.
    needles: float = number(0.0, least=0)
    # Segments crammed with pairs, each asked for, with loss on the answers only. Telling many needles apart is the slow part of learning.
    dense: float = number(0.0, least=0)
    # Segments of plain text.
    text: float = number(0.0, least=0)


@dataclass
class BucketConfig:
    """A range of document lengths (BOS and EOS included), the window that it trains, and its part of that window's tokens."""

    name: str = MISSING
    window: str = "long"  # a name of lr2train.data.batch.WINDOWS
    # Documents longer than this. null: 0 for short, the original window for long.
    above_tokens: int | None = number(None, least=0)
    # Documents of at most this. null: the original window for short, any length for long.
    to_tokens: int | None = number(None, least=1)
    # Share of the window's tokens, relative to the window's other buckets.
    weight: float = number(1.0, least=0)
    # Weight of each source in this bucket, relative to all such weights of the window. `weight` above and the sources' own weights then do nothing.
    sources: dict[str, float] = number({}, least=0)
    # null: data.over_long.
    over_limit: OverLong | None = None


@dataclass
class NeedleConfig:
    """How needle documents read."""

    # A name of lr2train.data.needles.WORDINGS.
    wording: str = "paper"
    # Of the hidden number.
    digits: int = number(7, least=1, most=18)
    # Needles hidden in one training document (1 … max).
    max_pairs: int = number(1, least=1, most=NEEDLE_NAMES)
    # Share of training documents whose first asked needle stands at the very start, the farthest from its question.
    at_start: float = number(0.4, least=0, most=1)
    # Needles asked for at the end of a training document (1 … max). More questions are more answers to learn from.
    max_questions: int = number(1, least=1, most=NEEDLE_NAMES)


@dataclass
class DecontaminateConfig:
    """Evaluation sets whose text must not be trained on."""

    # .txt or .jsonl; every string of a record counts. Without files nothing is compared.
    files: list[str] = a_path([])
    # Words. A document that shares so many in a row is left out (Brown et al., 2020, appendix C).
    ngram: int = number(13, least=1)


@dataclass
class DataConfig:
    """Documents, tokens, segments."""

    # The corpus that `prepare` wrote (runs/<name>).
    path: str | None = a_path()
    # segments: planned segments of the corpus. curriculum: `stages` below, for a base model from scratch.
    kind: str = one_of("segments", "curriculum")
    sources: list[SourceConfig] = field(default_factory=list)
    # Folder or tokenizer.json. null: a byte-level BPE is trained on the sources.
    tokenizer: str | None = a_path()
    # Of the trained tokenizer. The least is its specials, bytes and pairs of digits.
    vocab_size: int = number(1024, least=358)
    # Of text that the tokenizer learns from, an equal part from each source. Merges settle long before.
    tokenizer_train_bytes: int = number(100_000_000, least=1)
    # gigatoken: the same ids as hf, many times faster, checked on the very documents. auto: gigatoken where it serves.
    tokenizer_backend: str = one_of("hf", "gigatoken", "auto")
    # Processes that tokenise. 0: one a core.
    workers: int = number(0, least=0)
    # Of input that a process takes at a time, and that a kill may cost. A compressed file is one shard.
    shard_bytes: int = number(64 << 20, least=1)
    # Leave out exact duplicates. source: within each source. corpus: over all. The first document stays.
    deduplicate: str = one_of("none", "source", "corpus")
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    # Compare the corpus' files with their checksums before training (once, as long as they do not change).
    verify: bool = True
    # Length of a segment: the target window.
    segment_tokens: int = number(131072, least=2)
    # Budget of tokens in short segments. 0: every document once.
    short_tokens: int = number(0, least=0)
    # Budget of tokens in long segments. 0: every document once.
    long_tokens: int = number(0, least=0)
    # Budgets by length. A window without a bucket has one of all its documents.
    buckets: list[BucketConfig] = field(default_factory=list)
    # corpus: source weights and buckets both hold, by the mix nearest to the documents' own lengths.
    weights_of: WeightsOf = WeightsOf.bucket
    # Of a document. Up to four passes over the same text are about as good as new text (Muennighoff et al., 2023).
    max_repeats: float = number(4.0, above=0)
    # Share kept of a source's documents below keep_below_tokens, by source: data.keep_below.NAME=0.1
    keep_below: dict[str, float] = number({}, least=0, most=1)
    # Fu et al. (2024) keep a tenth of those.
    keep_below_tokens: int = number(4096, least=0)
    long_attention: LongAttention = LongAttention.segment
    over_long: OverLong = OverLong.split
    # Share of documents kept out of training, for the search and the evaluation.
    holdout: float = number(0.02, least=0, most=1)
    # Sequence shards of a segment (a number or a list) whose borders no short document crosses. Attention then costs no communication.
    align_sp: Any = 1
    # Segments of one window that follow each other in a step, shared by the data-parallel ranks: any number of ranks that divides it sees the
    # same data at the same step. 0: a multiple of the first start's ranks, up to a quarter of a step.
    group_segments: int = number(0, least=0)
    # Steps that are passed over, as metrics.jsonl counts them: ["1200-1230", "1500"]. Their data is never trained on; the counter and the
    # learning rate go on.
    skip_steps: list[str] = field(default_factory=list)
    # Steps of batches that are made ahead.
    prefetch_steps: int = number(2, least=0)
    # Threads that make them. More help where the corpus lies on a slow disk.
    loader_threads: int = number(1, least=1)
    needles: NeedleConfig = field(default_factory=NeedleConfig)
    stages: list[StageConfig] = field(default_factory=list)


STRATEGIES = ("local", "ulysses", "ring", "gather", "ulysses_ring", "ring_flash_attn")  # of sequence-parallel attention


@dataclass
class ParallelConfig:
    """How ranks divide the work: world = data parallel x sequence parallel."""

    # Ranks that share one segment.
    sp: int = number(1, least=1)
    # auto: for every segment the one that sends least. A name of STRATEGIES: for all segments.
    strategy: str = one_of("auto", *STRATEGIES)
    # Of the sp ranks, how many a ring holds (ulysses_ring). 0: as many as heads or one node cannot serve by ulysses.
    ring: int = number(0, least=0)
    # A collective that somebody does not join for so long ends the job.
    timeout_s: float = number(600.0, above=0)


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = number(2e-5, above=0)
    betas: list[float] = number([0.9, 0.95], least=0, below=1, count=2)
    eps: float = number(1e-8, above=0)
    # On matrices. Norms and biases are never decayed.
    weight_decay: float = number(0.0, least=0)
    # Global gradient norm. 0: gradients are not clipped.
    clip: float = number(1.0, least=0)
    schedule: str = one_of("cosine", "linear", "constant")
    warmup_steps: int = number(40, least=0)
    # Of lr, where the schedule ends.
    min_lr_ratio: float = number(0.0, least=0, most=1)
    # Optimizer steps. 0: one epoch of the planned segments.
    steps: int = number(0, least=0)
    # The global batch: data-parallel ranks x accumulation.
    segments_per_step: int = number(64, least=1)


@dataclass
class EngineConfig:
    """DeepSpeed."""

    zero_stage: int = one_of(3, 2, 1, 0)
    activation_checkpointing: bool = True
    # Positions whose logits exist at one time.
    loss_chunk_tokens: int = number(4096, least=1)
    checkpoint_every_steps: int = number(100, least=1)
    keep_checkpoints: int = number(2, least=1)
    # Steps in a row whose loss or gradient norm is not finite, after which the run ends. One may be a bad document; three are the weights or settings.
    max_bad_steps: int = number(3, least=1)
    # Step of a checkpoint to go back to, such as 300, once: the same command repeated goes on from the newest. None: the newest checkpoint.
    resume_from: int | None = number(None, least=1)
    # Merged over the DeepSpeed config that we write, for settings that no key of ours names.
    deepspeed: dict[str, Any] = field(default_factory=dict)


@dataclass
class SearchConfig:
    """Needle-driven evolutionary search (paper, Algorithms 1 and 2), with racing."""

    # evolution: the paper's. surrogate: the same mutations, chosen and compared by a Gaussian process over all evaluations so far. cmaes: CMA-ES
    # over the critical index, a smooth tail and the attention factor.
    algorithm: str = one_of("evolution", "surrogate", "cmaes")
    # longrope2: critical index and tail. longrope: every factor is free (LongRoPE v1; the paper's ablation).
    space: str = one_of("longrope2", "longrope")
    # needle: perplexity of the answers. text: of all tokens (the paper's ablation).
    objective: str = one_of("needle", "text")
    # P.
    population: int = number(64, least=2)
    generations: int = number(40, least=0)
    # Parents kept each generation. The paper leaves it open: a quarter of P keeps diversity at this budget.
    top_k: int = number(16, least=1)
    # p, per entry of the tail.
    mutation_probability: float = number(0.3, least=0, most=1)
    # Grid of the factors (the LongRoPE family's).
    mutation_step: float = number(0.01, least=1e-6)
    # Standard deviation of a mutated entry's move, as a share of its range: most moves are local, some cross it.
    mutation_spread: float = number(0.25, least=1e-6)
    # Probability that a child's rcd moves by one or two. The paper does not say that it does.
    move_critical_index: float = number(0.2, least=0, most=1)
    # Probability that a child takes each of its traits from one of two parents (LongRoPE v1 has it).
    crossover: float = number(0.0, least=0, most=1)
    # Needle documents that a candidate is scored on.
    documents: int = number(10, least=1)
    # Needles asked for in each document, one forward pass for all: the paper asks one.
    questions: int = number(1, least=1, most=NEEDLE_NAMES)
    # Needles beside them that are not asked for; the paper has none. Needed where every good candidate finds a lone needle.
    distractors: int = number(0, least=0, most=NEEDLE_NAMES - 1)
    # Of the needles that are asked for, one after another: 0 is the start of the document. The others lie anywhere.
    depth: float = number(0.0, least=0, most=1)
    # Further documents, on which the last top_k compete to be the winner: the best of many on few documents is partly luck.
    final_documents: int = number(0, least=0)
    # Drop a candidate as soon as it cannot plausibly enter the top_k. false: everyone is scored on everything, as in the paper.
    racing: bool = True
    # Standard errors by which answers must be worse than the k-th best's to be dropped. inf drops only a candidate that is certain to lose.
    racing_z: float = number(1.0, least=0, infinite=True)
    # Answers that have to be compared before a candidate is dropped on a likelihood.
    racing_answers: int = number(4, least=2)
    # surrogate: mutations drawn for each child that is evaluated.
    proposals: int = number(8, least=1)
    # surrogate: document-forwards of a generation for each of its children. The first look at each child is one.
    looks: float = number(2.25, least=1)
    # Bounds of the tail, in multiples of s = L / L0.
    tail_low: float = number(1.0, above=0)
    tail_high: float = number(2.0, above=0)
    # Fix rcd instead of searching d10 … tcd.
    critical_index: int | None = number(None, least=1)
    # Of the long window; the paper has none.
    search_attention_factor: bool = True
    # Of every candidate where it is not searched.
    attention_factor: float = number(1.0, above=0)
    attention_factor_low: float = number(1.0, above=0)
    attention_factor_high: float = number(1.4, above=0)
    # Forward passes in chunks with a key-value cache, where activations of a whole window do not fit. 0: whole.
    chunk_tokens: int = number(0, least=0)
    # ZeRO-3 over all ranks, for a model that does not fit one device.
    shard: bool = False
    seed: int = any_number(0, why="a stream is drawn from any whole number")

    def final_looks(self, before: int) -> int:
        """surrogate: document-forwards of the final: two finalists' further documents, and at most a tenth of those ``before`` it."""
        return min(2 * self.final_documents, round(before / 10))

    @property
    def most_forwards(self) -> int:
        """Document-forwards that a search takes where racing drops nobody."""
        children = self.population + self.generations * (self.population - self.top_k)
        if self.algorithm == "surrogate":
            looks = round(self.looks * children)
            return looks + self.final_looks(looks)
        return children * self.documents + self.top_k * self.final_documents


@dataclass
class EvalConfig:
    """Needle retrieval and perplexity by length."""

    lengths_tokens: list[int] = number([4096, 8192, 16384, 32768, 65536, 131072], least=2)
    # Of the needle: 0 is the start of the document, 1 its end.
    depths: list[float] = number([0.0, 0.25, 0.5, 0.75, 1.0], least=0, most=1)
    # Needle documents per length and depth (the paper runs 10).
    samples: int = number(10, least=1)
    # Needles beside the one that is asked for (RULER's multi-key; the paper has none).
    distractors: int = number(0, least=0, most=NEEDLE_NAMES - 1)
    # Plain documents per length, for perplexity.
    text_documents: int = number(4, least=1)
    # Shown beside, on the untrained model.
    methods: list[str] = field(default_factory=lambda: ["none", "pi", "ntk", "yarn"])
    seed: int = any_number(0, why="a stream is drawn from any whole number")


@dataclass
class LoggerConfig:
    """Metric sinks. runs/<name>/metrics.jsonl is always written."""

    tensorboard: bool = True
    wandb: bool = False
    # On wandb. WANDB_PROJECT of the environment counts where the key is not given (conf/environment.yaml).
    project: str = "lr2train"
    entity: str | None = None
    # Of wandb. WANDB_MODE of the environment counts where the key is not given (conf/environment.yaml).
    mode: str = one_of("online", "offline", "disabled")


@dataclass
class ExportConfig:
    """A folder for other runtimes."""

    # null: runs/<run>/export.
    folder: str | None = a_path()
    # null: the trained weights' dtype.
    dtype: str | None = one_of(None, "float32", "bfloat16", "float16")


@dataclass
class GenerateConfig:
    """Text from a model, across the window switch."""

    prompt: str | None = None
    # A text file, for long prompts.
    prompt_file: str | None = a_path()
    max_new_tokens: int = number(64, least=1)
    # 0: greedy.
    temperature: float = number(0.0, least=0)
    top_p: float = number(1.0, above=0, most=1)
    # auto: switch with re-prefill when the total exceeds L0.
    window: str = one_of("auto", "short", "long")


@dataclass
class InspectConfig:
    """Which segments to look at, and how closely."""

    # null: both.
    window: str | None = one_of(None, "short", "long")
    # Its number in the plan of its window. null: 0, or those of `step`.
    segment: int | None = number(None, least=0)
    # All segments of a step, as metrics.jsonl counts them (the first is 1).
    step: int | None = number(None, least=1)
    # Data-parallel ranks: which of them gets which segment of the step.
    dp_size: int = number(1, least=1)
    # Rows of a segment's table at most.
    documents: int = number(12, least=1)
    # Characters of a document's beginning and of its end.
    text_chars: int = number(48, least=0)


@dataclass
class HardwareConfig:
    """The cluster that `plan` assumes."""

    gpus: int = number(64, least=1)
    gpus_per_node: int = number(8, least=1)
    gpu_memory_gib: float = number(80.0, above=0)
    # Dense peak (A100).
    gpu_bf16_tflops: float = number(312.0, above=0)
    # Share of the peak that training reaches.
    mfu: float = number(0.4, above=0, most=1)
    # USD.
    gpu_hour_price: float = number(2.0, least=0)


@dataclass
class Config:
    """A whole experiment; each verb reads the keys that it needs (``READS``)."""

    # The run folder is runs_folder/name.
    name: str = MISSING
    runs_folder: str = a_path("runs")
    # A finished run that evaluate and export read.
    run: str | None = a_path()
    seed: int = any_number(0, why="a stream is drawn from any whole number")
    device: str = one_of("auto", "cpu", "cuda")
    # CPU threads per rank. 0: OMP_NUM_THREADS without a launcher, else the machine's cores divided by the local ranks.
    threads: int = number(0, least=0)
    model: ModelConfig = field(default_factory=ModelConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)


_RUN, _JOB, _MODEL = "name runs_folder seed", "device threads parallel.timeout_s", "model rope"
_STEP = "data.path data.kind data.stages data.segment_tokens data.long_attention data.group_segments"  # what a step holds
_PREPARED = """model.path model.architecture model.original_window_tokens rope.target_window_tokens data.sources data.tokenizer data.vocab_size
data.tokenizer_train_bytes data.tokenizer_backend data.workers data.shard_bytes data.deduplicate data.decontaminate data.segment_tokens
data.short_tokens data.long_tokens data.buckets data.weights_of data.max_repeats data.keep_below data.keep_below_tokens data.over_long
data.holdout data.align_sp data.needles"""
_TRAINED = "data.verify data.skip_steps data.prefetch_steps data.loader_threads data.needles parallel optim engine logger"
_PLANNED = "data.short_tokens data.long_tokens parallel optim engine search hardware"
_INSPECTED = "data.path data.long_attention data.group_segments data.skip_steps optim.segments_per_step inspect"
READS = {
    "prepare": f"{_RUN} {_PREPARED}".split(),
    "inspect": f"runs_folder run seed {_INSPECTED}".split(),
    "search": f"{_RUN} {_JOB} model rope.target_window_tokens data.path data.verify data.needles search".split(),
    "train": f"{_RUN} {_JOB} {_MODEL} {_STEP} {_TRAINED}".split(),
    "evaluate": f"{_RUN} run {_JOB} {_MODEL} data.path data.verify data.needles eval".split(),
    "export": ["runs_folder", "run", "device", "model", "export"],
    "generate": f"{_RUN} run device {_MODEL} generate".split(),
    "plan": f"name runs_folder model rope.target_window_tokens {_STEP} {_PLANNED}".split(),
}
"""The keys that each verb reads; a name stands for all keys below it. A verb checks these alone."""
VERBS = (*READS, "report")


def reads(verb: str, key: str) -> bool:
    """Whether a verb reads a key, or something above or below it."""
    return any(f"{key}.".startswith(f"{one}.") or f"{one}.".startswith(f"{key}.") for one in READS[verb])


def load(composed: DictConfig, verb: str) -> Config:
    """Turn a composed Hydra config into a ``Config`` whose values a verb can take.

    Raises:
        UserError: a mandatory key is missing, or the value of a key that the verb reads is out of its limits.
    """
    if missing := sorted(OmegaConf.missing_keys(composed)):
        key = typed_key(missing[0])
        raise UserError(f"{key} has no value and no default; set it on the command line: {key}=…")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    _with_homes(config)
    for key, one, value in _leaves(config):
        if reads(verb, key):
            _check(key, one, value)
    for verbs, check in _TOGETHER:
        if verb in verbs:
            check(config)
    return config


def typed_key(key: str) -> str:
    """A key as the command line takes it: ``data.sources.0.path`` for ``data.sources[0].path``."""
    return re.sub(r"\[(\d+)\]", r".\1", key)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values (enums by name), for provenance and comparison."""
    return {one.name: _plain(getattr(config, one.name)) for one in fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return to_dict(value) if hasattr(value, "__dataclass_fields__") else value


def _with_homes(node: Any) -> None:
    """Put the home folder in the place of ``~`` where a path begins with it."""
    for one in fields(node):
        value = getattr(node, one.name)
        if is_dataclass(value):
            _with_homes(value)
        elif isinstance(value, list) and one.metadata.get("path"):
            setattr(node, one.name, [os.path.expanduser(item) for item in value])
        elif isinstance(value, list):
            for item in filter(is_dataclass, value):
                _with_homes(item)
        elif value is not None and one.metadata.get("path"):
            setattr(node, one.name, os.path.expanduser(value))


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """(key, field, value) of everything below a dataclass; in a list of named things the name stands in the key."""
    for one in fields(node):
        key, value = f"{prefix}{one.name}", getattr(node, one.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{key}.")
        elif isinstance(value, list) and value and is_dataclass(value[0]):
            for number, item in enumerate(value):
                yield from _leaves(item, f"{key}.{getattr(item, 'name', number)}.")
        else:
            yield key, one, value


def _check(key: str, one: Field[Any], value: Any) -> None:
    """Refuse a value that its field does not take. null, where the type allows it, is for the reader of the key."""
    choices, limits = one.metadata.get("choices"), one.metadata.get("limits")
    if choices and value not in choices:
        named = ["null" if choice is None else str(choice) for choice in choices]
        close = difflib.get_close_matches(str(value), named, n=1) or named
        raise UserError(f"{key}={value} is not one of {', '.join(named)}; set {key} to {close[0]}")
    if limits is None or value is None:
        return
    default = one.default_factory() if callable(one.default_factory) else one.default
    if limits.count is not None and len(value) != limits.count:
        raise UserError(f"{key}={_typed(value)} holds {len(value)} of {limits.count} numbers; set {key} to {_typed(default)}")
    for name, item, usual in _numbers(key, value, default):
        if (why := limits.why_not(item)) is not None:
            raise UserError(f"{name}={item} {why}; set {name} to {limits.nearest(item, usual)}")


def _numbers(key: str, value: Any, default: Any) -> Iterator[tuple[str, float, Any]]:
    """(key, number, default) of a number, or of each number in a list or a dict."""
    if isinstance(value, list):
        usual = default if len(default) == len(value) else [None] * len(value)
        yield from ((f"{key}.{index}", item, usual[index]) for index, item in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f"{key}.{name}", item, None) for name, item in value.items())
    else:
        yield key, value, default


def _typed(numbers: Any) -> str:
    """A list as the command line takes it without quotes."""
    return f"[{','.join(map(str, numbers))}]"


_NAME = re.compile(r"\w[\w.+=-]*")  # one folder, inside runs_folder, that no shell or pattern trips over


def _check_name(config: Config) -> None:
    if not _NAME.fullmatch(config.name):
        raise UserError(
            f"name={config.name!r} is no name of a folder in runs_folder={config.runs_folder}; begin with a letter or a digit and go on with "
            "those, '.', '_', '+', '=' or '-'"
        )


def _check_parents(config: Config) -> None:
    population, top_k = config.search.population, config.search.top_k
    if top_k >= population:
        raise UserError(
            f"search.top_k={top_k} leaves no room for children in search.population={population}; set search.top_k to {max(1, population // 4)}"
        )


def _check_group(config: Config) -> None:
    group, total = config.data.group_segments, config.optim.segments_per_step
    if group and total % group:
        raise UserError(
            f"data.group_segments={group} does not divide optim.segments_per_step={total}; set data.group_segments to 0, which chooses a divisor"
        )


def _check_shards(config: Config) -> None:
    """The remedy divides what ``sp`` divides: the ranks of the launch stay a multiple, and the corpus stays as it was planned."""
    length, sp, ring = config.data.segment_tokens, config.parallel.sp, config.parallel.ring
    if length % sp:
        raise UserError(f"data.segment_tokens={length} is not divisible by parallel.sp={sp}; set parallel.sp to {math.gcd(length, sp)}")
    if ring and sp % ring:
        raise UserError(f"parallel.ring={ring} does not divide parallel.sp={sp}; set parallel.ring to 0, which chooses a divisor")


_TOGETHER: tuple[tuple[tuple[str, ...], Callable[[Config], None]], ...] = (
    (("prepare", "search", "train", "evaluate", "generate", "plan"), _check_name),
    (("search", "plan"), _check_parents),
    (("train", "inspect", "plan"), _check_group),
    (("train", "plan"), _check_shards),
)
"""What depends on several keys, and the verbs that read all of them."""
