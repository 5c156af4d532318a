"""`ReplaySelection`: trains again on what a log says was chosen, without a scorer; or decides again and compares.

    replay = ReplaySelection("runs/a")
    trainer = composer.Trainer(model=model, train_dataloader=replay.dataloader(dataset, collate_fn=collate), algorithms=[replay], …)

With everything else as it was (weights, optimizer, seeds, microbatches, evaluations, machine) the weights are those of the original run,
bit for bit: scoring drew no random number, both runs make one data loader iterator per epoch, and the batch is what the original's
became after it was cut. With anything else changed it is a re-use of the data; what is known to differ is in `differences`.

Counting: Composer counts the samples and tokens of the *kept* rows here, and of the candidates in the original; so durations and schedules
must be in batches or epochs.

Several ranks: as many as trained then read, each, what they trained on then, and equal weights are expected. Any other number reads the
same data in the same order, in equal shares.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from composer.core import Algorithm, Event, State, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from streaming import StreamingDataset
from torch import nn
from torch.utils.data import DataLoader

from udsstream.config import SelectionConfig
from udsstream.errors import ConfigError, ReplayError
from udsstream.mosaicml.algorithm import OnlineBatchSelection
from udsstream.mosaicml.batch import real_tokens, sample_ids_of, trim_padding
from udsstream.mosaicml.checkpoint import read_checkpoint, selection_state
from udsstream.mosaicml.dataset import stream_identities
from udsstream.mosaicml.method_inputs import MethodInputs, learning_rate_of
from udsstream.mosaicml.ranks import kept_batch, on_rank_zero
from udsstream.mosaicml.replay_check import Tally, compare
from udsstream.mosaicml.replay_data import LoggedDecisions, LoggedSamples, LoggedStep, LoggedSteps
from udsstream.mosaicml.rng_state import gather_rng_state, load_rng_state
from udsstream.mosaicml.run_description import describe_model, library_versions
from udsstream.mosaicml.run_log import check_same_projection, check_streams, former_memory
from udsstream.mosaicml.selector import CandidateSelector, unwrapped
from udsstream.mosaicml.webdataset import UDSWebDataset
from udsstream.mosaicml.weights import weights_differences
from udsstream.scoring.candidates import Candidates
from udsstream.selection_log.reader import SelectionLog

__all__ = ["ReplaySelection"]

log = logging.getLogger(__name__)

STATE_VERSION = 2


class ReplaySelection(Algorithm):
    """Trains on what a log says was chosen.

    Args:
        log_dir: the log to replay. It is only read.
        steps: (first, stop), the steps `first` to before `stop`; either may be None. None: all; after a checkpoint, all from there on.
        verify: read all candidates, decide again, and compare each decision with the log (`tally`). Trains on the logged choice.
        checkpoint: the original's checkpoint that the Trainer loads (`load_path`), when the replay begins behind the log's first step: its
            random state and, to verify, its memory are taken from it. It is read without running what it holds, and only after that
            by Composer.
        verify_shards: check each shard that is read against the hashes in its stream's index.
        trunk: to verify, as `OnlineBatchSelection` was given it.
        head: likewise.
        warm_start: likewise.
        reference: likewise.
        validation: likewise.
        method: to verify, the function, where the run's method was one of one's own.

    Attributes:
        differences: what is known to be other than in the original, one line each; while it is empty, equal weights are expected.
        tally: with `verify`, what was found.
        offset: step of the log that is Composer's batch 0.

    Raises:
        LogError: the log cannot be read.
        ReplayError: it does not hold these steps; or, before training starts, what was given does not fit the log.
        ResumeError: the checkpoint cannot be read, or the streams are others than the run had.
    """

    def __init__(
        self,
        log_dir: str | Path,
        *,
        steps: tuple[int | None, int | None] | None = None,
        verify: bool = False,
        checkpoint: str | Path | None = None,
        verify_shards: bool = True,
        trunk: str | None = None,
        head: str | None = None,
        warm_start: str | Path | None = None,
        method: Callable[[Candidates], Any] | None = None,
        reference: str | Path | Mapping[int, float] | None = None,
        validation: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        self.log = SelectionLog.open(log_dir)
        self.verify = verify
        self._original = None
        first, stop = steps or (None, None)
        if checkpoint is not None:
            self._original = self._read_original(Path(checkpoint))
            if first not in (None, self._original["step"]):
                raise ReplayError(
                    f"steps from {first} on are to be replayed, but {checkpoint} was saved before step {self._original['step']}; "
                    "choose the checkpoint of that step, or leave the first step out"
                )
            first = self._original["step"]
        self.decisions = LoggedDecisions(
            self.log, first=first, stop=stop, candidates=verify, ranks=dist.get_world_size()
        )
        self._verify_shards = verify_shards
        self._module_names = {"trunk": trunk, "head": head}
        self._warm_start = Path(warm_start) if warm_start is not None else None
        self._own_method = method
        if method is not None:
            logged, given = (
                (self.log.run.get("selection") or {}).get("method"),
                SelectionConfig(method=method).method_name,
            )
            if given != logged:
                raise ReplayError(
                    f"the run chose by {logged}, the given method is {given}; give the function that it had"
                )
        self._inputs: dict[str, Any] = {"reference": reference, "validation": validation}
        self._loader: DataLoader | None = None
        self._steps: LoggedSteps | None = None
        self._samples: LoggedSamples | None = None
        self._selector: CandidateSelector | None = None
        self.differences: list[str] = []
        self.tally = Tally() if verify else None
        # Not 0 where the replay begins behind the log's first step with fresh weights.
        self.offset = 0 if self._original is not None else self.decisions.first
        self._pending_rng: list[dict[str, Any]] | None = None if self._original is None else self._original["rng"]
        self._memory: Mapping[str, Any] | None = None if self._original is None else self._original["memory"]
        self._resumed = False
        self._handlers = {
            Event.INIT: self._on_init,
            Event.AFTER_LOAD: self._on_after_load,
            Event.FIT_START: self._on_fit_start,
            Event.EPOCH_START: self._on_epoch_start,
            Event.AFTER_DATALOADER: self._on_batch,
            Event.BATCH_END: self._on_batch_end,
            Event.EPOCH_END: self._restore_rng,
        }

    def use(self, *, validation: Iterable[Mapping[str, Any]] | None = None) -> None:
        """To verify: the validation batches, where they are made of a tokenizer that comes with the model."""
        if validation is not None:
            self._inputs["validation"] = validation

    def dataloader(
        self, dataset: StreamingDataset | UDSWebDataset, *, collate_fn: Callable[..., Any], **settings: Any
    ) -> DataLoader:
        """The data loader that the Trainer must be given.

        Args:
            dataset: with the streams of the run, in its order, wherever they lie now. Nothing is shuffled or skipped by it.
            collate_fn: the run's collator; `sample_id` is in each sample.
            settings: of `torch.utils.data.DataLoader`, such as `num_workers`; what decides about order and batches is refused.

        Raises:
            ConfigError: a setting would change order or batches.
            ResumeError: a stream is not the one that the run had.
        """
        ours = {"batch_size", "batch_sampler", "sampler", "shuffle", "drop_last", "generator"}
        if wrong := sorted(ours & set(settings)):
            raise ConfigError(f"{', '.join(wrong)}: the log decides about order and batches; leave it out")
        recorded = self.log.run.get("streams", [])
        check_streams([[stream["name"], stream["index_sha256"]] for stream in recorded], stream_identities(dataset))
        candidates = self._candidates_per_step()
        self._steps = LoggedSteps(
            self.decisions, rank=dist.get_global_rank(), batches_per_epoch=self._batches_per_epoch(candidates)
        )
        self._samples = LoggedSamples(dataset, verify_shards=self._verify_shards)
        if self._verify_shards and (unhashed := self._samples.unhashed_streams()):
            log.warning(
                "The streams in %s were written without hashes: whether their samples are those that the run saw cannot be checked.",
                ", ".join(unhashed),
            )
        self._loader = DataLoader(self._samples, batch_sampler=self._steps, collate_fn=collate_fn, **settings)
        # Composer takes its default microbatch from here, as it did in the original; torch leaves None beside a batch sampler and
        # forbids to set it.
        self._loader.__dict__["batch_size"] = candidates
        return self._loader

    # Composer's interface ---------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.log.root)!r}, steps=({self.decisions.first}, {self.decisions.stop}), verify={self.verify})"

    def match(self, event: Event, state: State) -> bool:
        """Runs at INIT, AFTER_LOAD and FIT_START, at the ends of epochs, and around every batch."""
        del state
        return event in self._handlers

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Does what the event asks for."""
        self._handlers[event](state, logger)

    def state_dict(self) -> dict[str, Any]:
        """What an interrupted replay needs to go on, as plain types, bytes and tensors."""
        state: dict[str, Any] = {"version": STATE_VERSION, "run_id": self.log.run["run_id"], "offset": self.offset}
        state["differences"] = list(self.differences)
        state["rng"] = gather_rng_state()
        if self._selector is not None and self.tally is not None:
            state["memory"] = self._selector.memory_state()
            state["tally"] = self.tally.as_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = False) -> None:
        """Goes on with an interrupted replay.

        Raises:
            ReplayError: the checkpoint is of a replay of another run, of other steps, or with another `verify`.
        """
        del strict
        if state.get("version") != STATE_VERSION or state["run_id"] != self.log.run["run_id"]:
            raise ReplayError(
                f"the checkpoint belongs to a replay of run {state.get('run_id')} (version {state.get('version')}), but {self.log.root} "
                f"holds run {self.log.run['run_id']} (version {STATE_VERSION})"
            )
        if state["offset"] != self.offset or ("tally" in state) != self.verify:
            raise ReplayError(
                "the checkpoint belongs to a replay of other steps, or one with"
                f"{'out' if self.verify else ''} verify; go on with the settings that it had"
            )
        self._resumed = True
        self.differences = list(state["differences"])
        self._pending_rng = state["rng"]
        if self.verify:
            self._memory = state["memory"]
            self.tally = Tally(**state["tally"])

    # Events -----------------------------------------------------------------------------------------------------------

    def _on_init(self, state: State, logger: Logger) -> None:
        del logger
        others = [
            type(a).__name__
            for a in state.algorithms
            if a is not self and isinstance(a, (ReplaySelection, OnlineBatchSelection))
        ]
        if others:
            raise ConfigError(
                f"ReplaySelection was given to the Trainer beside {others[0]}, but both decide what is trained on; give one"
            )

    def _on_after_load(self, state: State, logger: Logger) -> None:
        del logger
        batch = state.timestamp.batch.value
        if self._resumed:
            return
        expected = 0 if self._original is None else self._original["step"]
        if batch != expected:
            raise ReplayError(
                f"the Trainer begins at batch {batch}, but this replay at batch {expected}: "
                + (
                    "give the checkpoint that is loaded to ReplaySelection(checkpoint=) too, so that random state and position follow"
                    if self._original is None
                    else "give the Trainer load_path, the checkpoint that ReplaySelection was given, without load_weights_only"
                )
            )

    def _on_fit_start(self, state: State, logger: Logger) -> None:
        del logger
        if self._loader is None or state.train_dataloader is not self._loader:
            raise ConfigError(
                "the Trainer's train_dataloader is not the one that ReplaySelection.dataloader() made, so it would not read what the log "
                "names; give it that one"
            )
        if state.max_duration is not None and state.max_duration.unit not in (TimeUnit.BATCH, TimeUnit.EPOCH):
            raise ConfigError(
                f"max_duration={state.max_duration.to_timestring()}: a replay reads fewer samples and tokens than the run looked at; state "
                "the duration in batches (ba) or epochs (ep)"
            )
        model = unwrapped(state.model)
        # Those of an interrupted replay stay: what it had begun with is not seen any more.
        self.differences = list(dict.fromkeys([*self.differences, *self._known_differences(state, model)]))
        for line in self.differences:
            log.warning("This replay differs from the run, so equal weights are not to be expected: %s", line)
        if self.verify and self._selector is None:
            self._selector = self._selector_of_the_run(state)
        self._go_to(state)

    def _on_epoch_start(self, state: State, logger: Logger) -> None:
        self._restore_rng(state, logger)
        self._go_to(state)

    def _on_batch(self, state: State, logger: Logger) -> None:
        self._restore_rng(state, logger)
        logged = self.decisions[state.timestamp.batch.value + self.offset]
        mine = logged.rows_of(dist.get_global_rank())
        expected = [logged.sample_ids[place] for place in mine]
        if (found := sample_ids_of(state.batch)) != expected:
            raise ReplayError(
                f"step {logged.step}: the batch holds the samples {found}, but the log names {expected}, in this order; the "
                "collator must keep the order and the number of its samples"
            )
        self._check_lengths(state, logged, mine)
        metrics: dict[str, float] = {"replay/step": float(logged.step), "replay/kept": float(len(logged.kept))}
        if self.verify:
            metrics |= self._decide_again(state, logged)
            if logged.scored:
                state.batch = kept_batch(state.batch, logged.order, logged.kept)
        elif logged.scored:
            state.batch = trim_padding(state.batch)
        logger.log_metrics(metrics)

    def _on_batch_end(self, state: State, logger: Logger) -> None:
        del logger
        if state.timestamp.batch.value + self.offset >= self.decisions.stop:
            state.stop_training()

    def _restore_rng(self, state: State, logger: Logger) -> None:
        """As in `OnlineBatchSelection`: not before the data loader's iterator was made, which draws."""
        del state, logger
        if self._pending_rng is not None:
            load_rng_state(self._pending_rng)
            self._pending_rng = None

    # One step ---------------------------------------------------------------------------------------------------------

    def _go_to(self, state: State) -> None:
        assert self._steps is not None
        # Fresh weights on later steps: Composer's epoch 0 is the log's epoch of the first of them.
        first_epoch = self.decisions[self.decisions.first].epoch if self.offset else 0
        self._steps.go_to(state.timestamp.batch.value + self.offset, epoch=state.timestamp.epoch.value + first_epoch)

    def _check_lengths(self, state: State, logged: LoggedStep, mine: list[int]) -> None:
        lengths = real_tokens(state.batch).sum(dim=1).tolist()
        expected = [logged.tokens[place] for place in mine]
        if lengths == expected or any("tokens" in line for line in self.differences):
            return
        row = next(row for row, length in enumerate(lengths) if length != expected[row])
        line = (
            f"step {logged.step}, sample {logged.sample_ids[mine[row]]}: has {lengths[row]} tokens, the run logged {expected[row]} "
            "(another tokenizer, template, max_seq_len or collator)"
        )
        self.differences.append(line)
        log.warning("This replay differs from the run, so equal weights are not to be expected: %s", line)

    def _decide_again(self, state: State, logged: LoggedStep) -> dict[str, float]:
        assert self._selector is not None
        assert self.tally is not None
        decision = self._selector.decide(
            state.batch,
            selects=logged.scored,
            epoch=logged.epoch,
            batch_in_epoch=logged.batch_in_epoch,
            learning_rate=learning_rate_of(state),
        )
        if not logged.scored:
            self.tally.unscored += 1
            return {}
        comparison = compare(logged, decision)
        self.tally.add(comparison)
        if decision.embeddings is not None:
            # What the log kept enters the memory, so that one divergence does not make all later steps differ.
            self._selector.remember(decision, logged.kept)
            recorded = self._memory_digests().get(logged.step)
            if recorded is not None:
                self.tally.memories += 1
                self.tally.equal_memories += recorded == self._selector.buffer.digest
        return {
            "replay/same_choice": float(comparison.same_choice),
            "replay/largest_score_difference": comparison.largest_difference,
        }

    def _memory_digests(self) -> dict[int, bytes]:
        """The memory's logged digest after each step of this replay."""
        if not hasattr(self, "_digests"):
            within = (pc.field("step") >= self.decisions.first) & (pc.field("step") < self.decisions.stop)
            pushes = self.log.pushes(columns=["step", "digest"], filter=within)
            self._digests = dict(zip(pushes["step"].to_pylist(), pushes["digest"].to_pylist(), strict=True))
        return self._digests

    # What the log and the run that replays it must agree on -----------------------------------------------------------

    def _read_original(self, path: Path) -> dict[str, Any]:
        found = selection_state(read_checkpoint(path))
        if found is None:
            raise ReplayError(f"{path} holds no state of OnlineBatchSelection: it was not saved while a run selected")
        if (run_id := (found.get("log") or {}).get("run_id")) != self.log.run["run_id"]:
            raise ReplayError(
                f"{path} belongs to the log of run {run_id}, but {self.log.root} holds run {self.log.run['run_id']}"
            )
        return found

    def _candidates_per_step(self) -> int:
        recorded = (self.log.run.get("loader") or {}).get("batch_size")
        if recorded is not None:
            return recorded
        return int(self.log.table(columns=["position"])["position"].to_numpy().max()) + 1

    def _batches_per_epoch(self, candidates: int) -> int:
        recorded = (self.log.run.get("loader") or {}).get("batches_per_epoch")
        drawn = sum(stream.get("per_epoch", stream["samples"]) for stream in self.log.run.get("streams", []))
        return recorded or self.decisions.longest_epoch or -(-drawn // candidates)

    def _known_differences(self, state: State, module: nn.Module) -> list[str]:
        run, model = self.log.run, describe_model(module)
        old = {
            "model": run.get("model"),
            "training seed": run.get("seeds", {}).get("training"),
        }
        new: dict[str, Any] = {
            "model": dict(model["model"]),
            "training seed": state.rank_zero_seed,
        }
        old["tokenizer"], new["tokenizer"] = run.get("tokenizer"), model["tokenizer"]
        versions = library_versions()
        for library in ("torch", "mosaicml", "transformers", "peft", "numpy"):
            old[library], new[library] = run.get("versions", {}).get(library), versions[library]
        lines = [f"{name}: was {old[name]!r}, is {new[name]!r}" for name in old if old[name] != new[name]]
        at_start = state.timestamp.batch.value == 0 and not self.offset
        lines += on_rank_zero(lambda: weights_differences(run.get("weights"), module, at_start=at_start))
        if others := self.decisions.steps_of_other_ranks():
            lines.append(
                f"{others} of {len(self.decisions)} steps were trained on another number of ranks than {dist.get_world_size()}"
            )
        if self.offset:
            lines.append(f"it begins at step {self.offset} without the checkpoint that the run had saved there")
        return lines

    def _selector_of_the_run(self, state: State) -> CandidateSelector:
        """A selector with the settings and the memory that the run had before the first step of this replay."""
        run = self.log.run
        config = SelectionConfig(**run["selection"])
        if self._own_method is not None:
            config = dataclasses.replace(config, method=self._own_method, measured=None)
        inputs = MethodInputs.of(config, **self._inputs)
        inputs.check_resumed(run)
        selector = CandidateSelector.of_trainer(config, state, inputs=inputs, **self._module_names)
        if self._memory is not None:
            selector.restore_memory(self._memory)
        elif self.offset > 0:
            raise ReplayError(
                f"the decisions from step {self.offset} on cannot be made again without the weights that made them: give the checkpoint "
                "of that step (checkpoint=, and load_path to the Trainer), or begin at step 0"
            )
        elif run.get("warm_start"):
            if self._warm_start is None:
                raise ReplayError(
                    f"the run began with the memory of run {run['warm_start']['run_id']}, without which its decisions cannot be made "
                    "again; give the folder of that run's log as warm_start"
                )
            check_same_projection(self._warm_start, config, selector.vocab_size)
            memory, origin = former_memory(self._warm_start, config.embedding_dim)
            if origin != run["warm_start"]:
                raise ReplayError(
                    f"the run began with another memory than {self._warm_start} ends with: was {run['warm_start']}, is {origin}"
                )
            selector.take_over(np.asarray(memory.embeddings))
        return selector
