"""Small runs over real MDS streams of text: the log's places are those of the samples, and its choices the two best of each step."""

from __future__ import annotations

import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter

from udsstream.selection_log.writer import SelectionLogWriter

ALPHA = 0.5
INLINE = {"a", "b", "bdi", "code", "i", "span", "strong", "wbr"}
VOID = {"meta", "br", "img", "link", "hr", "input", "wbr"}


def write_stream(folder: Path, rows: list[dict[str, Any]], columns: dict[str, str] | None = None) -> Path:
    """A stream of some rows in several small shards."""
    columns = columns or dict.fromkeys(rows[0], "str")
    with MDSWriter(out=str(folder), columns=columns, size_limit=2048) as writer:
        for row in rows:
            writer.write(row)
    return folder


def pairs(name: str, count: int) -> list[dict[str, Any]]:
    """Prompts and responses that name their stream and number, 3 to 40 words long."""
    return [
        {"prompt": f"{name} asks {i}", "response": f"{name} says {i}." + " word" * (i * 7 % 38)} for i in range(count)
    ]


def describe(streams: dict[str, Path], **changes: Any) -> dict[str, Any]:
    """What run.json says of a run over these streams."""
    described = [
        {
            "name": name,
            "location": str(folder),
            "samples": sum(shard["samples"] for shard in shards(folder)),
            "per_epoch": sum(shard["samples"] for shard in shards(folder)),
            "index_sha256": hashlib.sha256((folder / "index.json").read_bytes()).hexdigest(),
            "licence": "unknown",
            "date": "unknown",
        }
        for name, folder in streams.items()
    ]
    run = {
        "run_id": "3f6c0a9b7d2e",
        "created": "2026-11-24T03:00:00+00:00",
        "model": {"name": "tiny", "class": "HuggingFaceModel"},
        "selection": {"method": "uds", "keep": 0.25},
        "resolved_alpha": ALPHA,
        "streams": described,
    }
    return run | changes


def shards(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "index.json").read_text())["shards"]


def write_run(
    root: Path, streams: dict[str, Path], *, steps: int = 12, rows: int = 8, **changes: Any
) -> list[dict[str, Any]]:
    """A closed log of a run over these streams; its rows, as plain values. Also `timings.jsonl`, but for the last step."""
    places = [
        (number, shard, index)
        for number, folder in enumerate(streams.values())
        for shard, entry in enumerate(shards(folder))
        for index in range(entry["samples"])
    ]
    writer = SelectionLogWriter.create(
        root, run=describe(streams, **changes), embeddings="tail", embedding_dim=4, buffer_capacity=6
    )
    logged: list[dict[str, Any]] = []
    for step in range(steps):
        rng = np.random.default_rng([7, step])
        ids = rng.choice(len(places), rows, replace=False).astype(np.int64)
        stream, shard, index = (np.array(column) for column in zip(*(places[i] for i in ids), strict=True))
        tokens = (10 + ids * 13 % 90).astype(np.int32)
        intra = (tokens + 20 * rng.random(rows)).astype(np.float32)
        inter = (rng.random(rows) * 30 * (step > 0)).astype(np.float32)
        score = (intra.astype(np.float64) + ALPHA * inter.astype(np.float64)).astype(np.float32)
        selected = np.zeros(rows, bool)
        selected[sorted(range(rows), key=lambda row: (-score[row], row))[:2]] = True
        columns = {
            "epoch": np.full(rows, step // 6, np.int32),
            "position": np.arange(rows, dtype=np.int32),
            "epoch_position": np.arange(rows, dtype=np.int64) + step % 6 * rows,
            "sample_id": ids,
            "stream": stream.astype(np.int16),
            "shard": shard.astype(np.int32),
            "shard_index": index.astype(np.int32),
            "tokens": tokens,
            "intra": intra,
            "inter": inter,
            "score": score,
            "selected": selected,
            "train_order": np.ma.MaskedArray((np.cumsum(selected) - 1).astype(np.int32), mask=~selected),
        }
        writer.append(step, columns)
        writer.push(
            step,
            positions=columns["position"][selected],
            sample_ids=ids[selected],
            push_index=2 * step,
            embeddings=rng.standard_normal((2, 4)).astype(np.float32),
            digest=bytes(32),
        )
        names = (
            "epoch",
            "position",
            "sample_id",
            "stream",
            "shard",
            "shard_index",
            "tokens",
            "intra",
            "inter",
            "score",
            "selected",
        )
        logged += [{"step": step} | {name: columns[name][i].item() for name in names} for i in range(rows)]
    writer.close()
    times = [
        {"step": step, "step_seconds": 2.0 + step, "selection_seconds": 0.5 + step / 4, "log_seconds": 0.001}
        for step in range(steps - 1)
    ]
    (root / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))
    return logged


class Page(HTMLParser):
    """A page taken apart: its elements with their attributes, the text within them, and whether all are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.mistakes: list[str] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        if self._open:
            self.mistakes.append(f"never closed: {self._open}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._separate(tag)
        if len(dict(attrs)) != len(attrs):
            self.mistakes.append(f"an attribute twice in {tag}: {attrs}")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self._separate(tag)
        if not self._open or self._open[-1] != tag:
            self.mistakes.append(f"</{tag}> at line {self.getpos()[0]}, open are {self._open}")
        else:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self._open), data))

    def _separate(self, tag: str) -> None:
        if tag not in INLINE:
            self.texts.append((("",), " "))

    def inside(self, tag: str) -> list[str]:
        """What stands directly in elements of this kind."""
        return [text.strip() for path, text in self.texts if path[-1:] == (tag,) and text.strip()]

    @property
    def text(self) -> str:
        """All that is read, without the style sheet; white space as one space."""
        return " ".join("".join(text for path, text in self.texts if "style" not in path).split())
