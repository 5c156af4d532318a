"""The seeded bilinear projection that turns a logits matrix into a short vector: `z = vec(Γ2 · L · Γ1ᵀ)`.

    N tokens, V vocabulary, T longest sample, d1 rows of Γ1 (d1×V), d2 rows of Γ2 (d2×T)

Γ is a subsampled randomised trigonometric transform: random signs, then a few rows of an orthogonal transform.

`isometric` (the default)
    Rows of the orthonormal DCT-II, frequencies without replacement, times √(n/d): `E‖Γx‖² = ‖x‖²` for *every* x. The half-sample
    shift of the DCT matters: with plain cosines `cos(2πkj/n)` the coordinate j = 0 (the first token of every sample, the
    first row of the vocabulary) counts twice, whatever the frequency.
`reference`
    `√(n/d) · cos(2πkj/n) · s_j`, frequencies with replacement: the map of the published code (arXiv 2510.16882), whose distances
    are √(T·V)/2 times longer on average. `udsstream.config.convert_alpha` converts α.

What is not here: applying Γ1 to the head (`lm_head.py`), which is how V never meets N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from udsstream.config import ProjectionScale
from udsstream.errors import ConfigError
from udsstream.scoring.seeding import draw_signs, draw_with_replacement, draw_without_replacement

__all__ = ["BilinearProjection", "TrigonometricSketch"]


@dataclass(frozen=True, kw_only=True)
class TrigonometricSketch:
    """One side of the projection: Γ (d×n), kept as d frequencies and n signs."""

    n: int
    """Columns: the length of the vectors that are projected."""
    scale: ProjectionScale
    frequencies: np.ndarray
    """(d,) int64."""
    signs: np.ndarray
    """(n,) int8, -1 or +1."""

    @classmethod
    def draw(cls, d: int, n: int, *, scale: ProjectionScale, seed: int, side: str) -> TrigonometricSketch:
        """Draws d of n frequencies and n signs for `side` ("vocabulary" or "token").

        Raises:
            ConfigError: `isometric` needs d distinct frequencies of n, and d > n.
        """
        if scale == "reference":
            frequencies = draw_with_replacement(d, n, seed=seed, purpose=f"projection/{side}/frequencies")
        elif d <= n:
            frequencies = draw_without_replacement(d, n, seed=seed, purpose=f"projection/{side}/frequencies")
        else:
            raise ConfigError(
                f"projection_dims: {d} rows on the {side} side, but it has only {n} columns to draw distinct frequencies from; "
                f"choose at most {n}"
            )
        signs = draw_signs(n, seed=seed, purpose=f"projection/{side}/signs")
        return cls(n=n, scale=scale, frequencies=frequencies, signs=signs)

    @property
    def d(self) -> int:
        """Rows of Γ."""
        return len(self.frequencies)

    def columns(self, start: int, stop: int) -> Tensor:
        """Γ[:, start:stop]: (d, stop - start) float32 on the CPU.

        The angle is reduced in integers, so that column 150,000 is as accurate as column 0 and cosines can be looked up.
        """
        table, step, shift = self._cosines
        places = torch.from_numpy(self.frequencies)[:, None] * (step * torch.arange(start, stop) + shift)
        columns = table.take(places.remainder_(len(table)))
        if self.scale == "isometric":
            columns[torch.from_numpy(self.frequencies == 0)] = math.sqrt(1 / self.d)
        return columns.mul_(torch.from_numpy(self.signs[start:stop]))

    @cached_property
    def _cosines(self) -> tuple[Tensor, int, int]:
        """Amplitude times cosine for every angle that occurs, float32, and (a, b) such that column j has angle k·(a·j + b)."""
        if self.scale == "reference":
            period, amplitude, step, shift = self.n, math.sqrt(self.n / self.d), 1, 0
        else:
            period, amplitude, step, shift = 4 * self.n, math.sqrt(2 / self.d), 2, 1
        table = amplitude * np.cos(2 * math.pi / period * np.arange(period))
        return torch.from_numpy(table.astype(np.float32)), step, shift


@dataclass(frozen=True, kw_only=True)
class BilinearProjection:
    """Both sides. The same seed gives the same projection on every machine, device and rank."""

    vocabulary: TrigonometricSketch
    """Γ1 (d1×V)."""
    tokens: TrigonometricSketch
    """Γ2 (d2×T)."""

    @classmethod
    def draw(
        cls, *, vocab_size: int, max_seq_len: int, dims: tuple[int, int], scale: ProjectionScale, seed: int
    ) -> BilinearProjection:
        """Draws Γ1 for `vocab_size` columns and Γ2 for `max_seq_len`; `dims` is (d1, d2)."""
        return cls(
            vocabulary=TrigonometricSketch.draw(dims[0], vocab_size, scale=scale, seed=seed, side="vocabulary"),
            tokens=TrigonometricSketch.draw(dims[1], max_seq_len, scale=scale, seed=seed, side="token"),
        )

    def project_logits(self, logits: Tensor) -> Tensor:
        """The definition: logits (N, V), N ≤ T → z (d2·d1,) float32, row-major over (d2, d1). Builds Γ1; for reference and tests."""
        gamma1 = self.vocabulary.columns(0, self.vocabulary.n).to(logits.device)
        gamma2 = self.tokens.columns(0, logits.shape[0]).to(logits.device)
        return (gamma2 @ logits.float() @ gamma1.T).flatten()
