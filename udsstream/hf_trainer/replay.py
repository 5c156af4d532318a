"""`ReplayTrainer`: trains again on what the log of a `SelectingTrainer` says was chosen, without a scorer; or decides again and compares.

    trainer = ReplayTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, log_dir="runs/a")
    trainer.train()

With everything else as it was (weights, arguments, data, machine) the weights are those of the run, bit for bit. With anything else changed
it is a re-use of the data; what is known to differ is in `differences`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from transformers.trainer_callback import TrainerCallback

from udsstream.config import SelectionConfig
from udsstream.errors import ReplayError
from udsstream.hf_trainer.batches import cut, joined, without_ids
from udsstream.hf_trainer.checkpoint import CheckpointState, newest_whole_checkpoint
from udsstream.hf_trainer.logged_rows import LoggedBatches, LoggedRows, collator_of_logged_rows, numbers_by_id
from udsstream.hf_trainer.parts import PartsTrainer
from udsstream.hf_trainer.rows import StreamRows
from udsstream.hf_trainer.scored_model import TrainerDevice
from udsstream.mosaicml.batch import real_tokens, sample_ids_of
from udsstream.mosaicml.dataset import stream_identities
from udsstream.mosaicml.method_inputs import MethodInputs
from udsstream.mosaicml.replay_check import Tally, compare
from udsstream.mosaicml.replay_data import LoggedDecisions, LoggedStep
from udsstream.mosaicml.run_description import describe_model, library_versions
from udsstream.mosaicml.run_log import check_same_projection, check_streams, former_memory
from udsstream.mosaicml.sample_identity import NumberedRows
from udsstream.mosaicml.selector import CandidateSelector
from udsstream.mosaicml.weights import weights_differences
from udsstream.scoring.candidates import Candidates
from udsstream.selection_log.reader import SelectionLog

__all__ = ["ReplayTrainer"]

log = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers", "peft", "numpy")


class ReplayTrainer(PartsTrainer):
    """A `transformers.Trainer` that trains on what a log says was chosen. It ends where the log ends.

    From a checkpoint of the run on: `train(resume_from_checkpoint="…/checkpoint-N")`; the Trainer takes weights, optimizer and random state
    from it.

    Args:
        *args: of `transformers.Trainer`.
        **kwargs: of `transformers.Trainer`. `per_device_train_batch_size` and `gradient_accumulation_steps` must be the run's.
        log_dir: the log to replay. It is only read.
        stop: ends before this step. None: at the log's end.
        verify: read all candidates, decide again and compare each decision with the log (`tally`). Trains on the logged choice.
        trunk: to verify, as `SelectingTrainer` was given it.
        head: likewise.
        warm_start: likewise.
        reference: likewise.
        validation: likewise.
        method: to verify, the function, where the run's method was one of one's own.

    Attributes:
        differences: what is known to be other than in the run, one line each; while it is empty, equal weights are expected.
        tally: with `verify`, what was found.

    Raises:
        LogError: the log cannot be read.
        ReplayError: it does not hold these steps; or, before training starts, what was given does not fit the log.
        ResumeError: the data set is another than the run had.
    """

    def __init__(
        self,
        *args: Any,
        log_dir: str | Path,
        stop: int | None = None,
        verify: bool = False,
        trunk: str | None = None,
        head: str | None = None,
        warm_start: str | Path | None = None,
        method: Callable[[Candidates], Any] | None = None,
        reference: str | Path | Mapping[int, float] | None = None,
        validation: Iterable[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.selection_log = SelectionLog.open(log_dir)
        self.decisions = LoggedDecisions(self.selection_log, first=0, stop=stop, candidates=verify)
        self.differences: list[str] = []
        self.tally = Tally() if verify else None
        self._given: dict[str, Any] = {"trunk": trunk, "head": head, "warm_start": warm_start, "method": method}
        self._inputs: dict[str, Any] = {"reference": reference, "validation": validation}
        self._checkpoint: Path | None = None
        self._selector: CandidateSelector | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_Events(self))

    # The Trainer's interface ------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `Trainer.train`; the checkpoint may be the run's, or this replay's."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_whole_checkpoint(Path(str(self.args.output_dir))) or "") or True
        self._checkpoint = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """A data loader over the rows that the log names.

        Raises:
            ReplayError: the data set, or its batches, are not the run's.
        """
        plain = self._plain_loader(super().get_train_dataloader)
        inner = getattr(plain, "base_dataloader", plain)
        accumulation = self.args.gradient_accumulation_steps
        self._check_batches(len(plain), accumulation)
        loader = DataLoader(
            self._rows(inner.dataset),
            batch_sampler=LoggedBatches(
                self.decisions,
                batches=len(plain),
                batch_size=self._batch_size,
                accumulation=accumulation,
                candidates=self.tally is not None,
            ),
            collate_fn=collator_of_logged_rows(inner.collate_fn),
            num_workers=inner.num_workers,
            pin_memory=inner.pin_memory,
            prefetch_factor=inner.prefetch_factor,
            persistent_workers=inner.persistent_workers,
            worker_init_fn=inner.worker_init_fn,
        )
        prepared = self.accelerator.prepare(loader)
        prepared.device = None  # as in `_plain_loader`
        return prepared

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, *args: Any) -> Any:  # type: ignore[override]
        """The parts that the run trained on in this update."""
        found = self._taken(epoch_iterator, num_batches)
        if not found:
            return self._counted([], num_batches, *args)
        logged = self.decisions[self.state.global_step]
        parts = [part for part in found if len(part["input_ids"])]
        self._check_rows(logged, parts)
        if self.tally is not None:
            batch = joined(parts, self._config.max_seq_len)
            self._decide_again(logged, batch)
            parts = cut(batch, logged.kept, len(found)) if logged.scored else parts
        elif logged.scored:
            parts = cut(parts[0], range(len(logged.kept)), len(found))
        return self._counted([without_ids(part) for part in parts], num_batches, *args)

    # Events -----------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        step = self.state.global_step
        if step >= self.decisions.stop:
            raise ReplayError(
                f"the checkpoint is at step {step}, but this replay ends before step {self.decisions.stop}"
            )
        self.differences = self._known_differences()
        for line in self.differences:
            log.warning("This replay differs from the run, so equal weights are not to be expected: %s", line)
        if self.tally is not None:
            self.tally = Tally()
            self._selector = self._selector_of_the_run()

    # Deciding again ---------------------------------------------------------------------------------------------------

    @property
    def _config(self) -> SelectionConfig:
        config = SelectionConfig(**self.selection_log.run["selection"])
        method = self._given["method"]
        return config if method is None else dataclasses.replace(config, method=method, measured=None)

    def _decide_again(self, logged: LoggedStep, batch: Mapping[str, Any]) -> None:
        assert self._selector is not None
        assert self.tally is not None
        decision = self._selector.decide(
            batch,
            selects=logged.scored,
            epoch=logged.epoch,
            batch_in_epoch=logged.batch_in_epoch,
            learning_rate=self._learning_rate,
        )
        if not logged.scored:
            self.tally.unscored += 1
            return
        self.tally.add(compare(logged, decision))
        # What the log kept enters the memory, so that one divergence does not make all later steps differ.
        if self._selector.remember(decision, logged.kept) is not None:
            recorded = self._digests.get(logged.step)
            if recorded is not None:
                self.tally.memories += 1
                self.tally.equal_memories += recorded == self._selector.buffer.digest

    def _selector_of_the_run(self) -> CandidateSelector:
        """A selector with the settings and the memory that the run had before the first update of this replay."""
        run, config, called = self.selection_log.run, self._config, self._called_with_batch()
        inputs = MethodInputs.of(config, **self._inputs)
        inputs.check_resumed(run)
        selector = CandidateSelector(
            config,
            called,
            device=TrainerDevice(self.args.device),
            trunk=called.name_of(self._given["trunk"], "trunk"),
            head=called.name_of(self._given["head"], "head"),
            inputs=inputs,
        )
        pushes = self.selection_log.pushes(columns=["step", "digest"])
        self._digests: dict[int, bytes] = dict(
            zip(pushes["step"].to_pylist(), pushes["digest"].to_pylist(), strict=True)
        )
        if self._checkpoint is not None:
            state = CheckpointState.read(self._checkpoint, config)
            selector.restore_memory(state.memory())
        elif run.get("warm_start"):
            former = self._given["warm_start"]
            if former is None:
                raise ReplayError(
                    f"the run began with the memory of run {run['warm_start']['run_id']}, without which its decisions cannot be made "
                    "again; give the folder of that run's log as warm_start"
                )
            check_same_projection(Path(former), config, selector.vocab_size)
            memory, origin = former_memory(Path(former), config.embedding_dim)
            if origin != run["warm_start"]:
                raise ReplayError(
                    f"the run began with another memory than {former} ends with: was {run['warm_start']}, is {origin}"
                )
            selector.take_over(np.asarray(memory.embeddings))
        return selector

    # What the log and the run that replays it must agree on -----------------------------------------------------------

    def _rows(self, dataset: Any) -> LoggedRows:
        run = self.selection_log.run
        kind = (run.get("loader") or {}).get("sample_ids")
        if kind == "content-hash":
            raise ReplayError(
                "the run named its samples by their tokens (sample_ids='content-hash'), from which no row can be found again; a replay "
                "needs ids that are the rows' own"
            )
        streams = run.get("streams") or []
        if not streams:
            return LoggedRows(dataset, numbers_by_id(dataset))
        source = dataset if isinstance(dataset, StreamRows) else NumberedRows(dataset)
        check_streams([[stream["name"], stream["index_sha256"]] for stream in streams], stream_identities(source))
        return LoggedRows(dataset, None)

    def _check_batches(self, batches: int, accumulation: int) -> None:
        recorded = self.selection_log.run.get("loader") or {}
        here = {
            "batch_size": self._batch_size * accumulation,
            "gradient_accumulation_steps": accumulation,
            "batches_per_epoch": -(-batches // accumulation),
        }
        wrong = [
            f"{name}: was {recorded.get(name)}, is {here[name]}" for name in here if recorded.get(name) != here[name]
        ]
        if wrong:
            raise ReplayError(
                f"the updates of {self.selection_log.root} were made of other batches than this Trainer's:\n  "
                + "\n  ".join(wrong)
                + "\ngive the run's per_device_train_batch_size, gradient_accumulation_steps, dataloader_drop_last and data set "
                "(batch_size counts the candidates of an update, batches_per_epoch updates)"
            )

    def _check_rows(self, logged: LoggedStep, parts: list[Mapping[str, Any]]) -> None:
        found = [sample_id for part in parts for sample_id in sample_ids_of(part)]
        if found != logged.sample_ids:
            raise ReplayError(
                f"step {logged.step}: the batches hold the samples {found}, but the log names {logged.sample_ids}, in this order; the "
                "collator must keep the order and the number of its rows"
            )
        lengths = [length for part in parts for length in real_tokens(part).sum(dim=1).tolist()]
        if lengths == logged.tokens or any("tokens" in line for line in self.differences):
            return
        row = next(row for row, length in enumerate(lengths) if length != logged.tokens[row])
        line = (
            f"step {logged.step}, sample {found[row]}: has {lengths[row]} tokens, the run logged {logged.tokens[row]} (another tokenizer, "
            "template or collator)"
        )
        self.differences.append(line)
        log.warning("This replay differs from the run, so equal weights are not to be expected: %s", line)

    def _known_differences(self) -> list[str]:
        run, model, versions = self.selection_log.run, describe_model(self.model), library_versions()  # type: ignore[arg-type]
        old: dict[str, Any] = {
            "trainer": run.get("trainer"),
            "model": run.get("model"),
            "tokenizer": run.get("tokenizer"),
            "training seed": (run.get("seeds") or {}).get("training"),
        }
        new: dict[str, Any] = {
            "trainer": "transformers.Trainer",
            "model": dict(model["model"]),
            "tokenizer": str(getattr(self.processing_class, "name_or_path", "") or "unknown"),
            "training seed": self.args.seed,
        }
        old |= {name: (run.get("versions") or {}).get(name) for name in _LIBRARIES}
        new |= {name: versions[name] for name in _LIBRARIES}
        lines = [f"{name}: was {old[name]!r}, is {new[name]!r}" for name in old if old[name] != new[name]]
        lines += weights_differences(run.get("weights"), self.model, at_start=self.state.global_step == 0)  # type: ignore[arg-type]
        sampler = (run.get("loader") or {}).get("sampler")
        if sampler not in ("SeedableRandomSampler", "SequentialSampler"):
            lines.append(
                f"sampler: the run's order came from a {sampler}, which may have drawn from the random numbers of training"
            )
        return lines


class _Events(TrainerCallback):
    """Hands on what the Trainer has no methods for, and ends training where the log ends."""

    def __init__(self, trainer: ReplayTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, state, control, kwargs
        self._trainer._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, kwargs
        if state.global_step >= self._trainer.decisions.stop:
            control.should_training_stop = True
