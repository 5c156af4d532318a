"""The losses that a reference model had on the samples, for `method="rho_loss"`: from a log that recorded them, or given.

A pass over the stream with the reference model records them once (docs/methods.md), so that no second model runs while training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from udsstream.errors import ConfigError, DataError
from udsstream.mosaicml.dataset import StreamIdentity
from udsstream.selection_log.reader import SelectionLog

__all__ = ["ReferenceLosses"]


class ReferenceLosses:
    """Sample id → mean loss per labelled token, nats.

    Args:
        losses: of each sample, by the ids of the data set that is trained on.
        tokens: how many tokens without padding each of these samples had then; None: not known.
        origin: what they come from, for messages and records.
        streams: index digests of the streams that the ids are counted over, in order; None: not known.
    """

    def __init__(
        self,
        losses: Mapping[int, float],
        *,
        tokens: Mapping[int, int] | None = None,
        origin: str = "given",
        streams: Sequence[str] | None = None,
    ) -> None:
        self._ids = np.array(sorted(losses), np.int64)
        self._losses = np.array([losses[sample] for sample in self._ids.tolist()], np.float32)
        self._tokens = None if tokens is None else np.array([tokens[sample] for sample in self._ids.tolist()], np.int64)
        self._origin, self._streams = origin, None if streams is None else list(streams)
        if not len(self._ids) or not np.isfinite(self._losses).all():
            what = "none" if not len(self._ids) else f"{int((~np.isfinite(self._losses)).sum())} that are not finite"
            raise ConfigError(
                f"reference losses ({origin}): found {what}; give a finite loss for each sample of the stream"
            )

    @classmethod
    def from_log(cls, folder: str | Path) -> ReferenceLosses:
        """Those that a run, or a scoring pass of `method=max_loss`, recorded; of a sample with several its mean.

        Raises:
            ConfigError: the log records no loss.
            LogError: it cannot be read.
        """
        log = SelectionLog.open(folder)
        table = log.table(columns=["sample_id", "loss", "tokens"])
        known = table.filter(table.column("loss").is_valid())
        if not known.num_rows:
            raise ConfigError(
                f"reference: the log in {folder} records no losses (its method is {(log.run.get('selection') or {}).get('method')}); "
                "make one with udsstream curate --score STREAM --model REFERENCE selection.method=max_loss"
            )
        # On one thread: pyarrow promises no order of rows or sums on several, and the digest of these losses names them.
        each = known.group_by("sample_id", use_threads=False).aggregate([("loss", "mean"), ("tokens", "max")])
        ids = each["sample_id"].to_pylist()
        streams = [stream["index_sha256"] for stream in log.run.get("streams") or []]
        return cls(
            dict(zip(ids, each["loss_mean"].to_pylist(), strict=True)),
            tokens=dict(zip(ids, each["tokens_max"].to_pylist(), strict=True)),
            origin=str(folder),
            streams=streams or None,
        )

    @property
    def sha256(self) -> str:
        """Of ids and losses: int64 and float32, little-endian, by id; hexadecimal."""
        return hashlib.sha256(self._ids.tobytes() + self._losses.tobytes()).hexdigest()

    def describe(self) -> dict[str, object]:
        """For run.json."""
        return {"origin": self._origin, "samples": len(self._ids), "sha256": self.sha256}

    def check_streams(self, streams: Sequence[StreamIdentity]) -> None:
        """Raises ConfigError when the ids are those of other streams."""
        found = [stream.index_sha256 for stream in streams]
        if self._streams is not None and streams and found != self._streams:
            raise ConfigError(
                f"reference: {self._origin} recorded the losses of other streams than those trained on (index digests "
                f"{', '.join(digest[:12] for digest in self._streams)}; here {', '.join(digest[:12] for digest in found)}), so its ids "
                "name other samples; make the pass over the same streams, in the same order"
            )

    def of(self, sample_ids: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """(B,) float32 on the host.

        Args:
            sample_ids: B candidates.
            tokens: how many tokens without padding each of them has here.

        Raises:
            DataError: a sample has none, or its loss is of another number of tokens, so of another text; the message names some.
        """
        ids = np.asarray(sample_ids, np.int64)
        place = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        missing = ids[self._ids[place] != ids]
        if len(missing):
            raise DataError(
                f"{len(missing)} of {len(ids)} candidates have no reference loss in {self._origin} ({len(self._ids)} samples): "
                f"{', '.join(map(str, missing[:8].tolist()))}; record the losses of the whole stream"
            )
        if self._tokens is not None:
            others = np.flatnonzero(self._tokens[place] != np.asarray(tokens, np.int64))
            if len(others):
                named = (f"sample {ids[i]} has {tokens[i]}, had {self._tokens[place[i]]}" for i in others[:4].tolist())
                raise DataError(
                    f"{len(others)} of {len(ids)} candidates have another number of tokens than when {self._origin} recorded their "
                    f"reference losses ({'; '.join(named)}), so these are losses of other texts; make the pass with this run's "
                    "tokenizer, columns and format (data.*) and max_seq_len"
                )
        return torch.from_numpy(self._losses[place])
