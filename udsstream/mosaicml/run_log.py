"""Which log a run writes to: a new one, or the one that it was interrupted in, and never another's.

The log's files and their digests are `udsstream/selection_log`'s; here is what a log, a checkpoint and a run that starts must agree on:

* a new run needs a folder without a log;
* a run that resumes from a checkpoint needs the log that the checkpoint belongs to, which must contain all that the checkpoint saw;
* a run that was killed before its first checkpoint may begin its log anew, if asked to (`autoresume`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from composer.utils import dist
from torch import nn

from udsstream.config import SelectionConfig, config_difference
from udsstream.errors import ConfigError, LogExistsError, ResumeError
from udsstream.mosaicml.dataset import StreamIdentity
from udsstream.mosaicml.length_groups import check_same_grouping
from udsstream.mosaicml.ranks import from_rank_zero, on_rank_zero
from udsstream.mosaicml.weights import weights_differences
from udsstream.scoring.embedding_buffer import EmbeddingBuffer
from udsstream.selection_log.reader import Memory, SelectionLog
from udsstream.selection_log.schema import MEASURES
from udsstream.selection_log.writer import SelectionLogWriter

__all__ = ["anchor", "begin_log", "check_streams", "former_memory", "reopen_log"]


def begin_log(log_dir: Path, description: Mapping[str, Any], config: SelectionConfig) -> SelectionLogWriter:
    """A new log for the run that `description` (of `describe_run`) tells of.

    Raises:
        LogExistsError: the folder holds a log already.
    """
    return SelectionLogWriter.create(
        log_dir,
        run=description,
        rank=dist.get_global_rank(),
        world_size=dist.get_world_size(),
        embeddings=config.embeddings,
        embedding_dim=config.embedding_dim,
        buffer_capacity=config.buffer_size,
        measures=[name for name in MEASURES if name in config.measures],
        interactions=_interactions(description, config),
    )


def _interactions(description: Mapping[str, Any], config: SelectionConfig) -> int | None:
    """The most candidates that a rank has, where the log holds what they are to each other."""
    if not config.compares:
        return None
    batch_size = description["loader"]["batch_size"]
    if batch_size is None:
        raise ConfigError(
            f"method={config.method_name!r} logs each candidate's products with the others of its batch, so it must know how many there "
            "are: let the data loader have a batch_size (not a batch sampler of its own)"
        )
    return batch_size


def reopen_log(
    log_dir: Path,
    *,
    anchored: Mapping[str, Any] | None,
    step: int,
    config: SelectionConfig,
    streams: Sequence[StreamIdentity],
    model: nn.Module,
    grouping: Mapping[str, Any] | None = None,
) -> tuple[SelectionLogWriter, str]:
    """The log of the run that goes on at `step`, and its run id.

    Args:
        anchored: the checkpoint's word on the log: run id and chain heads. None: the run was killed before its first checkpoint.
        model: as it is now: without a checkpoint it begins anew, and must begin with the same weights.
        grouping: how the data set groups its epochs by length.

    Raises:
        ResumeError: the folder has no log, or one with other settings, streams, length groups or first weights.
        LogExistsError: it has the log of another run.
        LogCorruptError: it lacks steps that the checkpoint saw, or holds others.
    """
    if not (log_dir / "run.json").exists():
        raise ResumeError(
            f"the checkpoint belongs to the log of run {anchored['run_id'] if anchored else '(unknown)'}, but there is no log in "
            f"{log_dir}; give the log_dir that the run had"
        )
    run = SelectionLog.open(log_dir).run
    if anchored is not None and run["run_id"] != anchored["run_id"]:
        raise LogExistsError(
            f"{log_dir} holds the log of run {run['run_id']}, but the checkpoint belongs to run {anchored['run_id']}; "
            "give the log_dir that the run had"
        )
    changed = config_difference(run["selection"], config.as_dict())
    if changed:
        raise ResumeError(
            f"{log_dir} holds a run with other selection settings:\n  "
            + "\n  ".join(changed)
            + "\nresume with the old values, or give the new run a log_dir of its own"
        )
    check_streams([[stream["name"], stream["index_sha256"]] for stream in run["streams"]], streams)
    check_same_grouping((run.get("loader") or {}).get("length_groups"), grouping)
    if anchored is None:
        other = on_rank_zero(lambda: weights_differences(run.get("weights"), model, at_start=True))
        if other:
            raise ResumeError(
                f"{log_dir} holds a run that began with other weights:\n  "
                + "\n  ".join(other)
                + "\ngive the model and the seed that it had, or give the new run a log_dir of its own"
            )
    rank, heads = dist.get_global_rank(), [] if anchored is None else anchored["heads"]

    def resume(attempt: int | None) -> SelectionLogWriter:
        return SelectionLogWriter.resume(
            log_dir,
            step=step,
            head=heads[rank] if rank < len(heads) else None,  # the checkpoint may be of fewer ranks
            rank=rank,
            world_size=dist.get_world_size(),
            attempt=attempt,
        )

    # Rank 0 finds the attempt's number, and the others must use it.
    first = resume(None) if rank == 0 else None
    attempt = from_rank_zero(None if first is None else first.attempt)
    return first or resume(attempt), run["run_id"]


def anchor(writer: SelectionLogWriter, step: int, buffer: EmbeddingBuffer) -> dict[str, Any]:
    """Makes everything logged so far durable on every rank, and returns what a checkpoint keeps of it: heads and Merkle root.

    A collective: every rank must call it.
    """
    heads = list(dist.all_gather_object(writer.sync()))
    root = writer.checkpoint(
        step,
        heads=heads,
        buffer=buffer.oldest_first().cpu().numpy(),
        pushed=buffer.pushed,
        buffer_digest=buffer.digest,
    )
    return {"heads": heads, "merkle_root": root}


def check_streams(recorded: Sequence[Sequence[str]], streams: Sequence[StreamIdentity]) -> None:
    """Raises ResumeError when the streams are not the recorded (name, index digest) pairs, in order.

    Names may differ: a stream that was moved is the same stream, one whose index changed is not.
    """
    if [digest for _, digest in recorded] == [stream.index_sha256 for stream in streams]:
        return
    lines = [
        f"stream {number}: was {name} (index {digest[:12]}…), is {stream.name} (index {stream.index_sha256[:12]}…)"
        for number, ((name, digest), stream) in enumerate(zip(recorded, streams, strict=False))
        if digest != stream.index_sha256
    ]
    if len(recorded) != len(streams):
        lines.append(f"number of streams: was {len(recorded)}, is {len(streams)}")
    raise ResumeError(
        "the data set is not the one that this run was recorded with, so its sample ids would name other samples:\n  "
        + "\n  ".join(lines)
        + "\ngive the same streams in the same order, or start a new run"
    )


def former_memory(run: Path, embedding_dim: int) -> tuple[Memory, dict[str, Any]]:
    """The memory that a former run ended with, and what run.json says of where it comes from.

    Raises:
        ConfigError: the former run's embeddings have another dimension, or were made by another projection.
        LogError: the former run's log cannot be read, or kept no embeddings.
    """
    log = SelectionLog.open(run)
    memory = log.buffer_at()
    if memory.embeddings.shape[1] != embedding_dim:
        raise ConfigError(
            f"warm_start: the embeddings of {run} have {memory.embeddings.shape[1]} components, this run's have {embedding_dim}; "
            "use the same projection_dims"
        )
    return memory, {
        "run_id": log.run["run_id"],
        "pushed": memory.pushed,
        "memory_digest": memory.digest.hex() if memory.digest else None,
    }


def check_same_projection(run: Path, config: SelectionConfig, vocab_size: int) -> None:
    """Raises ConfigError when a former run's embeddings do not live in this run's space."""
    former = SelectionLog.open(run).run
    deciding = ("projection_dims", "projection_scale", "max_seq_len", "length_norm", "seed", "method")
    changed = config_difference(
        {name: former["selection"].get(name) for name in deciding} | {"vocab_size": former.get("vocab_size")},
        {name: config.as_dict()[name] for name in deciding} | {"vocab_size": vocab_size},
    )
    if changed:
        raise ConfigError(
            f"warm_start: the embeddings in {run} were made by another projection, so distances to them mean nothing:\n  "
            + "\n  ".join(changed)
        )
