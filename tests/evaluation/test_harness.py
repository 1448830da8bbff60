"""lm-eval on our model: numbers and texts against lm-eval's own Hugging Face object, on both sides of L0 and on two
ranks; failures, resuming, and files that must not be trusted.
"""

import json
import math
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import tiny
import torch
from ranks import run_ranks
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lr2train.config import UserError
from lr2train.evaluation import subject as subjects
from lr2train.evaluation.answers import Answers
from lr2train.evaluation.tokens import PromptTokenizer
from lr2train.evaluation.window_model import WindowModel
from lr2train.model import load

pytest.importorskip("lm_eval", reason="pip install -r requirements-eval.txt")
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from lr2train.evaluation import harness
from lr2train.evaluation.harness import HarnessModel
from lr2train.evaluation.harness_tasks import lm_eval_as_data, manager_of, parsed
from tools.bench import harness as bench

WORDS = [
    "river", "stone", "cloud", "winter", "summer", "bridge", "garden", "window", "letter", "morning", "seven", "twelve",
    "yellow", "silver",
]  # fmt: skip
CHAT = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}[assistant]"


def run_tasks(names, answers, tokenizer, longest, task_path=None, allow_download=False, log=print, **how):
    tasks = harness.load_tasks(names, task_path, allow_download, log)
    return harness.run_tasks(tasks, answers, tokenizer, longest, log=log, **how)


def text_of(n_words: int, seed: int = 0) -> str:
    return " ".join(WORDS[(seed * 5 + n * n + n // 3) % len(WORDS)] for n in range(n_words))


def make_tokenizer(bos: bool) -> PromptTokenizer:
    """Byte-level BPE with <s> and </s>; with ``bos`` it puts <s> before every text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([text_of(400, seed) for seed in range(3)], trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    hf = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=CHAT)
    return PromptTokenizer(hf)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The same weights under two configs: the original window alone, and both windows."""
    folder = tmp_path_factory.mktemp("world")
    tiny.make_model(folder / "base")
    tiny.make_model(folder / "ours", tiny.factors_with(1.2))
    return folder


def answers_of(world, tokenizer, file, watch=lambda requests: None, name="ours") -> Answers:
    subject = subjects.as_published(name, world / name, {})
    model = load.load_whole(world / name)
    made = WindowModel(subject, model, subjects.install(subject, model), tokenizer, {1}, batch_tokens=600)
    asked = made.answer

    def answer(requests):
        watch(requests)
        return asked(requests)

    made.answer = answer
    return Answers(lambda: made, subject.identity("float32"), file, subject.target_window_tokens)


def hflm(world, name: str, tokenizer, max_length: int):
    """lm-eval's own object over a plain model of transformers."""
    model = AutoModelForCausalLM.from_pretrained(world / name, dtype=torch.float32).eval()
    return bench.hflm_class()(pretrained=model, tokenizer=tokenizer.hf, batch_size=1, max_length=max_length)


def instances(kind: str, arguments) -> list[Instance]:
    return [Instance(kind, {}, one, 0, ("probe", number, 1)) for number, one in enumerate(arguments)]


# Numbers and texts against HFLM


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "plain"])
def test_loglikelihoods_are_those_of_hflm_on_both_sides_of_the_original_window(world, tmp_path, bos):
    tokenizer = make_tokenizer(bos)
    pairs = [(text_of(size, size), f" {text_of(2, size + 1)}") for size in (1, 5, 20, 40, 110)]
    pairs += [(text_of(30) + "  ", "river stone"), ("", "river"), ("", "<s>river"), ("<s>" + text_of(4), " stone")]
    pairs += [(text_of(30, 2), f" {letter}") for letter in "ABCD"]  # one row: they differ in the last token alone
    pairs += [(text_of(600), " winter summer bridge")]  # beyond the window: the beginning is lost
    lm = HarnessModel(answers_of(world, tokenizer, tmp_path / "answers"), tokenizer, tiny.L)
    ours = lm.loglikelihood(instances("loglikelihood", pairs))
    short, long = (
        hflm(world, name, tokenizer, tiny.L - 1).loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
        for name in ("base", "ours")
    )
    lengths = [lm.asked["probe", number].tokens for number in range(len(pairs))]
    assert min(lengths) < tiny.L0 < max(lengths) == tiny.L, "both windows are in the test"
    assert tiny.L0 + 1 not in lengths, "transformers takes its table by the tokens before the last one"
    expected = [s if length <= tiny.L0 else g for length, s, g in zip(lengths, short, long, strict=True)]
    assert [found[0] for found in ours] == pytest.approx([one[0] for one in expected], abs=1e-3)
    assert [found[1] for found in ours] == [one[1] for one in expected]
    assert [lm.asked["probe", number].truncated for number in range(len(pairs))] == [False] * (len(pairs) - 1) + [True]


def test_greedy_decoding_of_the_continuation_is_recognised(world, tmp_path):
    tokenizer = make_tokenizer(True)
    lm = HarnessModel(answers_of(world, tokenizer, tmp_path / "answers"), tokenizer, tiny.L)
    said = lm.generate_until(instances("generate_until", [(text_of(30), {"until": [], "max_gen_toks": 1})]))
    pairs = [(text_of(30), said[0]), (text_of(30), said[0] + "x")]
    assert tokenizer.hf.encode(text_of(30) + said[0])[:-1] == tokenizer.hf.encode(text_of(30)), "one token more"
    assert [found[1] for found in lm.loglikelihood(instances("loglikelihood", pairs))] == [True, False]


def test_rolling_loglikelihoods_are_those_of_hflm(world, tmp_path):
    tokenizer = make_tokenizer(False)
    texts = [(text_of(size, size),) for size in (10, 40, 150, 700)]
    lm = HarnessModel(answers_of(world, tokenizer, tmp_path / "answers"), tokenizer, tiny.L)
    ours = lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    short, long = (
        hflm(world, name, tokenizer, tiny.L - 1).loglikelihood_rolling(instances("loglikelihood_rolling", texts))
        for name in ("base", "ours")
    )
    lengths = [lm.asked["probe", number].tokens for number in range(len(texts))]
    assert lengths[0] <= tiny.L0 and lengths[-1] == tiny.L and len(tokenizer.encode(texts[-1][0])) > 2 * tiny.L
    expected = [s if length <= tiny.L0 else g for length, s, g in zip(lengths, short, long, strict=True)]
    assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "plain"])
def test_texts_are_those_of_hflm_with_every_way_to_end(world, tmp_path, bos):
    tokenizer = make_tokenizer(bos)
    lm = HarnessModel(answers_of(world, tokenizer, tmp_path / "answers"), tokenizer, tiny.L)
    how = {"until": [], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0}
    prompts = [text_of(4), text_of(70), text_of(100, 3), text_of(500, 4)]  # short, long, long, truncated
    free = lm.generate_until(instances("generate_until", [(prompt, how) for prompt in prompts]))
    asked = [(prompt, how) for prompt in prompts]
    for prompt, said in zip(prompts, free, strict=True):
        stop = max(re.findall(r"[ -~]+", said), key=len)  # half a letter of UTF-8 is no stop string
        asked += [
            (prompt, how | {"until": [stop]}),
            (prompt, how | {"until": stop[:1], "max_new_tokens": 7, "max_gen_toks": None}),
            (prompt, how | {"until": [stop[1:2], stop]}),  # the first cut hides the second string
            (prompt, {"until": ["</s>", "no such text"], "max_tokens": 12}),
        ]
    ours = lm.generate_until(instances("generate_until", asked))
    lengths = [lm.asked["probe", number].tokens for number in range(len(asked))]
    short, long = (
        hflm(world, name, tokenizer, tiny.L).generate_until(instances("generate_until", asked), disable_tqdm=True)
        for name in ("base", "ours")
    )
    assert ours == [s if length <= tiny.L0 else g for length, s, g in zip(lengths, short, long, strict=True)]
    assert min(lengths) <= tiny.L0 < max(lengths) == tiny.L and len(set(ours)) > len(prompts)


def test_eos_ends_a_text(world, tmp_path):
    """The model is made to say </s>: its weights for </s> become those of the token that it says third."""
    tokenizer = make_tokenizer(False)
    answers = answers_of(world, tokenizer, tmp_path / "answers")
    lm = HarnessModel(answers, tokenizer, tiny.L)
    request = (text_of(70), {"until": [], "max_gen_toks": 8})
    free = lm.generate_until(instances("generate_until", [request]))
    third = tokenizer.hf.encode(free[0], add_special_tokens=False)[2]
    weights = answers.model._model.get_output_embeddings().weight
    plain = hflm(world, "ours", tokenizer, tiny.L)
    with torch.no_grad():
        for one in (weights, plain.model.get_output_embeddings().weight):
            one[1] = one[third] * 1.01
    fresh = Answers(lambda: answers.model, {"other": "weights"}, tmp_path / "others", tiny.L)
    ended = HarnessModel(fresh, tokenizer, tiny.L).generate_until(instances("generate_until", [request]))
    assert ended == plain.generate_until(instances("generate_until", [request]), disable_tqdm=True)
    assert len(ended[0]) < len(free[0]) and free[0].startswith(ended[0])


def test_the_head_sees_the_scored_positions_alone(world, tmp_path):
    tokenizer = make_tokenizer(True)
    answers = answers_of(world, tokenizer, tmp_path / "answers")
    rows = []
    answers.model._model.get_output_embeddings().register_forward_pre_hook(lambda _, given: rows.append(given[0].shape))
    lm = HarnessModel(answers, tokenizer, tiny.L)
    pairs = [(text_of(90), f" {text_of(2, seed)}") for seed in range(3)]
    lm.loglikelihood(instances("loglikelihood", pairs))
    scored = sum(len(lm._encode_pair(*pair)[1]) for pair in pairs)
    assert sum(shape[:-1].numel() for shape in rows) == scored < 20


def test_what_has_no_likelihood_fails_alone(world, tmp_path):
    """HFLM ends with an assertion there."""
    tokenizer = make_tokenizer(False)
    lm = HarnessModel(answers_of(world, tokenizer, tmp_path / "answers"), tokenizer, tiny.L)
    found = lm.loglikelihood(instances("loglikelihood", [("river", ""), ("river", text_of(500)), ("river", " stone")]))
    assert [math.isnan(value) for value, _ in found] == [True, True, False]
    assert "no token" in lm.asked["probe", 0].error and lm.asked["probe", 2].error is None


def test_sampling_is_told_once_and_the_text_is_greedy(world, tmp_path):
    tokenizer, lines = make_tokenizer(True), []
    lm = HarnessModel(answers_of(world, tokenizer, tmp_path / "answers"), tokenizer, tiny.L, log=lines.append)
    greedy, sampled = (
        {"until": [], "max_gen_toks": 5},
        {"until": [], "max_gen_toks": 5, "temperature": 0.8, "top_p": 0.9},
    )
    asked = [(text_of(9), how) for how in (greedy, sampled, sampled | {"num_beams": 4})]
    first, *others = lm.generate_until(instances("generate_until", asked))
    assert others == [first, first]
    assert len(lines) == 1 and "temperature=0.8" in lines[0] and "probe" in lines[0]


# Tasks from a folder


CHOICE = {
    "dataset_path": "json", "test_split": "test", "fewshot_split": "dev", "num_fewshot": 2,
    "fewshot_config": {"sampler": "first_n"},
    "output_type": "multiple_choice", "doc_to_text": "{{question.strip()}}\nAnswer:", "doc_to_target": "answer",
    "doc_to_choice": "choices", "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}  # fmt: skip
TEXT = CHOICE | {
    "output_type": "generate_until", "doc_to_target": "{{choices[answer]}}", "doc_to_choice": None,
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


def write_tasks(folder, **tasks) -> None:
    """A folder of task files over local documents; JSON is YAML."""
    folder.mkdir(exist_ok=True)
    for split, size in (("test", 12), ("dev", 3)):
        documents = [
            {
                "question": text_of(3 + 5 * (number % 4), number),
                "choices": [" " + text_of(1 + one % 3, number + one) for one in range(4)],
                "answer": number % 4,
            }
            for number in range(size)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    files = {split: str(folder / f"{split}.jsonl") for split in ("test", "dev")}
    for name, config in tasks.items():
        data = {"dataset_kwargs": {"data_files": files}} if "dataset_path" in config else {}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | data | config))


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    both = {"task": ["choice", "choice_b"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    write_tasks(folder, choice=CHOICE, choice_b=CHOICE | {"num_fewshot": 0}, text=TEXT)
    (folder / "both.yaml").write_text(json.dumps({"group": "both"} | both))
    return folder


def of(result) -> dict:
    return {key: (metric.value, metric.stderr) for key, metric in result.metrics.items()}


def expected_of(found, task: str) -> dict:
    values = found["results"][task]
    return {
        key.removesuffix(",none"): (value, values[key.replace(",", "_stderr,")])
        for key, value in values.items()
        if "," in key and "_stderr" not in key
    }


def test_the_figures_of_tasks_are_those_of_lm_eval(world, tasks, tmp_path):
    """On a model with one window, so that HFLM needs one model."""
    tokenizer = make_tokenizer(True)
    answers = answers_of(world, tokenizer, tmp_path / "answers", name="base")
    names = ["choice@1", "text@1", "both", "choice_b@5"]
    ours = run_tasks(names, answers, tokenizer, tiny.L0, task_path=tasks, limit=8, log=print)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    lm = hflm(world, "base", tokenizer, tiny.L0)
    single = simple_evaluate(lm, tasks=["choice", "text"], num_fewshot=1, limit=8, task_manager=manager)
    group = simple_evaluate(lm, tasks=["both"], limit=8, task_manager=manager)
    assert of(ours[0]) == expected_of(single, "choice") and of(ours[1]) == expected_of(single, "text")
    assert {key: value for key, value in of(ours[2]).items() if "mean" not in key} == expected_of(group, "both")
    assert [of(part) for part in ours[2].parts] == [expected_of(group, one) for one in ("choice", "choice_b")]
    assert of(ours[3]) == expected_of(group, "choice_b"), "0 examples in its own file stay 0"
    assert [one.name for one in ours] == names
    assert [one.n_fewshot for one in ours] == [1, 1, None, 0]
    assert [one.main for one in ours] == ["acc_norm", "exact_match", "acc", "acc_norm"]
    assert ours[0].score == 100 * ours[0].metrics["acc_norm"].value == next(iter(ours[0].measures.values()))
    assert ours[0].seconds > 0 and ours[2].measures.keys() == ours[2].metrics.keys()
    parts = [part.metrics["acc"].value for part in ours[2].parts]
    assert ours[2].metrics["acc_mean_of_tasks"].value == pytest.approx(sum(parts) / 2)
    assert json.dumps([one.records for one in ours])
    record = ours[1].records[3]
    assert (record["task"], record["number"], record["window"], record["error"]) == ("text", 3, "long", None)
    assert set(record) >= {"tokens", "target", "answer", "grades"} and record["target"] == " " + text_of(1, 6)


def test_a_chat_has_the_tokenizers_template(world, tasks, tmp_path):
    tokenizer = make_tokenizer(True)
    answers = answers_of(world, tokenizer, tmp_path / "answers", name="base")
    (ours,) = run_tasks(["choice@1"], answers, tokenizer, tiny.L0, task_path=tasks, limit=6, chat_template=True)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(
        hflm(world, "base", tokenizer, tiny.L0 - 1), tasks=["choice"], num_fewshot=1, limit=6, task_manager=manager,
        apply_chat_template=True,
    )  # fmt: skip
    theirs = {sample["doc_id"]: [one[0][0] for one in sample["resps"]] for sample in found["samples"]["choice"]}
    assert [list(record["answer"]) for record in ours.records] == [
        pytest.approx(theirs[record["number"]], abs=1e-3) for record in ours.records
    ]
    tokenizer.hf.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        run_tasks(["choice"], answers, tokenizer, tiny.L0, task_path=tasks, chat_template=True)


def on_ranks(rank: int, world_size: int, world, tasks, file):
    tokenizer, computed = make_tokenizer(True), []
    answers = answers_of(world, tokenizer, file, computed.extend)
    results = run_tasks(["choice:acc", "text"], answers, tokenizer, tiny.L, task_path=tasks)
    return [(one.name, one.main, of(one), one.records) for one in results], len(computed)


def test_two_ranks_share_the_work_and_find_the_same(world, tasks, tmp_path):
    alone, n_alone = on_ranks(0, 1, world, tasks, tmp_path / "alone")
    (first, n_first), (second, n_second) = run_ranks(on_ranks, 2, world, tasks, tmp_path / "both", tmp_path=tmp_path)
    assert first == second
    assert [one[:2] for one in first] == [one[:2] for one in alone] == [("choice", "acc"), ("text", "exact_match")]
    assert [one[2] for one in first] == [one[2] for one in alone]
    for mine, theirs in zip(first[0][3] + first[1][3], alone[0][3] + alone[1][3], strict=True):
        exact = isinstance(theirs["answer"][0], str)
        assert mine["answer"] == (theirs["answer"] if exact else pytest.approx(theirs["answer"], abs=1e-3))
    assert n_first + n_second == n_alone and min(n_first, n_second) > n_alone // 4


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_and_asks_nothing_twice(world, tasks, tmp_path):
    tokenizer, seen = make_tokenizer(True), []

    def run(watch):
        answers = answers_of(world, tokenizer, tmp_path / "answers", watch)
        return run_tasks(["choice", "text"], answers, tokenizer, tiny.L, task_path=tasks), answers

    def kill_later(requests):
        if len(seen) > 20:
            raise Killed
        seen.extend(requests)

    with pytest.raises(Killed):
        run(kill_later)
    n_before = len(seen)
    resumed, answers = run(seen.extend)
    assert answers.recovered == n_before and answers.computed == len(seen) - n_before > 0
    keys = [(one.tokens.tobytes(), type(one)) for one in seen]
    assert len(keys) == len(set(keys))
    again, answers = run(lambda requests: pytest.fail("everything was known"))
    assert [of(one) for one in again] == [of(one) for one in resumed]


def test_loaded_tasks_serve_one_model_after_the_other(world, tasks, tmp_path):
    """Few-shot examples that are drawn at random are the same for every model."""
    tokenizer = make_tokenizer(True)
    write_tasks(tasks, drawn=CHOICE | {"fewshot_config": {"sampler": "default"}, "num_fewshot": 1})
    loaded = harness.load_tasks(["drawn"], tasks)
    first = answers_of(world, tokenizer, tmp_path / "first")
    again = answers_of(world, tokenizer, tmp_path / "second")
    results = [harness.run_tasks(loaded, one, tokenizer, tiny.L) for one in (first, again)]
    assert results[0][0].records == results[1][0].records
    assert first._known.keys() == again._known.keys() and len(first._known) == 48


def test_a_failed_sample_is_counted_and_graded_by_no_metric(world, tasks, tmp_path):
    tokenizer = make_tokenizer(True)
    whole = run_tasks(
        ["choice", "text"], answers_of(world, tokenizer, tmp_path / "whole"), tokenizer, tiny.L, task_path=tasks
    )
    unlucky = {3, 8}
    lost = [text_of(3 + 5 * (number % 4), number) + "\nAnswer:" for number in unlucky]

    def fail(requests):
        if any(text in tokenizer.decode(one.tokens) for one in requests for text in lost):
            raise RuntimeError("out of memory")

    answers = answers_of(world, tokenizer, tmp_path / "answers", fail)
    for result, full in zip(
        run_tasks(["choice", "text"], answers, tokenizer, tiny.L, task_path=tasks), whole, strict=True
    ):
        assert (result.n_samples, result.n_failed) == (10, 2)
        assert {record["number"] for record in result.records if record["error"]} == unlucky
        kept = [record["grades"] for record in full.records if record["number"] not in unlucky]
        for key, metric in result.metrics.items():
            assert metric.value == pytest.approx(sum(grades[key] for grades in kept) / 10)


def test_a_task_whose_samples_all_failed_has_no_figure(world, tasks, tmp_path):
    def fail(requests):
        raise RuntimeError("out of memory")

    tokenizer = make_tokenizer(True)
    answers = answers_of(world, tokenizer, tmp_path / "answers", fail)
    (result,) = run_tasks(["both"], answers, tokenizer, tiny.L, task_path=tasks, limit=2)
    assert result.metrics == {} and math.isnan(result.score) and result.n_failed == 4


def test_truncated_prompts_are_counted_and_told(world, tasks, tmp_path):
    tokenizer, lines = make_tokenizer(True), []
    answers = answers_of(world, tokenizer, tmp_path / "answers", name="base")
    (result,) = run_tasks(["choice@3"], answers, tokenizer, tiny.L0, task_path=tasks, log=lines.append)
    n = sum(record["truncated"] for record in result.records)
    assert 0 < n == result.n_truncated <= 12 and result.n_failed == 0
    assert any(f"choice@3: {n} samples" in line and "64 tokens" in line for line in lines)


# What is refused


@pytest.fixture
def refused(world, tmp_path):
    """(names, folder) -> the sentence; the model is never made."""
    tokenizer = make_tokenizer(True)
    answers = Answers(lambda: pytest.fail("a model was made"), {}, tmp_path / "answers", tiny.L)

    def sentence(names, folder=None, **how) -> str:
        with pytest.raises(UserError) as caught:
            run_tasks(names, answers, tokenizer, tiny.L, task_path=folder, **how)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return sentence


@pytest.mark.parametrize(
    "config",
    [
        'process_docs: !function utils.process',
        "class: !function utils.Task",
        "class: utils.Task",
        "custom_dataset: utils.load",
        "use_prompt: 'prompts.yaml:first'",
        "unsafe_code: true",
        "metric_list: [{metric: ./my_metric}]",
        "metric_list: [{metric: exact_match, hf_evaluate: true}]",
        "doc_to_text: !!python/object/apply:os.system ['true']",
        "include: other_template",
        "group: evil\ntask: [{task: inline, custom_dataset: utils.load}]",
    ],
)  # fmt: skip
def test_a_task_file_that_names_code_is_refused_and_nothing_runs(refused, tasks, config):
    (tasks / "utils.py").write_text("raise SystemExit('this code ran')")
    (tasks / "my_metric.py").write_text("raise SystemExit('this code ran')")
    (tasks / "other_template").write_text("process_docs: !function utils.process")
    text = config if config.startswith("group") else f"task: evil\n{config}"
    (tasks / "evil.yaml").write_text(text)
    said = refused(["choice"], tasks)
    assert "eval.task_path" in said and "names code" in said
    assert ("other_template" if "include" in config else "evil.yaml") in said


def test_a_template_cannot_leave_its_sandbox(refused, tasks, tmp_path):
    escape = "{{ cycler.__init__.__globals__.os.mkdir('" + str(tmp_path / "escaped") + "') }}"
    write_tasks(tasks, evil=CHOICE | {"doc_to_text": escape})
    assert "SecurityError" in refused(["evil"], tasks)
    assert not (tmp_path / "escaped").exists()


def test_wrong_names_and_folders_have_one_sentence(refused, tasks, tmp_path):
    assert "hellaswag" in refused(["hellaswagg"])
    with pytest.raises(
        UserError, match="neddles, which neither lr2train nor lm-eval knows; the closest names are needles"
    ):
        harness.load_tasks(["neddles"], others=["needles"])
    assert "code that the model wrote" in refused(["humaneval"], allow_download=True)
    assert "mmlu@5" in refused(["choice@five"], tasks) and "mmlu@5" in refused([""], tasks)
    assert "acc_norm" in refused(["choice:f1"], tasks)
    assert "no task file" in refused(["choice"], tmp_path / "nowhere")
    (tasks / "bad.yaml").write_text("task: [unclosed")
    assert "bad.yaml cannot be read as YAML" in refused(["choice"], tasks)


def test_broken_tasks_have_one_sentence(refused, tasks):
    write_tasks(tasks, evil=CHOICE | {"doc_to_text": "{{no_such_field}}"})
    assert "no_such_field" in refused(["evil"], tasks)
    files = {"dataset_kwargs": {"data_files": {"test": str(tasks / "missing.jsonl")}}}
    write_tasks(tasks, evil=CHOICE | files | {"test_split": "test"})
    assert "cannot load the task evil" in refused(["evil"], tasks)
    later = "{% if question.startswith('" + text_of(8, 1)[:12] + "') %}{{no_such_field}}{% endif %}{{question}}"
    write_tasks(tasks, evil=CHOICE | {"doc_to_text": later})
    assert "no_such_field" in refused(["evil@0"], tasks)


class NetworkAsked(BaseException):
    pass


@pytest.fixture
def watched_network(monkeypatch):
    """As where HF_HUB_OFFLINE is not set; the first packet ends the test."""

    def connect(*_):
        raise NetworkAsked

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def test_nothing_is_downloaded_without_permission(refused, tasks, watched_network, monkeypatch):
    assert "model.allow_download=true" in refused(["gsm8k"])
    assert "model.allow_download=true" in refused(["ruler"]), "its data set is made by code"
    write_tasks(tasks, remote=CHOICE | {"dataset_kwargs": {"data_files": {"test": "https://example.org/x.jsonl"}}})
    assert "https://example.org" in refused(["choice"], tasks)
    with pytest.raises(NetworkAsked):
        refused(["gsm8k"], allow_download=True)
    with pytest.raises(pytest.fail.Exception, match="a model was made"):  # local files need no network
        refused(["text"], tasks, allow_download=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in refused(["gsm8k"])


def test_a_data_set_in_the_local_cache_needs_no_permission(world, tasks, tmp_path, watched_network, monkeypatch):
    """The cache as the library leaves it: prepared from a file, then named as the hub's data set."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with harness.lm_eval_as_data(False):
        datasets.load_dataset("json", data_files={"test": str(tasks / "test.jsonl"), "dev": str(tasks / "dev.jsonl")})
    (made,) = (tmp_path / "cache" / "json").glob("*/*/*/dataset_info.json")
    cached = tmp_path / "cache" / "someone___questions" / "default" / "0.0.0" / "0123abcd"
    cached.parent.mkdir(parents=True)
    made.parent.rename(cached)
    for file in cached.glob("json-*.arrow"):
        file.rename(cached / file.name.replace("json", "questions"))
    tokenizer = make_tokenizer(True)
    answers = answers_of(world, tokenizer, tmp_path / "answers")
    from_file = run_tasks(["choice"], answers, tokenizer, tiny.L, task_path=tasks)
    for name, path in (("choice", "someone/questions"), ("unknown", "someone/else")):
        config = CHOICE | {"task": name, "dataset_path": path}
        (tasks / f"{name}.yaml").write_text(json.dumps(config))
    from_cache = run_tasks(["choice"], answers, tokenizer, tiny.L, task_path=tasks)
    assert of(from_cache[0]) == of(from_file[0]) and answers.computed == 48
    with pytest.raises(UserError, match="model.allow_download=true"):
        run_tasks(["unknown"], answers, tokenizer, tiny.L, task_path=tasks)


def test_without_lm_eval_the_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lr2train.evaluation.harness")
    with pytest.raises(UserError, match="pip install -r requirements-eval.txt"):
        __import__("lr2train.evaluation.harness")


def test_a_tokenizer_without_bos_and_eos_is_refused():
    tokenizer = SimpleNamespace(hf=SimpleNamespace(bos_token_id=None, eos_token_id=None))
    with pytest.raises(UserError, match="neither"):
        HarnessModel(SimpleNamespace(), tokenizer, 8)


def test_lm_eval_is_as_before_afterwards(world, tasks, tmp_path):
    from lm_eval import utils

    before = utils.env
    tokenizer = make_tokenizer(True)
    run_tasks(
        ["choice"], answers_of(world, tokenizer, tmp_path / "answers"), tokenizer, tiny.L, task_path=tasks, limit=1
    )
    assert utils.env is before


def test_the_benchmark_finds_no_difference(world, tasks):
    make_tokenizer(True).hf.save_pretrained(world / "base")
    figures = list(bench.compare(world / "base", tasks, ["choice@0", "text@0"], 4, 600))
    by_name = {figure.name: figure for figure in figures}
    assert all(figure.holds for figure in figures)
    assert by_name["loglikelihoods"].value == 16 and by_name["texts"].value == 4
    assert not by_name["largest_loglikelihood_error"]._replace(value=math.nan).holds


def test_every_task_of_the_short_suite_exists():
    import yaml

    root = Path(__file__).parents[2]
    names = yaml.safe_load((root / "conf/eval/short.yaml").read_text())["tasks"]
    with lm_eval_as_data(False):
        known = set(manager_of((), None, True).all_tasks)
    assert len(names) == 5 and all(parsed(name).task in known for name in names)
