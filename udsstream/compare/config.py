"""The configuration of a comparison: what `udsstream compare CONFIG.yaml [key=value …]` accepts, and the runs that it stands for.

An entry is a named set of changes to the settings of one run; each entry is run with each seed. A seed sets the training's seed, the order
of the candidates (`data.shuffle_seed`) and the selection's own draws (`selection.seed`), so that the entries of one seed look at the
same candidates in the same order, and differences between them can be paired.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from udsstream.errors import ConfigError
from udsstream.run_config import RunConfig, load_settings, parse_run_config, parse_settings

__all__ = ["AnswersConfig", "CompareConfig", "PlannedRun", "load_compare_config", "plan_runs"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_FROM_SEEDS = ("seed", "data.shuffle_seed", "selection.seed")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class AnswersConfig(_Section):
    """Exact match of generated answers with those of the held-out data (`run.eval`), greedily, after training."""

    kind: Literal["gsm8k"]
    """`gsm8k`: the number after the last `####`."""
    samples: Annotated[int, Field(ge=1)] = 64
    """The first so many of the held-out stream."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 8


class CompareConfig(_Section):
    """A comparison."""

    out: str
    """Where it goes: `OUT/<entry>/seed-<seed>/` is the folder of a run; table and plot are beside them."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [1, 2, 3]
    entries: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Name → changes to the settings of `run`, nested or with dotted paths."""
    run: dict[str, Any]
    """The settings of one run (`udsstream.run_config.RunConfig`), without its folder and seeds."""
    baseline: str | None = None
    """The entry that the others are compared with, seed by seed. None: `random`, where there is one."""
    answers: AnswersConfig | None = None

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError(f"a seed is given more than once: {value}")
        return value

    @field_validator("entries")
    @classmethod
    def _names_are_folders(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} cannot name a folder: letters, digits and ._+- are allowed, and it begins with a letter or a digit"
                )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> CompareConfig:
        if self.baseline is not None and self.baseline not in self.entries:
            raise ValueError(f"baseline: {self.baseline!r} is none of the entries: {', '.join(self.entries)}")
        if self.answers is not None and self.run.get("eval") is None:
            raise ValueError("answers: they are asked of the held-out data, but run.eval names none")
        return self

    @property
    def baseline_entry(self) -> str | None:
        """The name of the entry that the others are compared with, if there is one."""
        return self.baseline or ("random" if "random" in self.entries else None)


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One entry with one seed."""

    entry: str
    seed: int
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Its own, and nothing else's."""
        return Path(self.config.save_folder)


def load_compare_config(path: str | Path, overrides: Sequence[str] = ()) -> CompareConfig:
    """Reads a YAML file, applies `key=value` overrides (dotted paths), and validates the result but for its runs (`plan_runs`).

    Raises:
        ConfigError: the file cannot be read, or one line per mistake with the key's path.
    """
    return parse_settings(CompareConfig, load_settings(path, overrides), where=str(path))


def plan_runs(config: CompareConfig, *, where: str = "the comparison") -> list[PlannedRun]:
    """Every run, validated, in the order in which they are done: seed by seed, so that an interrupted comparison is balanced.

    Raises:
        ConfigError: a run cannot be done as it is set; the message names the entries and has one line per mistake.
    """
    planned = []
    mistakes: dict[str, list[str]] = {}
    for seed in config.seeds:
        for entry in config.entries:
            try:
                planned.append(PlannedRun(entry=entry, seed=seed, config=_run_of(config, entry, seed)))
            except ConfigError as error:
                names = mistakes.setdefault(str(error).partition("\n")[2] or f"  {error}", [])
                if entry not in names:
                    names.append(entry)
    if mistakes:
        parts = [
            f"entr{'ies' if len(names) > 1 else 'y'} {', '.join(names)}:\n{lines}" for lines, names in mistakes.items()
        ]
        raise ConfigError(f"{where}: there are runs that cannot be done\n" + "\n".join(parts))
    return planned


def _run_of(config: CompareConfig, entry: str, seed: int) -> RunConfig:
    settings = OmegaConf.create({"selection": {}} | copy.deepcopy(config.run))
    try:
        for key, value in config.entries[entry].items():
            OmegaConf.update(settings, key, value, merge=True)
        for key in ("save_folder", *_FROM_SEEDS):
            if OmegaConf.select(settings, key) is not None:
                source = "out" if key == "save_folder" else "seeds"
                raise ConfigError(f"{entry}\n  {key}: is not given to a run of a comparison; it comes from `{source}`")
        if settings.get("selection") is None:
            raise ConfigError(
                f"{entry}\n  selection: null leaves no record to compare by; to train on everything, keep everything: "
                "selection.keep=1.0 with selection.method=random"
            )
        own = {"save_folder": str(Path(config.out) / entry / f"seed-{seed}"), "autoresume": True, "progress_bar": False}
        for key, value in (own | dict.fromkeys(_FROM_SEEDS, seed)).items():
            OmegaConf.update(settings, key, value)
        plain = OmegaConf.to_container(settings, resolve=True)
    except (OmegaConfBaseException, IndexError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{entry}\n  cannot be applied: {str(error).splitlines()[0]}") from error
    run = parse_run_config(plain, where=entry)
    _check_inputs(run, entry)
    return run


def _check_inputs(run: RunConfig, entry: str) -> None:
    """What a run would only notice when its turn comes, perhaps after hours.

    Raises:
        ConfigError: a method lacks what it needs beside the candidates.
    """
    selection, method = run.selection or {}, run.selection_config().method
    for name, of, what in (
        ("reference", "rho_loss", "the folder of a log with the losses of a reference model"),
        ("validation", "greats", "a stream of samples whose loss is to be lowered"),
    ):
        if method == of and selection.get(name) is None:
            raise ConfigError(f"{entry}\n  selection.{name}: missing; method {of} needs it: {what}")
    reference = selection.get("reference")
    if method == "rho_loss" and not (Path(str(reference)) / "run.json").exists():
        raise ConfigError(
            f"{entry}\n  selection.reference: {reference} holds no log; record the losses first (docs/methods.md)"
        )
