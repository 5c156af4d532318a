"""The global generators' state as plain types and tensors, so that a checkpoint can carry it and be opened without pickle.

Composer 0.32 saves that state too but does not restore it when a run resumes in the middle of an epoch of a StreamingDataset
(`trainer.py:2401`), so dropout, and with it the weights, would differ.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist

__all__ = ["NeutralEvaluation", "gather_rng_state", "keeps_rng_state", "load_rng_state"]


class NeutralEvaluation(Callback):
    """Puts the random state back after each evaluation, so that training does not depend on whether, when and on what it was evaluated.

    Composer evaluates in the middle of training, and making the data loader's iterator draws from the global generator.
    """

    def __init__(self) -> None:
        self._before: dict[str, Any] | None = None

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Evaluations within training and by `Trainer.eval()` alike."""
        del state, logger
        if event in (Event.EVAL_BEFORE_ALL, Event.EVAL_STANDALONE_START):
            self._before = _rng_state()
        elif event in (Event.EVAL_AFTER_ALL, Event.EVAL_STANDALONE_END) and self._before is not None:
            _set_rng_state(self._before)
            self._before = None


@contextlib.contextmanager
def keeps_rng_state() -> Iterator[None]:
    """Runs a block that may draw, and puts the generators back as they were."""
    before = _rng_state()
    try:
        yield
    finally:
        _set_rng_state(before)


def gather_rng_state() -> list[dict[str, Any]]:
    """The generators' state of every rank, in rank order. A collective: every rank must call it."""
    return list(dist.all_gather_object(_rng_state()))


def load_rng_state(states: list[dict[str, Any]]) -> None:
    """Puts back this rank's share of what `gather_rng_state` returned; a rank that did not exist then keeps its own."""
    rank = dist.get_global_rank()
    if rank < len(states):
        _set_rng_state(states[rank])


def _rng_state() -> dict[str, Any]:
    version, words, gauss_next = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss_next],
        "numpy": {
            "bit_generator": str(numpy_state["bit_generator"]),
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    numpy_state = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": numpy_state["bit_generator"],
            "state": {"key": numpy_state["key"].numpy().astype(np.uint32), "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.random.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
