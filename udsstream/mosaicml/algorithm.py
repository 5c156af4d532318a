"""`OnlineBatchSelection`: the Composer algorithm that trains on the most valuable part of every candidate batch.

Only translates: Composer's events into calls of pure functions, tensors into the log's columns. What a score is stands in
`udsstream/scoring`, how a batch is read and cut in `batch.py`, how hidden states are taken in `trunk.py`.

    B candidates (the data loader's batch), K kept, d components of an embedding

Counting: Composer counts samples and tokens before selection, so time, schedules in samples or tokens and throughput count
*candidates*. State schedules and budgets in batches ("ba").

What is not here: several ranks (refused with an error), and sharded parameters.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Algorithm, Event, State, Time, TimeUnit, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from streaming import StreamingDataset
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from udsstream.config import (
    EmbeddingRecord,
    LengthNorm,
    Method,
    ProjectionScale,
    Scope,
    SelectionConfig,
    config_difference,
)
from udsstream.errors import ConfigError, LogExistsError, ResumeError
from udsstream.mosaicml.batch import (
    check_candidates,
    real_tokens,
    sample_ids_of,
    scoring_microbatches,
    take_rows,
    trim_padding,
)
from udsstream.mosaicml.dataset import StreamIdentity, locate, stream_identities
from udsstream.mosaicml.rng_state import gather_rng_state, load_rng_state
from udsstream.mosaicml.run_description import describe_run
from udsstream.mosaicml.trunk import ModelParts, ScoringForm, choose_form, neutral
from udsstream.scoring import methods
from udsstream.scoring.embedding_buffer import EmbeddingBuffer
from udsstream.scoring.projection import BilinearProjection
from udsstream.scoring.scorer import CandidateScorer, CandidateScores
from udsstream.scoring.select import check_finite, top_k
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.writer import SelectionLogWriter

__all__ = ["OnlineBatchSelection", "should_select"]

log = logging.getLogger(__name__)

STATE_VERSION = 1
_ALARMING_CORRELATION = 0.9
_CORRELATION_SAMPLES = 256
"""Candidates that must have been scored before the correlation of score and length is worth a warning."""


def should_select(*, elapsed: float, batch_in_epoch: int, now: Mapping[TimeUnit, int], config: SelectionConfig) -> bool:
    """Whether this step selects: between `start` and `end`, and not one of the `interrupt`-th batches of its epoch.

    Args:
        elapsed: fraction of the run that is done, for times in `dur`.
        batch_in_epoch: place of this batch in its epoch, from 0.
        now: batches, epochs, samples and tokens done.
    """

    def reached(timestring: str) -> bool:
        point = Time.from_timestring(timestring)
        return elapsed >= point.value if point.unit == TimeUnit.DURATION else now[TimeUnit(point.unit)] >= point.value

    interrupted = config.interrupt > 0 and (batch_in_epoch + 1) % config.interrupt == 0
    return reached(config.start) and not (config.end is not None and reached(config.end)) and not interrupted


@dataclass
class LengthCorrelation:
    """Pearson correlation of score and length over all candidates scored, from running sums."""

    count: int = 0
    mean_score: float = 0.0
    mean_length: float = 0.0
    score_squares: float = 0.0
    length_squares: float = 0.0
    products: float = 0.0

    def add(self, scores: Sequence[float], lengths: Sequence[int]) -> None:
        """Takes in one step's candidates (Welford's update, so that large means cost no digits)."""
        for score, length in zip(scores, lengths, strict=True):
            self.count += 1
            score_gap, length_gap = score - self.mean_score, length - self.mean_length
            self.mean_score += score_gap / self.count
            self.mean_length += length_gap / self.count
            self.score_squares += score_gap * (score - self.mean_score)
            self.length_squares += length_gap * (length - self.mean_length)
            self.products += score_gap * (length - self.mean_length)

    @property
    def value(self) -> float | None:
        """In [-1, 1]; None while it is undefined (fewer than two candidates, or all alike)."""
        spread = math.sqrt(self.score_squares * self.length_squares)
        return self.products / spread if spread > 0 else None


@dataclass(frozen=True, kw_only=True)
class _Decision:
    """One step's candidates and what became of them; arrays of length B in canonical order."""

    sample_ids: list[int]
    lengths: list[int]
    scores: Tensor | None
    """(B,) float32 on the host; None: nothing was scored, all are trained on."""
    intra: Tensor | None
    inter: Tensor | None
    embeddings: Tensor | None
    kept: list[int]
    """Places of the kept candidates, ascending: the order they are trained in."""


class OnlineBatchSelection(Algorithm):
    """Trains on the most valuable part of every batch that the data loader yields.

    At AFTER_DATALOADER every candidate is scored with the model as it is (`score = intra + α · inter`, arXiv 2510.16882), the best are
    kept, their embeddings enter the memory, the decision is written to the log, and `state.batch` becomes the kept rows.

    Args:
        log_dir: where the record of every choice goes (made if absent). None: no record.
        autoresume: a run that was killed before its first checkpoint may go on in the log that it had begun. With False, a
            `log_dir` that holds a log already is an error unless a checkpoint of that very run is loaded.
        trunk: dotted name of a module whose output holds the final hidden states. None: what enters the head is taken.
        head: dotted name of the head's module. None: found through `get_output_embeddings()` (Hugging Face).
        warm_start: `log_dir` of a former run, whose memory this run begins with.
        All others: see `udsstream.SelectionConfig`.

    Raises:
        ConfigError: a setting cannot be used (here, or before training starts when the data loader or the model shows it).
        DataError, ModelError, ScoreError, LogError, ResumeError: while training; see `udsstream.errors`.
    """

    def __init__(
        self,
        *,
        method: Method = "uds",
        keep: float | int = 0.25,
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
    ) -> None:
        self.config = SelectionConfig(
            method=method,
            keep=keep,
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
        self.log_dir = Path(log_dir) if log_dir is not None else None
        self.autoresume = autoresume
        self.warm_start = Path(warm_start) if warm_start is not None else None
        self._module_names = {"trunk": trunk, "head": head}
        self._handlers = {
            Event.INIT: self._on_init,
            Event.AFTER_LOAD: self._on_after_load,
            Event.FIT_START: self._on_fit_start,
            Event.EPOCH_START: self._restore_rng,
            Event.AFTER_DATALOADER: self._on_batch,
            Event.EPOCH_END: self._restore_rng,
            Event.FIT_END: self._on_fit_end,
        }
        # Set at FIT_START, when the model and the data loader are there.
        self._parts: ModelParts | None = None
        self._scorer: CandidateScorer | None = None
        self._form: ScoringForm | None = None
        self._buffer: EmbeddingBuffer | None = None
        self._writer: SelectionLogWriter | None = None
        self._alpha = 0.0
        self._streams: list[StreamIdentity] = []
        self._run_id: str | None = None
        # Carried through checkpoints.
        self._loaded: dict[str, Any] | None = None
        self._pending_rng: list[dict[str, Any]] | None = None
        self._correlation = LengthCorrelation()
        self._warned_of_length = False
        self._step = 0

    # Composer's interface ---------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"{type(self).__name__}(method={self.config.method!r}, keep={self.config.keep!r}, log_dir={str(self.log_dir)!r})"

    def match(self, event: Event, state: State) -> bool:
        """Runs at INIT, AFTER_LOAD, FIT_START and FIT_END, at the ends of epochs, and at every AFTER_DATALOADER."""
        del state
        return event in self._handlers

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Does what the event asks for."""
        self._handlers[event](state, logger)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain types, bytes and tensors. While training, everything logged so far is durable first."""
        state: dict[str, Any] = {"version": STATE_VERSION, "config": self.config.as_dict()}
        if self._buffer is None:  # not training yet: Composer asks for a template
            return state
        state["world_size"] = dist.get_world_size()
        state["step"] = self._step
        state["memory"] = {
            "rows": self._buffer.oldest_first().cpu(),
            "pushed": self._buffer.pushed,
            "digest": self._buffer.digest,
        }
        state["streams"] = [[stream.name, stream.index_sha256] for stream in self._streams]
        state["correlation"] = dict(vars(self._correlation))
        state["rng"] = gather_rng_state()
        if self._writer is not None:
            state["log"] = {"run_id": self._run_id, **self._checkpoint_log()}
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

    # Events -----------------------------------------------------------------------------------------------------------

    def _on_init(self, state: State, logger: Logger) -> None:
        del logger
        twins = sum(isinstance(algorithm, OnlineBatchSelection) for algorithm in state.algorithms)
        if twins > 1:
            raise ConfigError(
                f"{twins} OnlineBatchSelection algorithms were given to one Trainer, but their states would overwrite each other in the "
                "checkpoint; give one"
            )
        if dist.get_world_size() > 1:
            raise ConfigError(
                f"selection over several ranks is not supported yet: the world size is {dist.get_world_size()}, but must be 1"
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

    def _on_fit_start(self, state: State, logger: Logger) -> None:
        if self._buffer is not None:  # a second fit() of the same run
            return
        self._check_batch_size(state)
        model = _unwrapped(state.model)
        self._parts = ModelParts(model, **self._module_names)
        vocab_size = self._parts.vocab_size
        config = self.config
        projection = BilinearProjection.draw(
            vocab_size=vocab_size,
            max_seq_len=config.max_seq_len,
            dims=config.projection_dims,
            scale=config.projection_scale,
            seed=config.seed,
        )
        self._scorer = CandidateScorer(projection, length_norm=config.length_norm)
        self._alpha = config.resolved_alpha(vocab_size)
        dataset = _streaming_dataset(state)
        self._streams = stream_identities(dataset) if dataset is not None else []
        device = next(model.parameters()).device
        if self._loaded is not None:
            self._check_streams(self._loaded["streams"])
            memory = self._loaded["memory"]
            self._buffer = EmbeddingBuffer.restore(
                memory["rows"],
                pushed=memory["pushed"],
                digest=memory["digest"],
                capacity=config.buffer_size,
                device=device,
            )
        else:
            self._buffer = EmbeddingBuffer.empty(config.buffer_size, config.embedding_dim, device=device)
        self._step = state.timestamp.batch.value
        if self.log_dir is not None:
            self._open_log(state, model, vocab_size)
        logger.log_hyperparameters(
            {f"selection/{name}": value for name, value in config.as_dict().items()}
            | {"selection/resolved_alpha": self._alpha}
        )

    def _on_batch(self, state: State, logger: Logger) -> None:
        self._restore_rng(state, logger)
        began = time.perf_counter()
        decision = self._decide(state)
        if decision.scores is not None:
            state.batch = trim_padding(take_rows(state.batch, decision.kept))
        self._remember(state, decision)
        self._step = state.timestamp.batch.value + 1
        logger.log_metrics(self._metrics(decision, seconds=time.perf_counter() - began))

    def _on_fit_end(self, state: State, logger: Logger) -> None:
        del state, logger
        if self._writer is not None:
            self._writer.seal()

    def _restore_rng(self, state: State, logger: Logger) -> None:
        """Puts the random state of the checkpoint back at the first of: a new epoch, a batch, the end of an epoch that had none left.

        Not earlier: making the data loader's iterator draws from the global generator, and in the run that was interrupted in the
        middle of an epoch that draw lay before the state was saved.
        """
        del state, logger
        if self._pending_rng is not None:
            load_rng_state(self._pending_rng)
            self._pending_rng = None

    # One step ---------------------------------------------------------------------------------------------------------

    def _decide(self, state: State) -> _Decision:
        """Which of the candidates in `state.batch` are kept, and why. Changes nothing."""
        batch = state.batch
        ids = sample_ids_of(batch)
        mask = real_tokens(batch)
        lengths = check_candidates(batch, mask, ids, self.config.max_seq_len)
        timestamp = state.timestamp
        if not should_select(
            elapsed=_elapsed(state),
            batch_in_epoch=timestamp.batch_in_epoch.value,
            now={
                TimeUnit.BATCH: timestamp.batch.value,
                TimeUnit.EPOCH: timestamp.epoch.value,
                TimeUnit.SAMPLE: timestamp.sample.value,
                TimeUnit.TOKEN: timestamp.token.value,
            },
            config=self.config,
        ):
            return _Decision(
                sample_ids=ids,
                lengths=lengths,
                scores=None,
                intra=None,
                inter=None,
                embeddings=None,
                kept=list(range(len(ids))),
            )
        intra = inter = embeddings = None
        if self.config.method == "random":
            scores = methods.random(
                len(ids),
                seed=self.config.seed,
                epoch=timestamp.epoch.value,
                batch=timestamp.batch_in_epoch.value,
            )
        else:
            assert self._buffer is not None
            scored = self._score(state, mask, lengths)
            embeddings = scored.embeddings
            intra = scored.intra.cpu()
            inter = self._buffer.mean_distance(embeddings).cpu()
            scores = methods.uds(intra, inter, self._alpha)
        check_finite(scores, ids)
        kept = top_k(scores, self.config.kept(len(ids))).tolist()
        return _Decision(
            sample_ids=ids,
            lengths=lengths,
            scores=scores,
            intra=intra,
            inter=inter,
            embeddings=embeddings,
            kept=kept,
        )

    def _score(self, state: State, mask: Tensor, lengths: list[int]) -> CandidateScores:
        """intra (B,) and embeddings (B, d) of the candidates, in their order."""
        assert self._parts is not None
        assert self._scorer is not None
        parts = self._parts
        intra: list[Tensor] = [torch.empty(0)] * len(lengths)
        embeddings: list[Tensor] = [torch.empty(0)] * len(lengths)
        with neutral(parts.model), get_precision_context(state.precision, state.precision_config):
            for rows, packed in scoring_microbatches(state.batch, mask, lengths, self.config.score_microbatch_tokens):
                on_device = state.device.batch_to_device(packed)
                if self._form is None:
                    self._form = choose_form(parts, on_device)
                    log.info("Candidates are scored as %s.", self._form)
                matrices = self._matrices(on_device)
                unpadded = [matrices[place, : lengths[row]] for place, row in enumerate(rows)]
                # The scores' own arithmetic is not to be autocast: float32 throughout.
                with torch.autocast(device_type=matrices.device.type, enabled=False):
                    if self._form.form == "logits":
                        part = self._scorer.score_logits(unpadded)
                    else:
                        part = self._scorer.score_hidden(unpadded, parts.head(self._form), version=parts.head_version())
                for place, row in enumerate(rows):
                    intra[row] = part.intra[place]
                    embeddings[row] = part.embeddings[place]
        return CandidateScores(intra=torch.stack(intra), embeddings=torch.stack(embeddings))

    def _matrices(self, packed: Mapping[str, Any]) -> Tensor:
        """Hidden states (b, N, D), or logits (b, N, V) where nothing else will do."""
        assert self._parts is not None
        assert self._form is not None
        if self._form.form != "logits":
            return self._parts.hidden_states(packed)
        logits = self._parts.hidden_states_and_logits(packed)[1]
        assert logits is not None, "choose_form takes the logits form only for a model that shows its logits"
        return logits

    def _remember(self, state: State, decision: _Decision) -> None:
        """Adds the kept embeddings to the memory and the decision to the log."""
        assert self._buffer is not None
        step = state.timestamp.batch.value
        push_index = self._buffer.pushed
        kept_embeddings = decision.embeddings[decision.kept].float().cpu() if decision.embeddings is not None else None
        if kept_embeddings is not None:
            self._buffer.push(kept_embeddings)
        if self._writer is None:
            return
        self._writer.append(step, self._columns(state, decision))
        if kept_embeddings is not None:
            self._writer.push(
                step,
                positions=np.array(decision.kept, dtype=np.int32),
                sample_ids=np.array([decision.sample_ids[row] for row in decision.kept], dtype=np.int64),
                push_index=push_index,
                embeddings=kept_embeddings.numpy(),
                digest=self._buffer.digest,
            )

    def _columns(self, state: State, decision: _Decision) -> dict[str, np.ndarray]:
        """The decision as the log's columns."""
        count = len(decision.sample_ids)
        selected = np.zeros(count, dtype=bool)
        selected[decision.kept] = True
        train_order = np.ma.masked_all(count, dtype=np.int32)
        train_order[decision.kept] = np.arange(len(decision.kept), dtype=np.int32)
        positions = np.arange(count, dtype=np.int32)
        columns: dict[str, np.ndarray] = {
            "epoch": np.full(count, state.timestamp.epoch.value, dtype=np.int32),
            "position": positions,
            "epoch_position": state.timestamp.sample_in_epoch.value + positions.astype(np.int64),
            "sample_id": np.array(decision.sample_ids, dtype=np.int64),
            "tokens": np.array(decision.lengths, dtype=np.int32),
            "selected": selected,
            "train_order": train_order,
        }
        dataset = _streaming_dataset(state)
        if dataset is not None:
            place = locate(dataset, decision.sample_ids)
            columns["stream"] = place.stream.astype(np.int16)
            columns["shard"] = place.shard.astype(np.int32)
            columns["shard_index"] = place.index.astype(np.int32)
        for name, values in (("intra", decision.intra), ("inter", decision.inter), ("score", decision.scores)):
            if values is not None:
                columns[name] = values.numpy().astype(np.float32, copy=False)
        return columns

    def _metrics(self, decision: _Decision, *, seconds: float) -> dict[str, float]:
        candidate_tokens = sum(decision.lengths)
        kept_tokens = sum(decision.lengths[row] for row in decision.kept)
        metrics = {
            "selection/candidates": float(len(decision.sample_ids)),
            "selection/kept": float(len(decision.kept)),
            "selection/candidate_tokens": float(candidate_tokens),
            "selection/kept_tokens": float(kept_tokens),
            "selection/seconds": seconds,
        }
        if decision.scores is not None:
            scores = decision.scores.tolist()
            metrics["selection/score_mean"] = sum(scores) / len(scores)
            metrics["selection/score_kept_mean"] = sum(scores[row] for row in decision.kept) / len(decision.kept)
            self._correlation.add(scores, decision.lengths)
            correlation = self._correlation.value
            if correlation is not None:
                metrics["selection/score_length_correlation"] = correlation
                self._warn_of_length(correlation)
        if decision.inter is not None:
            metrics["selection/inter_mean"] = float(decision.inter.mean())
        return metrics

    def _warn_of_length(self, correlation: float) -> None:
        alarming = self._correlation.count >= _CORRELATION_SAMPLES and abs(correlation) > _ALARMING_CORRELATION
        if alarming and not self._warned_of_length:
            self._warned_of_length = True
            log.warning(
                "Scores and lengths correlate by %.2f over %d candidates: this selection is close to taking the %s samples. "
                "length_norm='sqrt' or 'tokens' takes the length out; batches of samples of similar length do too.",
                correlation,
                self._correlation.count,
                "longest" if correlation > 0 else "shortest",
            )

    # The log ----------------------------------------------------------------------------------------------------------

    def _open_log(self, state: State, model: nn.Module, vocab_size: int) -> None:
        assert self.log_dir is not None
        assert self._buffer is not None
        rank, world_size = dist.get_global_rank(), dist.get_world_size()
        resumed = None if self._loaded is None else self._loaded.get("log")
        begun = (self.log_dir / "run.json").exists()
        if self._loaded is not None and resumed is None:
            raise ResumeError(
                f"the checkpoint was saved by a run without a log, but log_dir is {self.log_dir}: its first {self._step} steps would be "
                "missing there. Resume with log_dir=None"
            )
        if resumed is not None and not begun:
            raise ResumeError(
                f"the checkpoint belongs to the log of run {resumed['run_id']}, but there is no log in {self.log_dir}; "
                "give the log_dir that the run had"
            )
        if resumed is None and not (begun and self.autoresume):
            memory = self._begin_warm()
            description = describe_run(
                config=self.config,
                alpha=self._alpha,
                vocab_size=vocab_size,
                model=model,
                streams=self._streams,
                world_size=world_size,
                train_seed=state.rank_zero_seed,
                warm_start=memory,
            )
            self._run_id = description["run_id"]
            writer = SelectionLogWriter.create(
                self.log_dir,
                run=description,
                rank=rank,
                world_size=world_size,
                embeddings=self.config.embeddings,
                embedding_dim=self.config.embedding_dim,
            )
        else:
            run = SelectionLog.open(self.log_dir).run
            self._run_id = run["run_id"]
            self._check_same_run(run, resumed)
            writer = SelectionLogWriter.resume(
                self.log_dir,
                step=self._step,
                head=resumed["heads"][rank] if resumed is not None else None,
                rank=rank,
                world_size=world_size,
            )
        self._writer = writer
        weakref.finalize(self, writer.close)

    def _check_same_run(self, run: Mapping[str, Any], resumed: Mapping[str, Any] | None) -> None:
        if resumed is not None and run["run_id"] != resumed["run_id"]:
            raise LogExistsError(
                f"{self.log_dir} holds the log of run {run['run_id']}, but the checkpoint belongs to run {resumed['run_id']}; "
                "give the log_dir that the run had"
            )
        changed = config_difference(run["selection"], self.config.as_dict())
        if changed:
            raise ResumeError(
                f"{self.log_dir} holds a run with other selection settings:\n  "
                + "\n  ".join(changed)
                + "\nresume with the old values, or give the new run a log_dir of its own"
            )
        self._check_streams([[stream["name"], stream["index_sha256"]] for stream in run["streams"]])

    def _begin_warm(self) -> dict[str, Any] | None:
        """Fills the memory from a former run's log; what run.json says of it."""
        if self.warm_start is None:
            return None
        raise ConfigError("warm_start is not there yet")

    def _checkpoint_log(self) -> dict[str, Any]:
        """Makes everything logged so far durable on every rank, and anchors it: the ranks' chain heads and their Merkle root."""
        assert self._writer is not None
        assert self._buffer is not None
        heads = list(dist.all_gather_object(self._writer.sync()))
        root = self._writer.checkpoint(
            self._step,
            heads=heads,
            buffer=self._buffer.oldest_first().cpu().numpy(),
            pushed=self._buffer.pushed,
            buffer_digest=self._buffer.digest,
        )
        return {"heads": heads, "merkle_root": root}

    # Checks -----------------------------------------------------------------------------------------------------------

    def _check_batch_size(self, state: State) -> None:
        per_rank = getattr(state.train_dataloader, "batch_size", None)
        if not isinstance(per_rank, int) or isinstance(self.config.keep, float):
            return
        candidates = per_rank * dist.get_world_size()
        if self.config.keep > candidates:
            raise ConfigError(
                f"keep: {self.config.keep} of each candidate batch are to be kept, but a batch has only {candidates}; "
                f"choose at most {candidates}, a fraction, or a larger batch"
            )

    def _check_streams(self, recorded: Sequence[Sequence[str]]) -> None:
        """Raises ResumeError when the streams are not those that the run was recorded with."""
        found = [[stream.name, stream.index_sha256] for stream in self._streams]
        if [list(stream) for stream in recorded] == found:
            return
        lines = [
            f"stream {number}: was {old[0]} (index {old[1][:12]}…), is {new[0]} (index {new[1][:12]}…)"
            for number, (old, new) in enumerate(zip(recorded, found, strict=False))
            if list(old) != new
        ]
        if len(recorded) != len(found):
            lines.append(f"number of streams: was {len(recorded)}, is {len(found)}")
        raise ResumeError(
            "the data set is not the one that this run was recorded with, so its sample ids would name other samples:\n  "
            + "\n  ".join(lines)
            + "\ngive the same streams in the same order, or start a new run"
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _elapsed(state: State) -> float:
    elapsed = state.get_elapsed_duration()
    return float(elapsed.value) if elapsed is not None else 0.0


def _streaming_dataset(state: State) -> StreamingDataset | None:
    dataset = getattr(state.train_dataloader, "dataset", None)
    return dataset if isinstance(dataset, StreamingDataset) else None
