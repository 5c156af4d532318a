"""The folder of a training job: whose it is, and whether it is finished.

save_folder/
    config.yaml      the configuration, as validated
    run.json, selection/, pushes/, _state/, _heads/, _buffers/, timings.jsonl     the selection log
    checkpoints/     Composer's
    durations.json   with which max_duration a resumed run went on, from which step on; absent while it is config.yaml's
    summary.json     written last: a run with it is finished (a replay has replay.json instead)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from udsstream.errors import LogExistsError, ResumeError, UdsstreamError
from udsstream.evals import EVALS
from udsstream.plain_files import new_file, pieces
from udsstream.run_config import RunConfig, config_changes, load_run_config

__all__ = [
    "CONFIG",
    "INITIAL_EVAL",
    "SUMMARY",
    "claim_folder",
    "is_finished",
    "read_durations",
    "record_duration",
    "refuse_model_code",
    "unfinished_folder",
    "write_atomically",
]

CONFIG = "config.yaml"
INITIAL_EVAL = "initial_eval.json"
"""The held-out loss before training, so that a resumed run need not measure it again."""
SUMMARY = "summary.json"
_DURATIONS, _DURATIONS_LIMIT = "durations.json", 1 << 20


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


def refuse_model_code(run: Path, config: RunConfig, error: type[UdsstreamError], *, again: str) -> None:
    """Raises `error` when a run's configuration asks to run code that comes with its model; `again`: what allows it."""
    if config.model.trust_remote_code:
        raise error(
            f"{run / CONFIG} asks to run code that comes with the model {config.model.name} (model.trust_remote_code). A run's folder may "
            f"come from somebody else: if you know whose code it is, give {again}"
        )


def record_duration(folder: Path, step: int, duration: str) -> None:
    """Notes that a run goes on from `step` with this max_duration, by which a decaying learning rate goes."""
    first, *later = read_durations(folder)
    durations = [entry for entry in later if entry[0] < step]
    if duration != (durations or [first])[-1][1]:
        durations.append((step, duration))
    if durations != later:
        write_atomically(folder / _DURATIONS, json.dumps(durations) + "\n")


def read_durations(folder: Path) -> list[tuple[int, str]]:
    """(step, max_duration): what held from this step on, ascending; first that of config.yaml.

    Raises:
        ResumeError: the file is not what `record_duration` writes.
    """
    path = folder / _DURATIONS
    try:
        found = json.loads(b"".join(pieces(path, _DURATIONS_LIMIT))) if path.exists() else []
        entries = [(step, duration) for step, duration in found]
        if not all(
            type(step) is int and step >= 0 and re.fullmatch(r"\d{1,15}(ba|ep|sp|tok)", d) for step, d in entries
        ):
            raise ValueError("a step or a duration is none")
        if entries != sorted(set(entries)):
            raise ValueError("the steps do not ascend")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ResumeError(
            f"{path} does not hold steps and durations ({error}); restore it, or remove it and give max_duration"
        ) from error
    return [(0, load_run_config(folder / CONFIG).max_duration), *entries]


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file as a whole: a crash leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(new_file(temporary), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
