"""What a replayed step costs, beside plain training on the same samples and beside the selecting run: python tests/bench_replay.py

SmolLM2 with LoRA on the docstring data set, by pipelines/demo.yaml. The three run one after the other, several times in turn in one
process; of each the median step counts, loading included, and of the turns the fastest. Ratios are what to look at.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from composer.core import Callback, DataSpec
from torch.utils.data import DataLoader

from udsstream import ReplaySelection, SelectionLog
from udsstream.demo import smollm2, stdlib_docstrings
from udsstream.pipeline import build_trainer
from udsstream.run_config import load_run_config
from udsstream.sft import num_tokens

ROOT = Path(__file__).parent.parent


class Steps(Callback):
    """Seconds from the end of one batch to the end of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def batch_end(self, state, logger) -> None:
        now = time.perf_counter()
        if self._last:
            self.seconds.append(now - self._last)
        self._last = now


def run(config, *, replay: ReplaySelection | None = None, plain: bool = False) -> float:
    """Median seconds of a step. `plain`: the replay's samples, read beforehand, without any algorithm."""
    steps = Steps()
    trainer = build_trainer(config, replay=replay, callbacks=[steps])
    try:
        if plain:
            assert replay is not None
            loader = trainer.state.train_dataloader
            batches = [[loader.dataset[sample] for sample in ids] for ids in loader.batch_sampler]
            samples = [sample for batch in batches for sample in batch]
            trainer.state.algorithms.clear()
            kept = DataLoader(samples, batch_size=len(batches[0]), collate_fn=loader.collate_fn)
            trainer.fit(train_dataloader=DataSpec(kept, get_num_tokens_in_batch=num_tokens), reset_time=False)
        else:
            trainer.fit()
    finally:
        trainer.close()
    return median(steps.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs")
    options = parser.parse_args()
    data, model = options.folder / "demo-data", options.folder / "demo-model"
    stdlib_docstrings.ensure(data)
    smollm2.ensure(model)
    results: dict[str, list[float]] = {"selecting": [], "replay": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            config = load_run_config(
                ROOT / "pipelines" / "demo.yaml",
                [
                    f"save_folder={folder}/{turn}",
                    f"data.streams_root={data / 'train'}",
                    f"model.name={model}",
                    f"max_duration={options.steps}ba",
                    "save_interval=10000ba",
                    "eval=null",
                    "progress_bar=false",
                ],
            )
            results["selecting"].append(run(config))
            again = config.model_copy(update={"save_folder": f"{folder}/{turn}-again"})
            results["replay"].append(run(again, replay=ReplaySelection(f"{folder}/{turn}")))
            once_more = config.model_copy(update={"save_folder": f"{folder}/{turn}-plain"})
            results["plain"].append(run(once_more, replay=ReplaySelection(f"{folder}/{turn}"), plain=True))
        kept = len(SelectionLog.open(f"{folder}/0").selected(0))
    best = {name: min(values) for name, values in results.items()}
    print(
        json.dumps(
            {
                "seconds_per_step": best,
                "replay_over_plain": best["replay"] / best["plain"],
                "selecting_over_replay": best["selecting"] / best["replay"],
                "kept_per_step": kept,
                "steps": options.steps,
                "turns": options.turns,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
