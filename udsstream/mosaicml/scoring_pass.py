"""One pass of selection with a frozen model over a stream, without training: windows of candidates, the best of each, into the log.

    R ranks, W samples of a window, windows numbered 0, 1, … as the steps of a training run are

*Order.* The stream once, each sample exactly once: by ids, or by Streaming's own shuffle for one canonical node (`pass_order`), which
keeps to blocks of shards. Step n has the samples at places nW to before (n+1)W; the last window may be smaller, and keeps its share. They
are dealt to the ranks so that canonical order (`ranks.py`) is this order, whatever the number of ranks. So neither the windows nor what is
kept of them depends on it, up to float reduction order.

*Resuming.* When a window ends, but at most once in `anchor_seconds`, the memory and the log's heads are kept as at a checkpoint, and
nothing else is: a pass that was killed goes on at the newest of them. What was logged after it is superseded, and decided again alike.

What is not here: settings from a file, and writing the chosen samples out (`udsstream/scoring_job.py`).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from composer.core import Precision
from composer.devices import Device
from composer.utils import dist
from streaming import StreamingDataset
from streaming.base.shuffle import get_shuffle
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from udsstream.config import SelectionConfig, config_difference
from udsstream.errors import ConfigError, ResumeError
from udsstream.mosaicml.dataset import StreamIdentity, stream_identities, with_sample_id
from udsstream.mosaicml.decision import Decision
from udsstream.mosaicml.ranks import check_same_memory, from_rank_zero
from udsstream.mosaicml.recording import record
from udsstream.mosaicml.run_description import describe_run
from udsstream.mosaicml.run_log import anchor, begin_log, check_streams, reopen_log
from udsstream.mosaicml.selector import CandidateSelector
from udsstream.mosaicml.weights import weights_sha256
from udsstream.scoring.select import top_k
from udsstream.selection_log import layout
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.timings import TimingsWriter
from udsstream.selection_log.writer import SelectionLogWriter

__all__ = ["PassProgress", "ScoringPass", "Windows", "pass_order"]

log = logging.getLogger(__name__)

Order = Literal["shuffled", "sequential"]

_KEPT_MEMORIES = 3
"""Vectors of so many of the newest anchors are kept; older ones would fill a disk in a long pass."""
_DOWNLOADS = 8
"""Shards that are fetched at once for one window."""
_SHUFFLE_BLOCK = 4_000_000
"""Samples within which Streaming's shuffle mixes: its own default for one canonical node."""


@dataclass(frozen=True, kw_only=True)
class PassProgress:
    """How far a pass is. Counts are of the whole pass, over interruptions, but for those of this process."""

    windows: int
    all_windows: int
    samples: int
    all_samples: int
    kept: int
    samples_here: int
    """Scored since this process began, as are `tokens_here`, in `seconds_here`."""
    tokens_here: int
    seconds_here: float

    @property
    def seconds_left(self) -> float | None:
        """At this process's rate; None while there is none."""
        left = self.all_samples - self.samples
        return left * self.seconds_here / self.samples_here if self.samples_here else None


def pass_order(dataset: StreamingDataset, order: Order, *, seed: int) -> np.ndarray:
    """(samples,) int64: every id once, in the order in which it is scored."""
    ids = np.arange(dataset.size, dtype=np.int64)
    if order == "sequential":
        return ids
    sizes = np.asarray(dataset.samples_per_shard, dtype=np.int64)
    return np.asarray(get_shuffle("py1e", sizes, 1, seed, 0, _SHUFFLE_BLOCK), dtype=np.int64)


class Windows(Sampler):
    """A batch sampler: this rank's ids of each window from `first` on. A last window of fewer samples than ranks leaves some with none."""

    def __init__(
        self, order: np.ndarray, window: int, *, first: int, rank: int, ranks: int, ranks_per_node: int
    ) -> None:
        self._order, self._window, self._first = order, window, first
        nodes = ranks // ranks_per_node
        self._offset, self._ranks = rank % ranks_per_node * nodes + rank // ranks_per_node, ranks

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(self._first * self._window, len(self._order), self._window):
            yield self._order[start : start + self._window][self._offset :: self._ranks].tolist()

    def __len__(self) -> int:
        return max(0, -(-len(self._order) // self._window) - self._first)


class _Samples(Dataset):
    """Random access by id. The shards that a window needs are fetched side by side before its samples are read."""

    def __init__(self, dataset: StreamingDataset) -> None:
        self._dataset = dataset
        self._fetches = any(stream.remote is not None for stream in dataset.streams)

    def __len__(self) -> int:
        return self._dataset.size

    def __getitems__(self, ids: Sequence[int]) -> list[Any]:
        if self._fetches and ids and not self._dataset.cache_limit:
            shards = {int(self._dataset.spanner[sample_id][0]) for sample_id in ids}
            with ThreadPoolExecutor(max_workers=_DOWNLOADS, thread_name_prefix="fetch-shard") as pool:
                list(pool.map(self._dataset.prepare_shard, sorted(shards)))
        return [with_sample_id(self._dataset[sample_id], sample_id) for sample_id in ids]


@dataclass(frozen=True)
class _Collated:
    """The collator, which is not asked for a batch of no rows; picklable."""

    collate: Callable[[Sequence[Any]], Mapping[str, Any]]

    def __call__(self, rows: Sequence[Any]) -> Mapping[str, Any]:
        if rows:
            return self.collate(rows)
        nothing = torch.zeros(0, 1, dtype=torch.int64)
        return {
            "input_ids": nothing,
            "attention_mask": nothing,
            "labels": nothing,
            "sample_id": torch.zeros(0, dtype=torch.int64),
        }


class ScoringPass:
    """Scores a stream once and keeps the best of each window; on every rank with the same arguments.

    Args:
        config: the selection's settings. `keep` is of each window.
        model: a Composer model, already with the weights to score with; it is moved to the device and frozen.
        dataset: its streams are read, once; how it would shuffle and divide them is not asked.
        collate_fn: rows to a batch, with `sample_id`.
        log_dir: a new folder, or the one of this very pass, unfinished.
        window: W, candidates of all ranks.
        order, shuffle_seed: see `pass_order`.
        device, precision: of the forward.
        settings: whatever else decides the result (data format, tokenizer, …), as JSON holds it: recorded, and compared on a resume.
        anchor_seconds: at most so much work is lost by a kill. 0: an anchor after each window.
        num_workers, timeout: of the data loader.
        trunk, head: see `OnlineBatchSelection`.

    Raises:
        ConfigError: a setting that has no meaning without training, or a stream that would be read in part or repeatedly.
        ModelError: the model cannot be scored.
    """

    def __init__(
        self,
        *,
        config: SelectionConfig,
        model: nn.Module,
        dataset: StreamingDataset,
        collate_fn: Callable[[Sequence[Any]], Mapping[str, Any]],
        log_dir: str | Path,
        window: int = 512,
        order: Order = "shuffled",
        shuffle_seed: int = 9176,
        device: Device,
        precision: Precision = Precision.FP32,
        settings: Mapping[str, Any] | None = None,
        anchor_seconds: float = 60.0,
        num_workers: int = 0,
        timeout: float = 0.0,
        trunk: str | None = None,
        head: str | None = None,
    ) -> None:
        _check(config, dataset, window)
        self.config, self.window, self.log_dir = config, window, Path(log_dir)
        self._dataset, self._collate = dataset, _Collated(collate_fn)
        self._order = pass_order(dataset, order, seed=shuffle_seed)
        self._anchor_seconds = anchor_seconds
        self._loading = {"num_workers": num_workers, "timeout": timeout if num_workers else 0}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._model = device.module_to_device(model)
        self.selector = CandidateSelector(
            config, self._model, device=device, precision=precision, trunk=trunk, head=head
        )
        self._facts = dict(settings or {}) | {
            "kind": "scoring",
            "window": window,
            "order": order,
            "shuffle_seed": shuffle_seed if order == "shuffled" else None,
            "precision": str(precision),
        }

    @property
    def windows(self) -> int:
        """How many there are."""
        return -(-len(self._order) // self.window)

    def run(self, report: Callable[[PassProgress], None] | None = None) -> PassProgress:
        """Scores to the end, or goes on to it. Every rank must call it.

        Args:
            report: told of each window; asked for on rank 0 alone.

        Raises:
            ResumeError: the folder holds a pass with other settings, weights or streams.
            LogExistsError: it holds another run's log.
            DataError, ScoreError, LogError: see `udsstream.errors`.
        """
        # What cannot be tokenised is said before a log is begun.
        self._collate(_Samples(self._dataset).__getitems__([int(self._order[0])]))
        streams = stream_identities(self._dataset)
        facts = self._facts | {"weights_sha256": from_rank_zero(_on_rank_zero(lambda: weights_sha256(self._model)))}
        writer, first = self._open_log(streams, facts)
        if writer is None:
            return self._progress(first)
        try:
            progress = self._score(writer, first, report)
            writer.seal()
        except BaseException:
            writer.release()  # no claim that the record is complete
            raise
        writer.close()
        return progress

    # The log ----------------------------------------------------------------------------------------------------------

    def _open_log(
        self, streams: list[StreamIdentity], facts: Mapping[str, Any]
    ) -> tuple[SelectionLogWriter | None, int]:
        """The log, new or to be gone on with, and the window to go on with. No log when all was scored: it is left as it stands."""
        begun = from_rank_zero(layout.run_path(self.log_dir).exists())
        if not begun:
            description = from_rank_zero(self._describe(streams, facts))
            return begin_log(self.log_dir, description, self.config), 0
        found = SelectionLog.open(self.log_dir)
        recorded = found.run.get("job")
        if not isinstance(recorded, dict) or recorded.get("kind") != "scoring":
            raise ResumeError(
                f"{self.log_dir} holds the log of a training run, not of a scoring pass; choose another folder"
            )
        if changed := config_difference(found.run["selection"] | recorded, self.config.as_dict() | dict(facts)):
            raise ResumeError(
                f"{self.log_dir} holds a scoring pass with other settings:\n  "
                + "\n  ".join(changed)
                + "\ngo on with the old ones, or choose another folder"
            )
        check_streams([[stream["name"], stream["index_sha256"]] for stream in found.run["streams"]], streams)
        anchors = from_rank_zero(found.anchors())
        same: dict[str, Any] = {"config": self.config, "streams": streams, "model": self._model}
        if not anchors:
            writer, _ = reopen_log(self.log_dir, anchored=None, step=0, **same)
            return writer, 0
        newest = anchors[-1]
        if from_rank_zero(newest.step == self.windows and found.closed):
            return None, newest.step
        anchored = {"run_id": found.run["run_id"], "heads": newest.heads}
        # Before the log is taken up: afterwards the newest attempt has no memory of its own yet.
        memory = found.buffer_at(newest.step)
        if (memory.digest or newest.buffer_digest) != newest.buffer_digest:
            raise ResumeError(
                f"{self.log_dir}: the memory before step {newest.step} is not the one that its heads speak of; audit the log"
            )
        writer, _ = reopen_log(self.log_dir, anchored=anchored, step=newest.step, **same)
        self.selector.restore_memory(
            {"rows": torch.from_numpy(memory.embeddings), "pushed": newest.pushed, "digest": newest.buffer_digest}
        )
        return writer, newest.step

    def _describe(self, streams: list[StreamIdentity], facts: Mapping[str, Any]) -> dict[str, Any]:
        ranks = dist.get_world_size()
        description = describe_run(
            config=self.config,
            alpha=self.selector.alpha,
            vocab_size=self.selector.vocab_size,
            model=self._model,
            streams=streams,
            loader={
                "batch_size": self.window // ranks if self.window % ranks == 0 else None,
                "canonical_nodes": 1,
                "batches_per_epoch": self.windows,
                "max_duration": "1ep",
            },
            world_size=ranks,
            train_seed=None,
            warm_start=None,
            inputs={},
            weights={},  # `job` names them all by one digest
        )
        return description | {"job": dict(facts)}

    def _anchor(self, writer: SelectionLogWriter, step: int) -> None:
        check_same_memory(self.selector.buffer.digest, self.selector.buffer.pushed)
        anchor(writer, step, self.selector.buffer)
        if dist.get_global_rank() == 0 and self.config.embeddings == "tail":
            _drop_old_memories(self.log_dir)

    # Windows ----------------------------------------------------------------------------------------------------------

    def _score(
        self, writer: SelectionLogWriter, first: int, report: Callable[[PassProgress], None] | None
    ) -> PassProgress:
        here, ranks = dist.get_global_rank(), dist.get_world_size()
        sampler = Windows(
            self._order, self.window, first=first, rank=here, ranks=ranks, ranks_per_node=dist.get_local_world_size()
        )
        loader = DataLoader(_Samples(self._dataset), batch_sampler=sampler, collate_fn=self._collate, **self._loading)
        timings = TimingsWriter(self.log_dir) if here == 0 else None
        progress = self._progress(first)
        began = anchored = time.monotonic()
        try:
            for step, batch in enumerate(loader, first):
                started = time.perf_counter()
                decision = self._decide(batch, step)
                decided = time.perf_counter()
                record(
                    step,
                    decision,
                    selector=self.selector,
                    writer=writer,
                    source=self._dataset,
                    epoch=0,
                    sample_in_epoch=step * self.window,
                )
                recorded = time.perf_counter()
                if self._is_time(time.monotonic() - anchored):
                    self._anchor(writer, step + 1)
                    anchored = time.monotonic()
                if timings is not None:
                    timings.append(
                        step,
                        step_seconds=time.perf_counter() - started,
                        selection_seconds=decided - started,
                        log_seconds=recorded - decided,
                    )
                progress = dataclasses.replace(
                    progress,
                    windows=step + 1,
                    samples=progress.samples + len(decision.sample_ids),
                    kept=progress.kept + len(decision.kept),
                    samples_here=progress.samples_here + len(decision.sample_ids),
                    tokens_here=progress.tokens_here + sum(decision.lengths),
                    seconds_here=time.monotonic() - began,
                )
                if report is not None and here == 0:
                    report(progress)
            if progress.samples_here:
                self._anchor(writer, self.windows)
        finally:
            if timings is not None:
                timings.close()
        return progress

    def _progress(self, windows: int) -> PassProgress:
        """After so many windows, none of them scored by this process."""
        total = len(self._order)
        return PassProgress(
            windows=windows,
            all_windows=self.windows,
            samples=min(total, windows * self.window),
            all_samples=total,
            kept=sum(self._kept(min(self.window, total - n * self.window)) for n in range(windows)),
            samples_here=0,
            tokens_here=0,
            seconds_here=0.0,
        )

    def _decide(self, batch: Mapping[str, Any], step: int) -> Decision:
        decision = self.selector.decide(batch, selects=True, epoch=0, batch_in_epoch=step)
        assert decision.scores is not None
        # Nobody trains, so that ranks need no equal shares: of a last window as much is kept as one rank would keep.
        return dataclasses.replace(decision, kept=top_k(decision.scores, self._kept(len(decision.scores))).tolist())

    def _kept(self, candidates: int) -> int:
        return self.config.kept(candidates)

    def _is_time(self, seconds: float) -> bool:
        # The ranks' clocks differ, and an anchor is a collective.
        return bool(from_rank_zero(seconds >= self._anchor_seconds))


def _check(config: SelectionConfig, dataset: StreamingDataset, window: int) -> None:
    mistakes = []
    default = SelectionConfig()
    for name in ("start", "end", "interrupt"):
        if getattr(config, name) != getattr(default, name):
            mistakes.append(f"{name}: every window is chosen from; leave it out")
    if config.scope != "global":
        mistakes.append("scope: the best of a whole window are kept, whatever the number of ranks; leave it out")
    if config.keep_tokens is not None:
        mistakes.append("keep_tokens: a pass keeps a share or a number of each window; give keep")
    if config.method in ("full", "rho_loss", "greats"):
        mistakes.append(f"method: {config.method!r} is for training; score by another one")
    if config.embeddings == "none":
        mistakes.append("embeddings: 'none' leaves nothing to resume from; use 'tail' or 'full'")
    if isinstance(config.keep, int) and config.keep > window:
        mistakes.append(f"keep: {config.keep} of each window are to be kept, but a window has {window} samples")
    if mistakes:
        raise ConfigError("a scoring pass cannot use these settings:\n" + "\n".join(f"  {line}" for line in mistakes))
    for number, stream in enumerate(dataset.streams):
        samples = int(dataset.samples_per_stream[number])
        if stream.choose != samples:
            raise ConfigError(
                f"stream {number} ({stream.remote or stream.local}) would be drawn {stream.choose} times for its {samples} samples, but a "
                "scoring pass reads each sample once; leave proportion, repeat and choose out"
            )


def _on_rank_zero(work: Callable[[], Any]) -> Any:
    return work() if dist.get_global_rank() == 0 else None


def _drop_old_memories(log_dir: Path) -> None:
    folder = log_dir / "_buffers"
    files = sorted((path for path in folder.glob("ba*.arrow")), key=lambda path: path.stat().st_mtime_ns)
    for path in files[:-_KEPT_MEMORIES]:
        path.unlink(missing_ok=True)
