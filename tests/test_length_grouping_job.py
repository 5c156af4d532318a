"""`udsstream train` with data.length_group_batches: what is counted, when, and what the run's folder says of it."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from jobs import udsstream, write_rows

from udsstream import SelectionLog, pipeline
from udsstream.errors import ConfigError, DataError, ResumeError, SequenceTooLongError
from udsstream.replay import replay
from udsstream.run_config import config_changes, load_run_config
from udsstream.run_folder import SUMMARY

GROUPED = [
    "data.length_group_batches=3",
    "max_duration=9ba",
    "eval=null",
    "save_interval=4ba",
    "scheduler.name=constant",
]
"""48 rows, 8 a batch: an epoch is two windows of 24 rows."""


def spans_of(run: Path) -> list[tuple[int, int]]:
    """The fewest and the most tokens of each step's candidates."""
    rows = SelectionLog.open(run).table()
    steps, tokens = rows["step"].to_numpy(), rows["tokens"].to_numpy()
    return [(int(tokens[steps == step].min()), int(tokens[steps == step].max())) for step in np.unique(steps)]


def in_turn(spans: list[tuple[int, int]]) -> bool:
    return all(low[1] <= high[0] for low, high in itertools.pairwise(sorted(spans)))


def test_candidates_are_of_similar_length_and_run_json_says_so(config_file, tmp_path):
    pipeline.train(load_run_config(config_file, GROUPED))
    run = tmp_path / "run"
    spans = spans_of(run)
    assert in_turn(spans[:3]), spans
    assert in_turn(spans[3:6]), spans
    assert in_turn(spans[6:9]), spans
    (counted,) = run.glob("lengths-*.npy")
    lengths = np.load(counted, allow_pickle=False)
    rows = SelectionLog.open(run).table()
    assert lengths[rows["sample_id"].to_numpy()].tolist() == rows["tokens"].to_pylist()  # as the collator sees them
    recorded = SelectionLog.open(run).run["loader"]["length_groups"]
    assert (recorded["batches"], recorded["global_batch"], recorded["seed"]) == (3, 8, 9176)

    plain = load_run_config(
        config_file, [*GROUPED, "data.length_group_batches=null", f"save_folder={tmp_path / 'plain'}"]
    )
    pipeline.train(plain)
    assert not in_turn(spans_of(tmp_path / "plain")[:3])
    assert not list((tmp_path / "plain").glob("lengths-*"))
    assert SelectionLog.open(tmp_path / "plain").run["loader"]["length_groups"] is None


def test_a_resumed_job_does_not_count_again_and_goes_on_alike(config_file, tmp_path, monkeypatch):
    pipeline.train(load_run_config(config_file, [*GROUPED, f"save_folder={tmp_path / 'whole'}"]))
    pipeline.train(load_run_config(config_file, [*GROUPED, "max_duration=4ba"]))
    run = tmp_path / "run"
    (run / SUMMARY).unlink()  # as if it had been stopped
    (counted,) = run.glob("lengths-*.npy")
    written = counted.stat().st_mtime_ns

    def count(*_, **__):
        raise AssertionError("counted again")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "count_lengths", count)
        pipeline.train(load_run_config(config_file, [*GROUPED, "autoresume=true"]))
    assert counted.stat().st_mtime_ns == written
    ours, theirs = (SelectionLog.open(folder).table().drop_columns(["attempt"]) for folder in (run, tmp_path / "whole"))
    assert ours.equals(theirs)


def test_a_job_that_goes_on_must_group_as_it_did(config_file, tmp_path):
    pipeline.train(load_run_config(config_file, [*GROUPED, "max_duration=4ba"]))
    with pytest.raises(ResumeError, match=r"data\.length_group_batches: was 3, is 2"):
        pipeline.train(load_run_config(config_file, [*GROUPED, "data.length_group_batches=2", "autoresume=true"]))
    # Lengths that changed under the run's hands are found by their digest.
    (counted,) = (tmp_path / "run").glob("lengths-*.npy")
    lengths = np.load(counted, allow_pickle=False)
    lengths[0] += 1
    np.save(counted, lengths, allow_pickle=False)
    with pytest.raises(ResumeError, match=r"lengths_sha256: was '\w{64}', is '\w{64}'"):
        pipeline.train(load_run_config(config_file, [*GROUPED, "autoresume=true"]))


def test_a_replay_reads_the_log_and_counts_nothing(config_file, tmp_path, monkeypatch):
    pipeline.train(load_run_config(config_file, [*GROUPED, "max_duration=8ba"]))
    monkeypatch.setattr(pipeline, "count_lengths", None)
    result = replay(tmp_path / "run", verify=True)
    assert (result.verdict, result.differences) == ("identical", [])
    assert not list((tmp_path / "run-replay").glob("lengths-*"))


def test_an_audit_and_a_report_know_of_it(config_file, tmp_path, monkeypatch, capsys):
    pipeline.train(load_run_config(config_file, GROUPED))
    code, out, _ = udsstream(monkeypatch, capsys, "audit", str(tmp_path / "run"), "--data")
    assert code == 0, out
    code, _, _ = udsstream(monkeypatch, capsys, "report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html"))
    assert code == 0
    page = (tmp_path / "page.html").read_text().replace("<wbr>", "")
    assert "loader.length_groups.batches</th><td>3</td>" in page


def rows_with_one_long(folder: Path) -> Path:
    pairs = [{"prompt": "say the word", "response": "the " * (1 + number % 5)} for number in range(31)]
    return write_rows(folder, [*pairs, {"prompt": "say the word", "response": "the " * 60}])


@pytest.mark.parametrize("grouped", [True, False])
def test_a_row_that_is_too_long_is_the_error_that_training_would_raise(config_file, tmp_path, grouped):
    """With grouping it comes before the first step, without it where the row comes."""
    folder = rows_with_one_long(tmp_path / "rows")
    overrides = [*GROUPED, "data.streams_root=null", "data.streams=[{local: " + str(folder) + "}]"]
    if not grouped:
        overrides.append("data.length_group_batches=null")
    with pytest.raises(
        SequenceTooLongError, match=r"^sample 31 has 64 tokens, but max_seq_len is 32: raise max_seq_len"
    ):
        pipeline.train(load_run_config(config_file, overrides))
    assert (tmp_path / "run" / "run.json").exists() is not grouped


def test_a_row_that_is_cut_counts_as_it_is_cut(config_file, tmp_path):
    folder = rows_with_one_long(tmp_path / "rows")
    overrides = [*GROUPED, "data.streams_root=null", "data.streams=[{local: " + str(folder) + "}]", "max_duration=4ba"]
    pipeline.train(load_run_config(config_file, [*overrides, "data.overlong=truncate"]))
    (counted,) = (tmp_path / "run").glob("lengths-*.npy")
    assert np.load(counted, allow_pickle=False)[-2:].tolist() == [5, 32]


def test_other_rows_or_another_form_are_counted_anew(config_file, data, tmp_path):
    """The file's name tells them apart, in one folder."""
    (tmp_path / "streams").mkdir()
    stream = Path(shutil.copytree(data / "train" / "animals", tmp_path / "streams" / "animals"))
    overrides = [*GROUPED, f"data.streams_root={tmp_path / 'streams'}", "max_duration=1ba"]
    names = []
    for changes in ([], ["max_seq_len=31"], ["data.format=prompt_response"], []):
        config = load_run_config(config_file, [*overrides, *changes])
        pipeline.build_trainer(config).close()
        names.append({path.name for path in (tmp_path / "run").glob("lengths-*.npy")})
    shutil.rmtree(stream)
    shutil.copytree(data / "train" / "numbers", stream)
    pipeline.build_trainer(load_run_config(config_file, overrides)).close()
    names.append({path.name for path in (tmp_path / "run").glob("lengths-*.npy")})
    assert [len(found) for found in names] == [1, 2, 3, 3, 4]


@pytest.mark.parametrize("value", ["1", "0", "2.5", "many"])
def test_a_value_without_meaning_is_named(config_file, value):
    with pytest.raises(ConfigError, match=r"data\.length_group_batches: input should be"):
        load_run_config(config_file, [f"data.length_group_batches={value}"])


def test_an_older_run_goes_on_without_it(config_file, tmp_path):
    """A configuration from before the key was there is one without grouping."""
    config = load_run_config(config_file)
    assert config.data.length_group_batches is None
    recorded = config.model_dump()
    del recorded["data"]["length_group_batches"]
    (tmp_path / "old.yaml").write_text(json.dumps(recorded))
    assert config_changes(load_run_config(tmp_path / "old.yaml"), config) == []


def test_a_row_without_a_response_is_named_before_training(config_file, tmp_path):
    folder = write_rows(tmp_path / "rows", [{"prompt": "say", "response": "the" if i else ""} for i in range(9)])
    overrides = [*GROUPED, "data.streams_root=null", "data.streams=[{local: " + str(folder) + "}]"]
    with pytest.raises(DataError, match=r"^sample 0 has labels that are all ignored .* the response is empty"):
        pipeline.train(load_run_config(config_file, overrides))
