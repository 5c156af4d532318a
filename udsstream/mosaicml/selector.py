"""`CandidateSelector`: what looks at a candidate batch, values it and says which rows to keep; and the memory that it values them by.

`OnlineBatchSelection` trains by its decisions and records them; `ReplaySelection` asks for them again and compares. Deciding changes
nothing, neither the model nor the memory: what was trained on enters the memory by `remember`.

With several ranks each scores its own candidates, and all come to the same decision over the global batch (`ranks.py`).

Per step the host waits for the device once, when all that was scored comes to it (`ranks.fetch`); methods that compare the candidates with
each other wait once more, with several ranks.

    B candidates of all ranks, B_r of this one, K kept, d components of an embedding
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from composer.core import Precision, State
from composer.devices import Device
from composer.utils import dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from udsstream.config import MEASURES as MEASURED
from udsstream.config import SelectionConfig
from udsstream.errors import ConfigError, DataError
from udsstream.mosaicml.batch import check_candidates, real_tokens, sample_ids_of
from udsstream.mosaicml.decision import Decision
from udsstream.mosaicml.measuring import CandidateMeasurer
from udsstream.mosaicml.method_inputs import MethodInputs
from udsstream.mosaicml.ranks import (
    GatheredCandidates,
    fetch,
    gather_candidates,
    greatest_over_ranks,
)
from udsstream.mosaicml.trunk import ModelParts, ScoringForm
from udsstream.scoring.candidates import Candidates, checked_scores
from udsstream.scoring.embedding_buffer import EmbeddingBuffer
from udsstream.scoring.losses import IGNORED_LABEL
from udsstream.scoring.methods import METHODS
from udsstream.scoring.projection import BilinearProjection
from udsstream.scoring.scorer import CandidateScorer
from udsstream.scoring.select import check_finite, top_k, within_budget

__all__ = ["CandidateSelector", "unwrapped"]

log = logging.getLogger(__name__)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself: calling DistributedDataParallel's wrapper for scoring would start collectives that training does not expect."""
    return model.module if isinstance(model, DistributedDataParallel) else model


class CandidateSelector:
    """Scores, chooses, remembers.

    Args:
        config: the selection's settings.
        model: as it is trained, unwrapped.
        device: that batches are scored on.
        precision, precision_config: of the scoring forward; Composer's terms, as training's.
        trunk, head: dotted names of modules, see `OnlineBatchSelection`.
        inputs: what the method needs beside the candidates. None: nothing.

    Attributes:
        buffer: the memory, empty at first.
        alpha: weight of `inter`, in the units of the projection.
        vocab_size: V, rows of the head.
        projection: from logits to embeddings.

    Raises:
        ModelError: the model has no trunk and head that can be told apart.
        ConfigError: the method needs what was not given, or cannot choose over several ranks or sharded parameters.
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
        inputs: MethodInputs | None = None,
    ) -> None:
        inputs = inputs or MethodInputs.of(config, reference=None, validation=None)
        if config.compares and config.scope == "global" and dist.get_world_size() > 1:
            raise ConfigError(
                f"method={config.method_name!r} compares candidates' gradients with each other, which ranks do not exchange (each is as "
                "large as the head); set scope='rank', so that each rank chooses among its own"
            )
        self.config = config
        self._reference = inputs.reference
        self._method = config.method if callable(config.method) else METHODS[config.method]
        parts = ModelParts(model, trunk=trunk, head=head)
        self.vocab_size = parts.vocab_size
        self.alpha = config.resolved_alpha(self.vocab_size)
        self.projection = BilinearProjection.draw(
            vocab_size=self.vocab_size,
            max_seq_len=config.max_seq_len,
            dims=config.projection_dims,
            scale=config.projection_scale,
            seed=config.seed,
        )
        self._measurer = CandidateMeasurer(
            config,
            parts,
            CandidateScorer(self.projection, length_norm=config.length_norm),
            device=device,
            precision=precision,
            precision_config=precision_config,
            validation=inputs.validation,
        )
        self._capacity: int | None = None
        self._device = next(model.parameters()).device
        self.buffer = EmbeddingBuffer.empty(config.buffer_size, config.embedding_dim, device=self._device)

    @property
    def form(self) -> ScoringForm | None:
        """How candidates are scored with this model; None before the first forward."""
        return self._measurer.form

    @classmethod
    def of_trainer(cls, config: SelectionConfig, state: State, **named: Any) -> CandidateSelector:
        """For the model that a Trainer trains, on its device and in its precision; `named` are the other arguments."""
        return cls(
            config,
            unwrapped(state.model),
            device=state.device,
            precision=state.precision,
            precision_config=state.precision_config,
            **named,
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

    def decide(
        self,
        batch: Mapping[str, Any],
        *,
        selects: bool,
        epoch: int,
        batch_in_epoch: int,
        learning_rate: float | None = None,
    ) -> Decision:
        """Which of the candidates of all ranks' batches are kept, and why. Changes nothing. Every rank must call it.

        Args:
            batch: this rank's candidates, on the host, as its data loader yields them.
            selects: whether selection is on at this step; all candidates are kept where it is not.
            epoch, batch_in_epoch: coordinates of the draw of a method that draws.
            learning_rate: of this step, for `method="greats"`.

        Raises:
            DataError: the batch cannot be scored or trained on.
            ScoreError: a score is not a finite number.
        """
        config = self.config
        ids = sample_ids_of(batch)
        mask = real_tokens(batch)
        lengths = check_candidates(batch, mask, ids, config.max_seq_len)
        measured: dict[str, Tensor] = {}
        embeddings = interaction = None
        coordinates = {"alpha": self.alpha, "seed": config.seed, "epoch": epoch, "batch": batch_in_epoch}
        if selects and config.measures:
            if self._needs_labels:
                self._check_labels(batch, mask, ids)
            measured, embeddings, interaction = self._measure(batch, mask, lengths, ids, learning_rate)
            if interaction is not None:
                # What a candidate is worth beside the others of its rank is known here alone; its place in their order is for all.
                own = {"interaction": interaction} | {name: fetch(values) for name, values in measured.items()}
                tokens = torch.tensor(lengths)
                ranked = self._method(Candidates(sample_ids=ids, tokens=tokens, measured=own, **coordinates))
                measured["score"] = ranked.to(self._device)
        if self._capacity is None:
            [self._capacity] = greatest_over_ranks([len(ids)])
        known = gather_candidates(ids, lengths, measured, embeddings, capacity=self._capacity, device=self._device)
        everyone = {"order": known.order, "sample_ids": known.sample_ids, "lengths": known.lengths}
        if not selects or config.method == "full":
            return Decision(**everyone, kept=list(range(len(known.order))))
        scores = known.measured.pop("score", None)
        for values in known.measured.values():
            check_finite(values, known.sample_ids)
        if scores is None:
            candidates = Candidates(
                sample_ids=known.sample_ids,
                tokens=torch.tensor(known.lengths),
                measured=known.measured,
                embeddings=known.embeddings,
                share=self._share(known),
                **coordinates,
            )
            scores = checked_scores(self._method(candidates), len(known.order), config.method_name)
        check_finite(scores, known.sample_ids)
        return Decision(
            **everyone,
            kept=self._choose(scores, known),
            scores=scores,
            measured=known.measured,
            interaction=interaction,
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

    def _choose(self, scores: Tensor, known: GatheredCandidates) -> list[int]:
        """Canonical places of the kept candidates, ascending."""
        ranks, order = dist.get_world_size(), known.order
        if self.config.keep_tokens is not None:
            return within_budget(scores, known.lengths, self.config.keep_tokens, multiple_of=ranks).tolist()
        kept = self.config.kept(len(order), ranks)
        if self.config.scope == "global" or ranks == 1:
            return top_k(scores, kept).tolist()
        chosen: list[int] = []
        for rank in range(ranks):
            own = order.of(rank)
            chosen += own[top_k(scores[torch.from_numpy(own)], kept // ranks).numpy()].tolist()
        return sorted(chosen)

    def _share(self, known: GatheredCandidates) -> float:
        """The share of the candidates that is kept, or of their tokens."""
        if self.config.keep_tokens is not None:
            return min(1.0, self.config.keep_tokens / sum(known.lengths))
        return self.config.kept(len(known.order), dist.get_world_size()) / len(known.order)

    @property
    def _needs_labels(self) -> bool:
        return not {"loss", "grad_norm", "alignment", "interaction"}.isdisjoint(self.config.measures)

    def _check_labels(self, batch: Mapping[str, Any], mask: Tensor, ids: Sequence[int]) -> None:
        """Raises DataError when there is a candidate whose loss cannot be asked for."""
        labels = batch.get("labels")
        if not (isinstance(labels, Tensor) and labels.shape == mask.shape):
            found = tuple(labels.shape) if isinstance(labels, Tensor) else ", ".join(map(str, batch))
            raise DataError(
                f"method={self.config.method_name!r} needs 'labels' of shape {tuple(mask.shape)} in the batch (found: {found}); let the "
                f"collator give one for each token, {IGNORED_LABEL} where no loss is computed"
            )
        asked = (mask[:, :-1] & mask[:, 1:] & (labels[:, 1:] != IGNORED_LABEL)).any(dim=1)
        if not bool(asked.all()):
            row = int((~asked).nonzero()[0])
            raise DataError(
                f"of sample {ids[row]} (row {row} of the batch) no token but the first has a label, and nothing comes before that one to "
                f"predict it from, so method={self.config.method_name!r} finds no loss; leave it out of the stream"
            )

    def _measure(
        self,
        batch: Mapping[str, Any],
        mask: Tensor,
        lengths: list[int],
        ids: list[int],
        learning_rate: float | None,
    ) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        """What the method measures of this rank's candidates.

        Returns:
            (B_r,) each by its name, on the device; embeddings (B_r, d) if it has any; the interaction (B_r, B_r) on the host if it has one.
        """
        measures = self.config.measures
        values = self._measurer.each(batch, mask, lengths)
        embeddings = values.pop("embeddings", None)
        if embeddings is not None:
            values["inter"] = self.buffer.mean_distance(embeddings)
        if "reference_loss" in measures:
            assert self._reference is not None
            values["reference_loss"] = self._reference.of(ids, lengths).to(self._device)
        interaction = None
        if self.config.compares:
            products = self._measurer.products(batch, mask, lengths)
            interaction = fetch(products.between)
            if products.with_reference is not None:
                if learning_rate is None:
                    raise ConfigError(
                        f"method={self.config.method_name!r} weighs by the learning rate of the step, so it cannot choose without training"
                    )
                values["alignment"] = products.with_reference
                interaction = interaction * learning_rate
        # In the order that all ranks have.
        return (
            {name: values[name] for name in (*MEASURED, "reference_loss", "alignment") if name in values},
            embeddings,
            interaction,
        )
