"""A rank whose launcher dies gets SIGTERM; a rank without a launcher is left alone."""

import os
import signal
import subprocess
import sys
import textwrap

import psutil

from lr2train.parallel.launcher import launchers

RANK = """
    import signal, sys, time
    from lr2train.parallel.launcher import watch_launcher
    signal.signal(signal.SIGTERM, lambda *_: (print("asked to stop", flush=True), sys.exit(0)))
    watch_launcher()
    print("started", flush=True)
    signal.pause()
"""
LAUNCHER = """
    import subprocess, sys
    subprocess.Popen([sys.executable, "-c", sys.argv[2]]).wait()
"""


def launch(tmp_path, name: str) -> subprocess.Popen:
    """A rank below a program of this name."""
    program = tmp_path / name
    program.write_text(textwrap.dedent(LAUNCHER))
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        [sys.executable, str(program), "x", textwrap.dedent(RANK)], stdout=subprocess.PIPE, text=True, env=environ
    )


def test_a_rank_is_asked_to_stop_when_its_launcher_is_killed(tmp_path):
    process = launch(tmp_path, "deepspeed")
    assert process.stdout.readline() == "started\n"
    process.kill()
    assert process.stdout.readline() == "asked to stop\n"
    assert process.stdout.read() == "", "the rank has ended"


def test_a_shell_may_be_closed_under_a_job(tmp_path):
    process = launch(tmp_path, "my_shell")
    assert process.stdout.readline() == "started\n"
    [rank] = psutil.Process(process.pid).children()
    assert launchers(rank) == []
    process.kill()
    process.wait()
    rank.send_signal(signal.SIGKILL)
    assert process.stdout.read() == "", "nobody asked the rank to stop"
