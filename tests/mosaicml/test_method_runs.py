"""Methods other than UDS in whole runs: what they measure, against float64 definitions; what they need; log, replay and audit of each."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import launch
import numpy as np
import oracles
import pytest
import tiny
import torch
from tiny import TinyRun, collate, write_stream

import udsstream
from udsstream import OnlineBatchSelection, ReplaySelection, SelectionLog
from udsstream.audit.run import audit
from udsstream.errors import ConfigError, DataError, ReplayError, ResumeError

VALIDATION = [
    collate([{"input_ids": [5, 6, 7, 8], "sample_id": 0}, {"input_ids": [9, 6, 7], "sample_id": 1}]),
    collate([{"input_ids": [3, 90, 20, 20, 41], "sample_id": 2}]),
]
REFERENCE = {sample: 4.0 + 0.01 * sample for sample in range(83)}


@udsstream.measures("loss", "intra")
def hard_and_rich(candidates: udsstream.Candidates) -> Any:
    """The method of one's own of docs/methods.md."""
    return candidates["loss"] * candidates["intra"]


METHODS: dict[str, dict[str, Any]] = {
    "max_grad": {},
    "selective_backprop": {},
    "rho_loss": {"reference": REFERENCE},
    "greats": {"validation": VALIDATION},
    "divbs": {},
    "full": {},
    "own": {"method": hard_and_rich},
}


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> tuple[str, ...]:
    """83 samples of 3 to 24 tokens: 11 batches of 8 an epoch, the last one of 3."""
    return (str(write_stream(tmp_path_factory.mktemp("streams") / "one")),)


def run_of(streams, folder: Path, method: str, **changes: Any) -> TinyRun:
    settings = {"method": method} | METHODS[method] | changes.pop("selection", {})
    return TinyRun(**({"streams": streams, "folder": str(folder), "duration": "13ba", "selection": settings} | changes))


def log_of(run: TinyRun) -> SelectionLog:
    return SelectionLog.open(Path(run.folder) / "log")


class Spy:
    """Each step's candidates as the model sees them before selection does: labels, float64 hidden states, the head, the learning rate."""

    def __init__(self, monkeypatch) -> None:
        self.steps: list[dict[str, Any]] = []
        decide = OnlineBatchSelection._decide

        def spied(algorithm, state):
            model = state.model.model
            was = model.training
            model.eval()
            self.steps.append(
                {
                    "samples": self.states(model, state.batch),
                    "validation": [pair for batch in VALIDATION for pair in self.states(model, batch)],
                    "head": model.lm_head.weight.detach().double().clone(),
                    "rate": state.optimizers[0].param_groups[0]["lr"],
                }
            )
            model.train(was)
            return decide(algorithm, state)

        monkeypatch.setattr(OnlineBatchSelection, "_decide", spied)

    @staticmethod
    @torch.no_grad()
    def states(model, batch) -> list[tuple[np.ndarray, list[int]]]:
        found = []
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            real = mask.bool()
            hidden = model.model(input_ids=ids[real][None]).last_hidden_state[0]
            found.append((hidden.double().numpy(), labels[real].tolist()))
        return found


def gradients(step: dict[str, Any], which: str) -> np.ndarray:
    hidden, labels = zip(*step[which], strict=True)
    return np.stack([g.ravel() for g in oracles.head_gradients(hidden, labels, step["head"])])


def losses(step: dict[str, Any]) -> np.ndarray:
    return np.array([oracles.mean_loss(oracles.logits(h, step["head"]), y) for h, y in step["samples"]])


def rows_of(log: SelectionLog) -> list[dict[str, np.ndarray]]:
    """The columns of each step."""
    table = log.table()
    step = table["step"].to_numpy()
    parts = [table.filter(np.equal(step, number)) for number in np.unique(step)]
    return [{name: np.array(part[name].to_pylist()) for name in part.column_names} for part in parts]


def test_the_method_of_ones_own_of_the_guide_runs(streams, tmp_path):
    """docs/methods.md, its ten lines: the scores in the log are those that they compute from what the log says was measured."""
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": "methods_guide"}
    exec(compile(block, str(page), "exec"), names)
    method = names["hard_and_rich"]
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="5ba", selection={"method": method, "keep": 0.25})
    run.run()
    log = log_of(run)
    assert log.run["selection"]["method"] == "methods_guide:hard_and_rich" == names["selection"].config.method_name
    for rows in rows_of(log):
        loss, intra, tokens = (rows[name].astype(np.float32) for name in ("loss", "intra", "tokens"))
        np.testing.assert_array_equal(rows["score"], loss * intra / tokens)
        assert set(rows["score"][rows["selected"]]) == set(np.sort(rows["score"])[-2:])


@pytest.mark.parametrize("method", ["max_grad", "selective_backprop", "rho_loss", "greats", "divbs", "own"])
def test_choices_are_those_of_the_definition(streams, tmp_path, monkeypatch, method):
    """Explicit logits and per-sample gradients by autograd, in float64, at every step of a run that trains."""
    spy = Spy(monkeypatch)
    run = run_of(streams, tmp_path, method, selection={"keep": 0.5})
    run.run()
    for step, rows in zip(spy.steps, rows_of(log_of(run)), strict=True):
        k = {8: 4, 3: 2}[len(step["samples"])]
        match method:
            case "max_grad":
                expected = np.linalg.norm(gradients(step, "samples"), axis=1)
                np.testing.assert_allclose(rows["grad_norm"], expected, rtol=2e-5)
                np.testing.assert_array_equal(rows["score"], rows["grad_norm"])
            case "selective_backprop":
                expected = rows["score"]  # of the draw: tests/scoring/test_methods.py
                np.testing.assert_allclose(rows["loss"], losses(step), rtol=2e-5)
            case "rho_loss":
                expected = losses(step) - np.array([REFERENCE[sample] for sample in rows["sample_id"]])
                np.testing.assert_allclose(rows["score"], expected, rtol=1e-4, atol=1e-5)
            case "greats":
                own, validation = gradients(step, "samples"), gradients(step, "validation").mean(axis=0)
                scale = np.linalg.norm(own, axis=1) * np.linalg.norm(validation)
                np.testing.assert_allclose(rows["alignment"] / scale, own @ validation / scale, atol=2e-5)
                expected = np.empty(len(own))
                expected[oracles.greats_order(own, validation, step["rate"])] = np.arange(len(own), 0, -1)
            case "divbs":
                own = gradients(step, "samples")
                found = np.array([row[: len(own)] for row in rows["interaction"]])
                np.testing.assert_allclose(found, own @ own.T, atol=2e-5 * np.abs(own @ own.T).max())
                expected = np.empty(len(own))
                expected[oracles.divbs_order(own)] = np.arange(len(own), 0, -1)
            case _:
                intra = [oracles.nuclear_norm(oracles.logits(h, step["head"])) for h, _ in step["samples"]]
                expected = losses(step) * intra
                np.testing.assert_allclose(rows["score"], expected, rtol=5e-5)
        assert np.flatnonzero(rows["selected"]).tolist() == oracles.top_k(expected.tolist(), k)


@pytest.mark.parametrize("method", METHODS)
def test_the_log_replays_and_audits(streams, tmp_path, method):
    """The same weights from the log alone and by deciding again; resumed between, the log is one, and intact."""
    settings = {"save_interval": "5ba", "autoresume": True}
    run = run_of(streams, tmp_path, method, **settings)
    weights = run.run()
    halved = run_of(streams, tmp_path / "halved", method, duration="7ba", **settings)
    halved.run()
    resumed = dataclasses.replace(halved, duration="13ba").run()
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert log_of(halved).table().drop_columns(["attempt"]).equals(log_of(run).table().drop_columns(["attempt"]))
    for folder in (run.folder, halved.folder):
        report = audit(Path(folder) / "log")
        assert report.findings == ()
    plain = dataclasses.replace(run, save_interval=None, autoresume=False)
    given = {name: value for name, value in METHODS[method].items() if name in ("reference", "validation", "method")}
    for replay in (ReplaySelection(log_of(run).root), ReplaySelection(log_of(run).root, verify=True, **given)):
        again = dataclasses.replace(plain, folder=str(tmp_path / f"again-{replay.verify}")).run(replay=replay)
        assert all(torch.equal(again[name], weights[name]) for name in weights)
        if replay.tally is not None:
            assert (replay.tally.agreed, replay.tally.equal_scores) == (replay.tally.steps, replay.tally.scores)
            assert replay.tally.steps == (0 if method == "full" else 13)


def test_the_same_seed_is_the_same_run_and_another_is_not(streams, tmp_path):
    def choices(name, **settings):
        run = run_of(streams, tmp_path / name, "selective_backprop", selection=settings)
        run.run()
        return log_of(run).table()["selected"].to_pylist()

    assert choices("a") == choices("b") != choices("c", seed=18)


def test_full_keeps_all_and_measures_nothing(streams, tmp_path):
    run = run_of(streams, tmp_path, "full", duration="3ba")
    run.run()
    table = log_of(run).table()
    assert table["selected"].to_pylist() == [True] * 24
    assert table["score"].null_count == 24


def test_only_what_version_1_has_no_column_for_makes_a_log_of_version_2(streams, tmp_path):
    versions = {}
    for method in METHODS:
        run = run_of(streams, tmp_path / method, method, duration="2ba")
        run.run()
        log = log_of(run)
        versions[method] = (log.run["log"]["schema_version"], log.table().column_names[17:])
    assert versions == {
        "max_grad": (2, ["grad_norm"]),
        "selective_backprop": (1, []),
        "rho_loss": (2, ["reference_loss"]),
        "greats": (2, ["alignment", "interaction"]),
        "divbs": (2, ["interaction"]),
        "full": (1, []),
        "own": (1, []),
    }


# A budget of tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["uds", "longest", "selective_backprop", "divbs"])
def test_a_budget_of_tokens_is_kept_to(streams, tmp_path, method):
    METHODS.setdefault(method, {})
    run = run_of(streams, tmp_path, method, selection={"keep_tokens": 40})
    weights = run.run()
    for rows in rows_of(log_of(run)):
        order = np.argsort(-rows["score"], kind="stable")
        fits = max(1, int((np.cumsum(rows["tokens"][order]) <= 40).sum()))
        assert np.flatnonzero(rows["selected"]).tolist() == sorted(order[:fits].tolist())
    assert audit(log_of(run).root).findings == ()
    again = dataclasses.replace(run, folder=str(tmp_path / "again")).run(replay=ReplaySelection(log_of(run).root))
    assert all(torch.equal(again[name], weights[name]) for name in weights)


# What is missing is said before training ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "rho_loss"}, "method='rho_loss' needs reference=: the log of a pass with a reference model"),
        ({"method": "greats"}, "method='greats' needs validation=: batches of samples whose loss is to be lowered"),
        ({"method": "uds", "reference": REFERENCE}, "reference: method='uds' does not use it; leave it out"),
        ({"method": "divbs", "validation": VALIDATION}, "validation: method='divbs' does not use it"),
        ({"method": "rho_loss", "reference": {}}, "found none; give a finite loss for each sample"),
        ({"method": "rho_loss", "reference": {0: float("nan")}}, "found 1 that are not finite"),
        (
            {"method": "mine:best"},
            "'mine:best' names a function of one's own, as a record does; give the function itself",
        ),
        ({"method": "best"}, "'best' is none of uds, .*, and no function"),
        ({"method": "full", "keep_tokens": 10}, "keep_tokens: the method 'full' keeps every candidate"),
        ({"keep_tokens": 0}, "keep_tokens: 0 is not an integer of at least 1"),
        ({"keep_tokens": 100, "scope": "rank"}, "keep_tokens: is of the global batch, but with scope='rank'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_a_method_lacks_is_said_when_it_is_made(settings, message):
    with pytest.raises(ConfigError, match=message):
        OnlineBatchSelection(**settings)


def test_a_measure_that_nobody_knows_is_refused():
    @udsstream.measures("beauty")
    def beautiful(candidates):
        return candidates["beauty"]

    with pytest.raises(ConfigError, match="it asks for 'beauty' to be measured, which is none of intra, inter, loss"):
        OnlineBatchSelection(method=beautiful)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there is no batch in it"),
        ([{"input_ids": torch.ones(1, 3)}], "batch 0 has input_ids, expected input_ids and labels of one shape"),
        (
            [VALIDATION[0], VALIDATION[1] | {"labels": torch.full((1, 5), -100)}],
            "row 0 of batch 1 has no label after its first token",
        ),
    ],
    ids=["empty", "no labels", "nothing asked"],
)
def test_validation_samples_that_have_no_loss_are_refused(batches, message):
    with pytest.raises(DataError, match=message):
        OnlineBatchSelection(method="greats", validation=batches)


def test_samples_without_a_reference_loss_are_named(streams, tmp_path):
    some = {sample: loss for sample, loss in REFERENCE.items() if sample % 2}
    run = run_of(streams, tmp_path, "rho_loss", selection={"reference": some})
    with pytest.raises(DataError, match=r"candidates have no reference loss in given \(41 samples\): \d+"):
        run.run()


def test_a_resumed_run_needs_the_same_inputs(streams, tmp_path):
    for method, other in (
        ("rho_loss", {"reference": REFERENCE | {3: 1.0}}),
        ("greats", {"validation": VALIDATION[:1]}),
    ):
        run = run_of(streams, tmp_path / method, method, duration="4ba", save_interval="2ba", autoresume=True)
        run.run()
        changed = dataclasses.replace(run, duration="6ba", selection=run.selection | other)
        name = "reference" if method == "rho_loss" else "validation"
        with pytest.raises(ResumeError, match=f"{name}: the run had that with the digest .*, this one has that with"):
            changed.run()


def test_to_decide_again_needs_the_functions_and_inputs_that_the_run_had(streams, tmp_path):
    run = run_of(streams, tmp_path, "own", duration="2ba")
    run.run()
    with pytest.raises(ConfigError, match="names a function of one's own"):
        dataclasses.replace(run, folder=str(tmp_path / "a")).run(replay=ReplaySelection(log_of(run).root, verify=True))
    with pytest.raises(ReplayError, match=r"the run chose by .*hard_and_rich, the given method is .*another"):
        ReplaySelection(log_of(run).root, verify=True, method=another)


def another(candidates):
    """A method that no run chose by."""
    return candidates.tokens


def test_reference_losses_come_from_a_log_of_the_same_streams(streams, tmp_path):
    recorded = TinyRun(
        streams=streams, folder=str(tmp_path / "reference"), duration="1ep", selection={"method": "max_loss"}, lr=0.0
    )
    recorded.run()
    run = run_of(streams, tmp_path / "run", "rho_loss", selection={"reference": log_of(recorded).root})
    run.run()
    table = log_of(recorded).table()
    losses = dict(zip(table["sample_id"].to_pylist(), table["loss"].to_pylist(), strict=True))
    ours = log_of(run).table()
    assert ours["reference_loss"].to_pylist() == [losses[sample] for sample in ours["sample_id"].to_pylist()]
    assert log_of(run).run["reference"]["samples"] == 83

    elsewhere = (str(write_stream(tmp_path / "other", samples=83, seed=5)),)
    with pytest.raises(ConfigError, match="recorded the losses of other streams than those trained on"):
        run_of(elsewhere, tmp_path / "else", "rho_loss", selection={"reference": log_of(recorded).root}).run()
    lengths = TinyRun(streams=streams, folder=str(tmp_path / "b"), duration="2ba", selection={"method": "longest"})
    lengths.run()
    with pytest.raises(ConfigError, match=r"records no losses \(its method is longest\)"):
        OnlineBatchSelection(method="rho_loss", reference=log_of(lengths).root)


def test_reference_losses_of_otherwise_tokenised_samples_are_refused(streams, tmp_path, monkeypatch):
    """A pass with another template or limit recorded the losses of other texts; the log's token counts tell."""

    def cut(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return collate([{**row, "input_ids": row["input_ids"][:9]} for row in rows])

    recorded = TinyRun(
        streams=streams, folder=str(tmp_path / "reference"), duration="1ep", selection={"method": "max_loss"}, lr=0.0
    )
    with monkeypatch.context() as patched:
        patched.setattr(tiny, "collate", cut)
        recorded.run()
    longest = max(log_of(recorded).table()["tokens"].to_pylist())
    assert longest == 9
    run = run_of(streams, tmp_path / "run", "rho_loss", selection={"reference": log_of(recorded).root})
    with pytest.raises(
        DataError, match=r"\d of 8 candidates have another number of tokens than when .*sample \d+ has \d\d, had 9"
    ):
        run.run()


# Several ranks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    return launch.forkserver()


@pytest.mark.slow
def test_ranks_that_compare_candidates_choose_among_their_own(streams, processes, tmp_path):
    """Of 4 candidates each keeps 2; its record and audit are those of one rank's."""
    for method in ("greats", "divbs"):
        run = run_of(
            streams, tmp_path / method, method, duration="4ba", selection={"keep": 4, "scope": "rank"}, dropout=0.0
        )
        assert launch.finish(launch.start(processes, 2, run.run_and_save)) == [0, 0]
        counts = log_of(run).table().group_by(["step", "rank"]).aggregate([("selected", "sum"), ("score", "max")])
        assert {(row["selected_sum"], row["score_max"]) for row in counts.to_pylist()} == {(2, 4.0)}
        assert audit(log_of(run).root).findings == ()


@pytest.mark.slow
def test_losses_gradients_and_budgets_are_chosen_by_over_all_ranks(streams, processes, tmp_path):
    """The same choices on 1 and 2 ranks while weights are (at a learning rate of 0)."""
    for settings in ({"method": "max_grad"}, {"method": "selective_backprop"}, {"method": "uds", "keep_tokens": 60}):
        found = []
        for ranks in (1, 2):
            folder = tmp_path / f"{settings['method']}-{ranks}"
            run = TinyRun(
                streams=streams,
                folder=str(folder),
                duration="8ba",
                selection={"keep": 4} | settings,
                lr=0.0,
                dropout=0.0,
            )
            assert launch.finish(launch.start(processes, ranks, run.run_and_save)) == [0] * ranks
            table = log_of(run).table()
            found.append(table.filter(table["selected"])["sample_id"].to_pylist())
            assert audit(log_of(run).root).findings == ()
        if "keep_tokens" not in settings:
            assert found[0] == found[1]
        else:  # one rank may keep an odd number of them
            assert set(found[1]) <= set(found[0])
