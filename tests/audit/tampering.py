"""Ways to tamper with a log, each with what an audit must say of it. `test_tampering.py` does them all; docs/auditing.md lists them.

Three kinds: files changed by somebody who knows nothing of the chain (or repairs what he knows of); a log written anew, consistently,
by somebody who can rewrite the whole folder (`NumpyRun` with a forgery in it: every digest follows from the forged rows); and such a
rewriting that agrees with itself in everything that can be recomputed, which only an anchor tells from an honest run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy_run import VOCABULARY, NumpyRun, candidates, choose, finished, place_of, rechoose, rescore, selection

from udsstream.selection_log import layout
from udsstream.selection_log.checkpoints import buffer_codec, read_heads, write_buffer
from udsstream.selection_log.digest import merkle_root
from udsstream.selection_log.manifest import SegmentLine, checked_json, decode_line, encode_line, parse_checked_json
from udsstream.selection_log.schema import PUSHES, SELECTION


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tampering:
    """One way, and what an audit must find."""

    name: str
    make: Callable[[Path], Any]
    """Writes a tampered log into a folder that does not exist yet."""
    check: str | None
    """The check that must find it; None: only an anchor does."""
    step: int | None = None
    rank: int | None = None
    sample_id: int | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the honest run, whose root before step 20 is the anchor."""


# -- the files ----------------------------------------------------------------------------------------------------------


def flip(path: Path, share: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 1
    path.write_bytes(bytes(data))


def segment(root: Path, number: int, table: str = SELECTION, attempt: int = 0) -> Path:
    return layout.segment_path(root, table, 0, attempt, number)


def reseal(root: Path, number: int, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes a segment's rows and repairs its file, its checksum and its manifest line, but not the chain."""
    path = segment(root, number)
    reader = pa.ipc.open_file(pa.py_buffer(path.read_bytes()))
    metadata = reader.get_batch_with_custom_metadata(0).custom_metadata
    table = change(reader.read_all()).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, reader.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for batch in table.to_batches():
            writer.write_batch(batch, custom_metadata=metadata)
    data = sink.getvalue().to_pybytes()
    path.write_bytes(data)

    def repaired(line: Any) -> Any:
        if not isinstance(line, SegmentLine) or line.segment != number:
            return line
        fresh = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": table.num_rows}
        return dataclasses.replace(line, **fresh)

    edit_manifest(root, lambda lines: [repaired(line) for line in lines])


def edit_manifest(root: Path, change: Callable[[list[Any]], list[Any]], table: str = SELECTION) -> None:
    path = layout.manifest_path(root, table, 0)
    lines = change([decode_line(line) for line in path.read_bytes().splitlines()])
    path.write_bytes(b"".join(map(encode_line, lines)))


def set_value(table: pa.Table, name: str, row: int, value: object) -> pa.Table:
    values = table.column(name).to_pylist()
    values[row] = value
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


def edit_heads(folder: Path, step: int, **changes: Any) -> None:
    """Changes a heads file and repairs its own check."""
    path = layout.heads_path(folder, step)
    value = parse_checked_json(path.read_bytes()[:-1]) | changes
    path.write_bytes(checked_json(value) + b"\n")


def forge_head(root: Path) -> None:
    head = hashlib.sha256(b"forged").digest()
    edit_heads(root, 12, heads=[head.hex()], root=merkle_root([head]).hex())


def replace_buffer(root: Path) -> None:
    """Puts other vectors for those that were in the memory, and the digest of their file into the heads."""
    heads = read_heads(layout.heads_path(root, 12))
    config = selection(embeddings="tail")
    rows = np.full((heads.buffer_rows or 0, config.embedding_dim), 2.5, np.float32)
    codec = buffer_codec(config.embedding_dim, "float32")
    digest = write_buffer(root, codec, step=12, attempt=0, buffer=rows, pushed=heads.pushed)
    edit_heads(root, 12, buffer_sha256=digest)


def cut_end(root: Path, *, heads_too: bool) -> None:
    """Removes the last segment of both tables and every trace of it: a shorter log that agrees with itself."""
    for table in (SELECTION, PUSHES):
        edit_manifest(root, lambda lines: lines[:-2], table)
        segment(root, 2, table).unlink()
    if heads_too:
        layout.heads_path(root, 20).unlink()


def swap_rank_folders(root: Path) -> None:
    for folder in ("selection", "pushes", "_state"):
        a, b = root / folder / "r00000", root / folder / "r00001"
        spare = root / folder / "spare"
        a.rename(spare), b.rename(a), spare.rename(b)


def edited_run_json(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / "run.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def filed(change: Callable[[Path], Any], **settings: Any) -> Callable[[Path], Any]:
    """An honest log, then a change to its files."""

    def make(root: Path) -> None:
        finished(root, **settings)
        change(root)

    return make


def live(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A run that was killed, with everything still in write-ahead files; then a change."""

    def make(root: Path) -> None:
        NumpyRun(root=root).begin().steps(0, 6).checkpoint(6).steps(6, 20).checkpoint(20).steps(20, 25).release()
        change(root)

    return make


def change_in_wal(root: Path) -> None:
    """One byte of a sample id in the middle of a write-ahead file."""
    path = layout.wal_path(root, SELECTION, 0, 0)
    data = path.read_bytes()
    ids = candidates(7)[2].astype("<i8").tobytes()
    assert data.count(ids) == 1
    path.write_bytes(data.replace(ids, bytes(8) + ids[8:]))


# -- the whole, written anew --------------------------------------------------------------------------------------------

STEP = 7
"""Where most forgeries are made: epoch 0, between the checkpoints at 6 and 12."""


def rewritten(forge: Callable[..., Any] | None = None, **settings: Any) -> Callable[[Path], Any]:
    """A log of a run whose step STEP was forged by `forge(columns, kept)` before the chain was taken."""

    def at_step(step: int, columns: dict[str, Any], kept: np.ndarray) -> Any:
        return forge(columns, kept) if step == STEP and forge is not None else None

    return lambda root: finished(root, forge=at_step, **settings)


def put(name: str, row: int, value: Any) -> Callable[[dict[str, Any], np.ndarray], None]:
    def forge(columns: dict[str, Any], kept: np.ndarray) -> None:
        columns[name] = columns[name].copy()
        columns[name][row] = value

    return forge


def first_rejected(columns: dict[str, Any]) -> int:
    return int(np.flatnonzero(~columns["selected"])[0])


def edit_score(columns: dict[str, Any], kept: np.ndarray) -> None:
    row = int(kept[0])
    columns["score"][row] = np.nextafter(columns["score"][row], np.float32(np.inf))


def exchange_choice(columns: dict[str, Any], kept: np.ndarray, *, pushes_too: bool) -> np.ndarray | None:
    other = np.sort(np.append(kept[1:], first_rejected(columns)))
    choose(columns, other)
    return other if pushes_too else None


def one_more(columns: dict[str, Any], kept: np.ndarray) -> np.ndarray:
    return choose(columns, np.sort(np.append(kept, first_rejected(columns))))


def larger_intra(columns: dict[str, Any], kept: np.ndarray) -> np.ndarray:
    """A rejected sample is given a value that makes it the best, and everything else follows from that."""
    columns["intra"][first_rejected(columns)] += 50
    rescore(columns, selection())
    return rechoose(columns, selection())


def larger_inter(columns: dict[str, Any], kept: np.ndarray) -> np.ndarray:
    """A kept sample's distance is changed so little that the choice stays, and its score follows."""
    columns["inter"][int(kept[0])] *= np.float32(1.0001)
    rescore(columns, selection())
    return rechoose(columns, selection())


def exchange_rows(name: str) -> Callable[[dict[str, Any], np.ndarray], None]:
    def forge(columns: dict[str, Any], kept: np.ndarray) -> None:
        columns[name] = columns[name].copy()
        columns[name][[0, 1]] = columns[name][[1, 0]]

    return forge


def reverse_training(columns: dict[str, Any], kept: np.ndarray) -> None:
    columns["train_order"][kept] = np.arange(len(kept))[::-1]


def other_sample(sample: int) -> Callable[[dict[str, Any], np.ndarray], None]:
    """Every candidate of the step becomes the same other sample, place and all."""

    def forge(columns: dict[str, Any], kept: np.ndarray) -> None:
        columns["sample_id"] = np.full(len(columns["position"]), sample, np.int64)
        columns["stream"], columns["shard"], columns["shard_index"] = place_of(columns["sample_id"])

    return forge


def unscored(columns: dict[str, Any], kept: np.ndarray) -> np.ndarray:
    for name in ("score", "intra", "inter"):
        del columns[name]
    choose(columns, np.arange(len(columns["position"])))
    return np.empty(0, np.int64)


def without_step(root: Path) -> None:
    run = NumpyRun(root=root).begin().steps(0, STEP)
    run.samples += 8
    run.steps(STEP + 1, 20).checkpoint(20).steps(20, 25).close()


def exchanged_steps(root: Path) -> None:
    run = NumpyRun(root=root).begin().steps(0, STEP)
    run.forge = lambda step, columns, kept: columns.update(
        {
            name: values
            for name, values in run.columns(2 * STEP + 1 - step)[0].items()
            if name.startswith(("epoch", "sample", "s"))
        }
        if step in (STEP, STEP + 1)
        else {}
    )
    run.steps(STEP, 25).close()


def doubled_step(root: Path) -> None:
    run = NumpyRun(root=root).begin().steps(0, STEP + 1)
    for writer in run.writers:
        writer._selection.next_step = writer._pushes.next_step = STEP
    run.steps(STEP, 25).close()


def pushing(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], Any]:
    """What is said of the pushes of STEP is changed; the memory itself is not."""
    return lambda root: finished(root, forge_push=lambda step, push: change(push) if step == STEP else None)


def remembering(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], Any]:
    """Other embeddings go into the memory at STEP, and digests and later distances follow."""
    return lambda root: finished(root, forge_rows=lambda step, rows: change(rows) if step == STEP else rows)


def drop_first_push(push: dict[str, Any]) -> None:
    for name in ("positions", "sample_ids", "push_index", "embeddings"):
        push[name] = push[name][1:]


def shift_index(push: dict[str, Any]) -> None:
    push["push_index"] = push["push_index"] + 1


def other_pushed_sample(push: dict[str, Any]) -> None:
    push["sample_ids"] = push["sample_ids"] + 1


def exchange_vectors(push: dict[str, Any]) -> None:
    push["embeddings"] = push["embeddings"][::-1].copy()


def set_digest(push: dict[str, Any]) -> None:
    push["digest"] = hashlib.sha256(b"forged").digest()


def claimed(settings: dict[str, Any], **changes: Any) -> Callable[[Path], Any]:
    """A run.json that claims other selection settings than the run had, with a fingerprint and an α that follow from them."""
    config = selection(**settings)
    follows = {
        "selection": config.as_dict(),
        "selection_fingerprint": config.fingerprint(),
        "resolved_alpha": config.resolved_alpha(VOCABULARY),
    }
    return lambda root: finished(root, changes=follows | changes)


def lucky_draw(columns: dict[str, Any], kept: np.ndarray) -> np.ndarray:
    columns["score"][first_rejected(columns)] = 0.99999
    return rechoose(columns, selection(method="random"))


SAMPLE = int(candidates(STEP)[2][0])

TAMPERINGS = [
    # files
    Tampering(name="a bit of a sealed file", make=filed(lambda r: flip(segment(r, 1))), check="chain", rank=0),
    Tampering(
        name="a bit of the pushes' file",
        make=filed(lambda r: flip(segment(r, 1, PUSHES))),
        check="chain",
        rank=0,
    ),
    Tampering(name="a byte of a write-ahead file", make=live(change_in_wal), check="chain", step=6, rank=0),
    Tampering(
        name="a bit of a manifest",
        make=filed(lambda r: flip(layout.manifest_path(r, SELECTION, 0))),
        check="chain",
        rank=0,
    ),
    Tampering(name="a bit of a heads file", make=filed(lambda r: flip(layout.heads_path(r, 12))), check="heads"),
    Tampering(
        name="a bit of kept vectors",
        make=filed(lambda r: flip(layout.buffer_path(r, 12, 0)), embeddings="tail"),
        check="vectors",
        step=12,
        settings={"embeddings": "tail"},
    ),
    Tampering(
        name="a score, file and checksum repaired",
        make=filed(lambda r: reseal(r, 1, lambda t: set_value(t, "score", 8, 0.5))),
        check="chain",
        step=7,
        rank=0,
    ),
    Tampering(
        name="two rows of a step exchanged, file and checksum repaired",
        make=filed(lambda r: reseal(r, 1, lambda t: t.take([*range(8), 9, 8, *range(10, t.num_rows)]))),
        check="chain",
        step=7,
        rank=0,
    ),
    Tampering(
        name="a row dropped, file and checksum repaired",
        make=filed(lambda r: reseal(r, 1, lambda t: pa.concat_tables([t.slice(0, 8), t.slice(9)]))),
        check="chain",
        step=7,
        rank=0,
    ),
    Tampering(
        name="the first segment dropped", make=filed(lambda r: segment(r, 0).unlink()), check="chain", step=0, rank=0
    ),
    Tampering(
        name="a middle segment dropped", make=filed(lambda r: segment(r, 1).unlink()), check="chain", step=6, rank=0
    ),
    Tampering(
        name="the last segment dropped", make=filed(lambda r: segment(r, 2).unlink()), check="chain", step=12, rank=0
    ),
    Tampering(
        name="a middle segment and its manifest line dropped",
        make=filed(lambda r: (segment(r, 1).unlink(), edit_manifest(r, lambda lines: lines[:2] + lines[3:]))),
        check="chain",
        rank=0,
    ),
    Tampering(
        name="two manifest lines exchanged",
        make=filed(lambda r: edit_manifest(r, lambda lines: [lines[0], lines[2], lines[1], *lines[3:]])),
        check="chain",
        rank=0,
    ),
    Tampering(
        name="two segments exchanged",
        make=filed(lambda r: exchange_files(segment(r, 0), segment(r, 1))),
        check="chain",
        rank=0,
    ),
    Tampering(
        name="the end cut off, the heads file left",
        make=filed(lambda r: cut_end(r, heads_too=False)),
        check="heads",
        step=20,
        rank=0,
    ),
    Tampering(
        name="the end cut off, every trace removed", make=filed(lambda r: cut_end(r, heads_too=True)), check=None
    ),
    Tampering(
        name="a forged head, its root and check repaired", make=filed(forge_head), check="heads", step=12, rank=0
    ),
    Tampering(
        name="a heads file renamed",
        make=filed(lambda r: layout.heads_path(r, 12).rename(layout.heads_path(r, 13))),
        check="heads",
    ),
    Tampering(
        name="the memory's digest in a heads file, its check repaired",
        make=filed(lambda r: edit_heads(r, 12, buffer_digest="00" * 32)),
        check="memory",
        step=12,
    ),
    Tampering(
        name="the number of pushes in a heads file, its check repaired",
        make=filed(lambda r: edit_heads(r, 12, pushed=25)),
        check="memory",
        step=12,
    ),
    Tampering(
        name="kept vectors replaced, heads file repaired",
        make=filed(replace_buffer, embeddings="tail"),
        check="digest",
        step=6,
        settings={"embeddings": "tail"},
    ),
    Tampering(
        name="run.json edited",
        make=filed(lambda r: edited_run_json(r, lambda run: run.update(run_id="another"))),
        check="run.json",
    ),
    Tampering(
        name="run.json edited: keep",
        make=filed(lambda r: edited_run_json(r, lambda run: run["selection"].update(keep=0.5))),
        check="run.json",
    ),
    Tampering(
        name="the folders of two ranks exchanged",
        make=filed(swap_rank_folders, world_size=2),
        check="chain",
        rank=0,
        settings={"world_size": 2},
    ),
    Tampering(
        name="a rank removed",
        make=filed(
            lambda r: [shutil.rmtree(r / folder / "r00001") for folder in ("selection", "pushes", "_state")],
            world_size=2,
        ),
        check="files",
        rank=1,
        settings={"world_size": 2},
    ),
    Tampering(
        name="a stranger's rank added", make=filed(lambda r: (r / "selection" / "r00007").mkdir()), check="files"
    ),
    # written anew
    Tampering(name="a score by one unit in its last place", make=rewritten(edit_score), check="score", step=STEP),
    Tampering(
        name="a score that is no number",
        make=rewritten(put("score", 0, np.nan)),
        check="score",
        step=STEP,
        sample_id=SAMPLE,
    ),
    Tampering(name="a negative value", make=rewritten(put("intra", 0, -1)), check="score", step=STEP, sample_id=SAMPLE),
    Tampering(
        name="the choice of one candidate for another",
        make=rewritten(lambda c, k: exchange_choice(c, k, pushes_too=False)),
        check="top-k",
        step=STEP,
    ),
    Tampering(
        name="the choice of one candidate for another, pushes too",
        make=rewritten(lambda c, k: exchange_choice(c, k, pushes_too=True)),
        check="top-k",
        step=STEP,
    ),
    Tampering(name="one kept too many", make=rewritten(one_more), check="top-k", step=STEP),
    Tampering(
        name="a distance and its score, the choice unchanged", make=rewritten(larger_inter), check="inter", step=STEP
    ),
    Tampering(
        name="the same in a log without the vectors",
        make=rewritten(larger_inter, embeddings="none"),
        check=None,
        settings={"embeddings": "none"},
    ),
    Tampering(
        name="a distance while the memory was empty",
        make=lambda root: finished(
            root,
            forge=lambda step, c, k: (
                (put("inter", 3, 1)(c, k), rescore(c, selection()), rechoose(c, selection()))[2] if step == 0 else None
            ),
        ),
        check="inter",
        step=0,
    ),
    Tampering(name="a value, with score, choice and pushes to match", make=rewritten(larger_intra), check=None),
    Tampering(name="keep in run.json", make=claimed({"keep": 0.5}), check="top-k", step=0),
    Tampering(name="α in run.json", make=claimed({"alpha": 0.5}), check="score"),
    Tampering(
        name="the resolved α alone", make=lambda r: finished(r, changes={"resolved_alpha": 0.5}), check="settings"
    ),
    Tampering(
        name="the fingerprint",
        make=lambda r: finished(r, changes={"selection_fingerprint": "00" * 32}),
        check="settings",
    ),
    Tampering(name="the size of the memory", make=claimed({"buffer_size": 12}), check="settings"),
    Tampering(name="start in run.json", make=claimed({"start": "5ba"}), check="schedule", step=0),
    Tampering(name="interrupt in run.json", make=claimed({"interrupt": 4}), check="schedule", step=3),
    Tampering(name="a step that was trained on whole", make=rewritten(unscored), check="schedule", step=STEP),
    Tampering(name="a step dropped", make=without_step, check="steps", step=STEP),
    Tampering(name="a step doubled", make=doubled_step, check="positions", step=STEP, rank=0),
    Tampering(name="two steps exchanged", make=exchanged_steps, check="epochs", step=STEP),
    Tampering(
        name="the place in the epoch of a row",
        make=rewritten(put("epoch_position", 2, 999)),
        check="positions",
        step=STEP,
    ),
    Tampering(
        name="the places in the epoch of a step",
        make=rewritten(lambda c, k: c.update(epoch_position=c["epoch_position"] + 8)),
        check="epochs",
        step=STEP,
    ),
    Tampering(
        name="the epoch of a step",
        make=rewritten(lambda c, k: c.update(epoch=c["epoch"] + 1)),
        check="epochs",
        step=STEP,
    ),
    Tampering(name="a position given twice", make=rewritten(put("position", 2, 3)), check="positions", step=STEP),
    Tampering(name="the order of training", make=rewritten(reverse_training), check="positions", step=STEP),
    Tampering(
        name="a sample that does not exist",
        make=rewritten(put("sample_id", 2, 83)),
        check="places",
        step=STEP,
        sample_id=83,
    ),
    Tampering(
        name="the row in the shard of a sample", make=rewritten(put("shard_index", 0, 15)), check="places", step=STEP
    ),
    Tampering(
        name="the stream of a sample",
        make=rewritten(lambda c, k: c.update(stream=1 - c["stream"])),
        check="places",
        step=STEP,
    ),
    Tampering(
        name="other samples offered, their places too", make=rewritten(other_sample(5)), check="coverage", step=0
    ),
    Tampering(name="a push dropped", make=pushing(drop_first_push), check="pushes", step=STEP),
    Tampering(name="the numbers of pushes", make=pushing(shift_index), check="pushes", step=STEP),
    Tampering(name="the sample of a push", make=pushing(other_pushed_sample), check="pushes", step=STEP),
    Tampering(name="two embeddings exchanged", make=pushing(exchange_vectors), check="digest", step=STEP),
    Tampering(name="the memory's digest", make=pushing(set_digest), check="digest", step=STEP),
    Tampering(
        name="two embeddings exchanged, digests to match",
        make=remembering(lambda rows: rows[::-1].copy()),
        check="inter",
        step=STEP,
    ),
    Tampering(
        name="an embedding replaced, digests to match",
        make=remembering(lambda rows: rows * np.float32(1.5)),
        check="inter",
        step=STEP,
    ),
    Tampering(
        name="a memory from nowhere",
        make=lambda r: finished(r, warm=np.ones((5, 12), np.float32)),
        check="pushes",
        step=-1,
    ),
    Tampering(
        name="a draw, with the choice to match",
        make=rewritten(lucky_draw, method="random"),
        check="random",
        step=STEP,
        settings={"method": "random"},
    ),
    Tampering(
        name="the seed in run.json",
        make=lambda r: finished(r, method="random", changes=random_settings(seed=18)),
        check="random",
        step=0,
        settings={"method": "random"},
    ),
    Tampering(
        name="the ranks that candidates came from",
        make=lambda r: finished(r, world_size=2, exchange_ranks=True),
        check=None,
        settings={"world_size": 2},
    ),
    Tampering(name="an interruption hidden", make=finished, check=None, settings={"interrupted": True}),
    Tampering(name="a whole run with another seed", make=lambda r: finished(r, seed=18), check=None),
]


def exchange_files(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def random_settings(**settings: Any) -> dict[str, Any]:
    config = selection(method="random", **settings)
    return {
        "selection": config.as_dict(),
        "selection_fingerprint": config.fingerprint(),
        "seeds": {"selection": config.seed, "training": 5},
    }
