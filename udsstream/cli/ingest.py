"""`udsstream ingest`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from udsstream.untrusted_text import clean_line

__all__ = ["ingest"]


def ingest(
    source: Annotated[
        list[str], typer.Argument(metavar="SRC...", help="Files, globs, a folder, or hf:NAME[:CONFIG[:SPLIT]].")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the result; new or empty.")],
    kind: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="jsonl, parquet, csv, webdataset, hf or text; else by the ending."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="COLUMN", help="Becomes 'prompt'.")] = None,
    response: Annotated[str | None, typer.Option(metavar="COLUMN", help="Becomes 'response'.")] = None,
    messages: Annotated[str | None, typer.Option(metavar="COLUMN", help="Becomes 'messages'.")] = None,
    text: Annotated[str | None, typer.Option(metavar="COLUMN", help="Becomes 'text'.")] = None,
    only_mapped: Annotated[bool, typer.Option("--only-mapped", help="Leave out columns that no option names.")] = False,
    drop: Annotated[list[str] | None, typer.Option(metavar="COLUMN", help="Leave this one out (repeatable).")] = None,
    column: Annotated[
        list[str] | None, typer.Option(metavar="NAME=ENC", help="Store a column as str, json, int, … (repeatable).")
    ] = None,
    stream_by: Annotated[str | None, typer.Option(metavar="COLUMN", help="A folder for each value of it.")] = None,
    compression: Annotated[str | None, typer.Option(metavar="NAME", help="Such as zstd:3.")] = None,
    hash_: Annotated[list[str] | None, typer.Option("--hash", metavar="NAME", help="Default: sha1 and xxh64.")] = None,
    size_limit: Annotated[str, typer.Option(metavar="BYTES", help="Of a shard, raw.")] = "64mb",
    max_row_size: Annotated[str, typer.Option(metavar="BYTES", help="Larger rows are rejected.")] = "64mb",
    max_rejects: Annotated[
        str | None, typer.Option(metavar="N|P%", help="Stop beyond; default: 100 rows or 1%.")
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", help="Processes.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Write any data set as MDS shards; bad rows are put aside.

    The same command goes on after a kill.

    Example: udsstream ingest train.jsonl.gz --out data/train --prompt question --response answer
    """
    encodings = {}
    for given in column or ():
        name, equals, encoding = given.rpartition("=")
        if not (name and equals and encoding):
            raise typer.BadParameter(f"{given!r} is not NAME=ENCODING, such as meta=json", param_hint="--column")
        encodings[name] = encoding

    from udsstream.ingest.run import IngestConfig, RejectLimit
    from udsstream.ingest.run import ingest as run
    from udsstream.ingest.schema import ColumnMap

    columns = ColumnMap(
        prompt=prompt, response=response, messages=messages, text=text,
        only_mapped=only_mapped, drop=tuple(drop or ()), encodings=encodings,
    )  # fmt: skip
    settings: dict[str, Any] = {"hashes": tuple(hash_)} if hash_ else {}
    config = IngestConfig(
        source=tuple(source), out=out, kind=kind, columns=columns, stream_by=stream_by,  # type: ignore[arg-type]
        compression=compression, size_limit=size_limit, max_row_size=max_row_size, **settings,
    )  # fmt: skip
    limit = None if max_rejects is None else RejectLimit.parse(max_rejects)
    with _Bar() as bar:
        result = run(config, workers=workers, max_rejects=limit, on_progress=bar.show)
    print(json.dumps(result.manifest, indent=2) if as_json else _summary(result))


class _Bar:
    """Rows/s, MB/s and the time left, on standard error where that is a terminal."""

    def __enter__(self) -> _Bar:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        shown = Console(stderr=True)
        self._progress = Progress(
            TextColumn("ingest"), BarColumn(), TextColumn("{task.fields[rates]}"), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), console=shown, transient=True, disable=not shown.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=None, rates="")
        self._first: tuple[float, Any] | None = None
        self._shown = False
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown:
            self._progress.stop()

    def show(self, progress: Any) -> None:
        import time

        now = time.monotonic()
        if self._first is None:
            self._first = (now, progress)
            self._shown = not self._progress.disable
            if self._shown:
                self._progress.start()  # not earlier: it has a thread, and workers are forked first
        begun, first = self._first
        seconds = max(now - begun, 1e-9)
        rates = f"{progress.rows:,} rows"
        if progress.rows > first.rows:
            rates += f" {(progress.rows - first.rows) / seconds:,.0f} rows/s {(progress.bytes - first.bytes) / seconds / 1e6:.1f} MB/s"
        if progress.rejected:
            rates += f" {progress.rejected:,} rejected"
        self._progress.update(self._task, completed=progress.bytes, total=progress.total_bytes or None, rates=rates)


def _summary(result: Any) -> str:
    manifest = result.manifest
    rows, streams = manifest["rows"], manifest["streams"]
    shards = sum(stream["shards"] for stream in streams)
    lines = [
        f"{rows['read']:,} rows read = {rows['written']:,} written + {rows['rejected']:,} rejected"
        + (f" ({rows['blank_lines']:,} blank lines)" if rows["blank_lines"] else ""),
        f"{shards:,} shard{'s' if shards != 1 else ''} in {result.out}"
        + (f", {len(streams):,} stream{'s' if len(streams) != 1 else ''}" if "folder" in streams[0] else ""),
        "columns: " + ", ".join(f"{column['name']} ({column['encoding']})" for column in manifest["columns"]),
    ]
    readable = {"prompt", "messages", "text"}  # by these names `udsstream train` knows them by itself
    if not readable & {column["name"] for column in manifest["columns"]}:
        lines.append(
            "to train on it, name its columns: --prompt and --response here, or data.prompt_key and data.response_key there"
        )
    if rows["rejected"]:
        lines.append(f"why rows were rejected: {result.out / 'rejects.jsonl'}")
    if sys.stderr.isatty() and result.resumed:
        lines.append("went on with an ingest that had been interrupted")
    return "\n".join(map(clean_line, lines))
