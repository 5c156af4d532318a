"""The settings of a scoring job: `udsstream curate --score`, from a YAML file, the short options, and `key=value` overrides.

Names are those of a training job (`run_config.py`), as far as both have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from udsstream.config import SelectionConfig
from udsstream.errors import ConfigError
from udsstream.run_config import (
    CandidatesConfig,
    ModelConfig,
    check_selection,
    load_settings,
    parse_settings,
    selection_settings,
)

__all__ = ["ScoredStreams", "ScoringConfig", "load_scoring_config"]

_SAME_RESULT = {
    "anchor_seconds": True,
    "device": True,
    "progress_bar": True,
    "data": {
        "num_workers",
        "timeout",
        "predownload",
        "cache_limit",
        "validate_hash",
        "verify_data",
        "streams",
        "streams_root",
    },
}
"""Settings that change nothing about what is chosen. (Streams are compared by the digests of their indexes, wherever they lie.)"""

_BESIDE = ("trunk", "head")
"""What `selection` may hold beside SelectionConfig's settings."""


class ScoredStreams(CandidatesConfig):
    """The streams, each read once, and how a row becomes tokens."""

    num_workers: Annotated[int, Field(ge=0)] = 1
    """Processes that read and tokenise the next window while one is scored. 0: none."""

    @model_validator(mode="after")
    def _read_once(self) -> ScoredStreams:
        if self.num_canonical_nodes is not None:
            raise ValueError("num_canonical_nodes: a scoring pass reads each sample once, in one order; leave it out")
        return self


class ScoringConfig(BaseModel):
    """A scoring job."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: ModelConfig
    """Frozen: without `lora`."""
    data: ScoredStreams
    max_seq_len: Annotated[int, Field(ge=2)] = 2048
    """Longest sample, in tokens, for tokenising and scoring alike."""
    selection: dict[str, Any] = {}
    """Settings of `udsstream.SelectionConfig` but `max_seq_len`. `keep` is of each window."""
    window: Annotated[int, Field(ge=1)] = 512
    """Candidates of all ranks that are chosen from at once."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32"
    device: Literal["cpu", "gpu", "mps"] | None = None
    """None: a GPU where there is one."""
    anchor_seconds: Annotated[float, Field(ge=0)] = 60.0
    """A job that is killed loses at most the work of so many seconds, and of one window."""
    progress_bar: bool = True

    @field_validator("selection")
    @classmethod
    def _selection_is_valid(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return check_selection(value, more=_BESIDE, max_seq_len=info.data.get("max_seq_len"))

    @model_validator(mode="after")
    def _fits_together(self) -> ScoringConfig:
        if self.model.lora is not None:
            raise ValueError("model.lora: nothing is trained here, and new adapters add nothing; leave it out")
        return self

    def selection_config(self) -> SelectionConfig:
        """The selection's settings."""
        return selection_settings(self.selection, beside=_BESIDE, max_seq_len=self.max_seq_len)

    def deciding(self) -> dict[str, Any]:
        """What decides the result beside the selection's settings, by dotted path: plain types."""
        nested = self.model_dump(exclude={**_SAME_RESULT, "selection": True, "window": True, "precision": True})
        flat: dict[str, Any] = {}
        for section, value in nested.items():
            if isinstance(value, dict):
                flat |= {f"{section}.{name}": item for name, item in value.items()}
            else:
                flat[section] = value
        modules = {f"selection.{name}": self.selection.get(name) for name in _BESIDE}
        ours = ("data.shuffle", "data.shuffle_seed")  # recorded as the order that follows from them
        return {name: value for name, value in (flat | modules).items() if name not in ours}


def load_scoring_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    score: str | None = None,
    model: str | None = None,
    keep: float | int | None = None,
) -> ScoringConfig:
    """Reads a YAML file, if one is given, and puts the short options and `key=value` overrides on it.

    Args:
        path: of the file.
        overrides: last word.
        score: a stream to read: a folder with an index.json, a folder of such folders, or a remote such as s3://bucket/stream.
        model: `model.name`.
        keep: `selection.keep`.

    Raises:
        ConfigError: the file cannot be read, or one line per mistake with the key's path.
    """
    settings = load_settings(path, ())
    short: dict[str, Any] = {}
    if score is not None:
        streams = settings.get("data") if isinstance(settings.get("data"), dict) else {}
        if named := [name for name in ("streams", "streams_root") if streams and streams.get(name)]:
            raise ConfigError(f"--score {score} and data.{named[0]} of {path} both name streams; give one of them")
        short["data"] = _streams(score)
    if model is not None:
        short["model"] = {"name": model}
    if keep is not None:
        short["selection"] = {"keep": keep}
    merged = _merged(settings, short)
    where = "the command line" if path is None else str(path)
    return parse_settings(ScoringConfig, load_settings(None, overrides, merged), where=where)


def _streams(score: str) -> dict[str, Any]:
    if "://" in score:
        return {"streams": [{"remote": score}]}
    folder = Path(score)
    if not (folder / "index.json").exists() and any(folder.glob("*/index.json")):
        return {"streams_root": score}
    return {"streams": [{"local": score}]}


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = dict(under)
    for key, value in over.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both
