"""What a replay reads: the decisions of a log, and from the streams only the samples that they name.

LoggedDecisions   the steps of a log as arrays
LoggedSteps       a batch sampler: the ids of each step, epoch by epoch
LoggedSamples     a map-style data set: random access by sample id, shards checked against their recorded hashes
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
from composer.utils import dist
from streaming import StreamingDataset
from streaming.base.hashing import get_hash
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from udsstream.errors import ReplayError, ShardError
from udsstream.mosaicml.dataset import with_sample_id
from udsstream.mosaicml.ranks import CanonicalOrder, canonical_order, shares
from udsstream.mosaicml.webdataset import UDSWebDataset
from udsstream.selection_log.reader import SelectionLog

__all__ = ["LoggedDecisions", "LoggedSamples", "LoggedStep", "LoggedSteps"]


@dataclass(frozen=True, kw_only=True)
class LoggedStep:
    """One step of a log, of all ranks in canonical order: its candidates, or its kept rows alone."""

    step: int
    epoch: int
    batch_in_epoch: int
    scored: bool
    """False: selection was off, and all candidates were trained on as they came."""
    sample_ids: list[int]
    order: CanonicalOrder
    """Whose each row is, on the ranks that train now."""
    tokens: list[int]
    """Real tokens of each row."""
    kept: list[int]
    """Places of the kept rows among these rows, ascending."""
    scores: np.ndarray
    """(rows,) float32; NaN where nothing was scored."""

    def rows_of(self, rank: int) -> list[int]:
        """Places of the rows that a rank reads, in the order in which it collates them."""
        return self.order.of(rank).tolist()


class LoggedDecisions:
    """The steps `first` to before `stop` of a log, in memory: about 50 bytes a row.

    Rows are dealt to the ranks that train now. Where these are as many as trained then, each rank gets what it had: all its candidates, or
    of the kept rows those that it trained on. Otherwise the rows are dealt anew, in equal shares.

    Args:
        log: to be replayed; of a resumed run the newest attempt of each step is taken.
        first: None: the log's first step.
        stop: None: to the log's end.
        candidates: whether the rejected rows are wanted too.
        ranks: how many ranks train now.

    Raises:
        ReplayError: the log has no decisions, or not all of these steps, or a step's rows cannot be dealt in equal shares.
        LogError: it cannot be read.
    """

    def __init__(
        self, log: SelectionLog, *, first: int | None, stop: int | None, candidates: bool, ranks: int = 1
    ) -> None:
        self._candidates, self.ranks = candidates, ranks
        overview = log.table(columns=["step", "epoch", "rank"])
        steps, at = np.unique(overview["step"].to_numpy(), return_index=True)
        if not len(steps):
            raise ReplayError(f"the log in {log.root} has no decisions yet, so there is nothing to replay")
        epochs = overview["epoch"].to_numpy()[at]
        self.first = int(steps[0]) if first is None else first
        self.stop = int(steps[-1]) + 1 if stop is None else stop
        wanted = (steps >= self.first) & (steps < self.stop)
        found = steps[wanted]
        if self.stop <= self.first or len(found) < self.stop - self.first:
            missing = sorted(set(range(self.first, min(self.stop, self.first + (1 << 20)))) - set(found.tolist()))
            raise ReplayError(
                f"steps {self.first} to {self.stop - 1} are to be replayed, but the log in {log.root} holds steps {steps[0]} to {steps[-1]}"
                + (f" and lacks step {missing[0]}" if missing and steps[0] <= missing[0] <= steps[-1] else "")
                + "; choose steps that it holds"
            )
        # Where the epoch of each step began tells its place in the epoch, which `method="random"` draws by.
        begins = np.concatenate([[True], epochs[1:] != epochs[:-1]])
        began = np.maximum.accumulate(np.where(begins, np.arange(len(steps)), 0))
        self._ranks_then = (np.maximum.reduceat(overview["rank"].to_numpy(), at) + 1)[wanted]
        self._epoch, self._batch_in_epoch = epochs[wanted], (np.arange(len(steps)) - began)[wanted]
        self._complete_epochs = [int(np.sum(epochs == epoch)) for epoch in np.unique(epochs)[:-1]]

        filter = (pc.field("step") >= self.first) & (pc.field("step") < self.stop)
        if not candidates:
            filter &= pc.field("selected")
        order = [("step", "ascending"), ("position" if candidates else "train_order", "ascending")]
        columns = ["step", "position", "rank", "sample_id", "tokens", "score", "selected", "train_order"]
        table = log.table(columns=columns, filter=filter).sort_by(order)
        self._starts = np.searchsorted(table["step"].to_numpy(), np.arange(self.first, self.stop + 1))
        self._ids = table["sample_id"].to_numpy()
        self._rank = table["rank"].to_numpy()
        self._tokens = table["tokens"].to_numpy()
        self._selected = table["selected"].to_numpy()
        self._scores = pc.fill_null(table["score"], float("nan")).to_numpy()
        if empty := np.flatnonzero(np.diff(self._starts) == 0).tolist():
            raise ReplayError(f"step {self.first + empty[0]} of the log in {log.root} kept no sample; audit the log")
        uneven = (np.diff(self._starts) % ranks != 0) & (self._ranks_then != ranks)
        if uneven.any():
            at_step = int(np.flatnonzero(uneven)[0])
            raise ReplayError(
                f"step {self.first + at_step} has {np.diff(self._starts)[at_step]} rows, which {ranks} ranks cannot share equally; "
                f"replay on {self._ranks_then[at_step]}, as it was trained, or on 1"
            )

    def __len__(self) -> int:
        """How many steps there are."""
        return self.stop - self.first

    def __getitem__(self, step: int) -> LoggedStep:
        """The step of this number."""
        place = step - self.first
        if not 0 <= place < len(self):
            raise IndexError(f"step {step} is not among the steps {self.first} to {self.stop - 1}")
        rows = slice(int(self._starts[place]), int(self._starts[place + 1]))
        scores = self._scores[rows]
        return LoggedStep(
            order=self._order(place, rows, scored=not np.isnan(scores).any()),
            step=step,
            epoch=int(self._epoch[place]),
            batch_in_epoch=int(self._batch_in_epoch[place]),
            scored=not np.isnan(scores).any(),
            sample_ids=self._ids[rows].tolist(),
            tokens=self._tokens[rows].tolist(),
            kept=np.flatnonzero(self._selected[rows]).tolist(),
            scores=scores,
        )

    def _order(self, place: int, rows: slice, *, scored: bool) -> CanonicalOrder:
        owners = self._rank[rows].astype(np.int64)
        if self.ranks != self._ranks_then[place]:
            return canonical_order([len(owners) // self.ranks] * self.ranks, dist.get_local_world_size())
        if scored and not self._candidates:
            of_rank = shares(CanonicalOrder(rank=owners, row=owners), range(len(owners)), self.ranks)
            for rank, places in enumerate(of_rank):
                owners[places] = rank
        row = np.empty_like(owners)
        for rank in range(self.ranks):
            mine = np.flatnonzero(owners == rank)
            row[mine] = np.arange(len(mine))
        return CanonicalOrder(rank=owners, row=row)

    def steps_of_other_ranks(self) -> int:
        """How many of the steps were trained on another number of ranks."""
        return int((self._ranks_then != self.ranks).sum())

    def epoch_stop(self, step: int) -> int:
        """The first step after `step` that is of another epoch, or `stop`."""
        place = step - self.first
        return self.first + int(np.searchsorted(self._epoch, self._epoch[place], side="right"))

    @property
    def longest_epoch(self) -> int | None:
        """Steps of the longest epoch that the log holds whole; None when it holds none."""
        return max(self._complete_epochs, default=None)


class LoggedSteps(DistributedSampler):
    """A batch sampler: yields this rank's ids of each step, from the next one to the end of its epoch.

    (A DistributedSampler, because Composer refuses a map-style data set on several ranks without one.)

    Args:
        decisions: what is yielded.
        rank: whose ids.
        batches_per_epoch: its length; Composer turns durations in epochs into batches by it, so it is the original's even where the
            log ends earlier.
    """

    def __init__(self, decisions: LoggedDecisions, *, rank: int, batches_per_epoch: int) -> None:
        super().__init__(decisions, num_replicas=decisions.ranks, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self._decisions = decisions
        self._rank = rank
        self._batches_per_epoch = batches_per_epoch
        self._next = decisions.first
        self._epoch_now = decisions[decisions.first].epoch

    def go_to(self, step: int, *, epoch: int) -> None:
        """The next iteration begins with this step of the log, and is of this epoch of the log: empty when the step is of a later one."""
        self._next, self._epoch_now = step, epoch

    def __iter__(self) -> Iterator[Any]:
        if self._next >= self._decisions.stop or self._decisions[self._next].epoch != self._epoch_now:
            return
        for step in range(self._next, self._decisions.epoch_stop(self._next)):
            logged = self._decisions[step]
            yield [logged.sample_ids[place] for place in logged.rows_of(self._rank)]

    def __len__(self) -> int:
        return self._batches_per_epoch


class LoggedSamples(Dataset):
    """Random access to the samples of a data set by their ids, downloading shards as they are needed.

    Args:
        dataset: with the streams that the run had, in their order. It is not iterated.
        verify_shards: check each shard against the hashes in its stream's index before its first sample is read. The index itself is
            bound to the log by its digest (`check_streams`), so a sample that passes is the one that the run saw.

    Raises (by `__getitem__`):
        ShardError: a shard is missing, damaged, or holds other bytes than the run saw; it names the sample.
    """

    def __init__(self, dataset: StreamingDataset | UDSWebDataset, *, verify_shards: bool) -> None:
        self.streaming = dataset
        self._verify = verify_shards

    def __len__(self) -> int:
        return self.streaming.size

    def __getitem__(self, index: int) -> Any:
        sample = with_sample_id(self.streaming[index], index)
        if self._verify:
            self._check_shard(index)
        return sample

    # Composer: "this data set resumes by itself". Where a resumed replay goes on is told by the step, so nothing needs to be kept.

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Nothing: see `LoggedSteps.go_to`."""
        del num_samples, from_beginning
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Takes anything: the position comes from the step."""

    @cached_property
    def _checked(self) -> set[int]:
        """Shards that this process has checked."""
        return set()

    def _check_shard(self, sample_id: int) -> None:
        dataset = self.streaming
        if isinstance(dataset, UDSWebDataset):
            number = dataset.shard_of(sample_id)
            if number not in self._checked:
                dataset.check_shard(sample_id)
                self._checked.add(number)
            return
        number = int(dataset.spanner[sample_id][0])
        if number in self._checked:
            return
        stream = dataset.streams[int(dataset.stream_per_shard[number])]
        for raw, _ in dataset.shards[number].file_pairs:
            path = os.path.join(stream.local, stream.split or "", raw.basename)
            if not raw.hashes:
                continue  # said once, by `unhashed_streams`
            algorithm, recorded = next(iter(raw.hashes.items()))
            with open(path, "rb") as file:
                found = get_hash(algorithm, file.read())
            if found != recorded:
                raise ShardError(
                    f"sample {sample_id} is not the one that the run trained on: the {algorithm} of its shard {path} is {found}, but its "
                    f"stream's index records {recorded}; fetch the shard again from where the run read it"
                )
        self._checked.add(number)

    def unhashed_streams(self) -> list[str]:
        """Places of the streams with a shard that was written without hashes, so that nobody can tell whether it changed."""
        if isinstance(self.streaming, UDSWebDataset):
            return []
        numbers = {
            int(self.streaming.stream_per_shard[number])
            for number, shard in enumerate(self.streaming.shards)
            if not all(raw.hashes for raw, _ in shard.file_pairs)
        }
        return [
            str(self.streaming.streams[number].remote or self.streaming.streams[number].local)
            for number in sorted(numbers)
        ]
