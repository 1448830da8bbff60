"""``lr2train VERB key=value …``, also as ``python -m lr2train`` and ``deepspeed --no_local_rank --module lr2train``."""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path

from lr2train import __version__
from lr2train.cli import door, help
from lr2train.config import READS, VERBS


def main() -> None:
    """Run a verb. Without one, or for ``--help``, list all verbs; ``--version`` prints the version."""
    verb = next((one for one in sys.argv[1:] if not one.startswith("--local_rank")), "--help")
    if verb in ("--help", "-h", "help"):
        print(help.overview())
    elif verb == "--version":
        print(f"lr2train {__version__}")
    elif verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        meant = f"did you mean {close[0]}?" if close else f"verbs are {', '.join(VERBS)}"
        print(f"lr2train: {verb!r} is no verb; {meant}", file=sys.stderr)
        sys.exit(door.EXIT_BAD_INPUT)
    else:
        sys.argv.remove(verb)
        sys.argv[0] = str(Path(__file__).with_name(f"{verb}.py"))  # as `python -m lr2train.VERB` has it
        with door.door(verb):  # Ctrl-C while torch is imported is a sentence too
            _run(verb)


def _run(verb: str) -> None:
    """The verb's module is imported last: help and refusals of a config come before the seconds that torch takes."""
    if verb not in READS:  # it reads no config
        return importlib.import_module(f"lr2train.{verb}").main()
    if config := door.configured(verb):
        module = importlib.import_module(f"lr2train.{verb}")
        getattr(module, "from_the_command_line", getattr(module, verb))(config)


if __name__ == "__main__":
    main()
