"""Hidden states in, `intra` and embeddings out: the scoring of candidates, for any training loop.

    B candidates, N_i real tokens of candidate i, D hidden width, V vocabulary, d = d1·d2

Three forms, all exact; the first never sees the vocabulary:

`hidden_space`  linear heads: R and P of `lm_head.py` instead of W. Kept as long as the head's weight does not change.
`vocabulary_slices`  heads with a soft cap: Gram matrix and projection summed over slices of the vocabulary.
`logits`  anything else: from logits that the model itself computed (N×V).

What is not here: making the hidden states (`udsstream/mosaicml/trunk.py`), the memory (`embedding_buffer.py`) and the choice (`select.py`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from udsstream.config import LengthNorm
from udsstream.errors import SequenceTooLongError
from udsstream.scoring.lm_head import HeadFactors, LMHead, append_ones, factor_head
from udsstream.scoring.nuclear_norm import gram_dtype, nuclear_norm, nuclear_norm_from_gram
from udsstream.scoring.projection import BilinearProjection

__all__ = ["CandidateScorer", "CandidateScores"]


@dataclass(frozen=True, kw_only=True)
class CandidateScores:
    """What one forward says about B candidates, on the device of the hidden states."""

    intra: Tensor
    """(B,) float32: nuclear norm of each candidate's logits, divided by 1, √N or N (`length_norm`)."""
    embeddings: Tensor
    """(B, d) float32: projected logits, divided by the same."""


class CandidateScorer:
    """Scores candidates from their hidden states. Holds the projection and, for linear heads, R and P of the current weight."""

    def __init__(self, projection: BilinearProjection, *, length_norm: LengthNorm = "none") -> None:
        self.projection = projection
        self.length_norm: LengthNorm = length_norm
        self._factors: HeadFactors | None = None
        self._version: Hashable = None
        self._gamma2: dict[torch.device, Tensor] = {}

    def score_hidden(self, hidden: Sequence[Tensor], head: LMHead, *, version: Hashable = None) -> CandidateScores:
        """Scores candidates given their real tokens' final hidden states, one (N_i, D) each, as they enter the head.

        Args:
            hidden: any float dtype; computed in float32.
            head: the head that would be applied to them.
            version: something that changes whenever the head's weight does. R and P are kept while it stays the same;
                None makes them anew.

        Raises:
            SequenceTooLongError: a candidate has more tokens than the projection was drawn for.
        """
        if not head.is_linear:
            return self._collect(
                [self._from_slices(states, head) for states in hidden], [states.shape[0] for states in hidden]
            )
        factors = self._factors_of(head, version)
        lengths = [states.shape[0] for states in hidden]
        stacked = torch.cat(list(hidden)).float()
        if head.bias is not None:
            stacked = append_ones(stacked)
        factor_rows = (stacked @ factors.gram_factor.T).split(lengths)
        projected_rows = (stacked @ factors.projected.T).split(lengths)
        return self._collect(
            [(nuclear_norm(x), self._project_tokens(y)) for x, y in zip(factor_rows, projected_rows, strict=True)],
            lengths,
        )

    def score_logits(self, logits: Sequence[Tensor]) -> CandidateScores:
        """Scores candidates from their logits, one (N_i, V) each: the form of last resort."""
        return self._collect(
            [self._from_parts(matrix.shape[0], _slices_of(matrix), matrix.device) for matrix in logits],
            [matrix.shape[0] for matrix in logits],
        )

    def _factors_of(self, head: LMHead, version: Hashable) -> HeadFactors:
        if self._factors is None or version is None or version != self._version:
            self._factors = factor_head(head, self.projection)
            self._version = version
        return self._factors

    def _from_slices(self, hidden: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
        return self._from_parts(hidden.shape[0], head.sliced_logits(hidden), hidden.device)

    def _from_parts(self, n: int, parts, device: torch.device) -> tuple[Tensor, Tensor]:
        """intra and embedding from (first vocabulary row, logits (N, slice)) pairs: G = Σ L_c L_cᵀ, Y = Σ L_c Γ1_cᵀ."""
        dtype = gram_dtype(device)
        gram = torch.zeros(n, n, dtype=dtype, device=device)
        projected = torch.zeros(n, self.projection.vocabulary.d, device=device)
        for start, part in parts:
            gram += part.to(dtype) @ part.to(dtype).T
            projected += part @ self.projection.vocabulary.columns(start, start + part.shape[1]).to(device).T
        return nuclear_norm_from_gram(gram), self._project_tokens(projected)

    def _project_tokens(self, projected: Tensor) -> Tensor:
        """Y = L Γ1ᵀ (N, d1) → vec(Γ2[:, :N] Y) (d2·d1,)."""
        n, longest = projected.shape[0], self.projection.tokens.n
        if n > longest:
            raise SequenceTooLongError(
                f"a candidate has {n} tokens, but the projection was drawn for at most max_seq_len={longest}; "
                "raise max_seq_len or shorten the sample where it is tokenised"
            )
        if projected.device not in self._gamma2:
            self._gamma2[projected.device] = self.projection.tokens.columns(0, longest).to(projected.device)
        return (self._gamma2[projected.device][:, :n] @ projected).flatten()

    def _collect(self, scores: list[tuple[Tensor, Tensor]], lengths: list[int]) -> CandidateScores:
        divisors = [_length_divisor(n, self.length_norm) for n in lengths]
        return CandidateScores(
            intra=torch.stack([intra / by for (intra, _), by in zip(scores, divisors, strict=True)]),
            embeddings=torch.stack([embedding / by for (_, embedding), by in zip(scores, divisors, strict=True)]),
        )


def _length_divisor(tokens: int, norm: LengthNorm) -> float:
    return {"none": 1.0, "sqrt": math.sqrt(tokens), "tokens": float(tokens)}[norm]


def _slices_of(logits: Tensor, width: int = 8192):
    for start in range(0, logits.shape[1], width):
        yield start, logits[:, start : start + width].float()
