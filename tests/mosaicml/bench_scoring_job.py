"""What a scoring pass costs beside the trunk's forward alone:

    PYTHONPATH=tests:tests/mosaicml python tests/mosaicml/bench_scoring_job.py --gsm8k FOLDER

(FOLDER holds GSM8K's train.jsonl; without it, the demo's data is taken.)

SmolLM2 on the CPU. After each window of the pass the trunk alone runs over the same candidates, cut into the same forwards, already
tokenised; so both see the same machine. (On one that others use too, CPU seconds are steadier than seconds.) The pass's time is all from
window to window: reading, tokenising (in this process), forward,
scores, choice, memory, log, and an anchor after each window. Its first window stands apart: there the head is checked and factored, once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from composer.devices import DeviceCPU
from streaming import MDSWriter

from udsstream.demo import smollm2, stdlib_docstrings
from udsstream.mosaicml.batch import real_tokens, scoring_microbatches
from udsstream.mosaicml.measuring import forward_cost
from udsstream.mosaicml.scoring_pass import PassProgress
from udsstream.mosaicml.trunk import ModelParts, neutral
from udsstream.scoring_config import load_scoring_config
from udsstream.scoring_job import build_pass

ROOT = Path(__file__).parent.parent.parent


def write_stream(out: Path, gsm8k: Path | None, samples: int) -> Path:
    if gsm8k is not None:
        rows = [json.loads(line) for line in (gsm8k / "train.jsonl").read_text().splitlines()[:samples]]
        pairs = [(row["question"], row["answer"]) for row in rows]
    else:
        from streaming import LocalDataset

        data = ROOT / "runs" / "demo-data"
        stdlib_docstrings.ensure(data)
        largest = max((data / "train").iterdir(), key=lambda folder: sum(p.stat().st_size for p in folder.iterdir()))
        source = LocalDataset(str(largest))
        pairs = [(source[n]["prompt"], source[n]["response"]) for n in range(min(samples, len(source)))]
    with MDSWriter(out=str(out), columns={"prompt": "str", "response": "str"}) as writer:
        for prompt, response in pairs:
            writer.write({"prompt": prompt, "response": response})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "demo-model")
    options = parser.parse_args()
    smollm2.ensure(options.model)
    windows: list[tuple[float, float, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        stream = write_stream(Path(folder) / "stream", options.gsm8k, options.samples)
        settings = [
            f"window={options.window}",
            "max_seq_len=1024",
            "data.num_workers=0",
            "anchor_seconds=0",
            "device=cpu",
        ]
        config = load_scoring_config(None, settings, score=str(stream), model=str(options.model), keep=0.2)
        scoring = build_pass(config, Path(folder) / "run")
        parts, device = ModelParts(scoring._model), DeviceCPU()
        last = time.perf_counter(), time.process_time()

        def trunk_alone(progress: PassProgress) -> None:
            nonlocal last
            took, cpu = time.perf_counter() - last[0], time.process_time() - last[1]
            start = (progress.windows - 1) * options.window
            ids = scoring._order[start : start + options.window].tolist()
            batch = scoring._collate([{**scoring._dataset[i], "sample_id": i} for i in ids])
            mask = real_tokens(batch)
            lengths = mask.sum(dim=1).tolist()
            runs = list(
                scoring_microbatches(
                    batch, mask, lengths, scoring.config.score_microbatch_tokens,
                    forward_cost=forward_cost(next(scoring._model.parameters()).device),
                )
            )  # fmt: skip
            began = time.perf_counter(), time.process_time()
            with neutral(scoring._model):
                for _, packed in runs:
                    parts.hidden_states(device.batch_to_device(packed))
            windows.append((took, time.perf_counter() - began[0], cpu, time.process_time() - began[1]))
            last = time.perf_counter(), time.process_time()

        progress = scoring.run(trunk_alone)
    rest = windows[1:]
    whole, trunk, whole_cpu, trunk_cpu = (sum(part) for part in zip(*rest, strict=True))
    ratios = sorted(window[1] / window[0] for window in rest)
    print(
        json.dumps(
            {
                "samples": progress.samples,
                "window": options.window,
                "tokens": progress.tokens_here,
                "pass_samples_per_second": (progress.samples - options.window) / whole,
                "trunk_samples_per_second": (progress.samples - options.window) / trunk,
                "pass_over_trunk": trunk / whole,
                "pass_over_trunk_by_cpu_seconds": trunk_cpu / whole_cpu,
                "pass_over_trunk_median_window": ratios[len(ratios) // 2],
                "first_window_extra_seconds": windows[0][0] - windows[0][1],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
