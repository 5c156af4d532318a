"""What a run chose, in a short table: read from its selection log alone, so that it holds for any run, finished or not."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from udsstream.log_queries.queries import stream_name, trains
from udsstream.log_queries.tables import share
from udsstream.selection_log.reader import SelectionLog
from udsstream.untrusted_text import clean_line, in_markup

__all__ = ["RunSummary", "print_summary", "summarize"]


@dataclass(frozen=True, kw_only=True)
class StreamShare:
    """How one stream fared."""

    name: str
    candidates: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run in numbers."""

    steps: int
    candidates: int
    kept: int
    candidate_tokens: int
    kept_tokens: int
    score_length_correlation: float | None
    """Pearson, over all candidates that were scored; None when it is undefined."""
    streams: list[StreamShare]
    """Every stream that offered a candidate, most offered first."""

    def as_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return asdict(self)


def summarize(log: SelectionLog, *, until: int | None = None) -> RunSummary:
    """Counts what a log holds; with `until`, below that step."""
    below = None if until is None else pc.field("step") < until
    table = log.table(columns=["step", "tokens", "selected", "score", "stream"], filter=below)
    selected = table["selected"].to_numpy(zero_copy_only=False)
    tokens = table["tokens"].to_numpy()
    scored = table.filter(table["score"].is_valid())
    correlation = None
    if scored.num_rows > 1:
        scores, lengths = scored["score"].to_numpy().astype(np.float64), scored["tokens"].to_numpy().astype(np.float64)
        if scores.std() > 0 and lengths.std() > 0:
            correlation = float(np.corrcoef(scores, lengths)[0, 1])
    numbers = pc.fill_null(table["stream"], -1).to_numpy()
    shares = [
        StreamShare(
            name=stream_name(log.run, number),
            candidates=int((numbers == number).sum()),
            kept=int(selected[numbers == number].sum()),
        )
        for number in np.unique(numbers).tolist()
    ]
    return RunSummary(
        steps=len(np.unique(table["step"].to_numpy())),
        candidates=table.num_rows,
        kept=int(selected.sum()),
        candidate_tokens=int(tokens.sum()),
        kept_tokens=int(tokens[selected].sum()),
        score_length_correlation=correlation,
        streams=sorted(shares, key=lambda share: (-share.candidates, share.name)),
    )


def print_summary(
    run: Path,
    *,
    before: float | None = None,
    after: float | None = None,
    until: int | None = None,
    console: Console | None = None,
) -> None:
    """Prints what the run in this folder chose (with `until`, below that step), where the log is, and what to do next."""
    console = console or Console()
    log = SelectionLog.open(run)
    summary = summarize(log, until=until)
    limited = "" if until is None else f" before step {until}"
    where = clean_line(str(run))
    table = Table(title=f"What was chosen in {in_markup(run)}{limited}", title_justify="left", show_header=False)
    table.add_row("steps", f"{summary.steps:,}")
    table.add_row("candidates looked at", f"{summary.candidates:,}")
    kept = f"{summary.kept:,} ({share(summary.kept, summary.candidates)})"
    tokens = f"{summary.kept_tokens:,} of {summary.candidate_tokens:,}"
    if trains(log):
        table.add_row("kept and trained on", kept)
        saved = share(summary.candidate_tokens - summary.kept_tokens, summary.candidate_tokens)
        table.add_row("tokens trained on", f"{tokens} ({saved} saved)")
    else:
        table.add_row("chosen", kept)
        table.add_row("tokens chosen", tokens)
    table.add_row("streams drawn from", f"{len(summary.streams):,}")
    if before is not None and after is not None:
        table.add_row("held-out loss, before → after", f"{before:.4f} → {after:.4f} nats per token")
    if summary.score_length_correlation is not None:
        table.add_row("correlation of score and length", f"{summary.score_length_correlation:+.2f}")
    console.print(table)
    console.print(f"The record of every choice is in {where}. Read it with:", highlight=False, markup=False)
    for arguments in ("--step 0", "--least 5 --text", "--to-parquet"):
        console.print(f"  {_command()} log {where} {arguments}", highlight=False, markup=False, soft_wrap=True)


def _command() -> str:
    """How this machine's user can call us: after `make demo` the command is in .venv/bin, mostly not on the path."""
    typed = Path(sys.argv[0])
    if shutil.which("udsstream") or typed.name != "udsstream":
        return "udsstream"
    return os.path.relpath(typed)
