"""The commands of README.md, CONTRIBUTING.md and docs/, read from the pages; and all of them run that need no cluster.

    python -m tools.docs                      lists every command with what it needs
    python -m tools.docs --runs runs FOLDER   runs those that need nothing, in FOLDER, beside copies of the demo's runs

A line ``# needs …`` in a block of commands says what the commands below it need, such as a cluster. A command without
it runs after the demo, on a laptop CPU; ``runs/first`` is a copy of ``runs/tiny_4k`` then. Slow commands are those of
``SLOW``; ``--slow`` runs them too.

Choice: pages hold what a reader types, and nothing is generated. tests/test_docs.py composes every verb's command and
runs the cheap ones; this tool runs the rest.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHED = re.compile(  # what stands before the verb
    r"(?:\w+=\S+ )*(?:lr2train|python -m lr2train|bash launch/run\.sh \d+|bash launch/multinode\.sh|"
    r"sbatch launch/slurm\.sbatch|(?:deepspeed|torchrun)\b.*? (?:--module|-m) lr2train)[ .]+(\w+)(.*)",
    re.DOTALL,
)
CLUSTER = re.compile(r"--hostfile|multinode\.sh|slurm\.sbatch|^deepspeed|^torchrun")
SLOW = re.compile(
    r"launch/(demo|test)\.sh|lr2train (search|train|rehearse|evaluate)|run\.sh \d+ (search|train)|tools\."
)


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        page, line: where it stands.
        text: what is typed, on one line.
        needs: what it needs beyond the demo's runs; empty where nothing.
    """

    page: Path
    line: int
    text: str
    needs: str

    @property
    def verb(self) -> tuple[str, list[str]] | None:
        """The verb of lr2train and its arguments; None for another program."""
        found = LAUNCHED.fullmatch(self.text.split(" > ")[0])
        return (found[1], [one for one in shlex.split(found[2]) if one != "…"]) if found else None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text.splitlines()[0]}"


def blocks(page: Path) -> Iterator[Command]:
    """The commands of the page's blocks of ``bash``, and those after a ``$`` above their output.

    A file that is written line by line is one command.
    """
    inside, needs, begun, end = False, "", "", ""
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        if not inside and line.startswith("$ "):
            yield Command(page, number, re.sub(r"\s+#\s.*", "", line[2:]), "")
        elif end:  # of a file
            begun += f"{line}\n"
            if line != end:
                continue
            yield Command(page, number, begun, needs)
            begun = end = ""
        elif line.startswith("```"):
            inside, needs = line == "```bash", ""
        elif inside and line.startswith("#"):
            needs = line[1:].strip().removeprefix("needs ") if line[1:].strip().startswith("needs ") else needs
        elif inside and (file := re.search(r"<<'(\w+)'$", line)):
            begun, end = f"{line}\n", file[1]
        elif inside and line.strip():
            begun += re.sub(r"\s+#\s.*", "", line).strip()
            if begun.endswith("\\"):
                begun = begun[:-1]
                continue
            text = re.sub(r"\s+", " ", begun)
            yield Command(page, number, text, needs or ("a cluster" if CLUSTER.search(text) else ""))
            begun = ""


def spans(page: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every piece of code within a line of prose or of a table."""
    inside = False
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        inside ^= line.startswith("```")
        for text in re.findall(r"`([^`]+)`", "" if inside or line.startswith("```") else line):
            yield number, text


def _run(one: Command, folder: Path) -> bool:
    begin = time.monotonic()
    done = subprocess.run(["bash", "-c", one.text], cwd=folder, capture_output=True, text=True)
    print(f"{'ok  ' if done.returncode == 0 else 'FAIL'} {time.monotonic() - begin:6.1f} s  {one}", flush=True)
    if done.returncode:
        print(done.stdout[-1500:] + done.stderr[-1500:], flush=True)
    return done.returncode == 0


def main() -> None:
    """The command line; exits with 1 if a command failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs", description="The commands of the pages.")
    parser.add_argument("folder", nargs="?", type=Path, help="run in this folder, which is made")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="runs of the demo (default: %(default)s)")
    parser.add_argument("--slow", action="store_true", help="also the slow commands")
    parser.add_argument("--only", default="", help="commands whose page, line or text contains this")
    given = parser.parse_args()
    every = [one for page in PAGES for one in blocks(page) if given.only in str(one)]
    if given.folder is None:
        for one in every:
            print(f"{one}" + (f"   [needs {one.needs}]" if one.needs else ""))
        return
    shutil.copytree(given.runs, given.folder / "runs", dirs_exist_ok=True)
    shutil.copytree(given.folder / "runs" / "tiny_4k", given.folder / "runs" / "first", dirs_exist_ok=True)
    for name in (".venv", "launch", "tools", "lr2train", "requirements.txt"):  # launch/setup.sh looks for .venv there
        (given.folder / name).is_symlink() or (given.folder / name).symlink_to(ROOT / name)
    run = [one for one in every if not one.needs and (given.slow or not SLOW.search(one.text))]
    failed = [one for one in run if not _run(one, given.folder)]
    print(f"{len(run) - len(failed)} of {len(run)} commands ran; {len(every) - len(run)} need more or are slow")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
