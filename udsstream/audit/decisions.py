"""Does each decision follow from what is recorded: steps and positions; score, choice, draw and schedule.

    n rows, G groups (the candidates of one step of one attempt), K kept

What belongs to a row or a group alone is checked for all attempts at once; what depends on the steps before, in each attempt's view.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping

import numpy as np

from udsstream.audit.orders import check_order
from udsstream.audit.report import Finding, Ledger
from udsstream.audit.rows import Decisions, View
from udsstream.audit.settings import RunFacts
from udsstream.config import SelectionConfig

__all__ = ["check_choices", "check_positions", "check_schedule", "check_scores", "check_steps"]

_MEASURED = {
    "intra": 0.0,
    "inter": 0.0,
    "loss": 0.0,
    "grad_norm": 0.0,
    "reference_loss": 0.0,
    "alignment": -np.inf,
}
"""What a method may have measured of a candidate, and the least that it may be."""

_COLUMN_OF = {
    "uds_intra": "intra",
    "uds_inter": "inter",
    "max_loss": "loss",
    "max_grad": "grad_norm",
    "longest": "tokens",
}
"""The column that is the score."""

_TIME = re.compile(r"(\d{1,18})(ba|ep|sp|tok)|(\d+(?:\.\d+)?)dur")


# -- steps and places ----------------------------------------------------------------------------------------------------


def check_steps(rows: Decisions, view: View, from_steps: Mapping[int, int], ledger: Ledger) -> None:
    """No step is missing, and each epoch's candidates follow each other without gap or overlap."""
    groups, fresh = view.groups, view.fresh
    if not len(groups):
        return
    step, attempt = rows.group("step")[groups], rows.group("attempt")[groups]
    before = np.append(-1, step[:-1])

    def missing(i: int) -> Finding:
        after = f"after step {before[i]}" if i else "at its beginning"
        low, high = int(before[i]) + 1, int(step[i]) - 1
        which = f"step {low} is" if low == high else f"the steps {low} to {high} are"
        return Finding(
            check="steps", step=low, message=f"{after} attempt {attempt[i]} comes to step {step[i]}: {which} missing"
        )

    ledger.find_each("steps", np.flatnonzero(fresh & (step > before + 1)), missing)
    begun = np.array([from_steps.get(a, 0) for a in attempt.tolist()])
    early = np.flatnonzero(fresh & (step < begun))
    ledger.find_each(
        "steps",
        early,
        lambda i: Finding(
            check="steps",
            step=int(step[i]),
            message=f"step {step[i]} stands in attempt {attempt[i]}, which began at step {begun[i]}",
        ),
    )
    _check_epochs(rows, view, step, before, ledger)


def _check_epochs(rows: Decisions, view: View, step: np.ndarray, before: np.ndarray, ledger: Ledger) -> None:
    groups = view.groups
    epoch = rows.group("epoch")[groups].astype(np.int64)
    place = (rows.group("epoch_position") - rows.group("position"))[groups]
    count = rows.counts[groups]
    follows = step == before + 1  # behind a missing step nothing is known of the step before
    follows[0] = step[0] == 0
    last_epoch = np.append(0, epoch[:-1])
    same = epoch == last_epoch
    expected = np.append(0, place[:-1] + count[:-1])
    expected = np.where(same, expected, 0)

    wrong_epoch = follows & ~same & (epoch != last_epoch + 1)
    wrong_epoch[0] |= bool(follows[0] and epoch[0] != 0)
    ledger.find_each(
        "epochs",
        np.flatnonzero(view.fresh & wrong_epoch),
        lambda i: Finding(
            check="epochs",
            step=int(step[i]),
            message=f"step {step[i]} is of epoch {epoch[i]}, the step before it of epoch {last_epoch[i]}"
            if i
            else f"the first step is of epoch {epoch[i]}, expected 0",
        ),
    )
    ledger.find_each(
        "epochs",
        np.flatnonzero(view.fresh & follows & ~wrong_epoch & (place != expected)),
        lambda i: Finding(
            check="epochs",
            step=int(step[i]),
            message=f"step {step[i]} begins at place {place[i]} of epoch {epoch[i]}, expected {expected[i]}: candidates were left out, "
            "counted twice, or moved",
        ),
    )


def check_positions(rows: Decisions, config: SelectionConfig, ledger: Ledger) -> None:
    """Within a step: positions 0 to B−1, one epoch, lengths that can be scored, and an order of training over the kept by position."""
    group = rows.group_of
    start = rows.starts[group]
    step, position, rank = rows["step"], rows["position"], rows["rank"]

    def first_of_each(bad: np.ndarray) -> np.ndarray:
        """The first bad row of each group; bad (n,)."""
        at = np.flatnonzero(bad)
        return at[np.unique(group[at], return_index=True)[1]]

    def found(i: int, what: str) -> Finding:
        return Finding(
            check="positions",
            step=int(step[i]),
            rank=int(rank[i]),
            sample_id=int(rows["sample_id"][i]),
            row=int(position[i]),
            message=f"step {step[i]} (attempt {rows['attempt'][i]}), sample {rows['sample_id'][i]}: {what}",
        )

    place = np.arange(len(rows)) - start
    ledger.find_each(
        "positions",
        first_of_each(position != place),
        lambda i: found(i, f"it has position {position[i]}, expected {place[i]}: a row is missing, doubled or moved"),
    )
    ledger.find_each(
        "positions",
        first_of_each(rows["epoch"] != rows["epoch"][start]),
        lambda i: found(i, f"it is of epoch {rows['epoch'][i]}, the step's others are of {rows['epoch'][start[i]]}"),
    )
    offset = rows["epoch_position"] - position
    ledger.find_each(
        "positions",
        first_of_each(offset != offset[start]),
        lambda i: found(
            i,
            f"its place in the epoch is {rows['epoch_position'][i]}, expected {int(offset[start[i]]) + int(position[i])}",
        ),
    )
    ledger.find_each(
        "positions",
        first_of_each((rows["tokens"] <= 0) | (rows["tokens"] > config.max_seq_len)),
        lambda i: found(i, f"it has {rows['tokens'][i]} tokens, expected 1 to {config.max_seq_len}"),
    )
    selected, ordered = rows["selected"], rows["has_train_order"]
    ledger.find_each(
        "positions",
        first_of_each(selected != ordered),
        lambda i: found(
            i,
            f"it is {'kept, but has no' if selected[i] else 'not kept, but has a'} place in the order of training",
        ),
    )
    order = np.cumsum(selected) - 1
    order -= (order - selected.astype(np.int64) + 1)[start]
    ledger.find_each(
        "positions",
        first_of_each(selected & ordered & (rows["train_order"] != order)),
        lambda i: found(i, f"it is number {rows['train_order'][i]} in the order of training, expected {order[i]}"),
    )
    # Sizes and ids that would overflow or index wrongly later are found by the checks above and by coverage.
    ledger.check(
        f"positions: places, epochs, lengths and orders of training of {len(rows):,} candidates in {len(rows.starts):,} steps, all attempts"
    )


# -- scores and choices --------------------------------------------------------------------------------------------------


def check_scores(rows: Decisions, facts: RunFacts, ledger: Ledger) -> None:
    """Scores are there for a whole step or not at all, are finite, and are what intra and inter give, to the last bit."""
    config = facts.config
    assert config is not None
    scored = rows["has_score"]

    def found(i: int, what: str) -> Finding:
        return Finding(
            check="score",
            step=int(rows["step"][i]),
            rank=int(rows["rank"][i]),
            sample_id=int(rows["sample_id"][i]),
            row=int(rows["position"][i]),
            message=f"step {rows['step'][i]} (attempt {rows['attempt'][i]}), position {rows['position'][i]}, sample "
            f"{rows['sample_id'][i]}: {what}",
        )

    partly = rows.any_in(scored) & rows.any_in(~scored)
    odd = np.flatnonzero(partly)
    ledger.find_each(
        "score",
        odd,
        lambda g: Finding(
            check="score",
            step=int(rows.group("step")[g]),
            message=f"step {rows.group('step')[g]}: some of its candidates have a score and some have none",
        ),
    )
    nothing = np.zeros(len(rows), bool)
    for name, least in _MEASURED.items():
        has = rows["has_" + name]
        if name == "loss" and name not in config.measures:
            continue  # may be recorded beside any method
        expected = scored if name in config.measures else nothing
        ledger.find_each(
            "score",
            np.flatnonzero(has != expected),
            lambda i, name=name, has=has: found(
                i, f"it has {'a' if has[i] else 'no'} value {name}, which a {config.method} step does not leave"
            ),
        )
        with np.errstate(invalid="ignore"):
            wrong = has & ~(np.isfinite(rows[name]) & (rows[name] >= least))
        ledger.find_each(
            "score",
            np.flatnonzero(wrong),
            lambda i, name=name, least=least: found(
                i, f"{name} is {rows[name][i]!s}, expected a finite number" + (" of at least 0" if least == 0 else "")
            ),
        )
    infinite = scored & ~np.isfinite(rows["score"])
    ledger.find_each(
        "score",
        np.flatnonzero(infinite),
        lambda i: found(i, f"the score is {rows['score'][i]!s}, expected a finite number"),
    )
    usable_rows = scored & ~infinite
    if config.compares:
        check_order(rows, config.method_name, usable_rows, ledger)
        return
    rule = _score_rule(rows, config, facts.alpha)
    if rule is None:
        if config.measured is not None:
            ledger.skip(
                f"whether the scores are those of {config.method_name}: it is a function that the log does not hold"
            )
        return
    value, known, told, name = rule
    usable = usable_rows & known
    # Compared as bits, so that −0 is not 0.
    differs = usable & (value.view(np.uint32) != rows["score"].view(np.uint32))
    ledger.find_each(
        "score",
        np.flatnonzero(differs),
        lambda i: found(i, f"the score is {rows['score'][i]:.9g}, but {told(i)} is {value[i]:.9g}"),
    )
    ledger.check(f"score: {int(usable.sum()):,} scores against {name}, to the last bit")


def _score_rule(
    rows: Decisions, config: SelectionConfig, alpha: float | None
) -> tuple[np.ndarray, np.ndarray, Callable[[int], str], str] | None:
    """What the scores must be by what was measured: the values (float32), where they are known, and the rule in words, of a row and in
    general. None: the score follows from nothing in the row (draws, a method of one's own), or α is not known."""
    method = config.method
    if method == "uds" and alpha is not None:
        with np.errstate(all="ignore"):
            value = (rows["intra"].astype(np.float64) + alpha * rows["inter"].astype(np.float64)).astype(np.float32)
        return (
            value,
            rows["has_intra"] & rows["has_inter"],
            lambda i: f"intra {rows['intra'][i]:.9g} + {alpha:.9g} × inter {rows['inter'][i]:.9g}",
            "intra + α·inter",
        )
    if method == "rho_loss":
        with np.errstate(all="ignore"):
            value = (rows["loss"].astype(np.float64) - rows["reference_loss"].astype(np.float64)).astype(np.float32)
        return (
            value,
            rows["has_loss"] & rows["has_reference_loss"],
            lambda i: f"loss {rows['loss'][i]:.9g} − reference_loss {rows['reference_loss'][i]:.9g}",
            "loss − reference_loss",
        )
    column = _COLUMN_OF.get(str(method))
    if column is None:
        return None
    known = np.ones(len(rows), bool) if column == "tokens" else rows["has_" + column]
    return rows[column].astype(np.float32), known, lambda i: f"its {column}", column


def check_choices(rows: Decisions, config: SelectionConfig, ledger: Ledger, *, equal_shares: bool = True) -> None:
    """The kept are the k largest scores, ties to the smaller position; where nothing was scored, all are kept.

    equal_shares: each rank must have as many of an incomplete batch; false for a pass that does not train.
    """
    group = rows.group_of
    counts = rows.counts
    share = _ranks_of_steps(rows) if equal_shares else np.ones(len(rows.starts), np.int64)
    sizes, size_of = np.unique(np.stack([counts, share]), axis=1, return_inverse=True)
    k = np.array([config.kept(int(size), int(ranks)) for size, ranks in sizes.T], np.int64)[size_of.reshape(-1)]
    judged = ~rows.any_in(~rows["has_score"]) & ~rows.any_in(~np.isfinite(rows["score"]))
    score = rows["score"].astype(np.float64)
    # Where each rank chooses among its own candidates, it is their places that count.
    chooser = group if config.scope == "global" else group * (int(rows["rank"].max(initial=0)) + 1) + rows["rank"]
    best = np.lexsort((rows["position"], -score, chooser))
    ordered = chooser[best]
    begins = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])
    place = np.empty(len(rows), np.int64)
    place[best] = np.arange(len(rows)) - np.repeat(begins, np.diff(np.append(begins, len(rows))))
    selected = rows["selected"]
    due = k if config.scope == "global" else k // share
    if config.keep_tokens is not None:
        due = _within_budget(rows, best, config.keep_tokens, share)
    expected = np.where(judged[group], place < due[group], True)
    skipped = rows.any_in(rows["has_score"]) & ~judged  # partly scored, or not finite: found as such
    wrong = np.flatnonzero(rows.any_in(selected != expected) & ~skipped)

    def describe(g: int) -> Finding:
        at = slice(int(rows.starts[g]), int(rows.starts[g] + counts[g]))
        step, attempt = rows["step"][at][0], rows["attempt"][at][0]
        kept, due = selected[at], expected[at]

        def named(row: int) -> str:
            value = f" (score {score[at][row]:.9g})" if judged[g] else ""
            return f"sample {rows['sample_id'][at][row]} at position {rows['position'][at][row]}{value}"

        added, left = np.flatnonzero(kept & ~due), np.flatnonzero(due & ~kept)
        text = f"step {step} (attempt {attempt}): {kept.sum()} of {counts[g]} candidates are kept, expected {due.sum()}"
        if len(added) and len(left):
            text += f"; {named(added[0])} was kept although {named(left[0])} was not"
        elif len(added):
            text += f"; {named(added[0])} was kept beyond the number"
        elif len(left):
            text += f"; {named(left[0])} was not kept"
        row = int((added if len(added) else left)[0])
        return Finding(
            check="top-k",
            step=int(step),
            rank=int(rows["rank"][at][row]),
            sample_id=int(rows["sample_id"][at][row]),
            row=int(rows["position"][at][row]),
            message=text,
        )

    ledger.find_each("top-k", wrong, describe)
    ledger.check(
        f"top-k: the kept of {int(judged.sum()):,} scored steps against the largest scores, ties to the smaller position; those of "
        f"{int((~judged & ~skipped).sum()):,} others against all candidates"
    )


def _within_budget(rows: Decisions, best: np.ndarray, budget: int, share: np.ndarray) -> np.ndarray:
    """(G,) how many of each step's candidates, by falling score, stay within so many tokens: a multiple of its ranks, and one for each.

    best: (n,) the rows by step and falling score.
    """
    group, tokens = rows.group_of, rows["tokens"].astype(np.int64)[best]
    taken = np.cumsum(tokens)
    taken -= (taken - tokens)[rows.starts][group]
    fits = rows.sum_in(taken <= budget)
    return np.maximum(share, fits // share * share)


def _ranks_of_steps(rows: Decisions) -> np.ndarray:
    """(G,) how many ranks brought the candidates of each step."""
    pairs = np.unique(np.stack([rows.group_of, rows["rank"].astype(np.int64)]), axis=1)
    return np.bincount(pairs[0], minlength=len(rows.starts))


# -- when selection was on -----------------------------------------------------------------------------------------------


def check_schedule(rows: Decisions, view: View, facts: RunFacts, ledger: Ledger, *, resumed: bool) -> int:
    """Steps without scores are those that start, end and interrupt excuse, and no others; for "random", the draw is done again.

    Returns:
        How many draws were done again.
    """
    config = facts.config
    assert config is not None
    groups = view.groups
    if not len(groups):
        return 0
    step = rows.group("step")[groups]
    epoch = rows.group("epoch")[groups].astype(np.int64)
    counts = rows.counts[groups]
    begins = (rows.group("epoch_position") - rows.group("position"))[groups] == 0
    gap = np.append(step[0] != 0, np.diff(step) != 1)
    number = np.cumsum(begins)
    # A place in the epoch is known when its first step is there and nothing is missing since.
    since = np.cumsum(gap)
    first = np.maximum.accumulate(np.where(begins, np.arange(len(step)), 0))
    known = (number > 0) & (since == since[first])
    batch_in_epoch = step - step[first]
    scored = rows.any_in(rows["has_score"])[groups]
    whole = np.cumsum(gap) == 0

    interrupted = np.zeros(len(step), bool)
    if config.interrupt:
        interrupted = (batch_in_epoch + 1) % config.interrupt == 0
    else:
        known[:] = True
    now = {"ba": step, "ep": epoch, "sp": np.cumsum(counts) - counts}
    begun = _reached(config.start, now, facts.max_duration, resumed=resumed)
    ended = np.zeros(len(step), bool)
    if config.end is not None:
        ended = _reached(config.end, now, facts.max_duration, resumed=resumed)
    for name, text, decided in (("start", config.start, begun), ("end", config.end, ended)):
        if decided is None:
            share = str(text).endswith("dur")
            why = (
                "the run's planned length is not known, or may have changed"
                if share
                else "the log does not count as Composer does"
            )
            ledger.skip(f'where {name}="{text}" falls: {why}')
        elif str(text).endswith("sp"):
            known &= whole  # samples are counted from the run's beginning
    judged = known & view.fresh
    off = interrupted | (~begun if begun is not None else False) | (ended if ended is not None else False)
    if config.method == "full":  # keeps all without a score
        off = np.ones(len(step), bool)
    wrong = judged & scored & off
    if begun is not None and ended is not None:
        wrong |= judged & ~scored & ~off
    elif not (resumed and "dur" in f"{config.start} {config.end}"):
        # Not known when, but known how often: selection begins once and ends once.
        on = np.flatnonzero(known & ~off)
        turns = np.diff(scored[on].astype(np.int8))
        rises, falls = on[1:][turns > 0], on[1:][turns < 0]
        if ended is not None:
            late = falls
        elif begun is not None:
            late = rises
        else:
            late = rises[rises > falls[:1].min(initial=len(step))]
        wrong[late[view.fresh[late]]] = True

    def describe(i: int) -> Finding:
        settings = f"start={config.start!r}, end={config.end!r}, interrupt={config.interrupt}"
        what = (
            "selected, though it should not have"
            if scored[i]
            else "trained on everything, though it should have selected"
        )
        return Finding(
            check="schedule",
            step=int(step[i]),
            message=f"step {step[i]} (batch {batch_in_epoch[i]} of epoch {epoch[i]}) {what} by {settings}",
        )

    ledger.find_each("schedule", np.flatnonzero(wrong), describe)
    if config.method in ("random", "selective_backprop"):
        placed = (number > 0) & (since == since[first])
        return _check_draw(rows, view, config, batch_in_epoch, epoch, scored & placed, ledger)
    return 0


def _reached(text: str, now: Mapping[str, np.ndarray], max_duration: str | None, *, resumed: bool) -> np.ndarray | None:
    """Whether each step is at or after a time; None when the log cannot tell."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    if match[2] in now:
        return now[match[2]] >= int(match[1])
    if match[2] == "tok":
        return np.ones(len(now["ba"]), bool) if int(match[1]) == 0 else None
    share = float(match[3])
    if share == 0:
        return np.ones(len(now["ba"]), bool)
    whole = _TIME.fullmatch(max_duration or "")
    if whole is None or whole[2] not in now or resumed or int(whole[1]) == 0:
        return None
    done = now[whole[2]]
    if (done >= int(whole[1])).any():  # the run went on beyond what it was planned for
        return None
    return done / int(whole[1]) >= share


def _check_draw(
    rows: Decisions,
    view: View,
    config: SelectionConfig,
    batch_in_epoch: np.ndarray,
    epoch: np.ndarray,
    scored: np.ndarray,
    ledger: Ledger,
) -> int:
    """Draws follow from the seed, the epoch and the batch in it, and for "selective_backprop" from the losses.

    Returns:
        How many steps were drawn again.
    """
    method = config.method_name
    # The draw's stream is named by its purpose, so that no other draw of the run shares it.
    purpose = np.frombuffer(hashlib.sha256(f"method/{method}".encode()).digest()[:16], "<u4").tolist()
    bad: list[tuple[int, float]] = []
    drawn = 0
    ranks = _ranks_of_steps(rows)
    for i in np.flatnonzero(scored & view.fresh).tolist():
        group = int(view.groups[i])
        here = slice(int(rows.starts[group]), int(rows.starts[group] + rows.counts[group]))
        if epoch[i] < 0 or batch_in_epoch[i] < 0:
            continue
        seeds = np.random.SeedSequence([config.seed, *purpose, int(epoch[i]), int(batch_in_epoch[i])])
        words = np.random.PCG64(seeds).random_raw(here.stop - here.start)
        found = rows["score"][here]
        if method == "random":
            expected = (words >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
            wrong = expected != found
        else:
            expected = _percentile_draw(rows["loss"][here], words, _share(rows, config, group, int(ranks[group])))
            # Logarithms may differ in their last bit between machines.
            with np.errstate(invalid="ignore"):
                wrong = ~(
                    np.abs(expected.astype(np.float64) - found) <= 4 * np.spacing(np.abs(expected)).astype(np.float64)
                )
        drawn += 1
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            bad.append((here.start + at, float(expected[at])))
    expected_at = dict(bad)
    ledger.find_each(
        "random",
        np.array([row for row, _ in bad], np.int64),
        lambda row: Finding(
            check="random",
            step=int(rows["step"][row]),
            rank=int(rows["rank"][row]),
            sample_id=int(rows["sample_id"][row]),
            row=int(rows["position"][row]),
            message=f"step {rows['step'][row]}, position {rows['position'][row]}: the score is {rows['score'][row]:.9g}, but seed "
            f"{config.seed} draws {expected_at[row]:.9g}",
        ),
    )
    return drawn


def _share(rows: Decisions, config: SelectionConfig, group: int, ranks: int) -> float:
    """The share of a step's candidates, or of their tokens, that is to be kept."""
    start, count = int(rows.starts[group]), int(rows.counts[group])
    if config.keep_tokens is not None:
        return min(1.0, config.keep_tokens / max(1, int(rows["tokens"][start : start + count].astype(np.int64).sum())))
    return max(1, config.kept(count, ranks)) / count


def _percentile_draw(loss: np.ndarray, words: np.ndarray, share: float) -> np.ndarray:
    """(B,) float32: log of the weight `percentile ** (1/share − 1)`, plus Gumbel noise."""
    order = np.argsort(loss, kind="stable")
    weight = np.empty(len(loss))
    weight[order] = (1 / share - 1) * np.log(np.arange(1, len(loss) + 1) / len(loss))
    uniform = ((words >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52
    return (weight - np.log(-np.log(uniform))).astype(np.float32)
