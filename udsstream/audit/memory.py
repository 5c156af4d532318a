"""The memory of what was trained on, rebuilt: what was pushed, the chained digest of it, and the distances that were taken to it.

    n pushes of a view in push order, M capacity, d components, m rows held before a step (m ≤ M)

The rules, written from the method's description: the kept embeddings of a step enter in position order; the digest becomes
SHA256(digest ‖ the step's rows, float32, little-endian), from 32 zero bytes; `inter` of a candidate is its mean Euclidean distance to the
rows held before the step, 0 when there are none. An embedding is logged for the kept candidates alone ("full"), or while it is in the
memory at a checkpoint ("tail"), so that no more can be recomputed.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from udsstream.audit.record import Record
from udsstream.audit.report import Finding, Ledger
from udsstream.audit.rows import Pushes, View, ranges, rows_of
from udsstream.audit.settings import RunFacts
from udsstream.errors import LogCorruptError, LogError
from udsstream.selection_log.checkpoints import Heads, buffer_codec, read_buffer
from udsstream.selection_log.encoding import TableCodec
from udsstream.selection_log.manifest import SegmentLine
from udsstream.selection_log.schema import PUSHES
from udsstream.selection_log.sealing import open_segment

__all__ = ["MemoryCheck", "distance_tolerance"]

EMPTY_DIGEST = bytes(32)
_UNIT = 2.0**-24
_BLOCK_BYTES = 32 << 20
_CANDIDATES = 256
_WINDOW = 2048


def distance_tolerance(dim: int, held: int) -> float:
    """Relative tolerance for a mean of `held` distances of `dim` components that was computed in float32 in an unknown order.

    2·(√d + √m + 8) units of float32 rounding (2⁻²⁴ each): rounding errors of a sum of n numbers grow as √n (Higham & Mary 2019);
    torch's blocked sums stay far below. 8.6e-6 for d = m = 1024.
    """
    return 2 * (math.sqrt(dim) + math.sqrt(max(held, 1)) + 8) * _UNIT


Fetch = Callable[[int, int], np.ndarray]
"""The vectors (k, d) float32 of a range of a view's pushes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sequence:
    """The pushes of a view, in push order."""

    rows: np.ndarray
    """(n,) rows of the table of pushes."""
    index: np.ndarray
    """(n,) push_index."""
    step: np.ndarray
    starts: np.ndarray
    """(S,) where each step's pushes begin."""
    ends: np.ndarray

    @staticmethod
    def of(pushes: Pushes, rows: np.ndarray) -> _Sequence:
        rows = rows[np.argsort(pushes["push_index"][rows], kind="stable")]
        step = pushes["step"][rows]
        starts = np.flatnonzero(np.append(True, step[1:] != step[:-1])) if len(step) else np.empty(0, np.int64)
        return _Sequence(
            rows=rows,
            index=pushes["push_index"][rows],
            step=step,
            starts=starts,
            ends=np.append(starts[1:], len(step)).astype(np.int64),
        )


@dataclass(kw_only=True, eq=False)
class MemoryCheck:
    """Checks the pushes of a record: `match` first, then `recompute`; in between, with what a checkpoint kept."""

    record: Record
    facts: RunFacts
    ledger: Ledger
    _inter: np.ndarray = field(init=False, repr=False)
    """(pushes,) the logged `inter` of the candidate that was pushed; NaN where there is none."""
    _digested: np.ndarray = field(init=False, repr=False)
    _measured: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        count = len(self.record.pushes)
        self._inter = np.full(count, np.nan)
        self._digested = np.zeros(count, bool)
        self._measured = np.zeros(count, bool)

    def match(self) -> None:
        """The table of pushes against the decisions, and the heads files against it."""
        record, config = self.record, self.facts.config
        assert config is not None
        seen = np.zeros(len(record.pushes), bool)
        for number, view in enumerate(record.views):
            rows = view.rows_of(record.pushes["attempt"], record.pushes["step"])
            if number == 0:
                self._check_contiguous(rows)
                self._check_warm_start(rows)
            fresh = rows[~seen[rows]]
            seen[rows] = True
            self._check_view(view, fresh)
            self._check_empty(view, rows)
        if not seen.all():
            self.ledger.skip(f"{int((~seen).sum()):,} pushes of attempts that have no decisions")
        self.ledger.check(
            f"pushes: {len(record.pushes):,} pushes against the kept candidates: which, in what order, running numbers"
        )
        self._check_digest_columns()
        for heads in record.heads:
            self._check_heads(heads)
        if record.heads:
            self.ledger.check("memory: what the heads files say of the memory against the table of pushes")

    # -- which rows were pushed ------------------------------------------------------------------------------------------

    def _found(self, row: int, message: str, check: str = "pushes") -> Finding:
        pushes = self.record.pushes
        return Finding(
            check=check,
            step=int(pushes["step"][row]),
            rank=int(pushes["rank"][row]),
            sample_id=int(pushes["sample_id"][row]),
            row=int(pushes["position"][row]),
            message=message,
        )

    def _check_contiguous(self, rows: np.ndarray) -> None:
        pushes = self.record.pushes
        sequence = _Sequence.of(pushes, rows)
        index, step = sequence.index, sequence.step
        before = np.append(-1, index[:-1])
        self.ledger.find_each(
            "pushes",
            np.flatnonzero(index != before + 1),
            lambda i: self._found(
                int(sequence.rows[i]),
                f"step {step[i]}: the push numbered {index[i]} follows the one numbered {before[i]}: pushes are missing or doubled",
            ),
        )
        back = np.flatnonzero(step[1:] < step[:-1]) + 1
        self.ledger.find_each(
            "pushes",
            back,
            lambda i: self._found(
                int(sequence.rows[i]),
                f"the push numbered {index[i]} is of step {step[i]}, the one before it of step {step[i - 1]}",
            ),
        )

    def _check_warm_start(self, rows: np.ndarray) -> None:
        first = rows[self.record.pushes["step"][rows] < 0]
        if len(first) and not self.facts.warm_start:
            message = f"{len(first)} embeddings were in the memory before the first step, but run.json names no run they came from"
            self.ledger.find(self._found(int(first[0]), message))
        if self.facts.warm_start:
            self.ledger.skip(
                "whether the memory that was taken over is the former run's: run.json names that run's digest, but its log is not here"
            )

    def _check_view(self, view: View, fresh: np.ndarray) -> None:
        """One push for each kept row of a scored step, the same candidates in the same order; fresh: pushes not judged before."""
        record, config = self.record, self.facts.config
        decisions, pushes = record.decisions, record.pushes
        assert config is not None
        groups = view.groups[view.fresh]
        group = decisions.group_of
        wanted = np.zeros(len(decisions.starts), bool)
        if config.remembers:
            wanted[groups] = True
            wanted &= decisions.any_in(decisions["has_score"])
        kept = np.flatnonzero(wanted[group] & decisions["selected"])
        fresh = fresh[pushes["step"][fresh] >= 0]
        kept = kept[np.lexsort((decisions["position"][kept], decisions["step"][kept]))]
        fresh = fresh[np.lexsort((pushes["push_index"][fresh], pushes["step"][fresh]))]
        steps, at_kept, of_kept, at_push, of_push = _by_step(decisions["step"][kept], pushes["step"][fresh])
        different = np.flatnonzero(of_kept != of_push)
        if not (view.attempt == max(record.lineages) and record.closed):
            # A kill, or this very moment, may lie between writing one table and the other.
            last = int(decisions.group("step")[view.groups[-1]]) if len(view.groups) else -1
            torn = ((steps == last) & (of_push == 0)) | ((steps > last) & (of_kept == 0))
            unfinished = steps[different[torn[different]]]
            if len(unfinished):
                which = f"step {unfinished[0]}" + (f" to {unfinished[-1]}" if len(unfinished) > 1 else "")
                self.ledger.skip(
                    f"the pushes of {which} (attempt {view.attempt}): the run ended, or goes on, between writing one table and the other"
                )
            different = different[~torn[different]]
        self.ledger.find_each(
            "pushes",
            different,
            lambda i: Finding(
                check="pushes",
                step=int(steps[i]),
                message=f"step {steps[i]}: {of_push[i]} embeddings were pushed into the memory, but {of_kept[i]} candidates were "
                "kept by their scores",
            ),
        )
        same = of_kept == of_push
        a = kept[ranges(at_kept[same], of_kept[same])]
        b = fresh[ranges(at_push[same], of_push[same])]
        for name in ("position", "sample_id", "rank"):
            found, due = pushes[name][b], decisions[name][a]
            self.ledger.find_each(
                "pushes",
                np.flatnonzero(found != due),
                lambda i, name=name, found=found, due=due: self._found(
                    int(b[i]),
                    f"step {pushes['step'][b[i]]}: the push numbered {pushes['push_index'][b[i]]} has {name} {found[i]}, but the candidate "
                    f"kept there has {due[i]}",
                ),
            )
        equal = (pushes["position"][b] == decisions["position"][a]) & (
            pushes["sample_id"][b] == decisions["sample_id"][a]
        )
        self._inter[b[equal]] = np.where(decisions["has_inter"][a[equal]], decisions["inter"][a[equal]], np.nan)

    def _check_empty(self, view: View, rows: np.ndarray) -> None:
        """`inter` is 0 as long as the memory is empty."""
        decisions = self.record.decisions
        scored = decisions.any_in(decisions["has_score"])[view.groups]
        kept = decisions.sum_in(decisions["selected"])[view.groups] * scored
        warm = int((self.record.pushes["step"][rows] < 0).sum())
        empty = (warm + np.cumsum(kept) - kept == 0) & scored & view.fresh
        # Behind a missing step the memory may have been filled.
        steps = decisions.group("step")[view.groups]
        empty &= np.cumsum(steps != np.arange(len(steps))) == 0
        group = np.zeros(len(decisions.starts), bool)
        group[view.groups[empty]] = True
        wrong = group[decisions.group_of] & decisions["has_inter"] & (decisions["inter"] != 0)
        self.ledger.find_each(
            "inter",
            np.flatnonzero(wrong),
            lambda i: Finding(
                check="inter",
                step=int(decisions["step"][i]),
                rank=int(decisions["rank"][i]),
                sample_id=int(decisions["sample_id"][i]),
                row=int(decisions["position"][i]),
                message=f"step {decisions['step'][i]}, position {decisions['position'][i]}: inter is {decisions['inter'][i]:.9g}, "
                "but the memory was empty, so it should be 0",
            ),
        )

    # -- digests ---------------------------------------------------------------------------------------------------------

    def _check_digest_columns(self) -> None:
        pushes = self.record.pushes
        digest = pushes["digest"]
        same = (pushes["attempt"][1:] == pushes["attempt"][:-1]) & (pushes["step"][1:] == pushes["step"][:-1])
        differs = np.flatnonzero(same & (digest[1:] != digest[:-1]).any(axis=1)) + 1
        self.ledger.find_each(
            "digest",
            differs,
            lambda i: self._found(
                i, f"step {pushes['step'][i]}: its pushes name two digests of the memory after it", "digest"
            ),
        )

    def _sequence_before(self, attempt: int, step: int) -> _Sequence:
        pushes = self.record.pushes
        rows = rows_of(self.record.lineages.get(attempt, ()), pushes["attempt"], pushes["step"])
        return _Sequence.of(pushes, rows[pushes["step"][rows] < step])

    def check_state(self, check: str, where: str, attempt: int, step: int, pushed: int, digest: bytes) -> None:
        """What somebody kept of the memory before a step, against the table of pushes."""
        sequence = self._sequence_before(attempt, step)
        count = int(sequence.index[-1]) + 1 if len(sequence.index) else 0
        found = self.record.pushes["digest"][sequence.rows[-1]].tobytes() if count else EMPTY_DIGEST
        for name, said, logged in (("pushed", pushed, count), ("digest", digest.hex()[:16], found.hex()[:16])):
            if said != logged:
                message = f"{where}: {name} is {said}, but by the pushes before step {step} (attempt {attempt}) it is {logged}"
                self.ledger.find(Finding(check=check, step=step, message=message))

    def _check_heads(self, heads: Heads) -> None:
        where = f"the heads file of step {heads.step}"
        self.check_state("memory", where, heads.attempt, heads.step, heads.pushed, heads.buffer_digest)
        config = self.facts.config
        assert config is not None
        held = min(heads.pushed, config.buffer_size)
        if heads.buffer_rows is not None and heads.buffer_rows != held:
            message = (
                f"{where} keeps {heads.buffer_rows} vectors, but a memory of {config.buffer_size} holds {held} after "
                f"{heads.pushed} pushes"
            )
            self.ledger.find(Finding(check="memory", step=heads.step, message=message))

    # -- vectors ---------------------------------------------------------------------------------------------------------

    def recompute(self) -> None:
        """Digests and distances, as far as the log has the vectors."""
        settings, pushes = self.record.run.settings, self.record.pushes
        kept = int((pushes["step"] >= 0).sum())
        if not len(pushes):
            return
        if settings.embeddings == "none":
            self.ledger.skip('the memory\'s digests and inter: the log keeps no embeddings (embeddings="none")')
            return
        if settings.embedding_dtype != "float32":
            self.ledger.skip(
                "the memory's digests and inter: the embeddings were rounded to float16 when they were logged"
            )
            return
        if settings.embeddings == "full":
            vectors = _LoggedVectors(self.record)
            for view in self.record.views:
                sequence = _Sequence.of(pushes, view.rows_of(pushes["attempt"], pushes["step"]))
                self._judge(sequence, 0, functools.partial(vectors.fetch, sequence.rows), "the logged embeddings")
        else:
            dim = settings.embedding_dim
            assert dim is not None
            codec = buffer_codec(dim, settings.embedding_dtype)
            for heads in self.record.heads:
                if heads.buffer_rows is None:
                    continue
                try:
                    rows = read_buffer(self.record.root, codec, heads).embeddings
                except (LogError, FileNotFoundError):  # reported when the record was read
                    continue
                self._judge_vectors(heads.attempt, heads.step, rows, f"the vectors kept at step {heads.step}")
        digested, measured = int(self._digested.sum()), int(self._measured.sum())
        self.ledger.check(
            f"digest: the memory's digest against its vectors, after {digested:,} of {len(pushes):,} pushes"
        )
        self.ledger.check(
            f"inter: {measured:,} of {kept:,} kept candidates' against the distance to the rebuilt memory"
        )
        if digested < len(pushes):
            self.ledger.skip(
                f"the memory's digest after {len(pushes) - digested:,} pushes, whose vectors the log no longer has"
            )
        if measured < kept:
            self.ledger.skip(
                f"inter of {kept - measured:,} kept candidates: not all vectors of the memory that they met are in the log, or it is in "
                "doubt which push is theirs"
            )
        self.ledger.skip(
            "intra, and inter of candidates that were not kept: that needs the model (`udsstream replay RUN --verify`)"
        )

    def compare_vectors(self, check: str, where: str, attempt: int, step: int, vectors: np.ndarray) -> None:
        """What somebody kept of the memory's vectors before a step: are they the last that were pushed?"""
        settings, config = self.record.run.settings, self.facts.config
        sequence = self._sequence_before(attempt, step)
        count = len(sequence.rows)
        assert config is not None
        if (len(vectors), vectors.shape[1]) != (min(count, config.buffer_size), settings.embedding_dim):
            message = (
                f"{where}: its memory holds {len(vectors)} vectors of {vectors.shape[1]} numbers, but after {count} pushes there are "
                f"{min(count, config.buffer_size)} of {settings.embedding_dim}"
            )
            self.ledger.find(Finding(check=check, step=step, message=message))
            return
        if settings.embedding_dtype == "float32":
            self._judge_vectors(attempt, step, vectors, f"the vectors in {where}")

    def _judge_vectors(self, attempt: int, step: int, vectors: np.ndarray, source: str) -> None:
        """Judges with the vectors, oldest first, that the memory held before a step."""
        sequence = self._sequence_before(attempt, step)
        first = len(sequence.rows) - len(vectors)
        if first < 0 or not len(vectors):
            return
        self._judge(sequence, first, lambda low, high: vectors[low - first : high - first], source)

    def _judge(self, sequence: _Sequence, first: int, fetch: Fetch, source: str) -> None:
        """Digests and distances of the pushes from place `first` on that were not judged before; `fetch` has their vectors."""
        config, settings = self.facts.config, self.record.run.settings
        assert config is not None
        assert settings.embedding_dim is not None
        capacity = config.buffer_size
        todo = ~(self._digested & self._measured)[sequence.rows]
        todo[:first] = False
        # Whole steps: those of which any push is left to judge.
        pending = (
            np.flatnonzero((np.add.reduceat(todo, sequence.starts) > 0) & (sequence.starts >= first))
            if len(todo)
            else []
        )
        # At least as many as the memory holds, which is fetched for each block.
        block = max(1, _BLOCK_BYTES // (4 * settings.embedding_dim), min(capacity, len(sequence.rows)))
        for low_step, high_step in _blocks(sequence, np.asarray(pending, np.int64), block):
            low, high = int(sequence.starts[low_step]), int(sequence.ends[high_step - 1])
            base = max(first, low - capacity)
            vectors = np.ascontiguousarray(fetch(base, high), dtype="<f4")
            self._judge_digests(sequence, range(low_step, high_step), base, vectors, source)
            self._judge_distances(sequence, low, high, base, vectors, capacity)

    def _judge_digests(self, sequence: _Sequence, steps: range, base: int, vectors: np.ndarray, source: str) -> None:
        pushes = self.record.pushes
        for s in steps:
            low, high = int(sequence.starts[s]), int(sequence.ends[s])
            rows = sequence.rows[low:high]
            if self._digested[rows].all():
                continue
            # The digest before is the recorded one, so that one fault is found once.
            if low == 0:
                before, follows = EMPTY_DIGEST, sequence.index[0] == 0
            else:
                before = pushes["digest"][sequence.rows[low - 1]].tobytes()
                follows = sequence.index[low] == sequence.index[low - 1] + 1
            if not follows or sequence.index[high - 1] - sequence.index[low] != high - low - 1:
                continue
            self._digested[rows] = True
            digest = hashlib.sha256(before + vectors[low - base : high - base].tobytes()).digest()
            recorded = pushes["digest"][rows[-1]].tobytes()
            if digest != recorded:
                message = (
                    f"step {sequence.step[low]}: the memory's digest after it is {recorded.hex()[:16]}…, but {source} give "
                    f"{digest.hex()[:16]}…: a vector or a digest was changed"
                )
                self.ledger.find(
                    Finding(
                        check="digest", step=int(sequence.step[low]), rank=int(pushes["rank"][rows[0]]), message=message
                    )
                )

    def _judge_distances(
        self, sequence: _Sequence, low: int, high: int, base: int, vectors: np.ndarray, capacity: int
    ) -> None:
        """`inter` of the pushes from `low` to before `high`; vectors are those of the pushes from `base` on."""
        pushes = self.record.pushes
        begin = np.repeat(sequence.starts, sequence.ends - sequence.starts)[low:high]  # what was held ends here
        held = np.minimum(sequence.index[begin], capacity)
        oldest = begin - held
        places = sequence.rows[low:high]
        # Candidates that met an empty memory have been judged with the decisions.
        self._measured[places[held == 0]] = True
        ok = (held > 0) & (oldest >= base) & ~self._measured[places] & np.isfinite(self._inter[places])
        at = np.flatnonzero(ok)
        at = at[_unbroken(sequence.index, oldest[at], begin[at])]
        centre = vectors.mean(axis=0, dtype=np.float64)
        for part in np.array_split(at, max(1, -(-len(at) // _CANDIDATES))):
            if not len(part):
                continue
            rows = sequence.rows[low + part]
            queries = vectors[low + part - base]
            spans = np.stack([oldest[part], begin[part]], axis=1) - base
            logged = self._inter[rows]
            limit = distance_tolerance(vectors.shape[1], int(held[part].max()))
            with np.errstate(all="ignore"):
                mean, scale = _mean_distances(queries, vectors, spans, centre)
                # The fast form loses what near-duplicates differ by: it acquits, the slow form alone condemns.
                suspicious = ~(np.abs(mean - logged) <= limit * mean) | ~(mean >= 0.1 * scale)
                for i in np.flatnonzero(suspicious).tolist():
                    mean[i] = _mean_distance(queries[i], vectors[spans[i, 0] : spans[i, 1]])
            self._measured[rows] = True
            self.ledger.find_each(
                "inter",
                np.flatnonzero(~(np.abs(mean - logged) <= limit * mean + 1e-30)),
                lambda i, rows=rows, logged=logged, mean=mean, limit=limit: self._found(
                    int(rows[i]),
                    f"step {pushes['step'][rows[i]]}, sample {pushes['sample_id'][rows[i]]}: inter is {logged[i]:.9g}, but its mean "
                    f"distance to the rebuilt memory is {mean[i]:.9g} (relative tolerance {limit:.1e})",
                    "inter",
                ),
            )


def _by_step(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The steps in either of two ascending columns, and for each column where its rows begin and how many there are."""
    steps = np.union1d(a, b)
    sides = []
    for column in (a, b):
        low = np.searchsorted(column, steps, side="left")
        sides += [low, np.searchsorted(column, steps, side="right") - low]
    return steps, sides[0], sides[1], sides[2], sides[3]


def _unbroken(index: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whether the running numbers have no gap from one place to another."""
    breaks = np.cumsum(np.append(False, np.diff(index) != 1))
    return breaks[low] == breaks[high]


def _blocks(sequence: _Sequence, pending: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Runs of consecutive steps among `pending`, of at most `most` pushes each (or one step)."""
    if not len(pending):
        return
    ends = sequence.ends
    low = previous = int(pending[0])
    for s in pending[1:].tolist():
        if s != previous + 1 or ends[s] - sequence.starts[low] > most:
            yield low, previous + 1
            low = s
        previous = s
    yield low, previous + 1


def _mean_distance(query: np.ndarray, memory: np.ndarray) -> float:
    """The definition: query (d,), memory (m, d)."""
    return float(np.linalg.norm(memory.astype(np.float64) - query.astype(np.float64), axis=1).mean())


def _mean_distances(
    queries: np.ndarray, memory: np.ndarray, spans: np.ndarray, centre: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same for many, each to the rows `spans[i, 0]` to before `spans[i, 1]`; and √(‖a‖² + mean ‖b‖²), to judge the error by.

    By ‖a‖² + ‖b‖² − 2⟨a, b⟩ in float64, from `centre` (d,), because embeddings that have much in common would otherwise cancel.
    """
    q = queries.astype(np.float64) - centre
    squares = (q * q).sum(axis=1)
    sums, norms = np.zeros(len(q)), np.zeros(len(q))
    end = int(spans[:, 1].max())
    for low in range(int(spans[:, 0].min()), end, _WINDOW):
        w = memory[low : min(low + _WINDOW, end)].astype(np.float64) - centre
        w_squares = (w * w).sum(axis=1)
        distances = squares[:, None] + w_squares - 2 * (q @ w.T)
        np.sqrt(np.maximum(distances, 0, out=distances), out=distances)
        column = np.arange(low, low + len(w))
        inside = (column >= spans[:, :1]) & (column < spans[:, 1:])
        distances *= inside
        sums += distances.sum(axis=1)
        norms += inside @ w_squares
    count = spans[:, 1] - spans[:, 0]
    return sums / count, np.sqrt(squares + norms / count)


class _LoggedVectors:
    """The embeddings in the table of pushes, file by file; the last few files stay unpacked."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._codec: TableCodec = record.run.settings.codec(PUSHES)
        ranks = {rank for rank, _ in record.pushes.sources}
        self._load = functools.lru_cache(maxsize=len(ranks) + 1)(self._unpack)

    def fetch(self, rows: np.ndarray, low: int, high: int) -> np.ndarray:
        """(high − low, d) float32: the vectors of these places of `rows`."""
        wanted = rows[low:high]
        source, place = self._record.pushes["source"][wanted], self._record.pushes["source_row"][wanted]
        dim = self._record.run.settings.embedding_dim
        assert dim is not None
        out = np.empty((len(wanted), dim), np.float32)
        for number in np.unique(source).tolist():
            mine = source == number
            out[mine] = self._load(number)[place[mine]]
        return out

    def _unpack(self, number: int) -> np.ndarray:
        rank, source = self._record.pushes.sources[number]
        if isinstance(source, SegmentLine):
            segment = open_segment(self._record.root, source, rank, self._codec, self._record.written_under)
            table = segment.table(self._codec)
        else:
            table = source.table(self._codec)
        for column, values, _ in self._codec.canonical(table.select(self._codec.schema.names)):
            if column.name == "embedding":
                return values
        raise LogCorruptError(f"{self._record.root}: the table of pushes has no embeddings")
