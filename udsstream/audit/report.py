"""What an audit found: findings, what was checked, what could not be, and the verdict in words that claim no more than was shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from udsstream.untrusted_text import clean_line

__all__ = ["FINDINGS_KEPT", "Anchor", "AuditReport", "Finding", "Ledger", "render"]

FINDINGS_KEPT = 100
"""Findings of one check that a report holds; the others are only counted."""
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it should be."""

    check: str
    """Short, stable name of the check, such as "top-k", "chain" or "coverage"."""
    message: str
    """What was found, what was expected, and where."""
    step: int | None = None
    rank: int | None = None
    sample_id: int | None = None
    row: int | None = None
    """Position among the step's candidates (or place in the table of pushes)."""

    def as_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON; fields that do not apply are left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """Something kept outside of the log's folder that the log was compared with."""

    source: str
    """"checkpoint PATH" or "given"."""
    step: int
    """The anchor speaks of everything before this step."""
    root: str
    """Merkle root of the ranks' heads, in hexadecimal."""
    found: bool
    """Whether the log's chains passed through it."""
    attempt: int | None = None
    """The attempt in which they did."""
    covers: int = 0
    """Steps of the run as it stands that were written before the anchor was taken; it does not speak of the others."""


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """The result of an audit."""

    run_id: str
    steps: int
    """Distinct steps of the run as it stands."""
    rows: int
    """Decisions of all attempts, superseded ones included."""
    attempts: int
    findings: tuple[Finding, ...]
    """At most FINDINGS_KEPT of each check; `found` has the true numbers."""
    found: Mapping[str, int] = field(default_factory=dict)
    """Check → how often it found something."""
    checked: tuple[str, ...]
    """One sentence for each check that was done, whatever came of it: "names of checks: what was compared with what"."""
    unchecked: tuple[str, ...]
    """One sentence for each thing that could not be checked in this mode, and why."""
    anchored: bool
    """An anchor was given and the log's chains passed through it."""
    anchor: Anchor | None = None
    chains: Mapping[tuple[str, int], str] = field(default_factory=dict, repr=False)
    """(table, rank) → where its chain stood at the end of what was audited, in hexadecimal."""

    @property
    def exit_code(self) -> int:
        """0: nothing was found; 1: something was."""
        return 1 if self.findings else 0

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.findings:
            total = sum(self.found.values()) or len(self.findings)
            checks = ", ".join(dict.fromkeys(finding.check for finding in self.findings))
            return f"{total:,} finding{'s' if total > 1 else ''} ({checks}): the record is not what an undisturbed run leaves"
        if self.anchored and self.anchor is not None:
            rest = self.steps - self.anchor.covers
            return (
                f"intact relative to this anchor: {self.anchor.source}, before step {self.anchor.step}, Merkle root "
                f"{self.anchor.root[:16]}…"
                + (
                    f"; {rest:,} of {self.steps:,} steps were written later, and are only consistent with themselves"
                    if rest
                    else ""
                )
            )
        return "internally consistent; no anchor was given, so a log cut at its end or rewritten as a whole would pass"

    def as_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return {
            "run_id": self.run_id,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "steps": self.steps,
            "rows": self.rows,
            "attempts": self.attempts,
            "anchored": self.anchored,
            "anchor": None if self.anchor is None else asdict(self.anchor),
            "found": dict(self.found),
            "findings_kept_per_check": FINDINGS_KEPT,
            "findings": [finding.as_dict() for finding in self.findings],
            "checked": list(self.checked),
            "unchecked": list(self.unchecked),
        }


class Ledger:
    """Where the checks write what they find while an audit goes on."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.found: Counter[str] = Counter()
        self.checked: list[str] = []
        self._unchecked: dict[str, None] = {}

    def find(self, finding: Finding) -> None:
        """Counts a finding, and keeps it if there are not too many of its check."""
        self.found[finding.check] += 1
        if self.found[finding.check] <= FINDINGS_KEPT:
            self.findings.append(finding)

    def find_each(self, check: str, places: np.ndarray, describe: Callable[[int], Finding]) -> None:
        """A finding for each place; only those that are kept are put into words."""
        room = max(0, FINDINGS_KEPT - self.found[check])
        self.findings += [describe(place) for place in places[:room].tolist()]
        if len(places):
            self.found[check] += len(places)

    def check(self, sentence: str) -> None:
        """Something was checked: "names of checks: what was compared with what"."""
        self.checked.append(sentence)

    def skip(self, sentence: str) -> None:
        """Something could not be checked; said once."""
        self._unchecked.setdefault(sentence)

    @property
    def unchecked(self) -> list[str]:
        return list(self._unchecked)


def render(report: AuditReport, title: str) -> str:
    """The report as text: the findings first, the first few of each check; then what was and was not checked; the verdict last."""
    attempts = f"{report.attempts} attempt{'s' if report.attempts != 1 else ''}"
    lines = [f"{title}: run {report.run_id}, {report.steps:,} steps, {report.rows:,} decisions, {attempts}", ""]
    if report.findings:
        lines.append("Found")
        for check in dict.fromkeys(finding.check for finding in report.findings):
            found = [finding for finding in report.findings if finding.check == check]
            lines += [f"  ✗ [{check}] {finding.message}" for finding in found[:_SHOWN]]
            more = report.found.get(check, len(found)) - min(len(found), _SHOWN)
            if more > 0:
                lines.append(f"    … and {more:,} more of [{check}]")
        lines.append("")
    lines += ["Checked", *(f"  {_mark(report, sentence)} {sentence}" for sentence in report.checked), ""]
    if report.unchecked:
        lines += ["Not checked", *(f"  · {sentence}" for sentence in report.unchecked), ""]
    return "\n".join(map(clean_line, [*lines, f"Verdict: {report.verdict}."]))


def _mark(report: AuditReport, sentence: str) -> str:
    names = sentence.partition(": ")[0].split(", ")
    return "✗" if any(report.found.get(name) for name in names) else "✓"
