"""docs/curating_with_a_model.md says what is true: its commands and its file of settings run, its table is that of the code."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from jobs import udsstream, write_rows

from udsstream.scoring_config import ScoredStreams, ScoringConfig

DOCS = (Path(__file__).parent.parent / "docs" / "curating_with_a_model.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for line in blocks("bash")[0].splitlines() if line]


@pytest.fixture(scope="module")
def folder(model, data, tmp_path_factory) -> Path:
    """Where the commands are given: a model, and a stream that has a text under the name that one of them gives."""
    root = tmp_path_factory.mktemp("docs")
    shutil.copytree(model, root / "models" / "small")
    write_rows(root / "streams" / "train", [{"body": "the cat sat on the mat " * (i % 3 + 1)} for i in range(40)])
    (root / "curate.yaml").write_text(blocks("yaml")[0])
    return root


@pytest.mark.parametrize("number", range(3))
def test_the_commands_run(folder, number, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    arguments = shlex.split(COMMANDS[number])
    more = [
        "max_seq_len=64",
        "selection.projection_dims=[8,4]",
        "data.num_workers=0",
        "device=cpu",
        "data.text_key=body",
    ]
    more += ["selection.keep=20"] if "100" in arguments else []  # of a stream of 40
    code, _, err = udsstream(monkeypatch, capsys, *arguments[1:], *more)
    assert code == 0, err
    out = arguments[arguments.index("--out") + 1]
    assert (folder / out / "croissant.json").exists()
    assert (folder / f"{out}-run" / "run.json").exists()


def test_the_commands_for_several_ranks_are_the_same_command():
    lines = [line for line in DOCS.splitlines() if line.startswith(("composer ", "torchrun "))]
    assert len({line.split(" curate ")[1] for line in lines}) == 1
    assert [line.split(" udsstream ")[0] for line in lines] == [
        "composer -n 2 -c",
        "torchrun --nproc-per-node 2 --no-python",
    ]


def test_the_table_of_settings():
    table = DOCS.split("| setting | default | |\n|---|---|---|\n")[1].split("\n\n")[0]
    rows = [re.match(r"\| `([\w.]+)` \| (\S+) \|", line) for line in table.splitlines()]
    for row in rows:
        assert row is not None
        section, _, name = row[1].rpartition(".")
        fields = ScoredStreams.model_fields if section else ScoringConfig.model_fields
        assert float(row[2].replace("true", "1")) == float(fields[name].default), row[1]
    assert "FIGURES" not in DOCS
