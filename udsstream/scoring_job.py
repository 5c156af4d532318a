"""`udsstream curate --score`: a stream scored once by a frozen model, and the best of each window written out as a data set.

    OUT/          the chosen samples, with their provenance (`udsstream/curate/write.py`)
    OUT-run/      the record: a selection log, as a training run has one, and scoring.json, written when all is scored
        cache/    shards that had to be fetched; removed when OUT is finished

A job that is killed goes on when it is started again with the same settings: with the newest anchor while it scores
(`udsstream/mosaicml/scoring_pass.py`), with the first unfinished shard while it writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from composer.core import Precision
from composer.utils import dist
from composer.utils.device import get_device

from udsstream.candidate_rows import check_local_columns, collator_of, streams_of
from udsstream.curate.chosen import Choice
from udsstream.curate.write import Curated, Output, Progress, curate_log
from udsstream.errors import OutputExistsError
from udsstream.job_folder import WORK
from udsstream.mosaicml.dataset import UDSStreamingDataset, verify_shards
from udsstream.mosaicml.ranks import on_rank_zero
from udsstream.mosaicml.scoring_pass import PassProgress, ScoringPass
from udsstream.pipeline import build_model, join_ranks
from udsstream.run_folder import write_atomically
from udsstream.scoring_config import ScoredStreams, ScoringConfig

__all__ = ["CACHE", "SCORED", "ScoringResult", "build_pass", "run_folder_of", "score_and_curate"]

SCORED = "scoring.json"
"""In the run's folder: what was scored. Its being there says that all of it was."""
CACHE = "cache"


@dataclass(frozen=True, kw_only=True)
class ScoringResult:
    """What a finished job says of itself."""

    run: str
    samples: int
    kept: int
    windows: int
    seconds: float
    """Of scoring, since this process began; so are the rates. None: all had been scored before."""
    samples_per_second: float | None
    tokens_per_second: float | None
    curated: Curated

    def as_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return asdict(self)


def run_folder_of(out: Path) -> Path:
    """Where the record of a job goes, unless it is told."""
    return out.with_name(f"{out.name}-run")


def score_and_curate(
    config: ScoringConfig,
    out: Path,
    *,
    output: Output,
    run: Path | None = None,
    verify: bool = False,
    scoring: Callable[[PassProgress], None] | None = None,
    writing: Progress | None = None,
) -> ScoringResult | None:
    """Scores the streams, or goes on with it, and writes what was chosen. Every rank must call it.

    Args:
        config: the job.
        out: folder of the data set; new or empty, or of this very job.
        output: how it is written.
        run: folder of the record. None: beside `out`.
        verify: check the shards that chosen samples lie in against the hashes in their indexes, when they are written.
        scoring, writing: told how far it is, on rank 0.

    Returns:
        On rank 0, which alone writes; None on others.

    Raises:
        OutputExistsError: `out` holds something else.
        ResumeError, LogExistsError: the run's folder holds another run, or a job with other settings, weights or streams.
        UdsstreamError: see `udsstream.errors`.
    """
    run = run or run_folder_of(out)
    if config.data.num_workers:
        # Each worker tokenises in one thread, as it must once it was forked from a process that has tokenised; this says so beforehand.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    join_ranks(config.device)
    output.resolved()
    on_rank_zero(lambda: _check_out(out, run))
    scored = build_pass(config, run).run(scoring)
    if dist.get_global_rank() != 0:
        return None
    facts = {"samples": scored.samples, "kept": scored.kept, "windows": scored.windows}
    write_atomically(run / SCORED, json.dumps(facts, indent=2) + "\n")
    curated = curate_log(run, out, choice=Choice(), output=output, cache=run / CACHE, verify=verify, progress=writing)
    shutil.rmtree(run / CACHE, ignore_errors=True)
    here = scored.seconds_here if scored.samples_here else None
    return ScoringResult(
        run=str(run),
        **facts,
        seconds=scored.seconds_here,
        samples_per_second=None if not here else scored.samples_here / here,
        tokens_per_second=None if not here else scored.tokens_here / here,
        curated=curated,
    )


def build_pass(config: ScoringConfig, run: Path) -> ScoringPass:
    """The pass that a job's settings describe, with its record in `run`.

    Raises:
        ModelError: the model cannot be loaded, or not be scored.
        DataError: a stream is not there, holds no samples, or (of a local one, before the model is loaded) has not the columns.
        ConfigError: a setting has no meaning without training.
    """
    device = join_ranks(config.device)
    data = _with_cache(config.data, run / CACHE)
    check_local_columns(config.data)
    dataset = UDSStreamingDataset(
        streams=streams_of(data),
        batch_size=1,
        shuffle=False,
        cache_limit=data.cache_limit,
        validate_hash=data.validate_hash,
    )
    if data.verify_data:
        verify_shards(dataset)
    model = build_model(config.model)
    return ScoringPass(
        config=config.selection_config(),
        model=model,
        dataset=dataset,
        collate_fn=collator_of(data, config.max_seq_len, model),
        log_dir=run,
        window=config.window,
        order="shuffled" if data.shuffle else "sequential",
        shuffle_seed=data.shuffle_seed,
        device=get_device(device),
        precision=Precision(config.precision),
        settings=config.deciding(),
        anchor_seconds=config.anchor_seconds,
        num_workers=data.num_workers,
        timeout=data.timeout,
        trunk=config.selection.get("trunk"),
        head=config.selection.get("head"),
    )


def _with_cache(data: ScoredStreams, cache: Path) -> ScoredStreams:
    """Remote streams without a local folder are fetched to where the writer looks for them too, and a job that goes on."""
    streams = [
        stream
        if stream.local is not None or stream.remote is None
        else stream.model_copy(update={"local": str(cache / _cached(stream.remote))})
        for stream in data.streams
    ]
    return data.model_copy(update={"streams": streams})


def _cached(location: str) -> str:
    """The sub-folder of a cache that `udsstream/curate/samples.py` keeps a stream in (a stream with a split is fetched twice)."""
    return hashlib.sha256(location.rstrip("/").encode()).hexdigest()[:16]


def _check_out(out: Path, run: Path) -> None:
    """Before hours of scoring, not after: OutputExistsError when the result could not be written."""
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputExistsError(f"{out} is a file, not a folder; choose another")
    found = sorted(entry.name for entry in out.iterdir())
    others = [name for name in found if name != WORK]
    if others:
        raise OutputExistsError(
            f"{out} is not empty: it holds {', '.join(others[:5])}{' and more' if len(others) > 5 else ''}; nothing was changed. Choose "
            "another folder, or empty this one"
        )
    if found and not (run / SCORED).exists():
        raise OutputExistsError(
            f"{out} holds another job, unfinished ({out / WORK}), since nothing was scored to the end in {run}; choose another folder, or "
            "delete it"
        )
