"""`CandidateSelector`: what looks at a candidate batch, values it and says which rows to keep; and the memory that it values them by.

`OnlineBatchSelection` trains by its decisions and records them; `ReplaySelection` asks for them again and compares. Deciding changes
nothing, neither the model nor the memory: what was trained on enters the memory by `remember`.

With several ranks each scores its own candidates, and all come to the same decision over the global batch (`ranks.py`).

    B candidates of all ranks, B_r of this one, K kept, d components of an embedding
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from composer.core import State, get_precision_context
from composer.utils import dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from udsstream.config import SelectionConfig
from udsstream.mosaicml.batch import check_candidates, real_tokens, sample_ids_of, scoring_microbatches
from udsstream.mosaicml.decision import Decision
from udsstream.mosaicml.ranks import (
    CanonicalOrder,
    GatheredCandidates,
    canonical_order,
    from_rank_zero,
    gather_candidates,
    gather_embeddings,
)
from udsstream.mosaicml.trunk import ModelParts, ScoringForm, choose_form, neutral
from udsstream.scoring import methods
from udsstream.scoring.embedding_buffer import EmbeddingBuffer
from udsstream.scoring.projection import BilinearProjection
from udsstream.scoring.scorer import CandidateScorer, CandidateScores
from udsstream.scoring.select import check_finite, top_k

__all__ = ["CandidateSelector", "forward_cost", "unwrapped"]

log = logging.getLogger(__name__)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself: calling DistributedDataParallel's wrapper for scoring would start collectives that training does not expect."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def forward_cost(device: torch.device) -> int | None:
    """What a forward costs beside its tokens, in tokens; see `scoring_microbatches`.

    On 2 CPU cores a forward of SmolLM2 takes about as much longer than its tokens as 45 tokens take. Nothing was measured elsewhere; where
    launching kernels is what a small forward waits for, few forwards are right.
    """
    return 48 if device.type == "cpu" else None


class CandidateSelector:
    """Scores, chooses, remembers.

    Args:
        config: the selection's settings.
        model: as it is trained, unwrapped.
        trunk, head: dotted names of modules, see `OnlineBatchSelection`.

    Attributes:
        buffer: the memory, empty at first.
        alpha: weight of `inter`, in the units of the projection.
        vocab_size: V, rows of the head.
        projection: from logits to embeddings.

    Raises:
        ModelError: the model has no trunk and head that can be told apart.
    """

    def __init__(self, config: SelectionConfig, model: nn.Module, *, trunk: str | None, head: str | None) -> None:
        self.config = config
        self._parts = ModelParts(model, trunk=trunk, head=head)
        self.vocab_size = self._parts.vocab_size
        self.alpha = config.resolved_alpha(self.vocab_size)
        self.projection = BilinearProjection.draw(
            vocab_size=self.vocab_size,
            max_seq_len=config.max_seq_len,
            dims=config.projection_dims,
            scale=config.projection_scale,
            seed=config.seed,
        )
        self._scorer = CandidateScorer(self.projection, length_norm=config.length_norm)
        self._form: ScoringForm | None = None
        self._capacity: int | None = None
        self._device = next(model.parameters()).device
        self.buffer = EmbeddingBuffer.empty(config.buffer_size, config.embedding_dim, device=self._device)

    # The memory -------------------------------------------------------------------------------------------------------

    def memory_state(self) -> dict[str, Any]:
        """The memory as a checkpoint keeps it."""
        buffer = self.buffer
        return {"rows": buffer.oldest_first().cpu(), "pushed": buffer.pushed, "digest": buffer.digest}

    def restore_memory(self, memory: Mapping[str, Any]) -> None:
        """Puts back what `memory_state` returned."""
        self.buffer = EmbeddingBuffer.restore(
            memory["rows"],
            pushed=memory["pushed"],
            digest=memory["digest"],
            capacity=self.config.buffer_size,
            device=self._device,
        )

    def take_over(self, former: np.ndarray) -> Tensor:
        """Begins with the newest of a former run's embeddings, (m, d) oldest first; returns those that fit, (k, d) float32."""
        count = min(len(former), self.config.buffer_size)
        rows = torch.from_numpy(np.array(former[len(former) - count :], dtype=np.float32))
        self.buffer.push(rows)
        return rows

    # One step ---------------------------------------------------------------------------------------------------------

    def decide(self, state: State, *, selects: bool, epoch: int, batch_in_epoch: int) -> Decision:
        """Which of the candidates in `state.batch` are kept, and why. Changes nothing.

        Args:
            selects: whether selection is on at this step; all candidates are kept where it is not.
            epoch, batch_in_epoch: coordinates of `method="random"`'s draw.

        Raises:
            DataError: the batch cannot be scored or trained on.
            ScoreError: a score is not a finite number.
        """
        ids = sample_ids_of(state.batch)
        mask = real_tokens(state.batch)
        lengths = check_candidates(state.batch, mask, ids, self.config.max_seq_len)
        nothing = torch.zeros(len(ids))
        intra, inter, embeddings = nothing, nothing, None
        has_terms = selects and self.config.method != "random"
        if has_terms:
            scored = self._score(state, mask, lengths)
            embeddings = scored.embeddings
            intra, inter = scored.intra.cpu(), self.buffer.mean_distance(embeddings).cpu()
        known = self._gather(ids, lengths, intra, inter, state)
        everyone = {"order": known.order, "sample_ids": known.sample_ids, "lengths": known.lengths}
        if not selects:
            return Decision(**everyone, kept=list(range(len(known.order))))
        if has_terms:
            scores = methods.uds(known.intra, known.inter, self.alpha)
        else:
            scores = methods.random(len(known.order), seed=self.config.seed, epoch=epoch, batch=batch_in_epoch)
        check_finite(scores, known.sample_ids)
        return Decision(
            **everyone,
            kept=self._choose(scores, known.order),
            scores=scores,
            intra=known.intra if has_terms else None,
            inter=known.inter if has_terms else None,
            embeddings=embeddings,
        )

    def remember(self, decision: Decision, kept: Sequence[int]) -> Tensor | None:
        """Adds the embeddings of the kept candidates, of all ranks, to the memory. Every rank must call it.

        Returns:
            (K, d) float32 on the host, in the order in which they entered; None where the method has none.
        """
        if decision.embeddings is None:
            return None
        if dist.get_world_size() == 1:
            rows = decision.embeddings[list(kept)].float().cpu()
        else:
            rows = gather_embeddings(decision.embeddings, decision.order, kept, device=self._device)
        self.buffer.push(rows)
        return rows

    def _choose(self, scores: Tensor, order: CanonicalOrder) -> list[int]:
        """Canonical places of the kept candidates, ascending."""
        ranks = dist.get_world_size()
        kept = self.config.kept(len(order), ranks)
        if self.config.scope == "global" or ranks == 1:
            return top_k(scores, kept).tolist()
        chosen: list[int] = []
        for rank in range(ranks):
            own = order.of(rank)
            chosen += own[top_k(scores[torch.from_numpy(own)], kept // ranks).numpy()].tolist()
        return sorted(chosen)

    def _gather(
        self, ids: list[int], lengths: list[int], intra: Tensor, inter: Tensor, state: State
    ) -> GatheredCandidates:
        if dist.get_world_size() == 1:
            order = canonical_order([len(ids)], 1)
            return GatheredCandidates(order=order, sample_ids=ids, lengths=lengths, intra=intra, inter=inter)
        if self._capacity is None:
            most = state.device.tensor_to_device(torch.tensor([len(ids)]))
            dist.all_reduce(most, reduce_operation="MAX")
            self._capacity = int(most)
        return gather_candidates(ids, lengths, intra, inter, capacity=self._capacity, device=self._device)

    def _score(self, state: State, mask: Tensor, lengths: list[int]) -> CandidateScores:
        """intra (B,) and embeddings (B, d) of the candidates, in their order."""
        parts = self._parts
        intra: list[Tensor] = [torch.empty(0)] * len(lengths)
        embeddings: list[Tensor] = [torch.empty(0)] * len(lengths)
        with neutral(parts.model), get_precision_context(state.precision, state.precision_config):
            for rows, packed in scoring_microbatches(
                state.batch,
                mask,
                lengths,
                self.config.score_microbatch_tokens,
                forward_cost=forward_cost(self._device),
            ):
                on_device = state.device.batch_to_device(packed)
                if self._form is None:
                    # Each rank has looked at another candidate, but all must score alike.
                    self._form = from_rank_zero(choose_form(parts, on_device))
                    log.info("Candidates are scored as %s.", self._form)
                matrices = self._matrices(on_device, self._form)
                unpadded = [matrices[place, : lengths[row]] for place, row in enumerate(rows)]
                # The scores' own arithmetic is not to be autocast: float32 throughout.
                with torch.autocast(device_type=matrices.device.type, enabled=False):
                    if self._form.form == "logits":
                        part = self._scorer.score_logits(unpadded)
                    else:
                        part = self._scorer.score_hidden(unpadded, parts.head(self._form), version=parts.head_version())
                for place, row in enumerate(rows):
                    intra[row] = part.intra[place]
                    embeddings[row] = part.embeddings[place]
        return CandidateScores(intra=torch.stack(intra), embeddings=torch.stack(embeddings))

    def _matrices(self, packed: Mapping[str, Any], form: ScoringForm) -> Tensor:
        """Hidden states (b, N, D), or logits (b, N, V) where nothing else will do."""
        if form.form != "logits":
            return self._parts.hidden_states(packed)
        logits = self._parts.hidden_states_and_logits(packed)[1]
        assert logits is not None, "choose_form takes the logits form only for a model that shows its logits"
        return logits
