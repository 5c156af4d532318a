"""The selection's part of a checkpoint of the Trainer: `udsstream_selection.json` in its folder, and the memory in a safetensors file.

Everything else (weights, optimizer, schedule, random state) is the Trainer's own. Both files are read without running anything, and
are written before the Trainer writes its part, whose last file is `trainer_state.json`: a checkpoint that has that one is whole.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from udsstream.config import SelectionConfig, config_difference
from udsstream.errors import LogError, ResumeError
from udsstream.mosaicml.metrics import TokenTotals
from udsstream.scoring.length_correlation import LengthCorrelation
from udsstream.selection_log.files import make_dirs, read_small, replace_file, write_errors

__all__ = ["CheckpointState", "newest_whole_checkpoint"]

log = logging.getLogger(__name__)

VERSION = 1
_JSON, _ROWS, _TRAINERS = "udsstream_selection.json", "udsstream_selection.safetensors", "trainer_state.json"
_LIMIT = 64 << 20
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What a resumed run needs beside what the Trainer keeps; the fields of the JSON file, but for the memory's rows."""

    config: dict[str, Any]
    step: int
    """Updates done; of the log."""
    samples: int
    """Candidates seen."""
    batches: list[int]
    """[per_device_train_batch_size, gradient_accumulation_steps]."""
    streams: list[list[str]]
    """(name, digest) of each."""
    inputs: dict[str, Any]
    sample_ids: str
    correlation: dict[str, float]
    tokens: dict[str, int]
    pushed: int
    """Embeddings that ever entered the memory."""
    memory_digest: str
    log: dict[str, Any] | None
    """run_id, heads and merkle_root in hexadecimal; None: the run has no log."""
    rows: Tensor
    """(m, d) float32 on the host: the memory, oldest first."""
    frozen_sha256: str | None = None
    """Of the weights that are not trained; None: there are none, or it is not known."""

    def write(self, folder: Path) -> None:
        """Puts both files into a checkpoint's folder, which is made if absent.

        Raises:
            LogWriteError: they could not be written.
        """
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rows"}
        data = json.dumps({"version": VERSION, **plain}, indent=1).encode() + b"\n"
        with write_errors("write the selection's state", folder):
            make_dirs(folder)
            replace_file(folder / _ROWS, safetensors.torch.save({"memory": self.rows.contiguous()}))
            replace_file(folder / _JSON, data)

    @classmethod
    def read(cls, folder: Path, config: SelectionConfig) -> CheckpointState:
        """The state in a checkpoint's folder.

        Args:
            config: the settings of the run that resumes.

        Raises:
            ResumeError: there is none, it cannot be read, or it was made with other settings; the message names each field.
        """
        try:
            found = json.loads(read_small(folder / _JSON, _LIMIT))
            rows = safetensors.torch.load(read_small(folder / _ROWS, _LIMIT << 4))["memory"]
            version = found.pop("version")
        except FileNotFoundError as error:
            raise ResumeError(
                f"{folder} holds no {Path(error.filename).name}: it was saved without selection, or with save_only_model=True. Going on "
                "would start with an empty memory; start a new run from its weights, or give a checkpoint that SelectingTrainer saved"
            ) from error
        except (LogError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            raise ResumeError(
                f"the selection's state in {folder} cannot be read ({error}); use an older checkpoint"
            ) from error
        if version != VERSION:
            raise ResumeError(
                f"the selection's state in {folder} has version {version!r}, this udsstream reads version {VERSION}; resume with the "
                "version of udsstream that wrote it (run.json in the log names it)"
            )
        try:
            state = cls(**found, rows=rows)
            state._check(config)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ResumeError(
                f"the selection's state in {folder} is not what SelectingTrainer writes: {error}; use an older checkpoint"
            ) from error
        changed = config_difference(
            {name: value for name, value in state.config.items() if name != "embeddings"},
            {name: value for name, value in config.as_dict().items() if name != "embeddings"},
        )
        if changed:
            raise ResumeError(
                f"{folder} was saved with other selection settings, so its choices would not continue:\n  "
                + "\n  ".join(changed)
                + "\nresume with the old values, or start a new run from its weights"
            )
        return state

    def memory(self) -> dict[str, Any]:
        """As `CandidateSelector.restore_memory` takes it."""
        return {"rows": self.rows, "pushed": self.pushed, "digest": bytes.fromhex(self.memory_digest)}

    def _check(self, config: SelectionConfig) -> None:
        """Raises ValueError or TypeError when a field is not of its kind."""
        for name in ("step", "samples", "pushed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}")
        for name, kind in (("config", object), ("inputs", dict), ("correlation", (int, float)), ("tokens", int)):
            value = getattr(self, name)
            if not isinstance(value, dict) or not all(isinstance(item, kind) for item in value.values()):
                raise ValueError(f"{name} is no object of such values")
        LengthCorrelation(**self.correlation)  # type: ignore[arg-type]
        TokenTotals(**self.tokens)
        if self.frozen_sha256 is not None and len(bytes.fromhex(self.frozen_sha256)) != 32:
            raise ValueError(f"frozen_sha256 is {self.frozen_sha256!r}")
        if len(bytes.fromhex(self.memory_digest)) != 32 or not isinstance(self.sample_ids, str):
            raise ValueError("memory_digest or sample_ids is of another kind")
        if self.log is not None:
            heads = [bytes.fromhex(head) for head in self.log["heads"]]
            if len(heads) != 1 or len(heads[0]) != 32 or not isinstance(self.log["run_id"], str):
                raise ValueError("log does not name one head of 32 bytes and the run")
        for name, digest in self.streams:
            if not isinstance(name, str) or not isinstance(digest, str):
                raise ValueError("streams holds something else than names and digests")
        if (
            self.config.get("buffer_size") == config.buffer_size
            and self.config.get("projection_dims") == config.as_dict()["projection_dims"]
        ):
            shape = (min(self.pushed, config.buffer_size), config.embedding_dim)
            if tuple(self.rows.shape) != shape or self.rows.dtype != torch.float32:
                raise ValueError(
                    f"the memory is {self.rows.dtype} {tuple(self.rows.shape)}, expected torch.float32 {shape}"
                )


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """Of the Trainer's checkpoints in a folder the newest one that was saved to its end; None when there is none.

    (The Trainer itself takes the newest, also one that it was killed at saving.)
    """
    found = {int(name[1]): entry for entry in _entries(folder) if (name := _NAME.fullmatch(entry.name))}
    for step in sorted(found, reverse=True):
        try:
            json.loads((found[step] / _TRAINERS).read_bytes())
            return found[step]
        except (OSError, ValueError):
            log.warning("%s was not saved to its end and is passed over.", found[step])
    return None


def _entries(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
