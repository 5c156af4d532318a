"""The benchmark runs on a tiny model, compares like with like, and its errors say what is missing. Speed is not asserted."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import oracles
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
CAPPED = bench.HeadShape(
    name="a capped head",
    vocab_size=507,
    width=64,
    tokens=33,
    softcap=1.0,
    layers=3,
    layer={"intermediate_size": 96, "num_attention_heads": 4},
)


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
    return bench.run_bench(model=folder, repeats=2, shapes=[SHAPE, CAPPED])


def test_the_rows_say_what_was_measured(result, folder):
    model, head, capped = result.rows
    assert (model.name, model.vocab_size, model.width) == (folder.name, 307, 32)
    assert tuple(model.lengths) == bench.GSM8K_LENGTHS
    assert (head.name, head.lengths, head.trunk, head.scoring_over_trunk) == ("a head", [33, 33], None, None)
    assert (capped.form, capped.factoring, capped.trunk_layers) == ("vocabulary slices", 0, 3)
    assert result.data == "8 synthetic candidates of GSM8K's lengths"
    assert result.repeats == 2
    for row in result.rows:
        assert 0 < row.scores < row.scoring
        assert min(row.reference, row.scoring_memory, row.reference_memory) > 0
        assert row.speedup_over_svd == row.reference / row.scores
        assert 0 <= row.relative_error < 2e-5
        assert 0 <= row.reference_error < 2e-5
    assert model.factoring > 0
    assert model.trunk_over_real_tokens == model.trunk / model.real_tokens
    for row in (model, capped):
        assert row.scoring_over_trunk == row.scoring / row.trunk
    for row in (head, capped):
        assert (row.full_step, row.selecting_step_speedup, row.fraction_of_ideal) == (None, None, None)
        assert (row.real_tokens, row.trunk_over_real_tokens) == (None, None)


def test_a_selecting_step_is_made_of_its_parts(result):
    model = result.rows[0]
    assert model.trunk + model.scoring + model.kept_step == pytest.approx(model.selecting_step, rel=0.3)
    assert model.selecting_step_speedup == model.full_step / model.selecting_step
    assert model.fraction_of_ideal == (model.trunk + model.kept_step) / model.selecting_step
    assert 0 < model.fraction_of_ideal < 1


def test_the_trunk_s_tokens_without_padding_are_as_many(folder, monkeypatch):
    seen = []
    run_trunk = bench._Case.run_trunk
    monkeypatch.setattr(bench._Case, "run_trunk", lambda case, batch: (seen.append(batch), run_trunk(case, batch))[1])
    bench.run_bench(model=folder, repeats=1)
    [unpadded, again, peak] = seen
    assert unpadded is again
    assert peak is not unpadded
    assert unpadded["attention_mask"].all()
    assert abs(unpadded["input_ids"].numel() - sum(bench.GSM8K_LENGTHS)) < len(bench.GSM8K_LENGTHS)


def test_an_error_of_scoring_would_show(folder, monkeypatch):
    exact = bench.CandidateScorer.score_hidden

    def wrong(*args, **kwargs):
        found = exact(*args, **kwargs)
        return dataclasses.replace(found, intra=found.intra * 1.01)

    monkeypatch.setattr(bench.CandidateScorer, "score_hidden", wrong)
    [row] = bench.run_bench(model=folder, repeats=1).rows
    assert row.relative_error == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("softcap", [None, 1.0])
def test_the_definition_in_float64_is_the_definition(softcap):
    weight, hidden = torch.randn(20_000, 12), [torch.randn(7, 12), torch.randn(30, 12)]
    found = bench._exact_norms(hidden, bench.LMHead(weight=weight, softcap=softcap))
    for norm, states in zip(found, hidden, strict=True):
        exact = oracles.nuclear_norm(oracles.logits(states, weight, softcap=softcap))
        assert oracles.relative_error(norm, exact) < 1e-12


def test_peaks_are_of_what_lives_at_a_time():
    def action():
        first = torch.ones(1000, dtype=torch.float32)
        second = first + 1
        del first, second
        third = torch.ones(1500, dtype=torch.float32)
        del third

    assert bench._peak_bytes(action, torch.device("cpu")) == pytest.approx(8000, abs=100)


def test_the_text_shows_every_figure(result):
    row = dataclasses.replace(
        result.rows[0],
        trunk=2.0,
        scores=0.006,
        scoring=0.01,
        reference=3.0,
        factoring=0.5,
        full_step=9.0,
        selecting_step=3.0,
        kept_step=0.9,
        relative_error=1e-6,
        reference_error=2e-6,
        scoring_memory=3 * 2**20,
        reference_memory=77 * 2**20,
        memory_over_trunk=5 * 2**20,
    )
    text = bench.render(dataclasses.replace(result, rows=[row]))
    for figure in (
        "2.00 s",
        "6.0 ms",
        "10.0 ms",
        "3.00 s",
        "500.0 ms",
        "900.0 ms",
        "0.50%",
        "500×",
        "3.00×",
        "96.67%",
        " 3 MB",
        "77 MB",
        "5 MB",
        "1.0e-06",
        "2.0e-06",
        "N=95–188, V=307, D=32",
    ):
        assert figure in text
    assert "trunk" not in bench.render(dataclasses.replace(result, rows=[result.rows[1]]))
    assert "(3 × one layer)" in bench.render(dataclasses.replace(result, rows=[result.rows[2]]))


def test_medians_leave_the_first_turn_out():
    clock = bench._Clock(torch.device("cpu"))
    clock._turns = [{"a": 100.0}, {"a": 1.0}, {"a": 3.0}, {"a": 2.0}, {"a": 50.0}]
    assert clock.median("a", 3) == 2.0


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
    for ratio in (
        "scoring_over_trunk",
        "trunk_over_real_tokens",
        "speedup_over_svd",
        "selecting_step_speedup",
        "fraction_of_ideal",
    ):
        assert row[ratio] > 0
    assert row["relative_error"] <= 2e-5
    answer = CliRunner().invoke(app, ["bench", "--model", str(folder), "--repeats", "1"])
    assert "scoring / trunk" in answer.stdout


def test_the_document_names_what_there_is(result):
    text = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    row = result.as_dict()["rows"][0]
    table = text.split("`--json` has a list")[1].split("A head by itself")[0]
    named = re.findall(
        r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    )
    assert {
        "scoring_over_trunk",
        "trunk_over_real_tokens",
        "speedup_over_svd",
        "selecting_step_speedup",
        "fraction_of_ideal",
    } <= set(named)
    assert set(named) <= set(row)
    help_text = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"}).stdout
    for option in set(re.findall(r"(?<=\s)--[a-z0-9]+", text.split("```")[1])):
        assert option in help_text
    for path in re.findall(r"`((?:tests|udsstream)/[\w/.]+)`", text):
        assert (Path(__file__).parents[1] / path).exists(), path
