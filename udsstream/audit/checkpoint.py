"""What a Composer checkpoint says of the run, against the log: an anchor that was written outside of the log's folder.

The file is read by `udsstream/mosaicml/checkpoint.py`, which runs no pickled code. That module loads torch and Composer, and is loaded
only when a checkpoint is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from udsstream.audit.memory import MemoryCheck
from udsstream.audit.record import GivenAnchor, Record
from udsstream.audit.report import Anchor, Finding, Ledger
from udsstream.config import config_difference
from udsstream.errors import ResumeError

__all__ = ["CheckpointFacts", "check_checkpoint", "read_facts_of_checkpoint"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckpointFacts:
    """What a checkpoint keeps of the selection."""

    path: Path
    run_id: str
    step: int
    heads: tuple[bytes, ...]
    root: bytes
    pushed: int
    digest: bytes
    vectors: np.ndarray = field(repr=False)
    """(m, d) float32, oldest first."""
    config: Mapping[str, Any]
    streams: tuple[tuple[str, str], ...]
    """(name, digest of the index) of each."""
    world_size: int

    @property
    def anchor(self) -> GivenAnchor:
        return GivenAnchor(source=f"checkpoint {self.path}", step=self.step, root=self.root, heads=self.heads)


def read_facts_of_checkpoint(path: Path) -> CheckpointFacts:
    """Reads a checkpoint.

    Raises:
        ResumeError: it is no checkpoint of a selecting run with a log, or cannot be read.
    """
    from udsstream.mosaicml.checkpoint import read_checkpoint, selection_state

    state = selection_state(read_checkpoint(path))
    if state is None or not isinstance(state.get("log"), dict):
        raise ResumeError(
            f"{path} holds no word on a selection log: it was saved by a run without selection, or without a log"
        )
    log, memory = state["log"], state["memory"]
    try:
        facts = CheckpointFacts(
            path=path,
            run_id=str(log["run_id"]),
            step=int(state["step"]),
            heads=tuple(bytes(head) for head in log["heads"]),
            root=bytes(log["merkle_root"]),
            pushed=int(memory["pushed"]),
            digest=bytes(memory["digest"]),
            vectors=np.asarray(memory["rows"].detach().float().cpu().numpy(), dtype=np.float32),
            config=dict(state["config"]),
            streams=tuple((str(name), str(digest)) for name, digest in state["streams"]),
            world_size=int(state["world_size"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise ResumeError(
            f"{path}: its selection state is not what udsstream writes ({type(error).__name__}: {error})"
        ) from error
    sizes = {len(head) for head in (*facts.heads, facts.root, facts.digest)}
    if sizes != {32} or facts.vectors.ndim != 2 or not 0 <= facts.step < 1 << 62 or not 0 <= facts.pushed < 1 << 62:
        raise ResumeError(
            f"{path}: its selection state is not what udsstream writes (digests, step or memory of the wrong form)"
        )
    return facts


def check_checkpoint(
    record: Record, facts: CheckpointFacts, anchor: Anchor, memory: MemoryCheck | None, ledger: Ledger
) -> None:
    """Everything but the Merkle root, which `record.check_anchor` has compared."""

    def wrong(what: str) -> None:
        ledger.find(Finding(check="checkpoint", step=facts.step, message=f"{facts.path}: {what}"))

    run = record.run.run
    if facts.run_id != run.get("run_id"):
        wrong(f"it belongs to run {facts.run_id[:80]}, but the log is of run {str(run.get('run_id'))[:80]}")
        return
    selection = run.get("selection")
    if isinstance(selection, dict):
        settings = [
            {name: _plain(value) for name, value in content.items() if name != "embeddings"}
            for content in (selection, facts.config)
        ]
        changed = config_difference(settings[0], settings[1])
        if changed:
            wrong("its selection settings are not the log's: " + "; ".join(changed)[:500])
    listed = run.get("streams")
    recorded = (
        [stream.get("index_sha256") for stream in listed if isinstance(stream, dict)]
        if isinstance(listed, list)
        else []
    )
    if recorded != [digest for _, digest in facts.streams]:
        wrong(f"its streams ({', '.join(name for name, _ in facts.streams)[:200] or 'none'}) are not those of run.json")
    if facts.world_size != len(facts.heads):
        wrong(f"it was made by {facts.world_size} ranks, but has {len(facts.heads)} heads")
    ledger.check("checkpoint: its run id, settings, streams, world size and memory against the log's")
    if memory is None or not anchor.found or anchor.attempt is None:
        return
    memory.check_state("checkpoint", str(facts.path), anchor.attempt, facts.step, facts.pushed, facts.digest)
    memory.compare_vectors("checkpoint", str(facts.path), anchor.attempt, facts.step, facts.vectors)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
