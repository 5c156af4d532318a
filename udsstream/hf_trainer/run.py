"""One training run that selects: its selector, its log, what it has counted, and the candidates of each update in and the kept rows out.

`trainer.py` calls it at the Trainer's events. What a decision is stands in `mosaicml/selector.py`, which both adapters use.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import TimeUnit
from torch import nn

from udsstream.config import SelectionConfig
from udsstream.errors import ResumeError
from udsstream.hf_trainer.batches import cut, joined, without_ids
from udsstream.hf_trainer.checkpoint import CheckpointState
from udsstream.hf_trainer.scored_model import CalledWithBatch, TrainerDevice
from udsstream.mosaicml.dataset import SampleSource, stream_identities
from udsstream.mosaicml.decision import Decision
from udsstream.mosaicml.method_inputs import MethodInputs
from udsstream.mosaicml.metrics import TokenTotals, step_metrics, time_metrics
from udsstream.mosaicml.recording import record, record_push
from udsstream.mosaicml.run_description import describe_run
from udsstream.mosaicml.run_log import (
    anchor,
    begin_log,
    check_same_projection,
    check_streams,
    former_memory,
    reopen_log,
)
from udsstream.mosaicml.sample_identity import SampleIdentity, check_same_ids
from udsstream.mosaicml.schedule import should_select
from udsstream.mosaicml.selector import CandidateSelector
from udsstream.mosaicml.weights import check_frozen, frozen_sha256, trained_sha256
from udsstream.scoring.length_correlation import LengthCorrelation
from udsstream.selection_log.timings import TimingsWriter
from udsstream.selection_log.writer import SelectionLogWriter

__all__ = ["RunPlan", "RunSettings", "SelectionRun"]

log = logging.getLogger(__name__)

_ALARMING_CORRELATION = 0.9
_CORRELATION_SAMPLES = 256
"""As in the Composer adapter: candidates scored before the correlation of score and length is worth a warning."""

_SHOWN = tuple(
    f"selection/{name}"
    for name in ("kept", "kept_token_share", "tokens_saved", "novelty", "score_length_correlation", "share_of_step")
)
"""Of the Composer adapter's metrics, those that the Trainer is told."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What the user asked for; see `SelectingTrainer`."""

    config: SelectionConfig
    inputs: MethodInputs
    log_dir: Path | None
    autoresume: bool
    warm_start: Path | None
    trunk: str | None
    head: str | None


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What the Trainer is about to do."""

    step: int
    """Updates done already."""
    max_steps: int
    updates_per_epoch: int
    batch_size: int
    """Rows of one batch of the data loader."""
    accumulation: int
    """Batches of one update, the last one of an epoch apart."""
    seed: int
    tokenizer: str
    sampler: str
    """Name of what orders the rows."""

    @property
    def candidates(self) -> int:
        """B: of one update."""
        return self.batch_size * self.accumulation


class SelectionRun:
    """Begins with the Trainer's training loop and ends with it.

    Args:
        settings: what the user asked for.
        plan: what the Trainer is about to do.
        called: the model that it trains.
        device: that it trains on.
        identity: where samples' ids come from.
        source: the data set, if it can tell where its samples come from.
        loaded: the checkpoint's state, if the run goes on from one.

    Raises:
        ConfigError, ModelError: the method, the model and the settings do not go together.
        ResumeError, LogError: the checkpoint, the log and the data do not.
    """

    def __init__(
        self,
        settings: RunSettings,
        plan: RunPlan,
        *,
        called: CalledWithBatch,
        device: torch.device,
        identity: SampleIdentity,
        source: SampleSource | None,
        loaded: CheckpointState | None,
    ) -> None:
        self.plan, self._source, self._identity = plan, source, identity
        self._config, self._inputs = settings.config, settings.inputs
        if plan.step != (0 if loaded is None else loaded.step):
            raise ResumeError(
                f"the Trainer begins at update {plan.step}, but the selection at {0 if loaded is None else loaded.step}: give the "
                "checkpoint to train(resume_from_checkpoint=)"
            )
        self.selector = CandidateSelector(
            settings.config,
            called,
            device=TrainerDevice(device),
            trunk=called.name_of(settings.trunk, "trunk"),
            head=called.name_of(settings.head, "head"),
            inputs=settings.inputs,
        )
        self._streams = stream_identities(source) if source is not None else []
        self._inputs.check_streams(self._streams)
        self.step, self._samples = plan.step, 0
        self._tokens, self._correlation = TokenTotals(), LengthCorrelation()
        self._warned_of_length = False
        if loaded is None:
            self._frozen = frozen_sha256(called.model)
        else:
            check_frozen(loaded.frozen_sha256, called.model, "the checkpoint")
            self._frozen = loaded.frozen_sha256
            self._take_over(loaded)
        self._writer: SelectionLogWriter | None = None
        self._timings: TimingsWriter | None = None
        self._run_id: str | None = None
        self._times: tuple[float, float, float] | None = None
        self._metrics: dict[str, float] = {}
        try:
            self._open_log(settings, loaded, called.model)
        except BaseException:
            self.close()
            raise

    # One update -------------------------------------------------------------------------------------------------------

    def choose(self, batches: Sequence[Mapping[str, Any]], learning_rate: float) -> list[dict[str, Any]]:
        """The candidates of an update, n ≥ 1 batches, in; what is trained on out, as n batches too, of which the last may be empty.

        Decides, remembers and records. Where selection is off the batches come out as they are.
        """
        began = time.perf_counter()
        identified = [self._identity.identified(batch) for batch in batches]
        batch = joined(identified, self._config.max_seq_len)
        epoch, in_epoch = divmod(self.step, self.plan.updates_per_epoch)
        decision = self.selector.decide(
            batch,
            selects=self._selects(epoch, in_epoch),
            epoch=epoch,
            batch_in_epoch=in_epoch,
            learning_rate=learning_rate,
        )
        decided = time.perf_counter()
        record(
            self.step,
            decision,
            selector=self.selector,
            writer=self._writer,
            source=self._source,
            epoch=epoch,
            sample_in_epoch=in_epoch * self.plan.candidates,
        )
        self._count(decision)
        kept = cut(batch, decision.order.row[decision.kept].tolist(), len(batches)) if decision.selected else identified
        self._times = (began, decided, time.perf_counter())
        return [without_ids(part) for part in kept]

    def end_step(self) -> None:
        """The weights were updated."""
        self.step += 1
        if self._times is None:
            return
        began, decided, recorded = self._times
        seconds = {
            "step_seconds": time.perf_counter() - began,
            "selection_seconds": decided - began,
            "log_seconds": recorded - decided,
        }
        self._metrics |= time_metrics(**seconds)
        if self._timings is not None:
            self._timings.append(self.step - 1, **seconds)

    def metrics(self) -> dict[str, float]:
        """Of the last update: few, since the Trainer prints all that it is told; the log has everything."""
        return {name: self._metrics[name] for name in _SHOWN if name in self._metrics}

    def _selects(self, epoch: int, in_epoch: int) -> bool:
        return should_select(
            elapsed=self.step / self.plan.max_steps,
            batch_in_epoch=in_epoch,
            now={
                TimeUnit.BATCH: self.step,
                TimeUnit.EPOCH: epoch,
                TimeUnit.SAMPLE: self._samples,
                TimeUnit.TOKEN: self._tokens.candidates,
            },
            config=self._config,
        )

    def _count(self, decision: Decision) -> None:
        self._samples += len(decision.sample_ids)
        self._tokens.add(decision)
        self._metrics = step_metrics(decision, self._tokens)
        if decision.scores is None:
            return
        self._correlation.add(decision.scores.tolist(), decision.lengths)
        correlation = self._correlation.value
        if correlation is None:
            return
        self._metrics["selection/score_length_correlation"] = correlation
        enough = self._correlation.count >= _CORRELATION_SAMPLES
        if enough and abs(correlation) > _ALARMING_CORRELATION and not self._warned_of_length:
            self._warned_of_length = True
            log.warning(
                "Scores and lengths correlate by %.2f over %d candidates: this selection is close to taking the %s samples. "
                "length_norm='sqrt' or 'tokens' takes the length out; batches of samples of similar length (group_by_length) do too.",
                correlation,
                self._correlation.count,
                "longest" if correlation > 0 else "shortest",
            )

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def state(self) -> CheckpointState:
        """What a checkpoint keeps of the run as it is between two updates. Everything logged so far is durable first."""
        memory, logged = self.selector.memory_state(), None
        if self._writer is not None:
            anchored = anchor(self._writer, self.step, self.selector.buffer)
            logged = {
                "run_id": self._run_id,
                "heads": [head.hex() for head in anchored["heads"]],
                "merkle_root": anchored["merkle_root"].hex(),
            }
        return CheckpointState(
            config=self._config.as_dict(),
            step=self.step,
            samples=self._samples,
            batches=[self.plan.batch_size, self.plan.accumulation],
            streams=[[stream.name, stream.index_sha256] for stream in self._streams],
            inputs=self._inputs.describe(),
            sample_ids=self._identity.source,
            correlation=asdict(self._correlation),
            tokens=asdict(self._tokens),
            pushed=memory["pushed"],
            memory_digest=memory["digest"].hex(),
            log=logged,
            rows=memory["rows"],
            frozen_sha256=self._frozen,
        )

    def _take_over(self, loaded: CheckpointState) -> None:
        check_same_ids(loaded.sample_ids, self._identity.source)
        check_streams(loaded.streams, self._streams)
        self._inputs.check_resumed(loaded.inputs)
        if loaded.batches != [self.plan.batch_size, self.plan.accumulation]:
            raise ResumeError(
                f"the checkpoint's run took {loaded.batches[1]} batches of {loaded.batches[0]} for each update, this one takes "
                f"{self.plan.accumulation} of {self.plan.batch_size}, so its candidates would be others; resume with the old "
                "per_device_train_batch_size and gradient_accumulation_steps"
            )
        self.selector.restore_memory(loaded.memory())
        self._samples = loaded.samples
        self._tokens = TokenTotals(**loaded.tokens)
        self._correlation = LengthCorrelation(**loaded.correlation)  # type: ignore[arg-type]

    # The log ----------------------------------------------------------------------------------------------------------

    def seal(self) -> None:
        """The run is over: the log's files get their final form."""
        if self._writer is not None:
            self._writer.seal()

    def close(self) -> None:
        """Seals the log and gives its lock back. May be called twice."""
        if self._writer is not None:
            self._writer.close()
        if self._timings is not None:
            self._timings.close()

    def _open_log(self, settings: RunSettings, loaded: CheckpointState | None, model: nn.Module) -> None:
        """Opens the log, new or the one to go on with, and fills a new run's memory from a former run's if asked to."""
        log_dir, config = settings.log_dir, self._config
        anchored = None if loaded is None or loaded.log is None else dict(loaded.log)
        if loaded is not None and (anchored is None) != (log_dir is None):
            raise ResumeError(
                f"the checkpoint was saved by a run {'without' if anchored is None else 'with'} a log, but log_dir is {log_dir}: the "
                f"record would have a gap. Resume with {'log_dir=None' if anchored is None else 'the log_dir that the run had'}"
            )
        if anchored is not None:
            anchored["heads"] = [bytes.fromhex(head) for head in anchored["heads"]]
        begun = log_dir is not None and (log_dir / "run.json").exists()
        if log_dir is not None and (anchored is not None or (begun and settings.autoresume)):
            self._writer, self._run_id = reopen_log(
                log_dir, anchored=anchored, step=self.step, config=config, streams=self._streams, model=model
            )
        memory = origin = None
        if settings.warm_start is not None and loaded is None:
            check_same_projection(settings.warm_start, config, self.selector.vocab_size)
            memory, origin = former_memory(settings.warm_start, config.embedding_dim)
        if log_dir is not None and self._writer is None:
            description = self._describe(model, origin)
            self._run_id = description["run_id"]
            self._writer = begin_log(log_dir, description, config)
        if log_dir is not None:
            self._timings = TimingsWriter(log_dir)
        if memory is not None:
            rows = self.selector.take_over(memory.embeddings)
            nobody = np.full(len(rows), -1)
            record_push(
                -1,
                rows,
                selector=self.selector,
                writer=self._writer,
                positions=nobody.astype(np.int32),
                sample_ids=nobody,
                push_index=np.arange(len(rows)),
            )

    def _describe(self, model: nn.Module, warm_start: dict[str, Any] | None) -> dict[str, Any]:
        plan = self.plan
        description = describe_run(
            config=self._config,
            alpha=self.selector.alpha,
            vocab_size=self.selector.vocab_size,
            model=model,
            streams=self._streams,
            loader={
                "batch_size": plan.candidates,
                "gradient_accumulation_steps": plan.accumulation,
                "batches_per_epoch": plan.updates_per_epoch,
                "max_duration": f"{plan.max_steps}ba",
                "canonical_nodes": None,
                "sample_ids": self._identity.source,
                "sampler": plan.sampler,
            },
            world_size=1,
            train_seed=plan.seed,
            warm_start=warm_start,
            inputs=self._inputs.describe(),
            weights={"frozen_sha256": self._frozen, "trained_sha256": trained_sha256(model)},
        )
        return description | {"tokenizer": plan.tokenizer, "trainer": "transformers.Trainer"}
