"""`OnlineBatchSelection`: the Composer algorithm that trains on the most valuable part of every candidate batch.

Only translates: Composer's events into the selector's calls, its decisions into the log's columns. How candidates are valued and chosen
stands in `selector.py`, what a score is in `udsstream/scoring`, how a batch is read and cut in `batch.py`.

    K kept, d components of an embedding

Counting: Composer counts samples and tokens before selection, so time, schedules in samples or tokens and throughput count
*candidates*. State schedules and budgets in batches ("ba").

With several ranks every event runs on each of them; what they must tell each other stands in `ranks.py`, what sharded parameters need in
`sharding.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from composer.core import Algorithm, Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

from udsstream.config import (
    EmbeddingRecord,
    LengthNorm,
    Method,
    ProjectionScale,
    Scope,
    SelectionConfig,
    config_difference,
)
from udsstream.errors import ConfigError, RankError, ResumeError
from udsstream.mosaicml.dataset import (
    StreamIdentity,
    canonical_nodes,
    sample_source_of,
    stream_identities,
    streaming_dataset_of,
)
from udsstream.mosaicml.decision import Decision
from udsstream.mosaicml.log_upload import LogUpload
from udsstream.mosaicml.method_inputs import MethodInputs, learning_rate_of
from udsstream.mosaicml.metrics import TokenTotals, step_metrics, time_metrics
from udsstream.mosaicml.ranks import (
    check_same_memory,
    from_rank_zero,
    greatest_over_ranks,
    kept_batch,
    on_rank_zero,
)
from udsstream.mosaicml.recording import record, record_push
from udsstream.mosaicml.rng_state import gather_rng_state, load_rng_state
from udsstream.mosaicml.run_description import describe_run
from udsstream.mosaicml.run_log import (
    anchor,
    begin_log,
    check_same_projection,
    check_streams,
    former_memory,
    reopen_log,
)
from udsstream.mosaicml.sample_identity import SampleIdentity, SampleIdSetting, check_same_ids
from udsstream.mosaicml.schedule import selects_now
from udsstream.mosaicml.selector import CandidateSelector, unwrapped
from udsstream.mosaicml.weights import check_frozen, frozen_sha256, trained_sha256
from udsstream.scoring.candidates import Candidates
from udsstream.scoring.length_correlation import LengthCorrelation
from udsstream.selection_log.timings import TimingsWriter
from udsstream.selection_log.writer import SelectionLogWriter

__all__ = ["OnlineBatchSelection"]

log = logging.getLogger(__name__)

STATE_VERSION = 1
_ALARMING_CORRELATION = 0.9
_CORRELATION_SAMPLES = 256
"""Candidates that must have been scored before the correlation of score and length is worth a warning."""


class OnlineBatchSelection(Algorithm):
    """Trains on the most valuable part of every batch that the data loader yields.

    At AFTER_DATALOADER every candidate is scored with the model as it is (`score = intra + α · inter`, arXiv 2510.16882), the best are
    kept, their embeddings enter the memory, the decision is written to the log, and `state.batch` becomes the kept rows.

    Arguments that are not listed here are the settings of `udsstream.SelectionConfig`.

    Args:
        log_dir: where the record of every choice goes (made if absent). None: no record.
        autoresume: a run that was killed before its first checkpoint may go on in the log that it had begun. With False, a
            `log_dir` that holds a log already is an error unless a checkpoint of that very run is loaded.
        trunk: dotted name of a module whose output holds the final hidden states. None: what enters the head is taken.
        head: dotted name of the head's module. None: found through `get_output_embeddings()` (Hugging Face).
        warm_start: `log_dir` of a former run, whose memory this run begins with.
        reference: for `method="rho_loss"`: the losses of a reference model, as the folder of a log that recorded them or sample id → loss.
        validation: for `method="greats"`: batches of samples whose loss is to be lowered, as the training collator makes them.
        sample_ids: `auto` takes ids from the batches, or from the data set behind the loader; `content-hash` makes them of the tokens, for
            loaders that tell neither. See `sample_identity.py`.
        upload_log: hand the log's sealed files to the run's loggers, at checkpoints and at the end; see docs/trackers.md.

    Raises:
        ConfigError: a setting cannot be used (here, or before training starts when the data loader or the model shows it).
        DataError, ModelError, ScoreError, LogError, ResumeError: while training; see `udsstream.errors`.
    """

    def __init__(
        self,
        *,
        method: Method | Callable[[Candidates], Any] = "uds",
        keep: float | int = 0.25,
        keep_tokens: int | None = None,
        alpha: float | None = None,
        buffer_size: int = 1024,
        projection_dims: tuple[int, int] = (128, 8),
        max_seq_len: int = 2048,
        projection_scale: ProjectionScale = "isometric",
        length_norm: LengthNorm = "none",
        scope: Scope = "global",
        start: str = "0ba",
        end: str | None = None,
        interrupt: int = 0,
        embeddings: EmbeddingRecord = "tail",
        seed: int = 17,
        score_microbatch_tokens: int = 16384,
        log_dir: str | Path | None = None,
        autoresume: bool = False,
        trunk: str | None = None,
        head: str | None = None,
        warm_start: str | Path | None = None,
        reference: str | Path | Mapping[int, float] | None = None,
        validation: Iterable[Mapping[str, Any]] | None = None,
        sample_ids: SampleIdSetting = "auto",
        upload_log: bool = False,
    ) -> None:
        self.config = SelectionConfig(
            method=method,
            keep=keep,
            keep_tokens=keep_tokens,
            alpha=alpha,
            buffer_size=buffer_size,
            projection_dims=projection_dims,
            max_seq_len=max_seq_len,
            projection_scale=projection_scale,
            length_norm=length_norm,
            scope=scope,
            start=start,
            end=end,
            interrupt=interrupt,
            embeddings=embeddings,
            seed=seed,
            score_microbatch_tokens=score_microbatch_tokens,
        )
        self.inputs = MethodInputs.of(self.config, reference=reference, validation=validation)
        self.log_dir = Path(log_dir) if log_dir is not None else None
        self.autoresume = autoresume
        self.warm_start = Path(warm_start) if warm_start is not None else None
        self._identity = SampleIdentity(sample_ids)
        self.upload_log = upload_log
        if upload_log and log_dir is None:
            raise ConfigError("upload_log: there is no log to upload; give a log_dir, or leave upload_log out")
        self._module_names = {"trunk": trunk, "head": head}
        self._handlers = {
            Event.INIT: self._on_init,
            Event.AFTER_LOAD: self._on_after_load,
            Event.FIT_START: self._on_fit_start,
            Event.EPOCH_START: self._restore_rng,
            Event.AFTER_DATALOADER: self._on_batch,
            Event.BATCH_END: self._on_batch_end,
            Event.EPOCH_END: self._restore_rng,
            Event.FIT_END: self._on_fit_end,
        }
        # Set at FIT_START, when the model and the data loader are there.
        self.selector: CandidateSelector | None = None
        self._writer: SelectionLogWriter | None = None
        self._timings: TimingsWriter | None = None
        self._upload: LogUpload | None = None
        self._times: tuple[float, float, float] | None = None
        self._streams: list[StreamIdentity] = []
        self._run_id: str | None = None
        self._frozen: str | None = None
        # Carried through checkpoints.
        self._loaded: dict[str, Any] | None = None
        self._pending_rng: list[dict[str, Any]] | None = None
        self._correlation = LengthCorrelation()
        self._tokens = TokenTotals()
        self._warned_of_length = False
        self._step = 0
        # Merkle roots of checkpoints that the run's loggers have not been told yet: an anchor kept outside of the log's folder.
        self._unreported: dict[str, str] = {}

    # Composer's interface ---------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"{type(self).__name__}(method={self.config.method_name!r}, keep={self.config.keep!r}, log_dir={str(self.log_dir)!r})"

    def match(self, event: Event, state: State) -> bool:
        """Runs at INIT, AFTER_LOAD, FIT_START and FIT_END, at the ends of epochs, and around every batch."""
        del state
        return event in self._handlers

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Does what the event asks for."""
        self._handlers[event](state, logger)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain types, bytes and tensors. While training, everything logged so far is durable first."""
        state: dict[str, Any] = {"version": STATE_VERSION, "config": self.config.as_dict()}
        if self.selector is None:  # not training yet: Composer asks for a template
            return state
        state["world_size"] = dist.get_world_size()
        state["step"] = self._step
        state["memory"] = self.selector.memory_state()
        check_same_memory(self.selector.buffer.digest, self.selector.buffer.pushed)
        state["streams"] = [[stream.name, stream.index_sha256] for stream in self._streams]
        state["inputs"] = self.inputs.describe()
        state["frozen_sha256"] = self._frozen
        state["correlation"] = dict(vars(self._correlation))
        state["tokens"] = dict(vars(self._tokens))
        state["sample_ids"] = self._identity.source
        state["rng"] = gather_rng_state()
        if self._writer is not None:
            anchored = anchor(self._writer, self._step, self.selector.buffer)
            state["log"] = {"run_id": self._run_id, **anchored}
            self._unreported[f"selection/log_root/ba{self._step:08d}"] = anchored["merkle_root"].hex()
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = False) -> None:
        """Takes over a checkpoint's state; the memory and the log follow at FIT_START.

        Raises:
            ResumeError: it is of another version or was made with other settings; the message names each field, old and new.
        """
        del strict
        version = state.get("version")
        if version != STATE_VERSION:
            raise ResumeError(
                f"the checkpoint's selection state has version {version!r}, this udsstream reads version {STATE_VERSION}; "
                "resume with the version of udsstream that wrote it (run.json in the log names it)"
            )
        changed = config_difference(
            {k: v for k, v in state["config"].items() if k != "embeddings"},
            {k: v for k, v in self.config.as_dict().items() if k != "embeddings"},
        )
        if changed:
            raise ResumeError(
                "the checkpoint was made with other selection settings, so its choices would not continue:\n  "
                + "\n  ".join(changed)
                + "\nresume with the old values, or start a new run (load_weights_only=True keeps the weights)"
            )
        if "memory" not in state:
            return
        self._loaded = dict(state)
        self._pending_rng = state["rng"]
        self._correlation = LengthCorrelation(**state["correlation"])
        self._tokens = TokenTotals(**state.get("tokens", {}))

    def close(self) -> None:
        """Seals the log and gives its lock back. `Trainer.close()` calls it, and so does the end of the process."""
        if self._writer is not None:
            self._writer.close()
        if self._timings is not None:
            self._timings.close()
        self._identity.detach()

    # Events -----------------------------------------------------------------------------------------------------------

    def _on_init(self, state: State, logger: Logger) -> None:
        del logger
        state.callbacks.append(_ClosesWithTrainer(self))
        twins = sum(isinstance(algorithm, OnlineBatchSelection) for algorithm in state.algorithms)
        if twins > 1:
            raise ConfigError(
                f"{twins} OnlineBatchSelection algorithms were given to one Trainer, but their states would overwrite each other in the "
                "checkpoint; give one"
            )

    def _on_after_load(self, state: State, logger: Logger) -> None:
        del logger
        if state.timestamp.batch.value > 0 and self._loaded is None:
            raise ResumeError(
                f"the checkpoint is at batch {state.timestamp.batch.value}, but holds no state of OnlineBatchSelection: it was saved by a "
                "run without selection, or before its training began. Going on would start with an empty memory and another random "
                "state. Start a new run from its weights (load_weights_only=True), or resume from a checkpoint of this run"
            )
        self._check_batch_size(state)
        self._identity.attach(state.train_dataloader)

    def _on_fit_start(self, state: State, logger: Logger) -> None:
        if self.selector is not None:  # a second fit() of the same run
            return
        self._check_batch_size(state)
        self._check_set_up(state)
        self._identity.attach(state.train_dataloader)
        model = unwrapped(state.model)
        self.selector = CandidateSelector.of_trainer(self.config, state, inputs=self.inputs, **self._module_names)
        self._step = state.timestamp.batch.value
        source = sample_source_of(state.train_dataloader)
        self._streams = stream_identities(source) if source is not None else []
        self.inputs.check_streams(self._streams)
        if self._loaded is not None:
            check_same_ids(self._loaded.get("sample_ids", "dataset"), self._identity.source)
            check_streams(self._loaded["streams"], self._streams)
            self.inputs.check_resumed(self._loaded.get("inputs", {}))
            self._frozen = self._loaded.get("frozen_sha256")
            on_rank_zero(lambda: check_frozen(self._frozen, model, "the checkpoint"))
            self.selector.restore_memory(self._loaded["memory"])
        else:
            self._frozen = on_rank_zero(lambda: frozen_sha256(model))
        self._open_log(state, model, self.selector)
        if self.upload_log and self._writer is not None:
            self._upload = LogUpload(self._writer, logger)
        logger.log_hyperparameters(
            {f"selection/{name}": value for name, value in self.config.as_dict().items()}
            | {"selection/resolved_alpha": self.selector.alpha, "selection/log_run_id": self._run_id}
        )

    def _on_batch(self, state: State, logger: Logger) -> None:
        self._restore_rng(state, logger)
        began = time.perf_counter()
        state.batch = self._identity.identified(state.batch)
        decision = self._decide(state)
        decided = time.perf_counter()
        self._remember(state, decision)
        recorded = time.perf_counter()
        if decision.selected:
            state.batch = kept_batch(state.batch, decision.order, decision.kept)
        self._step = state.timestamp.batch.value + 1
        self._times = (began, decided, recorded)
        seconds = {"selection/seconds": decided - began, "selection/log_seconds": recorded - decided}
        self._tokens.add(decision)
        logger.log_metrics(step_metrics(decision, self._tokens) | seconds | self._length_metric(decision))
        self._report_log(logger)

    def _on_batch_end(self, state: State, logger: Logger) -> None:
        del state
        if self._times is None:
            return
        began, decided, recorded = self._times
        seconds = {
            "step_seconds": time.perf_counter() - began,
            "selection_seconds": decided - began,
            "log_seconds": recorded - decided,
        }
        logger.log_metrics(time_metrics(**seconds))
        if self._timings is not None:
            self._timings.append(self._step - 1, **seconds)

    def _on_fit_end(self, state: State, logger: Logger) -> None:
        del state
        self._report_log(logger)
        if self._writer is not None:
            self._writer.seal()
        if self._upload is not None:
            self._upload.finish(logger)

    def _report_log(self, logger: Logger) -> None:
        """Tells the run's loggers what the last checkpoint said of the log, and hands them its files if asked to."""
        if self._unreported:
            logger.log_hyperparameters(self._unreported)
            self._unreported = {}
            if self._upload is not None:
                self._upload.seal()
        if self._upload is not None:
            self._upload.send(logger)

    def _restore_rng(self, state: State, logger: Logger) -> None:
        """Puts the checkpoint's random state back at the first of: a new epoch, a batch, the end of an epoch that had none left.

        Not earlier: making the data loader's iterator draws from the global generator, and in the run that was interrupted in the
        middle of an epoch that draw lay before the state was saved.
        """
        del state, logger
        if self._pending_rng is not None:
            load_rng_state(self._pending_rng)
            self._pending_rng = None

    # One step ---------------------------------------------------------------------------------------------------------

    def _decide(self, state: State) -> Decision:
        """Which of the candidates in `state.batch` are kept, and why. Changes nothing."""
        assert self.selector is not None
        return self.selector.decide(
            state.batch,
            selects=selects_now(state, self.config),
            epoch=state.timestamp.epoch.value,
            batch_in_epoch=state.timestamp.batch_in_epoch.value,
            learning_rate=learning_rate_of(state),
        )

    def _remember(self, state: State, decision: Decision) -> None:
        """Adds the decision to the log, and the kept embeddings to the memory."""
        assert self.selector is not None
        timestamp = state.timestamp
        record(
            timestamp.batch.value,
            decision,
            selector=self.selector,
            writer=self._writer,
            source=sample_source_of(state.train_dataloader),
            epoch=timestamp.epoch.value,
            sample_in_epoch=timestamp.sample_in_epoch.value,
        )

    def _length_metric(self, decision: Decision) -> dict[str, float]:
        """The running correlation of score and length; says so, once, when selection has become a matter of length."""
        if decision.scores is None:
            return {}
        self._correlation.add(decision.scores.tolist(), decision.lengths)
        correlation, within = self._correlation.value, self._correlation.within_steps
        if correlation is None:
            return {}
        enough = self._correlation.count >= _CORRELATION_SAMPLES
        if enough and within is not None and abs(within) > _ALARMING_CORRELATION and not self._warned_of_length:
            self._warned_of_length = True
            log.warning(
                "Within a step's candidates, scores and lengths correlate by %.2f (%d candidates): this selection is close to taking the "
                "%s samples. length_norm='sqrt' or 'tokens' takes the length out; candidates grouped by length do too "
                "(docs/length_grouping.md).",
                within,
                self._correlation.count,
                "longest" if within > 0 else "shortest",
            )
        return {"selection/score_length_correlation": correlation}

    # The log ----------------------------------------------------------------------------------------------------------

    def _open_log(self, state: State, model: nn.Module, selector: CandidateSelector) -> None:
        """Opens the log, new or the one to go on with, and fills a new run's memory from a former run's if asked to."""
        config = self.config
        anchored = None if self._loaded is None else self._loaded.get("log")
        if self._loaded is not None and (anchored is None) != (self.log_dir is None):
            raise ResumeError(
                f"the checkpoint was saved by a run {'without' if anchored is None else 'with'} a log, but log_dir is {self.log_dir}: the "
                f"record would have a gap. Resume with {'log_dir=None' if anchored is None else 'the log_dir that the run had'}"
            )
        begun = self.log_dir is not None and (self.log_dir / "run.json").exists()
        if self.log_dir is not None and (anchored is not None or (begun and self.autoresume)):
            self._writer, self._run_id = reopen_log(
                self.log_dir,
                anchored=anchored,
                step=self._step,
                config=config,
                streams=self._streams,
                model=model,
                grouping=_grouping(state),
            )
        memory = origin = None
        if self.warm_start is not None and self._loaded is None:
            check_same_projection(self.warm_start, config, selector.vocab_size)
            memory, origin = former_memory(self.warm_start, config.embedding_dim)
        if self.log_dir is not None and self._writer is None:
            # Its run id is random: rank 0's counts.
            description = from_rank_zero(
                describe_run(
                    config=config,
                    alpha=selector.alpha,
                    vocab_size=selector.vocab_size,
                    model=model,
                    streams=self._streams,
                    loader=_loader_facts(state) | {"sample_ids": self._identity.source},
                    world_size=dist.get_world_size(),
                    train_seed=state.rank_zero_seed,
                    warm_start=origin,
                    inputs=self.inputs.describe(),
                    weights={
                        "frozen_sha256": self._frozen,
                        "trained_sha256": on_rank_zero(lambda: trained_sha256(model)),
                    },
                )
            )
            self._run_id = description["run_id"]
            self._writer = begin_log(self.log_dir, description, config)
        if self.log_dir is not None and dist.get_global_rank() == 0:
            self._timings = TimingsWriter(self.log_dir)
        if memory is not None:
            rows = selector.take_over(memory.embeddings)
            nobody = np.full(len(rows), -1)
            if dist.get_global_rank() == 0:
                record_push(
                    -1,
                    rows,
                    selector=selector,
                    writer=self._writer,
                    positions=nobody.astype(np.int32),
                    sample_ids=nobody,
                    push_index=np.arange(len(rows)),
                )

    # Checks -----------------------------------------------------------------------------------------------------------

    def _check_set_up(self, state: State) -> None:
        dataset = streaming_dataset_of(state.train_dataloader)
        if dataset is not None and (dataset.replication or 1) > 1:
            raise ConfigError(
                f"the data set gives each sample to {dataset.replication} ranks (replication), so that they would be chosen from, and "
                "counted, as many times; leave replication out"
            )
        if state.tp_config is not None:
            raise ConfigError(
                "parallelism_config['tp'] cuts single layers over ranks that train on the same samples, and the head across its columns; "
                "selection works with DistributedDataParallel and FSDP2, so leave 'tp' out"
            )
        batches = -1 if state.dataloader_len is None else int(state.dataloader_len)
        most, least = greatest_over_ranks([batches, -batches])
        if most != -least:
            raise RankError(
                f"the ranks' data loaders yield between {-least} and {most} batches an epoch (rank {dist.get_global_rank()}: {batches}): "
                "some ranks would wait for others that have ended; give all the same number, as StreamingDataset does (drop_last, or a "
                "number of samples that all can share)"
            )

    def _check_batch_size(self, state: State) -> None:
        per_rank = getattr(state.train_dataloader, "batch_size", None)
        if not isinstance(per_rank, int):
            return
        ranks = dist.get_world_size()
        candidates = per_rank * ranks
        if isinstance(self.config.keep, int) and self.config.keep > candidates:
            raise ConfigError(
                f"keep: {self.config.keep} of each candidate batch are to be kept, but a batch has only {candidates}; "
                f"choose at most {candidates}, a fraction, or a larger batch"
            )
        kept = self.config.kept(candidates)
        if kept % ranks:
            nearest = [k for k in (kept // ranks * ranks, (kept // ranks + 1) * ranks) if 0 < k <= candidates]
            raise ConfigError(
                f"keep: {kept} of the {candidates} candidates of a global batch are to be kept, but {ranks} ranks can only train on equal "
                f"shares; keep {' or '.join(map(str, nearest))}"
            )


class _ClosesWithTrainer(Callback):
    """Composer closes callbacks, but not algorithms."""

    def __init__(self, algorithm: OnlineBatchSelection) -> None:
        self._algorithm = algorithm

    def close(self, state: State, logger: Logger) -> None:
        del state
        self._algorithm.close()
        if self._algorithm._upload is not None:
            self._algorithm._upload.finish(logger)


def _loader_facts(state: State) -> dict[str, Any]:
    """What run.json says of the data loader; None where Composer cannot tell."""
    batch_size = getattr(state.train_dataloader, "batch_size", None)
    dataset = streaming_dataset_of(state.train_dataloader)
    return {
        "batch_size": batch_size if isinstance(batch_size, int) else None,
        "canonical_nodes": None if dataset is None else canonical_nodes(dataset),
        "length_groups": _grouping(state),
        "batches_per_epoch": None if state.dataloader_len is None else int(state.dataloader_len),
        "max_duration": None if state.max_duration is None else state.max_duration.to_timestring(),
    }


def _grouping(state: State) -> dict[str, Any] | None:
    """How the data set groups its epochs by length; None where it does not, or is not one that could."""
    return getattr(getattr(state.train_dataloader, "dataset", None), "length_grouping", None)
