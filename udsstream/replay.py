"""A training job again, from its folder: the same weights without a scorer, or the same decisions made anew and compared.

    out/
        config.yaml      the configuration that was replayed, with what was changed
        checkpoints/     Composer's
        replay.json      what was replayed; with "finished": true, what came of it

The run's own folder is only read; it may have been sent by somebody (see `udsstream/mosaicml/checkpoint.py`). What is not here: how a
log becomes batches (`udsstream/mosaicml/replay.py`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import is_tar, parse_uri
from composer.utils.compression import is_compressed_pt

from udsstream.errors import ConfigError, LogError, ReplayError, ResumeError
from udsstream.mosaicml.checkpoint import checkpoints_in, model_weights, read_checkpoint
from udsstream.mosaicml.ranks import on_rank_zero
from udsstream.mosaicml.replay import ReplaySelection
from udsstream.pipeline import build_trainer, close, eval_loss, join_ranks
from udsstream.run_config import RunConfig, StreamConfig, config_changes, load_run_config
from udsstream.run_folder import (
    CONFIG,
    claim_folder,
    read_durations,
    refuse_model_code,
    unfinished_folder,
    write_atomically,
)
from udsstream.selection_log.files import read_small
from udsstream.selection_log.reader import SelectionLog

__all__ = ["ReplayResult", "WeightsComparison", "replay"]

_REPLAY, _REPLAY_LIMIT = "replay.json", 16 << 20

_SAME_DATA = ("data.streams", "data.streams_root", "data.num_workers", "data.timeout", "data.predownload")
_SAME_DATA += ("data.cache_limit", "data.validate_hash", "data.verify_data")
"""Keys that may change without changing what is trained on: the streams are known by the digests of their indexes."""


@dataclass(frozen=True, kw_only=True)
class WeightsComparison:
    """The weights at some step against those in the original's checkpoint of that step."""

    step: int
    checkpoint: str
    tensors: int
    different: int
    """Tensors that are not the same bit for bit."""
    largest_difference: float
    """Largest absolute difference of two weights; infinite when a tensor is missing or has another shape."""

    @property
    def identical(self) -> bool:
        """Whether all are the same bit for bit."""
        return self.different == 0


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """What came of a replay."""

    run: str
    run_id: str
    save_folder: str
    first: int
    stop: int
    """Steps `first` to before `stop` were replayed."""
    differences: list[str]
    """What is known to be other than in the original; while it is empty, equal weights are expected."""
    weights: WeightsComparison | None
    """None: the original left no checkpoint at a step that was replayed."""
    verification: dict[str, Any] | None
    """With `verify`: the fields of `udsstream.mosaicml.replay_check.Tally`."""
    step_seconds: float | None
    """Median, of the steps that this process replayed, after their batch was loaded; for the original's see `timings.jsonl`."""
    eval_loss_after: float | None

    @property
    def verdict(self) -> Literal["identical", "different", "diverged", "re-used", "not compared"]:
        """`diverged`: a decision made again was not the logged one. `different`: the weights are not the original's although nothing is
        known to differ. `re-used`: equality was not to be expected."""
        if self.verification is not None and self.verification["agreed"] < self.verification["steps"]:
            return "diverged" if not self.differences else "re-used"
        if self.weights is not None and self.weights.identical:
            return "identical"
        if self.differences:
            return "re-used"
        return "not compared" if self.weights is None else "different"

    def as_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return asdict(self) | {"verdict": self.verdict}


def replay(
    run: Path,
    *,
    out: Path | None = None,
    steps: tuple[int | None, int | None] = (None, None),
    checkpoint: Path | None = None,
    verify: bool = False,
    streams: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
) -> ReplayResult:
    """Trains again from a run's log.

    Args:
        run: folder of a run that `udsstream train` or `udsstream demo` made.
        out: where the replay goes. None: beside the run, `RUN-replay`. An interrupted replay there is gone on with.
        steps: (first, stop), the steps `first` to before `stop`; None: from the beginning, to the end of the log.
        checkpoint: the run's checkpoint before step `first`. None: the one in the run's folder, if it is there.
        verify: make each decision again and compare.
        streams: new places of streams that moved, by the names in run.json: local folders or remotes.
        overrides: `key=value` changes of the configuration, with dotted paths: then it is a re-use of the data.

    Raises:
        ReplayError: the run cannot be replayed with what was given.
        ConfigError, DataError, LogError, ModelError, ResumeError: see `udsstream.errors`.
    """
    log = SelectionLog.open(run)
    if not (run / CONFIG).exists():
        raise ReplayError(
            f"{run} holds a log but no {CONFIG}: it was not written by `udsstream train`. Replay it in the script that trained it, with "
            "udsstream.ReplaySelection in the place of OnlineBatchSelection"
        )
    original = load_run_config(run / CONFIG)
    join_ranks(original.device)
    out = out or on_rank_zero(lambda: unfinished_folder(run.with_name(f"{run.name}-replay"), _is_finished))
    config = _replayed_config(run, out, streams, overrides, log)
    changes = [line for line in config_changes(original, config) if line.partition(":")[0] not in _SAME_DATA]
    if steps[0] and checkpoint is None:
        checkpoint = checkpoints_in(run / "checkpoints").get(steps[0])
    algorithm = ReplaySelection(
        run,
        steps=steps,
        verify=verify,
        checkpoint=checkpoint,
        **{
            key: value
            for key, value in (config.selection or {}).items()
            if key in ("trunk", "head", "warm_start", "reference")
        },
    )
    durations = read_durations(run)
    if _given(overrides, "max_duration"):
        if config.scheduler.name != "constant" and durations != [(0, config.max_duration)]:
            was = ", ".join(f"{duration} from step {step} on" for step, duration in durations)
            changes.append(f"max_duration, by which the learning rate decays: was {was}, is {config.max_duration}")
        durations = [(0, config.max_duration)]
    _check_duration(durations, algorithm, run)
    request = {
        "durations": [list(entry) for entry in durations],
        "run": str(run),
        "run_id": log.run["run_id"],
        "first": algorithm.decisions.first,
        "stop": algorithm.decisions.stop,
        "verify": verify,
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }
    on_rank_zero(lambda: _claim(out, config, request))
    on_rank_zero(lambda: _check_what_composer_loads(run, out, config, checkpoint, overrides))
    stop, kept = algorithm.decisions.stop, checkpoints_in(run / "checkpoints")
    target = max((step for step in kept if algorithm.decisions.first < step <= stop), default=None)
    watch = _Watch(algorithm, durations, None if target is None else (target, kept[target]))
    trainer = build_trainer(config, replay=algorithm, checkpoint=checkpoint, callbacks=[watch])
    try:
        if trainer.state.timestamp.batch.value + algorithm.offset < stop:
            trainer.fit()
        elif config.eval is not None:
            trainer.eval()
        reached = trainer.state.timestamp.batch.value + algorithm.offset
        if reached < stop:
            raise ReplayError(
                f"training ended before step {reached}, but was to go on to before step {stop}; audit the log of {run}"
            )
        if watch.comparison is None and watch.target is not None:  # an interrupted replay, which had passed it before
            watch.comparison = _compared_later(trainer.state, reached, algorithm.offset, out, *watch.target)
        result = ReplayResult(
            run=str(run),
            run_id=log.run["run_id"],
            save_folder=str(out),
            first=request["first"],
            stop=stop,
            differences=[*changes, *algorithm.differences],
            weights=watch.comparison,
            verification=None if algorithm.tally is None else algorithm.tally.as_dict(),
            step_seconds=float(np.median(watch.seconds)) if watch.seconds else None,
            eval_loss_after=eval_loss(trainer) if config.eval is not None else None,
        )
    finally:
        close(trainer)
    written = json.dumps(request | {"finished": True} | result.as_dict(), indent=2) + "\n"
    on_rank_zero(lambda: write_atomically(out / _REPLAY, written))
    return result


def _given(overrides: Sequence[str], key: str) -> bool:
    return any(line.startswith(f"{key}=") for line in overrides)


def _is_finished(folder: Path) -> bool:
    return (folder / _REPLAY).exists() and bool(_read_request(folder / _REPLAY).get("finished"))


def _read_request(path: Path) -> dict[str, Any]:
    try:
        request = json.loads(read_small(path, _REPLAY_LIMIT))
    except (LogError, OSError, ValueError, RecursionError) as error:
        raise ReplayError(f"{path} cannot be read: {error}. Choose another folder (--out)") from error
    if not isinstance(request, dict):
        raise ReplayError(f"{path} is not what a replay writes: a JSON object. Choose another folder (--out)")
    return request


def _replayed_config(
    run: Path, out: Path, streams: Mapping[str, str] | None, overrides: Sequence[str], log: SelectionLog
) -> RunConfig:
    config = load_run_config(run / CONFIG, [f"save_folder={out}", "autoresume=true", *overrides])
    if Path(config.save_folder) != out:
        raise ConfigError(f"save_folder: is {out} for a replay (--out chooses it), not {config.save_folder}")
    if not _given(overrides, "model.trust_remote_code"):
        refuse_model_code(run, config, ReplayError, again="model.trust_remote_code=true again")
    if not streams:
        return config
    recorded = {stream["name"]: stream["location"] for stream in log.run.get("streams", [])}
    if unknown := sorted(set(streams) - set(recorded)):
        raise ConfigError(
            f"--stream {unknown[0]}: the run had no stream of that name; it had {', '.join(recorded) or 'none'}"
        )
    places = [streams.get(name, location) for name, location in recorded.items()]
    moved = [StreamConfig(local=place) if Path(place).is_dir() else StreamConfig(remote=place) for place in places]
    return config.model_copy(update={"data": config.data.model_copy(update={"streams": moved, "streams_root": None})})


def _claim(out: Path, config: RunConfig, request: dict[str, Any]) -> None:
    """Begins a replay's folder, or checks that the replay that was interrupted there is this one."""
    recorded = out / _REPLAY
    if recorded.exists():
        before = _read_request(recorded)
        if before.get("finished"):
            raise ReplayError(f"{out} already holds a finished replay; choose another folder (--out)")
        changed = [
            f"{key}: was {before.get(key)!r}, is {value!r}"
            for key, value in request.items()
            if before.get(key) != value
        ]
        if changed:
            raise ReplayError(
                f"{out} holds an interrupted replay of something else:\n  "
                + "\n  ".join(changed)
                + "\ngo on with it as it was begun, or choose another folder (--out)"
            )
    elif (out / CONFIG).exists():
        raise ReplayError(f"{out} holds a run, but no replay; choose another folder (--out)")
    claim_folder(out, config)
    if not recorded.exists():
        write_atomically(recorded, json.dumps(request | {"finished": False}, indent=2) + "\n")


def _check_what_composer_loads(
    run: Path, out: Path, config: RunConfig, checkpoint: Path | None, overrides: Sequence[str]
) -> None:
    """Reads what Composer would unpickle: the run's `load_path`, and the checkpoint in a folder that may have come with the run."""
    latest = (out / "checkpoints" / "latest-rank0.pt").absolute()
    _check_name(str(latest))
    if os.path.lexists(latest):
        read_checkpoint(latest)
    if checkpoint is not None:  # `ReplaySelection` has read it
        _check_name(str(checkpoint))
        return
    if config.load_path is None or _given(overrides, "load_path"):
        return
    if not Path(config.load_path).is_file():
        raise ReplayError(
            f"{run / CONFIG} begins with the weights in {config.load_path}, which is no file here that could be looked at first. A run's "
            f"folder may come from somebody else, and Composer unpickles what it loads: if you know whose it is, give "
            f"load_path={config.load_path} again"
        )
    _check_name(config.load_path)
    read_checkpoint(config.load_path)


def _check_name(path: str) -> None:
    """Composer parses names as URIs, fills in `{rank}` and unpacks archives, so that it may open another file than the one looked at."""
    if parse_uri(path) != ("", "", path) or {"{", "}"} & set(path) or is_tar(path) or is_compressed_pt(path):
        raise ResumeError(
            f"{path!r}: Composer would read another file than the one of this name (by a scheme, #, ?, ;, braces, or as an archive). Give "
            "the file and its folders plain names"
        )


class _Watch(Callback):
    """Times the steps, and compares the weights when they should be those of the original's checkpoint."""

    def __init__(
        self, algorithm: ReplaySelection, durations: Sequence[tuple[int, str]], target: tuple[int, Path] | None
    ) -> None:
        self._algorithm = algorithm
        self._durations = durations
        self.target = target
        """The step whose weights are compared, and the run's checkpoint of it."""
        self._began = 0.0
        self.seconds: list[float] = []
        self.comparison: WeightsComparison | None = None

    def after_load(self, state: State, logger: Logger) -> None:
        """Composer's event."""
        del logger
        self._last_as_the_run_did(state)

    def _last_as_the_run_did(self, state: State) -> None:
        """A run that was resumed with a longer max_duration went by that from there on."""
        done = state.timestamp.batch.value + self._algorithm.offset
        if done < self._algorithm.decisions.stop:
            state.max_duration = next(d for step, d in reversed(self._durations) if step <= done)

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Composer's event. The batch's loading does not count, as in `timings.jsonl`."""
        del state, logger
        self._began = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Composer's event."""
        del logger
        self._last_as_the_run_did(state)
        self.seconds.append(time.perf_counter() - self._began)
        if self.target is not None and state.timestamp.batch.value + self._algorithm.offset == self.target[0]:
            self.comparison = _compare_weights(state.get_model_state_dict(), *self.target)


def _check_duration(durations: Sequence[tuple[int, str]], algorithm: ReplaySelection, run: Path) -> None:
    """Raises ReplayError when training would end before the last step that is to be replayed."""
    last, decisions = Time.from_timestring(durations[-1][1]), algorithm.decisions
    if last.unit == TimeUnit.EPOCH:
        begins = decisions[decisions.first].epoch if algorithm.offset else 0
        reached = decisions[decisions.stop - 1].epoch - begins < last.value
    else:
        reached = last.unit != TimeUnit.BATCH or last.value + algorithm.offset >= decisions.stop
    if not reached:
        raise ReplayError(
            f"max_duration={durations[-1][1]} ends before step {decisions.stop - 1}, the last one of {run} that is to be replayed. Give "
            f"fewer steps (--steps), or a longer one: max_duration={decisions.stop - algorithm.offset}ba"
        )


def _compared_later(
    state: State, reached: int, offset: int, out: Path, step: int, checkpoint: Path
) -> WeightsComparison | None:
    """By where the replay stands, or by what it saved at the step itself; None when it kept neither."""
    if reached == step:
        return _compare_weights(state.get_model_state_dict(), step, checkpoint)
    saved = checkpoints_in(out / "checkpoints").get(step - offset)
    return None if saved is None else _compare_weights(model_weights(read_checkpoint(saved)), step, checkpoint)


def _compare_weights(ours: Mapping[str, Any], step: int, checkpoint: Path) -> WeightsComparison:
    theirs = model_weights(read_checkpoint(checkpoint))
    different, largest = 0, 0.0
    for name, weight in theirs.items():
        mine = ours.get(name)
        if not isinstance(mine, torch.Tensor) or mine.shape != weight.shape:
            different, largest = different + 1, float("inf")
        elif not torch.equal(mine.cpu(), weight):
            different += 1
            largest = max(largest, float((mine.cpu().double() - weight.double()).abs().max()))
    return WeightsComparison(
        step=step, checkpoint=str(checkpoint), tensors=len(theirs), different=different, largest_difference=largest
    )
