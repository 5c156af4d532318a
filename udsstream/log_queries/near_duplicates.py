"""Near-duplicates that were trained on: pairs of pushed embeddings that lie close to each other, from the log alone.

The diversity term sees a candidate's *mean* distance to the memory, and not at all the candidates that are chosen in the same step, so
a copy may pass it. Here each pushed embedding is compared with those that the memory held when it came, and with those of its own step.
Nothing is said of pairs further apart than the memory reaches. Needs embeddings="full".

    P pushes, M the memory's capacity, d components
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udsstream.errors import ConfigError
from udsstream.selection_log.reader import SelectionLog

__all__ = ["FRACTION", "NearDuplicates", "Pair", "near_duplicates"]

FRACTION = 0.1
"""Two embeddings are called near when their distance is at most this part of the typical one."""

_READ_BYTES = 256 << 20
"""Of vectors held at a time; each further portion is another pass over the log's files."""
_BLOCK = 256
_ANCHORS = 512


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two samples that were trained on, the later one while the memory still held the earlier one."""

    sample_id: int
    step: int
    earlier_sample_id: int
    earlier_step: int
    """Equal to `step` when both were chosen in the same step, where the diversity term cannot see them together."""
    distance: float
    """In the embeddings' units."""


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """What was found among the pushed embeddings."""

    pushes: int
    """P: embeddings compared."""
    window: int
    """M: how many pushes back each was compared with."""
    typical_distance: float | None
    """Median distance of pairs drawn evenly over the run and the window; None when there are none."""
    fraction: float
    """Pairs at most this part of the typical distance apart were looked for."""
    found: int
    """Such pairs of different samples."""
    same_sample: int
    """Such pairs of one sample with itself, from another epoch."""
    pairs: tuple[Pair, ...]
    """The nearest of those found, nearest first."""

    def as_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return asdict(self) | {"pairs": [asdict(pair) for pair in self.pairs]}


def near_duplicates(
    log: SelectionLog, *, until: int | None = None, fraction: float = FRACTION, limit: int = 1000
) -> NearDuplicates:
    """Compares each pushed embedding with the M before it. Time P·M·d; memory: 256 MB of vectors, and `limit` pairs.

    Embeddings taken over from another run are left out: nothing was trained on them here.

    Raises:
        ConfigError: the log did not keep every embedding, or does not say how many the memory holds.
    """
    settings = log.run["log"]
    if settings["embeddings"] != "full":
        raise ConfigError(
            f"{log.root} was written with embeddings={settings['embeddings']!r}: only embeddings='full' keeps what was pushed"
        )
    window, dim = settings["buffer_capacity"], settings["embedding_dim"]
    if window is None:
        raise ConfigError(f"{log.root}: run.json does not say how many embeddings the memory holds")
    own = pc.field("step") >= 0
    trained = own if until is None else own & (pc.field("step") < until)
    index = log.pushes(columns=["push_index", "step", "sample_id"], filter=trained)
    pushes = index.num_rows
    typical, centre = _typical(log, index["push_index"].to_numpy(), window, dim)
    nothing = NearDuplicates(
        pushes=pushes, window=window, typical_distance=typical, fraction=fraction, found=0, same_sample=0, pairs=()
    )
    if typical is None:
        return nothing
    places = index["push_index"].to_numpy()
    ids, steps = index["sample_id"].to_numpy(), index["step"].to_numpy()
    best = _Nearest(limit)
    found = same = 0
    portion = max(window, _READ_BYTES // (4 * dim))
    for begin in range(0, pushes, portion):
        first = int(np.searchsorted(places, places[begin] - window))
        stop = min(begin + portion, pushes)
        vectors = _vectors(log, int(places[first]), int(places[stop - 1]), dim)
        for later, earlier, distance in _close_pairs(
            vectors, centre, places[first:stop], begin - first, window, fraction * typical
        ):
            different = ids[first + later] != ids[first + earlier]
            same += int((~different).sum())
            found += int(different.sum())
            best.add(first + later[different], first + earlier[different], distance[different])
    pairs = tuple(
        Pair(
            sample_id=int(ids[later]),
            step=int(steps[later]),
            earlier_sample_id=int(ids[earlier]),
            earlier_step=int(steps[earlier]),
            distance=float(distance),
        )
        for later, earlier, distance in best.sorted()
    )
    return NearDuplicates(
        pushes=pushes,
        window=window,
        typical_distance=typical,
        fraction=fraction,
        found=found,
        same_sample=same,
        pairs=pairs,
    )


def _typical(log: SelectionLog, places: np.ndarray, window: int, dim: int) -> tuple[float | None, np.ndarray]:
    """The median distance of pairs spread evenly over the run, at evenly spread lags within the window; and their mean vector."""
    if len(places) < 2:
        return None, np.zeros(dim, np.float32)
    later = np.unique(np.linspace(1, len(places) - 1, min(_ANCHORS, len(places) - 1)).astype(np.int64))
    # The golden ratio's multiples spread the lags over the window, whatever the number of anchors.
    reach = np.minimum(later, window)
    lag = 1 + (np.arange(1, len(later) + 1) * 0.6180339887498949 % 1 * reach).astype(np.int64)
    earlier = later - np.minimum(lag, reach)
    wanted = np.unique(places[np.concatenate([later, earlier])])
    rows = log.pushes(columns=["push_index", "embedding"], filter=pc.field("push_index").isin(pa.array(wanted)))
    vectors = _matrix(rows["embedding"], dim).astype(np.float64)
    at = {name: np.searchsorted(wanted, places[which]) for name, which in (("later", later), ("earlier", earlier))}
    with np.errstate(invalid="ignore"):
        distances = np.linalg.norm(vectors[at["later"]] - vectors[at["earlier"]], axis=1)
    distances = distances[np.isfinite(distances)]  # a log may hold NaN; it is near to nothing
    if not len(distances):
        return None, np.zeros(dim, np.float32)
    return float(np.median(distances)), vectors[np.isfinite(vectors).all(axis=1)].mean(axis=0).astype(np.float32)


def _vectors(log: SelectionLog, first: int, last: int, dim: int) -> np.ndarray:
    """(n, d) float32: the embeddings of the pushes from `first` to `last`."""
    between = (pc.field("push_index") >= first) & (pc.field("push_index") <= last) & (pc.field("step") >= 0)
    return _matrix(log.pushes(columns=["embedding"], filter=between)["embedding"], dim)


def _matrix(column: pa.ChunkedArray, dim: int) -> np.ndarray:
    return np.concatenate(
        [np.empty((0, dim), np.float32)]
        + [chunk.flatten().to_numpy().astype(np.float32).reshape(-1, dim) for chunk in column.chunks]
    )


def _close_pairs(
    vectors: np.ndarray, centre: np.ndarray, places: np.ndarray, begin: int, window: int, threshold: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(n, d) vectors, the push index (n,) of each → later rows, earlier rows and distances of the pairs at most `threshold` apart.

    Later rows are those from `begin` on; an earlier one is up to `window` pushes before. A matrix product finds the candidates, and each
    is measured again by differences: `‖a‖² + ‖b‖² − 2⟨a,b⟩` in float32 cannot tell near from equal. Taking off a common `centre` (d,)
    makes the squares small, so that few are measured for nothing.
    """
    for start in range(begin, len(vectors), _BLOCK):
        stop = min(start + _BLOCK, len(vectors))
        low = int(np.searchsorted(places, places[start] - window))
        block = vectors[low:stop] - centre
        squares = np.einsum("nd,nd->n", block, block)
        with np.errstate(invalid="ignore"):
            product = block[start - low :] @ block.T
        both = squares[start - low :, None] + squares[None, :]
        near = both - 2 * product <= threshold**2 + 1e-5 * both
        lag = places[start:stop, None] - places[None, low:stop]
        later, earlier = np.nonzero(near & (lag > 0) & (lag <= window))
        later, earlier = later + start, earlier + low
        distance = np.empty(len(later))
        for at in range(0, len(later), _BLOCK):
            part = slice(at, at + _BLOCK)
            difference = vectors[later[part]].astype(np.float64) - vectors[earlier[part]]
            distance[part] = np.linalg.norm(difference, axis=1)
        close = distance <= threshold
        yield later[close], earlier[close], distance[close]


class _Nearest:
    """The nearest pairs of all that were added, `limit` of them at the most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._later, self._earlier, self._distance = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)

    def add(self, later: np.ndarray, earlier: np.ndarray, distance: np.ndarray) -> None:
        later = np.concatenate([self._later, later])
        earlier = np.concatenate([self._earlier, earlier])
        distance = np.concatenate([self._distance, distance])
        best = np.lexsort((earlier, later, distance))[: self._limit]
        self._later, self._earlier, self._distance = later[best], earlier[best], distance[best]

    def sorted(self) -> Iterator[tuple[int, int, float]]:
        yield from zip(self._later.tolist(), self._earlier.tolist(), self._distance.tolist(), strict=True)
