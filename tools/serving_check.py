"""Whether runtimes compute what lr2train computes: an export's folders in each runtime, beside lr2train's two tables.

    python tools/serving_check.py runs/first/export
    python tools/serving_check.py runs/first/export --vllm /venvs/vllm/bin/python --transformers /venvs/tf4/bin/python

transformers is run in this interpreter. A runtime in another environment is named by the path of its python; a path
may be named several times. Each setup runs in a process of its own. The table holds, for each text, the mean and the
largest difference of the log-probabilities of the last 64 prompt tokens, the largest difference over the new tokens,
and the number of equal greedy tokens. Rows that docs/SERVING.md does not promise are marked, and decide nothing.

Exit status: 0: all that is promised is exact; 1: something is not; 2: the arguments are wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lr2train import io
from lr2train.config import UserError
from lr2train.model import load
from tools.serving import cases
from tools.serving.compare import Line, line_of, table
from tools.serving.reference import Answer, Reference
from tools.serving.runtimes import RUNTIMES

TEXT = ("README.md", "docs")  # of this repository: every checkout has it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; the exit status."""
    try:
        return _main(_parser().parse_args(arguments))
    except UserError as error:
        print(f"serving_check: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=_absolute, help="folder of an export, with two/ in it")
    for name in RUNTIMES:
        parser.add_argument(f"--{name}", type=_absolute, action="append", default=[], metavar="PYTHON")
    parser.add_argument("--rows", help="cases to run, comma-separated; default: all")
    parser.add_argument("--only", action="append", help="setups to run: a text that their folder and description hold")
    parser.add_argument("--alone", action="store_true", help="leave batches of several texts out")
    parser.add_argument("--longest", type=int, help="tokens of the long prompt; default: twice the original window")
    parser.add_argument("--dtype", default="float32", choices=sorted(load.DTYPES), help="of all computation")
    parser.add_argument(
        "--tolerance", type=float,
        help="largest allowed difference of log-probabilities; default: 1e-3 where all is float32, else 0.2",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the lines there too")
    return parser


def _absolute(text: str) -> Path:
    """A runtime works in another folder. Links stay: the interpreter of a virtual environment is one."""
    return Path(text).expanduser().absolute()


def default_tolerance(export: Path, dtype: str) -> float:
    """The largest difference of log-probabilities that rounding explains, in nats; ``dtype`` is that of computation.

    In long/ and short/ the attention factor is in the weights of queries and keys. Weights in bfloat16 are rounded once
    more by that, whatever they are computed in.
    """
    config = io.read_json(export / "two" / "config.json")
    weights = config.get("dtype") or config.get("torch_dtype")  # the second: transformers before version 5
    return 1e-3 if dtype == weights == "float32" else 0.2


def _main(asked: argparse.Namespace) -> int:
    reference = Reference(asked.export / "two", asked.dtype)
    windows = {"original": reference.original, "target": reference.target}
    every = cases.cases_of(reference.original, reference.target, asked.longest)
    setups = [
        (name, python, setup)
        for name, python in _interpreters(asked)
        for setup in _chosen(RUNTIMES[name](asked.export), every, asked)
    ]
    text = _text(asked.export / "two", max(case.prompt_tokens for case in every.values()), reference.vocabulary)
    tolerance = asked.tolerance or default_tolerance(asked.export, asked.dtype)
    answers: dict[str, Answer] = {}
    lines: list[Line] = []
    for name, python, setup in setups:
        request = cases.request_of(setup, every, text, windows, asked.dtype)
        print(f"{name}: {setup.folder.name}/ {setup.how}".rstrip(), file=sys.stderr, flush=True)
        given = _run(name, python, request)
        for row, row_request in _rows(setup, request):
            if row.case not in answers:
                answers[row.case] = reference.answer(every[row.case], text)
            wanted = answers[row.case]
            lines.append(line_of(given["runtime"], setup, row, given, row_request, wanted, reference, tolerance))
        if asked.json is not None:  # after each setup: a kill keeps what is known
            said = {"windows": windows, "tolerance": tolerance, "lines": [line.values() for line in lines]}
            io.write_json(asked.json, said)
    print(table(lines))
    return int(any(line.failed for line in lines))


def _interpreters(asked: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Runtime and interpreter; transformers in this one always."""
    for name in RUNTIMES:
        own = [Path(sys.executable)] if name == "transformers" else []
        for python in [*own, *getattr(asked, name)]:
            if not os.access(python, os.X_OK) or python.is_dir():
                raise UserError(f"--{name}={python} is no program; name the python of an environment with {name}")
            yield name, python


def _chosen(setups: list[cases.Setup], every: dict[str, cases.Case], asked: argparse.Namespace) -> list[cases.Setup]:
    """The setups whose folder exists, with the rows that were asked for."""
    names = asked.rows.split(",") if asked.rows else list(every)
    if unknown := [name for name in names if name not in every]:
        raise UserError(f"--rows={unknown[0]} is no case; choose among {', '.join(every)}")
    chosen = []
    for setup in setups:
        batches = [batch for batch in setup.batches if len(batch) == 1 or not asked.alone]
        batches = [tuple(row for row in batch if row.case in names) for batch in batches]
        batches = [batch for batch in batches if batch]
        described = f"{setup.folder.name}/ {setup.how}"
        wanted = not asked.only or any(text in described for text in asked.only)
        if batches and wanted and setup.folder.exists():
            chosen.append(replace(setup, batches=tuple(batches)))
    return chosen


def _rows(setup: cases.Setup, request: dict[str, Any]) -> Iterator[tuple[cases.Row, dict[str, Any]]]:
    for batch, of_batch in zip(setup.batches, request["batches"], strict=True):
        yield from zip(batch, of_batch, strict=True)


def _run(runtime: str, python: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The answer of the runtime's script. A script that fails has refused every row, for its last line of output."""
    script = Path(__file__).with_name("serving") / f"with_{runtime}.py"
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_MODULES_CACHE": str(Path(folder) / "modules"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [python, script, asked, answer], env=environment, cwd=folder, text=True, capture_output=True
        )
        if done.returncode == 0:
            return json.loads(answer.read_text())
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    print("\n".join(said[-30:]), file=sys.stderr)
    reason = said[-1] if said else f"exit status {done.returncode}"
    names = [row["name"] for batch in request["batches"] for row in batch]
    return {"runtime": runtime, "rows": {}, "refused": dict.fromkeys(names, reason)}


def _text(folder: Path, n_tokens: int, vocabulary: int) -> list[int]:
    """Token ids of this repository's pages, repeated where they are too few; without a tokenizer any ids."""
    if not (folder / "tokenizer.json").exists():
        return [n * 7919 % vocabulary for n in range(n_tokens)]  # multiples of a prime visit the whole vocabulary
    root = Path(__file__).resolve().parents[1]
    pages = [page for name in TEXT for page in sorted((root / name).glob("*.md")) or [root / name]]
    words = load.load_tokenizer(folder)("\n".join(page.read_text() for page in pages), verbose=False)["input_ids"]
    ids = [token for token in words if token < vocabulary]
    if not ids:
        raise UserError(f"the tokenizer in {folder} gives no token that the model knows; put the model's own there")
    return (ids * (n_tokens // len(ids) + 1))[:n_tokens]


if __name__ == "__main__":
    sys.exit(main())
