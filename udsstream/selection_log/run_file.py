"""run.json: what the run is, as the caller gave it, and under "log" what a reader must know of the log. Never rewritten.

Every chain begins with the digest of its bytes, so that the settings belong to the record they explain.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from udsstream.errors import ConfigError, LogCorruptError, LogError
from udsstream.selection_log import layout
from udsstream.selection_log.digest import DIGEST_RULE
from udsstream.selection_log.encoding import TableCodec
from udsstream.selection_log.files import read_small
from udsstream.selection_log.schema import (
    MEASURES,
    MODES,
    PUSHES,
    SCHEMA_VERSION,
    SELECTION,
    EmbeddingDtype,
    EmbeddingMode,
    decision_schema,
    push_schema,
)

__all__ = ["LogSettings", "RunFile", "encode_run", "read_run"]

RUN_LIMIT = 16 << 20
_DIM_LIMIT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """The part of run.json that the log itself depends on."""

    embeddings: EmbeddingMode
    embedding_dim: int | None  # numbers per embedding
    embedding_dtype: EmbeddingDtype
    buffer_capacity: int | None  # embeddings that the memory holds; None when the writer was not told
    world_size: int  # of the first attempt
    measures: tuple[str, ...] = ()  # columns of version 2 that the decisions have
    interactions: int | None = None  # numbers of the column `interaction`

    @property
    def version(self) -> int:
        """The schema version: 2 when a column of it is needed."""
        return 2 if self.measures else 1

    def __post_init__(self) -> None:
        if self.embeddings not in MODES:
            raise ConfigError(f"embeddings={self.embeddings!r}, expected one of {', '.join(map(repr, MODES))}")
        if self.embedding_dtype not in ("float32", "float16"):
            raise ConfigError(f"embedding_dtype={self.embedding_dtype!r}, expected 'float32' or 'float16'")
        if not _is_count(self.world_size, 1 << 20):
            raise ConfigError(f"world_size={self.world_size!r}, expected a positive whole number")
        if self.embedding_dim is None and self.embeddings != "none":
            raise ConfigError(f"embeddings={self.embeddings!r} needs embedding_dim, the numbers per embedding")
        for name in ("embedding_dim", "buffer_capacity"):
            value = getattr(self, name)
            if value is not None and not _is_count(value, _DIM_LIMIT if name == "embedding_dim" else 1 << 40):
                raise ConfigError(f"{name}={value!r}, expected a positive whole number")
        if not isinstance(self.measures, (tuple, list)) or list(self.measures) != [
            name for name in MEASURES if name in self.measures
        ]:
            raise ConfigError(
                f"measures={self.measures!r}, expected some of {', '.join(MEASURES)}, in this order, each once"
            )
        if ("interaction" in self.measures) != (self.interactions is not None) or (
            self.interactions is not None and not _is_count(self.interactions, _DIM_LIMIT)
        ):
            raise ConfigError(
                f"interactions={self.interactions!r}, expected a positive whole number with the measure 'interaction', and null without"
            )
        object.__setattr__(self, "measures", tuple(self.measures))

    def codec(self, table: str) -> TableCodec:
        if table == SELECTION:
            return TableCodec(SELECTION, decision_schema(self.measures, self.interactions), self.version)
        return TableCodec(PUSHES, push_schema(self.embeddings, self.embedding_dim, self.embedding_dtype), self.version)


def _is_count(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= limit


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """A run.json that was read and checked."""

    run: dict[str, Any] = field(repr=False)
    settings: LogSettings
    sha256: bytes  # of the file's bytes


def encode_run(run: Mapping[str, Any], settings: LogSettings) -> bytes:
    """The bytes of run.json; ConfigError when `run` is not plain JSON."""
    if "log" in run:
        raise ConfigError("run['log'] is the log's own part of run.json: use another key")
    log = {
        "schema_version": settings.version,
        "digest_rule": DIGEST_RULE,
        "embeddings": settings.embeddings,
        "embedding_dim": settings.embedding_dim,
        "embedding_dtype": settings.embedding_dtype,
        "buffer_capacity": settings.buffer_capacity,
        "world_size": settings.world_size,
    }
    if settings.version == 2:
        log |= {"measures": list(settings.measures), "interactions": settings.interactions}
    value = {**run, "log": log}
    try:
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
        same = json.loads(text) == value
        data = (text + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the run's description is not plain JSON: {error}") from error
    if not same:
        raise ConfigError(
            "the run's description changes when it is written as JSON: use only str, int, float, bool, None, lists, and "
            "dicts with str keys"
        )
    if len(data) > RUN_LIMIT:
        raise ConfigError(f"the run's description takes {len(data)} bytes, at most {RUN_LIMIT} are allowed")
    return data


def decode_run(data: bytes, path: Path) -> RunFile:
    """Check the bytes of a run.json."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        run = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise LogCorruptError(f"{path} is not JSON: {error}. Restore it from a copy.") from error
    log = run.get("log") if isinstance(run, dict) else None
    if not isinstance(log, dict):
        raise LogCorruptError(f"{path} has no object under 'log': udsstream did not write it")
    version = log.get("schema_version")
    if not _is_count(version, 1 << 30):
        raise LogCorruptError(f"{path}: log.schema_version is {version!r}, expected a positive whole number")
    if cast(int, version) > SCHEMA_VERSION:
        raise LogError(
            f"{path}: the log has schema version {version}, this udsstream reads up to {SCHEMA_VERSION}. "
            "Upgrade udsstream to read it."
        )
    if log.get("digest_rule") != DIGEST_RULE:
        raise LogCorruptError(f"{path}: log.digest_rule is {log.get('digest_rule')!r}, expected {DIGEST_RULE!r}")
    fields = ("embeddings", "embedding_dim", "embedding_dtype", "buffer_capacity", "world_size")
    if missing := [name for name in fields if name not in log]:
        raise LogCorruptError(f"{path}: log.{missing[0]} is missing")
    try:
        later = {name: log[name] for name in ("measures", "interactions") if version == 2 and name in log}
        settings = LogSettings(**{name: log[name] for name in fields}, **later)
    except (ConfigError, TypeError) as error:
        raise LogCorruptError(f"{path}: log.{error}") from error
    if settings.version != version:
        raise LogCorruptError(
            f"{path}: log.schema_version is {version}, but the columns are those of version {settings.version}"
        )
    return RunFile(run=run, settings=settings, sha256=hashlib.sha256(data).digest())


def read_run(root: Path) -> RunFile:
    """Read a log's run.json; LogError when there is none."""
    path = layout.run_path(root)
    try:
        data = read_small(path, RUN_LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        what = "there is no such folder" if not root.exists() else "it has no run.json"
        raise LogError(f"{root} is not a selection log: {what}") from None
    return decode_run(data, path)
