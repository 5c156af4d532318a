"""One decision into the log and the memory: what a training run (`algorithm.py`) and a scoring pass (`scoring_pass.py`) both do.

Which log that is, and from where on, is `run_log.py`'s.

    K kept, k of them loaded by this rank, d components of an embedding
"""

from __future__ import annotations

import numpy as np
import torch
from composer.utils import dist
from torch import Tensor

from udsstream.mosaicml.dataset import SampleSource
from udsstream.mosaicml.decision import Decision
from udsstream.mosaicml.selector import CandidateSelector
from udsstream.selection_log.writer import SelectionLogWriter

__all__ = ["record", "record_push"]


def record(
    step: int,
    decision: Decision,
    *,
    selector: CandidateSelector,
    writer: SelectionLogWriter | None,
    source: SampleSource | None,
    epoch: int,
    sample_in_epoch: int,
) -> None:
    """Adds the decision to the log, and the embeddings of the kept to the memory. Every rank must call it.

    Args:
        step: of the log.
        decision: of all ranks' candidates.
        selector: whose memory they enter.
        writer: None: no log.
        source: tells where a sample lies; None leaves these columns null.
        epoch: of this step.
        sample_in_epoch: candidates seen in this epoch before this step.
    """
    rank = dist.get_global_rank()
    if writer is not None:
        columns = decision.columns(
            rank=rank,
            epoch=epoch,
            sample_in_epoch=sample_in_epoch,
            source=source,
            interactions=writer.interactions,
        )
        if len(columns["sample_id"]):  # of a last batch a rank may have brought none
            writer.append(step, columns)
    embeddings = selector.remember(decision, decision.kept)
    if embeddings is None:
        return
    places = np.array(decision.kept, dtype=np.int32)
    mine = decision.order.rank[places] == rank
    record_push(
        step,
        embeddings[torch.from_numpy(mine)],
        selector=selector,
        writer=writer,
        positions=places[mine],
        sample_ids=np.array(decision.sample_ids, dtype=np.int64)[places[mine]],
        push_index=selector.buffer.pushed - len(places) + np.flatnonzero(mine),
    )


def record_push(
    step: int,
    embeddings: Tensor,
    *,
    selector: CandidateSelector,
    writer: SelectionLogWriter | None,
    positions: np.ndarray,
    sample_ids: np.ndarray,
    push_index: np.ndarray,
) -> None:
    """Adds embeddings (k, d) that this rank contributed to the memory to the log, with the memory's new digest."""
    if writer is not None and len(embeddings):
        writer.push(
            step,
            positions=positions,
            sample_ids=sample_ids,
            push_index=push_index,
            embeddings=embeddings.numpy(),
            digest=selector.buffer.digest,
        )
