"""The folder of a training job: whose it is, and whether it is finished.

save_folder/
    config.yaml      the configuration, as validated
    run.json, selection/, pushes/, _state/, _heads/, _buffers/, timings.jsonl     the selection log
    checkpoints/     Composer's
    summary.json     written last: a run with it is finished (a replay has replay.json instead)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from udsstream.errors import LogExistsError, ResumeError
from udsstream.evals import EVALS
from udsstream.run_config import RunConfig, config_changes, load_run_config

__all__ = ["CONFIG", "INITIAL_EVAL", "SUMMARY", "claim_folder", "is_finished", "unfinished_folder", "write_atomically"]

CONFIG = "config.yaml"
INITIAL_EVAL = "initial_eval.json"
"""The held-out loss before training, so that a resumed run need not measure it again."""
SUMMARY = "summary.json"


def is_finished(save_folder: Path) -> bool:
    """Whether the run in this folder came to its end."""
    return (save_folder / SUMMARY).exists()


def unfinished_folder(base: Path, is_finished: Callable[[Path], bool]) -> Path:
    """`base`, or the first of `base-2`, `base-3`, … that is not finished: what was interrupted is gone on with."""
    folder, number = base, 1
    while is_finished(folder):
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def claim_folder(folder: Path, config: RunConfig) -> None:
    """Writes the configuration into a new run's folder, or checks that the run that is there is this one.

    Raises:
        LogExistsError: the folder holds another run, or this one and `autoresume` is off.
        ResumeError: it holds a run with another configuration.
    """
    recorded = folder / CONFIG
    if recorded.exists() and not (config.autoresume or _has_begun(folder)):
        for left in (recorded, folder / INITIAL_EVAL, folder / EVALS):  # by a job that came no further
            left.unlink(missing_ok=True)
    if not recorded.exists():
        if (folder / "run.json").exists():
            raise LogExistsError(
                f"{folder} holds the log of a run that was not started from a configuration; choose another save_folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(recorded, OmegaConf.to_yaml(OmegaConf.create(_plain(config.model_dump()))))
        return
    if not config.autoresume:
        raise LogExistsError(
            f"{folder} already holds a run ({'finished' if is_finished(folder) else 'unfinished'}); "
            "choose another save_folder, or go on with it: autoresume=true"
        )
    changes = config_changes(load_run_config(recorded), config)
    if changes:
        raise ResumeError(
            f"the run in {folder} was started with another configuration:\n  "
            + "\n  ".join(changes)
            + "\nresume with the old values, or choose another save_folder"
        )


def _has_begun(folder: Path) -> bool:
    """Whether there is anything to lose: a log, a checkpoint or an end. A job that failed as it loaded its model leaves none."""
    return is_finished(folder) or (folder / "run.json").exists() or any((folder / "checkpoints").glob("*"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file as a whole: a crash leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with open(temporary, "x", encoding="utf-8") as file:  # follows no link, which may have come with the folder
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
