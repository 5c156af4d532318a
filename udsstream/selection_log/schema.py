"""The tables of the selection log: their columns, units and version.

    selection  one row per candidate per step: what was offered, how it was valued, whether it was kept
    pushes     one row per embedding pushed into the memory, by the rank that contributed it

Columns are only ever appended, with a higher schema version; a column never changes its meaning or unit. Version 2 has behind the columns
of version 1 those measures that its run.json names (`log.measures`); a log that needs none of them is still written in version 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pyarrow as pa

__all__ = [
    "DECISION_SCHEMA",
    "MEASURES",
    "MODES",
    "PUSHES",
    "PUSH_SCHEMA",
    "SCHEMA_VERSION",
    "SELECTION",
    "TABLES",
    "EmbeddingDtype",
    "EmbeddingMode",
    "decision_schema",
    "embedding_type",
    "push_schema",
]

SCHEMA_VERSION = 2
"""The highest that is written and read."""

SELECTION = "selection"
PUSHES = "pushes"
TABLES = (SELECTION, PUSHES)

EmbeddingMode = Literal["full", "tail", "none"]
EmbeddingDtype = Literal["float32", "float16"]
MODES: tuple[EmbeddingMode, ...] = ("full", "tail", "none")


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


DECISION_SCHEMA = pa.schema(
    [
        _required("attempt", pa.int16()),  # 0 for the first start, one more for each resume
        _required("step", pa.int64()),  # batches trained before this one (Composer's timestamp.batch)
        _required("epoch", pa.int32()),
        _required("rank", pa.int32()),  # the rank whose data loader brought the candidate
        _required("position", pa.int32()),  # place in the global candidate batch
        _required("epoch_position", pa.int64()),  # samples seen in the epoch before this step + position
        _required("sample_id", pa.int64()),  # over the data set's ordered streams
        pa.field("stream", pa.int16()),  # number in run.json's list of streams
        pa.field("shard", pa.int32()),  # index within its stream
        pa.field("shard_index", pa.int32()),  # index within the shard
        _required("tokens", pa.int32()),  # tokens without padding
        pa.field("loss", pa.float32()),  # nats per token
        pa.field("intra", pa.float32()),  # utility and diversity within the sample, in the method's units
        pa.field("inter", pa.float32()),  # mean distance to the memory, in the method's units
        pa.field("score", pa.float32()),  # what the choice was made by; null when the step was not scored
        _required("selected", pa.bool_()),
        pa.field("train_order", pa.int32()),  # place among the kept; null when not kept
    ]
)

MEASURES = ("grad_norm", "reference_loss", "alignment", "interaction")
"""What version 2 may have measured of a candidate beside `loss`, `intra` and `inter`, in this order:

    grad_norm       Frobenius norm of the last layer's gradient of its loss, nats per unit of weight
    reference_loss  its loss with a reference model, nats per token
    alignment       inner product of that gradient with the validation samples'
    interaction     of such gradients: with each of its rank's candidates of the step, in the method's units; zeros behind the last one
"""


def decision_schema(measures: Sequence[str] = (), interactions: int | None = None) -> pa.Schema:
    """The decisions' columns with some of MEASURES; `interactions`: numbers of `interaction`, the most candidates that a rank may have."""
    schema = DECISION_SCHEMA
    for name in MEASURES:
        if name in measures and name != "interaction":
            schema = schema.append(pa.field(name, pa.float32()))
    if "interaction" in measures:
        assert interactions is not None
        schema = schema.append(pa.field("interaction", pa.list_(pa.float32(), interactions)))
    return schema


PUSH_SCHEMA = pa.schema(
    [
        _required("attempt", pa.int16()),
        _required("step", pa.int64()),  # -1: pushed before the first step (a memory taken over from another run)
        _required("rank", pa.int32()),
        _required("position", pa.int32()),  # place in the global candidate batch; -1 when it came from no batch
        _required("sample_id", pa.int64()),  # -1 when unknown
        _required("push_index", pa.int64()),  # embeddings pushed before this one over the whole run, all ranks
        _required("digest", pa.binary(32)),  # of the memory after this step's push; the same in each of its rows
    ]
)


def embedding_type(dim: int, dtype: EmbeddingDtype) -> pa.DataType:
    """A vector of the memory: `dim` numbers of the stored type."""
    return pa.list_({"float32": pa.float32(), "float16": pa.float16()}[dtype], dim)


def push_schema(mode: EmbeddingMode, dim: int | None, dtype: EmbeddingDtype) -> pa.Schema:
    """The pushes' columns in this mode: `embedding` is there under "full" alone (a null vector costs as much as a full one)."""
    if mode != "full":
        return PUSH_SCHEMA
    assert dim is not None
    return PUSH_SCHEMA.append(pa.field("embedding", embedding_type(dim, dtype)))
