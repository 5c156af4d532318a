"""What is measured of candidates by a forward of the trunk: nuclear norms and embeddings, losses, gradients of the last layer.

Which of these, the method says; each candidate goes through the trunk once, whatever is measured. What becomes of the numbers, and what
the other ranks measured, is `selector.py`'s.

    B_r candidates of this rank, b of one forward, N tokens, D hidden width, V vocabulary, d components of an embedding
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import Precision, get_precision_context
from composer.devices import Device
from torch import Tensor

from udsstream.config import SelectionConfig
from udsstream.errors import ConfigError, ModelError
from udsstream.mosaicml.batch import real_tokens, scoring_microbatches
from udsstream.mosaicml.ranks import from_rank_zero, greatest_over_ranks
from udsstream.mosaicml.trunk import ModelParts, ScoringForm, choose_form, neutral
from udsstream.scoring.gradients import GradientProducts, gradient_norms, gradient_products
from udsstream.scoring.lm_head import LMHead
from udsstream.scoring.losses import mean_losses, mean_losses_from_logits
from udsstream.scoring.scorer import CandidateScorer

__all__ = ["CandidateMeasurer", "forward_cost"]

log = logging.getLogger(__name__)


def forward_cost(device: torch.device) -> int | None:
    """What a forward costs beside its tokens, in tokens; see `scoring_microbatches`.

    On 2 CPU cores a forward of SmolLM2 takes about as much longer than its tokens as 45 tokens take. Nothing was measured elsewhere; where
    launching kernels is what a small forward waits for, few forwards are right.
    """
    return 48 if device.type == "cpu" else None


@dataclass(frozen=True, kw_only=True)
class _Forward:
    """One forward of the trunk: some candidates, the longest first."""

    rows: list[int]
    """Their places in the batch."""
    matrices: list[Tensor]
    """Hidden states (N, D) of each, or logits (N, V) where nothing else will do."""
    labels: list[Tensor]
    """(N,) of each, on the host; empty where the batch has none."""
    head: LMHead | None
    """None: the matrices are logits."""
    version: Hashable
    """What the head's factors are kept by."""


class CandidateMeasurer:
    """Measures this rank's candidates with the model as it is.

    Args:
        config: says what is measured.
        parts: trunk and head.
        scorer: of nuclear norms and embeddings.
        device, precision, precision_config: of the forward.
        validation: see `CandidateSelector`.

    Raises:
        ConfigError: what is measured cannot be with sharded parameters.
    """

    def __init__(
        self,
        config: SelectionConfig,
        parts: ModelParts,
        scorer: CandidateScorer,
        *,
        device: Device,
        precision: Precision,
        precision_config: dict[str, Any] | None,
        validation: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        if config.compares and parts.is_sharded:
            raise ConfigError(
                f"method={config.method_name!r} compares the gradients of all candidates of a rank, which is not done yet with parameters "
                "sharded by FSDP2; use DistributedDataParallel, or another method"
            )
        self._config = config
        self._parts = parts
        self._scorer = scorer
        self._to_device = device
        self._precision = (precision, precision_config)
        self._validation = validation
        self.form: ScoringForm | None = None
        """How the model is scored; known from the first forward on."""
        self._scored_steps = 0
        self._last_version: Hashable = None
        self._changes = 0
        self._device = next(parts.model.parameters()).device

    def each(self, batch: Mapping[str, Any], mask: Tensor, lengths: list[int]) -> dict[str, Tensor]:
        """What is measured of each candidate alone: (B_r,) on the device by name, and (B_r, d) under `embeddings`. `inter` is not among
        them: it takes the memory."""
        measures = self._config.measures
        measured: list[tuple[str, Callable[[_Forward], Tensor], int]] = []
        if self._config.remembers:
            measured.append(("uds", self._uds, 1 + self._config.embedding_dim))
        if "loss" in measures:
            measured.append(("loss", _losses, 1))
        if "grad_norm" in measures:
            measured.append(("grad_norm", self._grad_norms, 1))
        if not measured:
            return {}
        width = sum(columns for _, _, columns in measured)
        found: list[Tensor] = [torch.empty(0)] * len(lengths)

        def visit(forward: _Forward) -> None:
            part = torch.cat([measure(forward) for _, measure, _ in measured], dim=1)
            for place, row in enumerate(forward.rows):
                found[row] = part[place]

        self._run(batch, mask, lengths, visit)
        numbers = torch.stack(found) if lengths else torch.empty((0, width), device=self._device)
        values: dict[str, Tensor] = {}
        for (name, _, _), columns in zip(measured, numbers.split([c for _, _, c in measured], dim=1), strict=True):
            if name == "uds":
                values |= {"intra": columns[:, 0], "embeddings": columns[:, 1:]}
            else:
                values[name] = columns[:, 0]
        return values

    def products(self, batch: Mapping[str, Any], mask: Tensor, lengths: list[int]) -> GradientProducts:
        """Inner products of the gradients of this rank's candidates with each other and, if there are any, with the validation samples'.

        Takes a forward of the validation samples too, and all hidden states at once.
        """
        if not lengths:  # of an incomplete last batch this rank has none
            nothing = torch.empty(0, device=self._device)
            return GradientProducts(
                between=nothing.reshape(0, 0), with_reference=nothing if "alignment" in self._config.measures else None
            )
        hidden, labels, head = self._states(batch, mask, lengths)
        reference = None
        if "alignment" in self._config.measures:
            assert self._validation is not None
            states: list[Tensor] = []
            targets: list[Tensor] = []
            for samples in self._validation:
                real = real_tokens(samples)
                more, theirs, _ = self._states(samples, real, real.sum(dim=1).tolist())
                states += more
                targets += theirs
            reference = (states, targets)
        with torch.autocast(device_type=self._device.type, enabled=False):
            return gradient_products(hidden, labels, head, reference=reference)

    def _states(
        self, batch: Mapping[str, Any], mask: Tensor, lengths: list[int]
    ) -> tuple[list[Tensor], list[Tensor], LMHead]:
        """Hidden states (N, D) and labels (N,) of each sample of a batch, in order, and the head."""
        hidden: list[Tensor] = [torch.empty(0)] * len(lengths)
        labels = list(hidden)
        heads: list[LMHead] = []

        def visit(forward: _Forward) -> None:
            heads.append(self._needed(forward.head))
            for row, matrix, label in zip(forward.rows, forward.matrices, forward.labels, strict=True):
                hidden[row], labels[row] = matrix.clone(), label

        self._run(batch, mask, lengths, visit)
        return hidden, labels, heads[0]

    def _uds(self, forward: _Forward) -> Tensor:
        """(b, 1 + d): intra and embedding."""
        if forward.head is None:
            found = self._scorer.score_logits(forward.matrices)
        else:
            found = self._scorer.score_hidden(forward.matrices, forward.head, version=forward.version)
        return torch.cat([found.intra[:, None], found.embeddings], dim=1)

    def _grad_norms(self, forward: _Forward) -> Tensor:
        """(b, 1)."""
        return gradient_norms(forward.matrices, forward.labels, self._needed(forward.head))[:, None]

    def _needed(self, head: LMHead | None) -> LMHead:
        if head is None:
            raise ModelError(
                f"method={self._config.method_name!r} needs gradients of the last layer, but this model's logits are not what its head "
                "makes of the hidden states that enter it; name the head's module with head= and the trunk's with trunk="
            )
        return head

    def _run(
        self, batch: Mapping[str, Any], mask: Tensor, lengths: list[int], visit: Callable[[_Forward], None]
    ) -> None:
        """Runs the trunk over this rank's candidates, some at a time."""
        parts = self._parts
        runs = list(
            scoring_microbatches(
                batch,
                mask,
                lengths,
                self._config.score_microbatch_tokens,
                forward_cost=None if parts.is_sharded else forward_cost(self._device),
            )
        )
        with neutral(parts.model), get_precision_context(*self._precision):
            if self.form is None:
                # Each rank has looked at another candidate, but all must score alike. (Of a batch smaller than the number of ranks the
                # last ones have none.)
                form = choose_form(parts, self._to_device.batch_to_device(runs[0][1])) if runs else None
                self.form = from_rank_zero(form)
                assert self.form is not None, "rank 0 has the first candidate of every batch"
                log.info("Candidates are scored as %s.", self.form)
            head, version = self._head_of_step(self.form, lengths)
            if parts.is_sharded:
                # Each forward gathers the weights from all ranks, so all must make as many: the last one again, to no effect. And what was
                # kept of the head is made anew on all ranks or on none.
                [most, changed] = greatest_over_ranks([len(runs), version != self._last_version])
                runs += runs[-1:] * (most - len(runs))
                self._last_version = version
                self._changes += changed
                version = ("changes", self._changes)
            for rows, packed in runs:
                matrices = self._matrices(self._to_device.batch_to_device(packed), self.form)
                # The scores' own arithmetic is not to be autocast: float32 throughout.
                with torch.autocast(device_type=matrices.device.type, enabled=False):
                    visit(
                        _Forward(
                            rows=rows,
                            matrices=[matrices[place, : lengths[row]] for place, row in enumerate(rows)],
                            labels=[
                                packed["labels"][place, : lengths[row]]
                                for place, row in enumerate(rows)
                                if "labels" in packed
                            ],
                            head=head,
                            version=version,
                        )
                    )

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


def _losses(forward: _Forward) -> Tensor:
    """(b, 1): the mean losses."""
    if forward.head is None:
        return mean_losses_from_logits(forward.matrices, forward.labels)[:, None]
    return mean_losses(forward.matrices, forward.labels, forward.head)[:, None]
