"""The log's sealed files at the run's loggers: a log that is audited, and gone on with, where they arrived."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from composer.core import Callback
from composer.loggers import InMemoryLogger, LoggerDestination, RemoteUploaderDownloader
from tiny import TinyRun, write_stream

from udsstream import OnlineBatchSelection, SelectionLog
from udsstream.audit.run import audit
from udsstream.errors import ConfigError
from udsstream.mosaicml.log_upload import uploadable_files
from udsstream.selection_log import writer as writing


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> tuple[str, ...]:
    return (str(write_stream(tmp_path_factory.mktemp("streams") / "one")),)


class Folder(LoggerDestination):
    """Takes files as an object store does: by name, when they are handed over."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.taken: list[str] = []

    def upload_file(self, state, remote_file_name, file_path, *, overwrite):
        del state
        assert overwrite
        self.taken.append(remote_file_name)
        target = self.root / remote_file_name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file_path, target)

    def can_upload_files(self) -> bool:
        return True


def tiny(streams, folder, **more) -> TinyRun:
    settings = {"save_interval": "4ba", "autoresume": True, "selection": {"upload_log": True}} | more
    return TinyRun(streams=streams, folder=str(folder), **settings)


ROWS = ["step", "attempt", "sample_id", "score", "selected"]


def test_what_arrived_is_the_log(streams, tmp_path):
    folder = Folder(tmp_path / "remote")
    tiny(streams, tmp_path / "{braces}").run(loggers=[folder], max_duration="10ba")
    copy = tmp_path / "remote" / "tiny" / "selection_log"
    here, there = SelectionLog.open(tmp_path / "{braces}" / "log"), SelectionLog.open(copy)
    assert there.table().equals(here.table())
    report = audit(copy)
    assert report.findings == ()
    assert report.checked == audit(here.root).checked
    # Sealed at each checkpoint (before step 4, before 8) and at the end; run.json once.
    assert len([name for name in folder.taken if "/selection/r00000/a0-" in name]) == 3
    assert folder.taken.count("tiny/selection_log/run.json") == 1


def test_a_lost_machine_is_gone_on_from_what_arrived(streams, tmp_path):
    """Its disk is gone but for the checkpoint, which has a remote of its own; the copy reaches as far."""
    folder, run = Folder(tmp_path / "remote"), tiny(streams, tmp_path / "run")

    class Lost(Callback):
        def batch_end(self, state, logger):
            del logger
            for future in state.algorithms[0]._writer._seals:
                future.result()
            if state.timestamp.batch == 7:  # a checkpoint before step 4, and steps after it that were not sealed
                shutil.copytree(tmp_path / "remote" / "tiny" / "selection_log", tmp_path / "again" / "log")
                shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "again" / "checkpoints", symlinks=True)

    run.run(loggers=[folder], callbacks=[Lost()], max_duration="10ba")
    assert SelectionLog.open(tmp_path / "again" / "log").steps().tolist() == [0, 1, 2, 3, 4]
    weights = tiny(streams, tmp_path / "again").run(loggers=[Folder(tmp_path / "second")], max_duration="10ba")
    expected = tiny(streams, tmp_path / "whole", selection={}).run(max_duration="10ba")
    assert all((weights[name] == expected[name]).all() for name in expected)
    assert audit(tmp_path / "again" / "log").findings == ()
    assert audit(tmp_path / "second" / "tiny" / "selection_log").findings == ()


def test_training_does_not_wait_for_a_seal(streams, tmp_path, monkeypatch):
    """While a segment is being sealed nothing is handed over, and steps go on; it is handed over once it is done."""
    folder, run = Folder(tmp_path / "remote"), tiny(streams, tmp_path / "run")
    may_seal, seal = threading.Event(), writing.seal
    steps_before: list[int] = []

    def slow(*arguments):
        assert may_seal.wait(60)
        seal(*arguments)

    monkeypatch.setattr(writing, "seal", slow)
    trainer = run.trainer(loggers=[folder], max_duration="9ba")
    log = trainer.state.algorithms[0]
    decide = log._decide

    def watched(state):
        step = state.timestamp.batch.value
        if step == 7:
            steps_before.extend(range(4, 7))
            assert not [name for name in folder.taken if "a0-" in name]
            may_seal.set()
            for future in log._writer._seals:
                future.result()
        return decide(state)

    monkeypatch.setattr(log, "_decide", watched)
    trainer.fit()
    trainer.close()
    assert steps_before == [4, 5, 6]
    assert len([name for name in folder.taken if "/selection/r00000/a0-" in name]) == 2


def test_composer_s_uploader_takes_them(streams, tmp_path):
    (tmp_path / "store" / "bucket").mkdir(parents=True)
    uploader = RemoteUploaderDownloader(
        bucket_uri="libcloud://bucket",
        backend_kwargs={
            "provider": "local",
            "container": "bucket",
            "provider_kwargs": {"key": str(tmp_path / "store")},
        },
        use_procs=False,
        num_concurrent_uploads=1,
    )
    tiny(streams, tmp_path / "run").run(loggers=[uploader], max_duration="6ba")
    copy = tmp_path / "store" / "bucket" / "tiny" / "selection_log"
    assert audit(copy).findings == ()
    assert (
        SelectionLog.open(copy)
        .table(columns=ROWS)
        .equals(SelectionLog.open(tmp_path / "run" / "log").table(columns=ROWS))
    )


def test_without_a_logger_that_takes_files_it_is_refused(streams, tmp_path):
    with pytest.raises(ConfigError, match=r"no logger of this run takes files \(its loggers: InMemoryLogger\)"):
        tiny(streams, tmp_path, save_interval=None).run(loggers=[InMemoryLogger()])


def test_without_a_log_it_is_refused():
    with pytest.raises(ConfigError, match=r"upload_log: there is no log to upload; give a log_dir"):
        OnlineBatchSelection(upload_log=True)


def test_each_rank_has_its_own_files(tmp_path):
    paths = [
        "run.json",
        "timings.jsonl",
        "_heads/ba00000004.json",
        "_heads/ba00000004-a0.json",
        "_buffers/ba00000004-a0.arrow",
        "_buffers/ba00000004-a0.tmp",
        "parquet/selection.parquet",
    ]
    for rank in (0, 1):
        paths += [f"{table}/r{rank:05d}/a0-00000{n}.arrow" for table in ("selection", "pushes") for n in (0, 1)]
        for table in ("selection", "pushes"):
            paths += [f"_state/r{rank:05d}/{table}/{name}" for name in ("manifest.jsonl", "wal-000002.arrows")]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    of = [[path.relative_to(tmp_path).as_posix() for path in uploadable_files(tmp_path, rank)] for rank in (0, 1)]
    assert set(of[0]).isdisjoint(of[1])
    assert of[1] == [
        "selection/r00001/a0-000000.arrow",
        "selection/r00001/a0-000001.arrow",
        "_state/r00001/selection/manifest.jsonl",
        "pushes/r00001/a0-000000.arrow",
        "pushes/r00001/a0-000001.arrow",
        "_state/r00001/pushes/manifest.jsonl",
    ]
    left = {path for path in paths if path not in of[0] + of[1]}
    assert {name.rpartition("/")[2] for name in left} == {
        "ba00000004-a0.tmp",
        "selection.parquet",
        "wal-000002.arrows",
    }
