"""udsstream: utility-diversity aware data selection for MosaicML Composer and Streaming.

The public names are resolved on first use, so that `import udsstream` loads neither torch nor composer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from udsstream.config import SelectionConfig
    from udsstream.hf_trainer.replay import ReplayTrainer
    from udsstream.hf_trainer.trainer import SelectingTrainer
    from udsstream.mosaicml.algorithm import OnlineBatchSelection
    from udsstream.mosaicml.dataset import UDSStreamingDataset
    from udsstream.mosaicml.replay import ReplaySelection
    from udsstream.mosaicml.webdataset import UDSWebDataset
    from udsstream.scoring.candidates import Candidates, measures
    from udsstream.selection_log.reader import SelectionLog

__version__ = "0.1.0"
__all__ = [
    "Candidates",
    "OnlineBatchSelection",
    "ReplaySelection",
    "ReplayTrainer",
    "SelectingTrainer",
    "SelectionConfig",
    "SelectionLog",
    "UDSStreamingDataset",
    "UDSWebDataset",
    "__version__",
    "measures",
]

_HOME = {
    "Candidates": "udsstream.scoring.candidates",
    "OnlineBatchSelection": "udsstream.mosaicml.algorithm",
    "ReplaySelection": "udsstream.mosaicml.replay",
    "ReplayTrainer": "udsstream.hf_trainer.replay",
    "SelectingTrainer": "udsstream.hf_trainer.trainer",
    "SelectionConfig": "udsstream.config",
    "SelectionLog": "udsstream.selection_log.reader",
    "UDSStreamingDataset": "udsstream.mosaicml.dataset",
    "UDSWebDataset": "udsstream.mosaicml.webdataset",
    "measures": "udsstream.scoring.candidates",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'udsstream' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
