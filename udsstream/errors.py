"""Every error that udsstream raises for something a user can change.

    UdsstreamError
    ├── ConfigError            a setting is unknown, of the wrong type, out of range or at odds with another (ValueError)
    ├── DataError              a batch, a sample or a stream is not what training needs (ValueError)
    │   ├── MissingSampleIdError   the batch carries no `sample_id`
    │   ├── SequenceTooLongError   a sample has more tokens than `max_seq_len`
    │   └── ShardError             a shard of a stream is missing, truncated or corrupt
    ├── ModelError             the model's trunk or head cannot be found or scored (ValueError)
    ├── ScoreError             a score is not a finite number (ArithmeticError)
    ├── ResumeError            a checkpoint does not fit the run that loads it (RuntimeError)
    ├── RankError              the ranks of a run disagree, or cannot work together as they are set up (RuntimeError)
    ├── ReplayError            a run cannot be trained again from its log with what was given (RuntimeError)
    ├── OutputExistsError      an output folder holds something else than this job, unfinished (RuntimeError)
    ├── OutputWriteError       a job's output could not be written; what is finished stays (RuntimeError)
    ├── AttestationError       an attestation cannot be read, made or trusted (ValueError)
    └── LogError               the selection log
        ├── LogExistsError         the directory already holds another run
        ├── LogLockedError         another process is writing to the log
        ├── LogCorruptError        the log's content does not agree with its own record
        └── LogWriteError          a decision could not be written down

Each message says what was found, what was expected, where, and what to do. Broken invariants of our own are plain
`AssertionError`s; errors of torch, Composer or Streaming pass through unchanged.
"""

from __future__ import annotations

__all__ = [
    "AttestationError",
    "ConfigError",
    "DataError",
    "LogCorruptError",
    "LogError",
    "LogExistsError",
    "LogLockedError",
    "LogWriteError",
    "MissingSampleIdError",
    "ModelError",
    "OutputExistsError",
    "OutputWriteError",
    "RankError",
    "ReplayError",
    "ResumeError",
    "ScoreError",
    "SequenceTooLongError",
    "ShardError",
    "UdsstreamError",
]


class UdsstreamError(Exception):
    """Base of all errors that udsstream raises for something a user can change."""


class ConfigError(UdsstreamError, ValueError):
    """A setting is unknown, of the wrong type, out of range or at odds with another."""


class DataError(UdsstreamError, ValueError):
    """A batch, a sample or a stream is not what training needs."""


class MissingSampleIdError(DataError):
    """The batch carries no `sample_id`, so that no decision about it could be recorded."""


class SequenceTooLongError(DataError):
    """A sample has more tokens than `max_seq_len`."""


class ShardError(DataError):
    """A shard of a stream is missing, truncated or corrupt."""


class ModelError(UdsstreamError, ValueError):
    """The model's trunk or head cannot be found, or its logits cannot be reproduced from them."""


class ScoreError(UdsstreamError, ArithmeticError):
    """A score is not a finite number."""


class ResumeError(UdsstreamError, RuntimeError):
    """A checkpoint does not fit the run that loads it."""


class RankError(UdsstreamError, RuntimeError):
    """The ranks of a run disagree, or cannot work together as they are set up."""


class ReplayError(UdsstreamError, RuntimeError):
    """A run cannot be trained again from its log with what was given."""


class OutputExistsError(UdsstreamError, RuntimeError):
    """An output folder holds something else than this job, unfinished."""


class OutputWriteError(UdsstreamError, RuntimeError):
    """A job's output could not be written; what is finished stays and is gone on from."""


class AttestationError(UdsstreamError, ValueError):
    """An attestation cannot be read, made or trusted."""


class LogError(UdsstreamError):
    """The selection log cannot be used."""


class LogExistsError(LogError):
    """The directory already holds another run."""


class LogLockedError(LogError):
    """Another process is writing to the log."""


class LogCorruptError(LogError):
    """The log's content does not agree with its own record."""


class LogWriteError(LogError):
    """A decision could not be written down."""
