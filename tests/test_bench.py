"""The benchmark runs on a tiny model, compares like with like, and its errors say what is missing. Speed is not asserted."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from udsstream import bench
from udsstream.cli import app
from udsstream.errors import ConfigError

TINY = {
    "vocab_size": 307,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
SHAPE = bench.HeadShape(name="a head", vocab_size=507, width=64, tokens=33, candidates=2)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small matrices on a shared machine: two threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=2)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def result(folder):
    return bench.run_bench(model=folder, repeats=2, shapes=[SHAPE])


def test_the_rows_say_what_was_measured(result, folder):
    model, head = result.rows
    assert (model.name, model.vocab_size, model.width) == (folder.name, 307, 32)
    assert tuple(model.lengths) == bench.GSM8K_LENGTHS
    assert (head.name, head.lengths, head.trunk, head.scoring_over_trunk) == ("a head", [33, 33], None, None)
    assert result.data == "8 synthetic candidates of GSM8K's lengths"
    assert result.repeats == 2
    for row in result.rows:
        assert min(row.scoring, row.reference, row.factoring) > 0
        assert row.speedup_over_svd == row.reference / row.scoring
        assert 0 <= row.relative_error < 2e-5
        assert 0 <= row.reference_error < 2e-5
    assert model.scoring_over_trunk == model.scoring / model.trunk


def test_an_error_of_scoring_would_show(folder, monkeypatch):
    exact = bench._Selection.choose
    monkeypatch.setattr(bench._Selection, "choose", lambda self, scored: exact(self, scored) * 1.01)
    [row] = bench.run_bench(model=folder, repeats=1).rows
    assert row.relative_error == pytest.approx(0.01, rel=0.01)


def test_the_text_shows_every_figure(result):
    row = dataclasses.replace(
        result.rows[0], trunk=2.0, scoring=0.01, reference=3.0, factoring=0.5, relative_error=1e-6, reference_error=2e-6
    )
    text = bench.render(dataclasses.replace(result, rows=[row]))
    for figure in (
        "2.00 s",
        "10.0 ms",
        "3.00 s",
        "500.0 ms",
        "0.50%",
        "300×",
        "1.0e-06",
        "2.0e-06",
        "N=95–188, V=307, D=32",
    ):
        assert figure in text
    assert "trunk" not in bench.render(dataclasses.replace(result, rows=[result.rows[1]]))


def test_medians_leave_the_first_turn_out():
    clock = bench._Clock(torch.device("cpu"))
    clock._turns = [{"a": 100.0}, {"a": 1.0}, {"a": 3.0}, {"a": 2.0}]
    assert clock.median("a") == 2.0


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"repeats: 0 is not an integer of at least 1"):
        bench.run_bench(repeats=0)
    with pytest.raises(ConfigError, match=rf"there is no {tmp_path / 'test.jsonl'}; leave it out"):
        bench.run_bench(model=folder, gsm8k=tmp_path)
    with pytest.raises(ConfigError, match=rf"{tmp_path} is not the folder of a Hugging Face model"):
        bench.run_bench(model=tmp_path)
    (tmp_path / "test.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(ConfigError, match=r"has 1 samples, but 8 are needed"):
        bench.run_bench(model=folder, gsm8k=tmp_path)


def test_a_head_that_is_not_a_plain_matrix_is_refused(tmp_path):
    CohereForCausalLM(CohereConfig(**TINY, logit_scale=0.5)).save_pretrained(tmp_path / "scaled")
    with pytest.raises(
        ConfigError, match=r"the head of scaled is not a plain matrix \(hidden_space \(logit scale 0\.5"
    ):
        bench.run_bench(model=tmp_path / "scaled", repeats=1)


def test_the_command(folder):
    answer = CliRunner().invoke(app, ["bench", "--model", str(folder), "--repeats", "1", "--json"])
    assert answer.exit_code == 0, answer.output
    (row,) = json.loads(answer.stdout)["rows"]
    assert row["scoring_over_trunk"] > 0
    assert row["relative_error"] <= 2e-5
    answer = CliRunner().invoke(app, ["bench", "--model", str(folder), "--repeats", "1"])
    assert "scoring / trunk" in answer.stdout
