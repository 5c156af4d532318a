"""docs/webdataset.md says what is true: its example trains, its command audits the run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from jobs import udsstream
from test_webdataset import write_shards

from udsstream import SelectionLog
from udsstream.mosaicml.webdataset import PICKLES
from udsstream.mosaicml.webdataset_index import INDEX, OFFSETS

DOCS = (Path(__file__).parents[2] / "docs" / "webdataset.md").read_text()


def test_the_example_trains_and_audits(tmp_path, monkeypatch, capfd):
    write_shards(tmp_path / "shards" / "train", samples=16)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```python\n(.*?)^```$", DOCS, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, "docs/webdataset.md", "exec"), names)
    log = SelectionLog.open("runs/tars")
    assert len(log.steps()) == 4
    assert sorted(log.table()["sample_id"].to_pylist()) == sorted([*range(16)] * 2)
    (command,) = re.findall(r"^```bash\n(.*?)\n```$", DOCS, flags=re.MULTILINE | re.DOTALL)
    code, out, _ = udsstream(monkeypatch, capfd, *shlex.split(command)[1:])
    assert code == 0, out
    assert "1 of 1 streams" in out


def test_what_it_names_is_so():
    assert INDEX in DOCS
    assert OFFSETS in DOCS
    refused = DOCS.split("**Pickles** (")[1].split(")")[0]
    assert set(re.findall(r"\.(\w+)", refused)) == set(PICKLES)
