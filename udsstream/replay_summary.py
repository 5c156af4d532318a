"""What came of a replay, in a few lines for people."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from udsstream.replay import ReplayResult
from udsstream.selection_log.timings import read_timings
from udsstream.untrusted_text import clean_line, in_markup

__all__ = ["print_replay"]


def print_replay(result: ReplayResult, console: Console | None = None) -> None:
    """Prints steps, verdict, what differed, and what a step took beside the original's."""
    console = console or Console()
    table = Table(title=f"Replay of {in_markup(result.run)}", title_justify="left", show_header=False)
    table.add_row("steps", f"{result.first} to {result.stop - 1}")
    table.add_row("weights", _weights(result))
    if result.verification is not None:
        for name, value in _verification(result.verification):
            table.add_row(name, value)
    if result.step_seconds is not None:
        table.add_row("seconds per step, median", _seconds(result, result.step_seconds))
    if result.eval_loss_after is not None:
        table.add_row("held-out loss after", f"{result.eval_loss_after:.4f} nats per token")
    table.add_row("folder", in_markup(result.save_folder))
    console.print(table)
    if result.differences:
        console.print("Other than in the run, so that equal weights were not to be expected:", highlight=False)
        for line in result.differences:
            console.print(f"  {clean_line(line)}", highlight=False, markup=False)


def _weights(result: ReplayResult) -> str:
    weights = result.weights
    if weights is None:
        return "not compared: the run, or a replay that was interrupted behind it, left no checkpoint at a step that was replayed"
    where = f"at step {weights.step}"
    if weights.identical:
        return f"{where} those of the run's checkpoint, bit for bit ({weights.tensors} tensors)"
    return (
        f"{where} {weights.different} of {weights.tensors} tensors are not those of the run's checkpoint "
        f"(by {weights.largest_difference:.3g} at most)"
    )


def _verification(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("decisions made again", f"{found['agreed']} of {found['steps']} steps choose what the log says")]
    rows.append(("scores", f"{found['equal_scores']} of {found['scores']} are the logged ones bit for bit"))
    if found["memories"]:
        rows.append(
            ("memory", f"after {found['equal_memories']} of {found['memories']} steps the logged one, by its digest")
        )
    if found["largest_difference"]:
        rows.append(("largest difference of a score", f"{found['largest_difference']:.3g}, relative"))
    for name, title in (("first_divergence", "first other choice"), ("first_difference", "first other score")):
        first = found[name]
        if first is not None:
            scores = f"logged {first['logged_score']:.9g}, now {first['new_score']:.9g}"
            margins = f"{first['logged_margin']:+.3g}, now {first['new_margin']:+.3g}"
            where = f"step {first['step']}, sample {first['sample_id']}"
            rows.append((title, f"{where}: {scores}; margin to the k-th score {margins}"))
    return rows


def _seconds(result: ReplayResult, seconds: float) -> str:
    times = read_timings(result.run)
    within = (times["step"] >= result.first) & (times["step"] < result.stop)
    if not within.any():
        return f"{seconds:.3g}"
    original = float(np.median(times["step_seconds"][within]))
    return f"{seconds:.3g} (the run took {original:.3g}: {original / seconds:.1f} times as long)"
