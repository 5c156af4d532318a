"""One step's decision, and the form in which it enters the log: columns. (The run's metrics: `metrics.py`.)

B candidates of all ranks in canonical order, d components of an embedding
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    """(B,) float32 each, by the names of the log's columns; what the method measures of each candidate."""
    interaction: Tensor | None = None
    """(B_r, B_r) float32 of *this rank's* candidates alone; None for methods that have none."""
    embeddings: Tensor | None = None
    """(B, d) float32; None for methods that have none."""

    @property
    def selected(self) -> bool:
        """Whether selection was on."""
        return self.scores is not None

    def columns(
        self,
        *,
        rank: int,
        epoch: int,
        sample_in_epoch: int,
        source: SampleSource | None,
        interactions: int | None = None,
    ) -> dict[str, np.ndarray]:
        """The columns of the selection log that the writer does not fill itself, for the candidates of one rank.

        Args:
            rank: whose candidates; this one's where the decision has an interaction.
            epoch: of this step.
            sample_in_epoch: candidates seen in this epoch before this step.
            source: tells in which stream and shard a sample lies; None leaves these columns null.
            interactions: numbers of the column `interaction`, if the log has it.
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
        columns |= {name: values.numpy() for name, values in self.measured.items()}
        if self.scores is not None:
            columns["score"] = self.scores.numpy()
        own = self.order.of(rank)
        columns = {name: values[np.sort(own)] for name, values in columns.items()}
        if self.interaction is not None:
            assert interactions is not None, "a log of this method has the column"
            # Its rows and columns are in the order of the rank's batch; so are its candidates in canonical order.
            padded = np.zeros((len(own), interactions), np.float32)
            padded[:, : len(own)] = self.interaction.numpy()
            columns["interaction"] = padded
        return columns
