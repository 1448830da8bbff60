"""How a verb starts and ends: ``lr2train VERB key=value …`` with any of Hydra's flags, one-sentence errors, exit codes.

Choice: every start passes here, with a flag or without. Hydra composes configs and prints them (``--cfg``, ``--info``);
Hydra runs no job.
``--multirun`` runs each job in a process of its own, one after the other, because process groups, DeepSpeed's state and
CUDA memory belong
to a process. A job that dies does not touch the next jobs. Cost: each job of a sweep starts Python again.

| exit code | meaning |
|---|---|
| 0 | done |
| 2 | wrong input: one sentence on stderr |
| 130 | interrupted |
| 1 | another rank was lost (one sentence), or a defect (its traceback) |
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import gc
import itertools
import locale
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lr2train import io, progress, ranks, run
from lr2train.cli import composition, help
from lr2train.cli.overrides import Override
from lr2train.config import Config, UserError, load
from lr2train.ranks import PeerGone

EXIT_RANK_LOST, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_NO_READER = 1, 2, 130, 141
_PATIENCE_S = 5.0  # launchers poll their ranks about once a second
_GOES_ON = ("prepare", "search", "train", "evaluate", "reproduce")  # from what it has finished; others begin anew
_AGAIN_S = 0.02  # until a dropped interrupt is sent again
_REFUSED = {
    "config_path": "--config-path would hide the configs of lr2train; name the folder with --config-dir",
    "experimental_rerun": "--experimental-rerun is not supported; type the overrides of the former run again",
}


def main(verb: str, job: Callable[[Config], Any]) -> None:
    """Run a verb from the command line.

    Args:
        verb: the name of ``conf/<verb>.yaml``.
        job: called with the loaded config.

    Raises:
        SystemExit: the verb did not end with success; the code is one of the table above.
    """
    with door(verb):
        if config := configured(verb):
            job(config)


def configured(verb: str) -> Config | None:
    """The config of the command line. None: a flag asked for something else, such as help, and that has been done.

    Raises:
        UserError: the command line is refused.
        SystemExit: a job of a sweep failed.
    """
    flags = _flags(verb, [one for one in sys.argv[1:] if not one.startswith("--local_rank")])
    shows = not flags.help and (flags.hydra_help or flags.cfg or flags.info or flags.shell_completion)
    if flags.multirun and not flags.help and not shows:
        _run_all(verb, flags)
        return None
    with composition.told():
        if shows:
            _show(verb, flags)
            return None
        folders = composition.config_folders(flags.config_dir)
        composed = composition.composed(flags.config_name or verb, flags.overrides, folders)
        if flags.help:
            print(help.of_verb(verb, composed, folders))
            return None
        config = load(composed, verb)
    if twice := composition.repeated(flags.overrides):
        progress.say(verb, f"given more than once, and the last value counts: {', '.join(twice)}")
    if idle := composition.unread(verb, flags.overrides):
        progress.say(verb, f"given, but not read by {verb}: {', '.join(idle)}")
    return config


@contextlib.contextmanager
def door(verb: str) -> Iterator[None]:
    """Turn errors into one sentence and an exit code. A defect keeps its traceback. SIGTERM acts as Ctrl-C."""
    _use_utf8()
    _open_streams()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _no_interrupt_dropped():
            ranks.refuse_environment()
            _show_log()
            yield
    except BrokenPipeError:  # the reader of stdout has gone, as `head` does
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # else Python reports the same error again at its end
        sys.exit(EXIT_NO_READER)
    except (UserError, OSError) as error:
        if (told := io.for_user(error)) is None:
            raise
        _die(verb, told)
    except PeerGone as gone:
        print(
            f"{verb} (rank {ranks.rank()}): {gone}; the same command goes on from what was saved",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(EXIT_RANK_LOST)
    except run.Interrupted:  # the verb has said so
        run.note_interrupt()
        # Launchers send SIGTERM to the ranks that still end when another has ended: rank 0 closes its dashboards.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_without_garbage()
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        run.note_interrupt()
        again = "run the same command again" + (" to go on" if verb in _GOES_ON else "")
        print(f"{verb}: interrupted; {again}", file=sys.stderr)
        # A launcher sends SIGTERM to ranks that Ctrl-C has reached already: no traceback while Python ends.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_without_garbage()
        sys.exit(EXIT_INTERRUPTED)


def _end_without_garbage() -> None:
    """Leave out Python's last search for garbage: among the objects of torch it takes 3 s, on a busy machine 30 s."""
    atexit.register(gc.freeze)


def _use_utf8() -> None:
    """Start Python again in its UTF-8 mode where the locale has another encoding, such as ASCII in a bare container.

    Texts, file names and arguments are UTF-8 whatever the locale says. Python decides at its start how to read them.
    """
    if not sys.flags.utf8_mode and codecs.lookup(locale.getencoding()).name != "utf-8":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONUTF8": "1"})


def _open_streams() -> None:
    """Open the null device for each standard stream that is closed, as a daemon may start us.

    A file that is opened later would get the stream's number, and the output of a library would go into the file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open as long as the process)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _no_interrupt_dropped() -> Iterator[None]:
    """Send an interrupt again where Python has dropped it.

    A signal may strike in a destructor or in the callback of a weak reference. Python drops what is raised there.
    """
    own, pending = sys.unraisablehook, list[threading.Timer]()

    def hook(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            return own(dropped)
        again = threading.Timer(_AGAIN_S, _interrupt_main_thread)  # not here: this call would drop it as well
        again.daemon = True
        pending.append(again)
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = own
        for one in pending:  # another signal has ended the verb meanwhile
            one.cancel()


def _interrupt_main_thread() -> None:
    number = signal.SIGINT if callable(signal.getsignal(signal.SIGINT)) else signal.SIGTERM
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def _die(verb: str, error: UserError) -> None:
    """Print the error once on each machine and exit with the code for wrong input.

    Ranks share their input, so they usually share the error. The machine's first rank prints at once. Another rank
    waits first: a launcher
    ends this rank meanwhile if the first rank failed too. If the first rank did not fail, this rank prints.
    """
    where = ""
    local = os.environ.get("LOCAL_RANK", "")
    if local.isdecimal() and int(local) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a launcher's: no traceback
        time.sleep(_PATIENCE_S)
        where = f" (rank {os.environ.get('RANK')})"
    print(f"{verb}{where}: {error}", file=sys.stderr, flush=True)
    sys.exit(EXIT_BAD_INPUT)


def _show_log() -> None:
    """Send our modules' log (which kernel, which attention strategy, and why) to stderr, from rank 0 alone."""
    if ranks.rank() == 0:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        logging.getLogger("lr2train").handlers = [handler]
        logging.getLogger("lr2train").setLevel(logging.INFO)


def _flags(verb: str, arguments: Sequence[str]) -> Namespace:
    """Parse Hydra's flags; flags may stand anywhere among the overrides.

    Raises:
        UserError: a flag is not supported.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.prog = f"lr2train {verb}"  # else the name of a file
    flags = parser.parse_intermixed_args(arguments)
    for name, sentence in _REFUSED.items():
        if getattr(flags, name) is not None:
            raise UserError(sentence)
    return flags


def _show(verb: str, flags: Namespace) -> None:
    """Let Hydra print the config, its flags or its search path. No job runs."""
    import hydra

    name, folders = flags.config_name or verb, composition.config_folders(flags.config_dir)
    if flags.cfg:
        composition.composed(name, flags.overrides, folders)  # the same refusals as for a run
    overrides = composition.hydra_overrides(name, flags.overrides, folders)
    told = [
        f"--{name.replace('_', '-')}" for name in ("hydra_help", "resolve", "shell_completion") if getattr(flags, name)
    ]
    told += [f"--{name}={value}" for name in ("cfg", "info", "package") if (value := getattr(flags, name))]
    sys.argv = [sys.argv[0], *told, *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra ends the process with its own words and exit code
    with composition.searching(folders):
        hydra.main(config_path=str(folders[-1]), config_name=name, version_base="1.3")(_no_job)()


def _no_job(_: Any) -> None:
    raise AssertionError("Hydra was asked to show, not to run")


def _run_all(verb: str, flags: Namespace) -> None:
    """Run the verb once for each combination of values, each job in a process of its own, and report each job.

    Raises:
        UserError: several ranks were started, or the command line names another sweeper of Hydra.
        SystemExit: a job failed. All jobs have run; the code is the first failed job's.
        KeyboardInterrupt: a job was interrupted. Later jobs do not run.
    """
    if ranks.world() > 1:
        raise UserError(
            f"--multirun was started on {ranks.world()} ranks (WORLD_SIZE), and ranks can meet at their rendezvous "
            "only once; start the "
            "launcher once for each job, as launch/sweep.sh does"
        )
    typed = [Override.parse(one) for one in flags.overrides]
    if foreign := [
        one.key
        for one in typed
        if one.key.startswith(("hydra/sweeper", "hydra/launcher", "hydra.sweeper", "hydra.launcher"))
    ]:
        raise UserError(
            f"{foreign[0]} is not supported: --multirun runs every combination one after the other; leave "
            f"{foreign[0]} out"
        )
    jobs = [list(job) for job in itertools.product(*(one.alternatives() for one in typed))]
    kept = [
        f"--{name}={value}"
        for name in ("config-dir", "config-name")
        if (value := getattr(flags, name.replace("-", "_")))
    ]
    codes = []
    for number, overrides in enumerate(jobs, 1):
        swept = " ".join(one for one, given in zip(overrides, flags.overrides, strict=True) if one != given)
        progress.say(verb, f"job {number} of {len(jobs)}: {swept}")
        codes.append(_wait_for(subprocess.Popen([sys.executable, "-m", f"lr2train.{verb}", *kept, *overrides])))
        if codes[-1] == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        progress.say(
            verb,
            f"job {number} of {len(jobs)}: {'done' if codes[-1] == 0 else f'failed with exit code {codes[-1]}'}: "
            f"{swept}",
        )
    if any(codes):
        progress.say(verb, f"{sum(map(bool, codes))} of {len(jobs)} jobs failed")
        sys.exit(next(filter(None, codes)))


def _wait_for(job: subprocess.Popen[bytes]) -> int:
    """Wait for a job; returns its exit code, 128 + n where signal n killed the job, as the shell counts.

    The terminal sends Ctrl-C to the job by itself. SIGTERM is passed on.
    """
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
