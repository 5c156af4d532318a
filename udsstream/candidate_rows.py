"""Where a job's rows come from, and how one becomes tokens, as its settings say: streams, the columns they must have, the collator.

What is not here: reading streams (`udsstream/mosaicml/dataset.py`) and making tokens (`sft.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from composer.models import HuggingFaceModel
from streaming import Stream

from udsstream.errors import DataError
from udsstream.job_folder import WORK
from udsstream.run_config import CandidatesConfig, EvalConfig, StreamConfig
from udsstream.sft import SFTCollator, check_columns
from udsstream.stream_index import INDEX, parse_index

__all__ = ["check_local_columns", "collator_of", "streams_of"]


def streams_of(data: CandidatesConfig) -> list[Stream]:
    """The streams, in order.

    Raises:
        DataError: a local one is not there, or Streaming does not know how to fetch a remote one.
    """
    if data.streams_root is not None:
        root = Path(data.streams_root)
        if (root / WORK).exists():
            raise DataError(
                f"data.streams_root: {root} is being written, or its writing was interrupted ({WORK} is in it), so streams may be missing; "
                "give the command that wrote it (udsstream ingest, udsstream curate) again"
            )
        indexes = _indexes_under(root)
        if not indexes:
            raise DataError(
                f"data.streams_root: {root} {'has no sub-folder with an index.json' if root.is_dir() else 'is not a folder'}; "
                "each stream is a folder that streaming.MDSWriter wrote"
            )
        return [Stream(local=str(index.parent)) for index in indexes]
    for number, stream in enumerate(data.streams):
        if stream.remote is None and not _index_of(stream).exists():
            raise DataError(
                f"data.streams.{number}.local: {stream.local} holds no index.json, so it is no MDS stream (and no remote is given "
                "to fetch it from)"
            )
    return [_stream(number, stream) for number, stream in enumerate(data.streams)]


def check_local_columns(data: CandidatesConfig, held_out: EvalConfig | None = None) -> None:
    """Whether the rows of local streams can be tokenised: before a model is loaded. Others are known only once they are fetched.

    Raises:
        DataError: columns are missing; names the stream and its columns.
    """
    for name, index in _local_indexes(data, held_out):
        if not index.exists():
            continue  # said where the stream is opened
        for shard in parse_index(index.read_bytes())[:1]:
            check_columns([str(column) for column in shard.entry.get("column_names", ())], name, **data.row_form())


def collator_of(data: CandidatesConfig, max_seq_len: int, model: HuggingFaceModel) -> SFTCollator:
    """What makes padded batches of rows, with the model's tokenizer."""
    assert model.tokenizer is not None
    return SFTCollator(
        tokenizer=model.tokenizer,
        max_seq_len=max_seq_len,
        **data.tokenising(),
    )


def _local_indexes(data: CandidatesConfig, held_out: EvalConfig | None) -> Iterator[tuple[str, Path]]:
    """(name for a message, index) of each stream that need not be fetched."""
    if data.streams_root is not None:
        for index in _indexes_under(Path(data.streams_root)):
            yield f"data.streams_root: {index.parent}", index
    for number, stream in enumerate(data.streams):
        if stream.remote is None:
            yield f"data.streams.{number}: {stream.local}", _index_of(stream)
    if held_out is not None and held_out.remote is None:
        yield f"eval: {held_out.local}", _index_of(held_out)


def _indexes_under(root: Path) -> list[Path]:
    return sorted(root.glob(f"*/{INDEX}"))


def _index_of(stream: StreamConfig | EvalConfig) -> Path:
    return Path(stream.local or "") / (stream.split or "") / INDEX


def _stream(number: int, settings: StreamConfig) -> Stream:
    try:
        return Stream(**settings.model_dump(exclude_none=True))
    except ValueError as error:
        raise DataError(
            f"data.streams.{number}: Streaming cannot fetch from {settings.remote} ({error}); it reads s3://, gs://, "
            "azure://, oci://, hf:// and the like, and local folders"
        ) from error
