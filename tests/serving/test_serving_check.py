"""The serving check: real subprocesses of transformers, and what its verdicts and exit codes mean."""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import serving_families as families
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tools import families as tools_families
from tools import serving_check
from tools.serving import cases, compare, extend, reference, runtimes

TOLERANCE = 1e-3
SETUP = cases.Setup(Path("two"), "as promised", cases.alone("short", "crossing", "long"), runtimes.EVERY)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A base model with windows 32 -> 128, extended without training."""
    folder = tmp_path_factory.mktemp("check")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**families.SIZES))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder / "base")
    extend.extend(folder / "base", folder / "export", families.L, 1.3, None)
    return folder / "export"


@pytest.fixture(scope="module")
def ours(export):
    """The reference, the cases, a text, and lr2train's answers."""
    found = reference.Reference(export / "two", "float32")
    every = cases.cases_of(found.original, found.target)
    text = families.tokens(128)[0].tolist()
    return found, every, text, {name: found.answer(case, text) for name, case in every.items()}


def check(export, *arguments):
    """The export is named from the working folder, as a user names it."""
    return serving_check.main([os.path.relpath(export), *map(str, arguments)])


@pytest.mark.parametrize(
    ("config", "dtype", "tolerance"),
    [
        ({"dtype": "float32"}, "float32", 1e-3),
        ({"torch_dtype": "float32"}, "float32", 1e-3),
        ({"dtype": "bfloat16"}, "float32", 0.2),  # the attention factor in long/ is rounded with its weights
        ({"dtype": "float32"}, "bfloat16", 0.2),
    ],
)
def test_the_tolerance_follows_weights_and_computation(config, dtype, tolerance, tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "config.json").write_text(json.dumps(config))
    assert serving_check.default_tolerance(tmp_path, dtype) == tolerance


def test_transformers_is_exact_where_promised(export, tmp_path, capsys):
    assert check(export, "--only", "trust_remote_code", "--json", tmp_path / "lines.json") == 0
    said = json.loads((tmp_path / "lines.json").read_text())
    assert (said["windows"], said["tolerance"]) == ({"original": 32, "target": 128}, TOLERANCE)
    verdicts = {line["row"]: line["verdict"] for line in said["lines"]}
    together = [f"{case}, in a batch" for case in runtimes.EVERY]
    assert verdicts == dict.fromkeys(["short", "crossing", "long", *together], "exact")
    assert all(line["equal"] == line["new"] and line["largest"] < TOLERANCE for line in said["lines"])
    assert capsys.readouterr().out.count("exact") == len(verdicts)


def test_a_wrong_table_in_a_folder_is_found(export, tmp_path, capsys):
    """factors.json is right, and config.json is what transformers reads."""
    broken = tmp_path / "broken" / "two"
    broken.mkdir(parents=True)
    for file in (export / "two").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    values = json.loads((broken / "config.json").read_text())
    for name in ("rope_parameters", "rope_scaling"):
        values[name]["long_factor"][-1] *= 1.2
    (broken / "config.json").write_text(json.dumps(values))
    assert check(broken.parent, "--only", "trust_remote_code", "--alone", "--rows", "short,long") == 1
    lines = {line.split()[4]: line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert lines == {"short": "exact", "long": "WRONG"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--rows", "shrt"], "--rows=shrt"),
        (["--transformers", "/nowhere/python"], "--transformers=/nowhere/python"),
        (["--vllm", "/tmp"], "--vllm=/tmp"),
    ],
)
def test_bad_arguments_have_status_2(export, capsys, arguments, named):
    assert check(export, *arguments) == 2
    assert named in capsys.readouterr().err


def test_a_folder_that_is_no_export_has_status_2(export, tmp_path, capsys):
    assert check(tmp_path) == 2
    assert "holds no factors.json" in capsys.readouterr().err
    changed = tmp_path / "changed" / "two"
    changed.mkdir(parents=True)
    for file in (export / "two").iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    with (changed / "modeling_longrope2.py").open("a") as file:
        file.write("print('hello')\n")
    assert check(changed.parent) == 2
    assert "would be executed" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_a_script_that_fails_refuses_every_row(ours):
    _, every, text, _ = ours
    request = cases.request_of(SETUP, every, text, {"original": 32, "target": 128}, "float32")
    given = serving_check._run("vllm", Path(sys.executable), request)
    reason = "ModuleNotFoundError: No module named 'vllm'"
    assert given["refused"] == dict.fromkeys(("short", "crossing", "long"), reason)
    assert not given["rows"]


def line(ours, name, answer, setup=SETUP, new_tokens=cases.NEW_TOKENS):
    found, every, text, wanted = ours
    rows = {} if answer is None else {name: vars(answer)}
    asked = {"prompt": text[: every[name].prompt_tokens], "new_tokens": new_tokens}
    given = {"runtime": "r", "rows": rows, "refused": {}}
    return compare.line_of("r", setup, cases.Row(name, name), given, asked, wanted[name], found, TOLERANCE)


def test_verdicts(ours):
    wanted = ours[3]["long"]
    assert line(ours, "long", wanted).verdict == "exact"
    others = {
        "a log-probability is off": replace(wanted, logprobs=[*wanted.logprobs[:-1], wanted.logprobs[-1] - 0.01]),
        "a log-probability is missing": replace(wanted, logprobs=wanted.logprobs[1:]),
        "no number": replace(wanted, logprobs=[float("nan"), *wanted.logprobs[1:]]),
        "a token is missing": replace(wanted, tokens=wanted.tokens[:-1]),
        "a token is another": replace(wanted, tokens=[*wanted.tokens[:5], wanted.tokens[5] ^ 1, *wanted.tokens[6:]]),
        "of a new token": replace(wanted, token_logprobs=[wanted.token_logprobs[0] - 0.01, *wanted.token_logprobs[1:]]),
    }
    for what, other in others.items():
        assert line(ours, "long", other).verdict == "WRONG", what
        assert line(ours, "long", other).failed
    assert line(ours, "long", others["a token is another"]).equal == 5
    assert line(ours, "long", None).verdict == "REFUSED"
    assert line(ours, "long", replace(wanted, logprobs=[])).verdict == "exact", "a runtime may not tell them"


def test_what_is_not_promised_never_fails(ours):
    informative = replace(SETUP, exact=())
    wanted = ours[3]["long"]
    for answer, verdict in ((wanted, "same"), (replace(wanted, tokens=[]), "other"), (None, "refused")):
        found = line(ours, "long", answer, informative)
        assert found.verdict == f"{verdict}, not promised"
        assert not found.failed


def test_a_tie_is_no_fault(ours):
    """Another token that is as likely as ours: the tolerance says what counts as that."""
    found, every, text, wanted = ours
    tokens = wanted["long"].tokens
    prompt = text[: every["long"].prompt_tokens]
    other = replace(wanted["long"], tokens=[*tokens[:3], tokens[3] ^ 1, *tokens[4:]])
    gap = wanted["long"].token_logprobs[3] - found.token_logprob([*prompt, *tokens[:3]], tokens[3] ^ 1)
    asked = {"prompt": prompt, "new_tokens": cases.NEW_TOKENS}
    given = {"runtime": "r", "rows": {"long": vars(other)}, "refused": {}}
    for tolerance, verdict in ((gap * 1.01, "exact"), (gap * 0.99, "WRONG")):
        row = cases.Row("long", "long")
        assert compare.line_of("r", SETUP, row, given, asked, wanted["long"], found, tolerance).verdict == verdict


def test_the_reference_is_the_model_under_two_tables(ours, export):
    """Beside transformers' own short and long folders, computed whole."""
    _, every, text, wanted = ours
    for name, folder in (("short", "short"), ("long", "long")):
        model = LlamaForCausalLM.from_pretrained(export / folder)
        whole = torch.tensor([[*text[: every[name].prompt_tokens], *wanted[name].tokens]])
        with torch.no_grad():
            logprobs = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]
        ours_whole = torch.tensor([*wanted[name].logprobs, *wanted[name].token_logprobs])
        torch.testing.assert_close(logprobs[-len(ours_whole) :], ours_whole, atol=2e-4, rtol=0)


RIGHT = {"family": "llama", "load": 0.0, "train": 1e-7, "long": 1e-6, "short": 0.0, "two": 0.0, "names": "yes"}
RIGHT |= {"generate": "yes"}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, False), ({"long": "refused", "short": "refused"}, False), ({"train": 1e-4}, True), ({"load": 1e-9}, True),
        ({"two": float("nan")}, True), ({"names": "no"}, True), ({"generate": "no (…)"}, True),
        ({"family": "doge", "refused": "a sentence"}, False), ({"refused": "a sentence"}, True),
        ({"family": "doge", "failed": "TypeError: …"}, True),
    ],
)  # fmt: skip
def test_what_counts_as_a_miss_of_a_family(changes, missed):
    assert tools_families._misses({**RIGHT, **changes}) == missed


def test_a_setup_without_its_folder_is_left_out(export, tmp_path):
    (tmp_path / "two").symlink_to(export / "two")
    asked = serving_check._parser().parse_args([str(tmp_path)])
    chosen = serving_check._chosen(runtimes.transformers(tmp_path), cases.cases_of(32, 128), asked)
    assert {setup.folder.name for setup in chosen} == {"two"}
