"""Progress: a live line that fits its terminal, few lines in a log, times after a resume, a clean end."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lr2train import progress
from lr2train.progress import Work, duration, fitted, pause_s
from lr2train.training.metrics import Brief

AMOUNTS = st.integers(0, 10**12) | st.floats(0, 1e6)


@given(st.text("abc de", max_size=60), AMOUNTS, AMOUNTS, st.text("loss 1,.", max_size=80), st.integers(1, 200))
def test_the_line_is_never_wider_than_the_terminal(description, now, total, note, cells):
    work = Work(description, before=0)
    assert len(fitted(work, cells)) <= cells
    work.report(now, total, note)
    assert len(fitted(work, cells)) <= cells


@given(st.integers(30, 200), st.integers(0, 12))
def test_a_wider_terminal_shows_no_less_and_the_count_comes_first(cells, done):
    work = Work("train", start_s=time.monotonic() - 60)
    work.report(done, 12, "loss short 3.212 long 2.981, 1,234 tokens/s, 3.1 GiB")
    narrow, wide = (re.sub(r" \[.*?\]", "", fitted(work, width)) for width in (cells, cells + 20))
    assert wide.startswith(narrow)
    assert narrow.startswith(f"train {done}/12")


def test_all_parts_in_order():
    work = Work("train", before=2, start_s=time.monotonic() - 100)
    work.report(7, 12, "loss 3.2, 1.5 GiB")
    assert fitted(work, 120) == "train 7/12 [##############----------], 1 min 40 s left, loss 3.2, 1.5 GiB, 1 min 40 s"


def test_the_time_left_counts_only_what_this_start_has_done():
    """Resumed at 900 of 1000; 50 in 100 s leave 50, at the same rate."""
    work = Work("train", before=900, start_s=time.monotonic() - 100)
    assert work.left_s() is None
    work.report(900, 1000, "")
    assert work.left_s() is None
    work.report(950, 1000, "")
    assert work.left_s() == pytest.approx(100, abs=1)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (47 * 3600, "47 h 00 min"),
     (75 * 3600 + 59, "3 d 3 h")],
)  # fmt: skip
def test_durations_have_two_units(seconds, words):
    assert duration(seconds) == words


def test_a_rate_has_its_unit():
    work = Work("ask", before=1000, unit="tokens", start_s=time.monotonic() - 10)
    work.report(3000, 10000, "")
    assert "200 tokens/s" in fitted(work, 100)


# ---- a log ----


@pytest.mark.parametrize(("hours", "most"), [(0.05, 13), (24, 260), (24 * 14, 2200)])
def test_a_log_of_weeks_is_no_flood(hours, most):
    now, lines = 0.0, 0
    while now < hours * 3600:
        now += pause_s(now)
        lines += 1
    assert lines <= most


def test_a_log_has_lines_in_time_and_the_last_one(monkeypatch):
    """A second a report: 15, 30, … s, and the end."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr("sys.stderr", out := io.StringIO())
    for _ in progress.track(range(40), 100, "train", 60, lambda: "loss 3.2"):
        clock[0] += 1
    assert out.getvalue().splitlines() == [
        "train: 75/100, 25 s left, loss 3.2, 15 s",
        "train: 90/100, 10 s left, loss 3.2, 30 s",
        "train: 100/100, 0 s left, loss 3.2, 40 s",
    ]


def test_short_work_leaves_no_line_in_a_log(monkeypatch):
    monkeypatch.setattr("sys.stderr", out := io.StringIO())
    assert list(progress.track(range(3), 3, "quick")) == [0, 1, 2]
    assert out.getvalue() == ""


def test_other_ranks_print_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.stderr", out := io.StringIO())
    list(progress.track(range(3), 3, "quick"))
    assert out.getvalue() == ""


# ---- a terminal ----

JOB = """
import signal, sys
from lr2train import progress
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background hands on that it is ignored
with progress.meter("work", 0) as tick:
    for number in range(1, 4):
        tick(number, 8, "a note that is much too long for a narrow terminal " * 3)
        if number == 2:
            progress.say("verb", "a line in between")
            print("a result", flush=True)
    if "wait" in sys.argv:
        print("waiting", file=sys.stderr, flush=True)
        sys.stdin.readline()
"""


def on_terminal(*arguments: str, columns: int, interrupt: str = "") -> tuple[int, str, str]:
    """(exit code, stdout of a pipe, what a terminal of so many columns gets) of the job."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "10", "TERM": "xterm"}
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs,
        env=environment,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while select.select([ours], [], [], 30)[0]:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # the job has closed its end
            break
        shown += piece
        if interrupt and interrupt.encode() in shown:
            job.send_signal(signal.SIGINT)
            interrupt = ""
        if not piece:
            break
    out, _ = job.communicate(timeout=30)
    os.close(ours)
    return job.returncode, out.decode(), shown.decode()


def _plain(shown: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)) if line.strip()]


@pytest.mark.parametrize("columns", [20, 100])
def test_a_terminal_gets_one_line_that_fits_and_messages_above(columns):
    code, out, shown = on_terminal(columns=columns)
    assert (code, out) == (0, "a result\n")  # results go where stdout goes
    lines = _plain(shown)
    assert max(len(line.rstrip()) for line in lines) <= columns
    assert any(line.startswith("[verb] a line in") for line in lines)
    assert lines[-1].startswith("work 3/8")
    assert shown.rstrip(" ").endswith("\n") or shown.endswith("\x1b[?25h")  # the next prompt has a line of its own


def test_ctrl_c_gives_the_cursor_back():
    code, _, shown = on_terminal("wait", columns=80, interrupt="waiting")
    assert code != 0
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0


# ---- training's note ----


def test_the_note_keeps_the_loss_of_a_window_that_a_step_lacks():
    brief = Brief()
    assert brief.note() == ""
    brief.write(1, {"loss": 3.0, "loss_short": 3.1, "loss_long": None, "tokens_per_s": 1234.5, "peak_gib": 2.34})
    assert brief.note() == "loss short 3.100, 1,234 tokens/s, 2.3 GiB"
    brief.write(2, {"loss": 2.0, "loss_short": None, "loss_long": 2.5, "bad_steps": 1})
    assert brief.note() == "loss short 3.100 long 2.500, 1 steps without an update, 1,234 tokens/s, 2.3 GiB"
