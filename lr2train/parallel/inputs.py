"""Check that a run's inputs have the contents of its first start. Paths and times do not matter; the ranks share the
reading.

Choice: a file is read only where its size or time differs from the noted one. So a usual start reads nothing, and a
copied or newly fetched model is read once. The first start reads all files, which also brings them into the page cache
for loading. Cost: a file that was changed under the same size and time is not noticed.
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
    """The identities of a run's inputs, in the form that ``Run.claim`` takes. A collective.

    Args:
        job: the run.
        known: name -> fingerprint, of inputs with a fingerprint of their own (a corpus, factors).
        files: name -> files, of inputs without one (a model folder).

    Raises:
        UserError: a file is missing, or an input has other contents than at the first start; on every rank.
    """
    looked = control.together(lambda: (job.noted_inputs(), {name: _stamps(paths) for name, paths in files.items()}))
    noted, stamps = looked[0]  # rank 0's on every rank: another machine may have a copy with other times
    found: dict[str, Any] = dict(known)
    for name, paths in files.items():
        before: dict[str, Any] = noted.get(name) or {}
        content = (
            before["content"]
            if before.get("files") == stamps[name]
            else io.fingerprint(sorted(_checksums(paths).items()))
        )
        found[name] = {"content": content, "files": stamps[name]}
    control.together(lambda: job.refuse_other_inputs(found) if ranks.rank() == 0 else None)
    return found


def _stamps(paths: Sequence[Path]) -> dict[str, list[int]]:
    """File name -> [bytes, time of the last change in ns]."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]} is missing, and the index of its folder names it; fetch the folder again")
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def _checksums(paths: Sequence[Path]) -> dict[str, str]:
    """File name -> checksum; each rank reads its share of the files."""
    mine = list(paths)[ranks.rank() :: ranks.world()]
    told = control.together(lambda: {path.name: io.checksum(path) for path in mine})
    return {name: checksum for one in told for name, checksum in one.items()}
