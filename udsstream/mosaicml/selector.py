"""`CandidateSelector`: what looks at a candidate batch, values it and says which rows to keep; and the memory that it values them by.

`OnlineBatchSelection` trains by its decisions and records them; `ReplaySelection` asks for them again and compares. Deciding changes
nothing, neither the model nor the memory: what was trained on enters the memory by `remember`.

With several ranks each scores its own candidates, and all come to the same decision over the global batch (`ranks.py`).

Per step the host waits for the device once, when all that was scored comes to it (`ranks.fetch`).

    B candidates of all ranks, B_r of this one, K kept, d components of an embedding
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from composer.core import Precision, State, get_precision_context
from composer.devices import Device
from composer.utils import dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from udsstream.config import SelectionConfig
from udsstream.errors import DataError
from udsstream.mosaicml.batch import check_candidates, real_tokens, sample_ids_of, scoring_microbatches
from udsstream.mosaicml.decision import Decision
from udsstream.mosaicml.ranks import (
    CanonicalOrder,
    GatheredCandidates,
    from_rank_zero,
    gather_candidates,
    greatest_over_ranks,
)
from udsstream.mosaicml.trunk import ModelParts, ScoringForm, choose_form, neutral
from udsstream.scoring import methods
from udsstream.scoring.embedding_buffer import EmbeddingBuffer
from udsstream.scoring.lm_head import LMHead
from udsstream.scoring.losses import IGNORED_LABEL, mean_losses, mean_losses_from_logits
from udsstream.scoring.projection import BilinearProjection
from udsstream.scoring.scorer import CandidateScorer
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
        device: that batches are scored on.
        precision, precision_config: of the scoring forward; Composer's terms, as training's.
        trunk, head: dotted names of modules, see `OnlineBatchSelection`.

    Attributes:
        buffer: the memory, empty at first.
        alpha: weight of `inter`, in the units of the projection.
        vocab_size: V, rows of the head.
        projection: from logits to embeddings.

    Raises:
        ModelError: the model has no trunk and head that can be told apart.
    """

    def __init__(
        self,
        config: SelectionConfig,
        model: nn.Module,
        *,
        device: Device,
        precision: Precision = Precision.FP32,
        precision_config: dict[str, Any] | None = None,
        trunk: str | None = None,
        head: str | None = None,
    ) -> None:
        self.config = config
        self._to_device = device
        self._precision = (precision, precision_config)
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
        self._scored_steps = 0
        self._last_version: Hashable = None
        self._changes = 0
        self._device = next(model.parameters()).device
        self.buffer = EmbeddingBuffer.empty(config.buffer_size, config.embedding_dim, device=self._device)

    @classmethod
    def of_trainer(
        cls, config: SelectionConfig, state: State, *, trunk: str | None, head: str | None
    ) -> CandidateSelector:
        """For the model that a Trainer trains, on its device and in its precision."""
        return cls(
            config,
            unwrapped(state.model),
            device=state.device,
            precision=state.precision,
            precision_config=state.precision_config,
            trunk=trunk,
            head=head,
        )

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

    def decide(self, batch: Mapping[str, Any], *, selects: bool, epoch: int, batch_in_epoch: int) -> Decision:
        """Which of the candidates of all ranks' batches are kept, and why. Changes nothing. Every rank must call it.

        Args:
            batch: this rank's candidates, on the host, as its data loader yields them.
            selects: whether selection is on at this step; all candidates are kept where it is not.
            epoch, batch_in_epoch: coordinates of `method="random"`'s draw.

        Raises:
            DataError: the batch cannot be scored or trained on.
            ScoreError: a score is not a finite number.
        """
        ids = sample_ids_of(batch)
        mask = real_tokens(batch)
        lengths = check_candidates(batch, mask, ids, self.config.max_seq_len)
        if "loss" in self.config.measures:
            self._check_labels(batch, mask, ids)
        measured: dict[str, Tensor] = {}
        embeddings = None
        if selects and self.config.measures:
            measured, embeddings = self._measure(batch, mask, lengths)
        if self._capacity is None:
            [self._capacity] = greatest_over_ranks([len(ids)])
        known = gather_candidates(ids, lengths, measured, embeddings, capacity=self._capacity, device=self._device)
        everyone = {"order": known.order, "sample_ids": known.sample_ids, "lengths": known.lengths}
        if not selects:
            return Decision(**everyone, kept=list(range(len(known.order))))
        scores = self._scores(known, epoch=epoch, batch_in_epoch=batch_in_epoch)
        check_finite(scores, known.sample_ids)
        return Decision(
            **everyone,
            kept=self._choose(scores, known.order),
            scores=scores,
            intra=known.measured.get("intra"),
            inter=known.measured.get("inter"),
            loss=known.measured.get("loss"),
            embeddings=known.embeddings,
        )

    def remember(self, decision: Decision, kept: Sequence[int]) -> Tensor | None:
        """Adds the embeddings of the kept candidates, of all ranks, to the memory.

        Returns:
            (K, d) float32 on the host, in the order in which they entered; None where the method has none.
        """
        if decision.embeddings is None:
            return None
        rows = decision.embeddings[list(kept)]
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

    def _check_labels(self, batch: Mapping[str, Any], mask: Tensor, ids: Sequence[int]) -> None:
        """Raises DataError when there is a candidate whose loss cannot be asked for."""
        labels = batch.get("labels")
        if not (isinstance(labels, Tensor) and labels.shape == mask.shape):
            found = tuple(labels.shape) if isinstance(labels, Tensor) else ", ".join(map(str, batch))
            raise DataError(
                f"method={self.config.method!r} needs 'labels' of shape {tuple(mask.shape)} in the batch (found: {found}); let the "
                f"collator give one for each token, {IGNORED_LABEL} where no loss is computed"
            )
        asked = (mask[:, :-1] & mask[:, 1:] & (labels[:, 1:] != IGNORED_LABEL)).any(dim=1)
        if not bool(asked.all()):
            row = int((~asked).nonzero()[0])
            raise DataError(
                f"of sample {ids[row]} (row {row} of the batch) no token but the first has a label, and nothing comes before that one to "
                f"predict it from, so method={self.config.method!r} finds no loss; leave it out of the stream"
            )

    def _scores(self, known: GatheredCandidates, *, epoch: int, batch_in_epoch: int) -> Tensor:
        """(B,) float32 on the host: what the method makes of what was measured."""
        measured = known.measured
        match self.config.method:
            case "uds":
                return methods.uds(measured["intra"], measured["inter"], self.alpha)
            case "uds_intra":
                return methods.uds_intra(measured["intra"], measured["inter"])
            case "uds_inter":
                return methods.uds_inter(measured["intra"], measured["inter"])
            case "max_loss":
                return methods.by_loss(measured["loss"])
            case "longest":
                return methods.by_length(known.lengths)
            case "random":
                return methods.random(len(known.order), seed=self.config.seed, epoch=epoch, batch=batch_in_epoch)

    def _measure(
        self, batch: Mapping[str, Any], mask: Tensor, lengths: list[int]
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What the method measures of this rank's candidates, (B_r,) each on the device, and their embeddings (B_r, d) if it has any."""
        if not self.config.remembers:
            return {"loss": self._per_candidate(batch, mask, lengths, self._losses, width=0)}, None
        numbers = self._per_candidate(batch, mask, lengths, self._uds, width=1 + self.config.embedding_dim)
        embeddings = numbers[:, 1:]
        return {"intra": numbers[:, 0], "inter": self.buffer.mean_distance(embeddings)}, embeddings

    def _uds(self, matrices: list[Tensor], labels: list[Tensor], head: LMHead | None, version: Hashable) -> Tensor:
        """(b, 1 + d): intra and embedding."""
        del labels
        if head is None:
            found = self._scorer.score_logits(matrices)
        else:
            found = self._scorer.score_hidden(matrices, head, version=version)
        return torch.cat([found.intra[:, None], found.embeddings], dim=1)

    def _losses(self, matrices: list[Tensor], labels: list[Tensor], head: LMHead | None, version: Hashable) -> Tensor:
        """(b,): the mean loss."""
        del version
        return mean_losses_from_logits(matrices, labels) if head is None else mean_losses(matrices, labels, head)

    def _per_candidate(
        self,
        batch: Mapping[str, Any],
        mask: Tensor,
        lengths: list[int],
        measure: Callable[[list[Tensor], list[Tensor], LMHead | None, Hashable], Tensor],
        *,
        width: int,
    ) -> Tensor:
        """Runs the trunk over this rank's candidates and puts what `measure` says of each into their order.

        Args:
            measure: hidden states (N, D) or logits (N, V) of some candidates, their labels (N,) on the host, the head (None: logits) and
                what its factors are kept by → (b, width), or (b,) for width 0.
        """
        parts = self._parts
        found: list[Tensor] = [torch.empty(0)] * len(lengths)
        runs = list(
            scoring_microbatches(
                batch,
                mask,
                lengths,
                self.config.score_microbatch_tokens,
                forward_cost=None if parts.is_sharded else forward_cost(self._device),
            )
        )
        with neutral(parts.model), get_precision_context(*self._precision):
            if self._form is None:
                # Each rank has looked at another candidate, but all must score alike. (Of a batch smaller than the number of ranks the
                # last ones have none.)
                form = choose_form(parts, self._to_device.batch_to_device(runs[0][1])) if runs else None
                self._form = from_rank_zero(form)
                assert self._form is not None, "rank 0 has the first candidate of every batch"
                log.info("Candidates are scored as %s.", self._form)
            head, version = self._head_of_step(self._form, lengths)
            if parts.is_sharded:
                # Each forward gathers the weights from all ranks, so all must make as many: the last one again, to no effect. And what was
                # kept of the head is made anew on all ranks or on none.
                [most, changed] = greatest_over_ranks([len(runs), version != self._last_version])
                runs += runs[-1:] * (most - len(runs))
                self._last_version = version
                self._changes += changed
                version = ("changes", self._changes)
            for rows, packed in runs:
                matrices = self._matrices(self._to_device.batch_to_device(packed), self._form)
                unpadded = [matrices[place, : lengths[row]] for place, row in enumerate(rows)]
                labels = [
                    packed["labels"][place, : lengths[row]] for place, row in enumerate(rows) if "labels" in packed
                ]
                # The scores' own arithmetic is not to be autocast: float32 throughout.
                with torch.autocast(device_type=matrices.device.type, enabled=False):
                    part = measure(unpadded, labels, head, version)
                for place, row in enumerate(rows):
                    found[row] = part[place]
        if not lengths:
            return torch.empty((0, width) if width else (0,), device=self._device)
        return torch.stack(found)

    def _head_of_step(self, form: ScoringForm, lengths: list[int]) -> tuple[LMHead | None, Hashable]:
        """The head as it is at this step, and what its factors are kept by; None where logits are scored."""
        if form.form == "logits":
            return None, None
        head, version = self._parts.head(form), self._parts.head_version()
        self._scored_steps += 1
        if version is None and not self._scorer.takes_slices(head, lengths):
            # It trains, but not within a step: its factors serve all of the step's forwards.
            version = ("step", self._scored_steps)
        return head, version

    def _matrices(self, packed: Mapping[str, Any], form: ScoringForm) -> Tensor:
        """Hidden states (b, N, D), or logits (b, N, V) where nothing else will do."""
        if form.form != "logits":
            return self._parts.hidden_states(packed)
        logits = self._parts.hidden_states_and_logits(packed)[1]
        assert logits is not None, "choose_form takes the logits form only for a model that shows its logits"
        return logits
