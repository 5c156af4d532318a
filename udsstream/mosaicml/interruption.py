"""Ctrl-C in a training job: the step in hand is finished and saved, so that nothing is lost. A second one ends the job at once.

With several ranks a signal may reach each at another step; they are left to their launcher, and a resumed run begins at the checkpoint
before.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist

__all__ = ["Interruption", "ignore_interrupts"]


class Interruption(Callback):
    """Give it to the Trainer as a callback, with `save_interval=interruption.saving(interval)`, and train within `on_ctrl_c()`."""

    def __init__(self) -> None:
        self.asked = False
        """Whether Ctrl-C was pressed."""
        self.step = 0
        """Steps whose result is in a checkpoint if the job ends by itself: those done when it was asked to."""
        self._training = False

    def saving(self, interval: str) -> Callable[[State, Event], bool]:
        """When Composer is to save: at `interval`, and after the step in which it was asked to stop."""
        at_interval = create_interval_scheduler(interval)

        def is_time(state: State, event: Event) -> bool:
            stopping = self.asked and event == Event.BATCH_CHECKPOINT
            if stopping:
                self.step = state.timestamp.batch.value
            return at_interval(state, event) or stopping

        return is_time

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Ends training with a KeyboardInterrupt before the next step, the last one being saved."""
        del logger
        if event == Event.BATCH_START:
            self._training = True
        elif event == Event.FIT_END:
            self._training = False
        elif event == Event.BEFORE_DATALOADER and self.step and self.step == state.timestamp.batch.value:
            raise KeyboardInterrupt

    @contextmanager
    def on_ctrl_c(self) -> Iterator[None]:
        """While it lasts, the first SIGINT of this process asks to stop. Without effect beside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = signal.getsignal(signal.SIGINT)
        process = os.getpid()

        def handle(number: int, frame: Any) -> None:
            if os.getpid() != process:  # a process that was forked off: its parent was asked too
                return
            if self.asked or not self._training or dist.get_world_size() > 1:
                signal.signal(signal.SIGINT, former)
                raise KeyboardInterrupt
            self.asked = True
            print(
                "\nudsstream: finishing this step and saving; Ctrl-C again to end at once", file=sys.stderr, flush=True
            )

        signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, former)


def ignore_interrupts(worker: int) -> None:
    """For a DataLoader's workers: Ctrl-C in a terminal reaches them too, and the step in hand needs them."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
