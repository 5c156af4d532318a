"""From a run that was really trained to the curated rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from jobs import SENTENCES, udsstream, write_rows

from udsstream import SelectionLog, pipeline
from udsstream.run_config import load_run_config

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k"


def test_what_a_run_trained_on(config_file, data, tmp_path, monkeypatch, capsys):
    pipeline.train(load_run_config(config_file))
    run = tmp_path / "run"
    arguments = ["curate", "--from-log", str(run), "--format", "parquet", "--out", str(tmp_path / "out"), "--json"]
    code, out, _ = udsstream(monkeypatch, capsys, *arguments, "--verify-shards")
    assert code == 0
    found = pq.read_table(tmp_path / "out" / "data").to_pylist()
    log = SelectionLog.open(run)
    trained = [sample_id for step in log.steps().tolist() for sample_id in log.selected(step)]
    assert [row["uds_sample_id"] for row in found] == list(dict.fromkeys(trained))
    pairs = [(SENTENCES[i % 5], f"{SENTENCES[i * 2 % 5]} {'the ' * (i % 7)}") for i in range(60)]
    for row in found:
        assert (row["prompt"], row["response"]) == pairs[row["uds_sample_id"]]
        assert row["uds_stream"] == ("animals" if row["uds_sample_id"] < 30 else "numbers")
    assert json.loads(out)["samples"] == len(found)

    # The streams moved: the same rows.
    shutil.copytree(data / "train" / "animals", tmp_path / "pets")
    moved = ["--stream", f"animals={tmp_path / 'pets'}", "--out", str(tmp_path / "moved")]
    assert udsstream(monkeypatch, capsys, *arguments, *moved)[0] == 0
    for name in ("croissant.json", "README.md", "data/part-00000.parquet"):
        assert (tmp_path / "moved" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not on this machine")
def test_gsm8k_end_to_end(config_file, tmp_path, monkeypatch, capsys):
    """Real text, trained on for a few steps, and read back as MDS by a run of its own."""
    source = next(iter(sorted(GSM8K.glob("*train*.jsonl"))))
    rows = [json.loads(line) for line in source.read_text().splitlines()[:400]]
    pairs = [{"prompt": row["question"], "response": row["answer"]} for row in rows]
    write_rows(tmp_path / "streams" / "gsm8k", pairs)
    overrides = [f"data.streams_root={tmp_path / 'streams'}", "eval=null", "max_seq_len=600", "max_duration=20ba"]
    pipeline.train(load_run_config(config_file, overrides))
    code, _, err = udsstream(
        monkeypatch, capsys, "curate", "--from-log", str(tmp_path / "run"), "--format", "mds", "--out", str(tmp_path / "best" / "gsm8k")
    )  # fmt: skip
    assert code == 0, err
    again = [
        f"data.streams_root={tmp_path / 'best'}",
        "eval=null",
        "max_seq_len=600",
        "max_duration=2ba",
        f"save_folder={tmp_path / 'again'}",
    ]
    pipeline.train(load_run_config(config_file, again))
    assert SelectionLog.open(tmp_path / "again").table().num_rows == 16
    code, _, _ = udsstream(
        monkeypatch, capsys, "curate", "--all", str(tmp_path / "best" / "gsm8k"), "--format", "jsonl", "--out", str(tmp_path / "lines")
    )  # fmt: skip
    (file,) = (tmp_path / "lines" / "data").iterdir()
    for line in file.read_text().splitlines():
        row = json.loads(line)
        assert {"prompt": row["prompt"], "response": row["response"]} == pairs[row["uds_sample_id"]]
