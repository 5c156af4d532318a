"""Real runs, with Composer and Streaming: what they log passes the audit, data and checkpoints included; what was changed does not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import MDSWriter, Stream
from tiny import TinyRun, collate, write_stream
from torch.utils.data import DataLoader

from udsstream import UDSStreamingDataset
from udsstream.audit.report import AuditReport
from udsstream.audit.run import audit
from udsstream.errors import ConfigError, ResumeError
from udsstream.selection_log.reader import SelectionLog


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Two streams, 83 samples together: 11 batches of 8 an epoch, the last one of 3."""
    root = tmp_path_factory.mktemp("streams")
    return (
        str(write_stream(root / "one", samples=50, seed=1)),
        str(write_stream(root / "two", samples=33, seed=2)),
    )


@pytest.fixture(scope="module")
def full(streams: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """25 steps with every embedding kept, and checkpoints at 10 and 20."""
    run = TinyRun(
        streams=streams,
        folder=str(tmp_path_factory.mktemp("full")),
        save_interval="10ba",
        selection={"embeddings": "full"},
    )
    run.run()
    return run


def checkpoint(run: TinyRun, name: str) -> Path:
    return Path(run.folder) / "checkpoints" / f"{name}-rank0.pt"


def log_of(run: TinyRun) -> Path:
    return Path(run.folder) / "log"


def checks(report: AuditReport) -> set[str]:
    return {finding.check for finding in report.findings}


def test_a_real_run_is_intact_data_and_checkpoint_included(full: TinyRun) -> None:
    report = audit(log_of(full), data=True, checkpoint=checkpoint(full, "ep1-ba20"))
    assert report.findings == ()
    assert report.steps == 25
    assert report.anchor is not None
    assert (report.anchor.step, report.anchor.covers, report.anchor.attempt) == (20, 20, 0)
    assert "5 of 25 steps were written later" in report.verdict
    text = "\n".join(report.checked)
    assert "after 48 of 48 pushes" in text
    assert "48 of 48 kept candidates' against the distance" in text
    assert "coverage: 2 finished epochs of 2 streams" in text
    assert "2 of 2 streams, their indexes and the" in text
    assert not any("shard files" in note for note in report.unchecked)


@pytest.mark.parametrize(
    "selection",
    [
        {"method": "random"},
        {"method": "uds_inter", "embeddings": "full"},
        {"method": "max_loss"},
        {"method": "longest"},
        {"interrupt": 3, "start": "2ba"},
        {"start": "20sp", "end": "0.6dur", "keep": 3},
        {"start": "60tok", "length_norm": "sqrt"},
        {"buffer_size": 1000, "projection_scale": "reference"},
    ],
    ids=lambda selection: selection.get("method") or next(iter(selection)),
)
def test_other_settings_are_too(selection: dict[str, Any], streams: tuple[str, ...], tmp_path: Path) -> None:
    run = TinyRun(streams=streams, folder=str(tmp_path), save_interval="10ba", selection=selection)
    run.run()
    report = audit(log_of(run), checkpoint=checkpoint(run, "ep0-ba10"))
    assert report.findings == ()
    assert report.anchored


def test_a_resumed_run_and_one_that_takes_its_memory_over_are_intact(streams: tuple[str, ...], tmp_path: Path) -> None:
    """Saved at 4, 8, …; ended at 9; resumed at 8, with workers; then another run begins with its memory."""
    (tmp_path / "a").mkdir()
    first = TinyRun(streams=streams, folder=str(tmp_path / "a"), save_interval="4ba", autoresume=True, duration="9ba")
    first.run()
    shutil.rmtree(checkpoint(first, "ep0-ba9"), ignore_errors=True)
    checkpoint(first, "ep0-ba9").unlink(missing_ok=True)
    latest = Path(first.folder) / "checkpoints" / "latest-rank0.pt"
    latest.unlink()
    latest.symlink_to(checkpoint(first, "ep0-ba8"))
    second = dataclasses.replace(first, duration="25ba", workers=2)
    second.run()
    report = audit(log_of(second), data=True, checkpoint=checkpoint(second, "ep1-ba20"))
    assert report.findings == ()
    assert (report.steps, report.attempts) == (25, 2)
    assert report.rows == 190 + 8
    older = audit(log_of(second), checkpoint=checkpoint(second, "ep0-ba4"))
    assert older.findings == ()
    assert older.anchor is not None
    assert older.anchor.covers == 4

    heir = TinyRun(
        streams=streams,
        folder=str(tmp_path / "b"),
        duration="12ba",
        save_interval="6ba",
        selection={"warm_start": str(log_of(second)), "embeddings": "full"},
    )
    heir.run()
    report = audit(log_of(heir), checkpoint=checkpoint(heir, "ep1-ba12"))
    assert report.findings == ()
    assert any("taken over" in note for note in report.unchecked)
    assert any("after 36 of 36 pushes" in sentence for sentence in report.checked), "13 of them taken over"


@pytest.mark.parametrize(("workers", "drop_last"), [(0, False), (2, True)])
def test_a_data_set_of_many_canonical_nodes_is_not_accused(workers: int, drop_last: bool, tmp_path: Path) -> None:
    """It repeats samples to divide an epoch evenly, and as many others miss its end."""
    stream = write_stream(tmp_path / "one", samples=300, longest=6)
    run = TinyRun(streams=(str(stream),), folder=str(tmp_path), duration="2ep", selection={"method": "random"})
    dataset = UDSStreamingDataset(
        streams=[Stream(local=str(stream))], shuffle=True, batch_size=8, num_canonical_nodes=64
    )
    loader = DataLoader(
        dataset,
        batch_size=8,
        collate_fn=collate,
        num_workers=workers,
        drop_last=drop_last,
        timeout=60 if workers else 0,
        multiprocessing_context="fork" if workers else None,
    )
    trainer = run.trainer(train_dataloader=loader)
    trainer.fit()
    trainer.close()
    report = audit(log_of(run))
    assert report.findings == ()
    offered = SelectionLog.open(log_of(run)).table(columns=["epoch", "sample_id"]).to_pandas()
    assert offered[offered.epoch == 0].sample_id.nunique() < 300 - 8


# -- checkpoints ---------------------------------------------------------------------------------------------------------


def edited(source: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A checkpoint with another selection state."""
    content = torch.load(source, weights_only=False)
    algorithms = content["state"]["algorithms"]
    state = (
        dict(algorithms)["OnlineBatchSelection"]
        if not isinstance(algorithms, dict)
        else algorithms["OnlineBatchSelection"]
    )
    change(state)
    torch.save(content, target)
    return target


def other_vectors(state: dict[str, Any]) -> None:
    rows = state["memory"]["rows"].clone()
    rows[-1, 0] += 1
    state["memory"]["rows"] = rows


@pytest.mark.parametrize(
    ("change", "check", "words"),
    [
        (
            lambda s: s["log"].update(merkle_root=bytes(32)),
            "anchor",
            "the Merkle root before step 20 should be 0000000000000000",
        ),
        (lambda s: s["log"].update(run_id="another"), "checkpoint", "it belongs to run another, but the log is of run"),
        (lambda s: s["config"].update(keep=0.5), "checkpoint", "keep: was 0.25, is 0.5"),
        (lambda s: s["streams"][1].__setitem__(1, "00" * 32), "checkpoint", "are not those of run.json"),
        (lambda s: s["memory"].update(pushed=40), "checkpoint", "pushed is 40, but by the pushes before step 20"),
        (lambda s: s["memory"].update(digest=bytes(32)), "checkpoint", "digest is 0000000000000000, but"),
        (lambda s: s["memory"].update(rows=s["memory"]["rows"][1:]), "checkpoint", "its memory holds 12 vectors"),
        (lambda s: s.update(step=30), "anchor", "the log ends after step 24"),
        (lambda s: s.update(world_size=2), "checkpoint", "made by 2 ranks, but has 1 heads"),
    ],
)
def test_a_checkpoint_that_says_otherwise(
    change: Callable[[dict[str, Any]], Any], check: str, words: str, full: TinyRun, tmp_path: Path
) -> None:
    path = edited(checkpoint(full, "ep1-ba20"), tmp_path / "edited.pt", change)
    report = audit(log_of(full), checkpoint=path)
    assert [finding.check for finding in report.findings if words in finding.message] == [check]


def test_other_vectors_in_a_checkpoint_are_found_where_the_log_has_none(
    streams: tuple[str, ...], tmp_path: Path
) -> None:
    run = TinyRun(
        streams=streams, folder=str(tmp_path), duration="4ba", save_interval="4ba", selection={"embeddings": "tail"}
    )
    run.run()
    shutil.rmtree(log_of(run) / "_buffers")
    saved = checkpoint(run, "ep0-ba4")
    assert audit(log_of(run), checkpoint=saved).findings == ()
    report = audit(log_of(run), checkpoint=edited(saved, tmp_path / "edited.pt", other_vectors))
    assert {(finding.check, finding.step) for finding in report.findings} >= {("digest", 3)}
    assert "the vectors in" in report.findings[0].message


def test_a_checkpoint_of_another_run_is_found(full: TinyRun, streams: tuple[str, ...], tmp_path: Path) -> None:
    other = TinyRun(streams=streams, folder=str(tmp_path), duration="10ba", save_interval="10ba")
    other.run()
    report = audit(log_of(full), checkpoint=checkpoint(other, "ep0-ba10"))
    assert checks(report) == {"anchor", "checkpoint"}
    assert not report.anchored


def test_a_log_that_was_cut_is_found_by_a_checkpoint(full: TinyRun, tmp_path: Path) -> None:
    """As if the run had ended, in good order, after 10 steps."""
    shutil.copytree(log_of(full), tmp_path / "log")
    shorter = TinyRun(
        streams=full.streams, folder=str(tmp_path / "short"), duration="10ba", selection={"embeddings": "full"}
    )
    shorter.run()
    run_id = json.loads((log_of(full) / "run.json").read_text())["run_id"]
    assert run_id != json.loads((log_of(shorter) / "run.json").read_text())["run_id"]
    report = audit(log_of(shorter), checkpoint=checkpoint(full, "ep1-ba20"))
    assert checks(report) == {"anchor", "checkpoint"}
    assert any("its end was cut off" in finding.message for finding in report.findings)


def test_what_is_no_checkpoint_of_a_selecting_run_is_an_error(
    streams: tuple[str, ...], full: TinyRun, tmp_path: Path
) -> None:
    plain = TinyRun(streams=streams, folder=str(tmp_path), duration="4ba", save_interval="4ba", selection=None)
    plain.run()
    with pytest.raises(ResumeError, match="holds no word on a selection log"):
        audit(log_of(full), checkpoint=checkpoint(plain, "ep0-ba4"))
    with pytest.raises(ResumeError, match="no such checkpoint"):
        audit(log_of(full), checkpoint=tmp_path / "none.pt")
    for change in (
        lambda s: s["log"].update(heads=[b"x"]),
        lambda s: s["memory"].update(rows=3),
        lambda s: s.update(step="x"),
    ):
        path = edited(checkpoint(full, "ep1-ba20"), tmp_path / "odd.pt", change)
        with pytest.raises(ResumeError, match="is not what udsstream writes"):
            audit(log_of(full), checkpoint=path)


# -- data ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def moved(full: TinyRun, tmp_path: Path) -> dict[str, str]:
    """Copies of the streams, to be changed."""
    places = {}
    for stream in full.streams:
        name = Path(stream).name
        shutil.copytree(stream, tmp_path / "moved" / name)
        places[name] = str(tmp_path / "moved" / name)
    return places


def shards(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("shard.*"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def first_offered(run: TinyRun, stream: int, shard: int) -> int:
    table = SelectionLog.open(log_of(run)).table(columns=["step", "stream", "shard"])
    here = (table["stream"].to_numpy() == stream) & (table["shard"].to_numpy() == shard)
    return int(table["step"].to_numpy()[here].min())


def edit_index(folder: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = Path(folder) / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_moved_streams_are_found_where_they_are_said_to_be(full: TinyRun, moved: dict[str, str]) -> None:
    assert audit(log_of(full), data=True, streams=moved).findings == ()
    with pytest.raises(ConfigError, match=r"--stream three: run\.json names no such stream; it has one, two"):
        audit(log_of(full), data=True, streams={"three": moved["one"]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip, "has the sha1"),
        (Path.unlink, "cannot be read (No such file or directory)"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, but the index records"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    ],
    ids=["flipped", "deleted", "cut", "a folder"],
)
def test_a_shard_that_was_changed_is_named(
    change: Callable[[Path], Any], words: str, full: TinyRun, moved: dict[str, str]
) -> None:
    change(shards(moved["two"])[1])
    (finding,) = audit(log_of(full), data=True, streams=moved).findings
    assert (finding.check, finding.step) == ("data-shards", first_offered(full, 1, 1))
    assert "stream 1 (two), shard 1: " in finding.message
    assert words in finding.message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda index: index["shards"][0]["raw_data"]["hashes"].update(sha1="00" * 20), {"data-index", "data-shards"}),
        (lambda index: index["shards"].reverse(), {"data-index", "data-samples"}),
        (lambda index: index["shards"].pop(), {"data-index", "data-samples"}),
        (lambda index: index.update(version=3), {"data-index"}),
        (lambda index: index["shards"][0]["raw_data"].update(basename="../one/shard.00000.mds"), {"data-index"}),
        (lambda index: index["shards"][0]["raw_data"].update(basename="/etc/passwd"), {"data-index"}),
        (lambda index: index["shards"][0].update(samples=-1), {"data-index"}),
        (lambda index: index.update(shards={"a": 1}), {"data-index"}),
    ],
)
def test_an_index_that_was_edited_is_found(
    change: Callable[[dict[str, Any]], Any], expected: set[str], full: TinyRun, moved: dict[str, str]
) -> None:
    edit_index(moved["two"], change)
    report = audit(log_of(full), data=True, streams=moved)
    assert checks(report) == expected
    assert "the stream was rebuilt, or its index was edited" in report.findings[0].message


def test_a_stream_that_is_not_here_is_said(full: TinyRun, moved: dict[str, str], tmp_path: Path) -> None:
    (finding,) = audit(log_of(full), data=True, streams={"two": str(tmp_path / "nowhere")}).findings
    assert finding.check == "data-index"
    assert "give --stream two=PATH" in finding.message
    report = audit(log_of(full), data=True, streams={"two": "s3://bucket/two"})
    assert report.findings == ()
    assert any("stream two: it is at s3://bucket/two; give a local copy" in note for note in report.unchecked)
    (Path(moved["two"]) / "index.json").write_bytes(b"not JSON")
    assert checks(audit(log_of(full), data=True, streams=moved)) == {"data-index"}


@pytest.mark.parametrize("hashes", [["xxh64"], ["md5", "sha256"], []], ids=str)
@pytest.mark.parametrize("compression", [None, "gz"])
def test_other_digests_and_compressed_shards(
    hashes: list[str], compression: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming's own writer and digests; a shard that lies there compressed alone is checked as that."""
    stream = tmp_path / "stream"
    rng = np.random.default_rng(0)
    with MDSWriter(
        out=str(stream),
        columns={"input_ids": "ndarray:int64"},
        hashes=hashes,
        compression=compression,
        size_limit=2048,
    ) as writer:
        for _ in range(40):
            writer.write({"input_ids": rng.integers(3, 97, size=rng.integers(3, 25))})
    settings = {"selection": {"embeddings": "none"}, "duration": "6ba"}
    local = stream
    if compression is not None:  # Streaming unpacks beside what it reads; the original is kept for the audit
        local = tmp_path / "local"
        shutil.copytree(stream, local)
    run = TinyRun(streams=(str(local),), folder=str(tmp_path / "run"), **settings)
    run.run()
    places = {"stream" if compression is None else "local": str(stream)}
    report = audit(log_of(run), data=True, streams=places)
    assert report.findings == ()
    assert any("only sizes" in note for note in report.unchecked) == (not hashes)
    assert len(shards(str(stream))) > 1
    data = next(path for path in shards(str(stream)))
    changed = bytearray(data.read_bytes())
    changed[-1] ^= 1
    data.write_bytes(bytes(changed))
    assert checks(audit(log_of(run), data=True, streams=places)) == ({"data-shards"} if hashes else set())
    if hashes == ["xxh64"]:
        monkeypatch.setitem(__import__("sys").modules, "xxhash", None)
        report = audit(log_of(run), data=True, streams=places)
        assert report.findings == ()
        assert any("'xxh64'" in note and "needs the package xxhash" in note for note in report.unchecked)


def test_the_index_is_the_one_that_the_run_saw(full: TinyRun) -> None:
    recorded = SelectionLog.open(log_of(full)).run["streams"]
    for stream, folder in zip(recorded, full.streams, strict=True):
        assert stream["index_sha256"] == hashlib.sha256((Path(folder) / "index.json").read_bytes()).hexdigest()
