"""What a method is given beside the candidates: losses of a reference model, samples for validation; and the step's learning rate.

They decide what is chosen, so a log names them by digest and a resumed run must be given the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer.core import State
from torch import Tensor

from udsstream.config import SelectionConfig
from udsstream.errors import ConfigError, DataError, ResumeError
from udsstream.mosaicml.batch import real_tokens
from udsstream.mosaicml.dataset import StreamIdentity
from udsstream.mosaicml.reference_losses import ReferenceLosses
from udsstream.scoring.losses import IGNORED_LABEL
from udsstream.scoring.methods import METHODS

__all__ = ["MethodInputs", "learning_rate_of"]


@dataclass(frozen=True, kw_only=True)
class MethodInputs:
    """Either is None where it was not given."""

    reference: ReferenceLosses | None = None
    validation: tuple[Mapping[str, Any], ...] | None = None
    """Batches on the host."""

    @classmethod
    def of(
        cls,
        config: SelectionConfig,
        *,
        reference: str | Path | Mapping[int, float] | None,
        validation: Iterable[Mapping[str, Any]] | None,
    ) -> MethodInputs:
        """Those that the method needs, and no others.

        Args:
            reference: a log that recorded losses, or sample id → loss in nats per token.
            validation: batches as the collator makes them; all of them are read.

        Raises:
            ConfigError: the method needs one that was not given, or does not use one that was.
            DataError: validation samples without labels.
            LogError: the log cannot be read.
        """
        for name, given, method, what in (
            (
                "reference",
                reference is not None,
                "rho_loss",
                "the log of a pass with a reference model, or sample id → loss",
            ),
            ("validation", validation is not None, "greats", "batches of samples whose loss is to be lowered"),
        ):
            if given and config.method != method:
                raise ConfigError(f"{name}: method={config.method_name!r} does not use it; leave it out")
            if not given and config.method == method:
                raise ConfigError(f"method={method!r} needs {name}=: {what}")
        if isinstance(config.method, str) and config.method not in METHODS:
            raise ConfigError(
                f"method: {config.method!r} names a function of one's own, as a record does; give the function itself (from Python)"
            )
        losses = None
        if isinstance(reference, Mapping):
            losses = ReferenceLosses(reference)
        elif reference is not None:
            losses = ReferenceLosses.from_log(reference)
        return cls(reference=losses, validation=None if validation is None else _checked(validation))

    def describe(self) -> dict[str, Any]:
        """For run.json and checkpoints: empty where nothing was given."""
        facts: dict[str, Any] = {}
        if self.reference is not None:
            facts["reference"] = self.reference.describe()
        if self.validation is not None:
            digest = hashlib.sha256()
            for batch in self.validation:
                for name in ("input_ids", "labels"):
                    values = torch.where(real_tokens(batch), batch[name], IGNORED_LABEL)
                    digest.update(repr(tuple(values.shape)).encode() + values.to(torch.int64).numpy().tobytes())
            facts["validation"] = {
                "samples": sum(len(batch["input_ids"]) for batch in self.validation),
                "sha256": digest.hexdigest(),
            }
        return facts

    def check_resumed(self, recorded: Mapping[str, Any]) -> None:
        """Raises ResumeError when these are not what the run was recorded with."""
        here = self.describe()
        for name in ("reference", "validation"):
            before, now = (facts.get(name, {}).get("sha256") for facts in (recorded, here))
            if before != now:
                raise ResumeError(
                    f"{name}: the run had {_named(before)}, this one has {_named(now)}, so its choices would not continue; give the same"
                )

    def check_streams(self, streams: Sequence[StreamIdentity]) -> None:
        """Raises ConfigError when the reference losses are those of other streams."""
        if self.reference is not None:
            self.reference.check_streams(streams)


def learning_rate_of(state: State) -> float | None:
    """Of the step that is about to be trained: the first parameter group's."""
    return float(state.optimizers[0].param_groups[0]["lr"]) if state.optimizers else None


def _checked(validation: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    batches = tuple(validation)
    if not batches:
        raise DataError(
            "validation: there is no batch in it; give some samples like those that the model is to get better at"
        )
    for number, batch in enumerate(batches):
        labels, ids = batch.get("labels"), batch.get("input_ids")
        if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or labels.shape != ids.shape:
            raise DataError(
                f"validation: batch {number} has {', '.join(map(str, batch))}, expected input_ids and labels of one shape, as the "
                "training collator makes them"
            )
        real = real_tokens(batch)
        asked = (real[:, :-1] & real[:, 1:] & (labels[:, 1:] != IGNORED_LABEL)).any(dim=1)
        if not bool(asked.all()):
            row = int((~asked).nonzero()[0])
            raise DataError(
                f"validation: row {row} of batch {number} has no label after its first token, so no loss; leave it out"
            )
    return batches


def _named(digest: str | None) -> str:
    return "none" if digest is None else f"that with the digest {digest[:12]}…"
