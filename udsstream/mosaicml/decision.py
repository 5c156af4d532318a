"""One step's decision, and the two forms in which it leaves the algorithm: the log's columns and the run's metrics.

B candidates of all ranks in canonical order, d components of an embedding
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from udsstream.mosaicml.dataset import SampleSource, locate
from udsstream.mosaicml.ranks import CanonicalOrder

__all__ = ["Decision"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The candidates of one step, of all ranks in canonical order, and what became of them. Tensors are on the host."""

    order: CanonicalOrder
    """Whose each candidate is."""
    sample_ids: list[int]
    lengths: list[int]
    """Real tokens of each candidate."""
    kept: list[int]
    """Places of the kept candidates, ascending: the order they are trained in."""
    scores: Tensor | None = None
    """(B,) float32. None: selection was off, and all candidates are trained on."""
    intra: Tensor | None = None
    """(B,) float32; None for methods that have none."""
    inter: Tensor | None = None
    """(B,) float32; None for methods that have none."""
    loss: Tensor | None = None
    """(B,) float32, nats per labelled token; None for methods that have none."""
    embeddings: Tensor | None = None
    """(B, d) float32; None for methods that have none."""

    @property
    def selected(self) -> bool:
        """Whether selection was on."""
        return self.scores is not None

    def columns(
        self, *, rank: int, epoch: int, sample_in_epoch: int, source: SampleSource | None
    ) -> dict[str, np.ndarray]:
        """The columns of the selection log that the writer does not fill itself, for the candidates of one rank.

        Args:
            rank: whose candidates.
            epoch: of this step.
            sample_in_epoch: candidates seen in this epoch before this step.
            source: tells in which stream and shard a sample lies; None leaves these columns null.
        """
        count = len(self.sample_ids)
        selected = np.zeros(count, dtype=bool)
        selected[self.kept] = True
        train_order = np.ma.masked_all(count, dtype=np.int32)
        train_order[self.kept] = np.arange(len(self.kept), dtype=np.int32)
        positions = np.arange(count, dtype=np.int32)
        columns: dict[str, np.ndarray] = {
            "epoch": np.full(count, epoch, dtype=np.int32),
            "position": positions,
            "epoch_position": sample_in_epoch + positions.astype(np.int64),
            "sample_id": np.array(self.sample_ids, dtype=np.int64),
            "tokens": np.array(self.lengths, dtype=np.int32),
            "selected": selected,
            "train_order": train_order,
        }
        if source is not None:
            place = locate(source, self.sample_ids)
            columns["stream"] = place.stream.astype(np.int16)
            columns["shard"] = place.shard.astype(np.int32)
            columns["shard_index"] = place.index.astype(np.int32)
        for name, values in (
            ("intra", self.intra),
            ("inter", self.inter),
            ("loss", self.loss),
            ("score", self.scores),
        ):
            if values is not None:
                columns[name] = values.numpy()
        mine = self.order.rank == rank
        return {name: values[mine] for name, values in columns.items()}

    def metrics(self) -> dict[str, float]:
        """What the run's loggers are told of this step."""
        metrics = {
            "selection/candidates": float(len(self.sample_ids)),
            "selection/kept": float(len(self.kept)),
            "selection/candidate_tokens": float(sum(self.lengths)),
            "selection/kept_tokens": float(sum(self.lengths[row] for row in self.kept)),
        }
        if self.scores is not None:
            metrics["selection/score_mean"] = float(self.scores.mean())
            metrics["selection/score_kept_mean"] = float(self.scores[self.kept].mean())
        if self.inter is not None:
            metrics["selection/inter_mean"] = float(self.inter.mean())
        if self.loss is not None:
            metrics["selection/loss_mean"] = float(self.loss.mean())
        return metrics
