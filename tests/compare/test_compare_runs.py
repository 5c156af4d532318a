"""Comparisons that really train: two entries, two seeds, a process for each run; resumed, refused, failed, reported again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from comparisons import settings_of, write_settings
from jobs import udsstream

from udsstream import SelectionLog
from udsstream.compare import job
from udsstream.compare.config import CompareConfig, load_compare_config, plan_runs
from udsstream.compare.results import read_finished
from udsstream.compare.run import check_folders
from udsstream.errors import ConfigError, LogCorruptError, LogExistsError, ResumeError
from udsstream.evals import read_evals
from udsstream.run_folder import is_finished

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The runs' processes take it over: matrices this small only wait for a second thread."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    if before is None:
        del os.environ["OMP_NUM_THREADS"]


@pytest.fixture(scope="module")
def done(model, data, tmp_path_factory) -> tuple[CompareConfig, Path]:
    """A comparison that nobody interrupted, and its folder. Tests copy it before they change it."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    config = CompareConfig(**settings_of(out, model, data))
    made = job.compare(config)
    assert [outcome.state for outcome in made.outcomes] == ["done"] * 4
    assert made.failed == 0
    return config, out


@pytest.fixture
def copied(done, tmp_path) -> tuple[CompareConfig, Path]:
    config, out = done
    shutil.copytree(out, tmp_path / "out", symlinks=True)
    return config.model_copy(update={"out": str(tmp_path / "out")}), tmp_path / "out"


def figures(out: Path) -> dict[str, Any]:
    """All of table.json but what was measured by the clock."""

    def without_seconds(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_seconds(inner) for key, inner in value.items() if key != "seconds"}
        return [without_seconds(inner) for inner in value] if isinstance(value, list) else value

    return without_seconds(json.loads((out / "table.json").read_text()))


def test_what_it_leaves_behind(done):
    _, out = done
    assert {path.name for path in out.iterdir()} == {"random", "longest", "table.json", "table.md", "plot.png"}
    for run in plan_runs(done[0]):
        assert run.folder == out / run.entry / f"seed-{run.seed}"
        assert is_finished(run.folder)
        assert read_evals(run.folder)["step"].tolist() == [0, 2, 4, 6]
        assert (run.folder / "output.txt").exists()
        SelectionLog.open(run.folder).verify()


def test_the_figures_are_those_of_the_logs(done):
    config, out = done
    value = json.loads((out / "table.json").read_text())
    assert [(run["entry"], run["seed"]) for run in value["runs"]] == [
        ("random", 1), ("longest", 1), ("random", 2), ("longest", 2),
    ]  # fmt: skip
    for planned, run in zip(plan_runs(config), value["runs"], strict=True):
        rows = SelectionLog.open(planned.folder).table().to_pylist()
        times = [json.loads(line) for line in (planned.folder / "timings.jsonl").read_text().splitlines()]
        summary = json.loads((planned.folder / "summary.json").read_text())
        for place, step in enumerate(run["curve"]["step"]):
            trained = sum(row["tokens"] for row in rows if row["selected"] and row["step"] < step)
            assert run["curve"]["tokens"][place] == trained
            spent = sum(line["step_seconds"] for line in times if line["step"] < step)
            assert run["curve"]["seconds"][place] == pytest.approx(spent, abs=1e-5)
        assert run["loss"] == run["curve"]["loss"][-1] == summary["eval_loss_after"]
        assert run["curve"]["loss"][0] == summary["eval_loss_before"]
        assert (run["steps"], run["kept"], run["candidates"]) == (6, 12, 48)
        assert run["kept_tokens"] == run["curve"]["tokens"][-1]
    lengths = {run["entry"]: run["length_correlation"] for run in value["runs"]}
    assert lengths["longest"] == pytest.approx(1.0)


def test_entries_of_a_seed_look_at_the_same_candidates_and_seeds_at_others(done):
    random_1, longest_1, random_2, longest_2 = read_finished(plan_runs(done[0]))
    assert (random_1.choices.sample_id == longest_1.choices.sample_id).all()
    assert (random_2.choices.sample_id == longest_2.choices.sample_id).all()
    assert (random_1.choices.sample_id != random_2.choices.sample_id).any()
    assert (random_1.choices.selected != longest_1.choices.selected).any()


def test_the_loss_before_training_is_measured_once(done):
    measured = [read_evals(run.folder)["seconds"][0] for run in plan_runs(done[0])]
    assert sum(seconds == seconds for seconds in measured) == 1  # the others took it over
    assert len({read_evals(run.folder)["loss"][0] for run in plan_runs(done[0])}) == 1


def test_finished_runs_are_taken_as_they_are(copied):
    config, out = copied
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.parent != out}
    made = job.compare(config)
    assert [outcome.state for outcome in made.outcomes] == ["taken"] * 4
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.parent != out}
    assert after == before


def test_report_only_writes_table_and_plot_again_of_what_is_finished(copied, done, tmp_path, monkeypatch, capsys):
    config, out = copied
    complete = figures(out)
    for name in ("table.json", "table.md", "plot.png"):
        (out / name).unlink()
    path = write_settings(tmp_path / "c.yaml", config.model_dump())
    code, printed, _ = udsstream(monkeypatch, capsys, "compare", str(path), "--report-only")
    assert code == 0
    assert "longest" in printed
    assert str(out / "plot.png") in printed.replace("\n", "")
    assert figures(out) == complete
    assert (out / "plot.png").stat().st_size > 10_000
    # With a run that is only half done: it is said, not counted, and not trained on.
    (out / "longest" / "seed-2" / "summary.json").unlink()
    code, printed, _ = udsstream(monkeypatch, capsys, "compare", str(path), "--report-only")
    assert code == 0
    assert "longest, seed 2: unfinished" in printed
    assert not is_finished(out / "longest" / "seed-2")
    assert [len(row["seeds"]) for row in figures(out)["rows"]] == [2, 1]


def test_a_folder_with_other_settings_is_refused_by_name(copied):
    config, out = copied
    run = dict(config.run, max_duration="8ba", eval=dict(config.run["eval"], interval="4ba"))
    with pytest.raises(ResumeError) as caught:
        job.compare(config.model_copy(update={"run": run}))
    lines = str(caught.value).splitlines()
    for seed in (1, 2):
        for entry in ("random", "longest"):
            folder = out / entry / f"seed-{seed}"
            assert f"  {folder}: eval.interval: was '2ba', is '4ba'" in lines
            assert f"  {folder}: max_duration: was '6ba', is '8ba'" in lines
    assert len(lines) == 2 + 8


def test_what_does_not_change_a_runs_figures_may_change(copied):
    config, _ = copied
    run = dict(config.run, save_interval="5ba", save_num_checkpoints_to_keep=1)
    check_folders(plan_runs(config.model_copy(update={"run": run})))


def test_a_log_of_something_else_is_refused(copied):
    config, out = copied
    (out / "random" / "seed-1" / "config.yaml").unlink()
    with pytest.raises(LogExistsError, match=r"random/seed-1 holds the log of a run that was not started"):
        job.compare(config)


def test_a_log_that_lacks_a_step_is_refused(copied):
    config, out = copied
    (segment,) = (out / "random" / "seed-1" / "selection").rglob("*.arrow")
    segment.unlink()
    with pytest.raises(LogCorruptError, match=r"random/seed-1"):
        job.compare(config, train=False)


def test_only_some_entries_are_run_and_all_are_shown(model, data, tmp_path):
    """And a run that fails does not stop the others: it is told, and the exit code says so."""
    entries = {"bad": {"data.prompt_key": "question"}, "good": {}, "other": {}}
    settings = settings_of(tmp_path / "out", model, data, entries=entries, seeds=[4])
    settings["run"]["eval"] = None
    config = CompareConfig(**settings)
    heard: list[Any] = []
    made = job.compare(
        config,
        only=["bad", "good"],
        began=lambda run, number, of: heard.append((run.entry, number, of)),
        ended=lambda outcome: heard.append(outcome.state),
    )
    assert heard == [("bad", 1, 2), "failed", ("good", 2, 2), "done"]
    assert made.failed == 1
    states = {entry: state for entry, seeds in made.comparison.states.items() for state, _ in seeds.values()}
    assert states == {"bad": "failed", "good": "finished", "other": "not begun"}
    (message,) = [message for state, message in made.comparison.states["bad"].values()]
    assert message.startswith("DataError: ")
    assert "'question'" in message
    assert message.endswith(f"see {tmp_path / 'out' / 'bad' / 'seed-4' / 'output.txt'}")
    with pytest.raises(ConfigError, match=r"'best': there is no such entry to run; there are bad, good, other"):
        job.compare(config, only=["best"])


def test_the_command_exits_with_1_when_a_run_failed(data, tmp_path, monkeypatch, capsys):
    settings = settings_of(tmp_path / "out", "/nowhere", data, entries={"one": {}}, seeds=[1])
    path = write_settings(tmp_path / "c.yaml", settings)
    code, printed, _ = udsstream(monkeypatch, capsys, "compare", str(path))
    assert code == 1
    assert "run 1 of 1: one, seed 1" in printed
    assert "FAILED after" in printed
    assert "ModelError: model.name='/nowhere'" in printed


def test_several_ranks_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without a launcher"):
        job.compare(CompareConfig(**settings_of(tmp_path, "m", data)))


# Killed -------------------------------------------------------------------------------------------------------------


def start(path: Path) -> subprocess.Popen[bytes]:
    code = "from udsstream.cli import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, "compare", str(path)], stdout=subprocess.DEVNULL)


def wait_for(what, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def runs_as(pid: int) -> bool:
    try:
        return b"udsstream.compare.child" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def begin_and_stop(settings: dict[str, Any], path: Path, how: signal.Signals) -> Path:
    """Starts the command and stops it in the middle of its first run, after a checkpoint; that run's folder."""
    settings["run"] |= {"max_duration": "60ba", "save_interval": "10ba"}
    settings["run"]["eval"]["interval"] = "7ba"
    first = Path(settings["out"]) / "random" / "seed-1"
    process = start(write_settings(path, settings))
    wait_for((first / "checkpoints" / "latest-rank0.pt").is_symlink)
    child = int((first / "_state" / "r00000" / "lock").read_text())
    assert runs_as(child)
    process.send_signal(how)
    assert process.wait(60) != 0
    # What it was training ends with it: otherwise two processes would go on with one run.
    wait_for(lambda: not runs_as(child), seconds=20)
    assert not is_finished(first), "the run was over before it could be stopped"
    return first


def test_killed_in_the_middle_and_started_again_it_is_the_same_table(model, data, tmp_path):
    settings = settings_of(tmp_path / "out", model, data, seeds=[1])
    first = begin_and_stop(settings, tmp_path / "c.yaml", signal.SIGKILL)
    assert start(tmp_path / "c.yaml").wait(300) == 0
    untouched = CompareConfig(**settings | {"out": str(tmp_path / "untouched")})
    job.compare(untouched)
    assert len(figures(tmp_path / "out")["runs"]) == 2
    assert figures(tmp_path / "out") == figures(tmp_path / "untouched")
    assert SelectionLog.open(first).table(all_attempts=True)["attempt"].to_numpy().max() == 1  # it did go on


def test_ctrl_c_ends_the_run_too(model, data, tmp_path):
    settings = settings_of(tmp_path / "out", model, data, seeds=[1])
    begin_and_stop(settings, tmp_path / "c.yaml", signal.SIGINT)


def test_a_configuration_is_read_from_the_file_and_the_command_line(done, tmp_path):
    config, _ = done
    path = write_settings(tmp_path / "c.yaml", config.model_dump())
    assert load_compare_config(path) == config
