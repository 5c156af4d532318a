"""`udsstream replay`: a run's folder is enough; the verdict is printed and is the exit code; changes are re-use."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pytest
import torch
import yaml
from composer.core import Callback
from jobs import udsstream, write_rows

from udsstream import SelectionLog, pipeline
from udsstream.errors import ConfigError, ReplayError, ResumeError, ShardError
from udsstream.replay import replay
from udsstream.run_config import load_run_config
from udsstream.run_folder import read_durations, record_duration
from udsstream.scoring import methods


@pytest.fixture(scope="module")
def run(model, data, tmp_path_factory) -> Path:
    """A finished run of 6 steps with LoRA and dropout, evaluated in its middle, with checkpoints at 2, 4 and 6."""
    from jobs import write_config

    folder = tmp_path_factory.mktemp("job")
    overrides = ["max_duration=6ba", "model.lora.dropout=0.1", "eval.interval=3ba", "eval.batch_size=4"]
    pipeline.train(load_run_config(write_config(folder, model, data), overrides))
    return folder / "run"


def plain(printed: str) -> str:
    """What was printed, without the table's lines."""
    return " ".join(re.sub(r"[^\x00-\x7f]", " ", printed).split())


def copied(run: Path, folder: Path) -> Path:
    """The run, to be tampered with."""
    return Path(shutil.copytree(run, folder / "copy"))


def configured(source: Path, **changes: object) -> None:
    settings = yaml.safe_load((source / "config.yaml").read_text())
    (source / "config.yaml").write_text(yaml.safe_dump(settings | changes))


def test_the_whole_run(run, tmp_path, monkeypatch, capsys):
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, out, _ = udsstream(monkeypatch, capsys, "replay", str(run), "--out", str(tmp_path / "again"), "--verify")
    assert code == 0
    text = plain(out)
    for expected in (
        "at step 6 those of the run's checkpoint, bit for bit",
        "6 of 6 steps choose what the log says",
        "48 of 48 are the logged ones bit for bit",
        "after 6 of 6 steps the logged one, by its digest",
        "times as long)",
    ):
        assert expected in text, expected
    assert "not to be expected" not in text
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files  # it is only read
    written = json.loads((tmp_path / "again" / "replay.json").read_text())
    assert (written["verdict"], written["finished"], written["first"], written["stop"]) == ("identical", True, 0, 6)
    ours, theirs = (
        torch.load(folder / "checkpoints" / "latest-rank0.pt", weights_only=False)
        for folder in (run, tmp_path / "again")
    )
    ours, theirs = ours["state"]["model"], theirs["state"]["model"]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_without_evaluation_the_weights_are_the_same(run, tmp_path):
    """Evaluating draws random numbers; they are put back, in the run and in its replay alike."""
    result = replay(run, out=tmp_path / "again", overrides=["eval=null"])
    assert (result.verdict, result.eval_loss_after, result.differences) == ("identical", None, [])


def test_a_range_is_compared_at_the_last_checkpoint_within(run, tmp_path, monkeypatch, capsys):
    code, out, _ = udsstream(
        monkeypatch, capsys, "replay", str(run), "--out", str(tmp_path / "again"), "--steps", ":5", "--json"
    )
    found = json.loads(out[out.index("{") :])
    assert (code, found["verdict"], found["weights"]["step"], found["weights"]["different"]) == (0, "identical", 4, 0)


def test_from_the_middle_on_with_the_runs_checkpoint(run, tmp_path):
    result = replay(run, out=tmp_path / "again", steps=(4, None), verify=True)
    assert (result.first, result.stop, result.verdict) == (4, 6, "identical")
    assert result.verification is not None
    assert (result.verification["steps"], result.verification["equal_memories"]) == (2, 2)


def test_from_the_middle_on_without_a_checkpoint_is_a_re_use(run, tmp_path):
    result = replay(run, out=tmp_path / "again", steps=(3, 5))
    assert result.verdict == "re-used"
    assert result.differences == ["it begins at step 3 without the checkpoint that the run had saved there"]


def test_another_learning_rate_is_a_re_use(run, tmp_path, monkeypatch, capsys):
    code, out, _ = udsstream(
        monkeypatch, capsys, "replay", str(run), "optimizer.lr=0.01", "data.num_workers=1", "--out", str(tmp_path / "x")
    )
    assert code == 0
    assert "equal weights were not to be expected" in out
    assert "optimizer.lr: was 0.0001, is 0.01" in out
    assert "num_workers" not in out


def test_the_next_free_folder_beside_the_run(run, tmp_path):
    source = copied(run, tmp_path)
    first, second = replay(source, steps=(0, 2)), replay(source, steps=(0, 2))
    assert (first.save_folder, second.save_folder) == (f"{source}-replay", f"{source}-replay-2")
    with pytest.raises(ReplayError, match=r"copy-replay already holds a finished replay"):
        replay(source, out=Path(first.save_folder))
    with pytest.raises(ReplayError, match=r"copy holds a run, but no replay"):
        replay(source, out=source)


class KilledAfter5Steps(Callback):
    def batch_end(self, state, logger):
        if state.timestamp.batch.value == 5:
            raise KeyboardInterrupt


def killed_after_5_steps(monkeypatch, *arguments: object, **given: object) -> None:
    from udsstream import replay as job

    build = job.build_trainer

    def killed(*args, callbacks, **kwargs):
        return build(*args, callbacks=[*callbacks, KilledAfter5Steps()], **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(job, "build_trainer", killed)
        with pytest.raises(KeyboardInterrupt):
            replay(*arguments, **given)


def test_an_interrupted_replay_goes_on(run, tmp_path, monkeypatch):
    killed_after_5_steps(monkeypatch, run, out=tmp_path / "again", overrides=["scheduler.name=constant"])
    with pytest.raises(ReplayError, match=r"an interrupted replay of something else:\n  stop: was 6, is 4"):
        replay(run, out=tmp_path / "again", steps=(0, 4), overrides=["scheduler.name=constant"])
    with pytest.raises(ResumeError, match=r"scheduler.name: was 'constant', is 'linear'"):
        replay(run, out=tmp_path / "again")
    result = replay(run, out=tmp_path / "again", overrides=["scheduler.name=constant"])
    whole = replay(run, out=tmp_path / "whole", overrides=["scheduler.name=constant"])
    assert result.verdict == whole.verdict == "re-used"
    assert result.eval_loss_after == whole.eval_loss_after


def test_streams_that_moved(run, data, tmp_path, monkeypatch, capsys):
    source = copied(run, tmp_path)
    away = Path(shutil.copytree(data / "train", tmp_path / "away"))
    settings = yaml.safe_load((source / "config.yaml").read_text())
    settings["data"]["streams_root"] = str(tmp_path / "gone")
    (source / "config.yaml").write_text(yaml.safe_dump(settings))
    arguments = [
        "replay",
        str(source),
        "--stream",
        f"animals={away / 'animals'}",
        "--stream",
        f"numbers={away / 'numbers'}",
    ]
    code, out, _ = udsstream(monkeypatch, capsys, *arguments, "--steps", ":2")
    assert code == 0
    assert "at step 2 those of the run's checkpoint, bit for bit" in plain(out)
    code, _, err = udsstream(monkeypatch, capsys, "replay", str(source), "--stream", "plants=/x")
    assert (code, err.strip()) == (
        1,
        "udsstream: ConfigError: --stream plants: the run had no stream of that name; it had animals, numbers",
    )
    swapped = {"animals": str(away / "numbers"), "numbers": str(away / "animals")}
    with pytest.raises(ResumeError, match=r"stream 0: was animals .* is numbers"):
        replay(source, out=tmp_path / "b", streams=swapped)
    for shard in (away / "animals").glob("*.mds"):
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    with pytest.raises(ShardError, match=r"sample \d+ is not the one that the run trained on"):
        replay(source, out=tmp_path / "c", streams={name: str(away / name) for name in ("animals", "numbers")})


def test_weights_that_differ_for_no_known_reason_are_said(run, tmp_path, monkeypatch, capsys):
    source = copied(run, tmp_path)
    path = source / "checkpoints" / "ep0-ba6-rank0.pt"
    saved = torch.load(path, weights_only=False)
    name = next(iter(saved["state"]["model"]))
    saved["state"]["model"][name].view(-1)[0] += 1
    torch.save(saved, path)
    code, out, _ = udsstream(monkeypatch, capsys, "replay", str(source))
    assert code == 1
    assert "at step 6 1 of " in plain(out)


def test_a_decision_that_diverges_is_said(run, tmp_path, monkeypatch, capsys):
    """When decisions are made again, what is far from the memory counts for less instead of more."""
    monkeypatch.setitem(methods.METHODS, "uds", lambda given: (given["intra"] - 1e4 * given["inter"]).float())
    code, out, _ = udsstream(
        monkeypatch, capsys, "replay", str(run), "--verify", "--out", str(tmp_path / "x"), "--json"
    )
    found = json.loads(out[out.index("{") :])
    assert (code, found["verdict"]) == (1, "diverged")
    tally = found["verification"]
    assert tally["agreed"] < tally["steps"]
    assert tally["equal_scores"] == 8  # at step 0 the memory was empty
    assert tally["first_difference"]["step"] == 1
    log = SelectionLog.open(run)
    first = tally["first_divergence"]
    rows = log.table(filter=pc.field("step") == first["step"]).to_pylist()
    row = rows[first["position"]]
    assert (row["sample_id"], row["score"], row["selected"]) == (
        first["sample_id"],
        first["logged_score"],
        first["was_kept"],
    )
    assert first["new_score"] < 0
    assert found["weights"]["different"] == 0  # the logged choice was trained on


def test_folders_that_cannot_be_replayed(run, tmp_path):
    source = copied(run, tmp_path)
    (source / "config.yaml").unlink()
    with pytest.raises(
        ReplayError, match=r"holds a log but no config.yaml: .* Replay it in the script that trained it"
    ):
        replay(source)
    with pytest.raises(ConfigError, match=r"save_folder: is .*/x for a replay"):
        replay(run, out=tmp_path / "x", overrides=["save_folder=elsewhere"])


def test_code_that_comes_with_a_model_needs_ones_own_word(run, tmp_path):
    source = copied(run, tmp_path)
    settings = yaml.safe_load((source / "config.yaml").read_text())
    settings["model"]["trust_remote_code"] = True
    (source / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ReplayError, match=r"asks to run code that comes with the model"):
        replay(source, out=tmp_path / "x")
    result = replay(source, out=tmp_path / "y", steps=(0, 2), overrides=["model.trust_remote_code=true"])
    assert result.verdict == "identical"


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_what_the_run_began_with_is_not_run(run, tmp_path):
    source, mark = copied(run, tmp_path), tmp_path / "code was run"
    configured(source, load_path=str(source / "weights.pt"))
    torch.save({"state": {"model": {}}, "more": Payload(mark)}, source / "weights.pt")
    with pytest.raises(ResumeError, match=r"weights\.pt is not read: it names (posix|nt)\.mkdir, which could run code"):
        replay(source, out=tmp_path / "x")
    configured(source, load_path="s3://elsewhere/weights.pt")
    with pytest.raises(ReplayError, match=r"give load_path=s3://elsewhere/weights\.pt again"):
        replay(source, out=tmp_path / "y")
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["weights.pt#a", "weights.pt?a", "weights.pt;a", "weights{rank}.pt", "weights.tar", "weights.pt.gz"]
)
def test_a_name_that_composer_reads_otherwise_is_refused(run, tmp_path, name):
    """What is looked at first must be what is loaded: Composer parses names as URIs and formats, and unpacks archives."""
    source, mark = copied(run, tmp_path), tmp_path / "code was run"
    configured(source, load_path=str(source / name))
    shutil.copy(run / "checkpoints" / "latest-rank0.pt", source / name)
    for other in ("weights.pt", "weights0.pt"):
        torch.save({"state": {"model": {}}, "more": Payload(mark)}, source / other)
    with pytest.raises(ResumeError, match=r"Composer would read another file than the one of this name"):
        replay(source, out=tmp_path / "x")
    assert not mark.exists()


@pytest.mark.parametrize("steps", [(0, 2), (4, 6)], ids=["the replay's own checkpoint", "the run's"])
def test_a_folder_whose_name_composer_reads_otherwise_is_refused(run, tmp_path, steps):
    source, mark = Path(shutil.copytree(run, tmp_path / "a{rank}#b")), tmp_path / "code was run"
    (tmp_path / "a0-replay" / "checkpoints").mkdir(parents=True)
    for other in (tmp_path / "a0", tmp_path / "a0-replay" / "checkpoints" / "latest-rank0.pt"):
        torch.save({"state": {"model": {}}, "more": Payload(mark)}, other)
    out = None if steps == (0, 2) else tmp_path / "x"
    with pytest.raises(ResumeError, match=r"Composer would read another file than the one of this name"):
        replay(source, out=out, steps=steps)
    assert not mark.exists()


def test_a_run_that_began_with_other_weights(run, tmp_path):
    whole = ["model.lora=null", "max_duration=2ba", "eval=null"]
    pipeline.train(load_run_config(run / "config.yaml", [*whole, f"save_folder={tmp_path / 'first'}"]))
    began = f"load_path={tmp_path / 'first' / 'checkpoints' / 'latest-rank0.pt'}"
    pipeline.train(load_run_config(run / "config.yaml", [*whole, f"save_folder={tmp_path / 'run'}", began]))
    assert replay(tmp_path / "run").verdict == "identical"


def test_code_in_an_interrupted_replay_that_came_with_the_run_is_not_run(run, tmp_path, monkeypatch):
    from udsstream import replay as job

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    source, mark = copied(run, tmp_path), tmp_path / "code was run"
    with monkeypatch.context() as patch:
        patch.setattr(job, "build_trainer", killed)
        with pytest.raises(KeyboardInterrupt):
            replay(source)
    checkpoints = tmp_path / "copy-replay" / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    torch.save({"state": {"model": {}}, "more": Payload(mark)}, checkpoints / "latest-rank0.pt")
    with pytest.raises(ResumeError, match=r"latest-rank0\.pt is not read: it names (posix|nt)\.mkdir"):
        replay(source)
    assert not mark.exists()


@pytest.mark.parametrize("content", ["[]", '{"run":', "[" * 100_000])
def test_a_replay_json_that_was_damaged(run, tmp_path, content):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "replay.json").write_text(content)
    with pytest.raises(ReplayError, match=r"replay\.json (cannot be read|is not what a replay writes)"):
        replay(run, out=tmp_path / "x")


@pytest.mark.parametrize(
    ("scheduler", "first", "then", "steps"),
    [("constant", "4ba", "8ba", 8), ("linear", "4ba", "8ba", 8), ("cosine", "1ep", "2ep", 12)],
)
def test_a_run_that_was_trained_further(model, data, tmp_path, scheduler, first, then, steps):
    """A learning rate that decays was another one in the first attempt, and is in the replay."""
    from jobs import write_config

    config = write_config(tmp_path, model, data)
    settings = [f"scheduler.name={scheduler}", "eval=null"]
    pipeline.train(load_run_config(config, [*settings, f"max_duration={first}"]))
    pipeline.train(load_run_config(config, [*settings, f"max_duration={then}", "autoresume=true"]))
    source = tmp_path / "run"
    result = replay(source)
    assert (result.verdict, result.differences, result.stop) == ("identical", [], steps)
    assert result.weights is not None
    assert result.weights.step == steps
    assert replay(source, out=tmp_path / "end", steps=(steps // 2, None)).verdict == "identical"
    with pytest.raises(ReplayError, match=rf"max_duration=3ba ends before step {steps - 1}, .* max_duration={steps}ba"):
        replay(source, out=tmp_path / "shorter", overrides=["max_duration=3ba"])
    given = replay(source, out=tmp_path / "given", overrides=[f"max_duration={then}"])
    line = (
        f"max_duration, by which the learning rate decays: was {first} from step 0 on, {then} from step {steps // 2} on"
    )
    if scheduler == "constant":
        assert (given.verdict, given.differences) == ("identical", [])
    else:
        assert (given.verdict, given.differences) == ("re-used", [f"{line}, is {then}"])


def test_a_run_that_was_trained_further_before_this_was_recorded(run, tmp_path):
    source = copied(run, tmp_path)
    configured(source, max_duration="4ba")
    with pytest.raises(ReplayError, match=r"max_duration=4ba ends before step 5, .* longer one: max_duration=6ba"):
        replay(source, out=tmp_path / "x")
    assert replay(source, out=tmp_path / "y", overrides=["max_duration=6ba"]).weights.identical


def test_a_duration_is_noted_once_however_often_the_run_is_resumed(run, tmp_path):
    source = copied(run, tmp_path)  # of 6ba
    for step, duration, noted in (
        (2, "6ba", []),
        (4, "8ba", [(4, "8ba")]),
        (6, "8ba", [(4, "8ba")]),
        (7, "9ba", [(4, "8ba"), (7, "9ba")]),
        (5, "8ba", [(4, "8ba")]),
        (0, "6ba", []),
    ):
        record_duration(source, step, duration)
        assert read_durations(source) == [(0, "6ba"), *noted]


@pytest.mark.parametrize(
    "content", ["[", "{}1", "[[1]]", '[["1", "4ba"]]', '[[1, "4x"]]', '[[4, "4ba"], [2, "6ba"]]', "[" * 100_000]
)
def test_durations_that_were_damaged(run, tmp_path, content):
    source = copied(run, tmp_path)
    (source / "durations.json").write_text(content)
    with pytest.raises(ResumeError, match=r"durations\.json does not hold steps and durations"):
        replay(source, out=tmp_path / "x")


def killed_before_its_result(monkeypatch, *arguments: object, **given: object) -> None:
    """A replay that is killed after its last step."""
    from udsstream import replay as job

    write = job.write_atomically

    def killed(path, text):
        if '"finished": true' in text:
            raise KeyboardInterrupt
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            replay(*arguments, **given)


@pytest.mark.parametrize(("stop", "compared"), [(6, 6), (5, 4)])
def test_an_interrupted_replay_is_compared_though_it_had_passed_the_checkpoint(
    run, tmp_path, monkeypatch, stop, compared
):
    given = {"out": tmp_path / "again", "steps": (None, stop), "overrides": ["save_interval=1ba"]}
    killed_before_its_result(monkeypatch, run, **given)
    result = replay(run, **given)
    assert (result.weights.step, result.weights.identical) == (compared, True)


def test_what_differed_is_known_after_an_interruption_at_the_end(run, tmp_path, monkeypatch):
    source = copied(run, tmp_path)
    described = json.loads((source / "run.json").read_text())
    monkeypatch.setattr("udsstream.mosaicml.replay.library_versions", lambda: described["versions"] | {"torch": "0.1"})
    killed_before_its_result(monkeypatch, source)
    (line,) = replay(source).differences
    assert line.endswith("is '0.1'")


def test_what_differed_at_the_start_is_known_after_an_interruption(run, tmp_path, monkeypatch):
    """With which weights it began is not seen any more."""
    monkeypatch.setattr(
        "udsstream.mosaicml.replay.weights_differences",
        lambda recorded, model, *, at_start: ["trained weights: others"] if at_start else [],
    )
    killed_after_5_steps(monkeypatch, run, out=tmp_path / "again")
    assert replay(run, out=tmp_path / "again").differences == ["trained weights: others"]


@pytest.mark.parametrize("steps", [(None, 10**11), (0, 7), (-(10**11), None), (6, None)])
def test_steps_that_the_log_does_not_hold(run, tmp_path, steps):
    with pytest.raises(ReplayError, match=r"holds steps 0 to 5; choose steps that it holds"):
        replay(run, out=tmp_path / "x", steps=steps)


@pytest.mark.parametrize("given", ["5", "a:b", "-1:3", "1:2:3"])
def test_steps_that_are_no_range(run, monkeypatch, capsys, given):
    code, _, err = udsstream(monkeypatch, capsys, "replay", str(run), "--steps", given)
    assert code == 2
    assert "FIRST:STOP" in err


def test_a_stream_without_a_place(run, monkeypatch, capsys):
    code, _, err = udsstream(monkeypatch, capsys, "replay", str(run), "--stream", "animals")
    assert code == 2
    assert "NAME=PATH" in err


def test_a_run_on_a_remote_stream(model, data, tmp_path):
    """The replay fetches only the shards that hold logged samples."""
    from jobs import write_config

    rows = [
        {"prompt": "the cat sat on the mat", "response": "a dog ran over the hill " * (i % 3 + 1)} for i in range(80)
    ]
    write_rows(tmp_path / "remote" / "train", rows)
    config = write_config(tmp_path, model, data)
    settings = yaml.safe_load(config.read_text())
    settings["data"] = {
        "batch_size": 8,
        "streams": [{"remote": str(tmp_path / "remote" / "train"), "local": str(tmp_path / "cache")}],
        "validate_hash": "sha1",
    }
    config.write_text(yaml.safe_dump(settings | {"max_duration": "2ba", "eval": None}))
    pipeline.train(load_run_config(config))
    run = tmp_path / "run"
    streams = {"train": str(tmp_path / "fetched")}
    shutil.copytree(tmp_path / "remote" / "train", tmp_path / "fetched")
    assert replay(run, out=tmp_path / "a", streams=streams).verdict == "identical"
    shutil.rmtree(tmp_path / "cache")
    assert replay(run, out=tmp_path / "b").verdict == "identical"
    log = SelectionLog.open(run)
    needed = set(log.table(filter=None).filter(log.table()["selected"])["shard"].to_pylist())
    fetched = {path.name for path in (tmp_path / "cache").glob("*.mds")}
    assert fetched == {f"shard.{number:05d}.mds" for number in needed}
