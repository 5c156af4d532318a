"""`udsstream curate --score`: from a stream and a model to a data set and its record; killed, gone on with, refused."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shlex
import signal
import sys
from pathlib import Path

import jobs
import launch
import pytest
import torch
import yaml
from jobs import udsstream
from streaming import MDSWriter

from udsstream import SelectionLog
from udsstream.audit.run import audit
from udsstream.errors import ConfigError, DataError, ModelError, OutputExistsError, ResumeError
from udsstream.scoring_config import load_scoring_config
from udsstream.scoring_job import score_and_curate

SMALL = ["max_seq_len=32", "selection.projection_dims=[8,4]", "selection.buffer_size=16", "window=10", "device=cpu"]
QUICK = [*SMALL, "data.num_workers=0", "anchor_seconds=0", "progress_bar=false"]


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(out.glob("data/*.jsonl")) for line in path.read_text().splitlines()]


def data_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("data/*")}


@pytest.fixture(scope="module")
def done(model, data, tmp_path_factory) -> Path:
    """A finished job on one rank, without interruption: the folder that holds `out` and `out-run`."""
    root = tmp_path_factory.mktemp("done")
    run_job(root, model, data)
    return root


def run_job(root: Path, model: str, data: Path, *overrides: str, stream: str = "train", **places) -> object:
    from udsstream.curate.write import Output

    torch.set_num_threads(1)  # as in `Command`: sums round as the number of threads has it
    config = load_scoring_config(None, [*QUICK, *overrides], score=str(data / stream), model=model, keep=0.2)
    return score_and_curate(config, root / "out", output=Output(format="jsonl"), **places)


def test_a_stream_is_scored_and_its_best_part_written(model, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["curate", "--score", str(data / "train"), "--model", model, "--keep", "0.2", "--out", str(out)]
    code, printed, err = udsstream(monkeypatch, capsys, *arguments, "--format", "jsonl", *SMALL)
    assert code == 0, err
    assert "Kept 10 of 48 scored samples" in printed
    assert "Disabling parallelism" not in err
    log = SelectionLog.open(tmp_path / "out-run")
    assert [len(log.selected(step)) for step in log.steps()] == [2, 2, 2, 2, 2]  # of 10, 10, 10, 10 and 8
    chosen = [sample for step in log.steps() for sample in log.selected(step)]
    rows = rows_of(out)
    assert [row["uds_sample_id"] for row in rows] == chosen
    assert {row["uds_stream"] for row in rows} == {"animals", "numbers"}
    assert all(row["prompt"] in jobs.SENTENCES for row in rows)
    assert log.run["job"]["kind"] == "scoring"
    assert json.loads((tmp_path / "out-run" / "scoring.json").read_text()) == {"samples": 48, "kept": 10, "windows": 5}
    assert audit(tmp_path / "out-run", data=True).findings == ()
    described = (out / "croissant.json").read_text()
    assert log.run["run_id"] in described
    code, _, err = udsstream(monkeypatch, capsys, *arguments, "--format", "jsonl", *SMALL)
    assert code == 1
    assert "out is not empty" in err
    for command in ("log", "report"):
        assert udsstream(monkeypatch, capsys, command, str(tmp_path / "out-run"))[0] == 0


def test_nothing_is_called_trained_on(done, monkeypatch, capsys):
    for question, said in [
        ((), "tokens chosen"),
        (("--until", "ba2"), "Before step 2 the scoring pass chose 4 samples"),
    ]:
        code, shown, _ = udsstream(monkeypatch, capsys, "log", str(done / "out-run"), *question)
        assert code == 0
        assert said in shown
        assert "trained" not in shown
    card = (done / "out" / "README.md").read_text()
    assert "how often it was chosen" in card
    assert "trained" not in card
    assert "\n1 shard, " in card


def test_settings_from_a_file(model, data, tmp_path, monkeypatch, capsys):
    settings = {
        "model": {"name": model},
        "data": {"streams_root": str(data / "train"), "shuffle": False, "num_workers": 0},
        "selection": {"keep": 3, "projection_dims": [8, 4]},
        "max_seq_len": 32,
        "window": 16,
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["--config", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "out"), "--format", "parquet"]
    run = ["--run", str(tmp_path / "record")]
    code, out, err = udsstream(monkeypatch, capsys, "curate", *arguments, *run, "window=24", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["samples"], found["kept"], found["windows"], found["curated"]["samples"]) == (48, 6, 2, 6)
    assert found["samples_per_second"] > 0
    log = SelectionLog.open(tmp_path / "record")
    assert log.table(columns=["sample_id"])["sample_id"].to_pylist() == list(range(48))  # in their order
    assert log.run["job"]["order"] == "sequential"


def test_a_remote_stream_is_fetched_once_for_both(model, data, tmp_path, monkeypatch):
    """The bucket is a folder here, behind Streaming's own way to fetch from one."""
    from streaming.base import stream
    from streaming.base.storage.download import LocalDownloader

    from udsstream.curate.write import Output

    fetched: list[str] = []

    class Bucket(LocalDownloader):
        def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
            fetched.append(local)
            super()._download_file_impl(remote.replace("s3://bucket", str(data)), local, timeout)

        def _validate_remote_path(self, *arguments: object) -> None:
            pass

    monkeypatch.setattr(stream.CloudDownloader, "get", classmethod(lambda cls, remote=None: Bucket()))
    config = load_scoring_config(None, QUICK, score="s3://bucket/train/animals", model=model, keep=0.2)
    result = score_and_curate(config, tmp_path / "out", output=Output(format="mds"))
    assert result is not None
    assert (result.samples, result.kept) == (30, 6)
    shards = [Path(local).name for local in fetched if local.endswith(".mds")]
    assert sorted(shards) == sorted(path.name for path in (data / "train" / "animals").glob("*.mds"))
    assert not (tmp_path / "out-run" / "cache").exists()
    assert SelectionLog.open(tmp_path / "out-run").run["streams"][0]["location"] == "s3://bucket/train/animals"


def test_a_remote_that_nobody_can_fetch_from(model, data, tmp_path):
    config = load_scoring_config(None, QUICK, score="ftp7://bucket/train", model=model)
    from udsstream.curate.write import Output

    with pytest.raises(DataError, match=r"data\.streams\.0: Streaming cannot fetch from ftp7://bucket/train"):
        score_and_curate(config, tmp_path / "out", output=Output(format="mds"))


# Killed, and on several ranks ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Command:
    """A command on each rank; picklable."""

    arguments: tuple[str, ...]
    die_at: str | None = None
    """Kill this process when it is about to write this file."""

    def __call__(self) -> None:
        import udsstream.curate.write as write
        from udsstream import cli

        torch.set_num_threads(1)
        if self.die_at is not None:
            replace, die_at = write.replace_file, self.die_at

            def dying(path: Path, content: bytes) -> None:
                if path.name == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(path, content)

            write.replace_file = dying
        sys.argv = ["udsstream", *self.arguments]
        cli.main()


def command(root: Path, model: str, data: Path) -> tuple[str, ...]:
    out = str(root / "out")
    options = ["--score", str(data / "train"), "--model", model, "--keep", "0.2", "--out", out, "--format", "jsonl"]
    return ("curate", *options, *QUICK)


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_gives_the_same_data(model, data, done, tmp_path):
    processes, moments = launch.forkserver(), random.Random(1)
    job = Command(command(tmp_path, model, data))
    (process,) = launch.start(processes, 1, job)
    process.join(moments.uniform(2, 6))
    process.kill()
    process.join()
    # And when all is scored, while it is written.
    dying = dataclasses.replace(job, die_at="croissant.json")
    if not (tmp_path / "out").exists() or (tmp_path / "out" / "_job").exists():
        assert launch.finish(launch.start(processes, 1, dying)) == [-signal.SIGKILL]
        assert (tmp_path / "out" / "_job").exists()
        before = SelectionLog.open(tmp_path / "out-run").heads()
        assert launch.finish(launch.start(processes, 1, job)) == [0]
        assert SelectionLog.open(tmp_path / "out-run").heads() == before  # a finished record is left as it stands
    assert data_of(tmp_path / "out") == data_of(done / "out")
    ours, theirs = (SelectionLog.open(root / "out-run").table().drop_columns(["attempt"]) for root in (tmp_path, done))
    assert ours.equals(theirs)
    assert audit(tmp_path / "out-run", data=True).findings == ()


@pytest.mark.slow
def test_two_ranks_from_the_command_line(model, data, done, tmp_path):
    job = Command(command(tmp_path, model, data))
    assert launch.finish(launch.start(launch.forkserver(), 2, job)) == [0, 0]
    ours, theirs = (rows_of(root / "out") for root in (tmp_path, done))
    assert [row["uds_sample_id"] for row in ours] == [row["uds_sample_id"] for row in theirs]
    assert audit(tmp_path / "out-run", data=True).findings == ()
    assert launch.finish(launch.start(launch.forkserver(), 2, job)) == [1, 1]  # the output is there


# What it refuses ----------------------------------------------------------------------------------------------------------


def test_other_settings_do_not_go_on_with_a_record(model, data, done, tmp_path):
    import shutil

    shutil.copytree(done / "out-run", tmp_path / "out-run")
    with pytest.raises(ResumeError, match=r"data\.loss_on: was 'response', is 'all'\n  window: was 10, is 12"):
        run_job(tmp_path, model, data, "window=12", "data.loss_on=all")
    with pytest.raises(ResumeError, match=r"number of streams: was 2, is 1"):
        run_job(tmp_path, model, data, stream="train/animals")
    other = jobs.write_model(tmp_path / "model")  # the same architecture, drawn anew
    with pytest.raises(ResumeError, match=r"model\.name: was .*\n  weights_sha256: was "):
        run_job(tmp_path, other, data)
    run_job(tmp_path, model, data)  # an output that was deleted is written again, without scoring
    assert data_of(tmp_path / "out") == data_of(done / "out")


def test_an_output_that_is_not_empty_is_refused_before_anything_is_scored(model, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("?")
    with pytest.raises(OutputExistsError, match=r"out is not empty: it holds mine\.txt"):
        run_job(tmp_path, model, data)
    assert not (tmp_path / "out-run").exists()
    (tmp_path / "out" / "mine.txt").rename(tmp_path / "out" / "_job")
    with pytest.raises(OutputExistsError, match=r"holds another job, unfinished"):
        run_job(tmp_path, model, data)


def test_a_stream_without_text_is_refused_and_leaves_nothing(model, tmp_path):
    with MDSWriter(out=str(tmp_path / "data" / "train"), columns={"number": "int"}) as writer:
        writer.write({"number": 3})
    with pytest.raises(
        DataError, match=r"data.streams.0: \S+train has none of the known forms: its columns are 'number'"
    ):
        run_job(tmp_path, model, tmp_path / "data")
    assert not (tmp_path / "out-run").exists()
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_loaded(model, data, tmp_path):
    with pytest.raises(ModelError, match=r"model\.name='/nowhere': cannot be loaded"):
        run_job(tmp_path, "/nowhere", data)
    with pytest.raises(DataError, match=r"nowhere holds no index\.json"):
        run_job(tmp_path, model, data, stream="nowhere")
    assert not (tmp_path / "out-run").exists()


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["windw=3"], "windw: unknown key"),
        (["model.lora.r=4"], "model.lora: nothing is trained here"),
        (["selection.warm_start=x"], "selection.warm_start: unknown"),
        (["data.batch_size=4"], "data.batch_size: unknown key"),
        (["data.num_canonical_nodes=2"], "num_canonical_nodes: a scoring pass reads each sample once"),
        (["selection.keep=1.5"], "keep: the fraction 1.5 is not in (0, 1]"),
    ],
)
def test_mistakes_in_settings_are_named(overrides, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        load_scoring_config(None, overrides, score="stream", model="model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--score s --from-log r --out o --format mds", "give exactly one source"),
        ("--from-log r --model m --out o --format mds", "it goes with --score or --config alone"),
        (
            "--score s --model m --times 2 --out o --format mds",
            "it goes with --from-log alone: --score writes what it chose",
        ),
        ("--score s --model m --keep half --out o --format mds", "neither a part such as 0.2 nor a number"),
    ],
)
def test_options_that_do_not_go_together(arguments, message, monkeypatch, capsys):
    code, _, err = udsstream(monkeypatch, capsys, "curate", *shlex.split(arguments))
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())


def test_streams_given_twice_are_refused(tmp_path):
    (tmp_path / "job.yaml").write_text("data: {streams_root: elsewhere}")
    with pytest.raises(ConfigError, match=r"--score here and data\.streams_root of .* both name streams"):
        load_scoring_config(tmp_path / "job.yaml", score="here")
