"""`udsstream train` from a configuration to a run's folder: text streams, tokenizer, LoRA, held-out loss, going on, being refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import launch
import pytest
import yaml
from jobs import udsstream, write_rows
from streaming import MDSWriter
from transformers import PreTrainedTokenizerFast

from udsstream import SelectionLog, pipeline
from udsstream.errors import ConfigError, DataError, LogExistsError, ModelError, ResumeError, ShardError
from udsstream.run_config import load_run_config
from udsstream.run_folder import is_finished

ROOT = Path(__file__).parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
GSM8K_RECIPE = ROOT / "pipelines" / "gsm8k.yaml"


def test_a_run_from_its_configuration(config_file, tmp_path, monkeypatch, capsys):
    code, out, _ = udsstream(monkeypatch, capsys, "train", str(config_file), "seed=3")
    assert code == 0
    run = tmp_path / "run"
    for expected in (
        "kept and trained on",
        "10 (25%)",
        "held-out loss, before → after",
        f"udsstream log {run} --step 0",
    ):
        assert expected in out, expected
    assert load_run_config(run / "config.yaml").seed == 3
    summary = json.loads((run / "summary.json").read_text())
    assert summary["batches"] == 5
    assert summary["eval_loss_before"] > 0
    assert summary["eval_loss_after"] != summary["eval_loss_before"]
    log = SelectionLog.open(run)
    assert [stream["name"] for stream in log.run["streams"]] == ["animals", "numbers"]
    assert log.run["seeds"] == {"selection": 17, "training": 3}
    assert log.table().num_rows == 40
    files = [path for path in run.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    assert not any(b"sat on the mat" in path.read_bytes() for path in files)  # ids and numbers, never text

    code, out, _ = udsstream(monkeypatch, capsys, "log", str(run), "--step", "1", "--json")
    rows = json.loads(out)
    assert [row["train_order"] for row in rows if row["selected"]] == [0, 1]
    code, out, _ = udsstream(monkeypatch, capsys, "log", str(run), "--json")
    assert json.loads(out)["kept"] == 10
    code, out, _ = udsstream(monkeypatch, capsys, "log", str(run), "--to-parquet", "--json")
    assert Path(json.loads(out)["parquet"]).exists()
    code, _, err = udsstream(monkeypatch, capsys, "log", str(run), "--step", "77")
    assert (code, err) == (1, "udsstream: LogError: step 77 is not in the log; it holds steps 0 to 4\n")


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.lora=null", "data.padding_side=left"],
        ["selection=null"],
        ["data.num_workers=1", "data.verify_data=true", "scheduler.name=cosine", "data.loss_on=all"],
        ["selection.method=random", "selection.keep=0.5", "device_train_microbatch_size=1", "eval=null"],
    ],
    ids=["full training, left padding", "no selection", "a worker, verified shards", "random"],
)
def test_variants(config_file, overrides, tmp_path):
    result = pipeline.train(load_run_config(config_file, overrides))
    assert result.batches == 5
    assert is_finished(tmp_path / "run")


@pytest.mark.parametrize("column", ["text", "messages"])
def test_the_other_forms_of_rows(config_file, tmp_path, model, column):
    turns = [{"role": "user", "content": "say the word"}, {"role": "assistant", "content": "the word"}]
    value = "the cat sat on the mat" if column == "text" else json.dumps(turns)
    write_rows(tmp_path / "rows", [{column: value}] * 16)
    overrides = ["data.streams_root=null", "data.streams=[{local: " + str(tmp_path / "rows") + "}]", "eval=null"]
    if column == "messages":
        template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
        folder = tmp_path / "chat"
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        overrides.append(f"model.tokenizer={folder}")
    pipeline.train(load_run_config(config_file, [*overrides, "max_duration=2ba"]))
    assert SelectionLog.open(tmp_path / "run").table().num_rows == 16


def test_a_remote_stream(config_file, data, tmp_path):
    """Remote is a folder here; Streaming fetches from S3, GCS and others in the same way."""
    settings = yaml.safe_load(config_file.read_text())
    stream = {"remote": str(data / "train" / "animals"), "local": str(tmp_path / "cache")}
    settings["data"] = {"batch_size": 8, "streams": [stream], "validate_hash": "sha1"}
    config_file.write_text(yaml.safe_dump(settings | {"max_duration": "2ba", "eval": None}))
    pipeline.train(load_run_config(config_file))
    (recorded,) = SelectionLog.open(tmp_path / "run").run["streams"]
    assert (recorded["location"], recorded["samples"]) == (stream["remote"], 30)


def test_streams_are_drawn_in_proportion(config_file, data, tmp_path):
    streams = [
        {"local": str(data / "train" / name), "proportion": share}
        for name, share in (("animals", 0.8), ("numbers", 0.2))
    ]
    settings = yaml.safe_load(config_file.read_text())
    settings["data"] = {"batch_size": 8, "streams": streams}
    config_file.write_text(yaml.safe_dump(settings | {"max_duration": "1ep", "eval": None}))
    pipeline.train(load_run_config(config_file))
    numbers = SelectionLog.open(tmp_path / "run").table()["stream"].to_pylist()
    assert numbers.count(0) == pytest.approx(0.8 * len(numbers), abs=1)


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"needs GSM8K in {GSM8K}, which only the project's own workplace has")
def test_gsm8k_by_its_recipe(model, tmp_path):
    """Real questions and answers through pipelines/gsm8k.yaml; the tiny model stands in for SmolLM2."""
    for split, count in (("train", 40), ("test", 8)):
        lines = (GSM8K / f"{split}.jsonl").read_text().splitlines()[:count]
        write_rows(tmp_path / split, [json.loads(line) for line in lines])
    overrides = [
        f"save_folder={tmp_path / 'run'}",
        f"data.streams.0.local={tmp_path / 'train'}",
        f"eval.local={tmp_path / 'test'}",
        f"model.name={model}",
        "selection.projection_dims=[8,4]",
        "max_duration=4ba",
        "progress_bar=false",
    ]
    result = pipeline.train(load_run_config(GSM8K_RECIPE, overrides))
    rows = SelectionLog.open(tmp_path / "run").table()
    assert (rows.num_rows, sum(rows["selected"].to_pylist())) == (32, 8)
    assert rows["tokens"].to_numpy().min() > 20
    assert result.eval_loss_after != result.eval_loss_before


def test_a_finished_run_is_not_mixed_with_a_new_one(config_file, tmp_path):
    pipeline.train(load_run_config(config_file))
    with pytest.raises(LogExistsError, match=r"already holds a run \(finished\); choose another save_folder"):
        pipeline.train(load_run_config(config_file))
    again = pipeline.train(load_run_config(config_file, ["autoresume=true"]))
    assert again.batches == 5
    assert SelectionLog.open(tmp_path / "run").table().num_rows == 40


def test_going_on_with_another_configuration_is_refused(config_file):
    pipeline.train(load_run_config(config_file))
    changed = load_run_config(config_file, ["autoresume=true", "optimizer.lr=0.5", "selection.keep=1"])
    with pytest.raises(ResumeError, match=r"optimizer\.lr: was 0\.0001, is 0\.5\n  selection\.keep: was 2, is 1"):
        pipeline.train(changed)


def test_a_longer_run_goes_on_where_it_was(config_file, tmp_path):
    first = pipeline.train(load_run_config(config_file, ["max_duration=4ba"]))
    longer = pipeline.train(load_run_config(config_file, ["max_duration=6ba", "autoresume=true"]))
    assert longer.batches == 6
    assert longer.eval_loss_before == first.eval_loss_before
    log = SelectionLog.open(tmp_path / "run")
    assert log.steps().tolist() == list(range(6))
    log.verify()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["data.streams_root=/nowhere"], DataError, r"data\.streams_root: /nowhere is not a folder"),
        (
            ["data.streams_root=null", "data.streams=[{local: /nowhere}]"],
            DataError,
            r"data\.streams\.0\.local: /nowhere holds no index\.json",
        ),
        (["model.name=/nowhere"], ModelError, r"model\.name='/nowhere': cannot be loaded"),
        (["data.prompt_key=question"], DataError, r"question"),
    ],
)
def test_what_cannot_be_trained_on(config_file, overrides, error, message):
    with pytest.raises(error, match=message):
        pipeline.train(load_run_config(config_file, overrides))


def test_streams_that_are_still_being_written_are_refused(config_file, tmp_path):
    write_rows(tmp_path / "streams" / "first", [{"prompt": "a", "response": "a"}] * 8)
    (tmp_path / "streams" / "_job").mkdir()
    with pytest.raises(
        DataError, match=r"is being written, or its writing was interrupted .* so streams may be missing"
    ):
        pipeline.train(load_run_config(config_file, [f"data.streams_root={tmp_path / 'streams'}"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.prompt_key=question"], r"data.streams_root: \S+animals has none of the known forms: its columns are 'prompt', 'response'"),
        (["data.format=text"], r"data.streams_root: \S+animals has no column 'text'; it has 'prompt', 'response'"),
        (["data.streams_root=null", "data.streams=[{local: DATA/train/numbers}]", "data.format=messages"],
         r"data.streams.0: \S+numbers has no column 'messages'"),
    ],
)  # fmt: skip
def test_columns_are_looked_at_before_a_model_is_loaded(config_file, data, tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr(pipeline, "build_model", lambda _: pytest.fail("it was loaded"))
    config = load_run_config(config_file, [override.replace("DATA", str(data)) for override in overrides])
    with pytest.raises(DataError, match=message):
        pipeline.train(config)
    assert not (tmp_path / "run").exists(), "and the folder is still free"


def test_the_held_out_stream_s_columns_too(config_file, tmp_path):
    write_rows(tmp_path / "other", [{"question": "why", "answer": "because"}])
    with pytest.raises(
        DataError, match=r"eval: \S+other has none of the known forms: its columns are 'answer', 'question'"
    ):
        pipeline.train(load_run_config(config_file, [f"eval.local={tmp_path / 'other'}"]))


def test_a_folder_whose_job_came_to_nothing_can_be_used_again(config_file, tmp_path):
    with pytest.raises(ModelError):
        pipeline.train(load_run_config(config_file, [f"model.name={tmp_path / 'nothing'}"]))
    assert (tmp_path / "run" / "config.yaml").exists()
    assert pipeline.train(load_run_config(config_file, ["max_duration=1ba"])).batches == 1
    with pytest.raises(LogExistsError):
        pipeline.train(load_run_config(config_file, ["max_duration=1ba"]))


def test_an_empty_stream_is_refused(config_file, tmp_path):
    write_rows(tmp_path / "streams" / "full", [{"prompt": "a", "response": "a"}] * 8)
    with MDSWriter(out=str(tmp_path / "streams" / "empty"), columns={"prompt": "str", "response": "str"}):
        pass
    with pytest.raises(DataError, match=r"the stream with the index .*empty/index\.json holds no samples"):
        pipeline.train(load_run_config(config_file, [f"data.streams_root={tmp_path / 'streams'}"]))


def test_a_damaged_shard_is_found_before_training(config_file, tmp_path):
    stream = write_rows(tmp_path / "streams" / "one", [{"prompt": "the cat", "response": "sat"}] * 16)
    shard = next(stream.glob("*.mds"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ShardError, match=rf"shard {shard} is corrupt: its sha1 is"):
        pipeline.train(
            load_run_config(config_file, [f"data.streams_root={tmp_path / 'streams'}", "data.verify_data=true"])
        )


def test_a_mistake_is_printed_without_a_traceback(config_file, monkeypatch, capsys):
    code, _, err = udsstream(monkeypatch, capsys, "train", str(config_file), "seeed=3")
    assert code == 1
    assert err == f"udsstream: ConfigError: {config_file}: 1 mistake\n  seeed: unknown key; did you mean seed?\n"


def test_more_to_be_kept_than_there_are_is_refused_before_training(config_file):
    with pytest.raises(ConfigError, match=r"keep: 9 of each candidate batch are to be kept, but a batch has only 8"):
        pipeline.train(load_run_config(config_file, ["selection.keep=9"]))


# Several ranks ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """A command on each rank."""

    arguments: tuple[str, ...]

    def __call__(self) -> None:
        from udsstream import cli

        sys.argv = ["udsstream", *self.arguments]
        cli.main()


@pytest.mark.slow
def test_two_ranks_train_and_replay_from_the_command_line(config_file, tmp_path):
    processes = launch.forkserver()
    run, again = tmp_path / "run", tmp_path / "again"
    job = Job(("train", str(config_file), "data.batch_size=4", "data.num_workers=1"))
    assert launch.finish(launch.start(processes, 2, job)) == [0, 0]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["batches"] == 5
    assert summary["eval_loss_before"] > 0
    log = SelectionLog.open(run)
    assert log.table().num_rows == 40
    assert [len(log.selected(step)) for step in log.steps()] == [2] * 5
    job = Job(("replay", str(run), "--out", str(again), "--verify"))
    assert launch.finish(launch.start(processes, 2, job)) == [0, 0]
    found = json.loads((again / "replay.json").read_text())
    assert (found["verdict"], found["differences"]) == ("identical", [])
    assert found["verification"]["equal_scores"] == found["verification"]["scores"] == 40
    refused = Job(("train", str(config_file), "data.batch_size=4"))  # the folder is taken
    assert launch.finish(launch.start(processes, 2, refused)) == [1, 1]
