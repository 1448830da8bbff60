"""Every knob of lr2train as a plain dataclass, and the one door from Hydra's world into ours.

Choice: structured Hydra schemas give the types, YAML under ``conf/`` gives the values, and ``load`` turns a composed config into frozen-in-spirit
dataclasses once, at the top of a verb. Cost: a key has to be written here before it can be written in YAML; in return a typo or a wrong type fails at
composition and names the key. Units stand in the names: ``_tokens``, ``_steps``, ``_s``, ``_gib``.
"""

from __future__ import annotations

import difflib
import errno
import inspect
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF_FOLDER = Path(__file__).resolve().parent.parent / "conf"
EXIT_BAD_INPUT = 2


class UserError(ValueError):
    """Input that a user can mend. The text is one sentence: what, the value, the limit, the config key, the remedy. Verbs exit with code 2."""


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

    path: str | None = None  # folder with config.json and safetensors, or a hub id; None trains `architecture` from scratch
    revision: str | None = None  # commit of a hub model, so that a run can be repeated
    allow_download: bool = False  # hub ids are refused unless this is true: nothing is downloaded by surprise
    architecture: dict[str, Any] = field(default_factory=dict)  # transformers config values, `model_type` first; used when `path` is None
    overrides: dict[str, Any] = field(
        default_factory=dict
    )  # transformers config values laid over those of `path`, such as sliding_window: null
    original_window_tokens: int | None = None  # L0; None reads it from the model's own config
    dtype: str = "float32"  # what weights are held and multiplied in: float32 | bfloat16 | float16


@dataclass
class RopeConfig:
    """Where the long window's factors come from: a method with its parameters, or a factors.json that a search wrote."""

    target_window_tokens: int = 131072  # L
    factors: str | None = None  # a factors.json, or a model folder whose config carries a `longrope` dict; wins over `method`
    method: str = "longrope2"  # a name of lr2train.rope.METHODS
    critical_index: int | None = None  # rcd, zero-based cosine index; longrope2, yarn_rcd, ntk_rcd
    tail: list[float] = field(
        default_factory=list
    )  # rescale factors from the critical index on (longrope2); one number stands for a constant tail
    attention_factor: float | None = (
        None  # of the long window, multiplies cos and sin; None takes the method's own. The short window is always 1
    )
    options: dict[str, Any] = field(default_factory=dict)  # further keyword arguments of the method


@dataclass
class SourceConfig:
    """One origin of documents. `kind` picks the reader: stdlib | folder | hub | needles, or custom for a class of your own that `target` names."""

    name: str = MISSING
    kind: str = "folder"
    path: str | None = None  # folder or file (folder), hub id (hub)
    target: str | None = None  # custom: package.module.Class, built with `options`, whose instances iterate over (id, text)
    text_column: str = "text"  # of .jsonl, .parquet and .arrow records
    max_documents: int | None = None
    max_bytes: int | None = None  # of text, read in order; None reads all
    max_tokens: int | None = None  # of documents of `windows`, BOS and EOS included: where they are reached, reading stops
    max_document_bytes: int = 64 << 20  # a longer document is broken: real ones are books, not dumps
    max_broken_share: float = 0.05  # of a source's records; beyond it the job stops, because text is being lost
    windows: list[str] = field(default_factory=lambda: ["short", "long"])  # documents of another window are skipped once tokenised
    weight: float = 1.0  # share of the tokens of each bucket, or of the corpus (data.weights_of), relative to the other sources
    options: dict[str, Any] = field(default_factory=dict)  # what the kind needs beyond this (needles: lengths, wording …)


@dataclass
class StageConfig:
    """One stage of the curriculum that trains a tiny base model from scratch."""

    steps: int = MISSING
    length_tokens: int = MISSING  # of every document; rows of `segment_tokens` hold segment_tokens / length_tokens of them
    repeats: float = 0.0  # share of rows that repeat random tokens (loss on the repeats only)
    needles: float = 0.0  # share of rows that are needle documents of 1 … max_pairs pairs, loss on the answers only
    dense: float = 0.0  # share of rows crammed with pairs, each asked for, loss on the answers only: telling many needles apart is what is slow to learn
    text: float = 0.0  # share of rows that are plain text


@dataclass
class BucketConfig:
    """A range of document lengths (BOS and EOS included), the window that it trains, and its part of that window's tokens."""

    name: str = MISSING
    window: str = "long"  # short | long
    above_tokens: int | None = None  # documents longer than this; None: 0 for short, the original window for long
    to_tokens: int | None = None  # and of at most this; None: the original window for short, any length for long
    weight: float = 1.0  # share of the window's tokens, relative to the window's other buckets
    sources: dict[str, float] = field(
        default_factory=dict
    )  # weight of each source in this bucket, relative to all such weights of the window; then `weight` above and the sources' own do nothing
    over_limit: OverLong | None = None  # None: data.over_long


@dataclass
class NeedleConfig:
    """How needle documents read."""

    wording: str = "paper"  # a name of lr2train.data.needles.WORDINGS
    digits: int = 7  # of the hidden number
    max_pairs: int = 1  # needles hidden in one training document (1 … max)
    at_start: float = 0.4  # share of training documents whose first asked needle stands at the very start, the farthest from its question
    max_questions: int = 1  # of them, asked at its end (1 … max); more questions are more answers to learn from in a curriculum's row


@dataclass
class DecontaminateConfig:
    """Evaluation sets whose text must not be trained on."""

    files: list[str] = field(default_factory=list)  # .txt or .jsonl; every string of a record counts. None: nothing is compared
    ngram: int = 13  # words; a document that shares so many in a row is left out (Brown et al., 2020, appendix C)


@dataclass
class DataConfig:
    """Documents, tokens, segments."""

    path: str | None = None  # the corpus that `prepare` wrote (runs/<name>)
    kind: str = "segments"  # segments: planned segments of the corpus | curriculum: `stages` below, for a base model from scratch
    sources: list[SourceConfig] = field(default_factory=list)
    tokenizer: str | None = None  # folder or tokenizer.json; None trains a byte-level BPE on the sources
    vocab_size: int = 1024  # of the trained tokenizer
    tokenizer_train_bytes: int = (
        100_000_000  # of text that the tokenizer learns from, an equal part from each source; merges settle long before
    )
    tokenizer_backend: str = (
        "hf"  # hf | gigatoken: the same ids, many times faster, checked on the very documents | auto: it where it serves
    )
    workers: int = 0  # processes that tokenise; 0: one a core
    shard_bytes: int = 64 << 20  # of input that a process takes at a time, and that a kill may cost; a compressed file is one shard
    deduplicate: str = "none"  # leave out exact duplicates: none | source: within each source | corpus: over all; the first one stays
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    verify: bool = True  # compare the corpus' files with their checksums before training (once, as long as they do not change)
    segment_tokens: int = 131072  # length of a packed row: the target window
    short_tokens: int = 0  # budget of tokens in short segments; 0 plans every document once
    long_tokens: int = 0  # budget of tokens in long segments; 0 plans every document once
    buckets: list[BucketConfig] = field(default_factory=list)  # budgets by length; a window without one has a bucket of all its documents
    weights_of: WeightsOf = WeightsOf.bucket  # corpus: source weights and buckets both hold, by the mix nearest to what the sources are
    max_repeats: float = 4.0  # of a document: up to four passes over the same text are about as good as new text (Muennighoff et al., 2023)
    keep_below: dict[str, float] = field(
        default_factory=dict
    )  # share kept of a source's documents below keep_below_tokens; +data.keep_below.NAME=0.1
    keep_below_tokens: int = 4096  # Fu et al. (2024) keep a tenth of those
    long_attention: LongAttention = LongAttention.segment
    over_long: OverLong = OverLong.split
    holdout: float = 0.02  # share of documents kept out of training, for the search and the evaluation
    align_sp: Any = 1  # shards of a segment (a number, or a list) whose borders no short document crosses: it then costs no communication
    # Segments of one window that follow each other in a step, shared by the data-parallel ranks: any number of ranks that divides it sees the
    # same data at the same step. 0: a multiple of the first start's ranks, up to a quarter of a step.
    group_segments: int = 0
    # Steps that are passed over, as metrics.jsonl counts them: ["1200-1230", "1500"]. Their data is never trained on; the counter and the
    # learning rate go on.
    skip_steps: list[str] = field(default_factory=list)
    prefetch_steps: int = 2  # steps of batches that are made ahead
    loader_threads: int = 1  # that make them; more help where the corpus lies on a slow disk
    needles: NeedleConfig = field(default_factory=NeedleConfig)
    stages: list[StageConfig] = field(default_factory=list)


STRATEGIES = ("local", "ulysses", "ring", "gather", "ulysses_ring", "ring_flash_attn")  # of sequence-parallel attention


@dataclass
class ParallelConfig:
    """How ranks divide the work: world = data parallel x sequence parallel."""

    sp: int = 1  # ranks that share one segment
    strategy: str = "auto"  # auto: for every segment the one that sends least | a name of STRATEGIES, for all segments
    ring: int = 0  # of the sp ranks, how many a ring holds (ulysses_ring); 0: as many as heads or one node cannot serve by ulysses
    timeout_s: float = 600.0  # after which a collective that somebody does not join ends the job


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 2e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices; norms and biases are never decayed
    clip: float = 1.0  # global gradient norm
    schedule: str = "cosine"  # cosine | linear | constant
    warmup_steps: int = 40
    min_lr_ratio: float = 0.0  # of lr, where the schedule ends
    steps: int = 0  # optimizer steps; 0 is one epoch of the planned segments
    segments_per_step: int = 64  # the global batch: data-parallel ranks x accumulation


@dataclass
class EngineConfig:
    """DeepSpeed."""

    zero_stage: int = 3
    activation_checkpointing: bool = True
    loss_chunk_tokens: int = 4096  # positions whose logits exist at one time
    checkpoint_every_steps: int = 100
    keep_checkpoints: int = 2
    deepspeed: dict[str, Any] = field(default_factory=dict)  # merged over the DeepSpeed config that we write, for what we do not name


@dataclass
class SearchConfig:
    """Needle-driven evolutionary search (paper, Algorithms 1 and 2), with racing."""

    algorithm: str = (
        "evolution"  # evolution: the paper's | surrogate: the same mutations, chosen and compared by a Gaussian process over all
    )
    # evaluations so far | cmaes: CMA-ES over the critical index, a smooth tail and the attention factor
    space: str = "longrope2"  # longrope2: critical index and tail | longrope: every factor is free (LongRoPE v1; the paper's ablation)
    objective: str = "needle"  # needle: perplexity of the answers | text: of all tokens (the paper's ablation)
    population: int = 64  # P
    generations: int = 40
    top_k: int = 16  # parents kept each generation; the paper leaves it open: a quarter of P keeps diversity at this budget
    mutation_probability: float = 0.3  # p, per entry of the tail
    mutation_step: float = 0.01  # grid of the factors (the LongRoPE family's)
    mutation_spread: float = (
        0.25  # standard deviation of a mutated entry's move, as a share of its range: most moves are local, some cross it
    )
    move_critical_index: float = 0.2  # probability that a child's rcd moves by one or two; the paper does not say that it does
    crossover: float = 0.0  # probability that a child takes each of its traits from one of two parents (LongRoPE v1 has it)
    documents: int = 10  # needle documents that a candidate is scored on
    questions: int = 1  # needles asked for in each document, one forward pass for all: the paper asks one
    distractors: int = (
        0  # needles beside them that are not asked for; the paper has none. Needed where every good candidate finds a lone needle
    )
    depth: float = 0.0  # of the needles that are asked for, one after another: 0 is the start of the document; the others lie anywhere
    final_documents: int = (
        0  # further documents, on which the last top_k compete to be the winner: the best of many on few documents is partly luck
    )
    racing: bool = (
        True  # drop a candidate as soon as it cannot plausibly enter the top_k; False scores everyone on everything, as the paper does
    )
    racing_z: float = (
        1.0  # standard errors by which answers must be worse than the k-th best's to be dropped; inf drops only what is certain to lose
    )
    racing_answers: int = 4  # answers that have to be compared before a candidate is dropped on a likelihood
    proposals: int = 8  # surrogate: mutations drawn for each child that is evaluated
    looks: float = 2.25  # surrogate: document-forwards of a generation for each of its children
    tail_low: float = 1.0  # bounds of the tail, in multiples of s = L / L0
    tail_high: float = 2.0
    critical_index: int | None = None  # fix rcd instead of searching d10 … tcd
    original_tokens: list[int] = field(
        default_factory=lambda: [0]
    )  # choices of how many first tokens keep the original RoPE (longrope space)
    search_attention_factor: bool = True  # of the long window; the paper has none
    attention_factor: float = 1.0  # of every candidate where it is not searched
    attention_factor_low: float = 1.0
    attention_factor_high: float = 1.4
    chunk_tokens: int = 0  # forward passes in chunks with a key-value cache, where activations of a whole window do not fit; 0 is whole
    shard: bool = False  # ZeRO-3 over all ranks, for a model that does not fit one device
    seed: int = 0

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

    lengths_tokens: list[int] = field(default_factory=lambda: [4096, 8192, 16384, 32768, 65536, 131072])
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    samples: int = 10  # needle documents per length and depth (the paper runs 10)
    distractors: int = 0  # needles beside the one that is asked for (RULER's multi-key; the paper has none)
    text_documents: int = 4  # plain documents per length, for perplexity
    methods: list[str] = field(default_factory=lambda: ["none", "pi", "ntk", "yarn"])  # shown beside, on the untrained model
    seed: int = 0


@dataclass
class LoggerConfig:
    """Metric sinks. runs/<name>/metrics.jsonl is always written."""

    tensorboard: bool = True
    wandb: bool = False
    project: str = "lr2train"
    entity: str | None = None
    mode: str = "online"  # online | offline


@dataclass
class ExportConfig:
    """A folder for other runtimes."""

    folder: str | None = None  # None: runs/<run>/export
    dtype: str | None = None  # None keeps the trained weights' dtype


@dataclass
class GenerateConfig:
    """Text from a model, across the window switch."""

    prompt: str | None = None
    prompt_file: str | None = None  # a text file, for long prompts
    max_new_tokens: int = 64
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    window: str = "auto"  # auto: switch with re-prefill when the total exceeds L0 | short | long


@dataclass
class InspectConfig:
    """Which segments to look at, and how closely."""

    window: str | None = None  # short | long; None: both
    segment: int | None = None  # its number in the plan of its window; None: 0, or those of `step`
    step: int | None = None  # all segments of a step, as metrics.jsonl counts them (the first is 1)
    dp_size: int = 1  # data-parallel ranks: which of them gets which segment of the step
    documents: int = 12  # rows of a segment's table at most
    text_chars: int = 48  # of a document's beginning and of its end


@dataclass
class HardwareConfig:
    """What `plan` assumes of a cluster."""

    gpus: int = 64
    gpus_per_node: int = 8
    gpu_memory_gib: float = 80.0
    gpu_bf16_tflops: float = 312.0  # dense peak (A100)
    mfu: float = 0.4  # share of the peak that training reaches
    gpu_hour_price: float = 2.0  # USD


@dataclass
class Config:
    """A whole experiment; each verb reads the groups that it needs."""

    name: str = MISSING  # the run folder is runs_folder/name
    runs_folder: str = "runs"
    run: str | None = None  # a finished run that evaluate and export read
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    threads: int = 0  # CPU threads per rank; 0: the machine's cores divided by the local ranks
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


VERBS = ("prepare", "inspect", "search", "train", "evaluate", "export", "generate", "plan", "report")


def load(composed: DictConfig) -> Config:
    """Turn a composed Hydra config into a validated ``Config``.

    Raises:
        UserError: a mandatory key is missing, or a value is out of its limits.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        key = re.sub(r"\[(\d+)\]", r".\1", missing[0])  # as the command line takes it
        raise UserError(f"{key} has no value and no default; set it on the command line: {key}=…")
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(_one_sentence(error)) from error
    assert isinstance(config, Config)
    _validate(config)
    return config


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


def compose(verb: str, overrides: list[str]) -> Config:
    """Compose ``conf/<verb>.yaml`` with overrides, without Hydra's command line.

    Raises:
        UserError: an unknown key, group or option, or a value of the wrong type; the text names it.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    register_schema()
    try:
        with initialize_config_dir(str(CONF_FOLDER), version_base="1.3"):
            composed = hydra_compose(verb, overrides=overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: an override that is no override
        raise UserError(f"{_one_sentence(error)} (overrides: {' '.join(overrides)})") from error
    return load(composed)


def register_schema() -> None:
    """Make the dataclasses known to Hydra; ``conf/base.yaml`` starts from them."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def main(verb: str, job: Callable[[Config], Any]) -> None:
    """Run a verb from the command line: ``key=value`` overrides, or any of Hydra's flags (``--help``, ``--cfg job``, ``--multirun``).

    Exit codes: 0 done; 2 the input was wrong (one sentence on stderr); 130 interrupted; anything else is a defect, with its traceback.
    """
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    if {"--help", "-h"} & set(arguments):
        print(f"{inspect.getdoc(sys.modules[job.__module__])}\n\nEvery key stands with what it does in lr2train/config.py.\n")
    if any(a.startswith("-") for a in arguments):
        _hydra_main(verb, job)
        return
    _show_log()
    try:
        job(compose(verb, arguments))
    except UserError as error:
        _die(verb, error)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = f" for {error.filename}" if error.filename else ""
        _die(
            verb,
            UserError(
                f"there is no room left{where} ({error.strerror}); free some, or set runs_folder to another disk, and run the same command again to go on"
            ),
        )
    except KeyboardInterrupt:
        print(f"{verb}: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


_PATIENCE_S = 5.0  # launchers look at their ranks every second or so
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _show_log() -> None:
    """What our modules log (which kernel, which attention strategy, and why) goes to stderr, from rank 0 alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        logging.getLogger("lr2train").handlers = [handler]
        logging.getLogger("lr2train").setLevel(logging.INFO)


def _hydra_main(verb: str, job: Callable[[Config], Any]) -> None:
    import hydra

    register_schema()

    def run(composed: DictConfig) -> None:
        try:
            job(load(composed))
        except (UserError, OmegaConfBaseException) as error:
            _die(verb, error)

    hydra.main(config_path=str(CONF_FOLDER), config_name=verb, version_base="1.3")(run)()


def _die(verb: str, error: Exception) -> None:
    """Say it once a machine (ranks share their input, so they share the error) and leave with the code for bad input.

    A rank that is not its machine's first waits: had that one failed too, the launcher ends this one meanwhile. If not, nobody else would say it.
    """
    where = ""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(_PATIENCE_S)
        where = f" (rank {os.environ.get('RANK')})"
    print(f"{verb}{where}: {error if isinstance(error, UserError) else _one_sentence(error)}", file=sys.stderr, flush=True)
    sys.exit(EXIT_BAD_INPUT)


def _one_sentence(error: Exception) -> str:
    """Hydra and OmegaConf explain over several lines and causes; keep what tells, add the key that was probably meant."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        text = re.sub(r"\s+", " ", _CHATTER.sub("", str(cause))).strip()
        if text and not any(text in seen or seen in text for seen in texts):
            texts.append(text)
        cause = None if isinstance(cause, UserError) else cause.__cause__
    sentence = "; ".join(texts)
    unknown = re.search(r"Key '(\w+)' not in '(\w+)'", sentence)
    return sentence + _probably_meant(*unknown.groups()) if unknown else sentence


_CHATTER = re.compile(
    r"(full_key: |object_type=|reference_type=)\S*|To append to your config use \S+|"
    r"Set the environment variable HYDRA_FULL_ERROR.*|Config search path:[\s\S]*"
)


def _probably_meant(key: str, type_name: str) -> str:
    known = [one.name for one in fields(globals()[type_name])] if type_name in globals() else []
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; its keys are {', '.join(known)}" if known else ""


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield ``key: old -> new`` for every leaf that differs between two plain configs."""
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if key not in old:
            continue  # a key that a later release has added: the run was started without it
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif _names(a) and _names(a) == _names(b):
            for one, other in zip(a or (), b or (), strict=True):
                yield from differences(one, other, f"{prefix}{key}.{one['name']}.")
        elif a != b:
            yield f"{prefix}{key}: {a!r} -> {b!r}"


def _names(value: Any) -> list[str]:
    """Of a list of named things, such as sources; empty for anything else."""
    named = isinstance(value, list) and all(isinstance(one, dict) and "name" in one for one in value)
    return [one["name"] for one in value] if named else []


_LEAST = {
    "parallel.sp": 1,
    "parallel.ring": 0,
    "optim.segments_per_step": 1,
    "optim.steps": 0,
    "data.segment_tokens": 2,
    "data.workers": 0,
    "data.shard_bytes": 1,
    "data.decontaminate.ngram": 1,
    "data.group_segments": 0,
    "data.prefetch_steps": 0,
    "data.loader_threads": 1,
    "inspect.segment": 0,
    "inspect.step": 1,
    "inspect.dp_size": 1,
    "inspect.documents": 1,
    "inspect.text_chars": 0,
    "rope.target_window_tokens": 1,
    "engine.loss_chunk_tokens": 1,
    "engine.checkpoint_every_steps": 1,
    "engine.keep_checkpoints": 1,
    "search.population": 2,
    "search.documents": 1,
    "search.questions": 1,
    "search.distractors": 0,
    "search.final_documents": 0,
    "search.generations": 0,
    "search.racing_answers": 2,
    "search.proposals": 1,
    "search.chunk_tokens": 0,
    "eval.distractors": 0,
    "eval.samples": 1,
}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "model.dtype": ("float32", "bfloat16", "float16"),
    "device": ("auto", "cpu", "cuda"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "data.kind": ("segments", "curriculum"),
    "data.tokenizer_backend": ("hf", "gigatoken", "auto"),
    "data.deduplicate": ("none", "source", "corpus"),
    "parallel.strategy": ("auto", *STRATEGIES),
    "search.algorithm": ("evolution", "surrogate", "cmaes"),
    "search.space": ("longrope2", "longrope"),
    "search.objective": ("needle", "text"),
    "generate.window": ("auto", "short", "long"),
    "inspect.window": (None, "short", "long"),
    "logger.mode": ("online", "offline"),
    "engine.zero_stage": (0, 1, 2, 3),
}
_NAME = re.compile(r"\w[\w.+=-]*")  # one folder, inside runs_folder, that no shell or pattern trips over
_SHARES = (
    "data.holdout",
    "search.mutation_probability",
    "search.depth",
    "search.crossover",
    "search.move_critical_index",
)


def _validate(config: Config) -> None:
    """Values on their own by table, then those that depend on each other; None, where a key may have it, is for whoever reads it."""
    for key, low in _LEAST.items():
        if (value := attrgetter(key)(config)) is not None and value < low:
            raise UserError(f"{key}={value} is below {low}; set {key} to {low} or more")
    for key, allowed in _ALLOWED.items():
        if (value := attrgetter(key)(config)) not in allowed:
            raise UserError(f"{key}={value} is not one of {', '.join(map(str, allowed))}; set {key} to one of them")
    for key in _SHARES:
        if not 0.0 <= (value := attrgetter(key)(config)) <= 1.0:
            raise UserError(f"{key}={value} is not between 0 and 1; set {key} inside these limits")
    _validate_together(config)


def _validate_together(config: Config) -> None:
    if not _NAME.fullmatch(config.name):
        raise UserError(
            f"name={config.name!r} is no name of a folder in runs_folder={config.runs_folder}; begin with a letter or a digit and go on with "
            "those, '.', '_', '+', '=' or '-'"
        )
    if not 1 <= config.search.looks < math.inf:
        raise UserError(
            f"search.looks={config.search.looks} is not a finite number of 1 or more, the first look at each child; set it to such as 2.25"
        )
    if not config.search.racing_z >= 0:
        raise UserError(f"search.racing_z={config.search.racing_z} is not 0 or more; set it to a number of standard errors such as 1")
    if not config.optim.lr > 0:
        raise UserError(f"optim.lr={config.optim.lr} is not positive; set optim.lr to a learning rate such as 2e-5")
    if config.search.top_k > config.search.population:
        raise UserError(
            f"search.top_k={config.search.top_k} exceeds search.population={config.search.population}; set search.top_k to at most the population"
        )
    if config.data.group_segments and config.optim.segments_per_step % config.data.group_segments:
        raise UserError(
            f"data.group_segments={config.data.group_segments} does not divide optim.segments_per_step={config.optim.segments_per_step}; set "
            "data.group_segments to a divisor, or to 0 to have it chosen"
        )
    if config.data.segment_tokens % config.parallel.sp:
        raise UserError(
            f"data.segment_tokens={config.data.segment_tokens} is not divisible by parallel.sp={config.parallel.sp}; "
            f"set data.segment_tokens to {config.data.segment_tokens // config.parallel.sp * config.parallel.sp} or change parallel.sp"
        )
