"""Runs that choose with numpy instead of a model, and log it with the real writer: small, quick, and right to the last bit.

The data set is two streams of 50 and 33 samples in shards of 16, shuffled anew each epoch; a sample's value and embedding follow from
(sample, step) alone, so that a resumed run repeats what it lost. `tests/tiny.py` has real runs; these are for what a test wants to break.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles

from udsstream.config import SelectionConfig
from udsstream.selection_log.schema import MEASURES
from udsstream.selection_log.writer import SelectionLogWriter

STREAMS = (("one", 50), ("two", 33))
SAMPLES = 83
SHARD = 16
BATCH = 8
PER_EPOCH = -(-SAMPLES // BATCH)
VOCABULARY = 97
RUN_ID = "0123456789abcdef"


def selection(**settings: Any) -> SelectionConfig:
    defaults: dict[str, Any] = {
        "keep": 0.25,
        "max_seq_len": 32,
        "projection_dims": (4, 3),
        "buffer_size": 13,
        "embeddings": "full",
    }
    return SelectionConfig(**(defaults | settings))


def describe(config: SelectionConfig, world_size: int = 1, **changes: Any) -> dict[str, Any]:
    """What run.json says, in the form of `mosaicml/run_description.py`."""
    return {
        "run_id": RUN_ID,
        "selection": config.as_dict(),
        "selection_fingerprint": config.fingerprint(),
        "resolved_alpha": config.resolved_alpha(VOCABULARY),
        "vocab_size": VOCABULARY,
        "streams": [
            {
                "name": name,
                "location": f"/data/{name}",
                "samples": samples,
                "per_epoch": samples,
                "index_sha256": hashlib.sha256(name.encode()).hexdigest(),
            }
            for name, samples in STREAMS
        ],
        "loader": {
            "batch_size": BATCH // world_size,
            "batches_per_epoch": PER_EPOCH,
            "max_duration": "25ba",
            "canonical_nodes": 1,
        },
        "seeds": {"selection": config.seed, "training": 5},
        "warm_start": None,
        "world_size": world_size,
    } | changes


def candidates(step: int) -> tuple[int, int, np.ndarray]:
    """(epoch, place in the epoch of the first, sample ids) of a step."""
    epoch, batch = divmod(step, PER_EPOCH)
    order = np.random.default_rng([9, epoch]).permutation(SAMPLES)
    return epoch, batch * BATCH, order[batch * BATCH : (batch + 1) * BATCH]


def place_of(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(stream, shard, row in the shard) of samples."""
    stream = (ids >= STREAMS[0][1]).astype(np.int16)
    within = ids - stream * STREAMS[0][1]
    return stream, (within // SHARD).astype(np.int32), (within % SHARD).astype(np.int32)


def embedding(sample: int, step: int, dim: int) -> np.ndarray:
    return (3 + np.random.default_rng([sample, step]).standard_normal(dim)).astype(np.float32)


@dataclasses.dataclass
class NumpyRun:
    """One rank's, or several ranks', run into one log."""

    root: Path
    config: SelectionConfig = dataclasses.field(default_factory=selection)
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """To run.json."""
    world_size: int = 1
    warm: np.ndarray | None = None
    """Embeddings that the memory begins with."""
    length: int = 25
    """Steps that the run is planned for, for start and end in `dur`."""
    exchange_ranks: bool = False
    """Candidates are written by the ranks in the opposite order."""
    forge: Callable[[int, dict[str, Any], np.ndarray], np.ndarray | None] | None = None
    """Changes a step's columns before they are written; may give other places to push."""
    forge_rows: Callable[[int, np.ndarray], np.ndarray] | None = None
    """Changes the embeddings before the memory and its digest take them."""
    forge_push: Callable[[int, dict[str, Any]], None] | None = None
    """Changes what is written about a step's pushes (step −1: the memory that was taken over)."""
    writers: list[SelectionLogWriter] = dataclasses.field(default_factory=list)
    pushed: int = 0
    digest: bytes = bytes(32)
    memory: np.ndarray = dataclasses.field(default_factory=lambda: np.empty((0, 12), np.float32))
    samples: int = 0
    roots: dict[int, bytes] = dataclasses.field(default_factory=dict)
    states: dict[int, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    def begin(self) -> NumpyRun:
        self.memory = np.empty((0, self.config.embedding_dim), np.float32)
        for rank in range(self.world_size):
            self.writers.append(
                SelectionLogWriter.create(
                    self.root,
                    run=describe(self.config, self.world_size, **self.changes),
                    rank=rank,
                    world_size=self.world_size,
                    embeddings=self.config.embeddings,
                    embedding_dim=self.config.embedding_dim,
                    buffer_capacity=self.config.buffer_size,
                    measures=[name for name in MEASURES if name in self.config.measures],
                    interactions=BATCH // self.world_size if self.config.compares else None,
                )
            )
        self.take_over()
        return self

    def take_over(self) -> None:
        """Fills the memory before the first step."""
        if self.warm is not None:
            nowhere = np.full(len(self.warm), -1)
            self._push(-1, self.warm, nowhere, nowhere, np.zeros(len(self.warm), np.int64))

    def selects(self, step: int) -> bool:
        """The schedule; by batches, epochs, samples and shares of the run."""
        now = {"ba": step, "ep": step // PER_EPOCH, "sp": self.samples, "dur": step / self.length}

        def reached(text: str) -> bool:
            unit = text.lstrip("0123456789.")
            return now[unit] >= float(text.removesuffix(unit))

        batch = step % PER_EPOCH
        off = self.config.interrupt and (batch + 1) % self.config.interrupt == 0
        return reached(self.config.start) and not (self.config.end and reached(self.config.end)) and not off

    def steps(self, first: int, stop: int) -> NumpyRun:
        for step in range(first, stop):
            self.step(step)
        return self

    def columns(self, step: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None]:
        """The columns of a step's decision, the places of the kept, and all embeddings."""
        epoch, first, ids = candidates(step)
        count = len(ids)
        position = np.arange(count, dtype=np.int32)
        stream, shard, index = place_of(ids)
        out: dict[str, Any] = {
            "epoch": np.full(count, epoch, np.int32),
            "position": position,
            "epoch_position": first + position.astype(np.int64),
            "sample_id": ids.astype(np.int64),
            "stream": stream,
            "shard": shard,
            "shard_index": index,
            "tokens": (ids % 7 + 1).astype(np.int32),
        }
        kept, embeddings = np.arange(count), None
        if self.selects(step) and self.config.method != "full":
            if self.config.method == "random":
                words = np.frombuffer(hashlib.sha256(b"method/random").digest()[:16], "<u4").tolist()
                seeds = np.random.SeedSequence([self.config.seed, *words, epoch, step % PER_EPOCH])
                score = (np.random.PCG64(seeds).random_raw(count) >> np.uint64(40)).astype(np.float32) / 2**24
            elif self.config.method == "longest":
                score = out["tokens"].astype(np.float32)
            elif self.config.method in ("max_loss", "max_grad", "rho_loss", "selective_backprop"):
                value = np.array([np.random.default_rng([int(i), step, 2]).integers(1, 5) for i in ids], np.float32)
                out["grad_norm" if self.config.method == "max_grad" else "loss"] = score = value
                if self.config.method == "rho_loss":
                    out["reference_loss"] = (ids % 3).astype(np.float32)
                    score = value - out["reference_loss"]
                if self.config.method == "selective_backprop":
                    score = self._percentile_draw(value, epoch, step, out["tokens"])
            elif self.config.compares:
                score = self._order(step, ids, out)
            else:
                embeddings = np.stack([embedding(int(i), step, self.config.embedding_dim) for i in ids])
                # Few values, so that there are ties.
                intra = np.array([np.random.default_rng([int(i), step, 1]).integers(5, 9) for i in ids], np.float32)
                inter = np.zeros(count, np.float32)
                if len(self.memory):
                    inter = np.stack(
                        [np.linalg.norm(self.memory - e, axis=1).mean(dtype=np.float32) for e in embeddings]
                    )
                alpha = self.config.resolved_alpha(VOCABULARY)
                score = (intra.astype(np.float64) + alpha * inter.astype(np.float64)).astype(np.float32)
                score = {"uds_intra": intra, "uds_inter": inter}.get(self.config.method, score)
                out |= {"intra": intra, "inter": inter}
            out["score"] = score
            kept = rechoose(out, self.config, self.world_size)
        choose(out, kept)
        return out, kept, embeddings

    def _percentile_draw(self, loss: np.ndarray, epoch: int, step: int, tokens: np.ndarray) -> np.ndarray:
        """log(percentile ** (1/share − 1)) + Gumbel noise."""
        words = np.frombuffer(hashlib.sha256(b"method/selective_backprop").digest()[:16], "<u4").tolist()
        seeds = np.random.SeedSequence([self.config.seed, *words, epoch, step % PER_EPOCH])
        draws = np.random.PCG64(seeds).random_raw(len(loss))
        share = self.config.kept(len(loss), self.world_size) / len(loss)
        if self.config.keep_tokens is not None:
            share = min(1.0, self.config.keep_tokens / tokens.sum())
        places = sorted(range(len(loss)), key=lambda i: (loss[i], i))
        out = np.empty(len(loss))
        for place, i in enumerate(places, 1):
            uniform = ((int(draws[i]) >> 12) + 0.5) / 2**52
            out[i] = (1 / share - 1) * math.log(place / len(loss)) - math.log(-math.log(uniform))
        return out.astype(np.float32)

    def _order(self, step: int, ids: np.ndarray, out: dict[str, Any]) -> np.ndarray:
        """The greedy methods over gradients of twelve numbers: with fewer than candidates, rounding would decide among the last."""
        assert self.world_size == 1
        own = np.stack([np.random.default_rng([int(i), step, 3]).standard_normal(12) for i in ids]).astype(np.float32)
        inner = own @ own.T
        out["interaction"] = np.zeros((len(ids), BATCH), np.float32)
        out["interaction"][:, : len(ids)] = inner
        validation = np.ones(12, np.float32)
        if self.config.method == "greats":
            out["alignment"] = own @ validation
            order = oracles.greats_order(own, validation, 1.0)
        else:
            order = oracles.divbs_order(own)
        score = np.empty(len(ids), np.float32)
        score[order] = np.arange(len(ids), 0, -1)
        return score

    def step(self, step: int) -> None:
        columns, kept, embeddings = self.columns(step)
        if self.forge is not None:
            changed = self.forge(step, columns, kept)
            kept = kept if changed is None else changed
        count = len(columns["position"])
        self.samples += count
        owner = np.arange(count) * self.world_size // count
        owner = self.world_size - 1 - owner if self.exchange_ranks else owner
        for rank, writer in enumerate(self.writers):
            if (owner == rank).any():
                writer.append(step, {name: values[owner == rank] for name, values in columns.items()})
        if embeddings is not None:
            self._push(step, embeddings[kept], columns["position"][kept], columns["sample_id"][kept], owner[kept])

    def _push(self, step: int, rows: np.ndarray, positions: np.ndarray, ids: np.ndarray, owner: np.ndarray) -> None:
        if self.forge_rows is not None:
            rows = self.forge_rows(step, rows)
        self.digest = hashlib.sha256(self.digest + rows.astype("<f4").tobytes()).digest()
        push = {
            "positions": positions.astype(np.int32),
            "sample_ids": ids.astype(np.int64),
            "push_index": self.pushed + np.arange(len(rows)),
            "embeddings": rows,
        }
        said = {"digest": self.digest, **push}
        if self.forge_push is not None:
            self.forge_push(step, said)
        for rank, writer in enumerate(self.writers):
            mine = owner[: len(said["positions"])] == rank
            if mine.any():
                writer.push(step, digest=said["digest"], **{name: said[name][mine] for name in push})
        self.pushed += len(rows)
        self.memory = np.concatenate([self.memory, rows])[-self.config.buffer_size :]

    def checkpoint(self, step: int) -> NumpyRun:
        heads = [writer.sync() for writer in self.writers]
        for writer in self.writers:
            self.roots[step] = writer.checkpoint(
                step, heads=heads, buffer=self.memory, pushed=self.pushed, buffer_digest=self.digest
            )
        self.states[step] = (heads, self.pushed, self.digest, self.memory, self.samples)
        return self

    def seal(self) -> NumpyRun:
        for writer in self.writers:
            writer.seal()
        return self

    def resume(self, step: int) -> NumpyRun:
        """As if killed now, from the checkpoint at `step`."""
        self.release()
        heads, self.pushed, self.digest, self.memory, self.samples = self.states[step]
        attempt = None
        for rank in range(self.world_size):
            writer = SelectionLogWriter.resume(
                self.root, step=step, head=heads[rank], rank=rank, world_size=self.world_size, attempt=attempt
            )
            attempt = writer.attempt
            self.writers.append(writer)
        return self

    def release(self) -> NumpyRun:
        """Ends as a kill would."""
        for writer in self.writers:
            writer.release()
        self.writers = []
        return self

    def close(self) -> NumpyRun:
        for writer in self.writers:
            writer.close()
        self.writers = []
        return self


def finished(root: Path, *, steps: int = 25, interrupted: bool = False, **settings: Any) -> NumpyRun:
    """A run of 25 steps (two epochs and a bit) in three segments, with checkpoints at 6, 12 and 20, closed in order."""
    names = ("changes", "world_size", "warm", "exchange_ranks", "forge", "forge_rows", "forge_push")
    given = {name: settings.pop(name) for name in names if name in settings}
    run = NumpyRun(root=root, config=selection(**settings), **given).begin()
    run.steps(0, 6).checkpoint(6).seal()
    run.steps(6, 12).checkpoint(12).seal()
    if interrupted:
        run.steps(12, 15).resume(12)
    return run.steps(12, 20).checkpoint(20).steps(20, steps).close()


def rechoose(columns: dict[str, Any], config: SelectionConfig, ranks: int = 1) -> np.ndarray:
    """Puts the choice that the scores in `columns` give; the places of the kept."""
    order = np.argsort(-columns["score"].astype(np.float64), kind="stable")
    k = config.kept(len(order), ranks)
    if config.keep_tokens is not None:
        fits = int((np.cumsum(columns["tokens"][order]) <= config.keep_tokens).sum())
        k = max(ranks, fits // ranks * ranks)
    return choose(columns, np.sort(order[:k]))


def choose(columns: dict[str, Any], kept: np.ndarray) -> np.ndarray:
    """Puts a choice; the places of the kept."""
    count = len(columns["position"])
    columns["selected"] = np.isin(np.arange(count), kept)
    order = np.ma.masked_all(count, np.int32)
    order[kept] = np.arange(len(kept))
    columns["train_order"] = order
    return kept


def rescore(columns: dict[str, Any], config: SelectionConfig) -> None:
    """Puts the score that `intra` and `inter` in `columns` give."""
    alpha = config.resolved_alpha(VOCABULARY)
    columns["score"] = (columns["intra"].astype(np.float64) + alpha * columns["inter"].astype(np.float64)).astype(
        np.float32
    )
