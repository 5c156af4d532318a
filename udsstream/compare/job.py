"""A comparison from its configuration to its table and plot.

    OUT/
        <entry>/seed-<seed>/     the folder of a run, and in it output.txt: what its process printed
        table.md table.json      written anew by each command, from the runs that are finished
        plot.png

Nothing else is kept: the folders of the runs are the state. So a comparison that was killed goes on when it is started again, entries and
seeds can be added to it, and two processes can share the work (each with other entries).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from udsstream.compare.config import CompareConfig, PlannedRun, plan_runs
from udsstream.compare.plot import draw, figure_of, series_of
from udsstream.compare.results import read_finished
from udsstream.compare.run import Outcome, check_folders, do_runs
from udsstream.compare.table import Comparison, compare_runs, write_table
from udsstream.errors import ConfigError

__all__ = ["Report", "compare"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a command made of a comparison."""

    comparison: Comparison
    outcomes: tuple[Outcome, ...]
    """Of the runs that this command was to do."""
    files: tuple[Path, ...]

    @property
    def failed(self) -> int:
        """Runs that failed in this command."""
        return sum(outcome.state == "failed" for outcome in self.outcomes)


def compare(
    config: CompareConfig,
    *,
    where: str = "the comparison",
    only: Sequence[str] = (),
    train: bool = True,
    began: Callable[[PlannedRun, int, int], Any] = lambda run, number, of: None,
    ended: Callable[[Outcome], Any] = lambda outcome: None,
) -> Report:
    """Does the runs that are not finished, then writes table and plot of all that are.

    Args:
        where: the configuration's source, for messages.
        only: entries to run; empty: all. Table and plot show all.
        train: False: table and plot alone.
        began: is told of each run that is begun or gone on with, which one it is and of how many.
        ended: is told of each run that ended, those included that were finished before.

    Raises:
        ConfigError: a run cannot be done as it is set, or an entry of `only` is not there; nothing was started.
        ResumeError, LogExistsError: a folder holds another run; nothing was started.
        LogError: the record of a finished run cannot be read.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "a comparison was started on several ranks, but it starts its runs itself, each on one; start `udsstream compare` without a "
            "launcher"
        )
    runs = plan_runs(config, where=where)
    unknown = sorted(set(only) - set(config.entries))
    if unknown:
        raise ConfigError(f"{unknown[0]!r}: there is no such entry to run; there are {', '.join(config.entries)}")
    outcomes: list[Outcome] = []
    check_folders(runs)
    if train:
        wanted = [run for run in runs if not only or run.entry in only]
        outcomes = do_runs(
            wanted,
            answers=config.answers,
            began=lambda run: began(run, wanted.index(run) + 1, len(wanted)),
            ended=ended,
        )
    finished = read_finished(runs)
    failures = {(o.run.entry, o.run.seed): o.message for o in outcomes if o.state == "failed"}
    comparison = compare_runs(config, runs, finished, failures)
    out = Path(config.out)
    files = write_table(out, comparison, finished)
    plot = out / "plot.png"
    entries = list(config.entries)
    lines = series_of(finished, entries)
    draw(plot, figure_of(lines, entries=entries, baseline=config.baseline_entry, title=_title(config)))
    return Report(comparison=comparison, outcomes=tuple(outcomes), files=(*files, plot))


def _title(config: CompareConfig) -> str:
    return f"{Path(config.out).name}: {len(config.entries)} entries, seeds {', '.join(map(str, config.seeds))}"
