"""What llm-foundry finds under the name `uds` in a configuration's `algorithms:`; see docs/llm_foundry.md.

llm-foundry hands an algorithm its keyword arguments as they stand in the YAML, and nothing else. So what its users state elsewhere is
looked up where the Trainer has it: the longest sample from the data loader, the log's place from the checkpoints' folder.

Knows llm-foundry by the attributes of its objects alone and imports nothing of it.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from pathlib import Path
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.core import Event, State
from composer.loggers import Logger
from composer.utils.file_helpers import format_name_with_dist

from udsstream.errors import ConfigError
from udsstream.mosaicml import algorithm
from udsstream.mosaicml.ranks import from_rank_zero

__all__ = ["OnlineBatchSelection", "longest_of"]

log = logging.getLogger(__name__)

_FOLDER = "selection_log"
_YET_UNKNOWN = Path(_FOLDER)


class OnlineBatchSelection(algorithm.OnlineBatchSelection):
    """`udsstream.OnlineBatchSelection`, with two arguments that may be left out. (Of one name, since checkpoints name their states by it.)

    Args:
        max_seq_len: as in `SelectionConfig`. None: the `max_seq_len` of the train loader's data set.
        log_dir: as in `udsstream.OnlineBatchSelection`; `{run_name}` is filled in. None: `selection_log` within a local `save_folder`, else
            `{run_name}/selection_log`.
        settings: all others.

    Raises:
        ConfigError: a setting is unknown; or, before training starts, the loader does not say how long its samples may be.
    """

    def __init__(self, *, max_seq_len: int | None = None, log_dir: str | Path | None = None, **settings: Any) -> None:
        known = inspect.signature(algorithm.OnlineBatchSelection).parameters
        if unknown := sorted(set(settings) - set(known)):
            raise ConfigError(
                f"algorithms.uds: {unknown[0]!r} is no setting of the selection; it has {', '.join(known)}"
            )
        self._given_log_dir = None if log_dir is None else str(log_dir)
        self._derives_length = max_seq_len is None
        length = {} if max_seq_len is None else {"max_seq_len": max_seq_len}
        super().__init__(**length, **settings, log_dir=_YET_UNKNOWN)
        self._handlers = {Event.BEFORE_LOAD: self._on_before_load} | self._handlers

    def _on_before_load(self, state: State, logger: Logger) -> None:
        """The data loader and the callbacks are there, and no checkpoint was loaded yet, which is compared with these settings."""
        del logger
        if self._derives_length:
            longest = longest_of(state.train_dataloader)
            if longest is None:
                raise ConfigError(
                    "algorithms.uds.max_seq_len: neither the train loader's data set nor its collator says how many tokens a sample may "
                    "have; give max_seq_len, as ${max_seq_len} where the YAML has one"
                )
            self.config = dataclasses.replace(self.config, max_seq_len=longest)
        self.log_dir = from_rank_zero(_log_dir(self._given_log_dir, state))
        log.info("Selection writes its log to %s.", self.log_dir)


def longest_of(loader: object) -> int | None:
    """`max_seq_len` of the loader's data set, or of its collator or one that this wraps; None when none has it."""
    parts = [getattr(loader, "dataset", None)]
    collator = getattr(loader, "collate_fn", None)
    while collator is not None and len(parts) < 16:
        parts.append(collator)
        collator = getattr(collator, "base_collator", None)
    found = (getattr(part, "max_seq_len", None) for part in parts)
    return next((longest for longest in found if isinstance(longest, int)), None)


def _log_dir(given: str | None, state: State) -> Path:
    if given is None:
        saver = next((callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)), None)
        # With a remote save_folder the local one is a temporary folder.
        local = saver is not None and saver.remote_uploader is None
        given = f"{saver.folder}/{_FOLDER}" if saver is not None and local else "{run_name}/" + _FOLDER
    return Path(format_name_with_dist(given, run_name=state.run_name))
