"""An honest log of each kind is found intact, and the report says what was and what could not be checked."""

from __future__ import annotations

import json
import math
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from candidates import candidates as some_candidates
from numpy_run import PER_EPOCH, RUN_ID, NumpyRun, candidates, choose, describe, finished, rechoose, selection

from udsstream.audit.memory import _mean_distance, _mean_distances, distance_tolerance
from udsstream.audit.report import FINDINGS_KEPT, render
from udsstream.audit.run import audit
from udsstream.errors import ConfigError, LogError
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.writer import SelectionLogWriter

WARM = {
    "warm": np.random.default_rng(3).standard_normal((9, 12)).astype(np.float32),
    "changes": {"warm_start": {"run_id": "former", "pushed": 40, "memory_digest": "ab" * 32}},
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "tail": {"embeddings": "tail"},
    "none": {"embeddings": "none"},
    "random": {"method": "random"},
    "random, two ranks": {"method": "random", "world_size": 2},
    "utility alone": {"method": "uds_intra"},
    "diversity alone": {"method": "uds_inter", "embeddings": "full"},
    "the highest loss": {"method": "max_loss"},
    "the longest": {"method": "longest"},
    "the steepest": {"method": "max_grad"},
    "a percentile draw": {"method": "selective_backprop"},
    "a percentile draw in a budget of tokens, two ranks": {
        "method": "selective_backprop",
        "keep_tokens": 12,
        "world_size": 2,
    },
    "reducible loss": {"method": "rho_loss"},
    "by validation samples": {"method": "greats"},
    "by the span of gradients": {"method": "divbs"},
    "everything": {"method": "full"},
    "a budget of tokens": {"keep_tokens": 9},
    "two ranks": {"world_size": 2},
    "three of eight": {"keep": 3},
    "all": {"keep": 1.0},
    "interrupted": {"interrupt": 3},
    "from step 4 to the second epoch": {"start": "4ba", "end": "1ep"},
    "from sample 40 to a share of the run": {"start": "40sp", "end": "0.8dur"},
    "a memory that never fills": {"buffer_size": 1000, "embeddings": "tail"},
    "a memory of one": {"buffer_size": 1},
    "a memory that was taken over": WARM,
    "a memory that was taken over, tail": {**WARM, "embeddings": "tail", "buffer_size": 1000},
    "published scaling": {"projection_scale": "reference"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_honest_log_is_intact(kind: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "log", **KINDS[kind])
    report = audit(tmp_path / "log", anchor=(20, run.roots[20]))
    assert report.findings == ()
    assert report.exit_code == 0
    assert (report.run_id, report.steps, report.rows, report.attempts) == (RUN_ID, 25, 190, 1)
    assert report.anchored
    assert report.verdict.startswith("intact relative to this anchor: the given root, before step 20")


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        ("uds_intra", "its intra is "),
        ("uds_inter", "its inter is "),
        ("max_loss", "its loss is "),
        ("longest", "its tokens is "),
        ("max_grad", "its grad_norm is "),
        ("rho_loss", "loss [1-4] − reference_loss [0-2] is "),
        ("greats", "the order of greats gives [1-8]$"),
        ("divbs", "the order of divbs gives [1-8]$"),
    ],
)
def test_a_score_that_the_methods_measure_does_not_give_is_found(method: str, rule: str, tmp_path: Path) -> None:
    """Of step 9 the last candidate's score, and so the choice, is forged."""

    def forge(step: int, columns: dict[str, Any], kept: np.ndarray) -> np.ndarray:
        if step != 9:
            return kept
        columns["score"] = columns["score"].copy()
        columns["score"][-1] = 1000
        return rechoose(columns, selection(method=method))

    finished(tmp_path / "log", method=method, forge=forge)
    (finding,) = audit(tmp_path / "log").findings
    assert finding.check == "score"
    assert re.search(f"the score is 1000, but {rule}", finding.message)


def forged(tmp_path: Path, method: str, change: Any, **settings: Any) -> list[str]:
    """What is found when step 9's columns are changed before they are written."""

    def forge(step: int, columns: dict[str, Any], kept: np.ndarray) -> np.ndarray:
        return kept if step != 9 else change(columns, kept)

    finished(tmp_path / "log", method=method, forge=forge, **settings)
    return [f"{found.check}: {found.message}" for found in audit(tmp_path / "log").findings]


@pytest.mark.parametrize("method", ["greats", "divbs"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[0, 1:2].fill(7.0), "the interactions are not the same both ways"),
        (lambda m: m[0].fill(np.nan), "an interaction is not finite, or stands behind the last candidate"),
        (lambda m: np.copyto(m, np.diag(np.arange(8) + 1.0)), "but the order of .* gives"),
    ],
    ids=["one way", "not a number", "another order"],
)
def test_interactions_that_do_not_give_the_order_are_found(method, change, message, tmp_path: Path) -> None:
    def forge(columns: dict[str, Any], kept: np.ndarray) -> np.ndarray:
        columns["interaction"] = columns["interaction"].copy()
        change(columns["interaction"])
        return kept

    found = forged(tmp_path, method, forge)
    assert len(found) == 1
    assert re.search(message, found[0])


def test_a_log_without_the_interactions_cannot_be_a_greedy_methods(tmp_path: Path) -> None:
    run = NumpyRun(root=tmp_path / "log", config=selection(method="longest"))
    settings = selection(method="divbs")
    run.changes = {"selection": settings.as_dict(), "selection_fingerprint": settings.fingerprint()}
    run.begin().steps(0, 4).close()
    found = [finding.message for finding in audit(tmp_path / "log").findings]
    assert "the log has no column interaction, which a run of divbs leaves" in found


def test_a_lucky_percentile_draw_is_found(tmp_path: Path) -> None:
    def forge(columns: dict[str, Any], kept: np.ndarray) -> np.ndarray:
        del kept
        columns["score"] = columns["score"].copy()
        columns["score"][3] = 50.0
        return rechoose(columns, selection(method="selective_backprop"))

    (found,) = forged(tmp_path, "selective_backprop", forge)
    assert re.match("random: step 9, position 3: the score is 50, but seed 17 draws ", found)


def test_a_budget_that_was_overdrawn_is_found(tmp_path: Path) -> None:
    def forge(columns: dict[str, Any], kept: np.ndarray) -> np.ndarray:
        places = np.flatnonzero(~columns["selected"])
        return choose(columns, np.sort(np.append(kept, places[0])))

    found = forged(tmp_path, "longest", forge, keep_tokens=9)
    assert len(found) == 1
    assert re.search(r"top-k: step 9 .* was kept beyond the number", found[0])


def test_the_scores_of_a_method_of_ones_own_are_not_judged_but_its_choices_are(tmp_path: Path) -> None:
    def forge(columns: dict[str, Any], kept: np.ndarray) -> np.ndarray:
        others = np.flatnonzero(~columns["selected"])
        return choose(columns, np.sort(np.append(kept[1:], others[0])))

    settings = selection(method="mine:best", measured=["loss"])
    for name, change in (("honest", None), ("forged", forge)):
        run = NumpyRun(root=tmp_path / name, config=selection(method="max_loss"))
        run.changes = {"selection": settings.as_dict(), "selection_fingerprint": settings.fingerprint()}
        if change is not None:
            run.forge = lambda step, columns, kept, change=change: change(columns, kept) if step == 2 else kept
        run.begin().steps(0, 4).close()
        report = audit(tmp_path / name)
        assert [finding.check for finding in report.findings] == ([] if change is None else ["top-k"])
        assert any("whether the scores are those of mine:best" in text for text in report.unchecked)


def test_a_loss_that_is_missing_is_found(tmp_path: Path) -> None:
    def forge(step: int, columns: dict[str, Any], kept: np.ndarray) -> np.ndarray:
        if step == 9:
            del columns["loss"]
        return kept

    finished(tmp_path / "log", method="max_loss", forge=forge)
    findings = audit(tmp_path / "log").findings
    assert all("it has no value loss, which a max_loss step does not leave" in found.message for found in findings)
    assert findings


def test_what_is_checked_depends_on_the_vectors(tmp_path: Path) -> None:
    said = {}
    for mode in ("full", "tail", "none"):
        finished(tmp_path / mode, embeddings=mode)
        report = audit(tmp_path / mode)
        said[mode] = "\n".join((*report.checked, "--", *report.unchecked))
    assert "after 48 of 48 pushes" in said["full"]
    assert "48 of 48 kept candidates' against the distance" in said["full"]
    # Kept at 6, 12 and 20: the last 13 of 12, 23 and 39 pushes, without the steps of which only a part was still there.
    assert "after 35 of 48 pushes" in said["tail"]
    assert "12 of 48 kept candidates' against the distance" in said["tail"]
    assert "the memory's digest after 13 pushes, whose vectors the log no longer has" in said["tail"]
    assert "inter of 36 kept candidates" in said["tail"]
    assert 'the log keeps no embeddings (embeddings="none")' in said["none"]
    assert all("intra, and inter of candidates that were not kept" in text for text in (said["full"], said["tail"]))
    assert all("whole: that needs an anchor" in text and "(--data)" in text for text in said.values())


def resumed(root: Path, **settings: Any) -> NumpyRun:
    """Killed at 10, resumed at 6; killed at 14, resumed at 9; killed at 13, and resumed at 6 once more: four attempts."""
    run = NumpyRun(root=root, config=selection(**settings)).begin().steps(0, 6).checkpoint(6).steps(6, 10).resume(6)
    run.steps(6, 9).checkpoint(9).steps(9, 14).resume(9).steps(9, 13).resume(6)
    return run.steps(6, 20).checkpoint(20).steps(20, 25)


@pytest.mark.parametrize("mode", ["full", "tail", "none"])
@pytest.mark.parametrize("ending", ["closed", "killed", "live"])
def test_a_run_of_several_attempts_is_intact(mode: str, ending: str, tmp_path: Path) -> None:
    run = resumed(tmp_path / "log", embeddings=mode)
    if ending != "live":
        run.close() if ending == "closed" else run.release()
    report = audit(tmp_path / "log", anchor=(20, run.roots[20]))
    run.release()
    assert report.findings == ()
    assert (report.steps, report.rows, report.attempts) == (25, 190 + 32 + 59 + 27, 4)
    assert report.anchored


@pytest.mark.parametrize("kind", ["full", "a memory that was taken over"])
def test_a_run_that_began_again_is_intact(kind: str, tmp_path: Path) -> None:
    """Killed before its first checkpoint: the second attempt continues nothing, and takes its memory over once more."""
    run = NumpyRun(root=tmp_path / "log", **KINDS[kind]).begin().steps(0, 3).release()
    again = NumpyRun(root=tmp_path / "log", **KINDS[kind])
    again.memory = run.memory[:0]
    again.writers = [SelectionLogWriter.resume(tmp_path / "log", step=0, head=None)]
    again.take_over()
    again.steps(0, 25).close()
    report = audit(tmp_path / "log")
    assert report.findings == ()
    assert (report.steps, report.rows, report.attempts) == (25, 190 + 24, 2)


def test_an_anchor_of_an_older_attempt_covers_only_what_was_written_before_it(tmp_path: Path) -> None:
    """At step 9 of attempt 1; the steps from 6 on were written again, later, by attempt 3."""
    run = resumed(tmp_path / "log").close()
    report = audit(tmp_path / "log", anchor=(9, run.roots[9]))
    assert report.exit_code == 0
    assert report.anchor is not None
    assert (report.anchor.attempt, report.anchor.covers) == (1, 6)
    assert "19 of 25 steps were written later" in report.verdict


def test_an_anchor_for_another_step_is_not_found(tmp_path: Path) -> None:
    """Behind its end a chain stands still: its root must not pass for that of a later step."""
    run = finished(tmp_path / "log", steps=20)
    for step, words in ((19, "rewritten"), (21, "the log ends after step 19"), (400, "its end was cut off")):
        (finding,) = audit(tmp_path / "log", anchor=(step, run.roots[20])).findings
        assert finding.check == "anchor"
        assert words in finding.message


def test_a_kill_between_decision_and_pushes_is_no_fault(tmp_path: Path) -> None:
    run = NumpyRun(root=tmp_path / "log").begin().steps(0, 6).checkpoint(6).steps(6, 9)
    columns, _, _ = run.columns(9)
    run.writers[0].append(9, columns)
    for attempts in (1, 2):
        report = audit(tmp_path / "log")
        assert report.findings == ()
        assert report.attempts == attempts
        assert any("the pushes of step 9" in note for note in report.unchecked)
        if attempts == 1:
            run.resume(6).steps(6, 25).close()


@pytest.mark.parametrize("pushes_too", [False, True])
def test_ranks_that_a_kill_stopped_at_different_steps_are_no_fault(pushes_too: bool, tmp_path: Path) -> None:
    run = NumpyRun(root=tmp_path / "log", world_size=2).begin().steps(0, 6).checkpoint(6).steps(6, 9)
    writers, run.writers = run.writers, run.writers[:1]
    run.world_size = 2
    if pushes_too:
        run.step(9)
    columns, _, _ = run.columns(10)
    run.writers[0].append(10, {name: values[:2] for name, values in columns.items()})
    run.writers = writers
    for attempts in (1, 2):
        report = audit(tmp_path / "log")
        assert report.findings == ()
        assert report.attempts == attempts
        assert any("of attempt 0: it was not closed" in note for note in report.unchecked)
        if attempts == 1:
            run.resume(6).steps(6, 25).close()
    assert report.steps == 25


@pytest.mark.parametrize("killed", [False, True])
def test_what_ranks_wrote_before_a_checkpoint_is_judged_though_the_log_is_not_closed(killed: bool, tmp_path: Path):
    run = NumpyRun(root=tmp_path / "log", world_size=2).begin().steps(0, 6).checkpoint(6)
    if killed:
        run.release()
    report = audit(tmp_path / "log")
    assert (report.findings, report.steps) == ((), 6)
    (tmp_path / "log" / "_heads" / "ba00000006.json").unlink()
    report = audit(tmp_path / "log", anchor=(6, run.roots[6]))
    assert (report.findings, report.steps, report.anchored) == ((), 6, True)


def test_a_run_that_was_resumed_on_fewer_ranks_is_judged_to_its_end(tmp_path: Path) -> None:
    run = NumpyRun(root=tmp_path / "log", world_size=2).begin().steps(0, 6).checkpoint(6).steps(6, 9).release()
    run.world_size = 1
    run.resume(6).steps(6, 11).checkpoint(11).steps(11, 13).close()
    report = audit(tmp_path / "log", anchor=(11, run.roots[11]))
    assert (report.findings, report.steps, report.anchored) == ((), 13, True)
    log = SelectionLog.open(tmp_path / "log")
    assert log.closed
    assert log.verify().closed


def test_an_audit_beside_a_live_writer_finds_nothing(tmp_path: Path) -> None:
    """Whatever moment it looks at, segments being sealed and heads written included."""
    run = NumpyRun(root=tmp_path / "log", config=selection(embeddings="tail")).begin()
    stop = threading.Event()

    def train() -> None:
        step = 0
        while not stop.is_set() and step < 5000:
            run.step(step)
            step += 1
            if step % 7 == 0:
                run.checkpoint(step)
            if step % 50 == 0:
                run.seal()

    thread = threading.Thread(target=train)
    thread.start()
    try:
        reports = [audit(tmp_path / "log") for _ in range(12)]
    finally:
        stop.set()
        thread.join()
    run.close()
    assert [report.findings for report in reports] == [()] * 12
    assert reports[-1].steps > reports[0].steps
    assert audit(tmp_path / "log").findings == ()


def test_the_same_in_a_log_that_was_closed_is_one(tmp_path: Path) -> None:
    run = NumpyRun(root=tmp_path / "log").begin().steps(0, 9)
    columns, _, _ = run.columns(9)
    run.writers[0].append(9, columns)
    run.close()
    (finding,) = audit(tmp_path / "log").findings
    assert (finding.check, finding.step) == ("pushes", 9)
    assert "0 embeddings were pushed into the memory, but 2 candidates were kept" in finding.message


def test_superseded_steps_are_judged_too(tmp_path: Path) -> None:
    """A forgery in what a resumed run left behind, consistent in its chain."""

    def forge(step: int, columns: dict[str, Any], kept: np.ndarray) -> None:
        if step == 8 and not done:
            columns["score"][0] += 1
            done.append(step)

    done: list[int] = []
    run = NumpyRun(root=tmp_path / "log", forge=forge).begin().steps(0, 6).checkpoint(6).steps(6, 10).resume(6)
    run.steps(6, 25).close()
    findings = audit(tmp_path / "log").findings
    assert [(finding.check, finding.step) for finding in findings] == [("score", 8)]
    assert "attempt 0" in findings[0].message


# -- schedules that the log cannot decide --------------------------------------------------------------------------------


def with_scores(root: Path, scored: set[int], **claimed: Any) -> None:
    """A run that selected at some steps, and whose run.json claims other times for it."""
    config = selection(**claimed)
    run = NumpyRun(
        root=root,
        changes={
            "selection": config.as_dict(),
            "selection_fingerprint": config.fingerprint(),
        },
    )
    run.selects = lambda step: step in scored  # type: ignore[method-assign]
    run.begin().steps(0, 25).close()


@pytest.mark.parametrize(
    ("claimed", "scored", "found"),
    [
        ({"start": "100tok"}, range(9, 25), []),
        ({"start": "100tok"}, [*range(9, 13), *range(14, 25)], [13]),
        ({"end": "100tok"}, range(9), []),
        ({"end": "100tok"}, [*range(9), 15], [15]),
        ({"start": "10tok", "end": "100tok"}, range(3, 9), []),
        ({"start": "10tok", "end": "100tok"}, [*range(3, 9), 11], [11]),
        ({"start": "0tok"}, range(25), []),
        ({"start": "10tok", "end": "10ba"}, [*range(3, 10), 12], [12]),
        ({"start": "100tok", "interrupt": 3}, [s for s in range(9, 25) if (s % PER_EPOCH + 1) % 3], []),
        ({"start": "0.5dur"}, range(13, 25), []),  # the loader's max_duration is 25ba
        ({"start": "0.5dur"}, range(12, 25), [12]),
    ],
)
def test_selection_begins_once_and_ends_once(
    claimed: dict[str, Any], scored: Any, found: list[int], tmp_path: Path
) -> None:
    with_scores(tmp_path / "log", set(scored), **claimed)
    report = audit(tmp_path / "log")
    assert [(finding.check, finding.step) for finding in report.findings] == [("schedule", step) for step in found]
    undecided = [note for note in report.unchecked if note.startswith("where ")]
    assert len(undecided) == sum("tok" in text and text != "0tok" for text in claimed.values() if isinstance(text, str))


def test_a_share_of_a_run_that_was_resumed_is_not_decided(tmp_path: Path) -> None:
    config = selection(start="0.5dur")
    run = NumpyRun(root=tmp_path / "log", config=config, length=10).begin().steps(0, 8).checkpoint(8).steps(8, 9)
    run.length = 20  # it was planned for 10 batches, then for 20: selecting from 5 to 7, then from 10 on
    run.resume(8).steps(8, 20).close()
    report = audit(tmp_path / "log")
    assert report.findings == ()
    assert any("where start" in note and "may have changed" in note for note in report.unchecked)


# -- coverage ------------------------------------------------------------------------------------------------------------


def offering(root: Path, order: Any, per_epoch: tuple[int, int], batches: int, **loader: Any) -> Any:
    """The report on a run that offers `order(epoch)`, an array of ids, for two epochs and a step."""
    changes = describe(selection())
    for stream, count in zip(changes["streams"], per_epoch, strict=True):
        stream["per_epoch"] = count
    changes["loader"] |= {"batches_per_epoch": batches} | loader

    def forge(step: int, columns: dict[str, Any], kept: np.ndarray) -> None:
        epoch, batch = divmod(step, batches)
        ids = np.asarray(order(epoch))[8 * batch : 8 * batch + 8]
        stream = (ids >= 50).astype(np.int16)
        within = ids - 50 * stream
        columns.clear()
        count = len(ids)
        position = np.arange(count, dtype=np.int32)
        columns.update(
            epoch=np.full(count, epoch, np.int32),
            position=position,
            epoch_position=8 * batch + position.astype(np.int64),
            sample_id=ids.astype(np.int64),
            stream=stream,
            shard=(within // 16).astype(np.int32),
            shard_index=(within % 16).astype(np.int32),
            tokens=np.ones(count, np.int32),
            selected=np.ones(count, bool),
            train_order=position,
        )

    settings = {name: changes[name] for name in ("streams", "loader")}
    run = NumpyRun(root=root, changes=settings, forge=forge, config=selection(start="1000ba")).begin()
    run.steps(0, 2 * batches + 1).close()
    return audit(root)


def shuffled(epoch: int, *ids: Any) -> np.ndarray:
    return np.random.default_rng(epoch).permutation(np.concatenate([np.asarray(part, np.int64) for part in ids]))


ALL = np.arange(83)


def test_repeats_that_were_declared(tmp_path: Path) -> None:
    report = offering(tmp_path, lambda e: shuffled(e, ALL, np.arange(50)), (100, 33), 17)
    assert report.findings == ()
    report = offering(tmp_path / "b", lambda e: shuffled(e, ALL, np.arange(e, e + 25)), (75, 33), 14)
    assert report.findings == ()
    report = offering(tmp_path / "c", lambda e: shuffled(e, np.arange(e, e + 20), np.arange(50, 83)), (20, 33), 7)
    assert report.findings == ()
    assert any("coverage: 2 finished epochs of 2 streams" in sentence for sentence in report.checked)


def test_the_last_batch_may_be_missing_and_padding_repeat_samples(tmp_path: Path) -> None:
    assert offering(tmp_path / "a", lambda e: shuffled(e, ALL)[:80], (50, 33), 10).findings == ()
    assert offering(tmp_path / "b", lambda e: shuffled(e, ALL, [1, 2, 3, 4, 5]), (50, 33), 11).findings == ()
    more = [*range(12)]
    assert offering(tmp_path / "c", lambda e: shuffled(e, ALL, more), (50, 33), 12, canonical_nodes=64).findings == ()
    found = offering(tmp_path / "d", lambda e: shuffled(e, ALL, more), (50, 33), 12).findings
    assert [(finding.check, finding.step) for finding in found] == [("coverage", 0), ("coverage", 12)]
    assert "12 of 50 samples were offered too often (0, 1, 2, 3, …)" in found[0].message
    report = offering(tmp_path / "e", lambda e: shuffled(e, ALL, more), (50, 33), 12, canonical_nodes=None)
    assert report.findings == ()
    assert any("whether epoch 0 repeated 12 samples by intent" in note for note in report.unchecked)


def test_a_sample_in_the_place_of_others_is_found(tmp_path: Path) -> None:
    swapped = np.where(np.isin(ALL, np.arange(60, 70)), 55, ALL)
    found = offering(tmp_path / "a", lambda e: shuffled(e, swapped), (50, 33), 11).findings
    assert [(finding.check, finding.step, finding.sample_id) for finding in found[:2]] == [
        ("coverage", 0, 60),
        ("coverage", 0, 55),
    ]
    assert "stream two: 10 of 33 samples were offered too seldom (60, 61, 62, 63, …)" in found[0].message


def test_an_epoch_that_was_to_be_shorter_is_no_fault(tmp_path: Path) -> None:
    """Composer's `train_subset_num_batches`."""
    assert offering(tmp_path / "a", lambda e: shuffled(e, ALL)[:40], (50, 33), 5).findings == ()


def test_an_older_log_does_not_say_how_often(tmp_path: Path) -> None:
    changes = describe(selection())
    streams = [{k: v for k, v in stream.items() if k != "per_epoch"} for stream in changes["streams"]]
    finished(tmp_path / "log", changes={"streams": streams, "loader": None})
    report = audit(tmp_path / "log")
    assert report.findings == ()
    assert any("run.json does not say how many are drawn per epoch" in note for note in report.unchecked)


# -- distances -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "held"), [(1, 1), (7, 3), (64, 252), (1024, 1023)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_fast_distances_are_the_definition(dim: int, held: int, offset: float) -> None:
    rng = np.random.default_rng(dim)
    memory = (offset + rng.standard_normal((held + 5, dim))).astype(np.float32)
    queries = (offset + rng.standard_normal((6, dim))).astype(np.float32)
    spans = np.stack([np.arange(6) % 3, held + np.arange(6)], axis=1)
    centre = memory.mean(axis=0, dtype=np.float64)
    fast, scale = _mean_distances(queries, memory, spans, centre)
    slow = np.array([_mean_distance(q, memory[a:b]) for q, (a, b) in zip(queries, spans, strict=True)])
    assert np.allclose(fast, slow, rtol=1e-12 * max(1, offset), atol=0)
    assert (scale > 0.5 * slow).all()


@pytest.mark.parametrize(("dim", "held"), [(4, 3), (64, 13), (1024, 1024)])
def test_torchs_float32_stays_within_a_quarter_of_the_tolerance(dim: int, held: int) -> None:
    import torch

    from udsstream.scoring.embedding_buffer import mean_distance

    rng = np.random.default_rng(held)
    worst = 0.0
    for spread in (1.0, 1e-3, 1e3):
        memory = (2 + spread * rng.standard_normal((held, dim))).astype(np.float32)
        for query in (2 + spread * rng.standard_normal((20, dim))).astype(np.float32):
            logged = float(mean_distance(torch.from_numpy(query[None]), torch.from_numpy(memory))[0])
            worst = max(worst, abs(logged / _mean_distance(query, memory) - 1))
    assert worst < distance_tolerance(dim, held) / 4


def test_a_near_duplicate_is_judged_by_the_definition(tmp_path: Path) -> None:
    """Embeddings that hardly differ, far from the origin: by ‖a‖² + ‖b‖² − 2⟨a, b⟩ nothing would be left of their distance."""

    def almost_the_same(step: int, rows: np.ndarray) -> np.ndarray:
        return (1000 + 1e-3 * rows).astype(np.float32)

    run = NumpyRun(root=tmp_path / "log", forge_rows=almost_the_same)
    columns = run.columns

    def measured(step: int) -> Any:
        out, kept, embeddings = columns(step)
        return out, kept, embeddings

    run.columns = measured  # type: ignore[method-assign]
    run.begin().steps(0, 25).close()
    # The kept were scored with other embeddings than were pushed: the distances to what is in the log are small, the logged ones large.
    findings = audit(tmp_path / "log").findings
    assert {finding.check for finding in findings} == {"inter"}
    assert len(findings) == 46


# -- the report ----------------------------------------------------------------------------------------------------------


def test_many_findings_are_counted_and_a_few_are_shown(tmp_path: Path) -> None:
    def forge(step: int, columns: dict[str, Any], kept: np.ndarray) -> None:
        columns["score"] = columns["score"] + np.float32(1)

    finished(tmp_path / "log", forge=forge)
    report = audit(tmp_path / "log")
    assert report.found == {"score": 190}
    assert len(report.findings) == FINDINGS_KEPT
    text = render(report, "runs/a")
    assert text.count("✗ [score]") == 5
    assert "… and 185 more of [score]" in text
    assert "✗ score: 190 scores against" in text
    assert "✓ top-k:" in text
    assert text.endswith("Verdict: 190 findings (score): the record is not what an undisturbed run leaves.")
    told = json.loads(json.dumps(report.as_dict()))
    assert (told["exit_code"], told["found"], len(told["findings"])) == (1, {"score": 190}, FINDINGS_KEPT)
    assert told["findings"][0].keys() == {"check", "message", "step", "rank", "sample_id", "row"}


def test_a_finding_names_its_place_and_what_differs(tmp_path: Path) -> None:
    def forge(step: int, columns: dict[str, Any], kept: np.ndarray) -> None:
        if step == 7:
            columns["intra"][2] += 1

    finished(tmp_path / "log", forge=forge)
    (finding,) = audit(tmp_path / "log").findings
    sample = int(candidates(7)[2][2])
    assert (finding.check, finding.step, finding.rank, finding.row, finding.sample_id) == ("score", 7, 0, 2, sample)
    assert f"step 7 (attempt 0), position 2, sample {sample}: the score is" in finding.message


def test_a_log_without_selection_settings_is_checked_as_a_record(tmp_path: Path) -> None:
    """One that somebody wrote with the writer alone."""
    with SelectionLogWriter.create(tmp_path, run={"run_id": "plain"}, embeddings="none") as writer:
        columns, _, _ = NumpyRun(root=tmp_path).columns(0)
        writer.append(0, columns)
    report = audit(tmp_path)
    assert report.findings == ()
    assert any("no rule is known" in note for note in report.unchecked)


def test_an_empty_log_is_intact(tmp_path: Path) -> None:
    NumpyRun(root=tmp_path / "log").begin().close()
    report = audit(tmp_path / "log")
    assert (report.findings, report.steps) == ((), 0)


def test_what_is_no_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="is not a selection log"):
        audit(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="audit twice"):
        audit(tmp_path, anchor=(1, bytes(32)), checkpoint=tmp_path)


def test_an_audit_writes_nothing(tmp_path: Path) -> None:
    finished(tmp_path / "log")

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (tmp_path / "log").rglob("*") if path.is_file()}

    before = content()
    audit(tmp_path / "log")
    assert content() == before


def test_the_draw_is_the_one_that_is_made(tmp_path: Path) -> None:
    """`numpy_run` and the audit have each their own; both must be the method's."""
    from udsstream.scoring import methods

    run = NumpyRun(root=tmp_path, config=selection(method="random"))
    for step in (0, 7, 12):
        columns, _, _ = run.columns(step)
        epoch, batch = divmod(step, PER_EPOCH)
        given = some_candidates(len(columns["score"]), seed=run.config.seed, epoch=epoch, batch=batch)
        drawn = methods.random(given)
        assert np.array_equal(drawn.numpy(), columns["score"])
    assert math.isclose(float(drawn.mean()), 0.5, abs_tol=0.5)


@pytest.mark.parametrize("name", ["full", "tail"])
def test_the_golden_logs_are_intact(name: str) -> None:
    """Written by the first version, with digests of the memory by a rule of their own: checked as a record."""
    report = audit(Path(__file__).parents[1] / "selection_log" / "golden_v1" / name)
    assert report.findings == ()
    assert report.rows > 0
