"""Every tampering is found, by the check and with the step that it must be found by; or only an anchor finds it, and does."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from numpy_run import finished
from tampering import TAMPERINGS, Tampering

from udsstream.audit.report import AuditReport
from udsstream.audit.run import audit

DOCS = Path(__file__).parents[2] / "docs" / "auditing.md"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory where there is one: hundreds of logs that are flushed to disk take minutes."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="udsstream-audit-", dir=memory if memory.is_dir() else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def roots(folder: Path) -> dict[str, bytes]:
    """The Merkle root before step 20 of the honest run, for each kind of run that is tampered with."""
    kinds: dict[str, dict[str, Any]] = {repr(tampering.settings): tampering.settings for tampering in TAMPERINGS}
    return {
        kind: finished(folder / f"honest-{number}", **settings).roots[20]
        for number, (kind, settings) in enumerate(kinds.items())
    }


@pytest.mark.parametrize("tampering", TAMPERINGS, ids=lambda tampering: tampering.name)
def test_it_is_found(tampering: Tampering, folder: Path, roots: dict[str, bytes]) -> None:
    root = folder / "tampered"
    shutil.rmtree(root, ignore_errors=True)
    tampering.make(root)
    report = audit(root)
    anchored = audit(root, anchor=(20, roots[repr(tampering.settings)]))
    if tampering.check is None:
        assert report.exit_code == 0, report.findings
        assert "would pass" in report.verdict
        assert [finding.check for finding in anchored.findings] == ["anchor"]
        assert not anchored.anchored
        assert "finding" in anchored.verdict
        return
    assert report.exit_code == 1
    assert names(report, tampering), [vars(finding) for finding in report.findings]
    assert names(anchored, tampering), "an anchor hides nothing"


def names(report: AuditReport, tampering: Tampering) -> bool:
    """Whether a finding names the check, and the first of its findings the place."""
    found = [finding for finding in report.findings if finding.check == tampering.check]
    wanted = {name: getattr(tampering, name) for name in ("step", "rank", "sample_id")}
    return bool(found) and any(
        all(value is None or getattr(finding, name) == value for name, value in wanted.items()) for finding in found
    )


def test_there_are_many() -> None:
    assert len(TAMPERINGS) >= 60
    assert len({tampering.name for tampering in TAMPERINGS}) == len(TAMPERINGS)


def test_a_rewriting_is_told_from_the_honest_run_by_an_anchor(folder: Path, roots: dict[str, bytes]) -> None:
    """The honest run itself has the root: what the anchor finds above is the tampering."""
    report = audit(folder / "honest-0", anchor=(20, next(iter(roots.values()))))
    assert report.exit_code == 0
    assert report.anchored
    assert report.anchor is not None
    assert report.anchor.covers == 20
    assert report.verdict.startswith("intact relative to this anchor")
    assert "5 of 25 steps were written later" in report.verdict
