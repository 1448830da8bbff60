"""Whether what a run reads is what it was started with. Contents decide, not paths or times; the ranks share the reading.

Choice: files are read only where their sizes or times differ from what was noted, so a start costs nothing and a model that was copied or fetched
anew costs one reading. The first start reads the files once, which also brings them into memory for loading. Cost: a file that was changed under
the same size and time passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lr2train import io, ranks
from lr2train.config import UserError
from lr2train.parallel import control
from lr2train.run import Run


def identities(job: Run, known: Mapping[str, str], files: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """What ``Run.claim`` notes of a run's inputs. A collective.

    Args:
        job: the run.
        known: name -> fingerprint of inputs that have one of their own (a corpus, factors).
        files: name -> files of inputs that have none (a model folder).

    Raises:
        UserError: an input has other contents than those that the run was started with; on every rank.
    """
    looked = control.together(lambda: (job.noted_inputs(), {name: _stamps(paths) for name, paths in files.items()}))
    noted, stamps = looked[0]  # rank 0's: another machine may have a copy with other times
    found: dict[str, Any] = dict(known)
    for name, paths in files.items():
        before: dict[str, Any] = noted.get(name) or {}
        content = before["content"] if before.get("files") == stamps[name] else io.fingerprint(sorted(_checksums(paths).items()))
        found[name] = {"content": content, "files": stamps[name]}
    control.together(lambda: job.refuse_other_inputs(found) if _first() else None)
    return found


def _first() -> bool:
    return ranks.rank() == 0


def _stamps(paths: Sequence[Path]) -> dict[str, list[int]]:
    """Bytes and time of change of each file."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]} is missing, and the index of its folder names it; fetch the folder again")
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def _checksums(paths: Sequence[Path]) -> dict[str, str]:
    """Of every file by its name; each rank reads its share."""
    mine = list(paths)[ranks.rank() :: ranks.world()]
    told = control.together(lambda: {path.name: io.checksum(path) for path in mine})
    return {name: checksum for one in told for name, checksum in one.items()}
