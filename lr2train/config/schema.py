"""Every key of lr2train, with its type, default, limits and, above it, what it is, its unit and the reason of the
default.

Units stand in the names: ``_tokens``, ``_steps``, ``_s``, ``_gib``. ``lr2train VERB --help`` prints the comments of
this file. A key has to stand
here before YAML or the command line can set it; in return a typo, a wrong type or a value out of its limits fails
before a verb starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any

from omegaconf import MISSING

from lr2train.config.fields import a_path, literal_text, number, one_of

_MOST = 1_000_000  # of things that a verb counts out one by one: more is a slip of the keyboard
_MOST_THREADS = 4096
_MOST_TIMEOUT_S = 2_000_000.0  # 23 days: gloo counts milliseconds in 32 bits
SLOPE_FORWARDS = 3  # document-forwards of a loss with its slopes: a backward pass costs two forward passes
NEEDLE_NAMES = 1600  # needles of one document have different names (lr2train.data.needles)


class Dtype(StrEnum):
    """The type that weights are held and multiplied in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ReduceDtype(StrEnum):
    """The type in which gradients are summed over the ranks."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(StrEnum):
    """Where tensors live. auto: CUDA where there is a GPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Window(StrEnum):
    """The context window of a segment or a text, which decides its RoPE table."""

    short = "short"
    long = "long"


class GenerateWindow(StrEnum):
    """auto: short until the text exceeds the original window, long from there on."""

    auto = "auto"
    short = "short"
    long = "long"


class StartFrom(StrEnum):
    """own: factors on top of the model's own table. plain: factors of the unscaled frequencies."""

    own = "own"
    plain = "plain"


class DataKind(StrEnum):
    """segments: planned segments of a corpus. curriculum: ``data.stages``, for a base model from scratch."""

    segments = "segments"
    curriculum = "curriculum"


class Fused(StrEnum):
    """auto: fused kernels where they can run. off: the model's own modules."""

    auto = "auto"
    off = "off"


class LongAttention(StrEnum):
    """A token of a long segment attends to the whole segment (paper, Figure 5b) or to its own document (the authors'
    released example).
    """

    segment = "segment"
    document = "document"


class LongPositions(StrEnum):
    """full: positions 0, 1, 2 … up to the target window. skip: shorter segments, whose positions jump once."""

    full = "full"
    skip = "skip"


class OverLong(Enum):  # no StrEnum, because `split` is a method of str
    """A document over its bucket's limit (long: the segment; short: the original window) is split, truncated or
    dropped.
    """

    split = "split"
    truncate = "truncate"
    drop = "drop"

    def __str__(self) -> str:
        return self.value


class Runtime(StrEnum):
    """A runtime that an export is for."""

    all = "all"
    transformers = "transformers"
    vllm = "vllm"
    sglang = "sglang"
    gguf = "gguf"
    tensorrt_llm = "tensorrt_llm"


class WeightsOf(StrEnum):
    """A source's weight is a share of the tokens of each bucket, or of all tokens of the corpus; then every bucket is
    met too.
    """

    bucket = "bucket"
    corpus = "corpus"


class TokenizerBackend(StrEnum):
    """gigatoken gives the ids of hf many times faster, checked on the very documents. auto: gigatoken if possible."""

    hf = "hf"
    gigatoken = "gigatoken"
    auto = "auto"


class Deduplicate(StrEnum):
    """Exact duplicates are left out within each source, over the corpus, or not at all. The first document stays."""

    none = "none"
    source = "source"
    corpus = "corpus"


class StrategyName(StrEnum):
    """Sequence-parallel attention. auto: for every segment the strategy that sends least."""

    auto = "auto"
    local = "local"
    ulysses = "ulysses"
    ring = "ring"
    gather = "gather"
    ulysses_ring = "ulysses_ring"
    ring_flash_attn = "ring_flash_attn"


class Recompute(StrEnum):
    """What of a layer the backward pass computes again. none: nothing. keep_attention: all but attention. layer: all.
    auto: keep_attention if memory allows, else layer.
    """

    none = "none"
    keep_attention = "keep_attention"
    layer = "layer"
    auto = "auto"


class LearningRateSchedule(StrEnum):
    """The learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Algorithm(StrEnum):
    """gradient: descent on the factors and the attention factor. evolution: the paper's loop."""

    gradient = "gradient"
    evolution = "evolution"


class Operators(StrEnum):
    """How evolution draws and varies candidates. authors: as in their public search."""

    paper = "paper"
    authors = "authors"


class Head(StrEnum):
    """Factors below the critical index. ntk: powers of the tail's first one (paper). yarn: a blend of frequencies."""

    ntk = "ntk"
    yarn = "yarn"


class SearchSpace(StrEnum):
    """longrope2: critical index and tail. longrope: every factor is free (LongRoPE v1; the paper's ablation)."""

    longrope2 = "longrope2"
    longrope = "longrope"


class Objective(StrEnum):
    """needle: perplexity of the answers. text: perplexity of all tokens (the paper's ablation)."""

    needle = "needle"
    text = "text"


class WandbMode(StrEnum):
    """How wandb runs."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class ModelConfig:
    """The causal LM: a Hugging Face folder or hub id to start from, or an architecture to train from scratch."""

    # Folder with config.json and safetensors, or a hub id. null: model.architecture is trained from scratch.
    path: str | None = a_path()
    # Commit (revision) of a hub model, for repeatable runs. null: the newest.
    revision: str | None = None
    # Whether a hub id may be downloaded. false, so that nothing is downloaded by surprise.
    allow_download: bool = False
    # Model config in transformers' keys, `model_type` first. Used if model.path is null.
    architecture: dict[str, Any] = field(default_factory=dict)
    # Keys of the model's config.json, or of model.architecture, to override, such as sliding_window: null.
    overrides: dict[str, Any] = field(default_factory=dict)
    # The original window L0, tokens. null: read from the model's own config.
    original_window_tokens: int | None = number(None, least=1)
    # Data type of weights and matrix products. Optimizer states are always float32.
    dtype: str = one_of(Dtype.float32)


@dataclass
class RopeConfig:
    """The long window's RoPE scaling: a method with its parameters, or a factors.json that a search wrote."""

    # The target window L, tokens.
    target_window_tokens: int = number(131072, least=1)
    # A factors.json, or a model folder whose config has RoPE type `longrope`. Takes precedence over rope.method.
    factors: str | None = a_path()
    # The frequencies that a method or a search rescales, for a model that is extended already (llama3, yarn, linear,
    # longrope). own: those of the model's own table, because the model was trained with it. plain: the unscaled ones.
    start_from: str = one_of(StartFrom.own)
    # RoPE scaling method, a key of lr2train.rope.METHODS (the presets rope=… set it), or package.module.function of
    # your own.
    method: str = "longrope2"
    # The real critical dimension rcd as a zero-based frequency index, for methods that take one (longrope2, yarn_rcd,
    # ntk_rcd).
    critical_index: int | None = number(None, least=1)
    # Rescale factors from the critical index on, for longrope2. A list of one number is a constant tail.
    tail: list[float] = number([], above=0)
    # Attention factor (YaRN's mscale): multiplies cos and sin in the long window. null: the
    # method's default.
    attention_factor: float | None = number(None, above=0)
    # Other keyword arguments of the RoPE method.
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class SourceConfig:
    """One origin of documents."""

    # Name of the source, free to choose. Keys of this source are typed as data.sources.NAME.KEY.
    name: str = MISSING
    # The reader: stdlib, folder, hub, needles, or custom for a class of your own that `target` names.
    kind: str = "folder"
    # Folder or file (kind: folder), or hub id (kind: hub).
    path: str | None = a_path()
    # kind: custom. package.module.Class, built with `options`; its instances iterate over (id, text).
    target: str | None = None
    # Column of .jsonl, .parquet and .arrow records that holds the text; dots lead into records (meta.text).
    text_column: str = "text"
    # Maximum number of documents to read. null: no limit.
    max_documents: int | None = number(None, least=1)
    # Maximum number of bytes of text to read, in file order. null: no limit.
    max_bytes: int | None = number(None, least=1)
    # Maximum number of tokens in documents of `windows`, BOS and EOS included. null: no limit.
    max_tokens: int | None = number(None, least=1)
    # Maximum number of bytes of a document; a longer document counts as broken.
    max_document_bytes: int = number(64 << 20, least=1)
    # Maximum share of broken records, files or bytes in a source. The job stops if it is
    # exceeded.
    max_broken_share: float = number(0.05, least=0, most=1)
    # Windows (short, long) whose documents are used. Other documents are skipped after tokenising.
    windows: list[str] = field(default_factory=lambda: ["short", "long"])
    # Relative share of this source in the tokens of each bucket, or of the corpus (data.weights_of).
    weight: float = number(1.0, least=0)
    # Other settings of this kind of source, for needles: lengths_tokens, count, max_pairs, questions, chains,
    # answers_only.
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageConfig:
    """One stage of the curriculum that trains a tiny base model from scratch. The shares are relative to each
    other.
    """

    # Optimizer steps of the stage.
    steps: int = number(MISSING, least=1)
    # Tokens of every document. A segment holds data.segment_tokens / length_tokens documents.
    length_tokens: int = number(MISSING, least=8)
    # Share of segments that repeat random tokens, with loss on the repeats only.
    repeats: float = number(0.0, least=0)
    # Share of segments of needle documents with 1 … data.needles.max_pairs pairs, with loss on the answers only.
    needles: float = number(0.0, least=0)
    # Share of segments packed with key-value pairs, all asked for, with loss on the
    # answers only.
    dense: float = number(0.0, least=0)
    # Share of segments of needle documents with chains of data.needles.hops hops, all asked for, and one pair asked
    # for, with loss on the answers only.
    chains: float = number(0.0, least=0)
    # Share of segments of plain text.
    text: float = number(0.0, least=0)


@dataclass
class BucketConfig:
    """A range of document lengths (BOS and EOS included), the window that it trains, and its part of that window's
    tokens.
    """

    # Name of the bucket, free to choose. Keys of this bucket are typed as data.buckets.NAME.KEY.
    name: str = MISSING
    # Window that the bucket's documents train: short or long.
    window: str = "long"
    # Documents longer than this many tokens. null: 0 for short, the original window for long.
    above_tokens: int | None = number(None, least=0)
    # Documents of at most this many tokens. null: the original window for short, any length for long.
    to_tokens: int | None = number(None, least=1)
    # Share of the window's tokens, relative to the window's other buckets.
    weight: float = number(1.0, least=0)
    # Weight of each source in this bucket, relative to all such weights of the window. The other
    # weights are then ignored.
    sources: dict[str, float] = number({}, least=0)
    # Treatment of a document over the limit. null: data.over_long.
    over_limit: str | None = one_of(None, OverLong)


@dataclass
class NeedleConfig:
    """How needle documents read."""

    # Wording of the needle and its question: a name of lr2train.data.needles.WORDINGS.
    wording: str = "paper"
    # Digits of the hidden number.
    digits: int = number(7, least=1, most=18)
    # Maximum number of needles hidden in a training document; the number is drawn from 1 to this maximum.
    max_pairs: int = number(1, least=1, most=NEEDLE_NAMES)
    # Share of training documents in which the first needle that is asked for is at the very start.
    at_start: float = number(0.4, least=0, most=1)
    # Maximum number of needles asked for at the end of a training document. More questions give more targets.
    max_questions: int = number(1, least=1, most=NEEDLE_NAMES)
    # Needles of a chain that hold the name of the next needle (RULER's variable tracking; there 4). The last needle of
    # a chain holds the number.
    hops: int = number(1, least=1, most=100)


@dataclass
class DecontaminateConfig:
    """Evaluation sets whose text must not be trained on."""

    # Evaluation sets, .txt or .jsonl; all strings of a record are compared. Empty: no decontamination.
    files: list[str] = a_path([])
    # A document that shares this many consecutive words with an evaluation set is removed (Brown et al., 2020, app. C).
    ngram: int = number(13, least=1)


@dataclass
class DataConfig:
    """Documents, tokens, segments."""

    # The corpus that `prepare` wrote (runs/<name>).
    path: str | None = a_path()
    # Source of the training batches. segments: a prepared corpus. curriculum: data.stages, for a tiny base model.
    kind: str = one_of(DataKind.segments)
    # Origins of documents.
    sources: list[SourceConfig] = field(default_factory=list)
    # Folder or tokenizer.json. null: a byte-level BPE is trained on the sources.
    tokenizer: str | None = a_path()
    # Vocabulary size of the trained tokenizer. The minimum covers special tokens, bytes and pairs of digits.
    vocab_size: int = number(1024, least=358)
    # Bytes of text to train the tokenizer on, in equal parts from each source.
    tokenizer_train_bytes: int = number(100_000_000, least=1)
    # Library that tokenizes. gigatoken: the same ids as hf, many times faster. auto: gigatoken if possible.
    tokenizer_backend: str = one_of(TokenizerBackend.hf)
    # Processes that tokenise. 0: one for each core.
    workers: int = number(0, least=0, most=_MOST_THREADS)
    # Size of an input split in bytes: the unit of work, and of loss after a kill. A compressed file is one split.
    shard_bytes: int = number(64 << 20, least=1)
    # Whether exact duplicates are left out: within each source, or over the corpus. The first document stays.
    deduplicate: str = one_of(Deduplicate.none)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    # Whether the corpus' files are compared with their checksums before training (once, as long as they do not change).
    verify: bool = True
    # Tokens of a segment. Training wants rope.target_window_tokens here, or less under data.long_positions=skip.
    segment_tokens: int = number(131072, least=2)
    # Tokens to plan in short segments. 0: every short document once.
    short_tokens: int = number(0, least=0)
    # Tokens to plan in long segments. 0: every long document once.
    long_tokens: int = number(0, least=0)
    # Budgets by document length. A window without a bucket has one of all its documents.
    buckets: list[BucketConfig] = field(default_factory=list)
    # The total that a source's weight is a share of. corpus: the mix nearest to the documents' own lengths.
    weights_of: str = one_of(WeightsOf.bucket)
    # Maximum number of uses of a document. Up to four passes are about as good as new text (Muennighoff et al.,
    # 2023).
    max_repeats: float = number(4.0, above=0)
    # Share of short documents (below data.keep_below_tokens) to keep, by source: data.keep_below.NAME=0.1
    keep_below: dict[str, float] = number({}, least=0, most=1)
    # Tokens of a document below which data.keep_below applies. Fu et al. (2024) keep a tenth of documents below 4096.
    keep_below_tokens: int = number(4096, least=0)
    # segment: attention over the whole long segment. document: a document mask, as short segments always have.
    long_attention: str = one_of(LongAttention.segment)
    # Positions of long segments. full: 0, 1, 2 … up to the target window (the paper). skip: segments are shorter than
    # the target window, and their positions jump once, so that few tokens train all distances (docs/DATA.md).
    long_positions: str = one_of(LongPositions.full)
    # Treatment of a document over the segment (long) or over the original window (short).
    over_long: str = one_of(OverLong.split)
    # Share of documents kept out of training, for the search and the evaluation.
    holdout: float = number(0.02, least=0, most=1)
    # Number (or list) of sequence shards per segment; no short document crosses their borders (no
    # communication).
    align_sp: Any = 1
    # Group size: consecutive segments of one window in a step. Any number of data-parallel ranks that divides the
    # group size gets the same data per step. 0: a multiple of the first start's data-parallel ranks, up to a quarter
    # of a step.
    group_segments: int = number(0, least=0)
    # Steps to skip, numbered as in metrics.jsonl: ["1200-1230", "1500"]. Their data is never used. The other
    # steps keep number and learning rate.
    skip_steps: list[str] = field(default_factory=list)
    # Number of steps whose batches are prepared in advance.
    prefetch_steps: int = number(2, least=0, most=_MOST)
    # Threads that prepare batches. More threads help if the corpus is on a slow disk.
    loader_threads: int = number(1, least=1, most=_MOST_THREADS)
    needles: NeedleConfig = field(default_factory=NeedleConfig)
    # Stages of the curriculum (data.kind=curriculum).
    stages: list[StageConfig] = field(default_factory=list)


@dataclass
class ParallelConfig:
    """How ranks divide the work: world = data parallel x sequence parallel."""

    # Ranks that share one segment (sequence parallel, also called context parallel).
    sp: int = number(1, least=1)
    # Strategy of sequence-parallel attention (docs/ATTENTION.md). auto: the fitting strategy that sends fewest bytes.
    # local: nothing is sent. ulysses: heads are exchanged. ring: keys and values travel in a ring. gather: each rank
    # fetches the keys and values of its documents. ulysses_ring: ulysses inside a node, ring between nodes.
    # ring_flash_attn: the ring of that library, on CUDA. package.module.NAME: a Strategy of your own.
    strategy: str = one_of(StrategyName.auto, plugins=True)
    # Ring size within parallel.sp, for ulysses_ring. 0: as small as the heads and nodes allow.
    ring: int = number(0, least=0)
    # Seconds that a collective waits for a rank before the job ends. A rank that fails is noticed at once.
    timeout_s: float = number(600.0, above=0, most=_MOST_TIMEOUT_S)


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    # Peak learning rate.
    lr: float = number(2e-5, above=0)
    # Decay rates of AdamW's two moments.
    betas: list[float] = number([0.9, 0.95], least=0, below=1, count=2)
    # AdamW's epsilon, added to the denominator of the update.
    eps: float = number(1e-8, above=0)
    # Weight decay of matrices. Norms and biases never decay.
    weight_decay: float = number(0.0, least=0)
    # Largest global gradient norm; larger gradients are scaled down. 0: gradients are not clipped.
    clip: float = number(1.0, least=0)
    # Weight of the distillation in short segments: KL divergence from the frozen model at model.path, per target token,
    # is added to the loss (docs/RUNNING.md). 0: no distillation, and no second model in memory.
    distill_short: float = number(0.0, least=0)
    # Schedule of the learning rate after the warm-up.
    schedule: str = one_of(LearningRateSchedule.cosine)
    # Optimizer steps of linear learning-rate warm-up from 0.
    warmup_steps: int = number(40, least=0)
    # Learning rate at the end of the schedule, as a share of optim.lr.
    min_lr_ratio: float = number(0.0, least=0, most=1)
    # Optimizer steps of the run. 0: one epoch of the planned segments.
    steps: int = number(0, least=0)
    # End the run when its held-out loss has settled (of needles with engine.validate_needles, else of the long window):
    # the best of this many measurements in a row is less than optim.settle_nats below the best before, from the end of
    # optim.warmup_steps on. 0: never.
    settle_validations: int = number(0, least=0, most=_MOST)
    # The least gain that counts for optim.settle_validations, nats per target token. 0.01: one percent of perplexity.
    settle_nats: float = number(0.01, least=0)
    # The global batch in segments: data-parallel ranks x gradient accumulation.
    segments_per_step: int = number(64, least=1, most=_MOST)


@dataclass
class EngineConfig:
    """DeepSpeed, memory and checkpoints."""

    # ZeRO stage: 3 divides weights, gradients and optimizer states; 0 divides nothing and needs model.dtype=float32.
    zero_stage: int = number(3, least=0, most=3)
    # What the backward pass computes again of each layer, to save memory (activation checkpointing). none: nothing.
    # keep_attention: all but attention, whose output is kept. layer: all. auto: keep_attention where the estimate of
    # `plan` fits the GPU, else layer; keep_attention on a CPU.
    recompute: str = one_of(Recompute.auto)
    # Layers that are recomputed, from the first one on. null: all. The other layers keep all their activations, which
    # is faster where memory is left; `plan` says how few fit.
    recompute_layers: int | None = number(None, least=1)
    # Tokens of a tile in which the MLP of a layer is computed, forward and backward. 0: the whole shard at once. Tiles
    # save memory where a rank holds over about 32k tokens; below that they only cost time.
    tile_mlp: int = number(0, least=0)
    # Whether what a recomputed layer keeps (its input, attention's output under keep_attention) lies in host memory
    # until the backward pass. false, because the host then needs the memory that a GPU saves, for each of its GPUs.
    offload_inputs: bool = False
    # Data type in which gradients are sent and summed over the ranks. float32: in bfloat16, with eight bits, sums over
    # 64 ranks lose small gradients. bfloat16: half the bytes.
    reduce_dtype: str = one_of(ReduceDtype.float32)
    # Fused kernels for norms, rotations and gated activations. auto: on CUDA where liger-kernel is installed. off: the
    # model's own modules.
    fused: str = one_of(Fused.auto)
    # Whether operators on a GPU add in a fixed order, so that a resumed run has the same bits as an undisturbed one.
    # false, because attention's backward pass then takes longer and needs more memory. A CPU always does so.
    deterministic: bool = False
    # Tokens per chunk of the chunked loss; only one chunk's logits are in memory.
    loss_chunk_tokens: int = number(4096, least=1)
    # Optimizer steps between two measurements of the held-out loss, of both windows. 0: never.
    validate_every_steps: int = number(100, least=0)
    # Held-out segments of each window in such a measurement.
    validate_segments: int = number(8, least=1, most=_MOST)
    # Needle documents of the target window in such a measurement, made from held-out text (data.needles). 0: none.
    validate_needles: int = number(0, least=0, most=_MOST)
    # Optimizer steps between two checkpoints.
    checkpoint_every_steps: int = number(100, least=1)
    # Checkpoints that are kept; older ones are removed.
    keep_checkpoints: int = number(2, least=1)
    # The run stops after this many consecutive steps with a non-finite loss or
    # gradient norm.
    max_bad_steps: int = number(3, least=1)
    # Go back to the checkpoint of this step, once. The same command repeated resumes from the
    # newest. null: the newest.
    resume_from: int | None = number(None, least=1)
    # DeepSpeed config keys that override the generated ones, for settings without a key here.
    deepspeed: dict[str, Any] = field(default_factory=dict)


@dataclass
class SearchConfig:
    """Search for RoPE factors on the loss of needles (paper, Section 3.2)."""

    # Search algorithm. gradient: descent on factors and attention factor. evolution: the paper's Algorithms 1 and 2.
    algorithm: str = one_of(Algorithm.gradient)
    # Search space. longrope2: critical index and tail. longrope: all factors.
    space: str = one_of(SearchSpace.longrope2)
    # The loss that candidates compete on. needle: of the answer tokens. text: of all tokens (the paper's ablation).
    objective: str = one_of(Objective.needle)
    # Candidates of the first generation (P of the paper). gradient: most critical indices whose starts are compared.
    population: int = number(64, least=1, most=_MOST)
    # Generations after the first. gradient: steps of each track.
    generations: int = number(40, least=0, most=_MOST)
    # Parents kept in each generation, and finalists. The paper leaves it open: a quarter of the population keeps
    # diversity at this budget. gradient: tracks, from the best starts.
    top_k: int = number(16, least=1)
    # Whose operators evolution has. authors: 2 P first candidates from NTK curves at one critical index, a strictly
    # increasing tail whose last factor may leave the bounds, and as many crossovers as mutations.
    operators: str = one_of(Operators.paper)
    # Probability that an entry of the tail mutates (p of the paper).
    mutation_probability: float = number(0.3, least=0, most=1)
    # Grid of the factors, as in the LongRoPE family.
    mutation_step: float = number(0.01, least=1e-6)
    # Standard deviation of a mutated entry's move, as a share of its range: most moves are local, some cross the range.
    mutation_spread: float = number(0.25, least=1e-6)
    # Probability that a child's critical index moves by one or two. The paper does not say that it moves.
    move_critical_index: float = number(0.2, least=0, most=1)
    # Probability that a child takes each of its traits from one of two parents. LongRoPE v1 has it.
    crossover: float = number(0.0, least=0, most=1)
    # gradient: documents on which the starts are compared, by forward passes alone.
    screen_documents: int = number(3, least=1, most=_MOST)
    # gradient: documents that a step of each track is computed on.
    step_documents: int = number(1, least=1, most=_MOST)
    # gradient: size of the first step, as a share of the range of a factor's logarithm.
    step_size: float = number(0.07, above=0, most=1)
    # Needle documents that a candidate is scored on. gradient: those that its steps take in turn.
    documents: int = number(10, least=1, most=_MOST)
    # Needles asked for in each document, in one forward pass. The paper asks for one.
    questions: int = number(1, least=1, most=NEEDLE_NAMES)
    # Needles beside those that are not asked for. The paper has none; needed where every good candidate finds a lone
    # needle.
    distractors: int = number(0, least=0, most=NEEDLE_NAMES - 1)
    # Depths of the needles that are asked for, question after question, in turn over documents: 0 is the start of the
    # document, 1 its end. The paper has 0 alone; factors found there leave the other depths behind.
    depths: list[float] = number([0.0, 0.25, 0.5, 0.75, 1.0], least=0, most=1)
    # Texts that the needles are hidden in, in turn. 0: each document has its own. The authors have one.
    texts: int = number(0, least=0, most=_MOST)
    # Further documents, on which the last top_k compete to be the winner: the best of many on few documents is partly
    # luck.
    final_documents: int = number(0, least=0, most=_MOST)
    # Chance of being better on unseen documents at which the winner of the final is settled; documents after that are
    # spared. 1: every finalist is scored on all.
    settle: float = number(0.95, above=0.5, most=1)
    # Lower bound of the tail, in multiples of s = L / L0.
    tail_low: float = number(1.0, above=0)
    # Upper bound of the tail, in multiples of s = L / L0.
    tail_high: float = number(2.0, above=0)
    # Factors below the critical index (rcd) in the space longrope2. ntk: lambda_rcd^(i / rcd), as in the paper. yarn:
    # frequencies blend linearly as in YaRN, from 32 periods in L0 to the critical index; docs/RESULTS.md compares both.
    head: str = one_of(Head.yarn)
    # Fixes the critical index. null: searched between d10 and tcd.
    critical_index: int | None = number(None, least=1)
    # Whether the attention factor of the long window is searched. The paper does not search it.
    search_attention_factor: bool = True
    # Attention factor of every candidate where it is not searched. null: sqrt(1 + ln s / ln L0), as runtimes have it.
    attention_factor: float | None = number(1.0, above=0)
    # Lower bound of the searched attention factor.
    attention_factor_low: float = number(1.0, above=0)
    # Upper bound of the searched attention factor.
    attention_factor_high: float = number(1.4, above=0)
    # Saves memory where the activations of a whole window do not fit. Two effects: forward passes alone run in chunks
    # of so many tokens, with a key-value cache; a pass with a backward pass (gradient) runs whole, whatever the number,
    # and computes each layer again. 0: neither.
    chunk_tokens: int = number(0, least=0)
    # Whether the model is divided over all ranks (ZeRO-3), for a model that does not fit one device.
    shard: bool = False
    # Seed of the search's random draws.
    seed: int = number(0, least=-(2**63), most=2**63 - 1)

    @property
    def most_forwards(self) -> int:
        """Document-forwards that a search takes where the final is not settled early."""
        return sum(times * evaluations * forwards for times, evaluations, forwards in self.rounds)

    @property
    def rounds(self) -> list[tuple[int, int, int]]:
        """(times, evaluations, document-forwards of each), in order, where the final is not settled early.

        Evaluations of one round can run at the same time; the next round depends on their results.
        """
        final = (1, min(self.top_k, self.population) * self.final_documents, 1)
        if self.algorithm == Algorithm.gradient:
            steps = min(self.top_k, self.population) * self.step_documents
            return [(1, self.population * self.screen_documents, 1), (self.generations, steps, SLOPE_FORWARDS), final]
        first = self.population * (2 if self.operators == Operators.authors else 1)
        later = (self.population - self.top_k) * self.documents
        return [(1, first * self.documents, 1), (self.generations, later, 1), final]


@dataclass
class EvalConfig:
    """What is measured, and on how much."""

    # What is measured: names of tasks or of groups of tasks (docs/EVALUATION.md lists all), or package.module.Class of
    # your own.
    tasks: list[str] = field(default_factory=lambda: ["needles"])
    # Lengths of prompts and documents, tokens. A length beyond the target window is refused.
    # Empty: 4096 (L0, if L0 is smaller), doubling, and the target window.
    lengths_tokens: list[int] = number([], least=2)
    # Depths of the needle: 0 is the start of the document, 1 its end.
    depths: list[float] = number([0.0, 0.25, 0.5, 0.75, 1.0], least=0, most=1)
    # needles: documents for each length, depth and wording. The paper has 10.
    samples: int = number(10, least=1, most=_MOST)
    # needles: further needles in a document that are not asked for (RULER's multi-key). The paper has none.
    distractors: int = number(0, least=0, most=NEEDLE_NAMES - 1)
    # needles: needles that are asked for in a document, all at its depth, in one forward pass. The paper asks for one.
    questions: int = number(1, least=1, most=NEEDLE_NAMES)
    # needles: chains of data.needles.hops hops in a document, asked for beside the needles (RULER's variable tracking).
    chains: int = number(0, least=0, most=NEEDLE_NAMES // 2)
    # needles: wordings of needle and question. Empty: data.needles.wording.
    wordings: list[str] = field(default_factory=list)
    # needles: documents without needles for each length, for text perplexity.
    text_documents: int = number(4, least=1, most=_MOST)
    # RoPE scaling methods of the untrained model, one row each; none: no RoPE scaling. Read for one training run, or
    # for model.path without run.
    methods: list[str] = field(default_factory=lambda: ["none", "pi", "ntk", "yarn"])
    # Whether the untrained model under the run's factors has a row. Read for one training run.
    untrained: bool = True
    # Whether prompts of lm-eval's tasks are put into the chat template of the model's tokenizer.
    chat_template: bool = False
    # RULER: samples for each task and length. The paper has 100, RULER's own code 500.
    ruler_samples: int = number(100, least=1, most=_MOST)
    # needles and RULER: folder of .txt files to hide needles in. null: the held-out documents of data.path.
    essays: str | None = a_path()
    # RULER: SQuAD 2.0 file (dev-v2.0.json) for qa_1, or rajpurkar/squad_v2 with model.allow_download=true.
    squad: str | None = a_path()
    # RULER: HotpotQA file (hotpot_dev_distractor_v1.json) for qa_2, or hotpotqa/hotpot_qa with
    # model.allow_download=true.
    hotpotqa: str | None = a_path()
    # LOFT: folder that LOFT's download script fills (a folder for each task, in it one for each length).
    loft: str | None = a_path()
    # InfiniteBench: folder of the benchmark's .jsonl files.
    infinitebench: str | None = a_path()
    # LongBench: folder of the benchmark's .jsonl files.
    longbench: str | None = a_path()
    # Folder of further lm-eval task files (YAML). Code that a task file names is refused.
    task_path: str | None = a_path()
    # LOFT, InfiniteBench, LongBench and lm-eval: most samples of a task. null: all.
    limit: int | None = number(None, least=1)
    # Short samples are batched up to this number of tokens. A longer sample, or eval.shard=true: one sample a batch.
    batch_tokens: int = number(16384, least=1)
    # Tokens of a chunk of a long prompt or scored document; smaller chunks need less memory for activations. 0: prompts
    # in chunks of 8192 tokens, scored documents whole.
    chunk_tokens: int = number(0, least=0)
    # Whether the model is divided over all ranks (ZeRO-3), for a model that does not fit one device.
    shard: bool = False
    # Seed of needle documents, texts and RULER's samples.
    seed: int = number(0, least=-(2**63), most=2**63 - 1)


@dataclass
class LoggerConfig:
    """Where metrics and traces go. runs/<name>/metrics.jsonl is always written."""

    # Whether TensorBoard files are written.
    tensorboard: bool = True
    # Whether wandb is used.
    wandb: bool = False
    # Project on wandb. The variable WANDB_PROJECT is used if this key is not given.
    project: str = "lr2train"
    # Team or user on wandb. null: the default of the account.
    entity: str | None = None
    # Group of the runs of one experiment on wandb: its search, training and evaluation. The variable WANDB_RUN_GROUP is
    # used if this key is not given. null: the group of the run folder, else the folder's name.
    group: str | None = None
    # Mode of wandb. The variable WANDB_MODE is used if this key is not given.
    mode: str = one_of(WandbMode.online)
    # Steps that torch's profiler records on rank 0 and on the last rank, numbered as in metrics.jsonl: ["10-12"]. The
    # traces are in runs/<name>/profile/. The key may change when a run resumes.
    profile_steps: list[str] = field(default_factory=list)


@dataclass
class ExportConfig:
    """Model folders for other runtimes."""

    # The folder for long/, short/ and two/. null: runs/<run>/export.
    folder: str | None = a_path()
    # The checkpoint to export, last or a number of steps. null: the model of a finished run.
    checkpoint: str | None = None
    # Data type of the exported weights. null: the data type of the trained weights.
    dtype: str | None = one_of(None, Dtype)
    # The runtime whose folders are written. transformers: two/. sglang, tensorrt_llm: long/ and short/. gguf
    # (llama.cpp): long/ and two/. vllm, all: all three. package.module.NAME: a Runtime of your own.
    runtime: str = one_of(Runtime.all, plugins=True)
    # Whether the logits of each folder are compared with the run's. The comparison holds one whole model in memory.
    check: bool = True


@dataclass
class GenerateConfig:
    """Text from a model, across the window switch."""

    # The prompt. null: one of the next three keys, else standard input.
    prompt: str | None = literal_text()
    # A text file that holds the prompt, for long prompts.
    prompt_file: str | None = a_path()
    # Several prompts, between brackets. Their texts are written as JSON lines.
    prompts: list[str] = literal_text([])
    # Many prompts: a file of JSON lines, each an object whose "prompt" is a text. Its other keys come back with the
    # text.
    prompts_file: str | None = a_path()
    # The prompt is a user's message: the tokenizer's chat template is put around it.
    chat: bool = False
    # Most tokens that are generated for a prompt.
    max_new_tokens: int = number(64, least=1)
    # Strings that end a text; it is cut before the first of them. The model's end tokens end a text by themselves.
    stop: list[str] = literal_text([])
    # Softmax temperature of sampling. 0: greedy.
    temperature: float = number(0.0, least=0)
    # Probability mass that is sampled from.
    top_p: float = number(1.0, above=0, most=1)
    # Which RoPE table serves. auto: the cache is computed anew where the text exceeds the original window.
    window: str = one_of(GenerateWindow.auto)
    # Prompts are decoded together up to this number of tokens, new ones included: the number of prompts times the
    # longest. More is faster and takes more memory for keys and values. A longer text is decoded alone.
    batch_tokens: int = number(16384, least=1)


@dataclass
class InspectConfig:
    """The segments to look at, and how closely."""

    # Window of the segments. null: both.
    window: str | None = one_of(None, Window)
    # Number of a segment in the segment table of its window. null: 0, or the segments of inspect.step.
    segment: int | None = number(None, least=0)
    # All segments of a step, as metrics.jsonl counts steps (the first is 1).
    step: int | None = number(None, least=1)
    # Data-parallel ranks among which the step's segments are divided.
    dp_size: int = number(1, least=1, most=_MOST)
    # Most documents that are listed of a segment.
    documents: int = number(12, least=1)
    # Characters that are shown of a document's beginning and of its end.
    text_chars: int = number(48, least=0)


@dataclass
class HardwareConfig:
    """The cluster that `plan` and `rehearse` assume."""

    # GPUs of the cluster.
    gpus: int = number(64, least=1)
    # GPUs of a node.
    gpus_per_node: int = number(8, least=1)
    # Memory of a GPU, GiB. 0: the memory of hardware.gpu. A training run asks its own GPU.
    gpu_memory_gib: float = number(0.0, least=0)
    # Kind of the GPUs, as in lr2train/config/gpus.py: A100, H100, H200, B200 … It decides peak and memory.
    gpu: str = "A100"
    # Dense bf16 peak of a GPU, TFLOP/s. 0: the peak of hardware.gpu. A training run looks up its own GPU.
    gpu_bf16_tflops: float = number(0.0, least=0)
    # Share of the peak that training reaches.
    mfu: float = number(0.4, above=0, most=1)
    # Price of a GPU for an hour, USD.
    gpu_hour_price: float = number(2.0, least=0)


@dataclass
class Config:
    """A whole experiment. Each verb reads the keys that it needs (``lr2train.config.READS``)."""

    # The run folder is runs_folder/name.
    name: str = MISSING
    # Folder of all runs. Several nodes need a shared file system here.
    runs_folder: str = a_path("runs")
    # A finished run that evaluate, export, generate, inspect and dashboard read: its name or its folder. evaluate also
    # takes a Hugging Face folder, a hub id, or several of all these in brackets: [first,/models/llama].
    run: str | None = a_path()
    # Random seed: initial weights, order of segments, and all other random draws.
    seed: int = number(0, least=-(2**63), most=2**63 - 1)
    # Where tensors live. auto: CUDA where there is a GPU.
    device: str = one_of(Device.auto)
    # CPU threads per rank. 0: OMP_NUM_THREADS if set and no launcher is used, else a share of the cores; 1 in a
    # search.
    threads: int = number(0, least=0, most=_MOST_THREADS)
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
