"""Run a test's body on several real ranks: processes, gloo, no network port.

    def body(rank: int, world: int, n: int) -> int:              # a top-level function of the test module
        total = torch.tensor([n + rank])
        dist.all_reduce(total)                                   # torch.distributed is ready, with torch on one thread
        return total.item()

    def test_sum(tmp_path):
        assert run_ranks(body, 2, 10, tmp_path=tmp_path) == [21, 21]

Choice: processes fork from a server that has imported torch, transformers, DeepSpeed and the verbs once, so that the
first launch of a session takes seconds and the next a tenth of one. The server computes nothing, which is what makes
forking from it safe. Cost: a module that it has not imported (`PRELOAD`) is imported by every rank anew, so several
checks over such a module belong in one launch.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2")
PRELOAD = [
    "torch.distributed",
    "transformers.modeling_utils",
    *(f"transformers.models.{family}.modeling_{family}" for family in FAMILIES),
    "deepspeed.runtime.zero.stage3",
    # imported with the first optimizer, and with it torch's compiler: seconds
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "hypothesis",
    "pytest",
    "hydra.compose",
    "lr2train.train",
    "lr2train.search",
    "lr2train.evaluate",
]
_GRACE_S = 2.0  # after one rank failed: its peers lose their connection and write down their own end


class RankError(AssertionError):
    """One or more ranks failed; the text has the traceback of each, the one that failed first on top."""


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, tmp_path: Path, timeout_s: float = 60.0) -> list[Any]:
    """Call ``fn(rank, world, *args)`` on ``world`` ranks and return what they returned, in order of rank.

    ``fn`` is a top-level function of a module; it, ``args`` and the returned values are pickled (tensors by value).
    ``torch.distributed``
    is initialised (gloo, through a file under ``tmp_path``) and torch runs on one thread. Raises RankError with every
    failed rank's
    traceback; the ranks that would wait for a failed one are ended. A launch that takes longer than ``timeout_s`` is
    ended and raises
    TimeoutError.
    """
    folder = Path(tempfile.mkdtemp(dir=tmp_path, prefix="ranks_"))
    context = forking()
    body = pickle.dumps((fn, args, dict(os.environ)))
    ranks = [context.Process(target=_rank, args=(rank, world, folder, body), daemon=True) for rank in range(world)]
    for process in ranks:
        process.start()
    try:
        _join(ranks, timeout_s)
    finally:
        _end(ranks)
    _raise_failures(ranks, folder, fn.__name__)
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world)]


def forking() -> ForkServerContext:
    """What processes are made with: it forks them from the server, which is started here if need be."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with mock.patch.dict(
        os.environ, DS_ACCELERATOR="cpu"
    ):  # or DeepSpeed touches the GPU when imported, and such a server must not fork
        forkserver.ensure_running()
    return context


def _rank(rank: int, world: int, folder: Path, body: bytes) -> None:
    try:
        import torch  # here, so that the parent need not import torch
        import torch.distributed as dist

        fn, args, environ = pickle.loads(body)
        os.environ.update(environ)  # of the caller, now: the server kept what it was when it started
        torch.set_num_threads(1)
        gc.freeze()  # DeepSpeed collects garbage with every engine: it need not go through what the server imported
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
        result = fn(rank, world, *args)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
        dist.barrier()  # nobody leaves while a peer may still read from it
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def _join(ranks: Sequence[BaseProcess], timeout_s: float) -> None:
    """Return when all ranks have ended, or soon after one has failed."""
    deadline = time.monotonic() + timeout_s
    failed = False
    while running := [process.sentinel for process in ranks if process.is_alive()]:
        if not wait(running, timeout=max(0.0, deadline - time.monotonic())):
            if failed:
                return
            raise TimeoutError(f"{len(running)} of {len(ranks)} ranks are still running after {timeout_s} s")
        if not failed and any(process.exitcode for process in ranks):
            failed, deadline = True, min(deadline, time.monotonic() + _GRACE_S)


def _end(ranks: Sequence[BaseProcess]) -> None:
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()


def _raise_failures(ranks: Sequence[BaseProcess], folder: Path, name: str) -> None:
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    texts = [f"rank {path.stem} of {name}:\n{path.read_text()}" for path in errors]
    if not texts and any(process.exitcode for process in ranks):
        texts = [f"ranks of {name} ended with exit codes {[process.exitcode for process in ranks]} and no traceback"]
    if texts:
        raise RankError("\n".join(texts))
