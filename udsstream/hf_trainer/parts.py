"""What `SelectingTrainer` and `ReplayTrainer` share: a Trainer whose updates are made of parts that were cut from their batches."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers.trainer import Trainer

from udsstream.errors import ConfigError, RankError
from udsstream.hf_trainer.batches import is_empty
from udsstream.hf_trainer.rows import readable_by_number
from udsstream.hf_trainer.scored_model import CalledWithBatch
from udsstream.mosaicml.batch import take_rows
from udsstream.mosaicml.rng_state import keeps_rng_state

__all__ = ["PartsTrainer"]

log = logging.getLogger(__name__)


class PartsTrainer(Trainer):
    """A Trainer that trains on the parts of each update, some of which may have no rows, and that is not changed by being evaluated.

    Raises:
        RankError: more than one process or device takes part.
        ConfigError: a setting of the Trainer's cannot be used with selection.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        arguments = self.args
        for wrong, what in (
            (arguments.world_size > 1, f"{arguments.world_size} processes"),
            (arguments.n_gpu > 1, f"{arguments.n_gpu} GPUs in one process (CUDA_VISIBLE_DEVICES=0 leaves one)"),
            (self.is_deepspeed_enabled, "DeepSpeed"),
            (self.is_fsdp_enabled, "FSDP"),
        ):
            if wrong:
                raise RankError(
                    f"the Trainer is set up for {what}, but here one process chooses for one device; use one, or the Composer adapter, "
                    "where many ranks choose together (docs/many_ranks.md)"
                )
        if arguments.auto_find_batch_size:
            raise ConfigError(
                "auto_find_batch_size=True starts again with smaller batches when memory runs out, in a log that has begun with larger "
                "ones; leave it out, and set per_device_train_batch_size"
            )

    def _called_with_batch(self) -> CalledWithBatch:
        """The model, for scoring."""
        assert self.model is not None
        return CalledWithBatch(self.model, self.accelerator.mixed_precision)  # type: ignore[arg-type]

    @property
    def _batch_size(self) -> int:
        """Rows of a batch of the data loader; of a resumed run those that it had."""
        assert self._train_batch_size is not None
        return self._train_batch_size

    @property
    def _learning_rate(self) -> float:
        """Of the update that is about to be made: the first parameter group's."""
        assert self.optimizer is not None
        return float(self.optimizer.param_groups[0]["lr"])  # type: ignore[attr-defined]

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer.training_step`; a part without rows adds nothing."""
        if is_empty(inputs):
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`, but training goes on as if nothing had been evaluated: the random state is put back."""
        with keeps_rng_state():
            return super().evaluate(*args, **kwargs)

    def _taken(self, epoch_iterator: Iterator, wanted: int) -> list[Any]:
        """The batches of the next update; none at an epoch's end, and none when a run is resumed that had come to its end.

        (A Trainer that resumes from a run's last checkpoint would make one update more.)
        """
        if self.state.global_step >= self.state.max_steps:
            log.warning("The run had come to its end at update %d: nothing is left to train.", self.state.global_step)
            self.control.should_training_stop = True
            return []
        return list(itertools.islice(epoch_iterator, wanted))

    def _counted(self, parts: Sequence[Mapping[str, Any]], wanted: int, *args: Any) -> Any:
        """The parts of an update as `get_batch_samples` returns them, with the number of their labels, by which the loss is divided.

        Args:
            parts: one for each batch that there was.
            wanted: batches that the Trainer asked for.
        """
        # A Trainer that has resumed within an epoch miscounts that epoch's last, incomplete update, and would not make it.
        whole = list(parts)
        if parts:
            whole += [take_rows(parts[0], [])] * (wanted - len(parts))
        found, labels = super().get_batch_samples(iter(whole), len(whole), *args)
        if labels is None and any(map(is_empty, parts)):
            raise ConfigError(
                f"an update kept {sum(not is_empty(part) for part in parts)} rows, fewer than the {len(parts)} batches that it accumulates "
                "over, and this model's loss is a mean over each of them, which the Trainer would divide by too many; keep more, or set a "
                "smaller gradient_accumulation_steps"
            )
        return found, labels

    def _plain_loader(self, make: Callable[[], Any]) -> Any:
        """The Trainer's own data loader over `train_dataset`, with `sample_id` among the columns that it leaves in the rows, and with
        batches that stay on the host: only what is kept goes to the device.

        Args:
            make: the Trainer's `get_train_dataloader`.

        Raises:
            ConfigError: the data set can only be iterated over.
        """
        self.train_dataset = readable_by_number(self.train_dataset)
        self._set_signature_columns_if_needed()
        columns = list(self._signature_columns or [])
        self._signature_columns = [*columns, "sample_id"]
        try:
            loader = make()
        finally:
            self._signature_columns = columns
        if hasattr(loader, "device"):
            loader.device = None
        return loader
