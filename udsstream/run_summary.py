"""What a run chose, in a short table: read from its selection log alone, so that it holds for any run, finished or not."""

from __future__ import annotations

import json
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

from udsstream.errors import LogError
from udsstream.selection_log.reader import SelectionLog

__all__ = ["RunSummary", "print_step", "print_summary", "summarize"]


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


def summarize(log: SelectionLog) -> RunSummary:
    """Counts what a log holds."""
    table = log.table(columns=["step", "tokens", "selected", "score", "stream"])
    selected = table["selected"].to_numpy(zero_copy_only=False)
    tokens = table["tokens"].to_numpy()
    scored = table.filter(table["score"].is_valid())
    correlation = None
    if scored.num_rows > 1:
        scores, lengths = scored["score"].to_numpy().astype(np.float64), scored["tokens"].to_numpy().astype(np.float64)
        if scores.std() > 0 and lengths.std() > 0:
            correlation = float(np.corrcoef(scores, lengths)[0, 1])
    names = [stream["name"] for stream in log.run.get("streams", [])]
    numbers = pc.fill_null(table["stream"], -1).to_numpy()
    shares = [
        StreamShare(
            name=names[number] if 0 <= number < len(names) else "(no stream)",
            candidates=int((numbers == number).sum()),
            kept=int(selected[numbers == number].sum()),
        )
        for number in np.unique(numbers).tolist()
    ]
    return RunSummary(
        steps=len(log.steps()),
        candidates=table.num_rows,
        kept=int(selected.sum()),
        candidate_tokens=int(tokens.sum()),
        kept_tokens=int(tokens[selected].sum()),
        score_length_correlation=correlation,
        streams=sorted(shares, key=lambda share: (-share.candidates, share.name)),
    )


def print_summary(
    run: Path, *, before: float | None = None, after: float | None = None, console: Console | None = None
) -> None:
    """Prints what the run in this folder chose, where the log is, and what to do next."""
    console = console or Console()
    summary = summarize(SelectionLog.open(run))
    table = Table(title=f"What was chosen in {run}", title_justify="left", show_header=False)
    table.add_row("steps", f"{summary.steps:,}")
    table.add_row("candidates looked at", f"{summary.candidates:,}")
    table.add_row("kept and trained on", f"{summary.kept:,} ({_share(summary.kept, summary.candidates)})")
    table.add_row(
        "tokens trained on",
        f"{summary.kept_tokens:,} of {summary.candidate_tokens:,} "
        f"({_share(summary.candidate_tokens - summary.kept_tokens, summary.candidate_tokens)} saved)",
    )
    table.add_row("streams drawn from", f"{len(summary.streams):,}")
    if before is not None and after is not None:
        table.add_row("held-out loss, before → after", f"{before:.4f} → {after:.4f} nats per token")
    if summary.score_length_correlation is not None:
        table.add_row("correlation of score and length", f"{summary.score_length_correlation:+.2f}")
    console.print(table)
    console.print(f"The record of every choice is in {run}. Read it with:", highlight=False)
    for arguments in ("--step 0", "--to-parquet"):
        console.print(f"  {_command()} log {run} {arguments}", highlight=False, soft_wrap=True)


def print_step(log: SelectionLog, step: int, *, as_json: bool = False, console: Console | None = None) -> None:
    """Prints the decisions of one step, in canonical order.

    Raises:
        LogError: the log holds no such step.
    """
    table = log.table(filter=pc.field("step") == step)
    if table.num_rows == 0:
        steps = log.steps()
        held = f"steps {steps[0]} to {steps[-1]}" if len(steps) else "no steps yet"
        raise LogError(f"step {step} is not in the log; it holds {held}")
    if as_json:
        print(json.dumps(table.to_pylist(), indent=2))
        return
    names = [stream["name"] for stream in log.run.get("streams", [])]
    shown = Table(title=f"Step {step}, epoch {table['epoch'][0].as_py()}", title_justify="left")
    for heading in ("place", "sample", "stream", "tokens", "intra", "inter", "score", "kept"):
        shown.add_column(heading, justify="left" if heading == "stream" else "right", no_wrap=True)
    for row in table.to_pylist():
        stream = row["stream"]
        shown.add_row(
            str(row["position"]),
            str(row["sample_id"]),
            "" if stream is None else names[stream] if stream < len(names) else str(stream),
            str(row["tokens"]),
            *(_number(row[name]) for name in ("intra", "inter", "score")),
            "" if row["train_order"] is None else f"no. {row['train_order'] + 1}",
        )
    (console or Console()).print(shown)


def _command() -> str:
    """How this machine's user can call us: after `make demo` the command is in .venv/bin, mostly not on the path."""
    typed = Path(sys.argv[0])
    if shutil.which("udsstream") or typed.name != "udsstream":
        return "udsstream"
    return os.path.relpath(typed)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "–"


def _number(value: float | None) -> str:
    """Five digits or more, without an exponent while it can be read without one."""
    if value is None:
        return ""
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.5g}"
