"""Every mistake in the selection's settings gives one line that names the field; what is kept; what the fingerprint covers."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udsstream.config import PUBLISHED_ALPHA, SelectionConfig, config_difference, convert_alpha
from udsstream.errors import ConfigError

MISTAKES = [
    (
        "method",
        "udss",
        "'udss' is none of uds, uds_intra, uds_inter, max_loss, max_grad, selective_backprop, rho_loss, greats, divbs",
    ),
    ("method", None, "None is none of"),
    ("scope", "local", "'local' is none of global, rank"),
    ("projection_scale", "iso", "'iso' is none of isometric, reference"),
    ("length_norm", 1, "1 is none of none, sqrt, tokens"),
    ("embeddings", "all", "'all' is none of full, tail, none"),
    ("keep", 0, "0 is neither a fraction in (0, 1] nor a count of at least 1"),
    ("keep", -3, "-3 is neither"),
    ("keep", 0.0, "the fraction 0.0 is not in (0, 1]"),
    ("keep", 1.5, "the fraction 1.5 is not in (0, 1]; a count is given as an integer"),
    ("keep", float("nan"), "the fraction nan is not in (0, 1]"),
    ("keep", True, "True is neither"),
    ("keep", "0.25", "'0.25' is neither"),
    ("keep", None, "None is neither"),
    ("keep_tokens", 0, "0 is not an integer of at least 1"),
    ("keep_tokens", 512.0, "512.0 is not an integer"),
    ("measured", ("loss",), "the method 'uds' knows by itself what it measures"),
    ("alpha", -1.0, "-1.0 is not a finite number of at least 0"),
    ("alpha", float("nan"), "nan is not"),
    ("alpha", float("inf"), "inf is not"),
    ("alpha", "1", "'1' is not"),
    ("alpha", True, "True is not"),
    ("buffer_size", 0, "0 is not an integer of at least 1"),
    ("buffer_size", 10.0, "10.0 is not an integer"),
    ("buffer_size", True, "True is not an integer"),
    ("max_seq_len", "2048", "'2048' is not an integer of at least 1"),
    ("interrupt", -1, "-1 is not an integer of at least 0"),
    ("interrupt", 1, "1 would train on every batch whole"),
    ("seed", -1, "-1 is not an integer of at least 0"),
    ("seed", None, "None is not an integer"),
    ("score_microbatch_tokens", 0, "0 is not an integer of at least 1"),
    ("projection_dims", (128,), "(128,) is not a pair of positive integers"),
    ("projection_dims", (128, 0), "(128, 0) is not a pair"),
    ("projection_dims", (128, 8, 1), "(128, 8, 1) is not a pair"),
    ("projection_dims", (128.0, 8), "(128.0, 8) is not a pair"),
    ("projection_dims", 128, "128 is not a pair"),
    ("projection_dims", "ab", "'ab' is not a pair"),
    ("projection_dims", (128, 4096), "4096 rows on the token side, but only max_seq_len=2048 tokens"),
    ("start", "10", "'10' is not a time such as '10ba'"),
    ("start", 10, "10 is not a time"),
    ("start", None, "None is not a time"),
    ("start", "1.5ep", "'1.5ep' is not a time"),
    ("start", "1.5dur", "'1.5dur' is not a time"),
    ("start", "-1ba", "'-1ba' is not a time"),
    ("end", "soon", "'soon' is not a time"),
]


@pytest.mark.parametrize(("field", "value", "text"), MISTAKES, ids=[f"{f}={v!r}" for f, v, _ in MISTAKES])
def test_a_mistake_gives_one_line_with_the_fields_name(field, value, text):
    with pytest.raises(ConfigError) as raised:
        SelectionConfig(**{field: value})
    first, *lines = str(raised.value).splitlines()
    assert first == "the selection's settings cannot be used:"
    assert len(lines) == 1
    assert lines[0].startswith(f"  {field}: ")
    assert text in lines[0]


def test_a_time_with_a_line_break_is_refused():
    with pytest.raises(ConfigError, match="start: "):
        SelectionConfig(start="1ba\n")


def test_every_field_has_a_mistake_that_is_tested():
    assert {field.name for field in dataclasses.fields(SelectionConfig)} == {field for field, _, _ in MISTAKES}


def test_all_mistakes_are_listed_at_once():
    with pytest.raises(ConfigError) as raised:
        SelectionConfig(method="x", keep=0, buffer_size=0, start="x", end="y", seed=-1)
    lines = str(raised.value).splitlines()[1:]
    assert sorted(line.split(":")[0].strip() for line in lines) == [
        "buffer_size", "end", "keep", "method", "seed", "start",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "good",
    [
        {},
        {"keep": 1},
        {"keep": 1.0},
        {"alpha": 0},
        {"start": "0.1dur", "end": "1dur"},
        {"start": "100000tok", "end": "7ep"},
        {"start": "5sp"},
        {"interrupt": 2},
        {"seed": 2**63},
        {"projection_dims": [4, 2]},
        {"projection_dims": (1, 1), "max_seq_len": 1},
    ],
)
def test_good_settings_pass(good):
    config = SelectionConfig(**good)
    assert isinstance(config.projection_dims, tuple)
    assert config.embedding_dim == config.projection_dims[0] * config.projection_dims[1]


def test_it_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SelectionConfig().keep = 0.5  # pyright: ignore
    with pytest.raises(TypeError):
        SelectionConfig("uds")  # pyright: ignore
    with pytest.raises(TypeError, match="keeep"):
        SelectionConfig(keeep=1)  # pyright: ignore


@pytest.mark.parametrize(
    ("keep", "candidates", "kept"),
    [
        (0.25, 8, 2),
        (0.25, 1, 1),
        (0.25, 2, 1),  # a half is rounded up
        (0.25, 3, 1),
        (0.25, 6, 2),  # 1.5
        (0.25, 10, 3),  # 2.5: up, not to even
        (0.125, 8, 1),
        (1e-9, 8, 1),  # at least one
        (1.0, 7, 7),
        (0.999, 4, 4),
        (3, 8, 3),
        (3, 2, 2),  # an incomplete last batch
        (1, 8, 1),
    ],
)
def test_kept(keep, candidates, kept):
    assert SelectionConfig(keep=keep).kept(candidates) == kept


@given(keep=st.one_of(st.integers(1, 100), st.floats(1e-6, 1)), candidates=st.integers(1, 100))
def test_kept_is_between_one_and_all(keep, candidates):
    kept = SelectionConfig(keep=keep).kept(candidates)
    assert 1 <= kept <= candidates
    assert isinstance(kept, int)


def test_alpha_is_the_published_one_in_the_units_of_the_projection():
    assert SelectionConfig(projection_scale="reference").resolved_alpha(49_152) == PUBLISHED_ALPHA == 1.5e-3
    expected = 1.5e-3 * (2048 * 49_152) ** 0.5 / 2
    assert SelectionConfig().resolved_alpha(49_152) == pytest.approx(expected)
    assert convert_alpha(2.5e-3, vocab_size=49_152, max_seq_len=2048) == pytest.approx(expected * 2.5 / 1.5)
    for scale in ("isometric", "reference"):
        assert SelectionConfig(alpha=3, projection_scale=scale).resolved_alpha(49_152) == 3.0
        assert SelectionConfig(alpha=0, projection_scale=scale).resolved_alpha(49_152) == 0.0


CHANGES = {
    "method": "random",
    "keep": 0.5,
    "keep_tokens": 512,
    "alpha": 0.1,
    "buffer_size": 7,
    "projection_dims": (128, 4),
    "max_seq_len": 4096,
    "projection_scale": "reference",
    "length_norm": "sqrt",
    "start": "1ba",
    "end": "9ba",
    "interrupt": 3,
    "seed": 18,
    "score_microbatch_tokens": 100,
    "scope": "rank",
}


@pytest.mark.parametrize("field", CHANGES)
def test_the_fingerprint_changes_with_each_deciding_field(field):
    changed = SelectionConfig(**{field: CHANGES[field]})
    assert changed.fingerprint() != SelectionConfig().fingerprint()
    lines = config_difference(SelectionConfig().as_dict(), changed.as_dict())
    assert len(lines) == 1
    assert lines[0].startswith(f"{field}: was ")
    assert ", is " in lines[0]


def test_the_fingerprint_covers_all_fields_but_the_embeddings_kept():
    names = {field.name for field in dataclasses.fields(SelectionConfig)}
    assert names - set(CHANGES) == {"embeddings", "measured"}
    own = {"method": "my_methods:mine"}
    measuring = {
        measured: SelectionConfig(**own, measured=measured).fingerprint()
        for measured in ((), ("loss",), ("loss", "intra"))
    }
    assert len(set(measuring.values())) == len(measuring)
    for record in ("full", "none"):
        assert SelectionConfig(embeddings=record).fingerprint() == SelectionConfig().fingerprint()


def test_a_fraction_and_a_count_of_one_are_not_the_same_setting():
    assert SelectionConfig(keep=1).fingerprint() != SelectionConfig(keep=1.0).fingerprint()


def test_the_fingerprint_is_the_same_in_every_process_and_release():
    """Recorded once: logs and checkpoints name runs by it."""
    assert SelectionConfig().fingerprint() == "1bf1077435a8796731bf05afea32bb2d44f1e76352d0c4dba4e61153cd5bdc0f"


def test_as_dict_survives_json():
    config = SelectionConfig(keep=3, end="9ba")
    again = SelectionConfig(**json.loads(json.dumps(config.as_dict())))
    assert again == config
    assert again.fingerprint() == config.fingerprint()
    assert config_difference(config.as_dict(), again.as_dict()) == []
    assert config_difference({"a": 1}, {"b": 2}) == ["a: was 1, is '(absent)'", "b: was '(absent)', is 2"]
