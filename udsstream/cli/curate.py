"""`udsstream curate`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from udsstream.cli.options import is_rank_zero, stream_places
from udsstream.untrusted_text import in_markup

__all__ = ["curate"]

_FORMATS = ("mds", "webdataset", "parquet", "jsonl")
_UNITS = {"": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}


def curate(
    out: Annotated[Path, typer.Option(help="Folder to write; new or empty.")],
    format: Annotated[str, typer.Option(metavar="FORMAT", help="mds, webdataset, parquet or jsonl.")],
    from_log: Annotated[Path | None, typer.Option(metavar="RUN", help="Write what this run's log chose.")] = None,
    all: Annotated[str | None, typer.Option(metavar="STREAM", help="Write a whole MDS stream.")] = None,
    score: Annotated[
        str | None,
        typer.Option(metavar="STREAM", help="Score this MDS stream with --model; write the best."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="With --score: settings, such as window=256.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --score: a Hugging Face name or folder.")] = None,
    keep: Annotated[
        str | None,
        typer.Option(metavar="P|N", help="With --score: part P of each window, or N samples (0.25)."),
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="YAML", help="With --score: a file with the settings.")] = None,
    run: Annotated[Path | None, typer.Option(help="With --score: folder of the record. Default: OUT-run.")] = None,
    times: Annotated[int | None, typer.Option(min=0, metavar="N", help="Chosen at least N times (1).")] = None,
    last_epoch: Annotated[bool, typer.Option("--last-epoch", help="Count the last epoch alone.")] = False,
    until: Annotated[str | None, typer.Option(metavar="baN", help="Count the steps below N alone.")] = None,
    top_quantile: Annotated[
        str | None, typer.Option(metavar="Q", help="The best part Q (as 0.2) of all offered, by mean score.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="STREAM", help="From this stream alone; repeatable.")
    ] = None,
    quota: Annotated[
        list[str] | None, typer.Option(metavar="STREAM=N", help="At most N of a stream, its best; repeatable.")
    ] = None,
    quota_share: Annotated[
        list[str] | None, typer.Option(metavar="STREAM=P", help="At most the part P of the output; repeatable.")
    ] = None,
    stream: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Where a stream is now; repeatable.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep fetched shards here.")] = None,
    verify_shards: Annotated[bool, typer.Option("--verify-shards", help="Check shards against their hashes.")] = False,
    compression: Annotated[
        str | None, typer.Option(metavar="KIND", help="Of shards: none, gzip, zstd; zstd:9 sets a level.")
    ] = None,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Samples in a shard, such as 64MB.")] = "64MB",
    prefix: Annotated[str, typer.Option(help="Of the names of added columns.")] = "uds_",
    no_scores: Annotated[bool, typer.Option("--no-scores", help="Add no columns.")] = False,
    language: Annotated[list[str] | None, typer.Option(metavar="CODE", help="For the data card; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write what a run chose, or what a frozen model chooses (--score), as a data set.

    Example: udsstream curate --from-log runs/a --out curated --format parquet
    """
    scores = score is not None or config is not None
    sources = {"--from-log": from_log is not None, "--all": all is not None, "--score": scores}
    if list(sources.values()).count(True) != 1:
        given = " and ".join(name for name, there in sources.items() if there)
        raise typer.BadParameter(f"give exactly one source, {' or '.join(sources)}{f'; got {given}' if given else ''}")
    choosing = {
        "--times": times is not None,
        "--last-epoch": last_epoch,
        "--until": until is not None,
        "--top-quantile": top_quantile is not None,
        "--only": bool(only),
        "--quota": bool(quota),
        "--quota-share": bool(quota_share),
        "--stream": bool(stream),
        "--no-scores": no_scores,
    }
    if scores:
        del choosing["--no-scores"]
    if from_log is None and (asked := [name for name, there in choosing.items() if there]):
        why = "--score writes what it chose itself" if scores else "--all writes the stream as it is"
        raise typer.BadParameter(f"it goes with --from-log alone: {why}", param_hint=asked[0])
    scoring = {
        "--model": model is not None,
        "--keep": keep is not None,
        "--run": run is not None,
        "KEY=VALUE": bool(overrides),
    }
    if not scores and (asked := [name for name, there in scoring.items() if there]):
        raise typer.BadParameter("it goes with --score or --config alone", param_hint=asked[0])
    if scores and cache is not None:
        raise typer.BadParameter(
            "with --score name the folder in the settings: data.streams.0.local=CACHE", param_hint="--cache"
        )
    if format not in _FORMATS:
        raise typer.BadParameter(f"{format!r} is none of {', '.join(_FORMATS)}", param_hint="--format")
    size = _bytes(shard_size)
    quotas = {name: _whole(text) for name, text in _pairs(quota, "--quota", "animals=1000")}
    shares = {
        name: _fraction(text, "--quota-share") for name, text in _pairs(quota_share, "--quota-share", "animals=0.5")
    }
    quantile = None if top_quantile is None else _fraction(top_quantile, "--top-quantile")
    below = None if until is None else _batches(until)
    places = stream_places(stream)

    from udsstream.curate.chosen import Choice
    from udsstream.curate.write import Output, curate_log, curate_stream

    output = Output(
        format=format,
        compression=compression,
        shard_bytes=size,
        prefix=prefix,
        scores=not no_scores and all is None,
        language=tuple(language or ()),
    )
    if scores:
        _score(score, out, output, model, keep, config, overrides or [], run, verify=verify_shards, as_json=as_json)
        return
    with _progress(show=not as_json) as progress:
        common: dict[str, Any] = {"output": output, "cache": cache, "verify": verify_shards, "progress": progress}
        if from_log is not None:
            choice = Choice(
                times=times,
                last_epoch=last_epoch,
                until=below,
                top_quantile=quantile,
                only=tuple(only or ()),
                quotas=quotas,
                shares=shares,
            )
            result = curate_log(from_log, out, choice=choice, places=places, **common)
        else:
            assert all is not None
            result = curate_stream(all, out, **common)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        _print(result)


def _score(
    stream: str | None,
    out: Path,
    output: Any,
    model: str | None,
    keep: str | None,
    config: Path | None,
    overrides: list[str],
    run: Path | None,
    *,
    verify: bool,
    as_json: bool,
) -> None:
    if keep is not None and not re.fullmatch(r"\d{1,15}|(\d{1,15})?\.\d{1,15}", keep):
        raise typer.BadParameter(
            f"{keep!r} is neither a part such as 0.2 nor a number such as 100", param_hint="--keep"
        )
    count = None if keep is None else float(keep) if "." in keep else int(keep)

    from udsstream.scoring_config import load_scoring_config
    from udsstream.scoring_job import run_folder_of, score_and_curate

    folder = run or run_folder_of(out)
    settings = load_scoring_config(config, overrides, score=stream, model=model, keep=count)
    show = settings.progress_bar and not as_json and is_rank_zero()
    with _scoring_progress(show=show) as scoring, _progress(show=show) as writing:
        result = score_and_curate(
            settings, out, output=output, run=folder, verify=verify, scoring=scoring, writing=writing
        )
    if result is None:
        return
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
        return
    _print(result.curated)
    rate = "" if result.samples_per_second is None else f", {result.samples_per_second:,.1f} samples/s"
    print(f"Kept {result.kept:,} of {result.samples:,} scored samples{rate}. The record: udsstream log {result.run}")


@contextmanager
def _scoring_progress(*, show: bool) -> Any:
    """A callback for the pass, and a bar on stderr: windows, samples/s, tokens/s, and the time that is left at this rate."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TextColumn("samples {task.fields[rates]}"))
    with Progress(*columns, console=Console(stderr=True), disable=not show, transient=True) as bar:
        task = bar.add_task("scoring", total=None, rates="")

        def report(done: Any) -> None:
            left = done.seconds_left
            rates = ""
            if done.seconds_here and left is not None:
                rates = (
                    f"· {done.samples_here / done.seconds_here:,.1f} samples/s · {done.tokens_here / done.seconds_here:,.0f} tokens/s · "
                    f"left {timedelta(seconds=round(left))}"
                )
            bar.update(task, completed=done.samples, total=done.all_samples, rates=rates)

        yield report


def _print(result: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"Written to {in_markup(result.out)}", title_justify="left", show_header=False)
    table.add_row("samples", f"{result.samples:,}" + (f" of {result.offered:,} offered" if result.offered else ""))
    for name, count in list(result.per_stream.items())[:8] if len(result.per_stream) > 1 else ():
        table.add_row(f"  from {in_markup(name)}", f"{count:,}")
    if len(result.per_stream) > 8:
        table.add_row("  from others", f"{len(result.per_stream) - 8:,} more streams")
    table.add_row("shards", f"{result.shards:,} ({result.format}, compression {result.compression})")
    table.add_row("bytes", f"{result.bytes:,}")
    if result.unverified_shards:
        table.add_row("shards without a hash", f"{result.unverified_shards:,}: their content could not be verified")
    console.print(table)
    console.print("Where it comes from: README.md for people, croissant.json for machines.", highlight=False)


@contextmanager
def _progress(*, show: bool) -> Any:
    """A callback for the job, and a bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("writing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples, left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show, transient=True) as bar:
        task = bar.add_task("writing", total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        callback: Callable[[int, int], None] = report
        yield callback


def _pairs(given: Sequence[str] | None, option: str, example: str) -> list[tuple[str, str]]:
    pairs = []
    for text in given or ():
        name, equals, value = text.rpartition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{text!r} is not STREAM=VALUE, such as {example}", param_hint=option)
        if name in dict(pairs):
            raise typer.BadParameter(f"stream {name!r} is given twice", param_hint=option)
        pairs.append((name, value))
    return pairs


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d{1,15}", text):
        raise typer.BadParameter(f"{text!r} is no whole number", param_hint="--quota")
    return int(text)


def _fraction(text: str, option: str) -> Fraction:
    """Exactly what was typed: 0.2 is one fifth."""
    if not re.fullmatch(r"\d{0,15}(\.\d{1,15})?|\d{1,15}/\d{1,15}", text) or not text or text.endswith("/0"):
        raise typer.BadParameter(f"{text!r} is no part, such as 0.2 or 1/3", param_hint=option)
    value = Fraction(text)
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{text} is not more than 0 and at most 1", param_hint=option)
    return value


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,12})\s*([kmg]b)?", text.lower())
    value = int(match[1]) * _UNITS[match[2] or ""] if match else 0
    if not 0 < value < 1 << 32:
        raise typer.BadParameter(f"{text!r} is no size up to 4 GB, such as 64MB", param_hint="--shard-size")
    return value


def _batches(text: str) -> int:
    match = re.fullmatch(r"ba(\d{1,18})", text)
    if match is None or int(match[1]) < 1:
        raise typer.BadParameter(f"{text!r} is not baN, such as ba120 for ep0-ba120-rank0.pt", param_hint="--until")
    return int(match[1])
