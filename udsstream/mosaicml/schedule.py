"""When selection is on: `start`, `end` and `interrupt` against Composer's clock."""

from __future__ import annotations

from collections.abc import Mapping

from composer.core import State, Time, TimeUnit

from udsstream.config import SelectionConfig

__all__ = ["selects_now", "should_select"]


def should_select(*, elapsed: float, batch_in_epoch: int, now: Mapping[TimeUnit, int], config: SelectionConfig) -> bool:
    """Whether a step selects: at or after `start`, before `end`, and not one of the `interrupt`-th batches of its epoch.

    Args:
        elapsed: fraction of the run that is done, for times in `dur`.
        batch_in_epoch: place of this batch in its epoch, from 0.
        now: batches, epochs, samples and tokens done.
    """

    def reached(timestring: str) -> bool:
        point = Time.from_timestring(timestring)
        done = elapsed if point.unit == TimeUnit.DURATION else now[TimeUnit(point.unit)]
        return done >= point.value

    interrupted = config.interrupt > 0 and (batch_in_epoch + 1) % config.interrupt == 0
    return reached(config.start) and not (config.end is not None and reached(config.end)) and not interrupted


def selects_now(state: State, config: SelectionConfig) -> bool:
    """`should_select` at a Composer state's time."""
    timestamp = state.timestamp
    elapsed = state.get_elapsed_duration()
    return should_select(
        elapsed=float(elapsed.value) if elapsed is not None else 0.0,
        batch_in_epoch=timestamp.batch_in_epoch.value,
        now={
            TimeUnit.BATCH: timestamp.batch.value,
            TimeUnit.EPOCH: timestamp.epoch.value,
            TimeUnit.SAMPLE: timestamp.sample.value,
            TimeUnit.TOKEN: timestamp.token.value,
        },
        config=config,
    )
