"""The command line: ``python -m lr2train.<verb> key=value …`` with any of Hydra's flags, one-sentence errors, exit codes.

Choice: every start goes through one door, with a flag or without. Hydra composes configs and prints them (``--cfg``, ``--info``, ``--help``); it runs
no job. ``--multirun`` runs every job in a process of its own, one after the other: process groups, DeepSpeed's state and CUDA's memory belong to
a process, and a job that dies leaves the next ones alone. Cost: a job of a sweep starts Python anew.

Exit codes: 0 done; 2 the input was wrong (one sentence on stderr); 130 interrupted; 1 another rank was lost (one sentence), or a defect, with its
traceback. Nothing but the verbs imports this file.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lr2train import io, progress, ranks, run
from lr2train.cli import composition
from lr2train.cli.overrides import Override
from lr2train.config import Config, UserError, load
from lr2train.parallel.control import PeerGone

EXIT_RANK_LOST, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_NO_READER = 1, 2, 130, 141
_PATIENCE_S = 5.0  # launchers look at their ranks every second or so
_REFUSED = {
    "config_path": "--config-path would hide the configs of lr2train; name the folder with --config-dir, which is searched first",
    "experimental_rerun": "--experimental-rerun is not served; give the overrides of the former run again",
}


def main(verb: str, job: Callable[[Config], Any]) -> None:
    """Run a verb from the command line, and leave with an exit code where it does not end well."""
    with door(verb):
        flags = _flags([one for one in sys.argv[1:] if not one.startswith("--local_rank")])
        if flags.help:
            print(f"{inspect.getdoc(sys.modules[job.__module__])}\n\nEvery key stands with what it does in lr2train/config.py.\n")
        if flags.help or flags.hydra_help or flags.cfg or flags.info or flags.shell_completion:
            with composition.told():
                _show(verb, flags)
        elif flags.multirun:
            _run_all(verb, flags)
        else:
            with composition.told():
                folders = composition.config_folders(flags.config_dir)
                config = load(composition.composed(flags.config_name or verb, flags.overrides, folders), verb)
            if idle := composition.unread(verb, flags.overrides):
                progress.say(verb, f"given, but not read by {verb}: {', '.join(idle)}")
            job(config)


@contextlib.contextmanager
def door(verb: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a sentence and an exit code; a defect keeps its traceback. SIGTERM is Ctrl-C to every verb."""
    _show_log()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says so again at its end
        sys.exit(EXIT_NO_READER)
    except (UserError, OSError) as error:
        if (told := io.for_user(error)) is None:
            raise
        _die(verb, told)
    except PeerGone as gone:
        print(f"{verb} (rank {ranks.rank()}): {gone}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        sys.exit(EXIT_RANK_LOST)
    except run.Interrupted:  # the verb has said so
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        print(f"{verb}: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _die(verb: str, error: UserError) -> None:
    """Say it once a machine (ranks share their input, so they share the error) and leave with the code for bad input.

    A rank that is not its machine's first waits: had that one failed too, the launcher ends this one meanwhile. If not, nobody else would say it.
    """
    where = ""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(_PATIENCE_S)
        where = f" (rank {os.environ.get('RANK')})"
    print(f"{verb}{where}: {error}", file=sys.stderr, flush=True)
    sys.exit(EXIT_BAD_INPUT)


def _show_log() -> None:
    """What our modules log (which kernel, which attention strategy, and why) goes to stderr, from rank 0 alone."""
    if ranks.rank() == 0:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        logging.getLogger("lr2train").handlers = [handler]
        logging.getLogger("lr2train").setLevel(logging.INFO)


def _flags(arguments: Sequence[str]) -> Namespace:
    """Hydra's flags, wherever they stand among the overrides.

    Raises:
        UserError: a flag that is not served.
    """
    from hydra._internal.utils import get_args_parser

    flags = get_args_parser().parse_intermixed_args(arguments)
    for name, sentence in _REFUSED.items():
        if getattr(flags, name) is not None:
            raise UserError(sentence)
    return flags


def _show(verb: str, flags: Namespace) -> None:
    """Print what Hydra tells of the config, its flags and its search path. No job runs."""
    import hydra

    name, folders = flags.config_name or verb, composition.config_folders(flags.config_dir)
    if flags.cfg:
        composition.composed(name, flags.overrides, folders)  # refuses what a run would be refused for
    overrides = composition.hydra_overrides(name, flags.overrides, folders)
    told = [f"--{name.replace('_', '-')}" for name in ("help", "hydra_help", "resolve", "shell_completion") if getattr(flags, name)]
    told += [f"--{name}={value}" for name in ("cfg", "info", "package") if (value := getattr(flags, name))]
    sys.argv = [sys.argv[0], *told, *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra ends the process itself, with its own words and its own exit code
    with composition.searching(folders):
        hydra.main(config_path=str(folders[-1]), config_name=name, version_base="1.3")(_no_job)()


def _no_job(_: Any) -> None:
    raise AssertionError("Hydra was asked to show, not to run")


def _run_all(verb: str, flags: Namespace) -> None:
    """Run the verb once for every combination of the values that were given, each in a process of its own, and report each.

    Raises:
        UserError: several ranks were started, or another sweeper of Hydra's is asked for.
        SystemExit: a job failed, with the exit code of the first that did, after all have run.
        KeyboardInterrupt: a job was interrupted; those after it do not run.
    """
    if ranks.world() > 1:
        raise UserError(
            f"--multirun was started on {ranks.world()} ranks (WORLD_SIZE), which share one rendezvous and cannot meet there twice; start the "
            "launcher once a job, as launch/sweep.sh does"
        )
    typed = [Override.parse(one) for one in flags.overrides]
    if foreign := [one.key for one in typed if one.key.startswith(("hydra/sweeper", "hydra/launcher", "hydra.sweeper", "hydra.launcher"))]:
        raise UserError(f"{foreign[0]} is not served: --multirun runs every combination here, one after the other; leave {foreign[0]} out")
    jobs = [list(job) for job in itertools.product(*(one.alternatives() for one in typed))]
    kept = [f"--{name}={value}" for name in ("config-dir", "config-name") if (value := getattr(flags, name.replace("-", "_")))]
    codes = []
    for number, overrides in enumerate(jobs, 1):
        swept = " ".join(one for one, given in zip(overrides, flags.overrides, strict=True) if one != given)
        progress.say(verb, f"job {number} of {len(jobs)}: {swept}")
        codes.append(_wait_for(subprocess.Popen([sys.executable, "-m", f"lr2train.{verb}", *kept, *overrides])))
        if codes[-1] == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        progress.say(verb, f"job {number} of {len(jobs)}: {'done' if codes[-1] == 0 else f'failed with exit code {codes[-1]}'}: {swept}")
    if any(codes):
        progress.say(verb, f"{sum(map(bool, codes))} of {len(jobs)} jobs failed")
        sys.exit(next(filter(None, codes)))


def _wait_for(job: subprocess.Popen[bytes]) -> int:
    """The exit code of a job, that of a signal as the shell gives it. The terminal's Ctrl-C reaches the job by itself; SIGTERM is handed on."""
    before = signal.signal(signal.SIGTERM, lambda *_: job.send_signal(signal.SIGTERM))
    try:
        while True:
            try:
                code = job.wait()
                return code if code >= 0 else 128 - code
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, before)
