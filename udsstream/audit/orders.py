"""Scores that are places in an order: the greedy methods, taken again from the logged inner products of the candidates' gradients.

    b candidates of one rank at one step, M numbers of a row of `interaction`

The rules, written from the methods' descriptions (docs/methods.md): `greats` takes the candidate with the largest alignment less its
interactions with those that were taken; `divbs` the one whose gradient, less its projections on those of the taken and of length one, has
the largest inner product with the sum of all. Of equal ones the first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from udsstream.audit.report import Finding, Ledger
from udsstream.audit.rows import Decisions

__all__ = ["check_order"]


def check_order(rows: Decisions, method: str, usable: np.ndarray, ledger: Ledger) -> None:
    """Each rank's candidates of a step have the scores b, b − 1, …, 1 in the order in which the method takes them.

    usable: (n,) which rows have a finite score.
    """
    if "interaction" not in rows.columns:
        ledger.find(
            Finding(check="score", message=f"the log has no column interaction, which a run of {method} leaves")
        )
        return
    take: Callable[[np.ndarray, np.ndarray], list[int]] = _greats if method == "greats" else _divbs
    bad: dict[int, str] = {}
    checked = 0
    group, rank = rows.group_of, rows["rank"].astype(np.int64)
    order = np.lexsort((rows["position"], rank, group))
    key = np.stack([group[order], rank[order]])
    begins = np.flatnonzero(np.append(True, (key[:, 1:] != key[:, :-1]).any(axis=0))[: len(order)])
    for low, high in zip(begins.tolist(), [*begins[1:].tolist(), len(order)], strict=True):
        mine = order[low:high]
        if not usable[mine].all():
            continue
        first = int(mine[0])
        matrix, b = rows["interaction"][mine], len(mine)
        if not rows["has_interaction"][mine].all() or b > matrix.shape[1]:
            bad[first] = (
                f"{b} candidates of rank {rank[first]} have {matrix.shape[1]} interactions each, expected as many at least"
            )
            continue
        inner = matrix[:, :b].astype(np.float64)
        if not np.isfinite(inner).all() or matrix[:, b:].any():
            bad[first] = "an interaction is not finite, or stands behind the last candidate"
            continue
        if not np.allclose(inner, inner.T, rtol=1e-5, atol=1e-6 * np.abs(inner).max(initial=0)):
            bad[first] = "the interactions are not the same both ways"
            continue
        expected = np.empty(b, np.float32)
        expected[take(inner, rows["alignment"][mine].astype(np.float64))] = np.arange(b, 0, -1)
        checked += b
        wrong = np.flatnonzero(expected != rows["score"][mine])
        if len(wrong):
            row = int(mine[wrong[0]])
            bad[row] = (
                f"the score is {rows['score'][row]:.9g}, but the order of {method} gives {expected[wrong[0]]:.9g}"
            )
    ledger.find_each(
        "score",
        np.array(list(bad), np.int64),
        lambda row: Finding(
            check="score",
            step=int(rows["step"][row]),
            rank=int(rows["rank"][row]),
            sample_id=int(rows["sample_id"][row]),
            row=int(rows["position"][row]),
            message=f"step {rows['step'][row]} (attempt {rows['attempt'][row]}), position {rows['position'][row]}, sample "
            f"{rows['sample_id'][row]}: {bad[row]}",
        ),
    )
    ledger.check(f"score: {checked:,} scores against the order in which {method} takes the candidates of each rank")


def _greats(interaction: np.ndarray, alignment: np.ndarray) -> list[int]:
    gain, order = alignment.copy(), []
    while len(order) < len(gain):
        best = int(np.argmax(gain))
        order.append(best)
        gain = gain - interaction[:, best]
        gain[order] = -np.inf
    return order


def _divbs(interaction: np.ndarray, alignment: np.ndarray) -> list[int]:
    del alignment
    rest, whole, order = interaction.copy(), np.diag(interaction).copy(), []
    while len(order) < len(whole):
        own = np.diag(rest)
        left = own > 1e-6 * whole
        adds = np.zeros(len(whole))
        adds[left] = np.abs(rest.sum(axis=1))[left] / np.sqrt(own[left])
        adds[order] = -np.inf
        best = int(np.argmax(adds))
        order.append(best)
        if left[best]:
            rest = rest - np.outer(rest[:, best], rest[best]) / rest[best, best]
    return order
