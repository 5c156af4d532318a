"""The configuration of a training job: what is accepted, and one line for each mistake."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

from udsstream.config import SelectionConfig
from udsstream.errors import ConfigError
from udsstream.run_config import CandidatesConfig, RunConfig, config_changes, load_run_config, parse_run_config
from udsstream.sft import SFTCollator, check_columns

PIPELINES = sorted((Path(__file__).parent.parent / "pipelines").glob("*.yaml"))
PIPELINES = [path for path in PIPELINES if path.stem != "compare"]  # not one job: tests/compare/test_config.py

MINIMAL = {
    "save_folder": "run",
    "max_duration": "4ba",
    "model": {"name": "m"},
    "data": {"streams_root": "s", "batch_size": 8},
}


def mistakes(**changes) -> list[str]:
    """The lines that a changed minimal configuration is refused with."""
    with pytest.raises(ConfigError) as caught:
        parse_run_config({**MINIMAL, **changes}, where="test.yaml")
    heading, *lines = str(caught.value).splitlines()
    assert heading.startswith(f"test.yaml: {len(lines)} mistake")
    return [line.strip() for line in lines]


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_opens_with_its_command(path):
    config = load_run_config(path)
    assert isinstance(config, RunConfig)
    assert config.selection_config().max_seq_len == config.max_seq_len
    opening = path.read_text().split("\n\n")[0]
    assert f"udsstream train pipelines/{path.name}" in opening or "make demo" in opening


def test_there_are_recipes():
    assert {path.stem for path in PIPELINES} >= {"demo", "gsm8k", "qwen2.5-7b"}


def test_the_minimum_is_enough():
    config = parse_run_config(MINIMAL, where="test.yaml")
    assert config.selection_config() == SelectionConfig(max_seq_len=2048)
    assert config.model.trust_remote_code is False


def test_overrides_reach_into_sections_and_lists(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "save_folder: a\nmax_duration: 4ba\nmodel: {name: m}\n"
        "data: {batch_size: 8, streams: [{local: x}, {local: y}]}\nselection: {keep: 0.5}\n"
    )
    config = load_run_config(
        path, ["data.streams.1.local=z", "selection.keep=3", "optimizer.lr=1e-3", "max_duration=9ba"]
    )
    assert [stream.local for stream in config.data.streams] == ["x", "z"]
    assert config.selection_config().keep == 3
    assert config.optimizer.lr == 1e-3
    assert config.max_duration == "9ba"


def test_every_mistake_has_a_line_with_its_path():
    *lines, colour = mistakes(
        colour="red",
        max_duration="10 minutes",
        model={"name": "m", "lora": {"rank": 8}},
        data={"streams_root": "s", "batch_size": "8"},
        optimizer={"lr": -1.0},
    )
    assert lines == [
        "max_duration: string should match pattern '^\\d+(ba|ep|sp|tok)$'; found '10 minutes'",
        "model.lora.rank: unknown key; known are alpha, dropout, r, target_modules",
        "data.batch_size: input should be a valid integer; found '8'",
        "optimizer.lr: input should be greater than 0; found -1.0",
    ]
    assert colour.startswith("colour: unknown key; known are autoresume, data, device, ")


def test_the_selection_s_mistakes_are_listed_with_the_others():
    assert mistakes(selection={"keep": "25%"}, max_seq_len="many", sead=3) == [
        "max_seq_len: input should be a valid integer; found 'many'",
        "selection.keep: '25%' is neither a fraction in (0, 1] nor a count of at least 1",
        "sead: unknown key; did you mean seed?",
    ]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"data": {"streams": [{"locl": "x"}]}}, "data.streams.0.locl: unknown key; did you mean local?"),
        ({"eval": {"local": "x", "intervall": "1ba"}}, "eval.intervall: unknown key; did you mean interval?"),
        ({"optimizer": {"learning_rate": 1.0}}, "optimizer.learning_rate: unknown key; known are betas, eps, lr, weight_decay"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_one_that_was_meant(settings, line):
    assert line in mistakes(**settings)


def test_selection_mistakes_have_their_path_too():
    assert mistakes(selection={"keep": 0.0, "method": "magic", "seed": -1}) == [
        "selection.method: 'magic' is none of uds, uds_intra, uds_inter, max_loss, max_grad, selective_backprop, rho_loss, greats, divbs, "
        "longest, random, full, and no function",
        "selection.seed: -1 is not an integer of at least 0",
        "selection.keep: the fraction 0.0 is not in (0, 1]; a count is given as an integer of at least 1",
    ]
    (unknown,) = mistakes(selection={"kep": 0.5})
    assert unknown.startswith("selection.kep: unknown; known are alpha, buffer_size")
    assert mistakes(selection={"max_seq_len": 4}) == ["selection.max_seq_len: is given once, at the top level"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": {"batch_size": 8}}, "data: give either streams or streams_root"),
        ({"data": {"batch_size": 8, "streams": [{}]}}, "data.streams.0: a stream needs local, remote or both"),
        (
            {"data": {"batch_size": 8, "streams": [{"local": "a", "repeat": 2.0, "choose": 5}]}},
            "data.streams.0: repeat and choose are given, but at most one of proportion, repeat and choose may be",
        ),
        (
            {"data": {"batch_size": 8, "streams": [{"local": "a", "repeat": 2.0}, {"local": "b", "choose": 5}]}},
            "data: the streams are weighted by choose and by repeat; weight all of them in one way",
        ),
        ({"eval": {"batch_size": 2}}, "eval: give local, remote or both"),
        ({"model": {}}, "model.name: missing"),
    ],
)
def test_impossible_combinations(changes, expected):
    assert mistakes(**changes) == [expected]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "cannot be read as a configuration"),
        ("- a\n- b\n", "must hold keys and values"),
        ("save_folder: ${nowhere}\n", "cannot be read as a configuration"),
        ("a: !!python/object/apply:os.system ['true']\n", "cannot be read as a configuration"),
    ],
)
def test_unreadable_files(tmp_path, content, message):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_run_config(path)


def test_a_missing_file_and_a_malformed_override(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no such file; pipelines/ holds examples"):
        load_run_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"'seed 3': an override is written key=value"):
        load_run_config(PIPELINES[0], ["seed 3"])


def test_changes_that_matter_to_a_resumed_run():
    old = parse_run_config(MINIMAL, where="old")
    new = parse_run_config(
        {
            **MINIMAL,
            "max_duration": "9ba",
            "autoresume": True,
            "seed": 3,
            "model": {"name": "n"},
            "save_interval": "7ba",
        },
        where="new",
    )
    assert config_changes(old, new) == ["model.name: was 'm', is 'n'", "seed: was 17, is 3"]
    assert config_changes(old, old) == []


def test_how_rows_become_tokens_is_all_that_the_collator_takes():
    """A setting that is left out would stay at its default without a word."""
    data = CandidatesConfig(streams_root="x", response_key="answer", padding_side="left")
    beside = {"tokenizer", "max_seq_len"}
    assert data.tokenising().keys() == {field.name for field in dataclasses.fields(SFTCollator)} - beside
    assert data.row_form().keys() == inspect.signature(check_columns).parameters.keys() - {"columns", "where"}
    assert (data.tokenising()["response_key"], data.tokenising()["padding_side"]) == ("answer", "left")
