"""Folders made to harm: an exception of ours within a second and in bounded memory, never a crash, a hang or foreign code."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import recorded

from udsstream.errors import LogError
from udsstream.selection_log import layout
from udsstream.selection_log.encoding import schema_message
from udsstream.selection_log.manifest import SegmentLine, canonical_json, checked_json, decode_line, encode_line
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.schema import DECISION_SCHEMA, SELECTION
from udsstream.selection_log.writer import SelectionLogWriter

MEMORY = 400 << 20  # what one look may take beyond what the process has
SECONDS = 1.0


def make(root: Path) -> Path:
    """Two sealed segments, a live file and a checkpoint with its vectors."""
    writer = recorded.create(root, embeddings="tail")
    recorded.record(writer, 0, 2)
    writer.seal()
    recorded.record(writer, 2, 4)
    writer.seal()
    recorded.checkpoint(writer, 4)
    recorded.record(writer, 4, 6)
    writer.release()
    return root


@contextmanager
def bounded() -> Iterator[None]:
    """Limit the address space, and the time."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    begun = time.process_time()  # a look that waits for ever is pytest's to end
    try:
        yield
        assert time.process_time() - begun < SECONDS
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def look_everywhere(root: Path) -> list[str]:
    """Use the log in every way; the messages of our own errors. Any other exception passes through and fails the test."""
    said = []
    looks: list[Callable[[SelectionLog], Any]] = [
        lambda log: log.table(),
        lambda log: log.dataset(all_attempts=True).to_table(),
        lambda log: log.pushes(),
        lambda log: log.selected(1),
        lambda log: log.buffer_at(4),
        lambda log: log.verify(),
    ]
    for look in looks:
        with bounded():
            try:
                look(SelectionLog.open(root))
            except LogError as error:
                said.append(str(error))
    with bounded():
        try:
            SelectionLogWriter.resume(root, step=4, head=bytes(32)).close()
        except LogError as error:
            said.append(str(error))
    return said


def segment(root: Path) -> Path:
    return layout.segment_path(root, SELECTION, 0, 0, 0)


def wal(root: Path) -> Path:
    return layout.wal_path(root, SELECTION, 0, 2)


def repair_manifest(root: Path, **changes: Any) -> None:
    """Make the first segment's line speak of the file as it now is (a forger can), with these changes."""
    path = layout.manifest_path(root, SELECTION, 0)
    lines = [decode_line(line) for line in path.read_bytes().splitlines()]
    data = segment(root).read_bytes() if segment(root).stat().st_size < 1 << 28 else b""
    assert isinstance(lines[1], SegmentLine)
    fields = {**vars(lines[1]), "bytes": segment(root).stat().st_size, "sha256": hashlib.sha256(data).hexdigest()}
    lines[1] = SegmentLine(**{**fields, **changes})
    path.write_bytes(b"".join(map(encode_line, lines)))


def patch(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def sparse(path: Path, size: int) -> None:
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(size)


def run_json(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((root / "run.json").read_text())
    changed = change(value)
    (root / "run.json").write_text(json.dumps(value if changed is None else changed))


def set_log(**fields: Any) -> Callable[[Path], None]:
    return lambda root: run_json(root, lambda value: value["log"].update(fields))


def replace_segment(root: Path, table: pa.Table, compression: Any = None, **changes: Any) -> None:
    """Put another Arrow file in the place of the first segment, with the metadata that belongs there."""
    metadata = pa.ipc.open_file(pa.py_buffer(segment(root).read_bytes())).schema.metadata
    schema = table.schema.with_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table.cast(schema))
    segment(root).write_bytes(sink.getvalue().to_pybytes())
    repair_manifest(root, rows=table.num_rows, batches=1, **changes)


def zeros(rows: int) -> pa.Table:
    columns = []
    for field in DECISION_SCHEMA:
        kind = np.bool_ if pa.types.is_boolean(field.type) else field.type.to_pandas_dtype()
        columns.append(pa.array(np.zeros(rows, kind), field.type))
    return pa.Table.from_arrays(columns, schema=DECISION_SCHEMA)


def bomb(root: Path) -> None:
    """A small file that unpacks to 720 MB."""
    replace_segment(root, zeros(10_000_000), pa.Codec("zstd", 19))
    assert segment(root).stat().st_size < 200_000


def lying_length(root: Path) -> None:
    """The compressed buffers say that they unpack to a terabyte each."""
    replace_segment(root, zeros(2000), "zstd")
    data = bytearray(segment(root).read_bytes())
    magic = b"\x28\xb5\x2f\xfd"  # zstd's mark stands right behind a buffer's length
    at, found = data.find(magic), 0
    while at >= 0:
        data[at - 8 : at] = struct.pack("<q", 1 << 40)
        at, found = data.find(magic, at + 1), found + 1
    assert found > 10
    segment(root).write_bytes(bytes(data))
    repair_manifest(root, rows=2000, batches=1)


def other_footer(root: Path) -> None:
    """The footer's blocks point elsewhere than the batches that were checked."""
    data = segment(root).read_bytes()
    end = len(data) - 10
    start = end - struct.unpack("<i", data[end : end + 4])[0]
    schema_end = 8 + len(schema_message(pa.ipc.open_file(pa.py_buffer(data)).schema))
    offset = struct.pack("<q", schema_end)
    assert data[start:end].count(offset) == 1
    at = start + data[start:end].index(offset)
    patch(segment(root), at, struct.pack("<q", schema_end + 8))
    repair_manifest(root)


def fifo(path_of: Callable[[Path], Path]) -> Callable[[Path], None]:
    def make_fifo(root: Path) -> None:
        path_of(root).unlink()
        os.mkfifo(path_of(root))

    return make_fifo


def loop(root: Path) -> None:
    (root / "run.json").unlink()
    (root / "run.json").symlink_to("run.json")


def directory(root: Path) -> None:
    (root / "run.json").unlink()
    (root / "run.json").mkdir()


def heads(**fields: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = layout.heads_path(root, 4)
        value = {**json.loads(path.read_text()), **fields}
        del value["check"]
        path.write_bytes(checked_json(value) + b"\n")

    return change


def manifest_bytes(data: bytes) -> Callable[[Path], None]:
    return lambda root: (layout.manifest_path(root, SELECTION, 0).write_bytes(data), None)[1]


DEEP = b"[" * 200_000 + b"]" * 200_000

HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "run.json: a list": (lambda r: run_json(r, lambda v: [v]), "no object under 'log'"),
    "run.json: log a string": (lambda r: run_json(r, lambda v: v.update(log="x")), "no object under 'log'"),
    "run.json: nested": (lambda r: (r / "run.json").write_bytes(DEEP), "is not JSON|no object under"),
    "run.json: huge number": (lambda r: (r / "run.json").write_bytes(b"9" * 100_000), "is not JSON|no object"),
    "run.json: NaN": (lambda r: (r / "run.json").write_bytes(b'{"log": NaN}'), "is not JSON"),
    "run.json: binary": (lambda r: (r / "run.json").write_bytes(bytes(range(256))), "is not JSON"),
    "run.json: empty": (lambda r: (r / "run.json").write_bytes(b""), "is not JSON"),
    "run.json: a terabyte": (lambda r: sparse(r / "run.json", 1 << 40), "at most .* are expected"),
    "run.json: a pipe": (fifo(lambda r: r / "run.json"), "not a regular file"),
    "run.json: a loop": (loop, "cannot read .*run.json"),
    "run.json: a folder": (directory, "not a regular file"),
    "run.json: newer": (set_log(schema_version=3), "schema version 3, this udsstream reads up to 2. Upgrade"),
    "run.json: version a string": (set_log(schema_version="1"), "log.schema_version is '1'"),
    "run.json: version true": (set_log(schema_version=True), "log.schema_version is True"),
    "run.json: another rule": (set_log(digest_rule="none"), "log.digest_rule"),
    "run.json: mode a list": (set_log(embeddings=["full"]), r"log.embeddings=\['full'\]"),
    "run.json: dim negative": (set_log(embedding_dim=-1), "log.embedding_dim=-1"),
    "run.json: dim huge": (set_log(embedding_dim=1 << 62), "log.embedding_dim"),
    "run.json: dim a string": (set_log(embedding_dim="4"), "log.embedding_dim='4'"),
    "run.json: dtype object": (set_log(embedding_dtype="object"), "log.embedding_dtype='object'"),
    "run.json: ranks huge": (set_log(world_size=1 << 40), "log.world_size"),
    "segment: wrong magic": (lambda r: patch(segment(r), 0, b"PARROT"), "begin and end with Arrow's mark"),
    "segment: wrong end": (lambda r: patch(segment(r), segment(r).stat().st_size - 3, b"W00"), "Arrow's mark"),
    "segment: a Python pickle": (
        lambda r: (
            segment(r).write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/udsstream-pwned'\ntR."),
            repair_manifest(r),
        ),
        "Arrow's mark",
    ),
    "segment: footer huge": (
        lambda r: (patch(segment(r), segment(r).stat().st_size - 10, b"\xff\xff\xff\x7f"), repair_manifest(r)),
        "the footer claims 2147483647 bytes",
    ),
    "segment: other footer": (other_footer, "footer does not list"),
    "segment: header huge": (
        lambda r: (patch(segment(r), 12, b"\xf8\xff\xff\x7f"), repair_manifest(r)),
        "a message's header claims 2147483640 bytes",
    ),
    "segment: header negative": (
        lambda r: (patch(segment(r), 12, b"\xf8\xff\xff\xff"), repair_manifest(r)),
        "a message's header claims -8 bytes",
    ),
    "segment: a terabyte": (
        lambda r: (sparse(segment(r), 1 << 40), repair_manifest(r)),
        "Arrow's mark|cannot map",
    ),
    "segment: wrong schema": (
        lambda r: replace_segment(r, zeros(10).rename_columns([f"c{i}" for i in range(17)])),
        "the file says that it is|columns|schema",
    ),
    "segment: text columns": (
        lambda r: replace_segment(r, pa.table({"step": ["a" * 100]})),
        "the file says that it is|schema",
    ),
    "segment: bomb": (bomb, "would unpack to"),
    "segment: lying length": (lying_length, "a buffer's length does not fit"),
    "segment: a pipe": (fifo(segment), "not a regular file"),
    "segment: too many rows": (lambda r: repair_manifest(r, rows=1 << 50), "the file has 10 rows, expected"),
    "manifest: path traversal": (
        lambda r: repair_manifest(r, file="../../../../etc/passwd"),
        "names the file '../../../../etc/passwd', expected",
    ),
    "manifest: absolute path": (lambda r: repair_manifest(r, file="/etc/passwd"), "names the file '/etc/passwd'"),
    "manifest: a terabyte": (lambda r: sparse(layout.manifest_path(r, SELECTION, 0), 1 << 40), "at most"),
    "manifest: nested": (manifest_bytes(DEEP + b"\n" + b"x\n"), "manifest.jsonl, line 1"),
    "manifest: binary": (manifest_bytes(bytes(range(256)) * 9 + b"x"), "manifest.jsonl, line 1"),
    "manifest: wrong types": (
        manifest_bytes(checked_json({"kind": "segment", "rows": "many"}) + b"\n" + b"x\n"),
        "a line of kind segment with the fields",
    ),
    "manifest: unknown kind": (manifest_bytes(checked_json({"kind": ["x"]}) + b"\nx\n"), "unknown kind"),
    "manifest: attempt huge": (
        manifest_bytes(
            checked_json(
                {"kind": "attempt", "attempt": 1 << 40, "from_step": 0, "parent": None, "writer": "", "head": "0" * 64}
            )
            + b"\n"
            + b"x\n"
        ),
        "does not follow|line 2",
    ),
    "manifest: parent huge": (
        manifest_bytes(
            checked_json(
                {"kind": "attempt", "attempt": 0, "from_step": 0, "parent": 40000, "writer": "", "head": "0" * 64}
            )
            + b"\n"
        ),
        "attempt 0 continuing 40000 comes after attempt -1",
    ),
    "wal: a terabyte": (lambda r: sparse(wal(r), 1 << 40), "no message begins here|cannot map"),
    "wal: header huge": (lambda r: patch(wal(r), 4, b"\xf8\xff\xff\x7f"), "a message's header claims|not (the|a) torn"),
    "wal: a pipe": (fifo(wal), "not a regular file"),
    "wal: all ones": (lambda r: wal(r).write_bytes(b"\xff" * 8_000_000), "a message's header claims -1"),
    "heads: not a list": (heads(heads=5), "heads|int"),
    "heads: wrong root": (heads(root="00" * 32), "Merkle root does not follow"),
    "heads: rows huge": (heads(buffer_rows=1 << 60), "rows, expected"),
    "heads: pushed a string": (heads(pushed="1"), "the field pushed is '1'"),
    "heads: of a million ranks": (heads(heads=["00" * 32] * 100_000), "Merkle root does not follow"),
    "heads: a terabyte": (lambda r: sparse(layout.heads_path(r, 4), 1 << 40), "at most"),
    "buffer: a terabyte": (lambda r: sparse(layout.buffer_path(r, 4, 0), 1 << 40), "cannot map|not those that"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folder(memory_path: Path, name: str) -> None:
    harm, text = HOSTILE[name]
    root = make(memory_path)
    assert look_everywhere(root) != [], "the resume with a wrong head is refused in any case"
    harm(root)
    said = look_everywhere(root)
    assert any(re.search(text, message) for message in said), said
    assert len(said) >= 2
    assert not Path("/tmp/udsstream-pwned").exists()


def test_random_changes_with_repaired_checks(memory_path: Path) -> None:
    """A thousand random edits of a segment and a live file, each with size and checksum made right again."""
    root = make(memory_path)
    rng = np.random.default_rng(23)
    keep = {path: path.read_bytes() for path in (segment(root), wal(root), layout.manifest_path(root, SELECTION, 0))}
    errors = 0
    for trial in range(1000):
        path = (segment, wal)[trial % 2](root)
        data = bytearray(keep[path])
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(len(data)))
            value = rng.choice([b"\0" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", rng.bytes(8), rng.bytes(1)])
            data[at : at + len(value)] = bytes(value)
        path.write_bytes(bytes(data))
        if path == segment(root):
            repair_manifest(root)
        begun = time.process_time()
        try:
            SelectionLog.open(root).table()
            SelectionLog.open(root).verify()
        except LogError:
            errors += 1
        assert time.process_time() - begun < SECONDS
        for file, content in keep.items():
            file.write_bytes(content)
    assert errors > 800


def test_nothing_in_the_package_can_run_foreign_code() -> None:
    package = Path(layout.__file__).parent
    for path in package.glob("*.py"):
        text = path.read_text()
        for word in ("pickle", "eval(", "exec(", "marshal", "yaml", "allow_pickle", "__import__", "subprocess"):
            assert word not in text, (path, word)


def test_canonical_json_has_one_form() -> None:
    assert canonical_json({"b": 1, "a": "ü"}) == b'{"a":"\\u00fc","b":1}'
