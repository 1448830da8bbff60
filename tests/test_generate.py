"""generate from end to end, on a random tiny model."""

import io as text_io
import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lr2train import run
from lr2train.cli import door as cli
from lr2train.cli.composition import compose
from lr2train.config import UserError
from lr2train.export import export
from lr2train.generate import generate
from lr2train.model import decode, load


@pytest.fixture(scope="module")
def served(world):
    folder = tiny.make_run(world, "served")
    export(compose("export", tiny.arguments(world, "run=served")))
    return folder


def text_of(folder: Path, n_tokens: int) -> str:
    """Text that this model's tokenizer makes exactly so many tokens of, BOS included."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    words = tokenizer.decode(tokenizer((folder.parent / "texts" / "0.txt").read_text())["input_ids"][1 : n_tokens + 40])
    return next(t for end in range(len(words)) if len(tokenizer(t := words[:end])["input_ids"]) == n_tokens)


@torch.no_grad()
def expected_text(folder: Path, prompt: str, n: int) -> str:
    """Greedy and without a cache: the run's weights under plain RoPE up to L0, in the exported longrope beyond."""
    tokenizer, long = (
        AutoTokenizer.from_pretrained(folder / "model"),
        AutoModelForCausalLM.from_pretrained(folder / "export" / "two").eval(),
    )
    hf_config = load.config_of(load.ModelConfig(architecture={"model_type": "llama", **tiny.ARCHITECTURE}))
    short = AutoModelForCausalLM.from_config(hf_config).eval()
    short.load_state_dict(long.state_dict())
    tokens = tokenizer(prompt)["input_ids"]
    start = len(tokens)
    while len(tokens) < start + n and tokens[-1] != tokenizer.eos_token_id:
        logits = (short if len(tokens) <= tiny.L0 else long)(torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokenizer.decode(tokens[start:], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("n_tokens", "window", "switched"), [(20, "short", False), (60, "long", True), (90, "long", False)]
)
def test_generated_text_equals_the_reference_across_the_switch(
    served, world, tmp_path, capsys, n_tokens, window, switched
):
    prompt = text_of(served, n_tokens)
    (tmp_path / "prompt.txt").write_text(prompt)
    result = generate(tiny.generate_config(world, "run=served", f"generate.prompt_file={tmp_path}/prompt.txt"))
    assert (result["prompt_tokens"], result["window"], result["switched"]) == (n_tokens, window, switched)
    assert result["text"] == expected_text(served, prompt, 12)
    assert capsys.readouterr().out.rstrip("\n�") == result["text"].rstrip("\n�"), (
        "the streamed text is the returned text"
    )
    assert result["prompt"] == prompt
    assert json.loads((served / "generate.json").read_text()) == result


def without_times(result: dict) -> dict:
    return {key: value for key, value in result.items() if key not in ("seconds", "provenance")}


def test_generate_from_an_export_equals_generate_from_its_run(served, world):
    prompt = text_of(served, 60)
    (world / "prompt.txt").write_text(prompt)
    file = f"generate.prompt_file={world}/prompt.txt"
    of_run = generate(tiny.generate_config(world, "run=served", file))
    of_folder = generate(tiny.generate_config(world, f"model.path={served}/export/two", "name=elsewhere", file))
    assert without_times(of_folder) == without_times(of_run)
    assert json.loads((world / "elsewhere" / "generate.json").read_text()) == of_folder
    whole_export = generate(tiny.generate_config(world, f"model.path={served}/export", file))
    assert without_times(whole_export) == without_times(of_run)
    # an export that lost our file still has its config
    (served / "export" / "two" / "factors.json").rename(world / "aside.json")
    try:
        assert without_times(
            generate(tiny.generate_config(world, f"model.path={served}/export/two", file))
        ) == without_times(of_run)
    finally:
        (world / "aside.json").rename(served / "export" / "two" / "factors.json")


def test_an_export_of_an_earlier_checkpoint_is_not_taken_for_the_model(served, world, tmp_path):
    prompt = text_of(served, 60)
    run = tmp_path / "runs" / "served"
    shutil.copytree(served, run)
    weights = run / "export" / "two" / "model.safetensors"
    values = load_file(weights)
    weights.unlink()  # a hard link
    save_file({name: torch.zeros_like(value) for name, value in values.items()}, weights, {"format": "pt"})
    (tmp_path / "prompt.txt").write_text(prompt)
    arguments = [f"runs_folder={tmp_path / 'runs'}", "run=served", f"generate.prompt_file={tmp_path}/prompt.txt"]
    assert without_times(generate(tiny.generate_config(world, *arguments)))["text"] == expected_text(served, prompt, 12)
    shutil.rmtree(run / "model")  # as before the end of a run
    assert generate(tiny.generate_config(world, *arguments))["window"] == "long"


def test_a_base_run_generates_with_the_factors_of_its_folder(world):
    """Its config has plain RoPE; the factors stand in its run folder."""
    from lr2train.rope import METHODS

    folder = tiny.make_run(world, "plain")
    tiny.make_model(folder / "model")
    AutoTokenizer.from_pretrained(world / "corpus" / "tokenizer").save_pretrained(folder / "model")
    METHODS["none"](tiny.SPECTRUM, tiny.L0).save(folder / "factors.json")
    assert generate(tiny.generate_config(world, "run=plain", "generate.prompt=ab"))["window"] == "short"


def test_a_prompt_that_begins_with_bos_has_one(served, world, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(served / "model")
    plain = generate(tiny.generate_config(world, "run=served", "generate.prompt=ab"))
    (tmp_path / "prompt.txt").write_text(f"{tokenizer.bos_token}ab")
    with_bos = generate(tiny.generate_config(world, "run=served", f"generate.prompt_file={tmp_path}/prompt.txt"))
    assert len(tokenizer(f"{tokenizer.bos_token}ab")["input_ids"]) == plain["prompt_tokens"] + 1
    assert (with_bos["prompt_tokens"], with_bos["text"]) == (plain["prompt_tokens"], plain["text"])


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_each_of_several_end_tokens_ends_a_text(served, world, tmp_path, file):
    folder = tmp_path / "m"
    shutil.copytree(served / "export" / "two", folder)
    settings = [f"model.path={folder}", "generate.prompt=ab", "name=ends"]
    words = generate(tiny.generate_config(world, *settings))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spoken = tokenizer(words["text"], add_special_tokens=False)["input_ids"]
    values = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**values, "eos_token_id": [tiny.VOCAB - 1, spoken[2]]}))
    assert (
        generate(tiny.generate_config(world, *settings))["new_tokens"] == spoken.index(spoken[2]) < words["new_tokens"]
    )


def test_a_named_window_is_not_reported_as_a_switch(served, world):
    result = generate(tiny.generate_config(world, "run=served", "generate.prompt=ab", "generate.window=long"))
    assert (result["window"], result["switched"]) == ("long", False)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["run=served", "generate.prompt=ab", "generate.max_new_tokens=300"], "beyond the model's window of 256"),
        (["run=served", "generate.prompt_file=/nowhere.txt"], "generate.prompt_file=/nowhere.txt cannot be read"),
        (
            ["run=served", "generate.prompt_file=/nowhere.txt"],
            "cannot be read (No such file or directory); set it to a",
        ),
        (["run=served", "generate.prompt_file=/dev/null"], "generate.prompt_file=/dev/null is empty; write a prompt"),
        (["run=nothing", "generate.prompt=ab"], "run=nothing has no model"),
        (["generate.prompt=ab"], "neither run nor model.path is set"),
        (["run=served", "generate.prompt=ab", "generate.temperature=-1"], "generate.temperature=-1.0 is below 0"),
        (
            ["run=served", "generate.prompt=ab", "generate.top_p=0"],
            "generate.top_p=0.0 is not between 0 and 1, 0 left out",
        ),
        (["run=served", "generate.prompt=ab", "generate.max_new_tokens=0"], "generate.max_new_tokens=0 is below 1"),
        (["run=served", "generate.prompt=ab", "generate.stop=['']"], "generate.stop.0 is empty"),
        (["run=served", "generate.prompt=ab", "generate.prompts=[c]"], "generate.prompt and generate.prompts both"),
        (["run=served", "generate.prompt=ab", "generate.chat=true"], "has no chat template; set generate.chat=false"),
        (["run=served", "generate.prompts_file=/nowhere.jsonl"], "generate.prompts_file=/nowhere.jsonl cannot be read"),
    ],
)
def test_bad_input_of_generate_is_one_sentence_and_exit_code_2(served, world, monkeypatch, capsys, more, words):
    monkeypatch.setattr("sys.argv", ["generate", *tiny.arguments(world, *more)])
    with pytest.raises(SystemExit) as end:
        cli.main("generate", generate)
    out = capsys.readouterr()
    assert end.value.code == 2
    assert out.out == ""
    assert words in out.err
    assert sum(line.startswith("generate: ") for line in out.err.splitlines()) == 1


def test_a_tokenizer_with_more_tokens_than_the_model_knows_is_refused(world, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(world / "base", folder)
    tokenizer = AutoTokenizer.from_pretrained(world / "corpus" / "tokenizer")
    tokenizer.add_tokens(["novel"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=rf"token id {tiny.VOCAB}, and the model knows {tiny.VOCAB} ids"):
        generate(tiny.generate_config(world, f"model.path={folder}", "rope=pi", "generate.prompt=a novel"))


# ---- several prompts ----


def lengths_of(served) -> list[str]:
    """Prompts on both sides of L0 after 12 new tokens, one that switches, and a duplicate."""
    return [text_of(served, n_tokens) for n_tokens in (20, 60, 90, 20, tiny.L0)]


def prompts_file(folder: Path, texts: list[str]) -> str:
    rows = [{"id": f"q{number}", "prompt": text} for number, text in enumerate(texts)]
    (folder / "prompts.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    return f"generate.prompts_file={folder}/prompts.jsonl"


@pytest.mark.parametrize("batch_tokens", [1, 160, 16384])
def test_each_of_several_prompts_has_the_text_that_it_has_alone(served, world, tmp_path, capsys, batch_tokens):
    texts = lengths_of(served)
    sampled = ["run=served", "generate.temperature=1.2", "generate.top_p=0.9"]
    found = generate(
        tiny.generate_config(
            world, *sampled, "seed=5", prompts_file(tmp_path, texts), f"generate.batch_tokens={batch_tokens}"
        )
    )["texts"]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    written = [json.loads(line) for line in (served / "generate.jsonl").read_text().splitlines()]
    assert found == printed == written
    assert [row["id"] for row in found] == [f"q{number}" for number in range(5)]
    assert [row["switched"] for row in found] == [False, True, False, False, True]
    for number, (row, text) in enumerate(zip(found, texts, strict=True)):
        (tmp_path / "one.txt").write_text(text)
        alone = generate(
            tiny.generate_config(world, *sampled, f"seed={5 + number}", f"generate.prompt_file={tmp_path}/one.txt")
        )
        assert {key: row[key] for key in alone if key in row} == {key: alone[key] for key in alone if key in row}
    assert found[0]["text"] != found[3]["text"], "the same prompt twice is sampled twice"


def test_several_prompts_equal_the_exported_class_in_transformers(served, world, tmp_path, monkeypatch):
    """One padded batch of texts in both windows, some of which cross L0."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    two = AutoModelForCausalLM.from_pretrained(served / "export" / "two", trust_remote_code=True).eval()
    assert type(two).__name__.startswith("LongRope2")
    tokenizer = AutoTokenizer.from_pretrained(served / "model", padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    texts = lengths_of(served)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        said = two.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=12, do_sample=False
        )
    wanted = tokenizer.batch_decode(said[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    found = generate(tiny.generate_config(world, "run=served", prompts_file(tmp_path, texts)))["texts"]
    assert [row["text"] for row in found] == wanted


def test_prompts_of_the_command_line(served, world):
    found = generate(tiny.generate_config(world, "run=served", "generate.prompts=[ab,'c, d']"))["texts"]
    assert [row["prompt"] for row in found] == ["ab", "c, d"]
    assert found[0]["text"] == generate(tiny.generate_config(world, "run=served", "generate.prompt=ab"))["text"]


def test_a_stop_string_ends_a_text_before_it_and_is_not_shown(served, world, capsys):
    """Across tokens: the stop string is the end of one token and the beginning of the next."""
    settings = ["run=served", "generate.prompt=ab"]
    whole = generate(tiny.generate_config(world, *settings))
    tokenizer = AutoTokenizer.from_pretrained(served / "model")
    spoken = tokenizer(whole["text"], add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode([token]) for token in spoken]
    assert "".join(pieces) == whole["text"]
    number = next(n for n in range(1, 8) if len(pieces[n]) > 1 and pieces[n + 1])
    stop = pieces[number][-1] + pieces[number + 1][0]
    assert whole["text"].find(stop) == len("".join(pieces[: number + 1])) - 1, "its first place"
    capsys.readouterr()
    ended = generate(tiny.generate_config(world, *settings, f"generate.stop=['{stop}',never]"))
    assert ended["text"] == whole["text"][: whole["text"].index(stop)]
    assert capsys.readouterr().out == f"{ended['text']}\n"
    assert (ended["finish_reason"], ended["new_tokens"]) == ("stop", number + 2)
    assert whole["finish_reason"] == "length"


def test_a_special_token_may_be_a_stop_string(served, world, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(served / "export" / "two", folder)
    settings = [f"model.path={folder}", "generate.prompt=ab", "name=special"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spoken = tokenizer(generate(tiny.generate_config(world, *settings))["text"], add_special_tokens=False)["input_ids"]
    name = tokenizer.convert_ids_to_tokens(spoken[3])
    tokenizer.add_special_tokens({"additional_special_tokens": [name]})
    tokenizer.save_pretrained(folder)
    ended = generate(tiny.generate_config(world, *settings, f"generate.stop=['{name}']"))
    assert (ended["finish_reason"], ended["new_tokens"]) == ("stop", 3)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<me>{% endif %}"
)


def test_a_chat_template_is_put_around_the_prompt(served, world, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(served / "export" / "two", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    settings = [f"model.path={folder}", "name=chat"]
    chat = generate(tiny.generate_config(world, *settings, "generate.prompt=ab", "generate.chat=true"))
    plain = generate(tiny.generate_config(world, *settings, "generate.prompt='<user>ab<me>'"))
    assert (chat["text"], chat["prompt_tokens"]) == (plain["text"], plain["prompt_tokens"]), "and one BOS alone"
    tokenizer.chat_template = "{{ raise_exception('no user here') }}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="no user here"):
        generate(tiny.generate_config(world, *settings, "generate.prompt=ab", "generate.chat=true"))


@pytest.fixture
def interrupted_after(monkeypatch):
    """Ctrl-C when a row has so many new tokens."""

    def install(n_tokens: int) -> None:
        take = decode.Row.take

        def taking(row, *token):
            take(row, *token)
            if len(row.tokens) == n_tokens:
                raise KeyboardInterrupt

        monkeypatch.setattr(decode.Row, "take", taking)

    return install


def test_an_interrupted_text_is_kept(served, world, capsys, interrupted_after):
    whole = generate(tiny.generate_config(world, "run=served", "generate.prompt=ab"))["text"]
    capsys.readouterr()
    interrupted_after(7)
    with pytest.raises(run.Interrupted):
        generate(tiny.generate_config(world, "run=served", "generate.prompt=ab"))
    kept = json.loads((served / "generate.json").read_text())
    assert (kept["finish_reason"], kept["new_tokens"]) == ("interrupted", 7)
    assert whole.startswith(kept["text"]) and kept["text"]
    out, said = capsys.readouterr()
    assert kept["text"].startswith(out.rstrip("\n")), "the last token is kept, whether it was shown or not"
    assert "interrupted, " in said


def test_interrupted_texts_are_kept_beside_those_that_are_done(served, world, tmp_path, capsys, interrupted_after):
    texts = lengths_of(served)
    whole = generate(tiny.generate_config(world, "run=served", prompts_file(tmp_path, texts)))["texts"]
    interrupted_after(12)  # the last token of the first row
    capsys.readouterr()
    settings = ["run=served", prompts_file(tmp_path, texts), "generate.batch_tokens=200"]
    with pytest.raises(run.Interrupted):
        generate(tiny.generate_config(world, *settings))
    written = [json.loads(line) for line in (served / "generate.jsonl").read_text().splitlines()]
    assert [row["finish_reason"] for row in written] == ["length", "interrupted"]
    assert whole[0] == written[0]
    assert whole[1]["text"].startswith(written[1]["text"]) and written[1]["new_tokens"] == 11
    assert "interrupted; 2 of 5 texts are in" in capsys.readouterr().err


def test_a_prompt_whose_logits_are_not_finite_spoils_no_other(served, world, monkeypatch, capsys):
    (letter,) = AutoTokenizer.from_pretrained(served / "model")("%", add_special_tokens=False)["input_ids"]
    load_whole = load.load_whole

    def damaged(*how):
        model = load_whole(*how)
        model.get_input_embeddings().weight[letter] = float("nan")
        return model

    monkeypatch.setattr(load, "load_whole", damaged)
    with pytest.raises(UserError, match=r"1 of 2 texts end early.*generate\.prompts\.1 first.*2 of 2 texts are in"):
        generate(tiny.generate_config(world, "run=served", "generate.prompts=[ab,'%']"))
    good, bad = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (good["finish_reason"], good["new_tokens"]) == ("length", 12)
    assert (bad["finish_reason"], bad["text"]) == ("not finite", "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "prompts.jsonl has no line"),
        ('{"prompt": "a"}\n{"prompt": ', r"line 2 of generate\.prompts_file=.* is not JSON"),
        ('{"text": "a"}', r'line 1 of .* has no text under "prompt"'),
        ('\n["a"]', r'line 2 of .* has no text under "prompt"'),
        ('{"prompt": 3}', r'has no text under "prompt"'),
        ('{"prompt": "a", "seed": 3}', r'has the key "seed", which a result has too'),
        (json.dumps({"prompt": "ab " * 300}), r"tokens of line 1 of .* beyond the model's window of 256"),
    ],
)
def test_a_prompts_file_of_another_form_is_refused(served, world, tmp_path, content, words, monkeypatch):
    monkeypatch.setattr(load, "load_whole", lambda *_: pytest.fail("must not load the model"))
    (tmp_path / "prompts.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        generate(tiny.generate_config(world, "run=served", f"generate.prompts_file={tmp_path}/prompts.jsonl"))


@pytest.mark.parametrize(
    ("more", "remedy"),
    [
        (["generate.prompts=[ab,cd]"], r"set generate\.batch_tokens below 16384$"),
        (["generate.prompts=[ab]"], r"set model\.dtype=bfloat16$"),
        (["generate.prompt=ab", "model.dtype=bfloat16"], "shorten the prompt$"),
    ],
)
def test_a_batch_that_does_not_fit_into_the_memory_is_refused(served, world, monkeypatch, more, remedy):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. See the manual.")

    monkeypatch.setattr(decode, "KeysAndValues", full)
    with pytest.raises(UserError, match=rf"memory \(CUDA out of memory\); {remedy}"):
        generate(tiny.generate_config(world, "run=served", *more))


def test_a_piped_prompt(served, world, monkeypatch):
    monkeypatch.setattr(sys, "stdin", text_io.StringIO("ab"))
    assert generate(tiny.generate_config(world, "run=served"))["prompt"] == "ab"
    monkeypatch.setattr(sys, "stdin", text_io.StringIO(""))
    with pytest.raises(UserError, match="nothing was piped in"):
        generate(tiny.generate_config(world, "run=served"))


def test_a_published_model_without_factors_generates_in_its_own_window(world, tmp_path):
    base = shutil.copytree(world / "corpus" / "tokenizer", tmp_path / "base")
    shutil.copytree(world / "base", base, dirs_exist_ok=True)
    arguments = [f"name={tmp_path.name}", f"model.path={base}", "rope=longrope2", "generate.prompt='ab ab'"]
    result = generate(compose("generate", [f"runs_folder={world}", *arguments, "generate.max_new_tokens=12"]))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([tokenizer("ab ab")["input_ids"]])
    with torch.inference_mode():
        mask = torch.ones_like(ids)  # or transformers would mask the first token, which is its pad token too
        wanted = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert result["text"] == tokenizer.decode(wanted, skip_special_tokens=True) and not result["switched"]
    with pytest.raises(UserError, match=f"beyond the model's window of {tiny.L0};"):
        generate(compose("generate", [f"runs_folder={world}", *arguments, "generate.max_new_tokens=999"]))
