"""Hidden states in, `intra` and embeddings out: the scoring of candidates, for any training loop.

    B candidates, N_i real tokens of candidate i, D hidden width, V vocabulary, d = d1·d2

Three forms, all exact; the first never sees the vocabulary:

`hidden_space`  linear heads: R and P of `lm_head.py` instead of W. Kept as long as the head's weight does not change.
`vocabulary_slices`  Gram matrix and projection summed over slices of the vocabulary: for heads with a soft cap, and for linear heads that
    train, when that costs less than making R and P for these candidates alone.
`logits`  anything else: from logits that the model itself computed (N×V).

Each score depends on its candidate and the head alone. Which others it is computed with enters by rounding only: 1e-6 of `intra` and of
the embedding's norm at most. The same call on the same machine and number of threads gives the same bits.

What is not here: making the hidden states (`udsstream/mosaicml/trunk.py`), the memory (`embedding_buffer.py`) and the choice (`select.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from udsstream.config import LengthNorm
from udsstream.errors import SequenceTooLongError
from udsstream.scoring.lm_head import HeadFactors, LMHead, append_ones, factor_head, slices_are_cheaper
from udsstream.scoring.nuclear_norm import (
    NuclearNormForm,
    choose_dtype,
    exact_float32,
    nuclear_norms,
    nuclear_norms_from_grams,
)
from udsstream.scoring.projection import BilinearProjection

__all__ = ["CandidateScorer", "CandidateScores"]

log = logging.getLogger(__name__)

_GROUP_BYTES = 16 * 2**20
"""Candidates are scored together until their hidden states take this in float32: enough rows for a fast product, little memory."""


@dataclass(frozen=True, kw_only=True)
class CandidateScores:
    """What one forward says about B candidates, on the device of the hidden states."""

    intra: Tensor
    """(B,) float32: nuclear norm of each candidate's logits, divided by 1, √N or N (`length_norm`)."""
    embeddings: Tensor
    """(B, d) float32: projected logits, divided by the same."""


class CandidateScorer:
    """Scores candidates from their hidden states. Holds the projection and, for linear heads, R and P of the current weight.

    Args:
        projection: Γ1 and Γ2.
        length_norm: what scores and embeddings are divided by.
        nuclear_norm: its form; None: by device (`nuclear_norm.choose_form`). `svd` is the slow reference, for hidden space only.
        dtype: of Gram matrices; None: float64 where the device has it.
        slices: True and False force the form of linear heads; None: by version and cost (`score_hidden`).
    """

    def __init__(
        self,
        projection: BilinearProjection,
        *,
        length_norm: LengthNorm = "none",
        nuclear_norm: NuclearNormForm | None = None,
        dtype: torch.dtype | None = None,
        slices: bool | None = None,
    ) -> None:
        self.projection = projection
        self.length_norm: LengthNorm = length_norm
        self._form: NuclearNormForm | None = nuclear_norm
        self._dtype = dtype
        self._slices = slices
        self._factors: HeadFactors | None = None
        self._version: Hashable = None
        self._gamma2: dict[torch.device, Tensor] = {}

    def takes_slices(self, head: LMHead, lengths: Sequence[int]) -> bool:
        """Whether candidates of these lengths are scored by slices of the vocabulary when nothing is known of the head's version."""
        if not head.is_linear:
            return True
        if self._slices is not None:
            return self._slices
        # Ranks have candidates of other lengths, but must agree; and each has its part of the work of factoring only.
        return head.shard is None and slices_are_cheaper(head, lengths, self.projection)

    @torch.no_grad()
    def score_hidden(self, hidden: Sequence[Tensor], head: LMHead, *, version: Hashable = None) -> CandidateScores:
        """Scores candidates given their real tokens' final hidden states, one (N_i, D) each, as they enter the head.

        R and P that turn out to be another weight's, although `version` is the same, are made anew on the CPU; elsewhere, where to
        look would be to wait (for the device, or for the ranks that hold the other shards), `intra` is NaN then, which selection refuses.

        With a shard every rank of its group must call it as often, with its own candidates, and with a `version` that changes at the
        same calls.

        Args:
            hidden: any float dtype; computed in float32.
            head: the head that would be applied to them.
            version: something that changes whenever the head's weight does. R and P are kept while it stays the same.
                None: unknown. Then nothing is kept, and either form is taken, whichever costs less (`lm_head.py`).

        Raises:
            SequenceTooLongError: a candidate has more tokens than the projection was drawn for.
        """
        lengths = self._checked_lengths(hidden)
        with exact_float32():
            if not head.is_linear or self._slices or (version is None and self.takes_slices(head, lengths)):
                # The slices of a shard are sent around, and all ranks must do so as often.
                groups = _groups(hidden) if head.shard is None else [list(hidden)]
                parts = [self._in_slices(group, head) for group in groups]
            else:
                factors, stale = self._factors_of(head, version)
                parts = [self._in_hidden_space(group, head, factors) for group in _groups(hidden)]
                if stale is not None:
                    parts = [(torch.where(stale, float("nan"), intra), embeddings) for intra, embeddings in parts]
        return self._collect(parts, lengths)

    @torch.no_grad()
    def score_logits(self, logits: Sequence[Tensor]) -> CandidateScores:
        """Scores candidates from their logits, one (N_i, V) each: the form of last resort."""
        lengths = self._checked_lengths(logits)
        with exact_float32():
            parts = [self._from_slices([len(matrix)], _slices_of(matrix), matrix.device) for matrix in logits]
        return self._collect(parts, lengths)

    def _factors_of(self, head: LMHead, version: Hashable) -> tuple[HeadFactors, Tensor | None]:
        """R and P, and whether they are stale where that is not known yet."""
        if self._factors is not None and version is not None and version == self._version:
            stale = self._factors.differs_from(head)
            if stale.device.type != "cpu" or head.shard is not None:
                return self._factors, stale
            if not bool(stale):
                return self._factors, None
            log.warning(
                "The head's weight was changed past PyTorch's version counters (through .data, or by a foreign kernel); what was kept of "
                "it is made anew."
            )
        self._factors = None  # the old ones make room first
        self._factors = factor_head(head, self.projection)
        self._version = version
        return self._factors, None

    def _in_hidden_space(self, hidden: list[Tensor], head: LMHead, factors: HeadFactors) -> tuple[Tensor, Tensor]:
        """intra (b,) and embeddings (b, d) through R and P; not yet divided by anything."""
        lengths = [len(states) for states in hidden]
        stacked = torch.cat(hidden).float()
        if head.bias is not None:
            stacked = append_ones(stacked)
        # Tokens first: d2 rows are left of each candidate's before the vocabulary's side is projected, for all in one product.
        tokens = torch.cat([self._tokens(part) for part in stacked.split(lengths)])
        embeddings = (tokens @ factors.projected.T).view(len(hidden), -1)
        roots = factors.times_root(stacked).split(lengths)
        return nuclear_norms(roots, form=self._form, dtype=self._dtype), embeddings

    def _in_slices(self, hidden: list[Tensor], head: LMHead) -> tuple[Tensor, Tensor]:
        """The same without R and P, for any head."""
        lengths = [len(states) for states in hidden]
        return self._from_slices(lengths, head.sliced_logits(torch.cat(hidden)), hidden[0].device)

    def _from_slices(
        self, lengths: list[int], slices: Iterable[tuple[int, Tensor]], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """From (first vocabulary row, logits (ΣN_i, slice)) pairs: G_i = Σ L_c L_cᵀ, z_i = Σ (Γ2 L_c) Γ1_cᵀ."""
        dtype = self._dtype or choose_dtype(device)
        d1, d2 = self.projection.vocabulary.d, self.projection.tokens.d
        grams = [torch.zeros(n, n, dtype=dtype, device=device) for n in lengths]
        embeddings = torch.zeros(d2 * len(lengths), d1, device=device)
        for start, part in slices:
            gamma1 = self.projection.vocabulary.columns(start, start + part.shape[1]).to(device)
            candidates = part.split(lengths)
            embeddings.addmm_(torch.cat([self._tokens(each) for each in candidates]), gamma1.T)
            for gram, each in zip(grams, candidates, strict=True):
                exact = each.to(dtype)
                gram.addmm_(exact, exact.T)
        form = "gram" if self._form == "svd" else self._form
        return nuclear_norms_from_grams(grams, form=form), embeddings.view(len(lengths), -1)

    def _tokens(self, matrix: Tensor) -> Tensor:
        """(N, any) → Γ2[:, :N] of it (d2, any)."""
        if matrix.device not in self._gamma2:
            self._gamma2[matrix.device] = self.projection.tokens.columns(0, self.projection.tokens.n).to(matrix.device)
        return self._gamma2[matrix.device][:, : matrix.shape[0]] @ matrix

    def _checked_lengths(self, matrices: Sequence[Tensor]) -> list[int]:
        lengths = [matrix.shape[0] for matrix in matrices]
        longest = self.projection.tokens.n
        if max(lengths) > longest:
            raise SequenceTooLongError(
                f"a candidate has {max(lengths)} tokens, but the projection was drawn for at most max_seq_len={longest}; "
                "raise max_seq_len or shorten the sample where it is tokenised"
            )
        return lengths

    def _collect(self, parts: list[tuple[Tensor, Tensor]], lengths: list[int]) -> CandidateScores:
        intra, embeddings = (torch.cat(each) for each in zip(*parts, strict=True))
        if self.length_norm != "none":
            power = {"sqrt": 0.5, "tokens": 1.0}[self.length_norm]
            divisors = torch.tensor([float(n) ** power for n in lengths]).to(intra.device, non_blocking=True)
            intra, embeddings = intra / divisors, embeddings / divisors[:, None]
        return CandidateScores(intra=intra, embeddings=embeddings)


def _groups(hidden: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Successive candidates whose hidden states together take 16 MB in float32 at most; a larger one alone."""
    group: list[Tensor] = []
    room = _GROUP_BYTES
    for states in hidden:
        if group and 4 * states.numel() > room:
            yield group
            group, room = [], _GROUP_BYTES
        group.append(states)
        room -= 4 * states.numel()
    yield group


def _slices_of(logits: Tensor, width: int = 8192) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, logits.shape[1], width):
        yield start, logits[:, start : start + width].float()
