"""The quickstart and the guides to selecting, choosing α, resuming and asking why: their commands run and print what is shown."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy_run
import pytest
import torch
import yaml
from jobs import udsstream, write_data
from test_guides import blocks
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from udsstream import SelectionLog
from udsstream.config import PUBLISHED_ALPHA
from udsstream.demo import main as demo
from udsstream.log_queries import summary
from udsstream.mosaicml.dataset import UDSStreamingDataset
from udsstream.run_config import _MAY_CHANGE
from udsstream.sft import SFTCollator

DOCS = Path(__file__).parent.parent / "docs"
SMALLER = [
    "device=cpu",
    "progress_bar=false",
    "max_seq_len=64",
    "model.lora.r=2",
    "selection.projection_dims=[8,4]",
]


def commands(page: str) -> list[list[str]]:
    lines = [line.split("  #")[0] for block in blocks(DOCS / page, "bash") for line in block.splitlines() if line]
    return [shlex.split(line) for line in lines]


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """Where the guides' commands are given: a model, streams, and mine.yaml of the page, made shorter where it says how long."""
    root = tmp_path_factory.mktemp("guides")
    shutil.copytree(model, root / "models" / "small")
    data = write_data(root / "data")
    (root / "streams").mkdir()
    (data / "train" / "animals").rename(root / "streams" / "train")
    (data / "train" / "numbers").rename(root / "streams" / "holdout")
    (data / "held_out").rename(root / "streams" / "held_out")
    (page,) = blocks(DOCS / "selecting.md", "yaml")
    (root / "mine.yaml").write_text(page)
    return root


@pytest.fixture
def there(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return folder


def run(monkeypatch, capsys, command: list[str], *more: str) -> str:
    assert command[0] == "udsstream"
    code, out, err = udsstream(monkeypatch, capsys, *command[1:], *more)
    assert code == 0, err
    return out


@pytest.mark.slow
def test_selecting_then_resuming(there, monkeypatch, capsys):
    """In the order in which a reader would: the runs, then what asks for them."""
    settings = yaml.safe_load(Path("mine.yaml").read_text())
    assert settings["save_folder"] == "runs/mine"
    selecting = commands("selecting.md")
    assert [command[1] for command in selecting] == ["train", "train", "train", "log", "report"]
    first = ["max_duration=4ba", "save_interval=2ba", *SMALLER]
    for command in selecting[:3]:
        run(monkeypatch, capsys, command, *first, *(["autoresume=true"] if command == selecting[0] else []))
    assert "2 of" not in run(monkeypatch, capsys, selecting[3]).split("kept and trained on")[0]
    assert Path("runs/half/run.json").exists()
    assert SelectionLog.open("runs/chance").run["selection"]["method"] == "random"
    run(monkeypatch, capsys, selecting[4])
    assert Path("runs/mine/report.html").exists()

    again, further, asked = commands("resuming.md")
    run(monkeypatch, capsys, again, *first)
    assert SelectionLog.open("runs/mine").steps().tolist() == [0, 1, 2, 3]
    assert further[-1].startswith("max_duration=")
    longer = [word for word in further if not word.startswith("max_duration")]
    run(monkeypatch, capsys, longer, "max_duration=6ba", *first[1:])
    assert SelectionLog.open("runs/mine").steps().tolist() == [0, 1, 2, 3, 4, 5]
    assert "Sample 17" in run(monkeypatch, capsys, asked)


@pytest.mark.slow
def test_taking_the_model_out(there, monkeypatch, capsys):
    trained = ["udsstream", "train", "mine.yaml", "max_duration=51ba", "save_interval=50ba", *SMALLER]
    trained += ["save_num_checkpoints_to_keep=-1", "data.batch_size=2", "selection.keep=1", "eval=null"]
    run(monkeypatch, capsys, trained, "save_folder=runs/exported")
    exports = commands("exporting.md")
    assert len(exports) == 4
    for command in exports:
        run(monkeypatch, capsys, [word.replace("runs/mine", "runs/exported") for word in command])
    (reading,) = blocks(DOCS / "exporting.md", "python")
    names: dict[str, Any] = {}
    exec(reading, names)
    weights = names["model"].state_dict()
    half, early = (
        type(names["model"]).from_pretrained(f"models/mine-{name}").state_dict() for name in ("bf16", "at-50")
    )
    assert all(torch.equal(half[name].bfloat16(), value.bfloat16()) for name, value in weights.items())
    assert any(not torch.equal(early[name], value) for name, value in weights.items())
    assert Path("adapters/mine/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_rho_loss_from_the_reference_model_to_the_run(there, monkeypatch, capsys):
    """docs/methods.md: what the run subtracts is the loss of the exported model on each sample."""
    (block,) = [block for block in blocks(DOCS / "methods.md", "bash") if "rho_loss" in block]
    reference, export, score, rho = (shlex.split(line) for line in block.splitlines())
    shorter = ["max_duration=3ba", "eval=null", *SMALLER]
    run(monkeypatch, capsys, reference, *shorter, "optimizer.lr=0.05")
    run(monkeypatch, capsys, export)
    run(monkeypatch, capsys, score, "max_seq_len=64", "selection.projection_dims=[8,4]", "device=cpu", "window=8")
    run(monkeypatch, capsys, rho, *shorter)
    rows = SelectionLog.open("runs/rho").table(columns=["sample_id", "loss", "reference_loss", "score"]).to_pylist()
    assert len(rows) == 24
    model, tokenizer = (kind.from_pretrained("models/reference") for kind in (AutoModelForCausalLM, AutoTokenizer))
    stream = UDSStreamingDataset(local="streams/train", batch_size=1, shuffle=False)
    collate = SFTCollator(tokenizer=tokenizer, max_seq_len=64)
    for row in rows[::5]:
        batch = collate([stream.get_item(row["sample_id"])])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits
        loss = functional.cross_entropy(logits[0, :-1].double(), batch["labels"][0, 1:])
        assert row["reference_loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["score"] == pytest.approx(row["loss"] - loss.item(), abs=1e-5)
    stream.close()


def test_what_may_change_is_what_the_guide_lists():
    (listed,) = re.findall(
        r"^What may be given anew: (.*?)\. A longer", (DOCS / "resuming.md").read_text(), flags=re.MULTILINE
    )
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(_MAY_CHANGE)


@pytest.mark.slow
def test_resuming_in_a_script_of_ones_own(tmp_path, monkeypatch, capfd):
    from streaming import MDSWriter

    with MDSWriter(out=str(tmp_path / "streams" / "text"), columns={"text": "str"}) as writer:
        for number in range(200):
            writer.write({"text": "Ein Satz, noch ein Satz. " * (number % 5 + 1)})
    monkeypatch.chdir(tmp_path)
    (readme,) = blocks(DOCS.parent / "README.md", "python")
    (resuming,) = blocks(DOCS / "resuming.md", "python")
    for batches in (12, 16):
        names: dict[str, Any] = {}
        exec(compile(readme.split("selection = ")[0], "README.md", "exec"), names)
        exec(compile(resuming.replace("12ba", f"{batches}ba"), "docs/resuming.md", "exec"), names)
        names["trainer"].close()
        names["selection"].close()
        assert f"{batches} steps in the log" in capfd.readouterr().out
    rows = SelectionLog.open("runs/long/log").table(columns=["attempt", "step"]).to_pylist()
    assert {row["step"] for row in rows if row["attempt"] == 1} == {12, 13, 14, 15}


@pytest.mark.slow
def test_choosing_alpha(there, monkeypatch, capsys):
    numpy_run.finished(there / "runs" / "a")
    asked, suppressed, trial, of_trial = commands("choosing_alpha.md")
    assert "correlation of" in run(monkeypatch, capsys, asked)
    assert "would have been kept by intra alone" in run(monkeypatch, capsys, suppressed)
    run(monkeypatch, capsys, trial, "max_seq_len=64", "selection.projection_dims=[8,4]", "window=8", "device=cpu")
    assert SelectionLog.open("trial-run").run["resolved_alpha"] == 20
    assert "would have been kept by intra alone" in run(monkeypatch, capsys, of_trial)

    conversion, recomputed = blocks(DOCS / "choosing_alpha.md", "python")
    exec(conversion, {})
    shown = re.findall(r"# \w+\.?\w*: ([\d.]+)$", conversion, flags=re.MULTILINE)
    assert [f"{float(line):.2f}" for line in capsys.readouterr().out.split()] == shown
    assert str(PUBLISHED_ALPHA) in conversion.replace("1.5e-3", "0.0015")
    names: dict[str, Any] = {}
    exec(recomputed, names)
    out = capsys.readouterr().out
    assert re.fullmatch(r"(alpha +[\d.]+: \d+% of what was chosen would be chosen again\n){3}", out)
    # With the run's own α it is the run's own choice.
    exec(recomputed.replace("(0.0, 1.0, 10.0)", f"({SelectionLog.open('runs/a').run['resolved_alpha']!r},)"), names)
    assert ": 100% of" in capsys.readouterr().out


EXAMPLES = [
    pair
    for block in blocks(DOCS / "why_not_chosen.md", "console")
    for pair in re.findall(r"^\$ (.*?)\n((?:(?!\$ ).*\n)*)", block, flags=re.MULTILINE)
]


@pytest.mark.parametrize(("command", "shown"), EXAMPLES, ids=[command for command, _ in EXAMPLES])
def test_why_a_sample_was_not_chosen(command, shown, tmp_path):
    numpy_run.finished(tmp_path / "runs" / "a")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "100"}
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert [line.rstrip() for line in done.stdout.splitlines()] == shown.splitlines(), done.stderr


def test_why_a_sample_was_not_chosen_in_python(tmp_path, monkeypatch, capsys):
    numpy_run.finished(tmp_path / "runs" / "a")
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(DOCS / "why_not_chosen.md", "python")
    exec(example, {})
    assert capsys.readouterr().out == "7 1 +0.0278 True True\n11 3 -0.0219 False True\n24 6 -1.9986 False False\n"


def test_the_quickstart_has_the_demo_s_steps_and_words():
    page = (DOCS / "quickstart.md").read_text()
    steps = re.findall(r'console\.print\(f?"(\d/6) +(.*?)"', Path(demo.__file__).read_text())
    headings = re.findall(r"^## (\d/6) (.*)$", page, flags=re.MULTILINE)
    assert [number for number, _ in headings] == [number for number, _ in steps] == [f"{i}/6" for i in range(1, 7)]
    for (_, heading), (_, printed) in zip(headings, steps, strict=True):
        pattern = re.sub(r"\\\{.*?\\\}", ".*", re.escape(printed))  # what the demo fills in
        assert re.fullmatch(pattern, heading), (printed, heading)
    labels = re.findall(r"^│ (\w.*?) +│", page, flags=re.MULTILINE)
    training = re.sub(r"\n    else:\n.*?(?=\n    \S)", "", Path(summary.__file__).read_text(), flags=re.DOTALL)
    printed = re.findall(r'table\.add_row\(\s*"(.*?)"', training)
    assert labels == printed
