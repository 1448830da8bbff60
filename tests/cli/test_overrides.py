"""What people type: text stays text, odd paths come through, keys that we name can be typed."""

import ast
import re
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from omegaconf import OmegaConf

from lr2train.cli import composition
from lr2train.cli.composition import compose
from lr2train.cli.overrides import Override, core_of, place_of, quoted
from lr2train.config import CONF_FOLDER, Config, UserError, loading

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = [
    "data.sources=[{name: x}]",
    "data.buckets=[{name: x}]",
    "data.stages=[{steps: 1, length_tokens: 8}]",
]  # each list with one
LISTS = {"data.sources", "data.buckets", "data.stages"}


def declared() -> dict[str, tuple[Any, Any]]:
    """Key -> (type, field) of everything that the schema declares, below the first entry of each list."""
    blank = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.from_dotlist(["name=x", *ENTRIES]))
    )
    found = {}
    for key, one, _ in loading._leaves(blank):
        key = re.sub(r"^data\.(buckets|stages)\.\w+", lambda at: f"data.{at[1]}.0", key)
        found[key] = place_of(key).hint, one
    return found


DECLARED = declared()
TEXTS = [
    key
    for key, (hint, one) in DECLARED.items()
    if core_of(hint) is str and "choices" not in one.metadata and not key.endswith(".0.name")
]
PATHS = [key for key in TEXTS if DECLARED[key][1].metadata.get("path")]
LISTS_OF_TEXT = [
    key
    for key, (hint, _) in DECLARED.items()
    if get_origin(core_of(hint)) is list and get_args(core_of(hint)) == (str,)
]
LOOKS_LIKE_SOMETHING_ELSE = [
    "1e5",
    "12e4567",
    "3.10",
    "76e0120",
    "007",
    "1_000",
    "true",
    "inf",
    "nan",
    "0x10",
    "1:30",
    "2024-01-01",
    "{}",
    "[]",
    "-5",
]
ODD = [
    "a=b", "a#b", "a(1)", "it's", 'say "so"', "with space", " leads", "ümläut", "数据", "a,b", "a;b", "a&b", "a|b",
    "a*b?", "a[1]", "a{b}", "a:b",
    "a%b", "a@b", "a!b", "a^b", "a+b", "a\\b", "back\\", "back\\'", "''", "'half", "((", "]}", "\\\\", "$HOME", "`x`",
    "<x>", "a\tb", "a\nb", "~x",
    "a=b=c", "=", "..", "-x", "--x", "+x", "choice(1,2)", "range(3)", "${unclosed", "é".encode().decode(), "\u200b",
    "🙂",
]  # fmt: skip


def at(made: Any, key: str) -> Any:
    """A value of a config by its key; the entry of a source by its name."""
    return OmegaConf.select(made, key.replace("data.sources.x", "data.sources[0]").replace(".0.", "[0]."))


def test_the_lists_of_keys_are_not_empty():
    assert {"name", "model.revision", "generate.prompt", "data.sources.x.text_column"} <= set(TEXTS)
    assert PATHS == [
        "runs_folder", "run", "model.path", "rope.factors", "data.path", "data.sources.x.path", "data.tokenizer",
        "eval.essays", "eval.squad", "eval.hotpotqa", "eval.loft", "eval.infinitebench", "eval.longbench",
        "eval.task_path", "export.folder",
        "generate.prompt_file", "generate.prompts_file",
    ]  # fmt: skip
    assert LISTS_OF_TEXT == [
        "data.sources.x.windows", "data.decontaminate.files", "data.skip_steps", "eval.tasks", "eval.wordings",
        "eval.methods", "logger.profile_steps", "generate.prompts", "generate.stop",
    ]  # fmt: skip


def composed(*arguments: str) -> Any:
    with composition.told():
        return composition.composed("train", ["name=x", *ENTRIES, *arguments], composition.config_folders())


@pytest.mark.parametrize("turn", range(5))
def test_text_stays_text_whatever_it_looks_like(turn):
    """A key has another text in each turn; each text is met by many keys."""
    texts = {
        key: LOOKS_LIKE_SOMETHING_ELSE[(n + 3 * turn) % len(LOOKS_LIKE_SOMETHING_ELSE)] for n, key in enumerate(TEXTS)
    }
    plain = [text for text in LOOKS_LIKE_SOMETHING_ELSE if text[0] not in "[{"]
    lists = {key: [plain[(n + 3 * turn) % len(plain)], "b"] for n, key in enumerate(LISTS_OF_TEXT)}
    typed = [f"{key}=[{','.join(value)}]" for key, value in lists.items()]
    made = composed(*(f"{key}={text}" for key, text in texts.items()), *typed)
    assert {key: at(made, key) for key in TEXTS} == texts
    assert {key: list(at(made, key)) for key in LISTS_OF_TEXT} == lists


UNCLOSED = "${unclosed"  # an interpolation that names nothing


@pytest.mark.parametrize("turn", range(6))
def test_odd_paths_come_through_as_they_are(turn):
    """Each odd path is met in two turns, by other keys."""
    paths = {key: f"/data/{ODD[(n + len(PATHS) * turn) % len(ODD)]}" for n, key in enumerate(PATHS)}
    typed = [f"{key}={path}".replace("${", "\\${") for key, path in paths.items()]
    made = composed(*typed)
    assert {key: at(made, key) for key in PATHS} == paths


def test_an_interpolation_in_a_path_names_its_remedy():
    with pytest.raises(UserError, match=r"write \\\$\{ where"):
        composed(f"data.path=/data/{UNCLOSED}")


# Quotes would pair with those of a neighbour, so each path that has them is in a list of its own.
UNQUOTED = [odd for odd in ODD if not set(odd) & set(",[]{}")]
QUOTED = [[odd] for odd in UNQUOTED if set(odd) & set("'\"\\")]


@pytest.mark.parametrize("odds", [[odd for odd in UNQUOTED if [odd] not in QUOTED], *QUOTED], ids=" ".join)
def test_odd_paths_come_through_inside_a_list(odds):
    paths = [f"/data/{odd.rstrip()}" for odd in odds]
    sources = ",".join(f"{{name: t{number}, path: {path}}}" for number, path in enumerate(paths))
    made = compose(
        "prepare", ["name=x", f"data.sources=[{sources}]", f"data.decontaminate.files=[{','.join(paths)},b]"]
    )
    assert [source.path for source in made.data.sources] == paths
    assert made.data.decontaminate.files == [*paths, "b"]


@pytest.mark.slow
@pytest.mark.parametrize("text", LOOKS_LIKE_SOMETHING_ELSE)
def test_every_key_of_text_takes_every_text(text):
    made = composed(*(f"{key}={text}" for key in TEXTS))
    assert {key: at(made, key) for key in TEXTS} == dict.fromkeys(TEXTS, text)
    if text[0] not in "[{":
        made = composed(*(f"{key}=[{text},b]" for key in LISTS_OF_TEXT))
        assert {key: list(at(made, key)) for key in LISTS_OF_TEXT} == {key: [text, "b"] for key in LISTS_OF_TEXT}


@pytest.mark.slow
@pytest.mark.parametrize("odd", ODD)
def test_every_key_of_a_path_takes_every_odd_path(odd):
    path = f"/data/{odd}"
    made = composed(*(f"{key}={path}".replace("${", "\\${") for key in PATHS))
    assert {key: at(made, key) for key in PATHS} == dict.fromkeys(PATHS, path)


def test_quotes_and_null_are_heard():
    made = compose(
        "generate",
        ["generate.prompt='null'", "run=null", 'model.path="1e5"', "data.sources=[{name: 'a,b', path: null}]"],
    )
    assert (made.generate.prompt, made.run, made.model.path, made.data.sources[0].name, made.data.sources[0].path) == (
        "null",
        None,
        "1e5",
        "a,b",
        None,
    )


@pytest.mark.parametrize("text", ODD)
def test_quoting_is_undone_by_hydra(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert OverridesParser.create().parse_override(f"key={quoted(text)}").value() == text


@pytest.mark.parametrize("text", ["cost ${x} now", "${oc.env:HOME}", "a\\${b}", "\\\\${b} $c {d}", "echo '${x}'"])
def test_a_prompt_is_never_interpolated(text):
    assert compose("generate", ["name=x", f"generate.prompt={text}"]).generate.prompt == text


def test_home_stands_for_a_tilde_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = compose(
        "prepare", ["name=x", *ENTRIES, *(f"{key}=~/a b" for key in PATHS), "data.decontaminate.files=[~/c,d]"]
    )
    values = {key: at(OmegaConf.structured(made), key) for key in PATHS}
    assert values == dict.fromkeys(PATHS, f"{tmp_path}/a b")
    assert made.data.decontaminate.files == [f"{tmp_path}/c", "d"]


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("model.overrides.sliding_window=null", "model.overrides", {"sliding_window": None}),
        ("+model.overrides.sliding_window=null", "model.overrides", {"sliding_window": None}),
        ("model.overrides={a: {b: 1}, c: /x(y}", "model.overrides", {"a": {"b": 1}, "c": "/x(y"}),
        ("rope.options.factor=8", "rope.options", {"factor": 8}),
        ("data.keep_below.web=0.1", "data.keep_below", {"web": 0.1}),
        ("data.keep_below.1b_words=0.1", "data.keep_below", {"1b_words": 0.1}),
        ("engine.deepspeed.zero_optimization.offload_param.device=cpu", "engine.deepspeed",
        {"zero_optimization": {"offload_param": {"device": "cpu"}}}),
        ("data.sources.x.max_broken_share=0.5", "data.sources[0].max_broken_share", 0.5),
        ("data.sources.0.max_broken_share=0.5", "data.sources[0].max_broken_share", 0.5),
        ("data.sources[0].max_broken_share=0.5", "data.sources[0].max_broken_share", 0.5),
        ("data.sources.x.options.allow_download=true", "data.sources[0].options", {"allow_download": True}),
        ("data.buckets.x.sources.web=2", "data.buckets[0].sources", {"web": 2.0}),
        ("data.stages[0].repeats=1", "data.stages[0].repeats", 1.0),
    ],
)  # fmt: skip
def test_open_dictionaries_and_entries_of_lists_can_be_typed(argument, key, value):
    assert OmegaConf.select(composed(argument), key) == value


@pytest.mark.parametrize(
    ("argument", "tells"),
    [
        ("data.sources.y.weight=1", ["data.sources.y", "has x"]),
        ("data.sources=[{name: a", ["data.sources", "closes"]),
        ("eval.methods=none", ["eval.methods=none", "no list", "eval.methods=[none]"]),
        ("optim.lr=(", ["optim.lr=", "(", "Float"]),
        ("optim.lr=1,2", ["optim.lr=1,2", "--multirun"]),
        ("model.overrides={}", ["model.overrides={}", "empty nothing"]),
        ("data.sources.x.wieght=1", ["wieght", "did you mean weight?"]),
        ("data.skip_steps.x=1", ["data.skip_steps.x=1"]),
        ("data.keep_below.数据=1", ["数据", "cannot be typed", "--config-dir", "--config-dir"]),
        ("~/x", ["~/x", "key=value"]),
        ("optim=1e5", ["optim=1e5", "default"]),
        ("data.keep_below={'a b': 1}", ["'a b'", "cannot be typed", "--config-dir"]),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(argument, tells):
    with pytest.raises(UserError) as error:
        composed(argument)
    assert all(part in str(error.value) for part in tells), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "alternatives"),
    [
        ("name=a,b/c", ["name=a", "name=b/c"]),
        ("name='a,b'", ["name='a,b'"]),
        ("optim.betas=[0.9,0.95],[0.8,0.9]", ["optim.betas=[0.9,0.95]", "optim.betas=[0.8,0.9]"]),
        ("optim.steps=range(1,4)", ["optim.steps=1", "optim.steps=2", "optim.steps=3"]),
        ("model=tiny_llama,phi3_mini", ["model=tiny_llama", "model=phi3_mini"]),
        ("data.path=it's,here", ["data.path=it's", "data.path=here"]),
        ("optim.lr=1e-5", ["optim.lr=1e-5"]),
    ],
)
def test_a_sweep_splits_at_commas_that_are_not_quoted(argument, alternatives):
    assert Override.parse(argument).alternatives() == alternatives


# Keys that our own messages name.

GROUPS = "model|rope|data|parallel|optim|engine|search|eval|logger|export|generate|inspect|hardware"
KEY = re.compile(rf"(?<![\w./])((?:{GROUPS})(?:\.[A-Za-z_<][\w<>*]*)+)")
FILES = {"eval.txt", "data.source", "search.json", "export.json", "generate.json"}  # a document source, results


def _texts_of_errors() -> list[str]:
    """The text of every UserError in the source, with ``FILLED`` in the place of what is filled in."""
    texts = []
    for file in sorted((ROOT / "lr2train").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError" and node.args:
                parts = [one for one in ast.walk(node.args[0]) if isinstance(one, ast.JoinedStr)] or [node.args[0]]
                for part in parts:
                    if isinstance(part, ast.JoinedStr):
                        texts.append(
                            "".join(one.value if isinstance(one, ast.Constant) else FILLED for one in part.values)
                        )
                    elif isinstance(part, ast.Constant):
                        texts.append(str(part.value))
    return texts


FILLED = "X0"


def _known_part(key: str) -> str:
    """A key up to a filled-in name of a field, which stands for several keys; one of an entry or a dictionary may be
    anything.
    """
    parts = key.split(".")
    known = [
        number
        for number in range(1, len(parts) + 1)
        if FILLED not in parts[number - 1] or place_of(".".join(parts[:number])).known
    ]
    return ".".join(parts[: len(known)]).replace(FILLED, "x")


def _named_keys() -> set[str]:
    named = {
        key.rstrip(".")
        for text in _texts_of_errors()
        for key in KEY.findall(re.sub(r"<name>|NAME|(?<=\.)\*", FILLED, text))
    }
    return {_known_part(key) for key in named} - FILES


def test_every_key_that_a_message_names_can_be_typed():
    keys = sorted(_named_keys())
    assert len(keys) > 80
    assert [key for key in keys if not place_of(key).known] == []
    arguments = [argument for key in keys if (argument := _typed(key))]
    made = composed(*arguments)
    assert len(arguments) >= 69
    assert at(made, "data.keep_below") == {"x": 1}


def _typed(key: str) -> str | None:
    """``key=value`` with a value of the key's type; None for a whole group."""
    hint = core_of(place_of(key).hint)
    if get_origin(hint) is list:
        return None if key in LISTS else f"{key}=[]"
    if isinstance(hint, type) and hasattr(hint, "__members__"):
        return f"{key}={next(iter(hint.__members__))}"
    if (isinstance(hint, type) and hasattr(hint, "__dataclass_fields__")) or get_origin(hint) is dict:
        return None
    return f"{key}={ {str: 'x', bool: 'true'}.get(hint, '1') }"


# Files and folders of a user's own.


@pytest.mark.parametrize(
    ("yaml", "key"), [("project: 1e5", "logger.project"), ("entity: 12", "logger.entity"), ("mode: yes", "logger.mode")]
)
def test_a_yaml_file_that_changes_a_text_is_refused_by_name(tmp_path, monkeypatch, yaml, key):
    (tmp_path / "conf" / "logger").mkdir(parents=True)
    (tmp_path / "conf" / "logger" / "mine.yaml").write_text(yaml)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"mine.yaml: {key} is text and YAML reads .*put the value in quotes"):
        compose("train", ["name=x", "logger=mine"])
    (tmp_path / "conf" / "logger" / "mine.yaml").write_text(re.sub(r": (.*)", r": '\1'", yaml))
    with pytest.raises(UserError, match="yes") if "yes" in yaml else _nothing():
        compose("train", ["name=x", "logger=mine"])


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_our_own_files_hold_no_text_that_yaml_changes():
    for file in CONF_FOLDER.glob("*/*.yaml"):
        if file.parent.name == "local":
            continue
        package = "" if "@package _global_" in file.read_text() else file.parent.name
        hint = place_of(package).hint if package else Config
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        assert list(composition._changed(values, hint, package)) == [], file


def test_a_folder_of_the_user_is_searched_first(tmp_path, monkeypatch):
    for folder, lr in (("conf", "0.5"), ("given", "0.25")):
        (tmp_path / folder / "optim").mkdir(parents=True)
        (tmp_path / folder / "optim" / "default.yaml").write_text(f"lr: {lr}")
    monkeypatch.chdir(tmp_path)
    assert compose("train", ["name=x"]).optim.lr == 0.5
    assert composition.composed("train", ["name=x"], composition.config_folders("given")).optim.lr == 0.25
    with pytest.raises(UserError, match="--config-dir=nowhere is no folder"):
        composition.config_folders("nowhere")


def test_the_environment_counts_where_a_key_is_not_given(monkeypatch):
    assert compose("train", ["name=x"]).logger.mode == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "1e5")
    given = compose("train", ["name=x", "logger=wandb"]).logger
    assert (given.mode, given.project) == ("offline", "1e5")
    assert compose("train", ["name=x", "logger.mode=online"]).logger.mode == "online"
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match=r"logger\.mode=sometimes is not one of online, offline, disabled"):
        compose("train", ["name=x"])
