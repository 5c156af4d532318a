"""The configuration of a training job: what `udsstream train CONFIG.yaml [key=value …]` accepts.

YAML is read by OmegaConf (interpolation, dotted overrides as in llm-foundry) and validated by pydantic, strictly: an unknown key, a wrong
type or an impossible combination is one line each, with the key's path. The selection's own settings are in `config.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from yaml import YAMLError

from udsstream.config import SelectionConfig
from udsstream.errors import ConfigError

__all__ = [
    "CandidatesConfig",
    "DataConfig",
    "EvalConfig",
    "LoraSettings",
    "ModelConfig",
    "ModelDtype",
    "OptimizerConfig",
    "RunConfig",
    "SchedulerConfig",
    "StreamConfig",
    "ValidationConfig",
    "check_selection",
    "config_changes",
    "load_run_config",
    "load_settings",
    "parse_settings",
    "selection_settings",
]

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Timestring = Annotated[str, Field(pattern=r"^\d+(ba|ep|sp|tok)$")]
ModelDtype = Literal["float32", "bfloat16", "float16"]

_MAY_CHANGE = (
    "autoresume",
    "eval",
    "load_path",
    "max_duration",
    "progress_bar",
    "save_folder",
    "save_interval",
    "save_num_checkpoints_to_keep",
)
"""Keys that a resumed run may be given anew: they change neither what is chosen nor how it is trained on (a longer `max_duration`
stretches a decaying learning rate from there on; that is what who sets it wants)."""


_BESIDE = ("trunk", "head", "warm_start", "reference", "validation", "upload_log")
"""What `selection` may hold beside SelectionConfig's settings: arguments of OnlineBatchSelection."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Settings = TypeVar("Settings", bound=BaseModel)


class LoraSettings(_Section):
    """Low-rank adapters (peft); the defaults are those of the UDS paper."""

    r: PositiveInt = 8
    alpha: PositiveInt = 16
    dropout: Fraction = 0.0
    target_modules: list[str] | str = "all-linear"
    """Names of modules, or peft's `all-linear`: every linear layer but the head."""


class ModelConfig(_Section):
    """A Hugging Face causal language model."""

    name: str
    """Name on the hub, or a folder."""
    revision: str | None = None
    tokenizer: str | None = None
    """Name or folder of the tokenizer. None: the model's."""
    dtype: ModelDtype = "float32"
    """Of the weights in memory. Training computes in `precision`."""
    lora: LoraSettings | None = None
    """None: all weights are trained."""
    trust_remote_code: bool = False
    """Runs code that comes with the model. Off unless you know whose code it is."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"


class StreamConfig(_Section):
    """One MDS stream. At most one of `proportion`, `repeat` and `choose`, the same one for all streams."""

    local: str | None = None
    remote: str | None = None
    split: str | None = None
    proportion: Annotated[float, Field(gt=0)] | None = None
    repeat: Annotated[float, Field(gt=0)] | None = None
    choose: PositiveInt | None = None

    @model_validator(mode="after")
    def _has_a_place(self) -> StreamConfig:
        if self.local is None and self.remote is None:
            raise ValueError("a stream needs local, remote or both")
        weights = [name for name in ("proportion", "repeat", "choose") if getattr(self, name) is not None]
        if len(weights) > 1:
            raise ValueError(
                f"{' and '.join(weights)} are given, but at most one of proportion, repeat and choose may be"
            )
        return self


class CandidatesConfig(_Section):
    """The candidates: streams, how they are shuffled, and how a row becomes tokens."""

    streams: list[StreamConfig] = []
    streams_root: str | None = None
    """A folder of streams: each of its sub-folders with an index.json is one, in the order of their names."""
    shuffle: bool = True
    shuffle_seed: Annotated[int, Field(ge=0)] = 9176
    num_workers: Annotated[int, Field(ge=0)] = 0
    timeout: Annotated[float, Field(ge=0)] = 600.0
    """Seconds after which a silent DataLoader worker is an error (only with workers). 0: never."""
    num_canonical_nodes: PositiveInt | None = None
    predownload: PositiveInt | None = None
    cache_limit: int | str | None = None
    validate_hash: str | None = None
    """Hash to check shards with as they are downloaded: one of those the stream was written with."""
    verify_data: bool = False
    """Checks every local shard against its recorded hashes before training starts."""
    format: Literal["auto", "prompt_response", "messages", "text"] = "auto"
    prompt_key: str = "prompt"
    response_key: str = "response"
    messages_key: str = "messages"
    text_key: str = "text"
    loss_on: Literal["response", "all"] = "response"
    overlong: Literal["error", "truncate"] = "error"
    """What happens to a sample of more than `max_seq_len` tokens."""
    padding_side: Literal["right", "left"] = "right"

    @model_validator(mode="after")
    def _has_streams(self) -> CandidatesConfig:
        if bool(self.streams) == (self.streams_root is not None):
            raise ValueError("give either streams or streams_root")
        kinds = {
            name
            for stream in self.streams
            for name in ("proportion", "repeat", "choose")
            if getattr(stream, name) is not None
        }
        if len(kinds) > 1:
            raise ValueError(
                f"the streams are weighted by {' and by '.join(sorted(kinds))}; weight all of them in one way"
            )
        return self

    def row_form(self) -> dict[str, Any]:
        """Which columns of a row hold what, as `sft.py` takes it everywhere."""
        return self.model_dump(include={"format", "prompt_key", "response_key", "messages_key", "text_key"})

    def tokenising(self) -> dict[str, Any]:
        """All that decides, beside the tokenizer and `max_seq_len`, which tokens and labels become of rows."""
        return self.row_form() | self.model_dump(include={"loss_on", "overlong", "padding_side"})


class DataConfig(CandidatesConfig):
    """The candidates of a training job, in batches."""

    batch_size: PositiveInt
    """Candidates per step and rank. `selection.keep` is of those of all ranks."""
    length_group_batches: Annotated[int, Field(ge=2)] | None = None
    """So many global batches are sorted by length together, for candidates of like length (docs/length_grouping.md). None: as they come."""


class _HeldOut(_Section):
    local: str | None = None
    remote: str | None = None
    split: str | None = None

    @model_validator(mode="after")
    def _has_a_place(self) -> _HeldOut:
        if self.local is None and self.remote is None:
            raise ValueError("give local, remote or both")
        return self


class EvalConfig(_HeldOut):
    """Held-out data: its loss is measured before, during and after training. Nothing is selected from it."""

    batch_size: PositiveInt = 8
    interval: Timestring = "1ep"
    max_batches: PositiveInt | None = None
    """None: all of it."""


class ValidationConfig(_HeldOut):
    """What `selection.validation` is for `method: greats`: samples whose loss is to be lowered, the first of an MDS stream. Not those of
    `eval`, which would then measure what it was chosen by."""

    samples: PositiveInt = 16


class OptimizerConfig(_Section):
    """AdamW."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class SchedulerConfig(_Section):
    """The learning rate: warmed up from 0, then constant, or decayed to `alpha_f` times its peak."""

    name: Literal["constant", "linear", "cosine"] = "linear"
    warmup: Timestring = "0ba"
    alpha_f: Annotated[float, Field(ge=0, le=1)] = 0.0


class RunConfig(_Section):
    """A training job."""

    save_folder: str
    """Where the run's log, checkpoints, configuration and summary go."""
    max_duration: Timestring
    """In batches ("ba") or epochs ("ep"); samples and tokens count candidates, not what was kept."""
    model: ModelConfig
    data: DataConfig
    eval: EvalConfig | None = None
    max_seq_len: Annotated[int, Field(ge=2)] = 2048
    """Longest sample, in tokens, for tokenising and scoring alike."""
    selection: dict[str, Any] | None = {}
    """Settings of `udsstream.SelectionConfig` but `max_seq_len`, and of `OnlineBatchSelection`: trunk, head, warm_start, reference,
    validation (see `ValidationConfig`). None (null): train on everything, without a log."""
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    gradient_clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32"
    device: Literal["cpu", "gpu", "mps"] | None = None
    """None: a GPU where there is one."""
    device_train_microbatch_size: PositiveInt | Literal["auto"] | None = None
    """Kept samples per forward and backward. None: all at once."""
    seed: Annotated[int, Field(ge=0)] = 17
    save_interval: Timestring = "100ba"
    save_num_checkpoints_to_keep: Annotated[int, Field(ge=-1)] = 3
    """-1: all."""
    load_path: str | None = None
    """A checkpoint whose weights the run begins with (weights only)."""
    autoresume: bool = False
    """Go on from the newest checkpoint in `save_folder`, if there is one."""
    progress_bar: bool = True

    @field_validator("selection")
    @classmethod
    def _selection_is_valid(cls, value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        if value is None:
            return None
        check_selection(value, more=_BESIDE, max_seq_len=info.data.get("max_seq_len"))
        if "validation" in value:
            try:
                ValidationConfig.model_validate(value["validation"])
            except ValidationError as error:
                raise ValueError(
                    "\n".join(f"validation.{line}" for e in error.errors() for line in _lines(e, ValidationConfig))
                ) from None
        return value

    def selection_config(self) -> SelectionConfig:
        """The selection's settings.

        Raises:
            ConfigError: there is no selection, or its settings cannot be used.
        """
        if self.selection is None:
            raise ConfigError("selection: null, so there are no settings of it")
        return selection_settings(self.selection, beside=_BESIDE, max_seq_len=self.max_seq_len)


def check_selection(value: dict[str, Any], *, more: Sequence[str], max_seq_len: int | None) -> dict[str, Any]:
    """The settings of a selection as they are. `max_seq_len` None: it is itself a mistake, and what depends on it is not checked.

    Raises:
        ValueError: names the keys that are neither SelectionConfig's nor among `more`.
        ConfigError: their values cannot be used.
    """
    known = {field.name for field in dataclasses.fields(SelectionConfig)} | set(more)
    if "max_seq_len" in value:
        raise ValueError("max_seq_len: is given once, at the top level")
    unknown = [
        f"{key}: unknown; known are {', '.join(sorted(known - {'max_seq_len'}))}" for key in sorted(set(value) - known)
    ]
    if unknown:
        raise ValueError("\n".join(unknown))
    selection_settings(value, beside=more, max_seq_len=sys.maxsize if max_seq_len is None else max_seq_len)
    return value


def selection_settings(value: Mapping[str, Any], *, beside: Sequence[str], max_seq_len: int) -> SelectionConfig:
    """The section `selection` without the keys that stand `beside` SelectionConfig's.

    Raises:
        ConfigError: its settings cannot be used.
    """
    return SelectionConfig(
        **{key: setting for key, setting in value.items() if key not in beside}, max_seq_len=max_seq_len
    )


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, applies `key=value` overrides (dotted paths), and validates the result.

    Raises:
        ConfigError: the file cannot be read, or one line per mistake with the key's path.
    """
    return parse_run_config(load_settings(path, overrides), where=str(path))


def load_settings(path: str | Path | None, overrides: Sequence[str], defaults: Mapping[str, Any] | None = None) -> Any:
    """Settings as plain types: `defaults`, under those of a YAML file (None: of none), under `key=value` overrides (dotted paths).

    Raises:
        ConfigError: the file or an override cannot be read.
    """
    where = "the command line" if path is None else str(path)
    try:
        loaded = OmegaConf.create(dict(defaults or {}))
        if path is not None:
            read = OmegaConf.load(Path(path))
            if not isinstance(read, DictConfig):
                raise ConfigError(f"{path}: holds a list, but must hold keys and values")
            loaded = OmegaConf.merge(loaded, read) if defaults else read
        for override in overrides:
            key, equals, value = override.partition("=")
            if not (key and equals):
                raise ConfigError(f"{override!r}: an override is written key=value, as in data.batch_size=16")
            OmegaConf.update(loaded, key, OmegaConf.from_dotlist([f"value={value}"]).value, merge=True)
        return OmegaConf.to_container(loaded, resolve=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; pipelines/ holds examples") from None
    except (OSError, UnicodeDecodeError, IndexError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{where}: cannot be read as a configuration: {error}") from error


def parse_run_config(settings: Any, *, where: str) -> RunConfig:
    """Validates settings that were read already; `where` names their source in the message."""
    return parse_settings(RunConfig, settings, where=where)


def parse_settings(kind: type[Settings], settings: Any, *, where: str) -> Settings:
    """Validates settings as a job of this kind.

    Raises:
        ConfigError: one line per mistake, with the key's path.
    """
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}: holds a {type(settings).__name__}, but must hold keys and values")
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _lines(problem, kind)]
        raise ConfigError(
            f"{where}: {len(lines)} mistake{'s' * (len(lines) > 1)}\n" + "\n".join(f"  {line}" for line in lines)
        ) from None


def config_changes(old: RunConfig, new: RunConfig, *, may_change: Sequence[str] = _MAY_CHANGE) -> list[str]:
    """One line for each key whose change would make a resumed run another run: its path, what it was, what it is."""
    before, after = _flat(old.model_dump()), _flat(new.model_dump())
    return [
        f"{key}: was {before.get(key)!r}, is {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if key.split(".")[0] not in may_change and before.get(key) != after.get(key)
    ]


def _lines(problem: Any, kind: type[BaseModel]) -> list[str]:
    path = ".".join(map(str, problem["loc"]))
    if problem["type"] == "value_error":
        error = problem["ctx"]["error"]
        rows = [row.strip() for row in str(error).splitlines() if row.strip()]
        if isinstance(error, ConfigError):  # from SelectionConfig: a heading, then a line per mistake
            return [f"selection.{row}" for row in rows[1:]]
        joiner = "." if path == "selection" else ": "
        return [f"{path}{joiner}{row}" if path else row for row in rows]
    if problem["type"] == "extra_forbidden":
        return [f"{path}: unknown key{_instead(str(problem['loc'][-1]), _keys_at(kind, problem['loc'][:-1]))}"]
    if problem["type"] == "missing":
        return [f"{path}: missing"]
    return [f"{path}: {problem['msg'][0].lower()}{problem['msg'][1:]}; found {problem['input']!r}"]


def _keys_at(kind: type[BaseModel], place: Sequence[str | int]) -> list[str]:
    """The keys that settings of this kind may have at a place within them, such as ("data", "streams", 0)."""
    for name in place:
        if isinstance(name, str):  # a number is a place in a list, whose items' type is found with the list's
            found = _models_in(kind.model_fields[name].annotation) if name in kind.model_fields else []
            if not found:
                return []
            kind = found[0]
    return list(kind.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _instead(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known are {', '.join(sorted(known))}" if known else ""


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: value}
