"""What grouping by length costs, and what it does to batches of prompts and responses:

    PYTHONPATH=. python tests/mosaicml/bench_length_groups.py gsm8k/train.jsonl MODEL

MODEL is a Hugging Face name or folder, of which the tokenizer is read. Rows have `question` and `answer`. Batches are of 8.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time

import numpy as np
from streaming import MDSWriter
from transformers import AutoTokenizer

from udsstream import UDSStreamingDataset
from udsstream.mosaicml.length_groups import group_by_length
from udsstream.mosaicml.lengths import count_lengths
from udsstream.scoring.seeding import draw_without_replacement
from udsstream.sft import SFTCollator

BATCH = 8


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with MDSWriter(out=folder, columns={"question": "str", "answer": "str"}) as stream, open(sys.argv[1]) as lines:
            for line in lines:
                stream.write(json.loads(line))
        dataset = UDSStreamingDataset(local=folder, batch_size=BATCH)
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
        collator = SFTCollator(tokenizer=tokenizer, max_seq_len=1 << 20, prompt_key="question", response_key="answer")
        wall, processor = time.perf_counter(), time.process_time()
        lengths = count_lengths(dataset, collator.length_of)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    least, middle, most = np.quantile(lengths, (0, 0.5, 1)).astype(int)
    print(
        f"{len(lengths)} rows of {least} to {most} tokens, median {middle}: counted in {wall:.1f} s, {processor:.1f} s of a core"
    )

    order = draw_without_replacement(len(lengths), len(lengths), seed=0, purpose="bench")
    print(
        "batches | longest / shortest of a batch | spread within batches / overall | padding | the 2 longest of 8 / mean"
    )
    for batches in (None, 2, 4, 8, 16, 50, 144):
        places = np.arange(len(order))
        if batches is not None:
            places = group_by_length(lengths[order], batch=BATCH, batches=batches, seed=0, epoch=0)
        rows = lengths[order][places][: len(order) // BATCH * BATCH].reshape(-1, BATCH).astype(float)
        ratio = np.median(rows.max(axis=1) / rows.min(axis=1))
        spread = (rows - rows.mean(axis=1, keepdims=True)).std() / lengths.std()
        padding = 1 - rows.sum() / (rows.max(axis=1) * BATCH).sum()
        longest = np.sort(rows, axis=1)[:, -2:].mean() / rows.mean()
        print(f"{batches or 'shuffled'} | {ratio:.2f} | {spread:.0%} | {padding:.0%} | {longest:.2f}")

    many = np.random.default_rng(0).integers(10, 2000, 10_000_000).astype(np.int32)
    began = time.process_time()
    group_by_length(many, batch=256, batches=50, seed=0, epoch=0)
    print(f"10 million samples are put in order in {time.process_time() - began:.1f} s of a core")


if __name__ == "__main__":
    main()
