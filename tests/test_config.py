"""Configs: every experiment composes, bad keys and values are named, a run folder belongs to one config."""

import dataclasses
import math
import os
import re
from typing import Any, get_args, get_origin

import pytest
from omegaconf import OmegaConf
from remedies import remedy_of

from lr2train import config as schema
from lr2train import io, run
from lr2train.cli.composition import compose
from lr2train.cli.overrides import core_of, place_of
from lr2train.config import CONF_FOLDER, READS, Config, UserError, load, loading, reads
from lr2train.config.gpus import GPUS, memory_gib, peak_tflops
from lr2train.data.needles import N_KEYS
from lr2train.data.tokenizer import SMALLEST_VOCABULARY

EXPERIMENTS = sorted(path.stem for path in (CONF_FOLDER / "experiment").glob("*.yaml"))
GROUPS = [
    (path.parent.name, path.stem)
    for path in sorted(CONF_FOLDER.glob("*/*.yaml"))
    if path.parent.name not in ("experiment", "local")
]
VERBS = sorted(READS)


# Each experiment for two verbs that read most keys and for some of the others in turn.
IN_TURN = {(verb, EXPERIMENTS[number % len(EXPERIMENTS)]) for number, verb in enumerate(VERBS)}
PAIRS = [
    pytest.param(verb, one, marks=[] if verb in ("train", "search") or (verb, one) in IN_TURN else pytest.mark.slow)
    for verb in VERBS
    for one in EXPERIMENTS
]


@pytest.mark.parametrize(("verb", "experiment"), PAIRS)
def test_every_experiment_composes_for_every_verb(verb, experiment):
    composed = compose(verb, [f"experiment={experiment}", "name=x"])
    assert composed.name == "x"
    assert composed.rope.target_window_tokens > 0


@pytest.mark.parametrize(("group", "choice"), GROUPS)
def test_every_choice_of_every_group_composes(group, choice):
    assert compose("train", ["name=x", "model=tiny_llama", f"{group}={choice}"]).name == "x"


def test_the_papers_settings():
    llama = compose("train", ["experiment=llama3_8b_128k", "name=x"])
    assert (llama.rope.target_window_tokens, llama.optim.segments_per_step, llama.optim.lr, llama.optim.schedule) == (
        131072,
        64,
        2e-5,
        "cosine",
    )
    assert (llama.rope.critical_index, len(llama.rope.tail)) == (33, 31)
    paper = compose("search", ["experiment=llama3_8b_128k", "search=paper", "name=x"]).search
    assert (paper.algorithm, paper.questions, paper.search_attention_factor, paper.depths) == (
        "evolution",
        1,
        False,
        [0.0],
    )
    assert (paper.population, paper.generations, paper.mutation_probability, paper.documents) == (
        64,
        40,
        0.3,
        10,
    )
    assert llama.data.short_tokens + llama.data.long_tokens == 10_000_000_000


@pytest.mark.parametrize(
    ("override", "tells"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean lr?"]),
        ("optim.lr=fast", ["optim.lr", "fast", "Float"]),
        ("optim.lr=-1", ["optim.lr=-1", "not above 0"]),
        ("data.long_attention=all", ["long_attention", "all", "segment, document"]),
        ("data.long_positions=random", ["long_positions", "random", "full, skip"]),
        ("model.dtype=int8", ["model.dtype=int8", "float32, bfloat16"]),
        ("experiment=nope", ["experiment=nope", "tiny_4k"]),
        ("parallel.sp=3", ["data.segment_tokens=4096", "parallel.sp=3", "set parallel.sp to 1"]),
        ("parallel.sp=0", ["parallel.sp=0", "below 1"]),
        (
            "engine.activation_checkpointing=false",
            ["engine.activation_checkpointing", "engine.recompute=none for false"],
        ),
        ("engine.recompute=attention", ["engine.recompute=attention", "none, keep_attention, layer, auto"]),
        ("search.top_k=99", ["search.top_k=99", "search.population=12"]),
        ("data.holdout=2", ["data.holdout=2", "between 0 and 1"]),
        ("search.settle=0.5", ["search.settle=0.5", "not between 0.5 and 1"]),
        ("search.settle=nan", ["search.settle=nan", "finite"]),
        ("search.racing=false", ["search.racing", "search.algorithm=gradient has replaced racing"]),
        ("search.depth=0", ["search.depth", "write search.depths=[0.0]"]),
        ("search.algorithm=annealing", ["search.algorithm=annealing", "gradient, evolution"]),
        ("inspect.segment=-1", ["inspect.segment=-1", "below 0"]),
        ("=3", ["=3", "key=value"]),
        ("name=", ["name=''", "runs_folder=runs"]),
        ("name=../out", ["name='../out'", "begin with a letter"]),
        ("name=a/b", ["name='a/b'"]),
        ("name=${name}", ["name=${name}", "Recursive"]),
        ("model.path=${oc.env:NOPE}", ["model.path=${oc.env:NOPE}", "'NOPE' not found"]),
        ("parallel.timeout_s=1e300", ["parallel.timeout_s=1e+300", "2000000"]),
        ("seed=36893488147419103232", ["seed=36893488147419103232", "set seed to 0"]),
        ("optim.segments_per_step=1000000000000", ["optim.segments_per_step=1000000000000", "1000000;"]),
    ],
)
def test_bad_input_names_key_value_and_limit(override, tells):
    experiment = [] if override.startswith("experiment") else ["experiment=tiny_4k"]
    with pytest.raises(UserError) as error:
        compose(_reader(override), [*experiment, "name=x", override])
    sentence = str(error.value)
    assert all(part in sentence for part in tells), sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("overrides", "tells"),
    [
        (["data.kind=curriculum", "data.long_positions=skip"], ["data.kind=curriculum", "data.long_positions to full"]),
        (["optim.settle_validations=2", "engine.validate_every_steps=0"], ["optim.settle_validations to 0"]),
    ],
)
def test_keys_that_do_not_go_together_are_refused(overrides, tells):
    with pytest.raises(UserError) as error:
        compose("train", ["experiment=tiny_4k", "name=x", *overrides])
    assert all(part in str(error.value) for part in tells), error.value


def _reader(override: str) -> str:
    """A verb that reads the key."""
    return next(verb for verb in ("train", *READS) if reads(verb, override.partition("=")[0]) or verb == "plan")


BLANK = OmegaConf.merge(
    OmegaConf.structured(Config),
    OmegaConf.from_dotlist(
        [
            "name=x",
            "data.sources=[{name: 's'}]",
            "data.buckets=[{name: 'b'}]",
            "data.stages=[{steps: 1, length_tokens: 8}]",
        ]
    ),
)


def _fields() -> list[tuple[str, dataclasses.Field[Any]]]:
    """(key, field) of everything in the schema, as the command line takes it."""
    numbered = re.compile(r"^data\.(sources|buckets|stages)\.\w+")
    return [(numbered.sub(r"data.\1.0", key), one) for key, one, _ in loading._leaves(OmegaConf.to_object(BLANK))]


def _holds_numbers(key: str) -> bool:
    hint = core_of(place_of(key).hint)
    return hint in (int, float) or (get_origin(hint) in (list, dict) and get_args(hint)[-1] in (int, float))


FIELDS = _fields()
NUMBERS = [(key, one) for key, one in FIELDS if _holds_numbers(key)]


def test_every_number_has_limits():
    assert len(NUMBERS) > 90
    assert [key for key, one in NUMBERS if "limits" not in one.metadata] == []


def _outside(limits: schema.Limits, whole: bool) -> list[float]:
    """Numbers that limits refuse."""
    beyond = [] if limits.least is None else [limits.least - 1]
    beyond += [] if limits.above is None else [limits.above, limits.above - 1]
    beyond += [] if limits.most is None else [limits.most + 1]
    beyond += [] if limits.below is None else [limits.below]
    return [int(one) for one in beyond] if whole else [*beyond, math.nan, math.inf, -math.inf]


def _setting(key: str, value: Any) -> Any:
    """A blank config in which a key has a value; of a list the first number, of a dictionary the entry ``x``."""
    hint = core_of(place_of(key).hint)
    whole = {list: [value], dict: {"x": value}}.get(get_origin(hint), value)
    made = OmegaConf.create(BLANK)
    OmegaConf.update(made, key.replace(".0.", "[0]."), whole)
    return made


LIMITED = [(key, one.metadata["limits"]) for key, one in NUMBERS if "limits" in one.metadata]
CHOICES = [(key, one) for key, one in FIELDS if "choices" in one.metadata]


@pytest.mark.parametrize(("key", "limits"), LIMITED, ids=[key for key, _ in LIMITED])
def test_a_number_out_of_its_limits_is_refused_and_the_remedy_leads_on(key, limits):
    hint = core_of(place_of(key).hint)
    for value in _outside(limits, whole=hint is int or int in get_args(hint)):
        made, verb = _setting(key, value), _reader(key)
        with pytest.raises(UserError, match=rf"=\[?({re.escape(str(value))}|{re.escape(str(float(value)))})[\] ]"):
            load(made, verb)
        for _ in range(4):
            if (remedy := _refused(made, verb)) is None:
                break
            name, _, text = remedy.partition("=")
            OmegaConf.update(made, re.sub(r"\.([sb0])(?=\.|$)", "[0]", name), OmegaConf.create(f"value: {text}").value)
        else:
            assert _refused(made, verb) is None, f"{key}={value}"


def _refused(made: Any, verb: str) -> str | None:
    """The remedy of an error, None where there is none."""
    try:
        load(made, verb)
    except UserError as error:
        return remedy_of(error)
    return None


@pytest.mark.parametrize(("key", "one"), CHOICES, ids=[key for key, _ in CHOICES])
def test_a_choice_that_is_none_is_refused_with_one_that_is(key, one):
    with pytest.raises(UserError) as error:
        load(_setting(key, "nonesuch"), _reader(key))
    named = re.escape(key.replace(".0.", ".b."))
    said = re.search(rf"{named}=nonesuch is not one of .*; set {named} to (\w+)", str(error.value))
    assert said, str(error.value)
    assert said[1] in one.metadata["choices"].__members__


def test_limits_that_other_parts_set_are_theirs():
    assert schema.NEEDLE_NAMES == N_KEYS
    limits = dict(NUMBERS)["data.vocab_size"].metadata["limits"]
    assert limits.least == SMALLEST_VOCABULARY


@pytest.mark.parametrize("verb", READS)
def test_a_verb_is_refused_over_the_keys_that_it_reads_alone(verb):
    wrong = {
        "parallel.sp": 0, "search.settle": 2, "data.holdout": 2, "optim.lr": -1, "eval.samples": 0,
        "hardware.mfu": 0, "generate.top_p": 0,
        "inspect.dp_size": 0, "export.dtype": "int4", "logger.mode": "loud",
    }  # fmt: skip
    for key, value in wrong.items():
        made = _setting(key, value)
        if reads(verb, key):
            with pytest.raises(UserError, match=re.escape(key)):
                load(made, verb)
        else:
            assert load(made, verb).name == "x"


def test_the_readers_of_a_key():
    assert [verb for verb in READS if reads(verb, "parallel.sp")] == ["train", "plan", "rehearse"]
    assert [verb for verb in READS if reads(verb, "parallel.timeout_s")] == [
        "search", "train", "evaluate", "plan", "rehearse", "doctor",
    ]  # fmt: skip
    assert [verb for verb in READS if reads(verb, "data.sources.web.weight")] == ["prepare"]
    assert [verb for verb in READS if reads(verb, "data")] == [
        verb for verb in READS if verb not in ("export", "generate", "dashboard", "doctor")
    ]


def test_every_key_that_a_verb_reads_is_in_the_schema():
    assert [key for keys in READS.values() for key in keys if not place_of(key).known] == []


@pytest.mark.parametrize("typed", ["done", "there/done", "./there/done/", "{tmp}/there/done"])
def test_a_run_is_its_name_or_its_folder(tmp_path, monkeypatch, typed):
    (tmp_path / "there" / "done").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = compose("export", [f"run={typed.format(tmp=tmp_path)}", "runs_folder=there"])
    assert os.path.samefile(os.path.join(config.runs_folder, str(config.run)), tmp_path / "there" / "done")


def test_a_missing_name_is_asked_for():
    with pytest.raises(UserError, match="name has no value"):
        compose("train", ["experiment=tiny_4k"])


def test_random_streams_depend_on_seed_and_name_only():
    first = run.stream(1, "a", 2).integers(1 << 30, size=4)
    assert (first == run.stream(1, "a", 2).integers(1 << 30, size=4)).all()
    assert (first != run.stream(1, "a", 3).integers(1 << 30, size=4)).any()
    assert (first != run.stream(2, "a", 2).integers(1 << 30, size=4)).any()


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    io.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        io.write_json(path, {"a": object()})
    assert io.read_json(path) == {"a": 1}
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        io.read_json(path)


# ---- peaks and memory of GPUs ----


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA RTX A4000", None),
        ("AMD Instinct MI300X", 1307.4),
        ("Some GPU", None),
        ("", None),
    ],
)
def test_peaks_by_device_name(name, peak):
    assert peak_tflops(name) == peak


def test_every_line_of_the_table_is_found_by_its_own_name():
    assert [one for one in GPUS if (peak_tflops(one[0]), memory_gib(one[0])) != one[1:]] == []


def test_plan_takes_the_peak_of_the_named_gpu():
    assert compose("plan", ["name=x"]).hardware.gpu_bf16_tflops == 312.0
    assert compose("plan", ["name=x", "hardware.gpu=H100 PCIe"]).hardware.gpu_bf16_tflops == 756.0
    assert compose("plan", ["name=x", "hardware.gpu=H200", "hardware.gpu_bf16_tflops=5"]).hardware.gpu_bf16_tflops == 5
    with pytest.raises(UserError, match=r"hardware.gpu=Abacus .*; set hardware.gpu_bf16_tflops to its dense bf16 peak"):
        compose("plan", ["name=x", "hardware.gpu=Abacus"])


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA A100-SXM4-40GB", 40),
        ("H200", 140),
        ("NVIDIA GH200 480GB", None),  # the memory of its CPU
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("Some GPU 8GB", None),
    ],
)
def test_memory_by_device_name(name, gib):
    assert memory_gib(name) == gib


@pytest.mark.parametrize("verb", ["plan", "rehearse"])
def test_the_memory_is_that_of_the_named_gpu(verb):
    assert compose(verb, ["name=x"]).hardware.gpu_memory_gib == 80
    assert compose(verb, ["name=x", "hardware.gpu=H200"]).hardware.gpu_memory_gib == 140
    assert compose(verb, ["name=x", "hardware.gpu=H200", "hardware.gpu_memory_gib=70"]).hardware.gpu_memory_gib == 70
    with pytest.raises(UserError, match=r"hardware.gpu=GH200 .*; set hardware.gpu_memory_gib to its memory in GiB"):
        compose(verb, ["name=x", "hardware.gpu=GH200"])
