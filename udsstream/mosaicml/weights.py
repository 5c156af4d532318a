"""Which weights a run was made with, by digest: so that a log tells what its choices were made by, and another model is noticed.

A model's name is not enough: a folder's content changes, and a checkpoint of adapters holds nothing of what they were trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from udsstream.errors import ResumeError

__all__ = [
    "check_frozen",
    "frozen_sha256",
    "starting_weights",
    "trained_sha256",
    "weights_differences",
    "weights_sha256",
]


def weights_sha256(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, of all parameters and buffers by name: which weights a stream was scored with."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            _add(digest, name, value)
    return digest.hexdigest()


def frozen_sha256(model: nn.Module) -> str | None:
    """SHA-256, in hexadecimal, of the parameters that are not trained, of LoRA the base model.

    Each counts once, in the order in which modules hold them, with type and shape and without its name: wrappers give other names.
    About 1 GB/s on a CPU.

    Returns:
        None: there are none, or some are no plain tensors (sharded over ranks, or of a class of their own).
    """
    return _in_order(parameter for parameter in model.parameters() if not parameter.requires_grad)


def trained_sha256(model: nn.Module) -> str | None:
    """The same of the parameters that are trained, as they are now."""
    return _in_order(parameter for parameter in model.parameters() if parameter.requires_grad)


def starting_weights(model: nn.Module) -> dict[str, str | None]:
    """Both, as run.json names them, of a model before its first step."""
    return {"frozen_sha256": frozen_sha256(model), "trained_sha256": trained_sha256(model)}


def weights_differences(recorded: object, model: nn.Module, *, at_start: bool) -> list[str]:
    """How the model differs from that of a run, a line each; what either has no digest of is not compared.

    Args:
        recorded: `weights` of run.json; anything else than an object tells nothing of them.
        at_start: before the first step, so that what is trained must be the same too.
    """
    known: Mapping[str, Any] = recorded if isinstance(recorded, Mapping) else {}
    if not any(known.values()):
        return []  # nothing to hash for
    here = starting_weights(model) if at_start else {"frozen_sha256": frozen_sha256(model)}
    lines = []
    for name, found in here.items():
        before = known.get(name)
        if None not in (before, found) and before != found:
            what = name.partition("_")[0]
            lines.append(
                f"{what} weights{' before the first step' * (what == 'trained')}: was {before!r}, is {found!r}"
            )
    return lines


def check_frozen(recorded: str | None, model: nn.Module, what: str) -> None:
    """Raises ResumeError when the frozen parameters are not those of a digest that a run recorded; None: it recorded none.

    Args:
        what: that recorded it, for the message.
    """
    lines = weights_differences({"frozen_sha256": recorded}, model, at_start=False)
    if lines:
        raise ResumeError(
            f"{what} was saved with another base model, though perhaps of the same name (or another type of its weights, or other layers "
            f"that are trained):\n  {lines[0]}\ngive the model that the run had"
        )


def _in_order(parameters: Iterable[nn.Parameter]) -> str | None:
    digest, count = hashlib.sha256(), 0
    for parameter in parameters:
        if type(parameter.data) is not Tensor or parameter.is_meta:
            return None
        _add(digest, "", parameter)
        count += 1
    return digest.hexdigest() if count else None


def _add(digest: hashlib._Hash, name: str, value: Tensor) -> None:
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
