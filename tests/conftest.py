"""Tests are many small products: threads would only wait for each other."""

import gc
import os
import signal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when numpy is imported

from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import settings

# The same examples in every run, and no limit of time: a busy machine is no fault of the code.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_finish():
    """The imported libraries stay. The garbage collector took a fifth of a config's composition to look at them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_signal_handlers():
    """A verb sets handlers for the process that it ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def no_trace_of_a_job():
    """A verb joins a process group and tells DeepSpeed so in the environment; other tests start jobs of their own."""
    from lr2train.parallel import processes

    with mock.patch.dict(os.environ):
        yield
        processes.stop()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with the corpus and the base model of ``tiny``; a module may add to it."""
    import tiny

    folder = tmp_path_factory.mktemp("world")
    tiny.make_corpus(folder)
    tiny.make_model(folder / "base")
    return folder
