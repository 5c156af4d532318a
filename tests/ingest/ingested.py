"""What the tests of ingest share: writing sources, reading results back by Streaming, and the plain loop that they are compared with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from streaming import MDSWriter, StreamingDataset

from udsstream.ingest.run import IngestConfig, IngestResult, RejectLimit, ingest
from udsstream.ingest.schema import ColumnMap

ANY = RejectLimit(rows=None, share=None)


def run(
    source: str | Path | Sequence[Any], out: Path, *, workers: int = 1, rejects: RejectLimit | None = None, **more: Any
) -> IngestResult:
    """Ingests with small shards; `columns`' fields may be given by name."""
    mapped = {name: more.pop(name) for name in [*more] if name in ColumnMap.__dataclass_fields__}
    given = tuple(map(str, source)) if isinstance(source, (list, tuple)) else (str(source),)
    settings = {"size_limit": 20_000} | more
    config = IngestConfig(source=given, out=out, columns=ColumnMap(**mapped), **settings)
    return ingest(config, workers=workers, max_rejects=rejects)


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Every row, read by Streaming, in order, its shards' hashes checked."""
    if not list(folder.glob("shard*")):
        return []
    data = StreamingDataset(local=str(folder), shuffle=False, batch_size=1, validate_hash="xxh64")
    return [data[i] for i in range(len(data))]


def rejects_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "rejects.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def plain_loop(rows: Iterable[dict[str, Any]], columns: dict[str, str], out: Path, **settings: Any) -> dict[str, bytes]:
    """The bytes that Streaming's own writer makes of the rows."""
    settings = {"hashes": ["sha1", "xxh64"], "size_limit": 20_000} | settings
    with MDSWriter(columns=columns, out=str(out), **settings) as writer:
        for row in rows:
            writer.write(row)
    return content(out)


def shards(found: dict[str, bytes]) -> dict[str, bytes]:
    """Without what MDSWriter does not write."""
    return {name: data for name, data in found.items() if Path(name).name not in ("ingest.json", "rejects.jsonl")}
