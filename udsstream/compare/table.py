"""The table of a comparison: `table.json` and `table.md` in its folder, and what is printed.

One row per entry. Everything is a mean over the entry's finished seeds; where a difference is given, it is taken within each seed first.
docs/comparing.md says what the columns mean and what they do not.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from udsstream.compare.arithmetic import Spread, at, chance_overlap, holm, paired, spread, t_test
from udsstream.compare.config import CompareConfig, PlannedRun
from udsstream.compare.results import FinishedRun, choices_overlap
from udsstream.run_folder import write_atomically

__all__ = ["Comparison", "EntryRow", "compare_runs", "print_table", "write_table"]

State = Literal["finished", "failed", "unfinished", "not begun"]


@dataclass(frozen=True, kw_only=True)
class EntryRow:
    """One entry, over its finished seeds. None: not known, or not defined."""

    entry: str
    seeds: tuple[int, ...]
    """Finished ones."""
    loss: Spread | None
    """Held-out, after the last step, nats per token."""
    difference: Spread | None
    """To the baseline, within seeds: `loss − baseline's loss`."""
    better: int | None
    """In how many of those seeds the loss is below the baseline's."""
    p_value: float | None
    """Of a two-sided paired t-test of these differences; None for fewer than two."""
    loss_at_equal_tokens: Spread | None
    difference_at_equal_tokens: Spread | None
    steps: Spread | None
    tokens: Spread | None
    """Trained on, prompts included, padding not."""
    kept_share: Spread | None
    """Of the candidates."""
    seconds: Spread | None
    """In training steps: selection, forward, backward; without loading data, evaluating and saving."""
    length_correlation: Spread | None
    overlap: Mapping[str, float | None]
    """Entry → mean Jaccard index of the choices, over the seeds and steps with the same candidates."""
    accuracy: Spread | None
    difference_of_accuracy: Spread | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All of it."""

    baseline: str | None
    seeds: tuple[int, ...]
    equal_tokens: int | None
    """The largest number of trained tokens that every finished run reached."""
    rows: tuple[EntryRow, ...]
    states: Mapping[str, Mapping[int, tuple[State, str]]]
    """Entry → seed → what became of the run, and what it said when it failed."""
    chance: float | None
    """The overlap to expect of two choices that know nothing of each other, as many as the baseline keeps."""
    notes: tuple[str, ...]
    """What a reader must know of these figures."""

    @property
    def unfinished(self) -> int:
        """Runs that are not finished."""
        return sum(state != "finished" for seeds in self.states.values() for state, _ in seeds.values())


def compare_runs(
    config: CompareConfig,
    runs: Sequence[PlannedRun],
    finished: Sequence[FinishedRun],
    failures: Mapping[tuple[str, int], str] | None = None,
) -> Comparison:
    """The comparison, from what its finished runs left.

    Args:
        runs: all that were planned.
        finished: those of them that are finished.
        failures: (entry, seed) → what a run said that failed just now.
    """
    baseline = config.baseline_entry
    by_entry = {name: {run.seed: run for run in finished if run.entry == name} for name in config.entries}
    with_loss = [run for run in finished if run.loss is not None]
    equal_tokens = min((run.kept_tokens for run in with_loss), default=None)
    reference = by_entry.get(baseline or "", {})
    differing: list[str] = []
    rows = tuple(
        _row(
            name,
            mine,
            reference,
            is_baseline=name == baseline,
            others=by_entry,
            tokens=equal_tokens,
            differing=differing,
        )
        for name, mine in by_entry.items()
    )
    return Comparison(
        baseline=baseline,
        seeds=tuple(config.seeds),
        equal_tokens=equal_tokens,
        rows=rows,
        states=_states(config, runs, finished, failures or {}),
        chance=_chance(reference),
        notes=tuple(_notes(config, baseline, equal_tokens, finished, rows, sorted(set(differing)))),
    )


def _row(
    name: str,
    mine: Mapping[int, FinishedRun],
    reference: Mapping[int, FinishedRun],
    *,
    is_baseline: bool,
    others: Mapping[str, Mapping[int, FinishedRun]],
    tokens: int | None,
    differing: list[str],
) -> EntryRow:
    def equal(runs: Mapping[int, FinishedRun]) -> dict[int, float | None]:
        return {
            seed: None if tokens is None else at(tokens, run.curve.tokens, run.curve.loss) for seed, run in runs.items()
        }

    def of(runs: Mapping[int, FinishedRun], what: str) -> dict[int, float | None]:
        return {seed: getattr(run, what) for seed, run in runs.items()}

    gaps = [] if is_baseline else paired(of(mine, "loss"), of(reference, "loss"))
    equal_gaps = [] if is_baseline else paired(equal(mine), equal(reference))
    accuracy_gaps = [] if is_baseline else paired(of(mine, "accuracy"), of(reference, "accuracy"))
    overlaps: dict[str, float | None] = {}
    for other, theirs in others.items():
        if other == name:
            continue
        found = []
        for seed in mine.keys() & theirs.keys():
            value, same, common = choices_overlap(mine[seed].choices, theirs[seed].choices)
            found += [] if value is None else [value]
            if same < common:
                differing.append(f"{min(name, other)} and {max(name, other)}")
        overlaps[other] = statistics.fmean(found) if found else None
    runs = list(mine.values())
    return EntryRow(
        entry=name,
        seeds=tuple(sorted(mine)),
        loss=spread([run.loss for run in runs]),
        difference=spread(gaps),
        better=sum(gap < 0 for gap in gaps) if gaps else None,
        p_value=t_test(gaps),
        loss_at_equal_tokens=spread(list(equal(mine).values())),
        difference_at_equal_tokens=spread(equal_gaps),
        steps=spread([run.steps for run in runs]),
        tokens=spread([run.kept_tokens for run in runs]),
        kept_share=spread([run.kept / run.candidates if run.candidates else None for run in runs]),
        seconds=spread([run.seconds for run in runs]),
        length_correlation=spread([run.length_correlation for run in runs]),
        overlap=overlaps,
        accuracy=spread([run.accuracy for run in runs]),
        difference_of_accuracy=spread(accuracy_gaps),
    )


def _states(
    config: CompareConfig,
    runs: Sequence[PlannedRun],
    finished: Sequence[FinishedRun],
    failures: Mapping[tuple[str, int], str],
) -> dict[str, dict[int, tuple[State, str]]]:
    done = {(run.entry, run.seed) for run in finished}
    found: dict[str, dict[int, tuple[State, str]]] = {name: {} for name in config.entries}
    for run in runs:
        key = (run.entry, run.seed)
        state: State = "unfinished" if run.folder.exists() else "not begun"
        if key in failures:
            state = "failed"
        elif key in done:
            state = "finished"
        found[run.entry][run.seed] = (state, failures.get(key, ""))
    return found


def _chance(reference: Mapping[int, FinishedRun]) -> float | None:
    """By the mean numbers of candidates and kept of a step, rounded."""
    steps = sum(run.steps for run in reference.values())
    if not steps:
        return None
    candidates = round(sum(run.candidates for run in reference.values()) / steps)
    kept = round(sum(run.kept for run in reference.values()) / steps)
    return chance_overlap(candidates, kept, kept)


def _notes(
    config: CompareConfig,
    baseline: str | None,
    equal_tokens: int | None,
    finished: Sequence[FinishedRun],
    rows: Sequence[EntryRow],
    differing: Sequence[str],
) -> list[str]:
    notes = []
    if baseline is not None:
        notes.append(
            f"Differences are to `{baseline}`, taken within each seed; ± is the standard deviation over seeds (n − 1)."
        )
    notes += _significance(rows)
    if equal_tokens is not None:
        evaluations = min(len(run.curve.step) for run in finished if run.loss is not None)
        notes.append(
            f"“At equal tokens” is the loss after {equal_tokens:,} trained tokens, the most that every run reached, on straight lines "
            f"between the evaluations ({evaluations} of each run at least): the loss falls in a curve, so between two it is overstated."
        )
    notes += [
        f"{pair} did not look at the same candidates at every step: their difference is not paired, their overlap is of the "
        "steps where they did."
        for pair in differing
    ]
    if len(config.seeds) < 3:
        notes.append(
            f"{len(config.seeds)} seed{'s' * (len(config.seeds) > 1)}: too few to tell a difference from chance."
        )
    return notes


def _significance(rows: Sequence[EntryRow]) -> list[str]:
    """Which differences are more than chance, one by one and all of them together."""
    p_values = {row.entry: row.p_value for row in rows if row.p_value is not None}
    if not p_values:
        return []
    level, count = 0.05, len(p_values)
    alone = [name for name, p in p_values.items() if p <= level]
    said = f"More than chance by a paired t-test at {level:.0%}: {', '.join(alone) or 'none'}."
    if count > 1 and alone:
        together = holm(p_values, level)
        said += f" With Holm's correction for {count} entries: {', '.join(together) or 'none'}."
    return [said]


# -- writing ---------------------------------------------------------------------------------------------------------


def write_table(folder: Path, comparison: Comparison, finished: Sequence[FinishedRun]) -> list[Path]:
    """Writes `table.json` (every figure, the curve of each run too) and `table.md`; their paths."""
    value = dataclasses.asdict(comparison)
    value["states"] = {
        entry: {str(seed): {"state": state, "message": message} for seed, (state, message) in seeds.items()}
        for entry, seeds in comparison.states.items()
    }
    value["runs"] = [_run_as_dict(run) for run in finished]
    paths = [folder / "table.json", folder / "table.md"]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(paths[0], json.dumps(value, indent=1, allow_nan=False) + "\n")
    write_atomically(paths[1], as_markdown(comparison))
    return paths


def _run_as_dict(run: FinishedRun) -> dict[str, Any]:
    plain = {
        field.name: getattr(run, field.name)
        for field in dataclasses.fields(run)
        if field.name not in ("curve", "choices")
    }
    seconds = [None if value != value else round(value, 6) for value in run.curve.seconds.tolist()]
    curve = {name: getattr(run.curve, name).tolist() for name in ("step", "loss", "tokens")} | {"seconds": seconds}
    return plain | {"loss": run.loss, "curve": curve}


@dataclass(frozen=True)
class _Column:
    name: str
    printed: bool = True
    """Whether it stands in the terminal's table, not in the file's alone."""
    spare: int = 0
    """Of the columns that are printed those with the largest number are the first to be left out; 0 is never."""


def _columns(comparison: Comparison) -> list[_Column]:
    minus = f"− {comparison.baseline}"
    compared = comparison.baseline is not None
    accuracy = any(row.accuracy is not None for row in comparison.rows)
    return [
        _Column("entry"),
        _Column("seeds", spare=2),
        _Column("held-out loss"),
        *([_Column(minus), _Column("better", spare=1), _Column("p", spare=5)] if compared else []),
        _Column("at equal tokens", spare=3),
        *([_Column(f"{minus} at equal tokens", printed=False)] if compared else []),
        _Column("steps", printed=False),
        _Column("tokens"),
        _Column("kept", printed=False),
        _Column("seconds", spare=4),
        _Column("score ~ length", printed=False),
        *([_Column("exact match")] if accuracy else []),
        *([_Column(f"{minus}, exact match", printed=False)] if accuracy and compared else []),
    ]


def _cells(row: EntryRow, comparison: Comparison) -> dict[str, str]:
    minus = f"− {comparison.baseline}"
    compared = comparison.baseline is not None and row.entry != comparison.baseline
    better = "" if row.better is None or row.difference is None else f"{row.better} of {row.difference.n}"
    return {
        "entry": row.entry,
        "seeds": f"{len(row.seeds)} of {len(comparison.seeds)}",
        "held-out loss": _loss(row.loss),
        minus: _loss(row.difference, signed=True) if compared else "",
        "better": better,
        "p": "" if row.p_value is None else _p_value(row.p_value),
        "at equal tokens": _loss(row.loss_at_equal_tokens),
        f"{minus} at equal tokens": _loss(row.difference_at_equal_tokens, signed=True) if compared else "",
        "steps": _count(row.steps),
        "tokens": _count(row.tokens),
        "kept": "–" if row.kept_share is None else f"{row.kept_share.mean:.1%}",
        "seconds": _count(row.seconds),
        "score ~ length": "–" if row.length_correlation is None else f"{row.length_correlation.mean:+.2f}",
        "exact match": _share(row.accuracy),
        f"{minus}, exact match": _share(row.difference_of_accuracy, signed=True) if compared else "",
    }


def as_markdown(comparison: Comparison) -> str:
    """The table, the overlaps and the notes as a Markdown file."""
    names = [column.name for column in _columns(comparison)]
    lines = ["# Comparison", "", _markdown_row(names), _rule(len(names))]
    for row in comparison.rows:
        cells = _cells(row, comparison)
        lines.append(_markdown_row([cells[name] for name in names]))
    lines += ["", *(f"- {note}" for note in comparison.notes)]
    lines += _failures(comparison)
    overlaps = [row.entry for row in comparison.rows if any(value is not None for value in row.overlap.values())]
    if len(overlaps) > 1:
        lines += [
            "",
            "## How alike the choices are",
            "",
            "Mean Jaccard index |A ∩ B| / |A ∪ B| of what was kept at the same step of the same seed: 1 is the same choice."
            + (
                ""
                if comparison.chance is None
                else f" Choices that know nothing of each other: {comparison.chance:.2f}."
            ),
            "",
            _markdown_row(["", *overlaps]),
            _rule(len(overlaps) + 1),
        ]
        by_name = {row.entry: row for row in comparison.rows}
        for name in overlaps:
            values = [by_name[name].overlap.get(other) for other in overlaps]
            lines.append(_markdown_row([name, *("" if value is None else f"{value:.2f}" for value in values)]))
    return "\n".join(lines) + "\n"


def print_table(comparison: Comparison, *, console: Console | None = None) -> None:
    """The columns that matter most, the notes, and what is not finished.

    No figure is cut: where the terminal is narrow spreads go below their means, and then columns are left out, by name.
    """
    console = console or Console()
    printed = [column for column in _columns(comparison) if column.printed]
    names = [column.name for column in printed]
    cells = [_cells(row, comparison) for row in comparison.rows]
    table = _as_table(cells, names, folded=False)
    left_out = []
    if not _fits(table, console):
        table = _as_table(cells, names, folded=True)
        for column in sorted(filter(lambda column: column.spare, printed), key=lambda column: -column.spare):
            if _fits(table, console):
                break
            left_out.append(column.name)
            table = _as_table(cells, [name for name in names if name not in left_out], folded=True)
    console.print(table)
    if left_out:
        note = f"For want of width without {', '.join(left_out)}: all columns are in table.md."
        console.print(note, highlight=False, markup=False)
    for note in comparison.notes:
        console.print(note, highlight=False, markup=False)
    for line in _failures(comparison):
        console.print(line, highlight=False, markup=False)


def _fits(table: Table, console: Console) -> bool:
    """Whether nothing would be cut."""
    return console.measure(table, options=console.options.update_width(10_000)).maximum <= console.width


def _as_table(cells: Sequence[dict[str, str]], names: Sequence[str], *, folded: bool) -> Table:
    """Folded: headings broken between words, spreads below their means."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in names:
        heading = name.replace("− ", "−\N{NO-BREAK SPACE}").replace(" ", "\n") if folded else name
        table.add_column(heading, justify="left" if name == "entry" else "right", no_wrap=True)
    for row in cells:
        table.add_row(*(row[name].replace(" ±", "\n±") if folded else row[name] for name in names))
    return table


def _failures(comparison: Comparison) -> list[str]:
    lines = []
    for entry, seeds in comparison.states.items():
        for seed, (state, message) in seeds.items():
            if state != "finished":
                lines.append(f"- {entry}, seed {seed}: {state}{f': {message}' if message else ''}")
    return ["", "Not finished:", "", *lines] if lines else []


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _rule(columns: int) -> str:
    return "|---|" + "---:|" * (columns - 1)


def _loss(value: Spread | None, *, signed: bool = False) -> str:
    if value is None:
        return "–"
    mean = f"{value.mean:{'+' if signed else ''}.4f}".replace("-", "−")
    return mean if value.deviation is None else f"{mean} ± {value.deviation:.4f}"


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _share(value: Spread | None, *, signed: bool = False) -> str:
    if value is None:
        return "–"
    mean = f"{100 * value.mean:{'+' if signed else ''}.1f}".replace("-", "−")
    return f"{mean}%" if value.deviation is None else f"{mean}% ± {100 * value.deviation:.1f}"


def _count(value: Spread | None) -> str:
    if value is None:
        return "–"
    return f"{value.mean:,.0f}" if value.mean >= 100 or value.mean == round(value.mean) else f"{value.mean:.1f}"
