"""croissant.json against mlcroissant and against the files, README.md against the Hub's own reader, and what both say of the choice."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import uds_log
import yaml
from curate_runs import COLUMNS, describe, sample, write_log, write_stream

from udsstream.curate.chosen import Choice
from udsstream.curate.formats import FORMATS, Compression
from udsstream.curate.provenance import Origin, Part, Used, data_card
from udsstream.curate.samples import SourceStream
from udsstream.curate.write import Output, curate_log, curate_stream
from udsstream.selection_log.digest import merkle_root
from udsstream.selection_log.reader import SelectionLog

# mlcroissant keeps what it unpacks, by the name of the file, in the user's home, and reads that the next time.
os.environ["CROISSANT_CACHE"] = tempfile.mkdtemp()

FORMATS_TO_TRY = [("mds", "none"), ("mds", "zstd"), ("webdataset", "none"), ("webdataset", "gzip"), ("parquet", "zstd"), ("jsonl", "none"),
                  ("jsonl", "gzip")]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    flat = {name: encoding for name, encoding in COLUMNS.items() if name != "messages"}
    rows = [{name: sample(i)[name] for name in flat} for i in range(30)]
    write_stream(root / "animals", rows[:20], flat)
    write_stream(root / "numbers", rows[20:], flat)
    description = describe([root / "animals", root / "numbers"])
    description["streams"][0] |= {"licence": "CC-BY-4.0", "date": "2026-01-31"}
    return write_log(root / "log", [root / "animals", root / "numbers"], run=description, steps=10)


@pytest.mark.parametrize(("format", "compression"), FORMATS_TO_TRY)
def test_croissant_is_valid_and_true(run, tmp_path, format, compression, caplog):
    import mlcroissant

    output = Output(format=format, compression=compression, shard_bytes=400_000)
    result = curate_log(run, tmp_path / "out", choice=Choice(), output=output)
    described = json.loads((tmp_path / "out" / "croissant.json").read_bytes())
    with caplog.at_level(logging.WARNING):
        dataset = mlcroissant.Dataset(jsonld=str(tmp_path / "out" / "croissant.json"))
    issues = dataset.metadata.ctx.issues
    assert not issues.errors
    assert all("recommended" in warning for warning in issues.warnings), issues.report()
    assert "not standard" not in caplog.text
    assert dataset.metadata.ctx.is_v1_1()
    # Each file, its size and digest; nothing else but what describes them.
    files = [item for item in described["distribution"] if item["@type"] == "cr:FileObject"]
    for item in files:
        data = (tmp_path / "out" / item["contentUrl"]).read_bytes()
        assert (item["sha256"], item["contentSize"]) == (hashlib.sha256(data).hexdigest(), f"{len(data)} B")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found - {"README.md", "croissant.json", "index.json"} == {item["contentUrl"] for item in files}
    assert len(files) == result.shards > 1

    columns = {field["name"] for records in described["recordSet"] for field in records["field"]} - {"key"}
    assert columns >= {*COLUMNS} - {"messages"}
    assert len([name for name in columns if name.startswith("uds_")]) == 9
    if format in ("parquet", "jsonl"):
        records = list(dataset.records("samples"))
        assert len(records) == result.samples
        table = {row["sample_id"]: row for row in SelectionLog.open(run).table().to_pylist() if row["selected"]}
        for record in records:
            number = int(record["samples/uds_sample_id"])
            assert record["samples/text"].decode() == sample(number)["text"]
            assert list(record["samples/tokens"]) == sample(number)["tokens"].tolist()
            assert record["samples/number"] == sample(number)["number"]
            assert number in table
    if format == "webdataset" and compression == "none":
        records = list(dataset.records("text.txt"))
        texts = {int(record["text.txt/key"]): record["text.txt/text"].decode() for record in records}
        assert texts == {number: sample(number)["text"] for number in texts}
        assert len(texts) == result.samples


def test_where_it_comes_from(run, tmp_path):
    from fractions import Fraction

    choice = Choice(times=0, top_quantile=Fraction("0.5"), quotas={"numbers": 3}, last_epoch=True)
    result = curate_log(run, tmp_path / "out", choice=choice, output=Output(format="jsonl"))
    described = json.loads((tmp_path / "out" / "croissant.json").read_bytes())
    log = SelectionLog.open(run)
    root = merkle_root(log.heads()).hex()
    activity = described["prov:wasGeneratedBy"]
    assert activity["@id"] == f"urn:udsstream:run:{log.run['run_id']}"
    assert activity["prov:startedAtTime"] == log.run["created"]
    assert activity["prov:used"]["identifier"] == [
        f"merkle-root:{root}",
        f"run.json-sha256:{hashlib.sha256((run / 'run.json').read_bytes()).hexdigest()}",
    ]
    values = {item["name"]: item["value"] for item in activity["additionalProperty"]}
    assert (values["choice.times"], values["choice.top_quantile"]) == (0, "1/2")
    assert json.loads(values["choice.quotas"]) == {"numbers": 3}
    assert values["selection.method"] == "uds"
    assert values["model"] == "tiny"
    streams = {item["name"]: item for item in described["isBasedOn"]}
    for number, recorded in enumerate(log.run["streams"]):
        if recorded["name"] in streams:
            assert streams[recorded["name"]]["identifier"] == f"sha256:{recorded['index_sha256']}"
            assert streams[recorded["name"]]["prov:atLocation"] == recorded["location"]
            assert result.per_stream[recorded["name"]] > 0, number
    assert streams["animals"]["license"] == "CC-BY-4.0"
    assert streams["animals"]["dateCreated"] == "2026-01-31"
    assert "license" not in streams["numbers"]
    assert described["prov:wasDerivedFrom"] == [{"@id": item["@id"]} for item in described["isBasedOn"]]
    assert described["license"] == "CC-BY-4.0"  # what is known; that the rest is not, the card says
    for name in ("croissant.json", "README.md"):
        text = (tmp_path / "out" / name).read_text()
        assert root in text
        assert str(tmp_path / "out") not in text


def test_the_root_is_the_checkpoints(tmp_path):
    """What a log's root is has been written down before: by the checkpoint after its last step."""
    log = SelectionLog.open(uds_log.write(tmp_path / "run", steps=6, ranks=3, checkpoints=(6,)))
    recorded = json.loads((tmp_path / "run" / "_heads" / "ba00000006.json").read_bytes())
    assert [head.hex() for head in log.heads()] == recorded["heads"]
    assert merkle_root(log.heads()).hex() == recorded["root"]


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card(run, tmp_path):
    output = Output(format="jsonl", compression="gzip", language=("no", "de"))
    result = curate_log(run, tmp_path / "out", choice=Choice(), output=output)
    front, body = card_of(tmp_path / "out")
    assert front["license"] == "unknown"  # one of two streams has none that is known
    assert front["language"] == ["no", "de"]  # Norwegian, not false
    assert front["size_categories"] == ["n<1K"]
    assert front["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.jsonl.gz"}]}
    ]
    assert "find out before you pass the data on" in body
    assert "| animals |" in body
    assert "chosen at least once" in body

    from huggingface_hub import DatasetCard

    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "unknown"
    # What the card says of loading is what loads it.
    import datasets

    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == result.samples


@pytest.mark.parametrize("format", ["mds", "webdataset", "parquet", "jsonl"])
def test_what_the_card_says_of_loading_is_true(run, tmp_path, format, monkeypatch):
    result = curate_log(run, tmp_path / "out", choice=Choice(), output=Output(format=format))
    _, body = card_of(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    code = body.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    for _ in range(20):  # (other jobs on this machine take shared memory too)
        try:
            exec(compile(code, "README.md", "exec"), names)
            break
        except FileExistsError:
            continue
    assert len(list(names["dataset"])) == result.samples
    if "```sql\n" in body:
        import duckdb

        sql = body.split("```sql\n")[1].split("```")[0]
        if format == "jsonl":
            sql = sql.replace("')", "', maximum_object_size=100000000)")
        assert len(duckdb.sql(sql).fetchall()) == 5


def origin(licences: list[str], correlation: float | None = None, **changes: Any) -> Origin:
    used = tuple(
        Used(
            stream=SourceStream(name=f"s{i}", location="/x|y", samples=1, index_sha256="0" * 64, licence=licence),
            index_sha256="0" * 64,
            written=1,
        )
        for i, licence in enumerate(licences)
    )
    log = {
        "choice": {"times": 1},
        "run_id": "r",
        "log_root": "0",
        "candidates": 9,
        "offered": 5,
        "ever_chosen": 3,
        "last_step": 2,
    }
    return Origin(used=used, **(log | {"length_correlation": correlation} | changes))


def card(source: Origin, rows: int = 1) -> tuple[dict[str, Any], str]:
    part = Part(name="data/part-00000.jsonl", bytes=1, sha256="0", rows=rows)
    text = data_card(source, (), [part], FORMATS["jsonl"](), Compression(kind="none"), prefix="uds_")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_licences_are_never_guessed():
    assert card(origin(["mit", "mit"]))[0]["license"] == "mit"
    assert card(origin(["mit", "unknown"]))[0]["license"] == "unknown"
    front, _ = card(origin(["mit", "gpl-3.0"]))
    assert (front["license"], front["license_name"]) == ("other", "gpl-3.0, mit")
    assert card(origin(["a: b #c"]))[0]["license"] == "a: b #c"
    assert "/x\\|y" in card(origin(["mit"]))[1]  # a table's cell stays one


def test_the_caveat_on_length():
    assert (
        "**Caveat.** In this run score and length have a correlation of +0.97: the choice is close to taking the longest"
        in card(origin(["mit"], 0.97))[1]
    )
    assert "taking the shortest" in card(origin(["mit"], -0.95))[1]
    body = card(origin(["mit"], 0.3))[1]
    assert "Caveat" not in body
    assert "+0.30" in body
    assert "correlation" not in card(origin(["mit"], None))[1]


@pytest.mark.parametrize(
    ("rows", "size"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (5 * 10**8, "100M<n<1B"), (10**10, "n>1B")],
)
def test_size_categories(rows, size):
    assert card(origin(["mit"]), rows)[0]["size_categories"] == [size]


def test_a_whole_stream_has_no_run(tmp_path):
    write_stream(tmp_path / "in", [{"text": "a"}] * 5)
    curate_stream(str(tmp_path / "in"), tmp_path / "out", output=Output(format="parquet"))
    described = json.loads((tmp_path / "out" / "croissant.json").read_bytes())
    assert "prov:wasGeneratedBy" not in described
    assert described["description"] == "All 5 samples of the stream in."
    assert described["isBasedOn"][0]["identifier"] == (
        "sha256:" + hashlib.sha256((tmp_path / "in" / "index.json").read_bytes()).hexdigest()
    )
    assert "How it was chosen" not in (tmp_path / "out" / "README.md").read_text()


def test_the_correlation_is_the_logs(run, tmp_path):
    from udsstream.log_queries.queries import length_effect

    curate_log(run, tmp_path / "out", choice=Choice(), output=Output(format="mds"))
    expected = length_effect(SelectionLog.open(run)).score_pearson
    assert expected is not None
    assert not math.isnan(expected)
    assert f"correlation of {expected:+.2f}" in (tmp_path / "out" / "README.md").read_text()
