"""docs/curating.md says what is true: its commands and its example run, its tables are those of the code."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from curate_runs import write_log, write_stream
from jobs import udsstream

from udsstream.curate.columns import ADDED
from udsstream.curate.formats import FORMATS
from udsstream.curate.provenance import ALARMING_CORRELATION

DOCS = (Path(__file__).parents[2] / "docs" / "curating.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"^```bash\n(.*?)^```$", DOCS, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the commands are given: runs/a over streams/animals and streams/numbers."""
    root = tmp_path_factory.mktemp("docs")
    for name, count in (("animals", 60), ("numbers", 40)):
        write_stream(root / "streams" / name, [{"prompt": f"{name} {i}", "response": "so"} for i in range(count)])
    write_log(root / "runs" / "a", [root / "streams" / "animals", root / "streams" / "numbers"], steps=40)
    shutil.copytree(root / "streams" / "animals", root / "new" / "animals")
    return root


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_the_commands_run(folder, number, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments = shlex.split(COMMANDS[number].replace("/new/animals", str(folder / "new" / "animals")))
    assert arguments[:2] == ["udsstream", "curate"]
    out = arguments[arguments.index("--out") + 1]
    code, _, err = udsstream(monkeypatch, capsys, *arguments[1:])
    assert code == 0, err
    assert {"README.md", "croissant.json"} <= {path.name for path in (folder / out).iterdir()}


def test_the_example_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    if not (folder / "curated").exists():
        assert udsstream(monkeypatch, capsys, *shlex.split(COMMANDS[0])[1:])[0] == 0
    (example,) = re.findall(r"^```python\n(.*?)^```$", DOCS, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "curating.md", "exec"), names)
    assert re.search(r"^(animals|numbers) \['merkle-root:[0-9a-f]{64}'", capsys.readouterr().out)
    assert names["best"]["uds_mean_score"] == max(names["dataset"]["uds_mean_score"])


def test_the_tables():
    added = set(re.findall(r"`uds_(\w+)`", DOCS.split("| column | type | |")[1].split("\n\n")[0]))
    assert added == set(ADDED)
    sentence = re.search(r"^Compression: (.*?)\. MDS shards", DOCS, flags=re.MULTILINE | re.DOTALL)
    assert sentence is not None
    names = {"Parquet": "parquet", "JSON Lines": "jsonl", "MDS": "mds", "WebDataset": "webdataset"}
    for part in sentence[1].split(";"):
        kinds, _, name = part.partition(" for ")
        found = re.findall(r"`(\w+)`", kinds)
        assert set(found) == set(FORMATS[names[name.strip()]]().suffixes), name
    assert f"±{ALARMING_CORRELATION}" in DOCS
    assert "FIGURES" not in DOCS


def test_the_commands_cover_every_format():
    text = " ".join(COMMANDS)
    assert all(f"--format {name}" in text for name in FORMATS)
    assert json.dumps(COMMANDS).count("--all") == 1
