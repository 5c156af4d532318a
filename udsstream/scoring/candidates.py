"""What a method is given: the candidates of one step and what was measured of them.

B candidates in canonical order
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from udsstream.errors import ConfigError

__all__ = ["Candidates", "measures"]

Function = TypeVar("Function", bound=Callable[..., Any])


def measures(*names: str) -> Callable[[Function], Function]:
    """Says what a method of one's own needs measured of each candidate: `intra`, `inter`, `loss`, `grad_norm`.

    A function without it gets ids and lengths alone, and no forward is made for it.
    """

    def mark(function: Function) -> Function:
        function.measures = names  # type: ignore[attr-defined]
        return function

    return mark


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """The candidates of one step, on the host. `candidates["loss"]` is (B,) float32, and likewise whatever else was measured:

    `loss`: mean loss per labelled token, nats. `grad_norm`: Frobenius norm of that loss's gradient with respect to the head's weight.
    `intra`: nuclear norm of the logits. `inter`: mean distance to the memory.
    """

    sample_ids: Sequence[int]
    """B ids, as the data set counts its samples."""
    tokens: Tensor
    """(B,) int64: tokens without padding."""
    measured: Mapping[str, Tensor] = field(repr=False)
    embeddings: Tensor | None = field(default=None, repr=False)
    """(B, d) float32, where the method has a memory."""
    share: float = 1.0
    """The share of the candidates, or of their tokens, that is kept."""
    alpha: float = 0.0
    """Weight of `inter` in UDS."""
    seed: int = 0
    epoch: int = 0
    batch: int = 0
    """Of the epoch. A method that draws must draw by (seed, epoch, batch) alone, or a resumed run draws otherwise."""

    def __len__(self) -> int:
        """B."""
        return len(self.sample_ids)

    def __getitem__(self, name: str) -> Tensor:
        """What was measured under this name.

        Raises:
            ConfigError: the method did not ask for it.
        """
        if name not in self.measured:
            raise ConfigError(
                f"the method asks for {name!r}, but {', '.join(self.measured) or 'nothing'} was measured; put "
                f"@udsstream.measures({name!r}) above it"
            )
        return self.measured[name]


def checked_scores(scores: Any, count: int, method: str) -> Tensor:
    """A method's answer as (count,) float32 on the host.

    Raises:
        ConfigError: it is no tensor or sequence of as many numbers.
    """
    try:
        found = torch.as_tensor(scores).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the method {method} returned {type(scores).__name__}, expected {count} numbers: {error}"
        ) from error
    if found.shape != (count,):
        raise ConfigError(
            f"the method {method} returned scores of shape {tuple(found.shape)}, expected ({count},): one for each candidate"
        )
    return found
