"""run.json: what the run says of itself, read without trust, and whether its statements agree with each other."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from udsstream.audit.report import Finding, Ledger
from udsstream.config import SelectionConfig
from udsstream.errors import ConfigError
from udsstream.selection_log.run_file import RunFile

__all__ = ["RunFacts", "StreamFacts", "read_facts"]

_LARGEST = (1 << 62) - 1


@dataclass(frozen=True, kw_only=True)
class StreamFacts:
    """A stream, as run.json describes it."""

    name: str
    location: str
    samples: int
    per_epoch: int | None
    """Samples drawn from it in each epoch; None in logs that do not say."""
    index_sha256: str
    format: str = "mds"
    """Of its shards: `mds`, or `webdataset`, whose index has another name."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the other checks need of run.json; None: it does not say, or says nothing usable."""

    run_id: str
    config: SelectionConfig | None
    alpha: float | None
    streams: tuple[StreamFacts, ...] | None
    batch_size: int | None
    """Candidates per step and rank."""
    batches_per_epoch: int | None
    max_duration: str | None
    canonical_nodes: int | None
    """Of the streaming data set: it repeats up to so many samples, less one, to divide an epoch among them."""
    warm_start: bool
    """The memory was taken over from another run."""
    trains: bool = True
    """False: a scoring pass, which keeps of an incomplete batch what one rank would, since its ranks need no equal shares."""


def read_facts(run: RunFile, ledger: Ledger) -> RunFacts:
    """Reads run.json and checks what it can say twice."""
    content = run.run
    loader = content.get("loader")
    loader = loader if isinstance(loader, dict) else {}
    max_duration = loader.get("max_duration")
    config = _config(content, ledger)
    facts = RunFacts(
        run_id=str(content.get("run_id", "unknown"))[:200],
        config=config,
        alpha=_alpha(content, config, ledger),
        # Who wrote no selection settings may describe streams in another form.
        streams=None if content.get("selection") is None else _streams(content.get("streams"), ledger),
        batch_size=_whole(loader.get("batch_size"), least=1),
        batches_per_epoch=_whole(loader.get("batches_per_epoch"), least=1),
        max_duration=max_duration if isinstance(max_duration, str) else None,
        canonical_nodes=_whole(loader.get("canonical_nodes"), least=1),
        warm_start=content.get("warm_start") is not None,
        trains=not (isinstance(job := content.get("job"), dict) and job.get("kind") == "scoring"),
    )
    if config is not None:
        _agree(run, config, ledger)
        ledger.check(
            "settings: run.json's fingerprint, α, seed and the log's own settings against its selection settings"
        )
    return facts


def _whole(value: Any, *, least: int = 0) -> int | None:
    ok = isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST
    return value if ok else None


def _wrong(ledger: Ledger, message: str) -> None:
    ledger.find(Finding(check="settings", message=f"run.json: {message}"))


def _config(content: Mapping[str, Any], ledger: Ledger) -> SelectionConfig | None:
    selection = content.get("selection")
    if selection is None:
        ledger.skip("the decisions: run.json has no selection settings, so no rule is known that they should follow")
        return None
    if not isinstance(selection, dict):
        _wrong(ledger, f"selection is {type(selection).__name__}, expected an object")
        return None
    try:
        config = SelectionConfig(**selection)
        # A number too large for any run would overflow an array later.
        if any(isinstance(value, int) and value > _LARGEST for value in (*selection.values(), *config.projection_dims)):
            raise ConfigError("a number is larger than 2⁶²")
    except (ConfigError, TypeError, ValueError, OverflowError) as error:
        _wrong(ledger, f"the selection settings cannot be used: {str(error)[:500]}")
        return None
    deciding = {name: value for name, value in selection.items() if name != "embeddings"}
    expected = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    found = str(content.get("selection_fingerprint"))
    if found != expected:
        _wrong(ledger, f"selection_fingerprint is {found[:16]}…, but the selection settings have {expected[:16]}…")
    return config


def _alpha(content: Mapping[str, Any], config: SelectionConfig | None, ledger: Ledger) -> float | None:
    value = content.get("resolved_alpha")
    number = float(value) if isinstance(value, float) else _whole(value)
    if number is None or not math.isfinite(number):
        if config is not None and config.remembers:
            _wrong(ledger, f"resolved_alpha is {str(value)[:40]}, expected a finite number of at least 0")
        return None
    number = float(number)
    if config is None:
        return number
    vocab_size = _whole(content.get("vocab_size"), least=1)
    if vocab_size is None:
        if config.alpha is None and config.projection_scale != "reference":
            ledger.skip("whether α follows from the settings: run.json does not say the size of the vocabulary")
            return number
        vocab_size = 1
    expected = config.resolved_alpha(vocab_size)
    if number != expected:
        _wrong(ledger, f"resolved_alpha is {number!r}, but the settings give {expected!r}")
    return number


def _agree(run: RunFile, config: SelectionConfig, ledger: Ledger) -> None:
    settings, content = run.settings, run.run
    seeds = content.get("seeds")
    seeds = seeds if isinstance(seeds, dict) else {}
    for name, found, expected in (
        ("log.embeddings", settings.embeddings, config.embeddings),
        ("log.embedding_dim", settings.embedding_dim, config.embedding_dim),
        ("log.buffer_capacity", settings.buffer_capacity, config.buffer_size),
        ("log.world_size", settings.world_size, content.get("world_size", settings.world_size)),
        ("seeds.selection", seeds.get("selection", config.seed), config.seed),
    ):
        if found != expected:
            _wrong(ledger, f"{name} is {found!r}, but by the run's settings it should be {expected!r}")


def _streams(listed: Any, ledger: Ledger) -> tuple[StreamFacts, ...] | None:
    if not listed:
        return None
    streams: list[StreamFacts] = []
    total = 0
    for number, item in enumerate(listed if isinstance(listed, list) else []):
        fields = item if isinstance(item, dict) else {}
        samples = _whole(fields.get("samples"), least=1)
        texts = [text for name in ("name", "location", "index_sha256") if isinstance(text := fields.get(name), str)]
        total += samples or 0
        if samples is None or total > _LARGEST or len(texts) != 3:
            _wrong(ledger, f"streams[{number}] does not describe a stream (name, location, samples, index_sha256)")
            return None
        streams.append(
            StreamFacts(
                name=texts[0],
                location=texts[1],
                samples=samples,
                per_epoch=_whole(fields.get("per_epoch"), least=1),
                index_sha256=texts[2],
                format=str(fields.get("format", "mds"))[:40],
            )
        )
    if not streams:
        _wrong(ledger, f"streams is {type(listed).__name__}, expected a list of objects")
    return tuple(streams) or None
