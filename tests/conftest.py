"""For every test: the oracles on the path, repeatable hypothesis, and a process that many streaming data sets do not fill up."""

from __future__ import annotations

import atexit
import contextlib
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# NumPy is only the oracle here, on small matrices; its threads and torch's would wait for each other (10× slower on 2 cores).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Streaming leaves lock files in the temporary folder and passes over the names that they stand for. (One of several processes of
# pytest-xdist finds the first one's folder set, and makes its own beside it: nested paths get too long for sockets.)
_beside = Path(os.environ["TMPDIR"]).parent if "PYTEST_XDIST_WORKER" in os.environ else None
os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="udsstream-tests-", dir=_beside)
tempfile.tempdir = None
atexit.register(shutil.rmtree, os.environ["TMPDIR"], ignore_errors=True)

import pytest  # noqa: E402 (the settings above must come first)
from hypothesis import settings  # noqa: E402

settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repeatable")

# A data set keeps a dozen files of shared memory open until its process ends.
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--llm-foundry", metavar="DIR", help="environment that tests/llm_foundry/environment.py made")


_blocks: list[Any] = []
"""The blocks of shared memory that this process has made or opened since the last test ended."""


@pytest.fixture(autouse=True)
def _shared_memory_is_given_back() -> Iterator[None]:
    """Removes the names of the test's blocks of shared memory, as the end of its process would.

    Otherwise each new data set would open a block of every one before it, and hundreds of them more files than a process may.
    """
    memory = sys.modules.get("streaming.base.shared.memory")
    if memory is not None and memory.BuiltinSharedMemory is not _recorded:
        _recorded.original = memory.BuiltinSharedMemory
        memory.BuiltinSharedMemory = _recorded
    yield
    for block, made_here in _blocks:
        with contextlib.suppress(FileNotFoundError, BufferError):
            block.unlink() if made_here else block.close()
    _blocks.clear()
    for lock in Path(os.environ["TMPDIR"]).glob("*_filelock"):
        lock.unlink()


def _recorded(name: str | None = None, create: bool = False, size: int = 0) -> Any:
    block = _recorded.original(name, create, size)
    _blocks.append((block, create))
    return block


_iterators: list[Any] = []
"""Streaming's states of the epochs that this process has begun since the last test ended."""


@pytest.fixture(autouse=True)
def _epochs_are_ended() -> Iterator[None]:
    """Ends the threads of epochs that the test did not iterate to their end, as the end of its process would.

    They look every 7 ms whether to go on: after two files of tests that was 40% of a core, after all of them most of the time.
    """
    module = sys.modules.get("streaming.base.dataset")
    if module is not None and module._Iterator is not _recorded_iterator:
        _recorded_iterator.original = module._Iterator
        module._Iterator = _recorded_iterator
    yield
    for iterator in _iterators:
        iterator.non_blocking_exit()
    _iterators.clear()
    names = sys.modules.get("torch.distributed.checkpoint.state_dict")
    if names is not None:
        names._get_fqns.cache_clear()  # has models as keys, and through them whole Trainers: gigabytes by the end


def _recorded_iterator(sample_ids: Any) -> Any:
    iterator = _recorded_iterator.original(sample_ids)
    _iterators.append(iterator)
    return iterator


# A training job from a configuration file (tests/jobs.py) ------------------------------------------------------------------


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    import jobs

    return jobs.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    import jobs

    return jobs.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config_file(model, data, tmp_path) -> Path:
    import jobs

    return jobs.write_config(tmp_path, model, data)
