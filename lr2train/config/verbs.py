"""Which keys each verb reads. A verb is refused over these keys alone, and its help shows these alone."""

from __future__ import annotations

_RUN, _JOB, _MODEL = "name runs_folder seed", "device threads parallel.timeout_s", "model rope"
_STEP = (
    "data.path data.kind data.stages data.segment_tokens data.long_attention data.long_positions "
    "data.group_segments"  # what a step holds
)
_PREPARED = """model.path model.architecture model.overrides model.original_window_tokens rope.target_window_tokens
data.sources data.tokenizer data.vocab_size
data.tokenizer_train_bytes data.tokenizer_backend data.workers data.shard_bytes data.deduplicate data.decontaminate
data.segment_tokens
data.short_tokens data.long_tokens data.buckets data.weights_of data.max_repeats data.keep_below data.keep_below_tokens
data.over_long
data.holdout data.align_sp data.needles"""
_TRAINED = (
    "data.verify data.skip_steps data.prefetch_steps data.loader_threads data.needles parallel optim engine logger"
)
_PLANNED = "data.short_tokens data.long_tokens parallel optim engine hardware"
_INSPECTED = "data.path data.long_attention data.group_segments data.skip_steps optim.segments_per_step inspect"
READS = {
    "prepare": f"{_RUN} {_PREPARED}".split(),
    "inspect": f"runs_folder run seed {_INSPECTED}".split(),
    "search": f"{_RUN} {_JOB} model rope.target_window_tokens data.path data.verify data.needles search logger".split(),
    "train": f"{_RUN} {_JOB} {_MODEL} {_STEP} {_TRAINED}".split(),
    "evaluate": f"{_RUN} run {_JOB} {_MODEL} data.path data.verify data.needles eval logger".split(),
    "export": ["runs_folder", "run", "device", "model", "export"],
    "generate": f"{_RUN} run device {_MODEL} generate".split(),
    "plan": f"name runs_folder model rope.target_window_tokens {_STEP} {_PLANNED} search".split(),
    "rehearse": f"name runs_folder model rope.target_window_tokens {_STEP} {_PLANNED}".split(),
    "dashboard": ["runs_folder", "run", "logger.entity", "logger.group"],
    "doctor": ["runs_folder", "parallel.timeout_s"],
}
"""The keys that each verb reads; a name stands for all keys below it. A verb checks these alone."""
VERBS = (*READS, "report")


def reads(verb: str, key: str) -> bool:
    """Whether a verb reads a key, or something above or below it."""
    return any(f"{key}.".startswith(f"{one}.") or f"{one}.".startswith(f"{key}.") for one in READS[verb])
