"""A small trainer that only logs: run by test_kill.py and killed at a random moment.

    python killed_writer.py ROOT STOP EVERY

It logs the steps up to STOP with a checkpoint each EVERY steps (ROOT.checkpoint: step and head), resumes from the last one,
and says each step on standard output once it is logged.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import recorded

from udsstream.selection_log.files import replace_file
from udsstream.selection_log.writer import SelectionLogWriter

WAL_BYTES = 12_000  # a few steps: sealing is always under way


def main(root: Path, stop: int, every: int) -> None:
    kept = root.with_suffix(".checkpoint")
    step, head = 0, None
    if kept.exists():
        words = kept.read_text().split()
        step, head = int(words[0]), bytes.fromhex(words[1])
    if (root / "run.json").exists():
        writer = SelectionLogWriter.resume(root, step=step, head=head, wal_bytes=WAL_BYTES)
    else:
        writer = recorded.create(root, wal_bytes=WAL_BYTES)
    while step < stop:
        recorded.log_step(writer, step)
        os.write(1, f"{step}\n".encode())
        step += 1
        if step % every == 0:
            head = recorded.checkpoint(writer, step)
            replace_file(kept, f"{step} {head.hex()}".encode())
    writer.close()
    os.write(1, b"closed\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
