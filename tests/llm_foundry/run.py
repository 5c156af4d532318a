"""Runs in llm-foundry's environment: its own entry, `llmfoundry.command_utils.train.train`, on a configuration.

    python run.py FILE.yaml [KILL_AT]

With KILL_AT the process ends itself by SIGKILL after that many batches.
"""

from __future__ import annotations

import os
import signal
import sys

import torch
from composer.core import Callback
from llmfoundry.command_utils.train import train
from llmfoundry.registry import callbacks
from omegaconf import OmegaConf


@callbacks.register("kill")
class Kill(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def batch_end(self, state, logger) -> None:
        del logger
        if state.timestamp.batch == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small only wait for a second thread
    config = OmegaConf.load(sys.argv[1])
    if len(sys.argv) > 2:
        config.callbacks = {"kill": {"at": int(sys.argv[2])}}
    train(config).close()
