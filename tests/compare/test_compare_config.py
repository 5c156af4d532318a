"""The configuration of a comparison: its runs, and one line for each mistake, with the entries that make it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from comparisons import settings_of, write_settings

from udsstream.compare.config import CompareConfig, load_compare_config, plan_runs
from udsstream.config import Method
from udsstream.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "pipelines" / "compare.yaml"


def load(tmp_path: Path, overrides: list[str] | None = None, **changes: Any) -> CompareConfig:
    settings = settings_of(tmp_path / "out", "m", Path("d"), **changes)
    return load_compare_config(write_settings(tmp_path / "c.yaml", settings), overrides or [])


def test_runs_are_planned_seed_by_seed(tmp_path):
    runs = plan_runs(load(tmp_path))
    assert [(run.entry, run.seed) for run in runs] == [("random", 1), ("longest", 1), ("random", 2), ("longest", 2)]
    assert runs[3].folder == tmp_path / "out" / "longest" / "seed-2"
    assert runs[3].config.selection == {
        "keep": 2, "projection_dims": [8, 4], "buffer_size": 16, "method": "longest", "seed": 2,
    }  # fmt: skip
    assert runs[3].config.autoresume is True
    assert runs[3].config.progress_bar is False


def test_a_seed_is_that_of_the_training_the_order_and_the_draws(tmp_path):
    for run in plan_runs(load(tmp_path)):
        config = run.config
        assert (config.seed, config.data.shuffle_seed, config.selection_config().seed) == (run.seed,) * 3


def test_entries_change_anything_with_dotted_paths_or_nested(tmp_path):
    entries = {
        "a": {"optimizer.lr": 0.5, "data": {"batch_size": 4}, "selection.keep": 1},
        "b": {"data.streams_root": None, "data.streams": [{"local": "x"}, {"local": "y"}], "data.streams.1.local": "z"},
    }
    a, b = plan_runs(load(tmp_path, entries=entries, seeds=[3]))
    assert (a.config.optimizer.lr, a.config.data.batch_size, a.config.selection_config().keep) == (0.5, 4, 1)
    assert a.config.data.streams_root == "d/train"  # nested changes leave what is beside them
    assert [stream.local for stream in b.config.data.streams] == ["x", "z"]
    assert b.config.optimizer.lr == 1e-2


def test_overrides_of_the_command_line(tmp_path):
    config = load(tmp_path, ["seeds=[7]", "run.max_duration=9ba", "entries.more={selection.method: uds}"])
    runs = plan_runs(config)
    assert [(run.entry, run.seed, run.config.max_duration) for run in runs] == [
        ("random", 7, "9ba"),
        ("longest", 7, "9ba"),
        ("more", 7, "9ba"),
    ]


def test_mistakes_are_found_before_anything_runs_and_name_their_entries(tmp_path):
    entries = {
        "good": {},
        "bad": {"selection.method": "best", "optimizer.lr": -1.0},
        "typo": {"selection.keeep": 1},
        "typo-too": {"selection": {"keeep": 2}},
    }
    with pytest.raises(ConfigError) as caught:
        plan_runs(load(tmp_path, entries=entries), where="c.yaml")
    heading, *lines = str(caught.value).splitlines()
    assert heading == "c.yaml: there are runs that cannot be done"
    assert lines[0] == "entry bad:"
    assert any(line.strip().startswith("optimizer.lr: input should be greater than 0") for line in lines)
    assert any(line.startswith("entries typo, typo-too:") for line in lines)
    assert sum("selection.keeep: unknown" in line for line in lines) == 1
    assert "good" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selection.seed": 4}, r"entry only:\n  selection\.seed: .* it comes from `seeds`"),
        ({"seed": 4}, r"entry only:\n  seed: .* it comes from `seeds`"),
        ({"data": {"shuffle_seed": 4}}, r"data\.shuffle_seed: .* it comes from `seeds`"),
        ({"save_folder": "x"}, r"save_folder: .* it comes from `out`"),
        ({"selection": None}, r"selection: null leaves no record to compare by"),
        ({"data.streams": [], "data.streams.5.local": "x"}, r"entry only:\n  cannot be applied: "),
        ({"colour": "red"}, r"entry only:\n  colour: unknown key"),
        ({"selection.method": "rho_loss"}, r"entry only:\n  selection\.reference: missing; method rho_loss needs it"),
        ({"selection.method": "greats"}, r"entry only:\n  selection\.validation: missing; method greats needs it"),
        (
            {"selection.method": "rho_loss", "selection.reference": "/nowhere"},
            r"selection\.reference: /nowhere holds no log",
        ),
    ],
)
def test_what_a_run_of_a_comparison_cannot_be_given(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        plan_runs(load(tmp_path, entries={"only": change}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, r"seeds: list should have at least 1 item"),
        ({"seeds": [1, 1]}, r"seeds: a seed is given more than once"),
        ({"entries": {}}, r"entries: dictionary should have at least 1 item"),
        ({"entries": {"../up": {}}}, r"entries: '\.\./up' cannot name a folder"),
        ({"entries": {"a b": {}}}, r"entries: 'a b' cannot name a folder"),
        ({"entries": {"a": None}}, r"entries\.a: input should be a valid dictionary"),
        ({"baseline": "best"}, r"baseline: 'best' is none of the entries: random, longest"),
        ({"answers": {"kind": "essay"}}, r"answers\.kind: input should be 'gsm8k'"),
        ({"jobs": 2}, r"jobs: unknown key"),
    ],
)
def test_mistakes_of_the_comparison_itself(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **change)


def test_answers_need_held_out_data(tmp_path):
    run = settings_of(tmp_path, "m", Path("d"))["run"]
    del run["eval"]
    with pytest.raises(ConfigError, match=r"answers: they are asked of the held-out data, but run\.eval names none"):
        load(tmp_path, answers={"kind": "gsm8k"}, run=run)


def test_the_baseline_is_random_where_there_is_one(tmp_path):
    assert load(tmp_path).baseline_entry == "random"
    assert load(tmp_path, baseline="longest").baseline_entry == "longest"
    assert load(tmp_path, entries={"uds": {}}).baseline_entry is None


def test_the_recipe_is_valid_and_opens_with_its_command():
    config = load_compare_config(RECIPE)
    runs = plan_runs(config, where=RECIPE.name)
    assert len(runs) == len(config.entries) * len(config.seeds) == 39
    assert {run.config.selection_config().keep for run in runs} == {0.25}
    methods = {run.config.selection_config().method for run in runs}
    assert set(get_args(Method)) - methods == {"rho_loss"}  # which needs a pass of its own first
    assert "# rho-loss: {selection.method: rho_loss" in RECIPE.read_text()
    opening = RECIPE.read_text().split("\n\n")[0]
    assert "udsstream compare pipelines/compare.yaml run.data.streams.0.local=" in opening
    overrides = ["run.data.streams.0.local=a", "run.eval.local=b"]
    for run in plan_runs(load_compare_config(RECIPE, overrides)):
        assert (run.config.data.streams[0].local, run.config.eval and run.config.eval.local) == ("a", "b")
        if run.entry == "greats":
            assert (run.config.selection or {})["validation"] == {"local": "a", "samples": 16}
