"""What a log's `run.json` says of the run beside the log's own format: streams, model, settings, versions.

Only what is known is stated: a licence or date that nobody gave is "unknown", never guessed.
"""

from __future__ import annotations

import dataclasses
import datetime
import platform
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from torch import nn

from udsstream.config import SelectionConfig
from udsstream.mosaicml.dataset import StreamIdentity

__all__ = ["describe_model", "describe_run", "library_versions"]

_VERSIONS_OF = ("udsstream", "torch", "mosaicml", "mosaicml-streaming", "transformers", "peft", "pyarrow", "numpy")


def describe_run(
    *,
    config: SelectionConfig,
    alpha: float,
    vocab_size: int,
    model: nn.Module,
    streams: Sequence[StreamIdentity],
    loader: Mapping[str, Any],
    world_size: int,
    train_seed: int | None,
    warm_start: dict[str, Any] | None,
    inputs: Mapping[str, Any],
    weights: Mapping[str, str | None],
) -> dict[str, Any]:
    """The description of a run that starts now, ready for JSON.

    Args:
        loader: `batch_size` (candidates per step and rank), `batches_per_epoch`, `max_duration`, how Streaming cuts an epoch
            (`canonical_nodes`), and how epochs are grouped by length (`length_groups`); None where it is not known, or not done.
        inputs: what the method was given beside the candidates (`method_inputs.py`).
        weights: digests of what the model begins with (`weights.py`), by what they are of.
    """
    return {
        "run_id": uuid.uuid4().hex,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "selection": config.as_dict(),
        "selection_fingerprint": config.fingerprint(),
        "resolved_alpha": alpha,
        "vocab_size": vocab_size,
        "streams": [dataclasses.asdict(stream) | {"licence": "unknown", "date": "unknown"} for stream in streams],
        "loader": dict(loader),
        **describe_model(model),
        **({"weights": dict(weights)} if weights else {}),
        "seeds": {"selection": config.seed, "training": train_seed},
        "warm_start": warm_start,
        **inputs,
        "world_size": world_size,
        "git_revision": _git_revision(),
        "versions": library_versions(),
    }


def describe_model(model: nn.Module) -> dict[str, Any]:
    """`model` (class, name, revision) and `tokenizer`, as far as a Hugging Face configuration tells them."""
    hf_config = next((m.config for m in model.modules() if hasattr(m, "config")), None)
    tokenizer = getattr(model, "tokenizer", None)
    return {
        "model": {
            "class": type(model).__name__,
            "name": str(getattr(hf_config, "_name_or_path", "") or "unknown"),
            "revision": str(getattr(hf_config, "_commit_hash", None) or "unknown"),
        },
        "tokenizer": str(getattr(tokenizer, "name_or_path", "") or "unknown"),
    }


def library_versions() -> dict[str, str]:
    """The versions of Python and of every library that training depends on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _VERSIONS_OF}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def _git_revision() -> str:
    """Of the working directory, where a user's training script mostly lives."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"
